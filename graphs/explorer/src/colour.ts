// Colours in both themes, and the value of every node under the chosen lens.
//
// Orange to blue is safe for the common forms of colour blindness; classes beyond two take Okabe and Ito's palette.

import { signal } from "@preact/signals";
import { interpolateRgb, piecewise } from "d3-interpolate";
import {
  classes,
  circuit,
  classContrast,
  type Edge,
  edgeSide,
  type GraphNode,
  largestEffect,
  largestWeight,
} from "./data";
import { nodeSide, shareOn, touchesZero } from "./data";
import { type Lens, lens } from "./state";

export interface Theme {
  dark: boolean;
  page: string;
  surface: string;
  stripe: string;
  ink: string;
  pale: string;
  rule: string;
  accent: string;
  diverging: string[];
  sure: string[];
  negative: string;
  positive: string;
  neutral: string;
}

const LIGHT: Theme = {
  dark: false, page: "#ffffff", surface: "#f7f8fa", stripe: "#f4f6f8", ink: "#1d2430", pale: "#5a6472",
  rule: "#dde2e9", accent: "#7a3cc2",
  diverging: ["#a84d04", "#e08a2e", "#fbd9ae", "#f3f3f1", "#cfe0ef", "#6aa5d2", "#1c5fa8"],
  sure: ["#f3f3f1", "#d9cfea", "#ab93d3", "#6f4aa8"],
  negative: "#c05c08", positive: "#2468b0", neutral: "#d9dde3",
}; // prettier-ignore
const DARK: Theme = {
  dark: true, page: "#12161d", surface: "#181d26", stripe: "#171c25", ink: "#e6eaf0", pale: "#a3adbb",
  rule: "#2b3340", accent: "#c79bff",
  diverging: ["#f0a04b", "#b9691b", "#6b4420", "#2b313b", "#254a6e", "#2f78b8", "#6fb6f2"],
  sure: ["#2b313b", "#443763", "#6b53a3", "#b59be8"],
  negative: "#e88b34", positive: "#57a5ea", neutral: "#3a4350",
}; // prettier-ignore

const darkScheme = matchMedia("(prefers-color-scheme: dark)");
export const theme = signal<Theme>(darkScheme.matches ? DARK : LIGHT);
darkScheme.addEventListener("change", () => (theme.value = darkScheme.matches ? DARK : LIGHT));
export const lightTheme = LIGHT;

const CLASSES = ["#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442"];

/** sign(value) · sqrt(|value| / largest): effects are heavy-tailed, a linear scale would leave most nodes white. */
export const signedRoot = (value: number, largest: number) =>
  largest > 0 ? Math.sign(value) * Math.sqrt(Math.min(1, Math.abs(value) / largest)) : 0;

const scales = new Map<string[], (share: number) => string>();
/** The colour at a value between low and 1, mixed of the two that are next to it. */
function along(colours: string[], low: number, value: number): string {
  const scale = scales.get(colours) ?? piecewise(interpolateRgb, colours);
  scales.set(colours, scale);
  return scale(Math.min(1, Math.max(0, (value - low) / (1 - low))));
}
export const diverging = (colours: Theme, value: number) => along(colours.diverging, -1, value);
export const sure = (colours: Theme, value: number) => along(colours.sure, 0, value);

/** A class's full colour; two classes take the ends of the diverging scale. */
export function classColour(colours: Theme, place: number): string {
  return classes.length === 2 ? diverging(colours, place === 0 ? -0.8 : 0.8) : CLASSES[place % CLASSES.length];
}

/** How far zero is from the interval, as a share of the effect: 0 where the interval touches zero. */
export function certainty(node: GraphNode): number | null {
  const interval = node.attributes.interval;
  if (!interval || node.effect === 0) return null;
  if (touchesZero(interval)) return 0;
  return Math.min(1, Math.min(Math.abs(interval[0]), Math.abs(interval[1])) / Math.abs(node.effect));
}

/** Place of the example prompt that a lens shows the activation on; null for other lenses. */
export const exampleOf = (by: Lens): number | null => (by.startsWith("prompt:") ? Number(by.slice(7)) : null);

/** A node's fill. */
export function fillOf(node: GraphNode, colours: Theme, by: Lens): string {
  if (node.kind === "metric") return colours.dark ? "#e6eaf0" : "#1d2430";
  if (by === "comparison") return sideColour(colours, nodeSide![node.index]);
  const example = exampleOf(by);
  if (example !== null || by === "interval") {
    const value = example === null ? certainty(node) : shareOn(node, example);
    return value === null ? colours.page : sure(colours, value);
  }
  if (by === "class") {
    const contrast = classContrast(node);
    if (!contrast) return colours.page;
    if (classes.length === 2) return diverging(colours, contrast.strength * (contrast.place === 0 ? -0.8 : 0.8));
    return interpolateRgb(colours.diverging[3], classColour(colours, contrast.place))(contrast.strength);
  }
  return diverging(colours, signedRoot(node.effect, largestEffect));
}

/** A supernode's fill: its members' class contrast, weighted by |effect|, or the sum of their effects. */
export function groupFill(members: GraphNode[], effect: number, colours: Theme, by: Lens): string {
  if (by === "effect") return diverging(colours, signedRoot(effect, largestEffect));
  if (by !== "class") return fillOf(members[0], colours, by);
  const sums = classes.map(() => 0);
  let total = 0;
  for (const node of members) {
    const contrast = classContrast(node);
    if (!contrast) continue;
    sums[contrast.place] += contrast.strength * Math.abs(node.effect);
    total += Math.abs(node.effect);
  }
  if (!total) return colours.page;
  if (classes.length === 2) return diverging(colours, (0.8 * (sums[1] - sums[0])) / total);
  const place = sums.indexOf(Math.max(...sums));
  return interpolateRgb(colours.diverging[3], classColour(colours, place))(sums[place] / total);
}

export const sideColour = (colours: Theme, side: number) =>
  side < 0 ? diverging(colours, -0.7) : side > 0 ? diverging(colours, 0.7) : colours.neutral;

export function edgeColour(edge: Pick<Edge, "weight"> & { index?: number }, colours: Theme): string {
  if (edgeSide && edge.index !== undefined && edge.index >= 0 && lens.value === "comparison") {
    const side = edgeSide[edge.index];
    return side === 0 ? colours.pale : sideColour(colours, side);
  }
  return edge.weight < 0 ? colours.negative : colours.positive;
}
export const edgeWidth = (weight: number) => 0.6 + 4.4 * (Math.abs(weight) / (largestWeight || 1)) ** 0.75;

function luminance(colour: string): number {
  const [r, g, b] = (
    colour.match(/^#/) ? colour.match(/\w\w/g)!.map((c) => parseInt(c, 16)) : colour.match(/[\d.]+/g)!.map(Number)
  )
    .slice(0, 3)
    .map((c) => (c <= 10 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
/** Black or white text, whichever contrasts more (WCAG 2): at least 4.58 to 1 on every colour. */
export const inkOn = (colour: string) => (luminance(colour) > 0.18 ? "#000000" : "#ffffff");

// --- kinds that the legend can switch off ---------------------------------------------------------------------------------

export interface Kind {
  key: string;
  name: string;
  colour: string;
}

/** The kinds of node under a lens. */
export function kindsOf(by: Lens, colours: Theme): Kind[] {
  if (by === "class")
    return classes.map((name, place) => ({ key: `class:${name}`, name, colour: classColour(colours, place) }));
  if (by === "comparison") {
    const names = ["only this graph", "both", `only ${circuit.comparison!.title}`];
    return [-1, 0, 1].map((side, i) => ({ key: `side:${side}`, name: names[i], colour: sideColour(colours, side) }));
  }
  if (by === "interval")
    return [
      { key: "sure:0", name: "interval touches zero", colour: colours.page },
      { key: "sure:1", name: "clear of zero", colour: sure(colours, 0.8) },
    ];
  if (exampleOf(by) !== null)
    return [
      { key: "on:0", name: "silent", colour: sure(colours, 0) },
      { key: "on:1", name: "active", colour: sure(colours, 0.8) },
    ];
  return [
    { key: "sign:-", name: "lowers the metric", colour: diverging(colours, -0.8) },
    { key: "sign:+", name: "raises the metric", colour: diverging(colours, 0.8) },
  ];
}

/** Whether the node is of the kind. */
export function isKind(node: GraphNode, key: string): boolean {
  const [what, name] = [key.slice(0, key.indexOf(":")), key.slice(key.indexOf(":") + 1)];
  if (what === "sign") return node.effect < 0 === (name === "-");
  if (what === "side") return nodeSide !== null && nodeSide[node.index] === Number(name);
  if (what === "on") return ((shareOn(node, exampleOf(lens.value) ?? 0) ?? 0) > 0) === (name === "1");
  if (what === "sure") return (certainty(node) ?? 0) > 0 === (name === "1");
  const contrast = classContrast(node);
  return contrast !== null && contrast.strength > 0.1 && classes[contrast.place] === name;
}
