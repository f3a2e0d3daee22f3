// The circuit as the page carries it, and what is derived from it once.

export type Position = number | string | null;
export type Interval = [number, number] | null;

export interface Context {
  tokens: string[];
  activations: number[];
  peak?: number | null;
  /** Change of each token's log-probability when the feature is ablated. */
  change?: (number | null)[];
}
export interface Counts {
  edges: number[];
  counts: number[];
}
export interface Attributes {
  interval?: [number, number];
  density?: number;
  top_tokens?: string[];
  top_logits?: ([string, number] | string)[];
  bottom_logits?: ([string, number] | string)[];
  contexts?: Context[];
  /** Mean activation by case, and in it by span ("" where positions are summed). */
  by_case?: Record<string, Record<string, number>>;
  histogram?: Counts;
  logit_histogram?: Counts;
  /** (share, activation that such a share of those above zero is below). */
  quantiles?: [number, number][];
  max_activation?: number;
  samples?: { low: number; high: number; share: number; contexts: Context[] }[];
  random?: Context[];
  similar?: Record<string, [string, number][]>;
  /** Which head looks where -> the features that this one pairs with there, and what the pair adds to the score. */
  attention?: Record<string, [string, number][]>;
  /** Largest activation on each prompt, by case. */
  prompt_peaks?: Record<string, number[]>;
  /** Whether the feature is in no circuit: it has no effect and no edges then. */
  outside?: boolean;
  automatic_label?: string;
  exact_effect?: number;
  [name: string]: unknown;
}
export interface GraphNode {
  id: string;
  name: string;
  site: string;
  feature: number | null;
  kind: "feature" | "error" | "skip" | "metric";
  position: Position;
  effect: number;
  label: string | null;
  /** What the feature means where nobody gave it a label. */
  words: string;
  attributes: Attributes;
  index: number;
  /** 0 for the strongest; the metric has -1. */
  rank: number;
  incoming: Edge[];
  outgoing: Edge[];
}
export interface Edge {
  index: number;
  source: GraphNode;
  target: GraphNode;
  weight: number;
  interval: Interval;
  /** Mean weight on the prompts of each case, where it is known. */
  byCase?: [string, number | null][];
}
export interface LayoutData {
  size: number;
  tall: boolean;
  width: number;
  height: number;
  /** Width and height of a node, then of the metric. */
  box: [number, number, number, number];
  nodes: [number, number, number][];
  bands: [string, number, number][];
  columns: [Position, number, number][];
  routes: Record<string, number[]>;
}
interface Comparison {
  title: string;
  effects: (number | null)[];
  weights: (number | null)[];
  only_nodes: number[];
  only_edges: number[];
}
export interface Faithfulness {
  sizes: number[];
  faithfulness: number[];
  intervals?: { faithfulness?: [number, number][] };
  start_site?: string | null;
}
/** Two classes of cases, and for which of them each feature is on: -1 for the first alone, 1 for the second. */
export interface Classes {
  names: [string, string];
  cases: [string[], string[]];
  contrast: Record<string, number>;
}
export interface ExamplePair {
  case: string;
  clean: string;
  clean_answer: string;
  patch?: string;
  patch_answer?: string;
}
interface Stored {
  title: string;
  key: string;
  metadata: Record<string, unknown> & { metric?: string; total_effect?: number | null; faithfulness?: Faithfulness; example_pairs?: ExamplePair[]; cases?: Record<string, number> };
  sites: string[];
  positions: [Position, string, string][];
  nodes: Omit<GraphNode, "index" | "rank" | "incoming" | "outgoing">[];
  edges: [number, number, number, Interval, (number | null)[]?][];
  edge_cases: string[];
  layouts: LayoutData[];
  classes: Classes | null;
  comparison?: Comparison;
  /** Supernodes that the circuit has; a reader's own take their place. */
  groups?: { name: string; nodes: string[]; collapsed: boolean }[];
  /** Which page this is; the explorer where nothing is said. */
  page?: "features";
  about?: string;
  /** Other pages of the run, where they exist. */
  links?: { circuit?: string; features?: string; report?: string };
}

const element = document.getElementById("circuit")!;
const bytes = decoded(element.textContent!.trim());
const unzip = new DecompressionStream("gzip");
const writer = unzip.writable.getWriter();
void writer.write(bytes);
void writer.close();

/** The bytes of a text in base64; browsers from 2025 on have a function for it. */
function decoded(text: string): Uint8Array<ArrayBuffer> {
  const { fromBase64 } = Uint8Array as { fromBase64?: (text: string) => Uint8Array<ArrayBuffer> };
  return fromBase64?.call(Uint8Array, text) ?? Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** Resolves when the circuit is unpacked; every other name of this module may be used after it. */
export const ready = new Response(unzip.readable).json().then(unpack);

export let circuit: Stored;
export let nodes: GraphNode[];
export let edges: Edge[];
export let ranked: GraphNode[];
export let cases: string[] = [];
/** What colours tell apart: two classes of cases where the page has them, else the cases. */
export let classes: string[] = [];
/** Places of the example prompts in `metadata.example_pairs`. */
export let examples: number[] = [];
export let largestEffect = 0;
export let largestWeight = 0;
export const byId = new Map<string, GraphNode>();
export const positionNames = new Map<Position, string>();
export const spanWords = new Map<Position, string>();
/** Where a node or edge of a comparison is: 0 in both, -1 only in the first graph, 1 only in the second. */
export let nodeSide: Int8Array | null = null;
export let edgeSide: Int8Array | null = null;

export const bySize = (a: { weight: number }, b: { weight: number }) => Math.abs(b.weight) - Math.abs(a.weight);

function unpack(stored: Stored): void {
  circuit = stored;
  nodes = stored.nodes.map((node, index) => ({ ...node, index, rank: -1, incoming: [], outgoing: [] }));
  edges = stored.edges.map(([source, target, weight, interval, weights], index) => {
    const byCase = weights && stored.edge_cases.map((name, n) => [name, weights[n]] as [string, number]);
    const edge = { index, source: nodes[source], target: nodes[target], weight, interval, byCase };
    edge.source.outgoing.push(edge);
    edge.target.incoming.push(edge);
    return edge;
  });
  for (const node of nodes) {
    byId.set(node.id, node);
    node.incoming.sort(bySize);
    node.outgoing.sort(bySize);
  }
  ranked = nodes.filter((node) => node.kind !== "metric").sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect));
  ranked.forEach((node, rank) => (node.rank = rank));
  largestEffect = ranked.length ? Math.abs(ranked[0].effect) : 0;
  largestWeight = edges.reduce((most, edge) => Math.max(most, Math.abs(edge.weight)), 0);
  for (const [position, name, words] of stored.positions) {
    positionNames.set(position, name);
    spanWords.set(position, words);
  }
  const seen = new Set<string>();
  for (const node of nodes) for (const name of Object.keys(node.attributes.by_case ?? {})) seen.add(name);
  cases = [...seen];
  classes = stored.classes?.names ?? cases;
  examples = (stored.metadata.example_pairs ?? []).map((_, place) => place);
  if (stored.comparison) setSides(stored.comparison);
}

function setSides({ effects, weights, only_nodes, only_edges }: Comparison): void {
  nodeSide = Int8Array.from(effects, (effect) => (effect === null ? -1 : 0));
  edgeSide = Int8Array.from(weights, (weight) => (weight === null ? -1 : 0));
  for (const index of only_nodes) nodeSide[index] = 1;
  for (const index of only_edges) edgeSide[index] = 1;
}

/** Mean activation of the node by case: at its own span where it has one, else the mean over spans. */
export function activationByCase(node: GraphNode): [string, number][] {
  const byCase = node.attributes.by_case;
  if (!byCase) return [];
  return cases
    .filter((name) => byCase[name])
    .map((name) => {
      const spans = byCase[name];
      const here = spans[String(node.position ?? "")];
      const values = Object.values(spans);
      return [name, here ?? values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length)];
    });
}

/** A feature's largest activation on an example prompt, as a share of its largest on any prompt; null where not known. */
export function shareOn(node: GraphNode, example: number): number | null {
  const peaks = node.attributes.prompt_peaks;
  const here = peaks?.[circuit.metadata.example_pairs?.[example]?.case ?? ""]?.[0]; // each pair is the first of its case
  if (!peaks || here === undefined) return null;
  return here / Math.max(...Object.values(peaks).flat(), Number.MIN_VALUE);
}

/** The class that a case belongs to, by its place in `classes`. */
export function classOf(name: string): number {
  const split = circuit.classes?.cases;
  return split ? split.findIndex((side) => side.includes(name)) : cases.indexOf(name);
}

/** The class a feature is active for and how clearly, 0 to 1; of cases (most - mean of others) / (most + that mean). */
export function classContrast(node: GraphNode): { place: number; strength: number } | null {
  if (circuit.classes) {
    const contrast = circuit.classes.contrast[node.id];
    return contrast === undefined ? null : { place: contrast > 0 ? 1 : 0, strength: Math.abs(contrast) };
  }
  const values = activationByCase(node);
  if (values.length < 2) return null;
  const numbers = values.map(([, value]) => Math.max(0, value));
  const most = Math.max(...numbers);
  if (most <= 0) return { place: 0, strength: 0 };
  const place = numbers.indexOf(most);
  const rest = (numbers.reduce((sum, value) => sum + value, 0) - most) / (numbers.length - 1);
  return { place: cases.indexOf(values[place][0]), strength: (most - rest) / (most + rest) };
}

export const touchesZero = (interval: Interval | undefined) =>
  Boolean(interval && interval[0] <= 0 && interval[1] >= 0);

/** "3" for attn_3; the site itself where its name has no number. */
export const layerOf = (site: string) => site.match(/\d+/)?.[0] ?? site;
export const laneOf = (site: string) => site.replace(/_?\d+/, "");
export const rankOf = (node: GraphNode) =>
  node.kind === "metric" ? circuit.sites.length : circuit.sites.indexOf(node.site);
