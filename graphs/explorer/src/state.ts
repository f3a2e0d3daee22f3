// What the reader has chosen: signals, kept in the URL with history, and in local storage.

import { batch, signal } from "@preact/signals";
import { byId, classes, circuit, edges, examples, nodes, nodeSide, ranked, shareOn } from "./data";

/** What nodes are coloured by; `prompt:1` is their activation on the second example prompt. */
export type Lens = "class" | "effect" | "interval" | "comparison" | `prompt:${number}`;
export interface Group {
  name: string;
  nodes: string[];
  collapsed: boolean;
}

/** How many of the strongest nodes are drawn; 0 means as many as the window holds in readable type. */
export const nodeCount = signal(0);
/** How many edges between drawn nodes; -1 means about 2.5 a node. */
export const edgeCount = signal(-1);
export const showErrors = signal(true);
export const connectedOnly = signal(false);
export const wholePaths = signal(false);
export const certainOnly = signal(false);
export const lens = signal<Lens>("effect");
/** Classes (or signs, or sides of a comparison) that the legend has switched off. */
export const hiddenKinds = signal<string[]>([]);
export const pins = signal<string[]>([]);
export const openEdge = signal<string | null>(null);
export const view = signal<"graph" | "table">("graph");
export const query = signal("");

export const hovered = signal<string | null>(null);
export const hoveredEdge = signal<string | null>(null);
/** Nodes chosen for a supernode by lasso or shift-click. */
export const selected = signal<string[]>([]);
export const lassoing = signal(false);
export const labels = signal<Record<string, string>>({});
export const groups = signal<Group[]>([]);
export const announcement = signal("");

// --- URL ----------------------------------------------------------------------------------------------------------------

const SEPARATOR = "~";
const SWITCHES = [
  ["connected", connectedOnly],
  ["paths", wholePaths],
  ["certain", certainOnly],
] as const;

export const defaultLens = (): Lens => (nodeSide ? "comparison" : classes.length > 1 ? "class" : "effect");
export const lenses = (): Lens[] => [
  ...(nodeSide ? (["comparison"] as const) : []),
  ...(classes.length > 1 ? (["class"] as const) : []),
  "effect",
  ...(nodes.some((node) => node.attributes.interval) ? (["interval"] as const) : []),
  ...examples.filter((prompt) => nodes.some((node) => shareOn(node, prompt) !== null)).map((prompt) => `prompt:${prompt}` as const),
];

function toHash(): string {
  const parameters = new URLSearchParams();
  if (nodeCount.value) parameters.set("nodes", String(nodeCount.value));
  if (edgeCount.value >= 0) parameters.set("edges", String(edgeCount.value));
  if (!showErrors.value) parameters.set("errors", "0");
  for (const [name, value] of SWITCHES) if (value.value) parameters.set(name, "1");
  if (lens.value !== defaultLens()) parameters.set("lens", lens.value);
  if (hiddenKinds.value.length) parameters.set("hide", hiddenKinds.value.join(SEPARATOR));
  if (pins.value.length) parameters.set("pin", pins.value.join(SEPARATOR));
  if (openEdge.value) parameters.set("edge", openEdge.value);
  if (view.value === "table") parameters.set("view", "table");
  return parameters.size ? `#${parameters}` : "";
}

/** Takes over what the URL says; `#node-resid_3/120` pins that node, as links from elsewhere do. */
export function readHash(hash: string): void {
  const text = hash.replace(/^#/, "");
  let parameters: URLSearchParams;
  let linked: string[] = [];
  if (text.startsWith("node-")) {
    parameters = new URLSearchParams();
    linked = [decoded(text.slice(5))];
  } else parameters = new URLSearchParams(text);
  const whole = (name: string, otherwise: number, most: number) => {
    const value = parameters.get(name);
    return value !== null && /^\d+$/.test(value) ? Math.min(Number(value), most) : otherwise;
  };
  const list = (name: string) => parameters.get(name)?.split(SEPARATOR) ?? [];
  batch(() => {
    nodeCount.value = whole("nodes", 0, ranked.length);
    edgeCount.value = whole("edges", -1, edges.length);
    showErrors.value = parameters.get("errors") !== "0";
    for (const [name, value] of SWITCHES) value.value = parameters.get(name) === "1";
    const wanted = parameters.get("lens") as Lens;
    lens.value = lenses().includes(wanted) ? wanted : defaultLens();
    hiddenKinds.value = list("hide");
    pins.value = [...linked, ...list("pin")].filter((id) => byId.has(id));
    openEdge.value = edgeOf(parameters.get("edge")) ? parameters.get("edge") : null;
    view.value = parameters.get("view") === "table" ? "table" : "graph";
  });
}

function decoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // a stray % is part of the name
  }
}

/** "12>40": indices of both nodes, since ids may hold any sign. */
export const edgeKey = (source: number, target: number) => `${source}>${target}`;
export function edgeOf(key: string | null) {
  const match = key?.match(/^(\d+)>(\d+)$/);
  return match && nodes[Number(match[1])]?.outgoing.find((edge) => edge.target.index === Number(match[2]));
}

// --- history and undo ---------------------------------------------------------------------------------------------------

interface Snapshot {
  hash: string;
  labels: Record<string, string>;
  groups: Group[];
}
let current: Snapshot = { hash: "", labels: {}, groups: [] };
export const past = signal<Snapshot[]>([]);
export const future = signal<Snapshot[]>([]);

const snapshot = (): Snapshot => ({ hash: toHash(), labels: labels.value, groups: groups.value });
const same = (a: Snapshot, b: Snapshot) => a.hash === b.hash && a.labels === b.labels && a.groups === b.groups;
/** In a notebook's frame there is no address to keep anything in. */
const framed = location.protocol === "about:";
const address = (hash: string) => location.pathname + location.search + hash;

/** Ends a step of the reader: it gets its place in the browser's history and can be undone. */
export function commit(): void {
  const next = snapshot();
  if (same(next, current)) return;
  past.value = [...past.value.slice(-99), current];
  future.value = [];
  arrive(next);
}

function arrive(next: Snapshot): void {
  if (next.hash !== current.hash && !framed) history.pushState(null, "", address(next.hash));
  if (next.labels !== current.labels) keepLabels(current.labels, next.labels);
  if (next.groups !== current.groups) store("groups", next.groups);
  current = next;
}

function travel(from: typeof past, to: typeof past): void {
  const target = from.value.at(-1);
  if (!target) return;
  from.value = from.value.slice(0, -1);
  to.value = [...to.value, current];
  batch(() => {
    readHash(target.hash);
    labels.value = target.labels;
    groups.value = target.groups;
  });
  arrive(target);
}
export const undo = () => travel(past, future);
export const redo = () => travel(future, past);

// --- what lasts: local storage, or the run where `sfc serve` shows the page -----------------------------------------------

/** Writes a name down; of a page that `sfc serve` shows, which puts it there. A page by itself knows no network. */
const { keepLabel } = window as { keepLabel?: (feature: string, label: string) => Promise<void> };

function keepLabels(before: Record<string, string>, after: Record<string, string>): void {
  if (!keepLabel) return store("labels", after);
  for (const name of new Set([...Object.keys(before), ...Object.keys(after)])) {
    const given = featureNode(name)?.label ?? "";
    const label = after[name] ?? given;
    if (label === (before[name] ?? given)) continue;
    keepLabel(name, label).then(
      () => (announcement.value = `${name}: written down`),
      (error: Error) => (announcement.value = `${name}: ${error.message}; the name lasts as long as this page`),
    );
  }
}

// --- local storage ------------------------------------------------------------------------------------------------------

/** Labels belong to the SAEs, so that they survive another number of nodes; supernodes to this very graph. */
const storageKey = (what: "labels" | "groups") =>
  `circuit-${what}-${(what === "labels" && circuit.metadata.saes_fingerprint) || circuit.key}`;

function store(what: "labels" | "groups", value: unknown): void {
  try {
    localStorage.setItem(storageKey(what), JSON.stringify(value));
  } catch {
    // storage can be forbidden for local files; labels then last as long as the page
  }
}

function stored<T>(what: "labels" | "groups", fits: (value: unknown) => T | null, otherwise: T): T {
  try {
    return fits(JSON.parse(localStorage.getItem(storageKey(what)) ?? "null")) ?? otherwise;
  } catch {
    return otherwise;
  }
}

const asLabels = (value: unknown) =>
  value && typeof value === "object" && !Array.isArray(value)
    ? Object.fromEntries(Object.entries(value).filter(([, text]) => typeof text === "string"))
    : null;

/** Supernodes from a file or from storage: what does not fit this graph is left out. */
export function asGroups(value: unknown): Group[] | null {
  if (!Array.isArray(value)) return null;
  const taken = new Set<string>();
  return value
    .filter((group) => group && typeof group.name === "string" && Array.isArray(group.nodes))
    .map(({ name, nodes: members, collapsed }) => ({
      name,
      nodes: members.filter((id: unknown) => typeof id === "string" && byId.has(id) && !taken.has(id) && taken.add(id)),
      collapsed: collapsed !== false,
    }))
    .filter((group) => group.nodes.length);
}

export function start(): void {
  labels.value = keepLabel ? {} : stored("labels", asLabels, {});
  groups.value = stored("groups", asGroups, asGroups(circuit.groups) ?? []);
  readHash(location.hash);
  current = snapshot();
  addEventListener("popstate", () => {
    readHash(location.hash);
    current = snapshot();
  });
}

/** Takes over what Python says, in a notebook; what does not fit the graph is left out. */
export function take(what: "pins" | "labels" | "groups", value: unknown): void {
  if (what === "labels") labels.value = asLabels(value) ?? {};
  else if (what === "groups") groups.value = asGroups(value) ?? [];
  else pins.value = Array.isArray(value) ? value.filter((id) => byId.has(id)) : [];
  commit();
}

// --- steps --------------------------------------------------------------------------------------------------------------

/** The node of a feature: the strongest where it is at several positions. */
export const featureNode = (name: string) =>
  ranked.find((node) => node.name === name) ?? nodes.find((node) => node.name === name);

/** What a click on a feature's name does; the feature pages open it instead. */
export const opener: { open: ((id: string) => void) | null } = { open: null };

export function togglePin(id: string): void {
  if (opener.open) return opener.open(id);
  pins.value = pins.value.includes(id) ? pins.value.filter((pin) => pin !== id) : [id, ...pins.value];
  announcement.value = `${id} ${pins.value.includes(id) ? "pinned" : "let go"}`;
  commit();
}

export function setLabel(name: string, text: string, given: string | null): void {
  const { [name]: _, ...rest } = labels.value;
  labels.value = text === (given ?? "") ? rest : { ...rest, [name]: text };
}

export function toggleSelected(id: string): void {
  if (byId.get(id)?.kind === "metric") return;
  selected.value = selected.value.includes(id) ? selected.value.filter((s) => s !== id) : [...selected.value, id];
}

export function makeGroup(name: string): void {
  const members = selected.value;
  const others = groups.value
    .map((group) => ({ ...group, nodes: group.nodes.filter((id) => !members.includes(id)) }))
    .filter((group) => group.nodes.length);
  groups.value = [...others, { name, nodes: members, collapsed: true }];
  selected.value = [];
  commit();
}

export function changeGroup(place: number, change: Partial<Group> | null): void {
  groups.value = groups.value.flatMap((group, i) => (i !== place ? [group] : change ? [{ ...group, ...change }] : []));
  commit();
}
