// The page: heading and controls, drawing or table, legend, panel.

import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { useSignalEffect } from "@preact/signals";
import { byId, circuit, edges, nodes, ranked } from "./data";
import { HoverCard, EdgeSummary } from "./cards";
import * as files from "./exports";
import { Legend } from "./legend";
import { Panel } from "./panel";
import { edgeThreshold, faithfulnessAt, fittingCount, scene, shownCount, shownEdgeCount } from "./scene";
import { hits } from "./search";
import { Stage } from "./stage";
import * as state from "./state";
import { Table } from "./table";
import { count, describe, effectWords, nodeTitle, plain } from "./text";

export let stage: Stage;

export function App() {
  return (
    <>
      <Header />
      <main class={state.pins.value.length || state.openEdge.value || state.query.value ? "open" : ""}>
        <section id="stage" aria-label="Circuit">
          <div id="graph" hidden={state.view.value !== "graph"}><Drawing /></div>
          {state.view.value === "table" && <Table />}
          <Legend />
        </section>
        <Panel />
      </main>
      <p class="visually-hidden" role="status" aria-live="polite" id="status">{status()}</p>
      <div id="printed" aria-hidden="true" />
    </>
  );
}

const status = () =>
  state.announcement.value || `${count(scene.value.nodeCount, "node")} and ${count(scene.value.links.length, "edge")} shown`;

// --- heading --------------------------------------------------------------------------------------------------------------

function Header() {
  return (
    <header>
      <h1 title={circuit.title} dir="auto">{circuit.title}</h1>
      <div class="controls" role="toolbar" aria-label="Filters">
        <NodeSlider />
        <EdgeSlider />
        <div class="checks">
          <Check id="errors" value={state.showErrors} text="errors" title="Show what the SAEs miss" />
          <Check id="connected" value={state.connectedOnly} text="connected" title="Hide nodes without a visible edge" />
          <Check id="paths" value={state.wholePaths} text="whole paths" title="Follow edges all the way, not only to neighbours" />
          {nodes.some((n) => n.attributes.interval) && <Check id="certain" value={state.certainOnly} text="clear of zero" title="Hide nodes whose interval touches zero" />}
        </div>
        <Search />
        <Buttons />
      </div>
    </header>
  );
}

function NodeSlider() {
  const shown = scene.value.nodeCount;
  const faithful = faithfulnessAt(shown);
  return (
    <label class="slider" for="nodes">
      <span>Nodes <output id="nodes-shown" for="nodes">{shown} of {ranked.length}</output>
        {faithful && <output class="faithful" title={`Faithfulness of circuits of the strongest nodes${circuit.metadata.faithfulness?.start_site ? ` from ${circuit.metadata.faithfulness.start_site} on` : ""}. Measured: ${faithful.measured}`}> · faithfulness {Number.isNaN(faithful.value) ? `below ${faithful.measured}` : faithful.value.toFixed(2)}</output>}
      </span>
      <input type="range" id="nodes" min="1" max={Math.max(1, ranked.length)} step="1" value={Math.min(shownCount.value, ranked.length)}
        onInput={(event) => (state.nodeCount.value = Number(event.currentTarget.value))} onChange={() => state.commit()} />
    </label>
  );
}

// The edge slider is logarithmic in the number of edges: the few strongest deserve as much room as the many weak.
function EdgeSlider() {
  const between = scene.value.edgesBetween;
  const chosen = shownEdgeCount.value;
  const place = Math.round((1000 * Math.log1p(chosen)) / Math.log1p(Math.max(1, between)));
  const set = (value: number) => {
    state.edgeCount.value = value >= 1000 ? edges.length : Math.round(Math.expm1((value / 1000) * Math.log1p(between)));
  };
  return (
    <label class="slider" for="edges">
      <span>Edges <output id="edges-shown" for="edges">{chosen} of {between}{chosen ? ` · |w| ≥ ${plain(edgeThreshold.value)}` : ""}</output></span>
      <input type="range" id="edges" min="0" max="1000" step="1" value={place} disabled={!edges.length}
        onInput={(event) => set(Number(event.currentTarget.value))} onChange={() => state.commit()} />
    </label>
  );
}

function Check({ id, value, text, title }: { id: string; value: { value: boolean }; text: string; title: string }) {
  return (
    <label class="check" title={title}>
      <input type="checkbox" id={id} checked={value.value} onChange={(event) => { value.value = event.currentTarget.checked; state.commit(); }} /> {text}
    </label>
  );
}

function Search() {
  const found = hits.value;
  const next = () => {
    const at = found.findIndex((hit) => state.pins.value[0] === hit.node.id);
    const hit = found[(at + 1) % found.length];
    if (!hit) return;
    state.pins.value = [hit.node.id];
    state.commit();
    stage.reveal(hit.node.id);
  };
  return (
    <div class="search">
      <input type="search" id="search" placeholder="Search  /" aria-label="Search names, labels, tokens and contexts" autocomplete="off" spellcheck={false}
        value={state.query.value} onInput={(event) => (state.query.value = event.currentTarget.value)} onKeyDown={(event) => event.key === "Enter" && next()} />
      <output id="found" for="search">{state.query.value.trim() ? String(found.length) : ""}</output>
    </div>
  );
}

function Buttons() {
  const [open, setOpen] = useState(false);
  const host = useRef<HTMLDivElement>(null);
  useEffect(() => {
    const close = (event: Event) => !host.current?.contains(event.target as Node) && setOpen(false);
    addEventListener("pointerdown", close);
    return () => removeEventListener("pointerdown", close);
  }, []);
  const item = (id: string, text: string, act: () => unknown) => (
    <button type="button" id={id} onClick={() => { setOpen(false); act(); }}>{text}</button>
  );
  return (
    <div class="buttons" ref={host}>
      <button type="button" id="undo" aria-label="Undo" title="Undo (Ctrl Z)" disabled={!state.past.value.length} onClick={state.undo}>↶</button>
      <button type="button" id="redo" aria-label="Redo" title="Redo (Ctrl Shift Z)" disabled={!state.future.value.length} onClick={state.redo}>↷</button>
      <button type="button" id="table-view" aria-pressed={state.view.value === "table"} title="The same nodes and edges as tables"
        onClick={() => { state.view.value = state.view.value === "table" ? "graph" : "table"; state.commit(); }}>Table</button>
      <button type="button" id="save" aria-expanded={open} aria-haspopup="true" onClick={() => setOpen(!open)}>Save ▾</button>
      {open && (
        <div class="menu" onKeyDown={(event) => event.key === "Escape" && setOpen(false)}>
          {item("save-svg", "Picture, SVG", files.saveSvg)}
          {item("save-png", "Picture, PNG", files.savePng)}
          {item("save-json", "Shown graph, JSON", files.saveJson)}
          {item("save-nodes", "Shown nodes, CSV", files.saveNodesCsv)}
          {item("save-edges", "Shown edges, CSV", files.saveEdgesCsv)}
          {item("save-labels", "All labels, JSON lines", files.saveLabels)}
          {item("copy-python", "Copy as Python", files.copyPython)}
        </div>
      )}
    </div>
  );
}

// --- drawing --------------------------------------------------------------------------------------------------------------

function Drawing() {
  const host = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    stage = new Stage(host.current!);
  }, []);
  return (
    <>
      <div id="drawing" ref={host} class={state.lassoing.value ? "lassoing" : ""} />
      <Twin />
      <Card />
      <div class="zoom" role="group" aria-label="Zoom">
        <button type="button" aria-label="Zoom in" title="Zoom in (+)" onClick={() => stage.zoomBy(1.3)}>+</button>
        <button type="button" aria-label="Zoom out" title="Zoom out (−)" onClick={() => stage.zoomBy(1 / 1.3)}>−</button>
        <button type="button" id="fit" aria-label="Fit" title="The strongest nodes, fitted to the window (0)" onClick={() => stage.fit()}>⤢</button>
        <button type="button" id="lasso" aria-label="Lasso" aria-pressed={state.lassoing.value} title="Draw around nodes to make a supernode (or shift-drag, shift-click)" onClick={() => (state.lassoing.value = !state.lassoing.value)}>◌</button>
        {state.nodeCount.value !== 0 && state.nodeCount.value !== fittingCount.value && (
          <button type="button" id="readable" title="As many nodes as can be read at this size" onClick={() => { state.nodeCount.value = 0; state.edgeCount.value = -1; state.commit(); stage.fit(); }}>readable</button>
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
    <div id="hover" class={place ? "" : "unplaced"} ref={own} style={place ? { left: `${place.left}px`, top: `${place.top}px` } : {}}>
      {item?.group ? <><b class="name">{item.group.name}</b><p class="numbers">{item.members.length} nodes, effects sum to {plain(item.effect)}; click to open</p></> : node ? <HoverCard node={node} /> : link ? <EdgeSummary edges={link.edges} /> : null}
    </div>
  );
}

// --- keyboard and screen reader ---------------------------------------------------------------------------------------------

const DIRECTIONS: Record<string, [number, number]> = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };

/** The nearest node in a direction; sideways distance counts double. */
function neighbourIn(id: string, [dx, dy]: [number, number]): string | null {
  const from = stage.itemOf(id);
  if (!from) return null;
  let best: { id: string; distance: number } | null = null;
  for (const other of scene.value.items) {
    const ahead = (other.x - from.x) * dx + (other.y - from.y) * dy;
    const aside = Math.abs((other.x - from.x) * dy) + Math.abs((other.y - from.y) * dx);
    if (ahead > 1 && (dx === 0 || aside < 20) && (!best || ahead + 2 * aside < best.distance)) best = { id: other.id, distance: ahead + 2 * aside };
  }
  return best?.id ?? null;
}

/** A list box that a keyboard and a screen reader see in place of the canvas: one tab stop, arrows go from node to node. */
function Twin() {
  const [at, setAt] = useState<string | null>(null);
  const items = scene.value.items;
  const current = items.find((item) => item.id === at) ?? items.find((item) => item.node.kind === "metric") ?? items[0];
  const place = items.indexOf(current);
  const go = (id: string | null) => {
    if (!id) return;
    setAt(id);
    state.hovered.value = id;
    stage.reveal(id);
  };
  const press = (event: KeyboardEvent) => {
    if (!current) return;
    if (DIRECTIONS[event.key]) go(neighbourIn(current.id, DIRECTIONS[event.key]));
    else if (event.key === "Home" || event.key === "End") go(items.at(event.key === "Home" ? 0 : -1)!.id);
    else if ((event.key === "Enter" || event.key === " ") && event.shiftKey) for (const node of current.members) state.toggleSelected(node.id);
    else if (event.key === "Enter" || event.key === " ") current.group ? state.changeGroup(state.groups.value.indexOf(current.group), { collapsed: false }) : state.togglePin(current.id);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const near = items.slice(Math.max(0, place - 5), place + 6);
  return (
    <div id="nodes-list" class="visually-hidden focus-drawing" role="listbox" tabIndex={0} aria-multiselectable="true"
      aria-label="Nodes of the circuit, first site at the bottom, metric on top. Arrow keys go from node to node, Enter pins."
      aria-activedescendant={current ? `option-${place}` : undefined} onKeyDown={press}
      onFocus={() => current && go(current.id)} onBlur={() => (state.hovered.value = null)}>
      {near.map((item) => {
        const i = items.indexOf(item);
        const words = item.group ? `${item.group.name}, supernode of ${item.members.length}` : `${nodeTitle(item.node)}, ${describe(item.node)}, ${effectWords(item.node)}, ${item.node.incoming.length} in, ${item.node.outgoing.length} out`;
        return <div role="option" id={`option-${i}`} data-id={item.id} aria-selected={state.pins.value.includes(item.id)} aria-setsize={items.length} aria-posinset={i + 1}>{words}</div>;
      })}
    </div>
  );
}

export function setUpKeyboard(): void {
  addEventListener("keydown", (event) => {
    const target = event.target as HTMLElement;
    const typing = target.matches?.("input[type=text], input[type=search]");
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !typing) {
      event.preventDefault();
      return event.shiftKey ? state.redo() : state.undo();
    }
    if (event.key === "Escape") return escape(target);
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") document.getElementById("search")!.focus();
    else if (event.key === "+" || event.key === "=") stage.zoomBy(1.25);
    else if (event.key === "-") stage.zoomBy(0.8);
    else if (event.key === "0") stage.fit();
    else return;
    event.preventDefault();
  });
}

/** Lets go of one thing after the other: lasso, search, hover, chosen nodes, pins. */
function escape(target: HTMLElement): void {
  if (state.lassoing.value) state.lassoing.value = false;
  else if (state.query.value) {
    state.query.value = "";
    target.blur?.();
  } else if (state.selected.value.length) state.selected.value = [];
  else {
    state.pins.value = [];
    state.openEdge.value = state.hovered.value = state.hoveredEdge.value = null;
    state.commit();
  }
}
