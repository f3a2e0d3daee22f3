// Small charts with axes, drawn by Observable Plot.

import { areaY, dot, lineY, plot, rectY, ruleX, ruleY } from "@observablehq/plot";
import { useEffect, useRef } from "preact/hooks";
import { theme } from "./colour";
import { circuit } from "./data";

type Marks = NonNullable<Parameters<typeof plot>[0]>;

const HEIGHT = 150;

function Chart({ label, make }: { label: string; make: () => Marks }) {
  const host = useRef<HTMLDivElement>(null);
  const colours = theme.value;
  useEffect(() => {
    const draw = () => {
      const style = { background: "none", color: colours.pale, fontSize: "11px" };
      const chart = plot({ ...make(), width: 320, height: HEIGHT, style });
      for (const part of chart.querySelectorAll("g[aria-label]")) part.removeAttribute("aria-label"); // only the whole is named
      chart.setAttribute("role", "img");
      chart.setAttribute("aria-label", label);
      host.current?.replaceChildren(chart);
    };
    const waiting = setTimeout(draw, 80); // the circuit is drawn first
    return () => clearTimeout(waiting);
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

/** Counts of activations between edges. */
export function Histogram({ edges, counts }: { edges: number[]; counts: number[] }) {
  const bars = counts.map((count, i) => ({ low: edges[i], high: edges[i + 1], count }));
  return (
    <Chart
      label={`Histogram of activations from ${edges[0]} to ${edges.at(-1)}`}
      make={() => ({
        x: { label: "activation" },
        y: { label: "tokens", ticks: 4 },
        marks: [rectY(bars, { x1: "low", x2: "high", y: "count", fill: theme.value.positive }), ruleY([0])],
      })}
    />
  );
}
