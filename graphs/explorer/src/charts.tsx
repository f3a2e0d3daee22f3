// Small charts with axes, drawn by Observable Plot.

import { areaY, dot, lineY, plot, rectY, ruleX, ruleY } from "@observablehq/plot";
import { useEffect, useRef } from "preact/hooks";
import { classColour, theme } from "./colour";
import { circuit, classOf, type Counts, type GraphNode } from "./data";
import { plain } from "./text";

type Marks = NonNullable<Parameters<typeof plot>[0]>;

const WIDTH = 340;
const HEIGHT = 150;

function Chart({ label, make }: { label: string; make: () => Marks }) {
  const host = useRef<HTMLDivElement>(null);
  const colours = theme.value;
  useEffect(() => {
    const draw = () => {
      const style = { background: "none", color: colours.pale, fontSize: "11px" };
      const chart = plot({ ...make(), width: WIDTH, height: HEIGHT, style });
      for (const part of chart.querySelectorAll("g[aria-label]")) part.removeAttribute("aria-label"); // only the whole is named
      chart.setAttribute("role", "img");
      chart.setAttribute("aria-label", label);
      host.current?.replaceChildren(chart);
    };
    const waiting = setTimeout(draw, 80); // the circuit is drawn first
    addEventListener("beforeprint", draw);
    return () => {
      clearTimeout(waiting);
      removeEventListener("beforeprint", draw);
    };
  });
  return <div class="chart" style={{ minHeight: `${HEIGHT}px` }} ref={host} />;
}

/** Faithfulness by the number of nodes kept, with its interval, and the number that is drawn. */
export function FaithfulnessCurve({ shown }: { shown: number }) {
  const curve = circuit.metadata.faithfulness;
  if (!curve?.sizes?.length) return null;
  const bounds = curve.intervals?.faithfulness;
  const points = curve.sizes.map((size, i) => ({
    size,
    value: curve.faithfulness[i],
    low: bounds?.[i]?.[0],
    high: bounds?.[i]?.[1],
  }));
  const { positive, accent } = theme.value;
  return (
    <Chart
      label={`Faithfulness by nodes: ${points.map((p) => `${p.value.toFixed(2)} at ${p.size}`).join(", ")}`}
      make={() => ({
        x: { type: "log", label: "nodes kept", ticks: 4, tickFormat: "~s" },
        y: {
          label: "faithfulness",
          domain: [Math.min(0, ...points.map((p) => p.value)), Math.max(1.05, ...points.map((p) => p.value))],
          ticks: 4,
        },
        marks: [
          ruleY([1], { strokeDasharray: "3 3", strokeOpacity: 0.6 }),
          ...(bounds ? [areaY(points, { x: "size", y1: "low", y2: "high", fill: positive, fillOpacity: 0.2 })] : []),
          lineY(points, { x: "size", y: "value", stroke: positive, strokeWidth: 2 }),
          dot(points, { x: "size", y: "value", fill: positive, r: 3 }),
          ruleX([Math.max(shown, points[0].size)], { stroke: accent, strokeWidth: 1.5 }),
        ],
      })}
    />
  );
}

/** Counts on a logarithmic scale, stronger activations in a fuller tint; below, every prompt's largest activation. */
export function ActivationHistogram({ node }: { node: GraphNode }) {
  const { histogram, quantiles, prompt_peaks: peaks } = node.attributes;
  const { edges, counts } = histogram!;
  const most = edges.at(-1)!;
  const bars = counts.map((count, i) => ({ low: edges[i], high: edges[i + 1], count })).filter((bar) => bar.count);
  const ticks = Object.entries(peaks ?? {}).flatMap(([name, values]) =>
    values.filter((value) => value > 0).map((value) => ({ value, colour: classColour(theme.value, classOf(name)) })),
  );
  const { accent } = theme.value;
  return (
    <>
      <Chart
        label={`Histogram of activations from 0 to ${most}`}
        make={() => ({
          marginLeft: 46,
          x: { label: "activation", domain: [0, most], ticks: 5 },
          y: { label: "tokens", type: "log", ticks: 3, tickFormat: "~s", domain: [ticks.length ? 0.3 : 0.7, Math.max(...counts, 2)] },
          marks: [
            rectY(bars, {
              x1: "low", x2: "high", y1: 0.7, y2: "count", insetLeft: 0.5, insetRight: 0.5,
              fill: theme.value.dark ? "#e8a032" : "#d68c14",
              fillOpacity: (bar: { high: number }) => 0.3 + 0.7 * (bar.high / most),
            }), // prettier-ignore
            ruleX(quantiles ?? [], { x: (q: [number, number]) => q[1], stroke: accent, strokeDasharray: "2 2", y1: 0.7, y2: Math.max(...counts, 2) }),
            ruleX(ticks, { x: "value", y1: 0.33, y2: 0.62, stroke: "colour", strokeOpacity: 0.7 }),
          ],
        })}
      />
      {ticks.length > 0 && (
        <p class="hint">
          Dashed: quantiles. Ticks below: the largest activation on each prompt, in the colour of its class.
        </p>
      )}
    </>
  );
}

/** The direct effect of one unit on all logits: which there are beside the few that are listed. */
export function LogitHistogram({ edges, counts }: Counts) {
  const bars = counts.map((count, i) => ({ low: edges[i], high: edges[i + 1], count })).filter((bar) => bar.count);
  return (
    <Chart
      label={`Histogram of the effect on all logits, from ${plain(edges[0])} to ${plain(edges.at(-1)!)}`}
      make={() => ({
        marginLeft: 46,
        x: { label: "logits for one unit", ticks: 5 },
        y: { label: "tokens", type: "sqrt", ticks: 3, tickFormat: "~s" },
        marks: [
          rectY(bars, {
            x1: "low", x2: "high", y: "count", insetLeft: 0.5, insetRight: 0.5,
            fill: (bar: { low: number; high: number }) =>
              bar.low + bar.high < 0 ? theme.value.negative : theme.value.positive,
          }), // prettier-ignore
          ruleY([0]),
        ],
      })}
    />
  );
}
