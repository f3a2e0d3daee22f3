// Draws a scene with a pen: bands of layers with their lanes, edges, nodes in as much detail as their size allows.
//
// Boxes carry two lines of label and the effect, chips one line, dots none; no text is ever smaller than 10 pixels.

import { edgeColour, edgeWidth, fillOf, groupFill, inkOn, signedRoot, type Theme } from "./colour";
import {
  circuit,
  type GraphNode,
  largestEffect,
  largestWeight,
  laneOf,
  layerOf,
  positionNames,
  spanWords,
  touchesZero,
} from "./data";
import type { Pen } from "./pen";
import type { Item, Link, Scene } from "./scene";
import { lens } from "./state";
import { fitDescription, type Fitted, isOther, labelOf, number, textWidth, visible, wrap } from "./text";

export interface Transform {
  k: number;
  x: number;
  y: number;
}
export const GUTTER = 68;
export const HEADER = 40;
export const MARGIN = 10;
export const SMALLEST_TEXT = 10;
const DENSE = 0.3;
const LEADING = 1.13;

export type Detail = "box" | "chip" | "dot";
export const detailAt = (width: number, height: number): Detail =>
  width >= 84 && height >= 29 ? "box" : width >= 52 && height >= 15 ? "chip" : "dot";

/** What was written: for tests and for the benchmark of readability. */
export interface Tally {
  labels: number;
  cut: number;
  smallest: number;
}

// --- behind the nodes -----------------------------------------------------------------------------------------------------

/** Stripes of the layers, lines between lanes, columns of positions. */
export function drawBands(pen: Pen, scene: Scene, t: Transform, colours: Theme, width: number): void {
  for (const { top, bottom, lanes } of layers(scene)) {
    pen.rect(0, top * t.k + t.y, width, (bottom - top) * t.k, 0, { fill: colours.stripe });
    for (const lane of lanes.slice(1))
      pen.rect(0, lane.bottom * t.k + t.y + 2, width, 0.8, 0, { fill: colours.rule, alpha: 0.7 });
  }
  for (const [, , right] of scene.layout.columns.slice(0, -1))
    pen.rect(right * t.k + t.x, HEADER / 2, 0.8, 9999, 0, { fill: colours.rule });
}

interface Lane {
  name: string;
  top: number;
  bottom: number;
}
/** Layers from bottom to top, with y growing downwards. */
function layers(scene: Scene): { name: string; top: number; bottom: number; lanes: Lane[] }[] {
  const found: { name: string; top: number; bottom: number; lanes: Lane[] }[] = [];
  for (const [site, low, high] of scene.layout.bands) {
    const lane = { name: laneOf(site), top: scene.layout.height - high, bottom: scene.layout.height - low };
    const last = found.at(-1);
    if (last && last.name === layerOf(site)) {
      last.top = lane.top;
      last.lanes.push(lane);
    } else found.push({ name: layerOf(site), top: lane.top, bottom: lane.bottom, lanes: [lane] });
  }
  return found;
}

/** Names of layers and lanes on the left, and of positions above: they stay in the window. */
export function drawNames(pen: Pen, scene: Scene, t: Transform, colours: Theme, height: number): void {
  pen.rect(0, 0, GUTTER - 8, height, 0, { fill: colours.page, alpha: 0.86 });
  let lowest = Infinity;
  for (const { name, top, bottom, lanes } of layers(scene)) {
    pen.rect(0, top * t.k + t.y, 3, (bottom - top) * t.k, 0, { fill: colours.rule });
    const numbered = /^\d+$/.test(name);
    const lines = lanes.map((lane) => ({
      text: numbered ? `${lane.name} ${name}` : visible(name),
      y: ((lane.top + lane.bottom) / 2) * t.k + t.y + 4,
    }));
    for (const { text, y } of lines) {
      if (y > lowest - 12) continue; // names that would overlap are left out
      pen.text(wrap(text, 11, GUTTER - 16, 1, 600).lines[0] ?? "", 9, y, {
        size: 11,
        fill: colours.pale,
        weight: 600,
        anchor: "start",
      });
      lowest = y;
    }
  }
  if (!scene.layout.columns.length) return;
  pen.rect(0, 0, 9999, HEADER - 4, 0, { fill: colours.page, alpha: 0.92 });
  for (const [position, left, right] of scene.layout.columns) {
    const [a, b] = [Math.max(left * t.k + t.x, GUTTER), right * t.k + t.x];
    if (b - a < 24) continue;
    const name = wrap(position === null ? "all positions" : (positionNames.get(position) ?? ""), 12, b - a - 6, 1, 650);
    pen.text(name.lines[0] ?? "", (a + b) / 2, 15, { size: 12, fill: colours.ink, weight: 650 });
    const words = wrap(spanWords.get(position) ?? "", 10, b - a - 6, 1).lines[0];
    if (words) pen.text(words, (a + b) / 2, 29, { size: 10, fill: colours.pale });
  }
}

// --- edges ----------------------------------------------------------------------------------------------------------------

const STEPS = 8;

/** Strokes in few batches: edges of about the same weight and colour share one. */
export function drawEdges(pen: Pen, links: Link[], t: Transform, colours: Theme, bright = false): void {
  const batches = new Map<string, { links: Link[]; colour: string; step: number }>();
  for (const link of links) {
    const step = Math.ceil(Math.abs(signedRoot(link.weight, largestWeight)) * STEPS);
    const colour = edgeColour(link, colours);
    const key = `${step}${colour}`;
    const batch = batches.get(key) ?? { links: [], colour, step };
    batches.set(key, batch);
    batch.links.push(link);
  }
  const zoom = Math.min(1.6, Math.max(0.55, t.k));
  for (const { links: same, colour, step } of [...batches.values()].sort((a, b) => a.step - b.step)) {
    const strength = step / STEPS;
    const crowd = links.length > 400 ? 0.6 : 1;
    const alpha = bright ? 0.55 + 0.45 * strength : (0.22 + 0.68 * strength) * crowd;
    const width = edgeWidth(strength ** 2 * largestWeight) * zoom * (bright ? 1.25 : 1);
    pen.curves(
      same.map((link) => link.path),
      t.k,
      t.x,
      t.y,
      { stroke: colour, width, alpha },
    );
    if (links.length > 1500 || t.k < 0.45) continue;
    for (const link of same) arrowHead(pen, link, t, 2.6 + width, { fill: colour, alpha: Math.min(1, alpha + 0.15) });
  }
}

function arrowHead(pen: Pen, { path }: Link, t: Transform, size: number, style: { fill: string; alpha: number }): void {
  const n = path.length;
  const [x, y] = [path[n - 2] * t.k + t.x, path[n - 1] * t.k + t.y];
  const angle = Math.atan2(path[n - 1] - path[n - 3], path[n - 2] - path[n - 4]);
  const corner = (turn: number) => [x - size * 1.7 * Math.cos(angle + turn), y - size * 1.7 * Math.sin(angle + turn)];
  pen.polygon([x, y, ...corner(0.42), ...corner(-0.42)], style);
}

// --- nodes ----------------------------------------------------------------------------------------------------------------

export interface Look {
  pinned: (item: Item) => boolean;
  selected: (item: Item) => boolean;
  found: (item: Item) => boolean;
}

export function drawItem(pen: Pen, item: Item, t: Transform, colours: Theme, look: Look, tally?: Tally): void {
  const [width, height] = [item.width * t.k, item.height * t.k];
  const [x, y] = [item.x * t.k + t.x - width / 2, item.y * t.k + t.y - height / 2];
  const metric = item.node.kind === "metric";
  const unsure = !metric && !item.group && touchesZero(item.node.attributes.interval);
  const fill = unsure
    ? colours.page
    : item.group
      ? groupFill(item.members, item.effect, colours, lens.value)
      : fillOf(item.node, colours, lens.value);
  const emphasis = look.pinned(item) || look.found(item);
  const stroke =
    emphasis || look.selected(item)
      ? colours.accent
      : unsure
        ? fillOf(item.node, colours, lens.value)
        : edgeOf(fill, colours);
  const shape = {
    fill,
    stroke,
    width: emphasis || look.selected(item) ? 2.5 : 1,
    dash: unsure || look.selected(item) ? [4, 3] : undefined,
  };
  const detail = metric && height >= 14 ? (height >= 29 ? "box" : "chip") : detailAt(width, height);
  if (detail === "dot")
    return dot(pen, item, x + width / 2, y + height / 2, Math.max(2.5, Math.min(width, height * 1.6) / 2), shape);
  const radius = Math.min(metric ? height / 2 : 8, height / 3);
  if (item.group) pen.rect(x + 4, y - 4, width, height, radius, { fill: colours.surface, stroke: colours.pale });
  pen.rect(x, y, width, height, radius, shape);
  marks(pen, item, x, y, width, height, fill);
  const room = isOther(item.node) && !item.group ? 26 : 14;
  const lines =
    detail === "box"
      ? boxText(pen, item, t.k, x, y, width, height, room, fill)
      : chipText(pen, item, x, y, width, height, room, fill);
  if (tally) {
    tally.labels++;
    if (!lines.whole) tally.cut++;
    tally.smallest = Math.min(tally.smallest, lines.size);
  }
}

const edgeOf = (fill: string, colours: Theme) =>
  fill === colours.page || fill === colours.diverging[3] ? colours.pale : colours.dark ? "#05070a" : fill;

function dot(pen: Pen, item: Item, x: number, y: number, radius: number, shape: object): void {
  if (item.node.kind === "metric") pen.rect(x - radius * 2, y - radius, radius * 4, radius * 2, radius / 2, shape);
  else if (item.node.kind === "error")
    pen.polygon([x, y - radius * 1.2, x + radius * 1.15, y + radius, x - radius * 1.15, y + radius], shape);
  else if (item.node.kind === "skip")
    pen.polygon([x, y - radius * 1.2, x + radius * 1.2, y, x, y + radius * 1.2, x - radius * 1.2, y], shape);
  else pen.circle(x, y, radius, shape);
}

/** |effect| as a bar on the left, a triangle for an error, a diamond for a skip connection, hatching for a feature that is on at many tokens. */
function marks(pen: Pen, item: Item, x: number, y: number, width: number, height: number, fill: string): void {
  if (item.node.kind === "metric") return;
  const ink = inkOn(fill);
  const share = Math.abs(signedRoot(item.effect, largestEffect));
  const room = height - 10;
  pen.rect(x + 4, y + 5, 3, room, 1.5, { fill: ink, alpha: 0.16 });
  pen.rect(x + 4, y + 5 + room * (1 - share), 3, room * share, 1.5, { fill: ink, alpha: 0.75 });
  if (isOther(item.node) && !item.group) {
    const [cx, cy, s] = [x + 18, y + height / 2, Math.min(7, height / 4)];
    const triangle = [cx, cy - s, cx + s * 1.1, cy + s * 0.8, cx - s * 1.1, cy + s * 0.8];
    const diamond = [cx, cy - s * 1.1, cx + s * 1.1, cy, cx, cy + s * 1.1, cx - s * 1.1, cy];
    pen.polygon(item.node.kind === "error" ? triangle : diamond, {
      stroke: ink,
      width: 1.3,
      alpha: 0.85,
    });
  }
  if ((item.node.attributes.density ?? 0) > DENSE && !item.group)
    for (let i = 0; i < 3; i++) {
      const right = x + width - 3;
      pen.polygon([right - 4 - 4 * i, y + 3, right, y + 7 + 4 * i, right, y + 7 + 4 * i], {
        stroke: ink,
        width: 1,
        alpha: 0.55,
      });
    }
}

interface Written extends Fitted {
  size: number;
}

/** Whether a node's description is written in full when its box of this size is drawn at scale k. */
export function isWhole(node: GraphNode, k: number, [width, height]: [number, number]): boolean {
  const item = { node, group: null } as unknown as Item;
  const room = isOther(node) ? 26 : 14;
  const detail = detailAt(width * k, height * k);
  if (detail === "dot") return false;
  if (detail === "chip") return description(item, SMALLEST_TEXT, width * k - room - 5, 1).whole;
  return boxLines(item, k, width * k, height * k, room).whole;
}

/** The description as it fits into a box, with its size and that of the line below it. */
function boxLines(item: Item, k: number, width: number, height: number, room: number) {
  let size = Math.max(SMALLEST_TEXT, Math.min(15, 11 * k));
  const small = Math.max(SMALLEST_TEXT, Math.min(12.5, 10 * k));
  const inner = width - room - (item.node.kind === "metric" ? 4 : 6);
  const most = height >= 2 * size * LEADING + small * LEADING + 1 ? 2 : 1;
  let fitted = description(item, size, inner, most);
  if (!fitted.whole && size > SMALLEST_TEXT) fitted = description(item, (size = SMALLEST_TEXT), inner, most);
  return { ...fitted, size, small, inner };
}

function boxText(
  pen: Pen,
  item: Item,
  k: number,
  x: number,
  y: number,
  width: number,
  height: number,
  room: number,
  fill: string,
): Written {
  const metric = item.node.kind === "metric";
  const fitted = boxLines(item, k, width, height, room);
  const { size, small, inner } = fitted;
  const second = wrap(secondLine(item, small, inner), small, inner, 1);
  const total = fitted.lines.length * size * LEADING + (second.lines.length ? small * LEADING : 0);
  let line = y + (height - total) / 2 + size * 0.92;
  const centre = x + room + (width - room - 6) / 2 - (metric ? 4 : 0);
  const ink = inkOn(fill);
  for (const text of fitted.lines) {
    pen.text(text, centre, line, { size, fill: ink, weight: metric ? 650 : weightOf(item) });
    line += size * LEADING;
  }
  if (second.lines.length) pen.text(second.lines[0], centre, line, { size: small, fill: ink });
  return { ...fitted, size: Math.min(size, small) };
}

function chipText(
  pen: Pen,
  item: Item,
  x: number,
  y: number,
  width: number,
  height: number,
  room: number,
  fill: string,
): Written {
  const size = SMALLEST_TEXT;
  const fitted = description(item, size, width - room - 5, 1);
  pen.text(fitted.lines[0] ?? "", x + room + (width - room - 5) / 2, y + height / 2 + 3.5, {
    size,
    fill: inkOn(fill),
    weight: weightOf(item),
  });
  return { ...fitted, size };
}

/** What a person named is bold, what was found by itself is not. */
const weightOf = (item: Item) => (item.group || labelOf(item.node) ? 700 : 500);

const description = (item: Item, size: number, width: number, most: number) =>
  item.group
    ? wrap(item.group.name, size, width, most, weightOf(item))
    : fitDescription(item.node, size, width, most, weightOf(item));

/** `resid_3/125 +4.70`, or the shortest of it that fits. */
function secondLine(item: Item, size: number, width: number): string {
  if (item.group) return `${item.members.length} nodes  ${number(item.effect)}`;
  const { node } = item;
  if (node.kind === "metric")
    return circuit.metadata.total_effect === null ? "" : `total effect ${number(node.effect)}`;
  const exact = node.attributes.exact_effect;
  const full = `${node.name}  ${number(node.effect)}`;
  const checked = typeof exact === "number" ? `${full} ✓${number(exact)}` : full;
  return textWidth(checked, size) <= width ? checked : textWidth(full, size) <= width ? full : node.name;
}
