// The page: heading and controls, drawing or table, legend, panel.

import { useSignalEffect } from "@preact/signals";
import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { EdgeSummary, HoverCard } from "./cards";
import { byId } from "./data";
import { Header } from "./header";
import { Twin } from "./keyboard";
import { Legend } from "./legend";
import { Panel } from "./panel";
import { fittingCount, scene } from "./scene";
import { stage, startStage } from "./stage";
import * as state from "./state";
import { Table } from "./table";
import { count, plain } from "./text";

export function App() {
  return (
    <>
      <Header />
      <main class={state.pins.value.length || state.openEdge.value || state.query.value ? "open" : ""}>
        <section id="stage" aria-label="Circuit">
          <div id="graph" hidden={state.view.value !== "graph"}>
            <Drawing />
          </div>
          {state.view.value === "table" && <Table />}
          <Legend />
        </section>
        <Panel />
      </main>
      <p class="visually-hidden" role="status" aria-live="polite" id="status">
        {status()}
      </p>
      <div id="printed" aria-hidden="true" />
    </>
  );
}

const status = () =>
  state.announcement.value ||
  `${count(scene.value.nodeCount, "node")} and ${count(scene.value.links.length, "edge")} shown`;

// --- drawing --------------------------------------------------------------------------------------------------------------

function Drawing() {
  const host = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    startStage(host.current!);
  }, []);
  return (
    <>
      <div id="drawing" ref={host} class={state.lassoing.value ? "lassoing" : ""} />
      <Twin />
      <Card />
      <div class="zoom" role="group" aria-label="Zoom">
        <button type="button" aria-label="Zoom in" title="Zoom in (+)" onClick={() => stage.zoomBy(1.3)}>
          +
        </button>
        <button type="button" aria-label="Zoom out" title="Zoom out (−)" onClick={() => stage.zoomBy(1 / 1.3)}>
          −
        </button>
        <button
          type="button"
          id="fit"
          aria-label="Fit"
          title="The strongest nodes, fitted to the window (0)"
          onClick={() => stage.fit()}
        >
          ⤢
        </button>
        <button
          type="button"
          id="lasso"
          aria-label="Lasso"
          aria-pressed={state.lassoing.value}
          title="Draw around nodes to make a supernode (or shift-drag, shift-click)"
          onClick={() => (state.lassoing.value = !state.lassoing.value)}
        >
          ◌
        </button>
        {state.nodeCount.value !== 0 && state.nodeCount.value !== fittingCount.value && (
          <button
            type="button"
            id="readable"
            title="As many nodes as can be read at this size"
            onClick={() => {
              state.nodeCount.value = 0;
              state.edgeCount.value = -1;
              state.commit();
              stage.fit();
            }}
          >
            readable
          </button>
        )}
      </div>
    </>
  );
}

/** The card beside what is hovered. */
function Card() {
  const [place, setPlace] = useState<{ left: number; top: number } | null>(null);
  const own = useRef<HTMLDivElement>(null);
  const id = state.hovered.value;
  const key = id ? null : state.hoveredEdge.value;
  useSignalEffect(() => {
    const [node, edge] = [state.hovered.value, state.hoveredEdge.value];
    requestAnimationFrame(() => {
      const target = node ? stage?.where(node) : edge ? stage?.whereEdge(edge) : null;
      const card = own.current;
      if (!target || !card) return setPlace(null);
      setPlace(stage.placeCard(target, card.offsetWidth, card.offsetHeight));
    });
  });
  const item = id ? scene.value.items.find((candidate) => candidate.id === id) : null;
  const node = id ? byId.get(id) : null;
  const link = key ? scene.value.links.find((candidate) => candidate.key === key) : null;
  if (!node && !item && !link) return null;
  return (
    <div
      id="hover"
      class={place ? "" : "unplaced"}
      ref={own}
      style={place ? { left: `${place.left}px`, top: `${place.top}px` } : {}}
    >
      {item?.group ? (
        <>
          <b class="name">{item.group.name}</b>
          <p class="numbers">
            {item.members.length} nodes, effects sum to {plain(item.effect)}; click to open
          </p>
        </>
      ) : node ? (
        <HoverCard node={node} />
      ) : link ? (
        <EdgeSummary edges={link.edges} />
      ) : null}
    </div>
  );
}
