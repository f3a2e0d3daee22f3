// The panel: search results, the chosen edge, pinned features, supernodes, and about the circuit when nothing is chosen.

import { useState } from "preact/hooks";
import { EdgeCard, PinnedCard } from "./cards";
import { FaithfulnessCurve } from "./charts";
import { byId, circuit, edges, largestEffect, nodes } from "./data";
import * as files from "./exports";
import { FactTable, NodeLink, StrongestNodes } from "./pieces";
import { scene } from "./scene";
import { hits } from "./search";
import * as state from "./state";
import { count, nodeTitle, plain, visible } from "./text";

const FOUND = 30;

export function Panel() {
  const pinned = state.pins.value.map((id) => byId.get(id)!);
  const edge = state.openEdge.value && state.edgeOf(state.openEdge.value);
  const searching = state.query.value.trim() !== "";
  return (
    <aside id="panel" aria-label="Details" tabIndex={0}>
      {state.selected.value.length > 0 && <Chosen />}
      {searching && <Results />}
      {edge && <EdgeCard edge={edge} />}
      {pinned.length > 1 && (
        <p class="hint tray">
          {pinned.length} pinned{" "}
          <button
            type="button"
            class="small"
            onClick={() => {
              state.pins.value = [];
              state.commit();
            }}
          >
            let go of all
          </button>
        </p>
      )}
      {pinned.map((node) => (
        <PinnedCard key={node.id} node={node} />
      ))}
      {!edge && !pinned.length && !searching && <Overview />}
      <Groups />
    </aside>
  );
}

function Overview() {
  const number = (kind: string) => nodes.filter((node) => node.kind === kind).length;
  const facts: [string, string][] = [
    ["features", String(number("feature"))],
    ["errors", String(number("error"))],
    ...(number("skip") ? [["skips", String(number("skip"))] as [string, string]] : []),
    ["edges", String(edges.length)],
    ...Object.entries(circuit.metadata)
      .filter(([, value]) => ["string", "number", "boolean"].includes(typeof value))
      .map(([name, value]): [string, string] => [
        name.replaceAll("_", " "),
        typeof value === "number" ? plain(value) : visible(value),
      ]),
  ];
  return (
    <article>
      <h2>This circuit</h2>
      {circuit.comparison && (
        <p class="hint">Compared with “{circuit.comparison.title}”: what both have has the values of the first.</p>
      )}
      <Pages />
      <Task />
      {circuit.metadata.faithfulness && (
        <section>
          <h3>Faithfulness by size</h3>
          <FaithfulnessCurve shown={scene.value.nodeCount} />
        </section>
      )}
      <section>
        <h3>Strongest nodes</h3>
        <StrongestNodes />
      </section>
      <section>
        <h3>About</h3>
        <FactTable rows={facts} />
      </section>
      <p class="hint">
        Point at a node to see what it is, click to keep it here, click more to compare. Click an edge to see how one
        feature feeds another. Drag to move, scroll or pinch to zoom. Shift-click or lasso nodes to make a supernode.
        Arrow keys go from node to node, Enter pins, Escape lets go, / searches, Ctrl Z undoes.
      </p>
    </article>
  );
}

/** The way to the other pages of the run. */
function Pages() {
  const { features, report } = circuit.links ?? {};
  if (!features && !report) return null;
  return (
    <p>
      {report && <a href={report}>The report</a>}
      {report && features && " · "}
      {features && <a href={features}>Its features</a>}
    </p>
  );
}

/** Two example pairs with their answers. */
function Task() {
  const pairs = circuit.metadata.example_pairs ?? [];
  if (!pairs.length) return null;
  const cases = Object.entries(circuit.metadata.cases ?? {});
  const counts = cases.map(([name, n]) => (cases.length > 1 ? `${n} ${visible(name.replaceAll("_", " "))}` : count(n, "pair")));
  const side = (text: string, answer?: string) => (
    <span dir="auto">
      {visible(text)}
      <b>{visible(answer ?? "")}</b>
    </span>
  );
  return (
    <section>
      <h3>The task</h3>
      <dl class="task">
        {pairs.slice(0, 2).map((pair) => (
          <>
            {cases.length > 1 && <dt>{visible(pair.case.replaceAll("_", " "))}</dt>}
            <dd>{side(pair.clean, pair.clean_answer)}</dd>
            {pair.patch && <dd class="patch">{side(pair.patch, pair.patch_answer)}</dd>}
          </>
        ))}
      </dl>
      <p class="hint">
        Clean prompt and answer, then the patch prompt{counts.length > 0 && `: ${counts.join(", ")}`}. The metric is{" "}
        {visible(circuit.metadata.metric ?? "")}, read after the last token: small while the behaviour is there.
      </p>
    </section>
  );
}

function Results() {
  const found = hits.value;
  const drawn = scene.value.byNode;
  return (
    <article aria-label="Search results">
      <h2>{count(found.length, "node")} found</h2>
      {!found.length && (
        <p class="hint">
          Nothing in the page holds “{state.query.value.trim()}”: names, labels, tokens, promoted tokens and contexts
          were searched.
        </p>
      )}
      <ol class="links">
        {found.slice(0, FOUND).map(({ node, where }) => (
          <NodeLink
            key={node.id}
            node={node}
            value={node.effect}
            largest={largestEffect}
            note={`${where === "name" ? "" : `in ${where}`}${drawn.has(node) ? "" : `${where === "name" ? "" : ", "}not drawn: rank ${node.rank + 1}`}`}
          />
        ))}
      </ol>
      {found.length > FOUND && <p class="hint">and {found.length - FOUND} weaker ones</p>}
    </article>
  );
}

// --- supernodes -----------------------------------------------------------------------------------------------------------

function Chosen() {
  const ids = state.selected.value;
  const [name, setName] = useState("");
  const make = (event: Event) => {
    event.preventDefault();
    state.makeGroup(name.trim() || `supernode ${state.groups.value.length + 1}`);
    setName("");
  };
  return (
    <form class="card chosen" onSubmit={make} aria-label="New supernode">
      <h2>{count(ids.length, "node")} chosen</h2>
      <p class="hint">
        {ids
          .slice(0, 6)
          .map((id) => nodeTitle(byId.get(id)!))
          .join(", ")}
        {ids.length > 6 ? " …" : ""}
      </p>
      <div class="row">
        <input
          type="text"
          id="group-name"
          aria-label="Name of the supernode"
          placeholder="Name of the supernode"
          dir="auto"
          value={name}
          onInput={(event) => setName(event.currentTarget.value)}
        />
        <button type="submit" id="make-group">
          Make supernode
        </button>
        <button type="button" onClick={() => (state.selected.value = [])}>
          Cancel
        </button>
      </div>
    </form>
  );
}

function Groups() {
  const groups = state.groups.value;
  return (
    <section class="groups">
      {groups.length > 0 && <h3>Supernodes</h3>}
      <ul>
        {groups.map((group, i) => (
          <li key={group.name}>
            <label>
              <input
                type="checkbox"
                checked={group.collapsed}
                onChange={() => state.changeGroup(i, { collapsed: !group.collapsed })}
              />{" "}
              <span dir="auto">{group.name}</span>
            </label>
            <small>
              {count(group.nodes.length, "node")}, effect{" "}
              {plain(group.nodes.reduce((sum, id) => sum + byId.get(id)!.effect, 0))}
            </small>
            <button
              type="button"
              class="close"
              aria-label={`Dissolve ${group.name}`}
              title="Dissolve"
              onClick={() => state.changeGroup(i, null)}
            >
              ×
            </button>
          </li>
        ))}
      </ul>
      <div class="row">
        {groups.length > 0 && (
          <button type="button" class="small" id="save-groups" onClick={files.saveGroups}>
            Save supernodes
          </button>
        )}
        <label class="file small">
          Load supernodes
          <input
            type="file"
            id="load-groups"
            accept=".json"
            onChange={(event) => {
              const file = event.currentTarget.files?.[0];
              if (file) files.loadGroups(file);
            }}
          />
        </label>
      </div>
    </section>
  );
}
