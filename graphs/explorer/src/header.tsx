// The heading: title, thresholds, search and what can be saved.

import { useEffect, useRef, useState } from "preact/hooks";
import { circuit, edges, nodes, ranked } from "./data";
import * as files from "./exports";
import { edgeThreshold, faithfulnessAt, scene, shownCount, shownEdgeCount } from "./scene";
import { hits } from "./search";
import { stage } from "./stage";
import * as state from "./state";
import { plain } from "./text";

export function Header() {
  return (
    <header>
      <h1 title={circuit.title} dir="auto">
        {circuit.title}
      </h1>
      <div class="controls" role="toolbar" aria-label="Filters">
        <NodeSlider />
        <EdgeSlider />
        <div class="checks">
          <Check id="errors" value={state.showErrors} text="errors" title="Show what the SAEs miss" />
          <Check
            id="connected"
            value={state.connectedOnly}
            text="connected"
            title="Hide nodes without a visible edge"
          />
          <Check
            id="paths"
            value={state.wholePaths}
            text="whole paths"
            title="Follow edges all the way, not only to neighbours"
          />
          {nodes.some((n) => n.attributes.interval) && (
            <Check
              id="certain"
              value={state.certainOnly}
              text="clear of zero"
              title="Hide nodes whose interval touches zero"
            />
          )}
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
      <span>
        Nodes{" "}
        <output id="nodes-shown" for="nodes">
          {shown} of {ranked.length}
        </output>
        {faithful && (
          <output
            class="faithful"
            title={`Faithfulness of circuits of the strongest nodes${circuit.metadata.faithfulness?.start_site ? ` from ${circuit.metadata.faithfulness.start_site} on` : ""}. Measured: ${faithful.measured}`}
          >
            {" "}
            · faithfulness {Number.isNaN(faithful.value) ? `below ${faithful.measured}` : faithful.value.toFixed(2)}
          </output>
        )}
      </span>
      <input
        type="range"
        id="nodes"
        min="1"
        max={Math.max(1, ranked.length)}
        step="1"
        value={Math.min(shownCount.value, ranked.length)}
        onInput={(event) => (state.nodeCount.value = Number(event.currentTarget.value))}
        onChange={() => state.commit()}
      />
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
      <span>
        Edges{" "}
        <output id="edges-shown" for="edges">
          {chosen} of {between}
          {chosen ? ` · |w| ≥ ${plain(edgeThreshold.value)}` : ""}
        </output>
      </span>
      <input
        type="range"
        id="edges"
        min="0"
        max="1000"
        step="1"
        value={place}
        disabled={!edges.length}
        onInput={(event) => set(Number(event.currentTarget.value))}
        onChange={() => state.commit()}
      />
    </label>
  );
}

function Check({ id, value, text, title }: { id: string; value: { value: boolean }; text: string; title: string }) {
  return (
    <label class="check" title={title}>
      <input
        type="checkbox"
        id={id}
        checked={value.value}
        onChange={(event) => {
          value.value = event.currentTarget.checked;
          state.commit();
        }}
      />{" "}
      {text}
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
      <input
        type="search"
        id="search"
        placeholder="Search  /"
        aria-label="Search names, labels, tokens and contexts"
        autocomplete="off"
        spellcheck={false}
        value={state.query.value}
        onInput={(event) => (state.query.value = event.currentTarget.value)}
        onKeyDown={(event) => event.key === "Enter" && next()}
      />
      <output id="found" for="search">
        {state.query.value.trim() ? String(found.length) : ""}
      </output>
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
    <button
      type="button"
      id={id}
      onClick={() => {
        setOpen(false);
        act();
      }}
    >
      {text}
    </button>
  );
  return (
    <div class="buttons" ref={host}>
      <button
        type="button"
        id="undo"
        aria-label="Undo"
        title="Undo (Ctrl Z)"
        disabled={!state.past.value.length}
        onClick={state.undo}
      >
        ↶
      </button>
      <button
        type="button"
        id="redo"
        aria-label="Redo"
        title="Redo (Ctrl Shift Z)"
        disabled={!state.future.value.length}
        onClick={state.redo}
      >
        ↷
      </button>
      <button
        type="button"
        id="table-view"
        aria-pressed={state.view.value === "table"}
        title="The same nodes and edges as tables"
        onClick={() => {
          state.view.value = state.view.value === "table" ? "graph" : "table";
          state.commit();
        }}
      >
        Table
      </button>
      <button type="button" id="save" aria-expanded={open} aria-haspopup="true" onClick={() => setOpen(!open)}>
        Save ▾
      </button>
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
