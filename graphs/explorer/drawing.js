// The drawing: colours, text, nodes, edges. Values are attributes, not classes, so that a saved
// SVG looks the same outside the page.

const svg = document.getElementById("drawing");
const SVG_NAMESPACE = "http://www.w3.org/2000/svg";
const FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif";
const GUTTER = 70;
const darkScheme = matchMedia("(prefers-color-scheme: dark)");

const THEMES = {
  light: {
    page: "#ffffff",
    band: "#f4f5f8",
    ink: "#1d2430",
    pale: "#697280",
    rule: "#dde2e9",
    metric: "#1d2430",
    onMetric: "#ffffff",
    diverging: circuit.colours.diverging,
    negative: circuit.colours.negative,
    positive: circuit.colours.positive,
    accent: "#7a3cc2",
  },
  dark: {
    page: "#12161d",
    band: "#181d26",
    ink: "#e6eaf0",
    pale: "#98a3b3",
    rule: "#2b3340",
    metric: "#e6eaf0",
    onMetric: "#12161d",
    diverging: ["#f2953b", "#c26a17", "#6b4524", "#2a313c", "#27476b", "#2f76bb", "#5cb0f5"],
    negative: "#e88b34",
    positive: "#57a5ea",
    accent: "#c79bff",
  },
};
let theme = THEMES.light;
let scene = null; // what is on the page: {layout, nodes, edges, elements: Map(node -> <g>)}

// --- colours ----------------------------------------------------------------------------------------------------------

const channels = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
const signedRoot = (value, largest) =>
  largest > 0 ? Math.sign(value) * Math.sqrt(Math.min(Math.abs(value) / largest, 1)) : 0;

function effectColour(value) {
  const stops = theme.diverging;
  const place = ((signedRoot(value, largestEffect) + 1) / 2) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  const [a, b] = [channels(stops[low]), channels(stops[low + 1])];
  return (
    "#" +
    a
      .map((c, i) =>
        Math.round(c + (b[i] - c) * (place - low))
          .toString(16)
          .padStart(2, "0"),
      )
      .join("")
  );
}

function inkOn(colour) {
  const linear = channels(colour).map((c) =>
    c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4,
  );
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.22 ? "#12161d" : "#ffffff";
}

const edgeColour = (edge) => (edge.weight < 0 ? theme.negative : theme.positive);
const intervalLine = ({ interval }) => (interval ? `\ninterval ${number(interval[0])} to ${number(interval[1])}` : "");
const edgeWidth = (edge) => 0.6 + 3.4 * Math.abs(edge.weight / (largestWeight || 1));

function edgeOpacity(edge, count) {
  const strength = Math.abs(signedRoot(edge.weight, largestWeight));
  const crowd = Math.min(1, Math.sqrt(160 / Math.max(1, count)));
  return clamp((0.15 + 0.77 * strength ** 1.5) * (crowd + (1 - crowd) * strength), 0.07, 0.92);
}

// --- text that fits ---------------------------------------------------------------------------------------------------

const ruler = document.createElement("canvas").getContext("2d");

function textWidth(text, size, bold) {
  ruler.font = `${bold ? 600 : 400} ${size}px ${FONT}`;
  return ruler.measureText(text).width;
}

function fitText(text, size, width, bold) {
  if (textWidth(text, size, bold) <= width) return text;
  let [low, high] = [0, text.length];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (textWidth(text.slice(0, middle) + "…", size, bold) <= width) low = middle;
    else high = middle - 1;
  }
  return text.slice(0, low).trimEnd() + "…";
}

function wrapText(text, size, width, lines, bold) {
  const words = text.split(/\s+/).filter(Boolean);
  const found = [];
  while (words.length && found.length < lines - 1) {
    let line = words.shift();
    while (words.length && textWidth(`${line} ${words[0]}`, size, bold) <= width) line += ` ${words.shift()}`;
    found.push(fitText(line, size, width, bold));
  }
  return words.length ? [...found, fitText(words.join(" "), size, width, bold)] : found;
}

// --- elements ---------------------------------------------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG_NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const textElement = (text, x, y, size, fill, extra = {}) =>
  element(
    "text",
    { x: x.toFixed(1), y: y.toFixed(1), "font-size": size, fill, "text-anchor": "middle", ...extra },
    text,
  );

/** Bold text that stays readable over lines. */
const halo = (colour, width) => ({
  "font-weight": 600,
  stroke: colour,
  "stroke-width": width,
  "paint-order": "stroke",
  "stroke-linejoin": "round",
});

/** Draw what the filters let through. */
function draw() {
  theme = darkScheme.matches ? THEMES.dark : THEMES.light;
  const shown = visibleGraph();
  const frame = { width: Math.max(svg.clientWidth - GUTTER - 24, 200), height: Math.max(svg.clientHeight, 200) };
  const layout = layoutCircuit(shown.nodes, shown.edges, frame);
  scene = { layout, ...shown, elements: new Map() };
  svg.replaceChildren(
    element("title", {}, circuit.title),
    drawBands(layout),
    drawColumns(layout),
    drawEdges(layout, shown.edges),
    element("g", { id: "highlight", fill: "none" }),
    drawNodes(layout, shown.nodes),
    drawGutter(layout),
    drawHeader(layout),
  );
  svg.setAttribute("font-family", FONT);
  return scene;
}

const bounds = ({ width, top, columns }) => {
  const head = columns.length ? 46 : 18;
  return { x: -GUTTER - 8, y: top - head, width: width + GUTTER + 24, height: -top + head + 24 };
};

function drawBands({ bands, width }) {
  const left = -GUTTER - 2000;
  return element(
    "g",
    { class: "bands" },
    ...bands.map((band) =>
      element("rect", {
        x: left,
        y: band.top,
        width: width + 4000 - left,
        height: band.bottom - band.top,
        fill: theme.band,
      }),
    ),
  );
}

function drawColumns({ columns, bands }) {
  const group = element("g", { class: "columns" });
  if (!bands.length) return group;
  for (const { left } of columns.slice(1)) {
    group.append(
      element("line", { x1: left, x2: left, y1: bands[0].bottom, y2: bands.at(-1).top, stroke: theme.rule }),
    );
  }
  return group;
}

/** Site names; they stay at the left of the window. */
function drawGutter({ bands }) {
  return element(
    "g",
    { id: "gutter" },
    ...bands.map((band) => {
      const y = (band.top + band.bottom) / 2;
      return textElement(band.site, -GUTTER / 2 - 6, y + 3.5, 10.5, theme.pale, {
        ...halo(theme.band, 4),
      });
    }),
  );
}

/** Tokens over their columns; they follow when the drawing is moved up and down. */
function drawHeader({ columns, top }) {
  return element(
    "g",
    { id: "header" },
    ...columns.map((column) => {
      const name = column.position === null ? "all positions" : positionNames.get(column.position);
      const fitted = fitText(name, 13, column.right - column.left - 6, true);
      return textElement(fitted, (column.left + column.right) / 2, top - 24, 13, theme.ink, {
        ...halo(theme.page, 6),
      });
    }),
  );
}

function drawEdges({ routes }, shownEdges) {
  const group = element("g", { id: "edges", fill: "none" });
  [...shownEdges].reverse().forEach((edge, place) => {
    const path = element(
      "path",
      {
        d: routes.get(edge).path,
        stroke: edgeColour(edge),
        "stroke-width": edgeWidth(edge).toFixed(2),
        "stroke-opacity": edgeOpacity(edge, shownEdges.length).toFixed(3),
        class: "edge",
      },
      element("title", {}, `${edge.source.id} → ${edge.target.id}\nweight ${number(edge.weight)}${intervalLine(edge)}`),
    );
    group.append(path);
    if (shownEdges.length - place <= 300)
      group.append(arrowHead(edge, routes.get(edge).end, edgeOpacity(edge, shownEdges.length)));
  });
  return group;
}

function arrowHead(edge, [x, y], opacity) {
  const size = 2.2 + edgeWidth(edge) * 1.1;
  return element("path", {
    d: `M${x.toFixed(1)},${y.toFixed(1)}l${-size * 0.55},${size * 1.5}h${size * 1.1}z`,
    fill: edgeColour(edge),
    "fill-opacity": opacity.toFixed(3),
  });
}

function drawNodes(layout, shownNodes) {
  const labelled = new Set(strongestNodes.filter((node) => layout.boxes.has(node)).slice(0, layout.density.labelled));
  const group = element("g", { id: "nodes" });
  const order = [...shownNodes].sort((a, b) => rankOf(a) - rankOf(b) || layout.boxes.get(a).x - layout.boxes.get(b).x);
  for (const node of order) {
    const drawn = drawNode(node, layout.boxes.get(node), layout.density, labelled.has(node));
    scene.elements.set(node, drawn);
    group.append(drawn);
  }
  return group;
}

function drawNode(node, box, density, labelled) {
  const { x, y, width, height } = box;
  const metric = node.kind === "metric";
  const fill = metric ? theme.metric : effectColour(node.effect);
  const border = metric
    ? theme.metric
    : effectColour(Math.sign(node.effect) * Math.max(4 * Math.abs(node.effect), 0.1 * largestEffect));
  const ink = metric ? theme.onMetric : inkOn(fill);
  const shape =
    node.kind === "error"
      ? element("polygon", {
          points: `${x},${y - height / 2} ${x - height * 0.9},${y + height / 2} ${x + height * 0.9},${y + height / 2}`,
        })
      : element("rect", { x: x - width / 2, y: y - height / 2, width, height, rx: Math.min(9, height / 3) });
  for (const [key, value] of Object.entries({ fill, stroke: border, class: "shape" })) shape.setAttribute(key, value);
  const name = [describe(node), nodeTitle(node), effectWords(node)].filter(Boolean).join(", ");
  return element(
    "g",
    {
      class: "node",
      id: `node-${node.id}`,
      tabindex: 0,
      role: "button",
      "aria-label": name,
      "data-index": node.index,
    },
    element("title", {}, [nodeTitle(node), describe(node), effectWords(node)].filter(Boolean).join("\n")),
    shape,
    ...nodeText(node, box, density, labelled, ink),
  );
}

function nodeText(node, box, density, labelled, ink) {
  const room = box.width - 10;
  const exact = node.attributes?.exact_effect;
  const effect = number(node.effect) + (typeof exact === "number" ? ` ✓${number(exact)}` : "");
  if (node.kind === "error") {
    return [
      textElement("error", box.x, box.y + box.height * 0.2, density.small - 1, ink),
      textElement(effect, box.x, box.y + box.height * 0.2 + density.small - 0.5, density.small - 1, ink),
    ];
  }
  const metric = node.kind === "metric";
  const bold = metric || Boolean(labelOf(node));
  const lines =
    metric || labelled ? wrapText(describe(node), density.label, room, metric ? 2 : density.lines, bold) : [];
  const joined = metric
    ? effectWords(node)
    : [effect, number(node.effect)]
        .map((words) => `${node.name}  ${words}`)
        .find((words, last) => last || textWidth(words, density.small, false) <= room);
  const fits = textWidth(joined, density.small, false) <= room;
  const small = fits ? [joined] : [fitText(node.name, density.small, room, false), ...(lines.length ? [] : [effect])];
  const height = lines.length * density.label * 1.18 + small.length * density.small * 1.25;
  let y = box.y - height / 2;
  const texts = lines.map((line) => {
    y += density.label * 1.18;
    return textElement(line, box.x, y - density.label * 0.27, density.label, ink, bold ? { "font-weight": 600 } : {});
  });
  return [
    ...texts,
    ...small.map((line) => {
      y += density.small * 1.25;
      return textElement(line, box.x, y - density.small * 0.3, density.small, ink, { "fill-opacity": 0.85 });
    }),
  ];
}
