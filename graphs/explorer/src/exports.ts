// Files of what is shown: SVG and PNG with title and legend, JSON, CSV, Python; labels and supernodes.

import { kindsOf, lightTheme, type Theme, theme } from "./colour";
import { circuit, edges as allEdges, type GraphNode, largestEffect, largestWeight, nodes } from "./data";
import { drawBands, drawEdges, drawItem, drawNames, GUTTER, HEADER } from "./draw";
import { CanvasPen, type Pen, SvgPen } from "./pen";
import { scene, type Scene } from "./scene";
import * as state from "./state";
import { labelOf, plain, textWidth, wrap } from "./text";

const TITLE = 46;
const LEGEND = 44;

const fileName = () =>
  circuit.title
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 60) || "circuit";

export function save(name: string, content: string | Blob, type = "text/plain"): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// --- pictures -------------------------------------------------------------------------------------------------------------

interface Sheet {
  width: number;
  height: number;
  draw: (pen: Pen) => void;
}

/** The whole drawing at its natural size with title, legend and names. */
function sheet(current: Scene, colours: Theme): Sheet {
  const [left, , right, bottom] = current.bounds;
  const width = Math.max(right - left + GUTTER + 20, 560);
  const top = TITLE + (current.layout.columns.length ? HEADER : 10);
  const height = bottom + top + LEGEND + 16;
  const t = { k: 1, x: GUTTER + 5, y: top };
  const look = {
    pinned: (item: { id: string }) => state.pins.value.includes(item.id),
    selected: () => false,
    found: () => false,
  };
  return {
    width,
    height,
    draw: (pen) => {
      const inGroup = (attributes: string, content: () => void) => {
        if (pen instanceof SvgPen) pen.open(attributes);
        content();
        if (pen instanceof SvgPen) pen.close();
      };
      pen.rect(0, 0, width, height, 0, { fill: colours.page });
      drawBands(pen, current, t, colours, width);
      inGroup('class="edges"', () => drawEdges(pen, current.links, t, colours));
      for (const item of current.items) inGroup('class="node"', () => drawItem(pen, item, t, colours, look));
      drawNames(pen, current, t, colours, height - LEGEND);
      pen.rect(0, 0, width, TITLE, 0, { fill: colours.page });
      const title = wrap(circuit.title, 17, width - 30, 1, 650).lines[0] ?? "";
      pen.text(title, 12, 22, { size: 17, fill: colours.ink, weight: 650, anchor: "start" });
      const facts = `${current.nodeCount} of ${nodes.length} nodes, ${current.links.length} of ${allEdges.length} edges · ${circuit.metadata.metric ?? ""}`;
      pen.text(wrap(facts, 11, width - 30, 1).lines[0] ?? "", 12, 38, {
        size: 11,
        fill: colours.pale,
        anchor: "start",
      });
      if (current.layout.columns.length) drawColumnNames(pen, current, t, colours);
      drawLegend(pen, width, height - LEGEND / 2, colours);
    },
  };
}

function drawColumnNames(pen: Pen, current: Scene, t: { k: number; x: number; y: number }, colours: Theme): void {
  for (const [position, left, right] of current.layout.columns) {
    const name = circuit.positions.find(([p]) => p === position)?.[1] ?? "all positions";
    const shown = wrap(name, 12, right - left - 6, 1, 650).lines[0] ?? "";
    pen.text(shown, (left + right) / 2 + t.x, TITLE + 16, { size: 12, fill: colours.ink, weight: 650 });
  }
}

function drawLegend(pen: Pen, width: number, y: number, colours: Theme): void {
  let x = 12;
  const say = (text: string) => {
    pen.text(text, x, y + 4, { size: 11, fill: colours.pale, anchor: "start" });
    x += textWidth(text, 11) + 16;
  };
  for (const kind of kindsOf(state.lens.value, colours)) {
    pen.rect(x, y - 6, 14, 12, 2, { fill: kind.colour, stroke: colours.pale });
    x += 19;
    say(kind.name);
  }
  say(`largest |effect| ${plain(largestEffect)}`);
  pen.polygon([x + 6, y - 6, x + 12, y + 6, x, y + 6], { stroke: colours.pale });
  x += 18;
  say("SAE error");
  for (const [colour, name] of [
    [colours.positive, "raises"],
    [colours.negative, "lowers"],
  ] as const) {
    pen.rect(x, y - 1.5, 18, 3, 0, { fill: colour });
    x += 23;
    say(`edge ${name}`);
  }
  if (x < width - 90) say(`widest edge ${plain(largestWeight)}`);
}

export function svgText(colours = theme.value): string {
  const { width, height, draw } = sheet(scene.value, colours);
  const pen = new SvgPen();
  draw(pen);
  return pen.document(width, height, circuit.title);
}
export const printedSvg = () => svgText(lightTheme);
export const saveSvg = () => save(`${fileName()}.svg`, svgText(), "image/svg+xml");

export function savePng(): void {
  const { width, height, draw } = sheet(scene.value, theme.value);
  const canvas = document.createElement("canvas");
  const scale = Math.min(2, 8000 / Math.max(width, height));
  canvas.width = width * scale;
  canvas.height = height * scale;
  const context = canvas.getContext("2d")!;
  context.scale(scale, scale);
  draw(new CanvasPen(context));
  canvas.toBlob((blob) => blob && save(`${fileName()}.png`, blob), "image/png");
}

// --- data -----------------------------------------------------------------------------------------------------------------

const shownNodes = () => scene.value.items.flatMap((item) => item.members).sort((a, b) => a.index - b.index);
const shownEdges = () => scene.value.links.flatMap((link) => link.edges);

/** The shown subgraph in the format of `FeatureGraph.load`, with the labels of the page. */
export function graphJson(): string {
  const { metadata, sites, title } = circuit;
  const fields = ({ id, site, feature, kind, position, effect, attributes, ...node }: GraphNode) => ({
    id, site, feature, kind, position, effect, label: labelOf(node as GraphNode) || null, attributes,
  }); // prettier-ignore
  const edges = shownEdges().map(({ source, target, weight, interval, byCase }) => ({
    source: source.id, target: target.id, weight, ...(interval ? { interval } : {}), ...(byCase ? { by_case: Object.fromEntries(byCase) } : {}),
  })); // prettier-ignore
  return JSON.stringify({
    schema_version: 1,
    metadata: { ...metadata, title },
    sites,
    nodes: shownNodes().map(fields),
    edges,
  });
}
export const saveJson = () => save(`${fileName()}.json`, graphJson(), "application/json");

/** A cell of a CSV file: quoted where needed, never a formula. */
function csvCell(value: unknown): string {
  let text = value === null || value === undefined ? "" : String(value);
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
const csv = (rows: unknown[][]) => rows.map((row) => row.map(csvCell).join(",")).join("\r\n") + "\r\n";

export const nodesCsv = () =>
  csv([
    ["id", "site", "feature", "kind", "position", "effect", "low", "high", "label", "top_tokens"],
    ...shownNodes().map((n) => [
      n.id,
      n.site,
      n.feature,
      n.kind,
      n.position,
      n.effect,
      ...(n.attributes.interval ?? ["", ""]),
      labelOf(n),
      (n.attributes.top_tokens ?? []).join(" "),
    ]),
  ]);
export const edgesCsv = () =>
  csv([
    ["source", "target", "weight", "low", "high"],
    ...shownEdges().map((e) => [e.source.id, e.target.id, e.weight, ...(e.interval ?? ["", ""])]),
  ]);
export const saveNodesCsv = () => save(`${fileName()}-nodes.csv`, nodesCsv(), "text/csv");
export const saveEdgesCsv = () => save(`${fileName()}-edges.csv`, edgesCsv(), "text/csv");

/** Python that makes the shown (or chosen, or pinned) nodes into a graph and a dictionary of features. */
export function pythonCode(): string {
  const ids = state.selected.value.length
    ? state.selected.value
    : state.pins.value.length
      ? state.pins.value
      : shownNodes().map((n) => n.id);
  const wanted = new Set(ids);
  const chosen = nodes.filter((node) => wanted.has(node.id));
  const features = new Map<string, number[]>();
  for (const node of chosen)
    if (node.feature !== null) features.set(node.site, [...(features.get(node.site) ?? []), node.feature]);
  const text = (value: string) => JSON.stringify(value);
  return [
    "from graphs import FeatureGraph",
    "",
    'graph = FeatureGraph.load("circuit/circuit.json")',
    `part = graph.subgraph([${chosen.map((node) => text(node.id)).join(", ")}])`,
    `features = {${[...features].map(([site, list]) => `${text(site)}: [${[...new Set(list)].join(", ")}]`).join(", ")}}`,
    "",
  ].join("\n");
}
export async function copyPython(): Promise<void> {
  const code = pythonCode();
  try {
    await navigator.clipboard.writeText(code);
    state.announcement.value = "Python copied";
  } catch {
    save(`${fileName()}.py`, code); // the clipboard is not open to files everywhere
    state.announcement.value = "The clipboard is closed to this page: Python saved as a file";
  }
}

/** One line a labelled node, in the format that `graphs/annotations.py` reads. */
export function annotationLines(): string {
  const lines = new Map<string, string>();
  for (const node of nodes) {
    if (node.kind === "metric" || !labelOf(node)) continue;
    const [component, layer] = node.site.split("_");
    const place = {
      Component: component,
      Layer: layer === undefined ? null : Number(layer),
      Feature: node.feature ?? node.kind,
    };
    lines.set(node.name, JSON.stringify({ ...place, Name: node.name, Annotation: labelOf(node), Notes: "" }));
  }
  return [...lines.values(), ""].join("\n");
}
export const saveLabels = () => save(`${fileName()}-labels.jsonl`, annotationLines(), "application/jsonl");
export const saveGroups = () =>
  save(
    `${fileName()}-groups.json`,
    JSON.stringify({ schema_version: 1, groups: state.groups.value }, null, 1),
    "application/json",
  );

export async function loadGroups(file: File): Promise<void> {
  try {
    const groups = state.asGroups(JSON.parse(await file.text())?.groups);
    if (!groups) throw new Error();
    state.groups.value = groups;
    state.commit();
    state.announcement.value = `${groups.length} supernodes loaded`;
  } catch {
    state.announcement.value = `${file.name} holds no supernodes`;
  }
}
