// Pieces that cards and panel are made of: bars, tokens, contexts, tables of facts, links to nodes.

import { classColour, theme } from "./colour";
import { activationByCase, classOf, type Context, type Edge, type GraphNode, largestEffect, ranked } from "./data";
import * as state from "./state";
import { describe, nodeTitle, number, plain, visible } from "./text";

export const Bar = ({ value, largest, colour }: { value: number; largest: number; colour?: string }) => (
  <span class="track">
    <span
      class={`bar ${value < 0 ? "negative" : "positive"}`}
      style={{
        width: `${(100 * Math.min(1, Math.abs(value) / (largest || 1))).toFixed(1)}%`,
        ...(colour ? { background: colour } : {}),
      }}
    />
  </span>
);

/** A token in type of fixed width, its leading space as a faint dot. */
export function Token({ text }: { text: string }) {
  const shown = visible(text);
  return (
    <code dir="auto">
      {shown.startsWith(" ") ? (
        <>
          <i>·</i>
          {shown.slice(1)}
        </>
      ) : (
        shown
      )}
    </code>
  );
}

/** Changes of log p below this are not underlined. */
const LEAST_CHANGE = 0.02;

interface Scale {
  activation: number;
  change: number;
}

function ContextLine({ context, largest, whole }: { context: Context; largest: Scale; whole: boolean }) {
  return (
    <p class={whole ? "context whole" : "context"} dir="auto">
      {context.tokens.map((token, i) => {
        const strength = Math.max(0, context.activations[i] ?? 0) / largest.activation;
        const change = context.change?.[i] ?? 0;
        const shown = String(token).replaceAll("\n", "⏎");
        const changed = Math.abs(change) >= Math.max(LEAST_CHANGE, 0.02 * largest.change);
        const title = [
          strength > 0.005 ? `activation ${plain(context.activations[i])}` : "",
          changed ? `log p ${number(change)} without it` : "",
        ].filter(Boolean);
        if (!title.length) return <span>{shown}</span>;
        const piece = changed ? (
          <u
            class={`change ${change < 0 ? "negative" : "positive"}`}
            style={{ "--change": Math.min(1, Math.abs(change) / largest.change).toFixed(2) }}
          >
            {shown}
          </u>
        ) : (
          shown
        );
        return strength > 0.005 ? (
          <mark style={{ "--strength": Math.min(1, strength).toFixed(3) }} title={title.join("; ")}>
            {piece}
          </mark>
        ) : (
          <span title={title.join("; ")}>{piece}</span>
        );
      })}
    </p>
  );
}

const scaleOf = (contexts: Context[]): Scale => ({
  activation: contexts.reduce((m, c) => c.activations.reduce((n, a) => Math.max(n, a ?? 0), m), 1e-12),
  change: contexts.reduce((m, c) => (c.change ?? []).reduce((n: number, a) => Math.max(n, Math.abs(a ?? 0)), m), 0.1),
});

/** The largest activation and change in all contexts of a feature, so that all are shaded alike. */
export const largestIn = ({ attributes: { contexts, samples, random } }: GraphNode): Scale =>
  scaleOf([...(contexts ?? []), ...(samples ?? []).flatMap((sample) => sample.contexts), ...(random ?? [])]);

export function Contexts({
  contexts,
  most,
  largest,
  whole = false,
}: {
  contexts: Context[];
  most: number;
  largest?: Scale;
  whole?: boolean;
}) {
  const scale = largest ?? scaleOf(contexts);
  return (
    <>
      {contexts.slice(0, most).map((context) => (
        <ContextLine context={most < 4 && !whole ? aroundPeak(context) : context} largest={scale} whole={whole} />
      ))}
    </>
  );
}

/** Twelve tokens around the strongest one. */
function aroundPeak({ tokens, activations, change }: Context): Context {
  const peak = activations.indexOf(Math.max(...activations));
  const start = Math.max(0, Math.min(peak - 7, tokens.length - 12));
  const some = <T,>(values: T[]) => values.slice(start, start + 12);
  return { tokens: some(tokens), activations: some(activations), change: change && some(change) };
}

export function ClassBars({ node }: { node: GraphNode }) {
  const values = activationByCase(node);
  if (!values.length) return null;
  const largest = Math.max(...values.map(([, value]) => value), 1e-12);
  return (
    <table class="bars">
      <tbody>
        {values.map(([name, value]) => (
          <tr>
            <th scope="row">{visible(name.replaceAll("_", " "))}</th>
            <td>
              <Bar value={value} largest={largest} colour={classColour(theme.value, classOf(name))} />
            </td>
            <td class="value">{plain(Number(value.toPrecision(3)))}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

/** Mean activation by span of the prompts, and in it by case; spans where it is never on are only named. */
export function CaseBars({ node }: { node: GraphNode }) {
  const byCase = node.attributes.by_case ?? {};
  const names = Object.keys(byCase).sort((a, b) => classOf(a) - classOf(b) || (a < b ? -1 : 1));
  const spans = [...new Set(names.flatMap((name) => Object.keys(byCase[name])))];
  const largest = Math.max(...names.flatMap((name) => Object.values(byCase[name])), 1e-12);
  const isOn = (span: string) => names.some((name) => (byCase[name][span] ?? 0) > 0.005 * largest);
  const off = spans.filter((span) => !isOn(span));
  return (
    <>
      <table class="bars">
        {spans.filter(isOn).map((span) => (
          <tbody>
            {span && (
              <tr>
                <th scope="rowgroup" colSpan={3} class="span">
                  {visible(span)}
                </th>
              </tr>
            )}
            {names
              .filter((name) => span in byCase[name])
              .map((name) => (
                <tr>
                  <th scope="row">{visible(name.replaceAll("_", " "))}</th>
                  <td>
                    <Bar
                      value={byCase[name][span]}
                      largest={largest}
                      colour={classColour(theme.value, classOf(name))}
                    />
                  </td>
                  <td class="value">{plain(Number(byCase[name][span].toPrecision(3)))}</td>
                </tr>
              ))}
          </tbody>
        ))}
      </table>
      {off.length > 0 && <p class="hint">Never on at {off.map((span) => visible(span) || "any token").join(", ")}.</p>}
    </>
  );
}

export const FactTable = ({ rows }: { rows: [string, string][] }) => (
  <dl class="facts">
    {rows.map(([name, value]) => (
      <>
        <dt>{name}</dt>
        <dd dir="auto">{value}</dd>
      </>
    ))}
  </dl>
);

/** A line that names a node and a value with its bar; it pins the node when clicked. */
export function NodeLink({
  node,
  value,
  largest,
  edge,
  note,
}: {
  node: GraphNode;
  value: number;
  largest: number;
  edge?: Edge;
  note?: string;
}) {
  const label = describe(node);
  const point = (on: boolean) => {
    state.hovered.value = on && !edge ? node.id : null;
    state.hoveredEdge.value = on && edge ? state.edgeKey(edge.source.index, edge.target.index) : null;
  };
  return (
    <li>
      <button
        type="button"
        class="link"
        onClick={() => (state.pins.value.includes(node.id) ? undefined : state.togglePin(node.id))}
        onMouseEnter={() => point(true)}
        onMouseLeave={() => point(false)}
        onFocus={() => point(true)}
        onBlur={() => point(false)}
      >
        <span class="who">
          <b dir="auto">{label || nodeTitle(node)}</b>
          <small>
            {label ? nodeTitle(node) : ""}
            {note ? ` · ${note}` : ""}
          </small>
        </span>
        <Bar value={value} largest={largest} />
        <span class="value">{number(value)}</span>
      </button>
    </li>
  );
}

export const StrongestNodes = () => (
  <ol class="links">
    {ranked.slice(0, 12).map((node) => (
      <NodeLink node={node} value={node.effect} largest={largestEffect} />
    ))}
  </ol>
);
