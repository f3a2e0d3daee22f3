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

function ContextLine({ context, largest }: { context: Context; largest: number }) {
  return (
    <p class="context" dir="auto">
      {context.tokens.map((token, i) => {
        const strength = Math.max(0, context.activations[i] ?? 0) / largest;
        const shown = String(token).replaceAll("\n", "⏎");
        return strength > 0.005 ? (
          <mark style={{ "--strength": strength.toFixed(3) }} title={plain(context.activations[i])}>
            {shown}
          </mark>
        ) : (
          <span>{shown}</span>
        );
      })}
    </p>
  );
}

export function Contexts({ contexts, most }: { contexts: Context[]; most: number }) {
  const largest = contexts.reduce((m, c) => c.activations.reduce((n, a) => Math.max(n, a ?? 0), m), 1e-12);
  return (
    <>
      {contexts.slice(0, most).map((context) => (
        <ContextLine context={most < 4 ? aroundPeak(context) : context} largest={largest} />
      ))}
    </>
  );
}

/** Twelve tokens around the strongest one. */
function aroundPeak({ tokens, activations }: Context): Context {
  const peak = activations.indexOf(Math.max(...activations));
  const start = Math.max(0, Math.min(peak - 7, tokens.length - 12));
  return { tokens: tokens.slice(start, start + 12), activations: activations.slice(start, start + 12) };
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
            <th scope="row">{visible(name)}</th>
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
