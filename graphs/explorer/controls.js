// Sliders, search, keyboard, pointer, saving. The last script: it starts the page.

const byId = (id) => document.getElementById(id);

/** Draw again after a filter has changed; `keepView` leaves zoom and place as they are. */
function redraw({ keepView = false } = {}) {
  const focused = document.activeElement?.closest?.(".node")?.dataset.index;
  draw();
  if (keepView && view) setView(view);
  else fitView();
  highlight();
  if (focused !== undefined) scene.elements.get(nodes[focused])?.focus({ preventScroll: true });
  describeFilters();
}

let waiting = 0;
function redrawSoon(options) {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => redraw(options));
}

const redrawLabels = () => redrawSoon({ keepView: true });

function describeFilters() {
  const features = scene.nodes.filter((node) => node.kind !== "metric").length;
  byId("nodes-shown").textContent = `${features} of ${strongestNodes.length}`;
  byId("edges-shown").textContent =
    `${scene.edges.length} of ${edges.length}${chosen.edgeCount ? ` · |w| ≥ ${plainNumber(edgeThreshold())}` : ""}`;
  byId("status").textContent = `${features} nodes and ${scene.edges.length} edges shown`;
}

// The edge slider is logarithmic in the number of edges: the few strongest deserve as much room as the many weak.
const edgesAt = (place) => Math.round(Math.expm1((place / 1000) * Math.log1p(edges.length)));
const placeOf = (count) => Math.round((1000 * Math.log1p(count)) / Math.log1p(Math.max(1, edges.length)));

function pin(node, { focus = false } = {}) {
  const hidden = node && !scene.elements.has(node);
  const left = chosen.pinned && strongestNodes.indexOf(chosen.pinned) >= chosen.nodeCount;
  chosen.pinned = node;
  chosen.hovered = chosen.hoveredEdge = null;
  showPanel();
  document.body.classList.toggle("open", Boolean(node));
  if (hidden || left) redraw({ keepView: true });
  else highlight();
  if (!node) return;
  reveal(node);
  if (focus) scene.elements.get(node)?.focus({ preventScroll: true });
  history.replaceState(null, "", `#node-${encodeURIComponent(node.id)}`);
}

function setUpFilters() {
  const count = byId("nodes");
  count.max = strongestNodes.length;
  count.value = chosen.nodeCount;
  count.addEventListener("input", () => {
    chosen.nodeCount = Number(count.value);
    redrawSoon();
  });
  const weight = byId("edges");
  weight.value = placeOf(chosen.edgeCount);
  weight.disabled = edges.length === 0;
  weight.addEventListener("input", () => {
    chosen.edgeCount = edgesAt(Number(weight.value));
    redrawSoon({ keepView: true });
  });
  for (const [id, name] of [
    ["errors", "errors"],
    ["connected", "connected"],
    ["paths", "wholePaths"],
  ]) {
    byId(id).checked = chosen[name];
    byId(id).addEventListener("change", (event) => {
      chosen[name] = event.target.checked;
      redrawSoon();
    });
  }
}

function setUpSearch() {
  const search = byId("search");
  const found = () =>
    scene.nodes
      .filter((node) => chosen.query && matches(node, chosen.query))
      .sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect));
  search.addEventListener("input", () => {
    chosen.query = search.value.trim().toLowerCase();
    byId("found").textContent = chosen.query ? String(found().length) : "";
    highlight();
  });
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !found().length) return;
    const list = found();
    pin(list[(list.indexOf(chosen.pinned) + 1) % list.length]);
  });
}

// --- pointer ----------------------------------------------------------------------------------------------------------

const nodeOf = (target) => {
  const drawn = target.closest?.(".node");
  return drawn ? nodes[drawn.dataset.index] : null;
};

function setUpPointer() {
  let drag = null;
  svg.addEventListener("pointerover", (event) => {
    const node = nodeOf(event.target);
    if (drag || node === chosen.hovered) return;
    chosen.hovered = node;
    highlight();
  });
  svg.addEventListener("pointerleave", () => {
    chosen.hovered = null;
    highlight();
  });
  svg.addEventListener("pointerdown", (event) => {
    if (event.button === 0)
      drag = { x: event.clientX, y: event.clientY, view, node: nodeOf(event.target), moved: false };
  });
  addEventListener("pointermove", (event) => {
    if (!drag) return;
    const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
    drag.moved ||= Math.hypot(dx, dy) > 4;
    if (!drag.moved) return;
    svg.classList.add("dragging");
    const scale = drag.view.width / svg.clientWidth;
    setView({ ...drag.view, x: drag.view.x - dx * scale, y: drag.view.y - dy * scale });
  });
  addEventListener("pointerup", () => {
    if (drag && !drag.moved && (drag.node || chosen.pinned)) pin(drag.node === chosen.pinned ? null : drag.node);
    drag = null;
    svg.classList.remove("dragging");
  });
  svg.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), event.clientX, event.clientY);
    },
    { passive: false },
  );
}

// --- keyboard ---------------------------------------------------------------------------------------------------------

const DIRECTIONS = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };

/** The nearest node in a direction; sideways distance counts double. */
function neighbourIn(node, [dx, dy]) {
  const from = scene.layout.boxes.get(node);
  let best = null;
  for (const [other, box] of scene.layout.boxes) {
    const ahead = (box.x - from.x) * dx + (box.y - from.y) * dy;
    const aside = Math.abs((box.x - from.x) * dy) + Math.abs((box.y - from.y) * dx);
    if (ahead > 1 && (dx === 0 || aside < 1) && (!best || ahead + 2 * aside < best.distance))
      best = { other, distance: ahead + 2 * aside };
  }
  return best?.other;
}

function setUpKeyboard() {
  svg.addEventListener("focusin", (event) => {
    chosen.hovered = nodeOf(event.target);
    if (chosen.hovered) reveal(chosen.hovered);
    highlight();
  });
  svg.addEventListener("focusout", () => {
    chosen.hovered = null;
    highlight();
  });
  addEventListener("keydown", (event) => {
    const typing = event.target.matches?.("input[type=text], input[type=search]");
    if (event.key === "Escape") {
      if (event.target.id === "search") event.target.blur();
      pin(null);
      history.replaceState(null, "", location.pathname + location.search);
      return;
    }
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const node = nodeOf(event.target);
    if (node && DIRECTIONS[event.key])
      scene.elements.get(neighbourIn(node, DIRECTIONS[event.key]))?.focus({ preventScroll: true });
    else if (node && (event.key === "Enter" || event.key === " ")) pin(node === chosen.pinned ? null : node);
    else if (event.key === "/") byId("search").focus();
    else if (event.key === "+" || event.key === "=") zoom(1.25);
    else if (event.key === "-") zoom(0.8);
    else if (event.key === "0") fitView();
    else return;
    event.preventDefault();
  });
}

// --- saving -----------------------------------------------------------------------------------------------------------

function save(name, text, type) {
  const link = html("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const fileName =
  circuit.title
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 60) || "circuit";

/** The current view as a file of its own: faded parts stay faded, nothing refers to the page. */
function currentSvg() {
  const copy = svg.cloneNode(true);
  copy.setAttribute("xmlns", SVG_NAMESPACE);
  copy.setAttribute("width", svg.clientWidth);
  copy.setAttribute("height", svg.clientHeight);
  const { x, y, width, height } = view;
  copy.prepend(element("rect", { x, y, width, height, fill: theme.page }));
  if (svg.classList.contains("focused")) copy.querySelector("#edges").setAttribute("opacity", 0.12);
  for (const faded of copy.querySelectorAll(".faded")) faded.setAttribute("opacity", 0.3);
  for (const found of copy.querySelectorAll(".pinned .shape, .found .shape")) {
    found.setAttribute("stroke", theme.accent);
    found.setAttribute("stroke-width", 2.5);
  }
  return new XMLSerializer().serializeToString(copy);
}

function setUpSaving() {
  byId("fit").addEventListener("click", fitView);
  byId("save-svg").addEventListener("click", () => save(`${fileName}.svg`, currentSvg(), "image/svg+xml"));
  byId("save-labels").addEventListener("click", () =>
    save(`${fileName}-labels.jsonl`, annotationLines(), "application/jsonl"),
  );
}

function drawLegend() {
  const swatches = theme.diverging.map((colour) => html("i", { style: `background:${colour}` }));
  byId("legend").replaceChildren(
    html("span", {}, `lowers the metric ${number(-largestEffect)}`),
    html("span", { class: "scale" }, ...swatches),
    html("span", {}, `${number(largestEffect)} raises it`),
    html("span", {}, html("b", { class: "triangle" }, "▲"), " SAE error"),
    ...(nodes.some((node) => typeof node.attributes?.exact_effect === "number")
      ? [html("span", {}, "✓ measured by patching it alone")]
      : []),
    html(
      "span",
      {},
      html("b", { style: `color:${theme.negative}` }, "━"),
      html("b", { style: `color:${theme.positive}` }, "━"),
      ` edge, widest ${plainNumber(largestWeight)}`,
    ),
  );
}

function start() {
  setUpFilters();
  redraw();
  showPanel();
  drawLegend();
  setUpSearch();
  setUpPointer();
  setUpKeyboard();
  setUpSaving();
  darkScheme.addEventListener("change", () => {
    redraw({ keepView: true });
    drawLegend();
  });
  new ResizeObserver(() => redrawSoon()).observe(byId("stage"));
  const wanted = decodeURIComponent(location.hash.slice(1));
  const node = nodes.find((candidate) => `node-${candidate.id}` === wanted);
  if (node) pin(node);
}

start();
