// A feature: when it is on, in which contexts, what it does there, what is like it. The same sections stand in the
// explorer's cards and on the feature's own page.

import { ActivationHistogram, LogitHistogram } from "./charts";
import { activationByCase, circuit, type Edge, type GraphNode, nodeSide, positionNames, ranked, touchesZero } from "./data";
import { Bar, CaseBars, ClassBars, Contexts, FactTable, largestIn, NodeLink, Token } from "./pieces";
import * as state from "./state";
import { describe, effectWords, labelOf, nodeTitle, number, percent, plain, promoted, range, visible } from "./text";

const LISTED = 8;
const DENSE = 0.3;
const NOT_FACTS = ["n_tokens", "index", "site", "schema_version", "automatic_label", "label_by"];

/** Where a feature's words come from. */
export const sourceOf = (node: GraphNode) =>
  labelOf(node) ? "labelled" : node.attributes.automatic_label ? "automatic label" : "top tokens";

export function evidence(node: GraphNode): string {
  const { interval, exact_effect: exact } = node.attributes;
  const words = [effectWords(node)];
  if (interval) words.push(`${range(interval)}${touchesZero(interval) ? ", touches zero" : ""}`);
  if (typeof exact === "number") words.push(`patched alone ${number(exact)}`);
  return words.filter(Boolean).join(" · ");
}

export const Subtitle = ({ node }: { node: GraphNode }) => (
  <small class="who">
    {nodeTitle(node)}
    {node.kind === "feature" && (
      <span class={`source ${labelOf(node) ? "hand" : ""}`}>{sourceOf(node)}</span>
    )}
  </small>
);

/** In the first third of the sites the logit lens means little. */
const early = (node: GraphNode) => circuit.sites.indexOf(node.site) < circuit.sites.length / 3;


/** All that is known of a feature but its effect and edges; `full` has room for random samples and spans. */
export function FeatureSections({ node, full = false }: { node: GraphNode; full?: boolean }) {
  const left = [<Activity node={node} full={full} />, <Effects node={node} />, <TopTokens node={node} />];
  if (!full)
    return (
      <>
        <Activity node={node} full={false} />
        <StrongestContexts node={node} />
        <Effects node={node} />
        <TopTokens node={node} />
        <Attention node={node} />
        <Similar node={node} />
      </>
    );
  return (
    <div class="columns">
      <div>
        {left}
        {node.attributes.outside !== true && (
          <>
            <EdgeList title="Reads from" edges={node.incoming} end="source" />
            <EdgeList title="Feeds" edges={node.outgoing} end="target" />
          </>
        )}
        <Attention node={node} />
        <Similar node={node} />
      </div>
      <div class="reading">
        <StrongestContexts node={node} />
        <Samples node={node} />
      </div>
    </div>
  );
}

function Activity({ node, full }: { node: GraphNode; full: boolean }) {
  const { histogram, quantiles, density, max_activation: most } = node.attributes;
  const hasCases = activationByCase(node).length > 0;
  return (
    <>
      {hasCases && (
        <section>
          <h3>When is it on? Mean activation by case{full ? " and span" : ""}</h3>
          {full ? <CaseBars node={node} /> : <ClassBars node={node} />}
        </section>
      )}
      {histogram?.counts.length ? (
        <section>
          <h3>Activations above zero</h3>
          <ActivationHistogram node={node} />
          {quantiles?.length ? (
            <p class="hint">
              {quantiles.map(([share, value]) => `${quantileName(share)} ${plain(value)}`).join(", ")}
              {typeof most === "number" ? `, largest ${plain(Number(most.toPrecision(3)))}` : ""}
              {typeof density === "number" ? `; on at ${percent(density)} of tokens` : ""}
              {(density ?? 0) > DENSE ? ": a dense feature" : ""}.
            </p>
          ) : null}
        </section>
      ) : density === 0 ? (
        <p class="hint never">It is never on in the text that was read.</p>
      ) : null}
    </>
  );
}

const quantileName = (share: number) => (share === 0.5 ? "median" : `${plain(Number((100 * share).toFixed(1)))} % below`);

function StrongestContexts({ node }: { node: GraphNode }) {
  const { contexts } = node.attributes;
  if (!contexts?.length) return null;
  const withChange = contexts.some((context) => context.change);
  return (
    <section>
      <h3>Strongest contexts, one a peak token</h3>
      {withChange && <ChangeKey />}
      <Contexts contexts={contexts} most={contexts.length} largest={largestIn(node)} />
    </section>
  );
}

/** What shade and underline stand for. */
const ChangeKey = () => (
  <p class="hint key">
    <mark style={{ "--strength": "0.7" }}>shade</mark> its activation; without it the token becomes{" "}
    <u class="change negative">less</u> or <u class="change positive">more</u> probable
  </p>
);

/** Contexts drawn at random: by interval of activation, and from all of the text. */
function Samples({ node }: { node: GraphNode }) {
  const { samples, random } = node.attributes;
  const largest = largestIn(node);
  return (
    <>
      {(samples ?? []).map((sample) => (
        <section>
          <h3>
            {plain(Number(sample.low.toPrecision(3)))} to {plain(Number(sample.high.toPrecision(3)))}{" "}
            <small>{percent(sample.share)} of tokens, drawn at random</small>
          </h3>
          <Contexts contexts={sample.contexts} most={sample.contexts.length} largest={largest} whole />
        </section>
      ))}
      {random?.length ? (
        <section>
          <h3>
            Any token <small>drawn at random from all of the text</small>
          </h3>
          <Contexts contexts={random} most={random.length} largest={largest} whole />
        </section>
      ) : null}
    </>
  );
}

function Effects({ node }: { node: GraphNode }) {
  const { logit_histogram: histogram } = node.attributes;
  const [top, bottom] = [promoted(node, "top_logits"), promoted(node, "bottom_logits")];
  if (!top.length && !bottom.length) return null;
  return (
    <section class={early(node) ? "early" : ""}>
      <h3>Direct effect on the logits</h3>
      {early(node) && <p class="hint">This site is early in the model: its direct effect says little.</p>}
      {histogram?.counts?.length ? <LogitHistogram {...histogram} /> : null}
      <div class="logits">
        <Logits title="raises" items={top} sign={1} />
        <Logits title="lowers" items={bottom} sign={-1} />
      </div>
    </section>
  );
}

function TopTokens({ node }: { node: GraphNode }) {
  const tokens = node.attributes.top_tokens;
  if (!tokens?.length) return null;
  return (
    <section>
      <h3>Tokens it is strongest on</h3>
      <p class="chips">
        {tokens.map((t) => (
          <Token text={t} />
        ))}
      </p>
    </section>
  );
}

const KINDS = [
  ["decoder", "Writes alike", "cosine of decoder rows, this layer and its neighbours"],
  ["activation", "On at the same tokens", "correlation of activations, this layer and its neighbours"],
] as const;

function Similar({ node }: { node: GraphNode }) {
  const similar = node.attributes.similar ?? {};
  return (
    <>
      {KINDS.filter(([kind]) => similar[kind]?.length).map(([kind, title, what]) => (
        <section>
          <h3 title={what}>{title}</h3>
          <ol class="links">
            {similar[kind].slice(0, LISTED).map(([name, value]) => (
              <FeatureLink name={name} value={value} largest={1} />
            ))}
          </ol>
        </section>
      ))}
    </>
  );
}

/** Why attention looks there: what this feature and another add to a head's score together. */
function Attention({ node }: { node: GraphNode }) {
  const scores = Object.entries(node.attributes.attention ?? {});
  const largest = Math.max(...scores.flatMap(([, pairs]) => pairs.map(([, value]) => Math.abs(value))));
  return (
    <>
      {scores.map(([title, pairs]) => (
        <section>
          <h3 title="what the pair adds to the score before the softmax">{title}, by pairing with</h3>
          <ol class="links">
            {pairs.map(([name, value]) => (
              <FeatureLink name={name} value={value} largest={largest} />
            ))}
          </ol>
        </section>
      ))}
    </>
  );
}

/** A feature of the graph, or of another place, with a number. */
function FeatureLink({ name, value, largest }: { name: string; value: number; largest: number }) {
  const node = state.featureNode(name);
  if (node) return <NodeLink node={node} value={value} largest={largest} />;
  return (
    <li class="link">
      <span class="who">
        <small>{name}</small>
      </span>
      <Bar value={value} largest={largest} />
      <span class="value">{number(value)}</span>
    </li>
  );
}

export function LabelEditor({ node }: { node: GraphNode }) {
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

export function Facts({ node }: { node: GraphNode }) {
  const rows: [string, string][] = [];
  if (effectWords(node)) rows.push([node.kind === "metric" ? "total effect" : "effect", number(node.effect)]);
  for (const [name, value] of Object.entries(node.attributes)) {
    if (NOT_FACTS.includes(name)) continue;
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

export function EdgeList({ title, edges, end }: { title: string; edges: Edge[]; end: "source" | "target" }) {
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

