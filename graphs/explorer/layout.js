// The layered layout of graphs/layout.py: first site at the bottom, metric on top, y downwards as SVG has it.

/** Sizes for a number of nodes: room for a node, box, lines of label, fonts, and how many nodes keep their label. */
const DENSITIES = [
  { upTo: 14, cell: 172, box: 154, height: 52, gap: 26, lines: 2, label: 12.5, small: 10, space: 36, labelled: 14 },
  { upTo: 48, cell: 144, box: 128, height: 48, gap: 24, lines: 2, label: 11, small: 9, space: 30, labelled: 48 },
  { upTo: 130, cell: 116, box: 102, height: 33, gap: 20, lines: 1, label: 9.5, small: 8, space: 26, labelled: 130 },
  { upTo: Infinity, cell: 98, box: 86, height: 27, gap: 16, lines: 1, label: 8.5, small: 7, space: 22, labelled: 150 },
];
const PADDING = 8;
const TIGHTNESS = [1, 0.7, 0.45]; // of the space between rows
const READABLE = 9; // height of a label in pixels when the drawing fits the window

/** The layout for a window: the loosest in which labels can be read, failing that the one with the largest labels. */
function layoutCircuit(shownNodes, shownEdges, frame) {
  const others = shownNodes.filter((node) => node.kind !== "metric");
  const natural = DENSITIES.findIndex((density) => others.length <= density.upTo);
  const plans = [];
  for (const density of DENSITIES.slice(natural, Math.max(natural + 1, 3))) {
    for (const tightness of TIGHTNESS) {
      const [space, gap] = [density.space * tightness, density.gap * Math.max(tightness, 0.6)];
      plans.push(planRows(others, { ...density, space, gap, padding: PADDING * tightness }, frame));
      if (plans.at(-1).pixels >= READABLE) return layoutRows(shownNodes, shownEdges, plans.at(-1));
    }
  }
  return layoutRows(
    shownNodes,
    shownEdges,
    plans.reduce((best, plan) => (plan.pixels > best.pixels ? plan : best)),
  );
}

/** Rows of these sizes, widened where the window has room at the sides, and how large a label then is in pixels. */
function planRows(others, density, frame) {
  const aspect = clamp(frame.width / frame.height, 0.7, 2.6);
  const rows = wrapRows(others, density, aspect);
  const spare = (aspect * rows.height) / rows.width;
  const cell = density.cell * clamp(spare, 1, 1.75);
  const box = Math.min(cell - density.cell + density.box, density.box * 1.4);
  const widened = { ...density, cell, box };
  const plan = spare < 1.08 ? rows : wrapRows(others, widened, aspect);
  const scale = Math.max(plan.width / frame.width, plan.height / frame.height);
  return { ...plan, density: widened, pixels: density.label / scale };
}

function layoutRows(shownNodes, shownEdges, { rows, columns, width, density }) {
  const boxes = new Map();
  const bands = [];
  let y = 0;
  for (const { site, lines } of rows) {
    const bottom = y;
    y -= density.padding;
    for (const line of lines) {
      for (const [node, x] of line)
        boxes.set(node, { x, y: y - density.height / 2, width: density.box, height: density.height });
      y -= density.height + density.gap;
    }
    y += density.gap - density.padding;
    bands.push({ site, bottom, top: y });
    y -= density.space;
  }
  orderNodes(boxes, shownEdges, columns);
  let top = bands.length ? bands.at(-1).top : 0;
  const metric = shownNodes.find((node) => node.kind === "metric");
  const size = metricSize(density);
  if (metric) {
    const into = shownEdges
      .filter((edge) => edge.target === metric)
      .map((edge) => [edge.source, Math.abs(edge.weight)]);
    const x = clamp(meanX(into, boxes, width / 2), size.width / 2, Math.max(width - size.width / 2, size.width / 2));
    boxes.set(metric, { x, y: top - density.space * 1.3 - size.height / 2, ...size });
    top = boxes.get(metric).y - size.height / 2;
  }
  return {
    density,
    boxes,
    bands,
    columns,
    routes: routeEdges(shownEdges, boxes),
    width: Math.max(width, size.width),
    top,
  };
}

const metricSize = ({ box, label, small }) => ({ width: box * 1.7, height: 2.6 * label + 1.4 * small + 12 });
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

// --- rows, sub-rows, columns ------------------------------------------------------------------------------------------

function wrapRows(others, density, aspect) {
  const bySite = new Map(circuit.sites.map((site) => [site, new Map()]));
  for (const node of others) {
    const cells = bySite.get(node.site);
    if (!cells.has(node.position)) cells.set(node.position, []);
    cells.get(node.position).push(node);
  }
  const occupied = [...bySite].filter(([, cells]) => cells.size);
  const present = new Set(others.map((node) => node.position));
  const positions = [
    ...(present.has(null) ? [null] : []),
    ...circuit.positions.map(([p]) => p).filter((p) => present.has(p)),
  ];
  let best = null;
  for (let limit = 1; limit <= 40; limit++) {
    const candidate = wrapAt(occupied, positions, density, limit);
    const lines = candidate.rows.reduce((sum, row) => sum + row.lines.length, 0);
    const between = density.space + 2 * density.padding - density.gap;
    candidate.height = candidate.rows.length * between + lines * (density.height + density.gap);
    candidate.height += density.space * 1.3 + metricSize(density).height + (positions.length > 1 ? 70 : 42);
    candidate.distance = Math.abs(Math.log(Math.max(candidate.width, 1) / candidate.height / aspect));
    if (!best || candidate.distance < best.distance) best = candidate;
  }
  if (!positions.some((position) => position !== null)) best.columns = [];
  return best;
}

function wrapAt(occupied, positions, density, limit) {
  const fullest = positions.map((p) => Math.max(...occupied.map(([, cells]) => cells.get(p)?.length ?? 0)));
  const total = fullest.reduce((a, b) => a + b, 0);
  const share = new Map(
    positions.map((p, i) => [p, Math.max(1, Math.min(fullest[i], Math.round((limit * fullest[i]) / total)))]),
  );
  const margin = positions.length > 1 ? density.cell * 0.12 : 0;
  const columns = [];
  let left = 0;
  for (const position of positions) {
    columns.push({ position, left, right: left + share.get(position) * density.cell + 2 * margin });
    left = columns.at(-1).right;
  }
  const rows = occupied.map(([site, cells]) => {
    const needed = (p) => Math.ceil((cells.get(p)?.length ?? 0) / share.get(p));
    const lines = Array.from({ length: Math.max(...positions.map(needed)) }, () => []);
    for (const { position, left: start, right } of columns) {
      const count = needed(position);
      const first = Math.floor((lines.length - count) / 2);
      for (let row = 0; row < count; row++) {
        const part = cells.get(position).filter((_, i) => i % count === row);
        const x0 = (start + right - (part.length - 1) * density.cell) / 2;
        part.forEach((node, i) => lines[first + row].push([node, x0 + i * density.cell]));
      }
    }
    return { site, lines };
  });
  return { rows, columns, width: left };
}

// --- order within rows ------------------------------------------------------------------------------------------------

function orderNodes(boxes, shownEdges, columns) {
  const near = new Map([...boxes.keys()].map((node) => [node, []]));
  for (const { source, target, weight } of shownEdges) {
    if (!near.has(source) || !near.has(target)) continue;
    near.get(source).push([target, Math.abs(weight)]);
    near.get(target).push([source, Math.abs(weight)]);
  }
  const groups = new Map();
  for (const node of boxes.keys()) {
    const key = JSON.stringify([node.site, node.position]);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(node);
  }
  const order = [...groups.values()].sort((a, b) => rankOf(a[0]) - rankOf(b[0]));
  for (let sweep = 0; sweep < 8; sweep++) {
    for (const members of sweep % 2 ? [...order].reverse() : order) {
      const slots = members.map((node) => boxes.get(node)).sort((a, b) => a.x - b.x || b.y - a.y);
      const wanted = new Map(members.map((node) => [node, meanX(near.get(node), boxes, boxes.get(node).x)]));
      const sorted = [...members].sort((a, b) => wanted.get(a) - wanted.get(b) || a.index - b.index);
      sorted.forEach((node, i) => boxes.set(node, slots[i]));
    }
  }
  if (!columns.length) spreadRows(boxes, near);
}

function meanX(neighbours, boxes, otherwise) {
  const total = neighbours.reduce((sum, [, weight]) => sum + weight, 0);
  return total ? neighbours.reduce((sum, [node, weight]) => sum + weight * boxes.get(node).x, 0) / total : otherwise;
}

/** Rows with room: nodes move towards their neighbours but keep their order and distance. */
function spreadRows(boxes, near) {
  const rows = groupByRow(boxes);
  const home = new Map([...boxes].map(([node, box]) => [node, box.x]));
  const widest = Math.max(0, ...[...rows.values()].map((row) => row.length));
  const left = Math.min(...home.values());
  const right = Math.max(...home.values());
  const step = widest > 1 ? (right - left) / (widest - 1) : 0;
  for (let sweep = 0; sweep < 4; sweep++) {
    for (const y of [...rows.keys()].sort((a, b) => b - a)) {
      const row = rows.get(y).sort((a, b) => boxes.get(a).x - boxes.get(b).x);
      const wanted = row.map((node) => (meanX(near.get(node), boxes, boxes.get(node).x) + home.get(node)) / 2);
      keepApart(wanted, step, left, right).forEach((x, i) => boxes.set(row[i], { ...boxes.get(row[i]), x }));
    }
  }
}

function groupByRow(boxes) {
  const rows = new Map();
  for (const [node, box] of boxes) rows.set(box.y, [...(rows.get(box.y) ?? []), node]);
  return rows;
}

/** Least-squares places that keep order and distance: isotonic regression by pooling adjacent violators. */
function keepApart(wanted, step, low, high) {
  const pools = [];
  wanted.forEach((x, place) => {
    let pool = { mean: x - place * step, size: 1 };
    while (pools.length && pools.at(-1).mean > pool.mean) {
      const other = pools.pop();
      const size = pool.size + other.size;
      pool = { mean: (pool.mean * pool.size + other.mean * other.size) / size, size };
    }
    pools.push(pool);
  });
  const room = Math.max(high - (wanted.length - 1) * step, low);
  return pools
    .flatMap(({ mean, size }) => Array(size).fill(mean))
    .map((x, place) => clamp(x, low, room) + place * step);
}

// --- edges ------------------------------------------------------------------------------------------------------------

/** An SVG path for every edge, through the gaps of the rows it crosses. */
function routeEdges(shownEdges, boxes) {
  const rows = obstacleRows(boxes);
  const start = ports(shownEdges, boxes, "source", "target");
  const end = ports(shownEdges, boxes, "target", "source");
  const routes = new Map();
  for (const edge of shownEdges) {
    const from = boxes.get(edge.source);
    const to = boxes.get(edge.target);
    const first = [start.get(edge), from.y - from.height / 2];
    const last = [end.get(edge), to.y + to.height / 2];
    routes.set(edge, { path: splinePath([first, ...crossings(rows, first, last), last]), end: last });
  }
  return routes;
}

function ports(shownEdges, boxes, side, opposite) {
  const groups = new Map();
  for (const edge of shownEdges) {
    if (!groups.has(edge[side])) groups.set(edge[side], []);
    groups.get(edge[side]).push(edge);
  }
  const places = new Map();
  for (const [node, group] of groups) {
    const box = boxes.get(node);
    const pointed = node.kind === "error" && side === "source";
    const room = pointed ? 0 : box.width * Math.min(0.7, 0.12 * (group.length - 1));
    group.sort((a, b) => boxes.get(a[opposite]).x - boxes.get(b[opposite]).x);
    group.forEach((edge, i) => places.set(edge, box.x + (group.length > 1 ? i / (group.length - 1) - 0.5 : 0) * room));
  }
  return places;
}

function obstacleRows(boxes) {
  const rows = new Map();
  for (const box of boxes.values()) {
    if (!rows.has(box.y)) rows.set(box.y, { y: box.y, half: box.height / 2, spans: [], used: [] });
    rows.get(box.y).spans.push([box.x - box.width / 2, box.x + box.width / 2]);
  }
  for (const row of rows.values()) row.spans.sort((a, b) => a[0] - b[0]);
  return [...rows.values()].sort((a, b) => b.y - a.y);
}

/** Points at the rows between two ends: one where the way is free, two along a box it must go round. */
function crossings(rows, first, last) {
  const points = [];
  let [x, y] = first;
  for (const row of rows) {
    if (row.y >= first[1] || row.y <= last[1]) continue;
    const straight = x + ((last[0] - x) * (row.y - y)) / (last[1] - y);
    x = freePlace(row, straight);
    y = row.y;
    if (x === straight) points.push([x, y]);
    else points.push([x, y + row.half], [x, y - row.half]);
  }
  return points;
}

function freePlace(row, x) {
  let place = row.spans.findIndex(([left]) => left > x);
  if (place < 0) place = row.spans.length;
  let best = null;
  for (const gap of [place - 1, place, place + 1]) {
    if (gap < 0 || gap > row.spans.length) continue;
    const left = gap > 0 ? row.spans[gap - 1][1] : -Infinity;
    const right = gap < row.spans.length ? row.spans[gap][0] : Infinity;
    const margin = 3.5 + 2.5 * ((row.used[gap] ?? 0) % 3);
    const inside = right - left > 2 * margin ? clamp(x, left + margin, right - margin) : (left + right) / 2;
    if (!best || Math.abs(inside - x) < Math.abs(best.inside - x)) best = { inside, gap };
  }
  if (best.inside !== x) row.used[best.gap] = (row.used[best.gap] ?? 0) + 1;
  return best.inside;
}

function splinePath(points) {
  const slope = (i) => {
    if (i === 0 || i === points.length - 1) return 0;
    const [[x0, y0], [x], [x1, y1]] = [points[i - 1], points[i], points[i + 1]];
    return x === x0 || x === x1 ? 0 : (x1 - x0) / (y1 - y0);
  };
  const text = ([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`;
  let path = `M${text(points[0])}`;
  for (let i = 0; i + 1 < points.length; i++) {
    const [[x0, y0], [x1, y1]] = [points[i], points[i + 1]];
    const third = (y1 - y0) / (points.length === 2 ? 2.2 : 3);
    path += `C${text([x0 + slope(i) * third, y0 + third])} ${text([x1 - slope(i + 1) * third, y1 - third])} ${text([x1, y1])}`;
  }
  return path;
}
