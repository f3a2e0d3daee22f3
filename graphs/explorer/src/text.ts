// How values and tokens read.

import { circuit, type GraphNode, positionNames } from "./data";
import { labels } from "./state";
import { number, visible } from "./words";

export * from "./words";

/** The label a reader or a file gave, else "". */
export const labelOf = (node: GraphNode) => labels.value[node.name] ?? node.label ?? "";

export const topTokens = (node: GraphNode) =>
  (node.attributes.top_tokens ?? []).map((token) => visible(token).trim()).filter(Boolean);

export const promoted = (node: GraphNode, key: "top_logits" | "bottom_logits") =>
  (node.attributes[key] ?? []).map((item) => (Array.isArray(item) ? item : ([item, null] as [string, number | null])));

/** Whether a node of a site is no feature: what the SAE misses, or what a transcoder's skip connection writes. */
export const isOther = (node: GraphNode) => node.kind === "error" || node.kind === "skip";

/** What a feature means in one line: a person's label, else the words the page has for it. */
export function describe(node: GraphNode): string {
  const label = labelOf(node);
  if (label) return visible(label);
  if (isOther(node)) return node.kind === "error" ? "SAE error" : "skip connection";
  if (node.kind === "metric") return visible(circuit.metadata.metric ?? "metric");
  return node.words;
}

export const nodeTitle = (node: GraphNode) =>
  node.kind === "metric"
    ? "metric"
    : node.name + (node.position === null ? "" : ` at “${positionNames.get(node.position)}”`);

/** The effect in words; nothing for the metric of prompts without a patch side. */
export function effectWords(node: GraphNode): string {
  if (node.kind === "metric")
    return circuit.metadata.total_effect === null ? "" : `total effect ${number(node.effect)}`;
  return `effect ${number(node.effect)}`;
}

// --- fitting text into a width, measured in the font that it is drawn with ---------------------------------------------

export const FONT = 'Inter, "Helvetica Neue", Helvetica, Arial, "DejaVu Sans", sans-serif';
const pen = document.createElement("canvas").getContext("2d")!;
let penWeight = 0;
const widths = new Map<string, number>();

/** Width in pixels of the text at 10 px; other sizes are multiples. */
function widthAt10(text: string, weight: number): number {
  const key = weight + text;
  let width = widths.get(key);
  if (width === undefined) {
    if (weight !== penWeight) pen.font = `${(penWeight = weight)} 10px ${FONT}`;
    width = pen.measureText(text).width;
    if (widths.size > 50000) widths.clear();
    widths.set(key, width);
  }
  return width;
}
export const textWidth = (text: string, size: number, weight = 400) => (widthAt10(text, weight) * size) / 10;

function cut(text: string, size: number, width: number, weight: number): string {
  if (textWidth(text, size, weight) <= width) return text;
  let low = 0;
  const letters = [...text];
  let high = letters.length;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (textWidth(letters.slice(0, middle).join("") + "…", size, weight) <= width) low = middle;
    else high = middle - 1;
  }
  return letters.slice(0, low).join("").trimEnd() + "…";
}

export interface Fitted {
  lines: string[];
  whole: boolean;
}

/** The text on at most so many lines, broken at spaces; a word that is wider than the width stays whole. */
function broken(text: string, size: number, width: number, most: number, weight: number): string[] {
  const words = text.split(/\s+/).filter(Boolean);
  const lines: string[] = [];
  while (words.length && lines.length < most) {
    let line = words.shift()!;
    if (lines.length === most - 1) line = [line, ...words.splice(0)].join(" ");
    else while (words.length && textWidth(`${line} ${words[0]}`, size, weight) <= width) line += ` ${words.shift()}`;
    lines.push(line);
  }
  return lines;
}

/** The text on at most so many lines, broken at spaces, lines that are too long cut. */
export function wrap(text: string, size: number, width: number, most: number, weight = 400): Fitted {
  const lines = broken(text, size, width, most, weight);
  const fitted = lines.map((line) => cut(line, size, width, weight));
  return { lines: fitted, whole: fitted.every((line, i) => line === lines[i]) };
}

/** The node's description in a box: of its top tokens as many as fit, a label cut only if it must be. */
export function fitDescription(node: GraphNode, size: number, width: number, most: number, weight = 500): Fitted {
  if (isOther(node) && !labelOf(node) && textWidth(describe(node), size, weight) > width)
    return wrap(node.kind, size, width, most, weight);
  if (labelOf(node) || node.kind !== "feature") return wrap(describe(node), size, width, most, weight);
  const words = describe(node);
  if (!words) return wrap(node.name, size, width, most, weight);
  const [tokens, promoted] = words.split(" → ").map((side) => side.split(" · "));
  for (let n = tokens.length; n > 0; n--) {
    const shown = [tokens.slice(0, n), ...(promoted ? [promoted.slice(0, n)] : [])];
    const text = shown.map((side) => side.join(" · ")).join(" → ");
    const lines = broken(text, size, width, most, weight);
    if (lines.every((line) => textWidth(line, size, weight) <= width)) return { lines, whole: true };
    if (n === 1) return wrap(text, size, width, most, weight);
  }
  return wrap(words, size, width, most, weight);
}
