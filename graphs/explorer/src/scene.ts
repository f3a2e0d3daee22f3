// What is drawn and where: filters, supernodes, the layout that fits, and the curve of every edge.

import { computed, signal, untracked } from "@preact/signals";
import { isKind } from "./colour";
import { GUTTER, HEADER, isWhole, MARGIN } from "./draw";
import {
  bySize, byId, circuit, type Edge, type GraphNode, type Interval, type LayoutData, nodes, ranked, rankOf, touchesZero,
} from "./data"; // prettier-ignore
import * as state from "./state";

/** A box of the drawing: a node, or a collapsed supernode with its members. */
export interface Item {
  id: string;
  node: GraphNode;
  group: state.Group | null;
  members: GraphNode[];
  effect: number;
  x: number;
  y: number;
  width: number;
  height: number;
}
/** A curve of the drawing: an edge, or all edges between two items of which one is a supernode. */
export interface Link {
  key: string;
  index: number;
  source: Item;
  target: Item;
  weight: number;
  interval: Interval;
  edges: Edge[];
  /** A Bézier spline: start, then three points a piece; y grows downwards, so it falls from start to end. */
  path: Float32Array;
}
export interface Scene {
  items: Item[];
  links: Link[];
  byNode: Map<GraphNode, Item>;
  layout: LayoutData;
  /** Left, top, right and bottom of all boxes. */
  bounds: [number, number, number, number];
  nodeCount: number;
  edgesBetween: number;
}

const panelWidth = innerWidth > 1000 ? 372 : innerWidth > 820 ? 310 : 0;
/** Room for the drawing in the window, without the names of layers on the left and of positions above. At first what
 * panel, heading and legend usually leave of the window: the scene need not be made again once they are there. */
export const room = signal({ width: innerWidth - panelWidth - GUTTER - 40, height: innerHeight - 126 });
/** The scale that fits a drawing into the window. */
export const scaleToFit = (width: number, height: number, columns: boolean) =>
  Math.max(0.02, Math.min(room.value.width / width, (room.value.height - (columns ? HEADER : MARGIN)) / height, 1.5));
const READABLE = 0.92;
const TIGHT = 0.64;
const PLENTY = 30;

const tallRoom = computed(() => room.value.width / room.value.height < 0.95);

/** The largest layout with two lines of label a node when it is fitted into the window; where that holds fewer than
 * thirty, a larger one of smaller boxes in which 95 % of the descriptions are whole. A name that is given changes nothing
 * of it, so that the drawing stays as it is while a person writes. */
export const fittingCount = computed(() => {
  const candidates = circuit.layouts.filter((layout) => layout.tall === tallRoom.value || circuit.layouts.length < 2);
  const scale = (l: LayoutData) => scaleToFit(l.width, l.height, l.columns.length > 0);
  const roomy = candidates.findLast((layout) => scale(layout) >= READABLE) ?? candidates[0];
  const most = candidates.find(({ size }) => size >= PLENTY)?.size ?? Infinity;
  const tight = candidates.filter(
    (layout) => layout.size > roomy.size && layout.size <= most && scale(layout) >= TIGHT,
  );
  const whole = (layout: LayoutData) => {
    const [width, height] = layout.box;
    const described = ranked.slice(0, layout.size).filter((node) => isWhole(node, scale(layout), [width, height]));
    return described.length >= 0.95 * Math.min(layout.size, ranked.length);
  };
  return (untracked(() => tight.findLast(whole)) ?? roomy).size;
});
export const shownCount = computed(() => state.nodeCount.value || fittingCount.value);

const shownNodes = computed(() => {
  const hidden = state.hiddenKinds.value;
  const fits = (node: GraphNode) =>
    (state.showErrors.value || node.kind !== "error") &&
    !(state.certainOnly.value && touchesZero(node.attributes.interval)) &&
    !hidden.some((key) => isKind(node, key));
  const shown = ranked.filter(fits).slice(0, shownCount.value);
  const inside = new Set(shown);
  for (const node of nodes) if (node.kind === "metric") shown.push(node);
  for (const id of state.pins.value) if (!inside.has(byId.get(id)!)) shown.push(byId.get(id)!);
  return [...new Set(shown)];
});

const edgesBetween = computed(() => {
  const inside = new Set(shownNodes.value);
  return [...inside].flatMap((node) => node.outgoing.filter((edge) => inside.has(edge.target))).sort(bySize);
});
export const shownEdgeCount = computed(() => {
  const all = edgesBetween.value.length;
  return Math.min(all, state.edgeCount.value < 0 ? Math.round(2.5 * shownNodes.value.length) : state.edgeCount.value);
});
/** The |weight| of the weakest edge that is drawn. */
export const edgeThreshold = computed(() => Math.abs(edgesBetween.value[shownEdgeCount.value - 1]?.weight ?? Infinity));

export const scene = computed<Scene>(() => {
  let shown = shownNodes.value;
  const drawn = edgesBetween.value.slice(0, shownEdgeCount.value);
  if (state.connectedOnly.value) {
    const touched = new Set(drawn.flatMap((edge) => [edge.source, edge.target]));
    shown = shown.filter((n) => touched.has(n) || n.kind === "metric" || state.pins.value.includes(n.id));
  }
  const layout = layoutFor(shown);
  const items = makeItems(shown, layout);
  const byNode = new Map(items.flatMap((item) => item.members.map((node) => [node, item] as const)));
  const links = makeLinks(drawn, byNode, layout);
  return {
    items, links, byNode, layout, bounds: boundsOf(items, layout), edgesBetween: edgesBetween.value.length,
    nodeCount: shown.filter((node) => node.kind !== "metric").length,
  }; // prettier-ignore
});

/** The smallest layout that holds all of the nodes but those pinned from outside. */
function layoutFor(shown: GraphNode[]): LayoutData {
  const pinned = new Set(state.pins.value);
  const last = shown.reduce((most, node) => (pinned.has(node.id) ? most : Math.max(most, node.rank)), 0);
  const large = circuit.layouts.filter((layout) => layout.size > last);
  return large.find((layout) => layout.tall === tallRoom.value) ?? large.find((layout) => !layout.tall) ?? large[0];
}

function makeItems(shown: GraphNode[], layout: LayoutData): Item[] {
  const places = new Map(layout.nodes.map(([index, x, y]) => [index, [x, layout.height - y]]));
  const [width, height, metricWidth, metricHeight] = layout.box;
  const collapsed = new Map<string, state.Group>();
  for (const group of state.groups.value) if (group.collapsed) for (const id of group.nodes) collapsed.set(id, group);
  const items: Item[] = [];
  const ofGroup = new Map<state.Group, Item>();
  let outside = 0;
  for (const node of [...shown].sort((a, b) => a.rank - b.rank)) {
    const group = collapsed.get(node.id) ?? null;
    const existing = group && ofGroup.get(group);
    if (existing) {
      existing.members.push(node);
      existing.effect += node.effect;
      continue;
    }
    let place = places.get(node.index);
    if (!place) {
      // A pinned node beyond the threshold stands on the right, at the height of its site.
      const above = layout.bands.find(([site]) => circuit.sites.indexOf(site) >= circuit.sites.indexOf(node.site));
      const y = above ? layout.height - (above[1] + above[2]) / 2 : height / 2;
      place = [layout.width + 40 + width / 2 + width * 1.1 * outside++, y];
    }
    const metric = node.kind === "metric";
    const item: Item = {
      id: group ? `group:${group.name}` : node.id, node, group, members: [node], effect: node.effect,
      x: place[0], y: place[1], width: metric ? metricWidth : width, height: metric ? metricHeight : height,
    }; // prettier-ignore
    items.push(item);
    if (group) ofGroup.set(group, item);
  }
  return items;
}

function makeLinks(drawn: Edge[], byNode: Map<GraphNode, Item>, layout: LayoutData): Link[] {
  const links = new Map<string, Link>();
  for (const edge of drawn) {
    const source = byNode.get(edge.source);
    const target = byNode.get(edge.target);
    if (!source || !target || source === target) continue;
    const bundled = source.group || target.group;
    const key = bundled ? `${source.id}\n${target.id}` : state.edgeKey(edge.source.index, edge.target.index);
    const link = links.get(key);
    if (link) {
      link.edges.push(edge);
      link.weight += edge.weight;
      link.interval = null;
      continue;
    }
    const route = bundled ? undefined : layout.routes[edge.index];
    const path = route ? flipped(route, layout.height) : plainCurve(source, target);
    const { weight, interval, index } = edge;
    links.set(key, { key, index: bundled ? -1 : index, source, target, weight, interval, edges: [edge], path });
  }
  return [...links.values()].sort((a, b) => Math.abs(a.weight) - Math.abs(b.weight));
}

function flipped(route: number[], height: number): Float32Array {
  return Float32Array.from(route, (value, i) => (i % 2 ? height - value : value));
}

function plainCurve(source: Item, target: Item): Float32Array {
  const [x0, y0] = [source.x, source.y - source.height / 2];
  const [x1, y1] = [target.x, target.y + target.height / 2];
  const third = (y1 - y0) / 2.2;
  return Float32Array.of(x0, y0, x0, y0 + third, x1, y1 - third, x1, y1);
}

function boundsOf(items: Item[], layout: LayoutData): [number, number, number, number] {
  const right = items.reduce((most, item) => Math.max(most, item.x + item.width / 2), layout.width);
  return [0, 0, right, layout.height];
}

/** Links that touch the item, or with `whole` every link on a path that leads to it or from it. */
export function linksAround(item: Item, links: Link[], whole: boolean): Link[] {
  if (!whole) return links.filter((link) => link.source === item || link.target === item);
  const reach = (from: "source" | "target", to: "source" | "target", sign: number) => {
    const seen = new Set([item]);
    const order = [...links].sort((a, b) => sign * (rankOf(a[from].node) - rankOf(b[from].node)));
    return order.filter((link) => seen.has(link[from]) && seen.add(link[to]));
  };
  return [...new Set([...reach("source", "target", 1), ...reach("target", "source", -1)])];
}

/** Faithfulness of circuits about as large as what is drawn, between the measured sizes around it. */
export function faithfulnessAt(n: number): { value: number; measured: string } | null {
  const curve = circuit.metadata.faithfulness;
  if (!curve?.sizes?.length) return null;
  const { sizes, faithfulness } = curve;
  const after = sizes.findIndex((size) => size >= n);
  const say = (i: number) => `${faithfulness[i].toFixed(2)} at ${sizes[i]}`;
  if (after === 0 && sizes[0] > n) return { value: NaN, measured: say(0) };
  if (after < 0) return { value: faithfulness.at(-1)!, measured: say(sizes.length - 1) };
  if (sizes[after] === n) return { value: faithfulness[after], measured: say(after) };
  const share = Math.log(n / sizes[after - 1]) / Math.log(sizes[after] / sizes[after - 1]);
  const value = faithfulness[after - 1] + share * (faithfulness[after] - faithfulness[after - 1]);
  return { value, measured: `${say(after - 1)}, ${say(after)}` };
}

// --- finding what lies under a point ------------------------------------------------------------------------------------

/** The link within `reach` of the point (in layout units), the nearest first; all curves rise steadily in y. */
export function linkAt(links: Link[], x: number, y: number, reach: number): Link | null {
  let best: Link | null = null;
  let least = reach;
  for (const link of links) {
    const path = link.path;
    const [top, bottom] = [path[path.length - 1], path[1]];
    if (y < Math.min(top, bottom) - reach || y > Math.max(top, bottom) + reach) continue;
    const distance = distanceTo(path, x, y);
    if (distance <= least) [best, least] = [link, distance];
  }
  return best;
}

/** Distance from a point to a spline: each piece as eight chords. */
function distanceTo(path: Float32Array, x: number, y: number): number {
  let least = Infinity;
  for (let i = 0; i + 7 < path.length; i += 6) {
    const [low, high] = path[i + 1] < path[i + 7] ? [path[i + 1], path[i + 7]] : [path[i + 7], path[i + 1]];
    if (y < low - 12 || y > high + 12) continue;
    let [px, py] = [path[i], path[i + 1]];
    for (let step = 1; step <= 8; step++) {
      const t = step / 8;
      const u = 1 - t;
      const [a, b, c, d] = [u * u * u, 3 * u * u * t, 3 * u * t * t, t * t * t];
      const qx = a * path[i] + b * path[i + 2] + c * path[i + 4] + d * path[i + 6];
      const qy = a * path[i + 1] + b * path[i + 3] + c * path[i + 5] + d * path[i + 7];
      const [dx, dy] = [qx - px, qy - py];
      const along = Math.max(0, Math.min(1, ((x - px) * dx + (y - py) * dy) / (dx * dx + dy * dy || 1)));
      least = Math.min(least, Math.hypot(px + along * dx - x, py + along * dy - y));
      [px, py] = [qx, qy];
    }
  }
  return least;
}
