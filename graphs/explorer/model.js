// The circuit, what the reader has chosen to see of it, and how its values read.

const circuit = JSON.parse(document.getElementById("circuit").textContent);
const METRIC = "metric";

const nodes = circuit.nodes.map((node, index) => ({ ...node, index, incoming: [], outgoing: [] }));
const siteRank = new Map(circuit.sites.map((site, rank) => [site, rank]));
const rankOf = (node) => (node.kind === "metric" ? circuit.sites.length : siteRank.get(node.site));
const positionNames = new Map(circuit.positions);

const edges = circuit.edges.map(([source, target, weight, interval], index) => {
  const edge = { index, source: nodes[source], target: nodes[target], weight, interval };
  edge.source.outgoing.push(edge);
  edge.target.incoming.push(edge);
  return edge;
});
const bySize = (a, b) => Math.abs(b.weight) - Math.abs(a.weight);
for (const node of nodes) {
  node.incoming.sort(bySize);
  node.outgoing.sort(bySize);
}
const strongestNodes = nodes
  .filter((node) => node.kind !== "metric")
  .sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect));
const strongestEdges = [...edges].sort(bySize);
const largestEffect = strongestNodes.length ? Math.abs(strongestNodes[0].effect) : 0;
const largestWeight = strongestEdges.length ? Math.abs(strongestEdges[0].weight) : 0;

const chosen = {
  nodeCount: Math.min(strongestNodes.length, strongestNodes.length > 180 ? 120 : 180),
  edgeCount: Math.min(edges.length, 500),
  errors: true,
  connected: false,
  wholePaths: false,
  query: "",
  pinned: null, // node
  hovered: null, // node
  hoveredEdge: null, // edge under the pointer in the panel's lists
};

/** The nodes and edges that the filters let through; the metric and the pinned node always stay. */
function visibleGraph() {
  let shown = strongestNodes.filter((node) => chosen.errors || node.kind !== "error").slice(0, chosen.nodeCount);
  shown.push(...nodes.filter((node) => node.kind === "metric"));
  if (chosen.pinned && !shown.includes(chosen.pinned)) shown.push(chosen.pinned);
  let inside = new Set(shown);
  const between = edges.filter((edge) => inside.has(edge.source) && inside.has(edge.target));
  const kept = between.filter((edge) => Math.abs(edge.weight) >= edgeThreshold()).sort(bySize);
  if (chosen.connected) {
    const touched = new Set(kept.flatMap((edge) => [edge.source, edge.target]));
    shown = shown.filter((node) => touched.has(node) || node.kind === "metric" || node === chosen.pinned);
    inside = new Set(shown);
  }
  return { nodes: shown, edges: kept };
}

/** The |weight| that lets the chosen number of the circuit's edges through. */
const edgeThreshold = () => (chosen.edgeCount ? Math.abs(strongestEdges[chosen.edgeCount - 1].weight) : Infinity);

/** Edges that touch the node, or with `whole` every edge on a path that leads to it or from it. */
function edgesAround(node, shownEdges, whole) {
  if (!whole) return shownEdges.filter((edge) => edge.source === node || edge.target === node);
  const reach = (from, to) => {
    const seen = new Set([node]);
    const order = [...shownEdges].sort((a, b) => (rankOf(a[from]) - rankOf(b[from])) * (from === "source" ? 1 : -1));
    return order.filter((edge) => seen.has(edge[from]) && seen.add(edge[to]));
  };
  return [...new Set([...reach("source", "target"), ...reach("target", "source")])];
}

// --- labels the reader gives ------------------------------------------------------------------------------------------

const storageKey = `circuit-labels-${circuit.key}`;

function readStoredLabels() {
  try {
    return JSON.parse(localStorage.getItem(storageKey)) ?? {};
  } catch {
    return {}; // storage can be forbidden for local files; labels then last as long as the page
  }
}

const storedLabels = readStoredLabels();

function setLabel(node, text) {
  if (text === (node.label ?? "")) delete storedLabels[node.name];
  else storedLabels[node.name] = text;
  try {
    localStorage.setItem(storageKey, JSON.stringify(storedLabels));
  } catch {
    // as above
  }
}

const labelOf = (node) => storedLabels[node.name] ?? node.label ?? "";

/** One line a labelled feature, in the format `graphs/annotations.py` reads. */
function annotationLines() {
  const lines = new Map();
  for (const node of nodes) {
    if (node.kind !== "feature" || !labelOf(node)) continue;
    const [component, layer] = node.site.split("_");
    const place = { Component: component, Layer: layer === undefined ? null : Number(layer), Feature: node.feature };
    lines.set(node.name, JSON.stringify({ ...place, Name: node.name, Annotation: labelOf(node), Notes: "" }));
  }
  return [...lines.values()].join("\n") + "\n";
}

// --- words ------------------------------------------------------------------------------------------------------------

const SIGNS = { "\n": "⏎", "\r": "␍", "\t": "⇥", "\u00a0": "⍽" };

/** A token as a person can see it. */
function visibleText(token) {
  const shown = String(token).replace(/[\u0000-\u001f\u007f-\u00a0]/g, (c) => SIGNS[c] ?? "�");
  return shown.trim() ? shown : shown.replaceAll(" ", "␣");
}

/** What a feature means in one line: its label, else its top tokens. */
function describe(node) {
  if (labelOf(node)) return visibleText(labelOf(node));
  if (node.kind === "error") return "SAE error";
  if (node.kind === "metric") return visibleText(circuit.metadata.metric ?? "metric");
  return (node.attributes.top_tokens ?? [])
    .slice(0, 4)
    .map((t) => visibleText(t).trim())
    .join(" · ");
}

/** The effect in words; nothing for the metric of prompts without a patch side. */
function effectWords(node) {
  if (node.kind === "metric" && circuit.metadata.total_effect === null) return "";
  return `${node.kind === "metric" ? "total effect" : "effect"} ${number(node.effect)}`;
}

/** A signed number to two or three figures. */
function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  let text;
  if (size >= 100) text = value.toFixed(0);
  else if (size >= 0.095) text = value.toFixed(2);
  else if (size >= 0.00095) text = String(Number(value.toPrecision(2)));
  else text = value.toExponential(0);
  return (value > 0 ? "+" : "") + text.replaceAll("-", "−");
}

const plainNumber = (value) => (Number.isInteger(value) ? String(value) : number(value).replace("+", ""));

const nodeTitle = (node) =>
  node.kind === "metric"
    ? METRIC
    : node.name + (node.position === null ? "" : ` at “${positionNames.get(node.position)}”`);

const matches = (node, query) =>
  [node.id, describe(node), ...(node.attributes.top_tokens ?? [])].some((text) =>
    String(text).toLowerCase().includes(query),
  );
