// What is known of a feature: under the pointer in short, pinned in full; and how one feeds another.

import { Histogram } from "./charts";
import {
  activationByCase,
  circuit,
  type Edge,
  type GraphNode,
  nodeSide,
  positionNames,
  ranked,
  touchesZero,
} from "./data";
import { Bar, ClassBars, Contexts, FactTable, NodeLink, Token } from "./pieces";
import * as state from "./state";
import { describe, effectWords, labelOf, nodeTitle, number, percent, plain, promoted, range, visible } from "./text";

const LISTED = 8;

export function evidence(node: GraphNode): string {
  const { interval, exact_effect: exact } = node.attributes;
  const words = [effectWords(node)];
  if (interval) words.push(`${range(interval)}${touchesZero(interval) ? ", touches zero" : ""}`);
  if (typeof exact === "number") words.push(`patched alone ${number(exact)}`);
  return words.filter(Boolean).join(" ");
}

const Subtitle = ({ node }: { node: GraphNode }) => (
  <small class="who">
    {nodeTitle(node)}
    {node.kind === "feature" && (
      <span class={`source ${labelOf(node) ? "hand" : ""}`}>{labelOf(node) ? "labelled" : "top tokens"}</span>
    )}
  </small>
);

/** The card under the pointer. */
export function HoverCard({ node }: { node: GraphNode }) {
  const { contexts, density } = node.attributes;
  const [top, bottom] = [promoted(node, "top_logits"), promoted(node, "bottom_logits")];
  return (
    <>
      <b class="name" dir="auto">
        {describe(node) || nodeTitle(node)}
      </b>
      <Subtitle node={node} />
      <p class="numbers">
        {evidence(node)}
        {typeof density === "number" ? ` · on at ${percent(density)} of tokens` : ""}
      </p>
      <ClassBars node={node} />
      {contexts?.length ? <Contexts contexts={contexts} most={3} /> : null}
      {top.length ? (
        <p class="promotes">
          raises{" "}
          {top.slice(0, 5).map(([t]) => (
            <Token text={t} />
          ))}
        </p>
      ) : null}
      {bottom.length ? (
        <p class="promotes">
          lowers{" "}
          {bottom.slice(0, 5).map(([t]) => (
            <Token text={t} />
          ))}
        </p>
      ) : null}
    </>
  );
}

export function EdgeSummary({ edges }: { edges: Edge[] }) {
  const weight = edges.reduce((sum, edge) => sum + edge.weight, 0);
  const [{ source, target, interval }] = edges;
  return (
    <>
      <b class="name">
        {nodeTitle(source)} → {nodeTitle(target)}
      </b>
      <p class="numbers">
        {edges.length > 1 ? `${edges.length} edges, sum ` : "weight "}
        {number(weight)}
        {edges.length === 1 && interval ? ` ${range(interval)}` : ""}
      </p>
      <small>
        {describe(source)} → {describe(target)}
      </small>
    </>
  );
}

// --- pinned ---------------------------------------------------------------------------------------------------------------

export function PinnedCard({ node }: { node: GraphNode }) {
  const { contexts, top_tokens: tokens, histogram } = node.attributes;
  const [top, bottom] = [promoted(node, "top_logits"), promoted(node, "bottom_logits")];
  const chosen = state.selected.value.includes(node.id);
  return (
    <article class="card" aria-label={nodeTitle(node)} data-id={node.id}>
      <div class="heading">
        <h2>{nodeTitle(node)}</h2>
        {node.kind !== "metric" && (
          <button
            type="button"
            class="small"
            aria-pressed={chosen}
            onClick={() => state.toggleSelected(node.id)}
            title="Choose for a supernode (shift-click in the drawing)"
          >
            group
          </button>
        )}
        <button
          type="button"
          class="close"
          aria-label={`Let go of ${nodeTitle(node)}`}
          title="Let go"
          onClick={() => state.togglePin(node.id)}
        >
          ×
        </button>
      </div>
      {node.kind === "metric" ? (
        <p class="hint">The output of the circuit: {visible(circuit.metadata.metric ?? "the metric")}.</p>
      ) : (
        <LabelEditor node={node} />
      )}
      {node.kind === "error" && (
        <p class="hint">What the SAE of this site misses: the activation minus its reconstruction.</p>
      )}
      <Facts node={node} />
      {activationByCase(node).length > 0 && (
        <section>
          <h3>When is it on? Mean activation by case</h3>
          <ClassBars node={node} />
        </section>
      )}
      {histogram && (
        <section>
          <h3>Activations</h3>
          <Histogram {...histogram} />
        </section>
      )}
      {contexts?.length ? (
        <section>
          <h3>Strongest contexts</h3>
          <Contexts contexts={contexts} most={contexts.length} />
        </section>
      ) : null}
      {top.length || bottom.length ? (
        <section>
          <h3>Direct effect on the logits</h3>
          {early(node) && <p class="hint">This site is early in the model: its direct effect says little.</p>}
          <div class="logits">
            <Logits title="raises" items={top} sign={1} />
            <Logits title="lowers" items={bottom} sign={-1} />
          </div>
        </section>
      ) : null}
      {tokens?.length ? (
        <section>
          <h3>Top tokens</h3>
          <p class="chips">
            {tokens.map((t) => (
              <Token text={t} />
            ))}
          </p>
        </section>
      ) : null}
      <EdgeList title="Reads from" edges={node.incoming} end="source" />
      <EdgeList title="Feeds" edges={node.outgoing} end="target" />
    </article>
  );
}

/** In the first third of the sites the logit lens means little. */
const early = (node: GraphNode) => circuit.sites.indexOf(node.site) < circuit.sites.length / 3;

function LabelEditor({ node }: { node: GraphNode }) {
  const id = `label-${node.index}`;
  return (
    <label class="label" for={id}>
      <span>Label</span>
      <input
        id={id}
        type="text"
        dir="auto"
        value={labelOf(node)}
        placeholder={describe(node) || "What does this feature mean?"}
        spellcheck={false}
        onInput={(event) => state.setLabel(node.name, event.currentTarget.value.trim(), node.label)}
        onChange={() => state.commit()}
      />
    </label>
  );
}

function Facts({ node }: { node: GraphNode }) {
  const rows: [string, string][] = [];
  if (effectWords(node)) rows.push([node.kind === "metric" ? "total effect" : "effect", number(node.effect)]);
  for (const [name, value] of Object.entries(node.attributes)) {
    const title = name.replaceAll("_", " ");
    if (name === "interval")
      rows.push([
        title,
        `${number((value as number[])[0])} to ${number((value as number[])[1])}${touchesZero(value as [number, number]) ? " (touches zero)" : ""}`,
      ]);
    else if (name === "density")
      rows.push([title, `${percent(value as number)} of tokens${(value as number) > 0.3 ? " (dense)" : ""}`]);
    else if (typeof value === "number") rows.push([title, name.includes("effect") ? number(value) : plain(value)]);
    else if (typeof value === "string") rows.push([title, visible(value)]);
  }
  const other = circuit.comparison?.effects[node.index];
  if (circuit.comparison) {
    const second = nodeSide![node.index] !== 1;
    const title = visible(second ? circuit.comparison.title : circuit.title);
    rows.push([`effect in ${title}`, second && typeof other === "number" ? number(other) : "not in it"]);
  }
  if (node.rank >= 0) rows.push(["rank", `${node.rank + 1} of ${ranked.length}`]);
  if (node.position !== null)
    rows.push([
      "position",
      `${node.position}${typeof node.position === "number" ? ` “${positionNames.get(node.position)}”` : ""}`,
    ]);
  return <FactTable rows={rows} />;
}

function Logits({ title, items, sign }: { title: string; items: (readonly [string, number | null])[]; sign: number }) {
  const largest = Math.max(...items.map(([, value]) => Math.abs(value ?? 0)), 1e-12);
  return (
    <div>
      <h4>{title}</h4>
      <ol>
        {items.map(([token, value]) => (
          <li>
            <Token text={token} />
            {value !== null && (
              <>
                <Bar value={sign * Math.abs(value)} largest={largest} />
                <span class="value">{number(value)}</span>
              </>
            )}
          </li>
        ))}
      </ol>
    </div>
  );
}

function EdgeList({ title, edges, end }: { title: string; edges: Edge[]; end: "source" | "target" }) {
  if (!edges.length) return null;
  const line = (edge: Edge) => (
    <NodeLink node={edge[end]} value={edge.weight} largest={Math.abs(edges[0].weight)} edge={edge} />
  );
  return (
    <section>
      <h3>
        {title} ({edges.length})
      </h3>
      <ol class="links">{edges.slice(0, LISTED).map(line)}</ol>
      {edges.length > LISTED && (
        <details class="more">
          <summary>{edges.length - LISTED} more</summary>
          <ol class="links">{edges.slice(LISTED).map(line)}</ol>
        </details>
      )}
    </section>
  );
}

/** How one feature feeds another. */
export function EdgeCard({ edge }: { edge: Edge }) {
  const { source, target, weight, interval } = edge;
  const share = target.effect ? weight / target.effect : null;
  const side = (node: GraphNode) => (
    <div>
      <small>{nodeTitle(node)}</small>
      <b class="name" dir="auto">
        {describe(node)}
      </b>
      <ClassBars node={node} />
      {node.attributes.contexts?.length ? <Contexts contexts={node.attributes.contexts} most={3} /> : null}
      <button
        type="button"
        class="small"
        onClick={() => !state.pins.value.includes(node.id) && state.togglePin(node.id)}
      >
        pin
      </button>
    </div>
  );
  return (
    <article class="card edge-card" aria-label="Edge">
      <div class="heading">
        <h2>
          {nodeTitle(source)} → {nodeTitle(target)}
        </h2>
        <button
          type="button"
          class="close"
          aria-label="Close the edge"
          title="Close"
          onClick={() => ((state.openEdge.value = null), state.commit())}
        >
          ×
        </button>
      </div>
      <FactTable
        rows={[
          ["weight", number(weight)],
          ...(interval
            ? [
                [
                  "interval",
                  `${number(interval[0])} to ${number(interval[1])}${touchesZero(interval) ? " (touches zero)" : ""}`,
                ] as [string, string],
              ]
            : []),
          ...(share !== null && target.kind !== "metric"
            ? [["of the target's effect", percent(share)] as [string, string]]
            : []),
          [
            "rank",
            `${source.outgoing.indexOf(edge) + 1} of ${source.outgoing.length} edges out, ${target.incoming.indexOf(edge) + 1} of ${target.incoming.length} in`,
          ],
        ]}
      />
      <div class="pair">
        {side(source)}
        <div class="arrow" aria-hidden="true">
          →
        </div>
        {side(target)}
      </div>
    </article>
  );
}
