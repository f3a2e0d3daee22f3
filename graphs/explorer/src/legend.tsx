// The legend: a lens to colour by, classes to switch on and off, a scale with ticks and units.

import { diverging, edgeWidth, exampleOf, kindsOf, sure, theme } from "./colour";
import { classes, circuit, largestEffect, largestWeight, nodes, touchesZero } from "./data";
import * as state from "./state";
import { number, plain, visible } from "./text";

const LENS_NAMES: Record<string, string> = {
  class: "class it is on for", effect: "effect", interval: "certainty", comparison: "which graph",
}; // prettier-ignore
function lensName(lens: state.Lens): string {
  const example = exampleOf(lens);
  if (example === null) return LENS_NAMES[lens];
  return `activation on “${visible(circuit.metadata.example_pairs![example].clean)}”`;
}
const TICKS = [-1, -0.25, 0, 0.25, 1];

export function Legend() {
  const colours = theme.value;
  const by = state.lens.value;
  const choices = state.lenses();
  const toggle = (key: string) => {
    const hidden = state.hiddenKinds.value;
    state.hiddenKinds.value = hidden.includes(key) ? hidden.filter((k) => k !== key) : [...hidden, key];
    state.commit();
  };
  const dense = nodes.some((node) => (node.attributes.density ?? 0) > 0.3);
  const unsure = nodes.some((node) => touchesZero(node.attributes.interval));
  return (
    <div id="legend" role="group" aria-label="Legend">
      <label class="lens">
        colour:{" "}
        <select
          id="lens"
          value={by}
          onChange={(event) => {
            state.hiddenKinds.value = [];
            state.lens.value = event.currentTarget.value as state.Lens;
            state.commit();
          }}
        >
          {choices.map((choice) => (
            <option value={choice}>{lensName(choice)}</option>
          ))}
        </select>
      </label>
      {kindsOf(by, colours).map((kind) => (
        <button
          type="button"
          class="kind"
          aria-pressed={!state.hiddenKinds.value.includes(kind.key)}
          title="Click to hide or show"
          onClick={() => toggle(kind.key)}
        >
          <i style={{ background: kind.colour }} />
          {visible(kind.name)}
        </button>
      ))}
      <Scale />
      <span title="Bar on the left of a node">▍|effect|, full bar {plain(largestEffect)}</span>
      <span>
        <b>△</b> SAE error
      </span>
      {circuit.nodes.some((node) => node.kind === "skip") && (
        <span>
          <b>◇</b> skip connection
        </span>
      )}
      {unsure && (
        <span>
          <i class="hollow" />
          interval touches zero
        </span>
      )}
      {dense && (
        <span>
          <b class="hatch">◥</b>dense: on at &gt; 30 % of tokens
        </span>
      )}
      {nodes.some((node) => typeof node.attributes.exact_effect === "number") && (
        <span>✓ measured by patching it alone</span>
      )}
      <EdgeScale />
    </div>
  );
}

/** The colour scale with ticks: of effects in units of the metric, or of the contrast of two classes. */
function Scale() {
  const by = state.lens.value;
  const colours = theme.value;
  const width = 176;
  const stops = Array.from({ length: 25 }, (_, i) => (i / 24) * 2 - 1);
  let gradient: string[];
  let ticks: [number, string][];
  if (by === "effect") {
    gradient = stops.map((v) => diverging(colours, v));
    ticks = TICKS.map((share) => [
      (1 + Math.sign(share) * Math.sqrt(Math.abs(share))) / 2,
      number(share * largestEffect),
    ]);
  } else if (by === "class" && classes.length === 2) {
    gradient = stops.map((v) => diverging(colours, v * 0.8));
    ticks = [
      [0, "only"],
      [0.5, "both alike"],
      [1, "only"],
    ];
  } else if (by === "interval" || exampleOf(by) !== null) {
    gradient = stops.map((v) => sure(colours, (v + 1) / 2));
    ticks = [
      [0, "0"],
      [0.5, "0.5"],
      [1, "1"],
    ];
  } else return null;
  const unit =
    by === "effect"
      ? `effect on ${visible(circuit.metadata.metric ?? "the metric")}`
      : by === "class"
        ? "activation, one class against the other"
        : by === "interval"
          ? "nearest bound over effect"
          : "largest activation on this prompt, as a share of the feature's largest on any";
  return (
    <span
      class="scale"
      role="img"
      aria-label={`Colour scale: ${unit}, ${ticks.map(([, text]) => text).join(", ")}`}
      title={unit}
    >
      <span
        class="gradient"
        style={{ width: `${width}px`, background: `linear-gradient(to right, ${gradient.join(",")})` }}
      />
      {ticks.map(([place, text]) => (
        <span class="tick" style={{ left: `${place * 100}%` }}>
          {text}
        </span>
      ))}
    </span>
  );
}

function EdgeScale() {
  const colours = theme.value;
  if (!largestWeight) return null;
  const compared = state.lens.value === "comparison";
  return (
    <span class="edge-scale">
      edges:
      {[0.1, 1].map((share) => (
        <>
          <i
            style={{
              height: `${edgeWidth(share * largestWeight)}px`,
              background: compared ? colours.pale : colours.positive,
            }}
          />
          {number(share * largestWeight)}
        </>
      ))}
      {!compared && (
        <>
          <i style={{ height: "3px", background: colours.negative }} />
          below zero
        </>
      )}
    </span>
  );
}
