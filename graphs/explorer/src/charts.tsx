// Small charts with axes, drawn by Observable Plot, whose code (charts.js) runs when the first chart is drawn: reading
// and starting it costs more than the circuit's own drawing.

import { useEffect, useRef } from "preact/hooks";
import { classColour, theme } from "./colour";
import { circuit, classOf, type Counts, type GraphNode } from "./data";
import type { Plot } from "./plot";
import { plain } from "./text";

type Marks = NonNullable<Parameters<Plot["plot"]>[0]>;

const WIDTH = 340;
const HEIGHT = 150;

/** The library, started when it is first asked for: the page carries it as text. */
function library(): Plot {
  const page = window as { Plot?: Plot };
  if (!page.Plot) {
    const script = document.createElement("script");
    script.textContent = document.getElementById("charts")!.textContent;
    document.head.append(script); // runs before the next line
    script.remove();
  }
  return page.Plot!;
}

function Chart({ label, make }: { label: string; make: (plot: Plot) => Marks }) {
  const host = useRef<HTMLDivElement>(null);
  const colours = theme.value;
  useEffect(() => {
    const draw = () => {
      const style = { background: "none", color: colours.pale, fontSize: "11px" };
      const plot = library();
      const chart = plot.plot({ ...make(plot), width: WIDTH, height: HEIGHT, style });
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
      make={(plot) => ({
        x: { type: "log", label: "nodes kept", ticks: 4, tickFormat: "~s" },
        y: {
          label: "faithfulness",
          domain: [Math.min(0, ...points.map((p) => p.value)), Math.max(1.05, ...points.map((p) => p.value))],
          ticks: 4,
        },
        marks: [
          plot.ruleY([1], { strokeDasharray: "3 3", strokeOpacity: 0.6 }),
          ...(bounds ? [plot.areaY(points, { x: "size", y1: "low", y2: "high", fill: positive, fillOpacity: 0.2 })] : []),
          plot.lineY(points, { x: "size", y: "value", stroke: positive, strokeWidth: 2 }),
          plot.dot(points, { x: "size", y: "value", fill: positive, r: 3 }),
          plot.ruleX([Math.max(shown, points[0].size)], { stroke: accent, strokeWidth: 1.5 }),
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
        make={(plot) => ({
          marginLeft: 46,
          x: { label: "activation", domain: [0, most], ticks: 5 },
          y: { label: "tokens", type: "log", ticks: 3, tickFormat: "~s", domain: [ticks.length ? 0.3 : 0.7, Math.max(...counts, 2)] },
          marks: [
            plot.rectY(bars, {
              x1: "low", x2: "high", y1: 0.7, y2: "count", insetLeft: 0.5, insetRight: 0.5,
              fill: theme.value.dark ? "#e8a032" : "#d68c14",
              fillOpacity: (bar: { high: number }) => 0.3 + 0.7 * (bar.high / most),
            }), // prettier-ignore
            plot.ruleX(quantiles ?? [], { x: (q: [number, number]) => q[1], stroke: accent, strokeDasharray: "2 2", y1: 0.7, y2: Math.max(...counts, 2) }),
            plot.ruleX(ticks, { x: "value", y1: 0.33, y2: 0.62, stroke: "colour", strokeOpacity: 0.7 }),
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
      make={(plot) => ({
        marginLeft: 46,
        x: { label: "logits for one unit", ticks: 5 },
        y: { label: "tokens", type: "sqrt", ticks: 3, tickFormat: "~s" },
        marks: [
          plot.rectY(bars, {
            x1: "low", x2: "high", y: "count", insetLeft: 0.5, insetRight: 0.5,
            fill: (bar: { low: number; high: number }) =>
              bar.low + bar.high < 0 ? theme.value.negative : theme.value.positive,
          }), // prettier-ignore
          plot.ruleY([0]),
        ],
      })}
    />
  );
}
