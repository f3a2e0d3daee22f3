// What stands out and what is in the window: highlighting, zoom and pan.

let view = null; // viewBox: {x, y, width, height}

// --- highlighting -----------------------------------------------------------------------------------------------------

/** Bring out the hovered or pinned node with its edges, the searched nodes, or a single edge of the panel. */
function highlight() {
  const focus = chosen.hovered ?? chosen.pinned;
  const lit = new Set();
  const layer = document.getElementById("highlight");
  layer.replaceChildren();
  const around = chosen.hoveredEdge
    ? scene.edges.filter((edge) => edge === chosen.hoveredEdge)
    : focus && scene.elements.has(focus)
      ? edgesAround(focus, scene.edges, chosen.wholePaths)
      : [];
  for (const edge of [...around].sort(bySize).reverse()) {
    const strength = Math.abs(signedRoot(edge.weight, largestWeight));
    const route = scene.layout.routes.get(edge);
    const width = Math.max(1.1, edgeWidth(edge) * 1.25).toFixed(2);
    layer.append(
      element("path", {
        d: route.path,
        stroke: edgeColour(edge),
        "stroke-width": width,
        "stroke-opacity": (0.45 + 0.5 * strength).toFixed(2),
      }),
    );
    layer.append(arrowHead(edge, route.end, 0.45 + 0.5 * strength));
    lit.add(edge.source).add(edge.target);
  }
  if (focus) lit.add(focus);
  const searching = chosen.query !== "";
  svg.classList.toggle("focused", Boolean(focus) || Boolean(chosen.hoveredEdge));
  svg.classList.toggle("searching", searching && !focus);
  for (const [node, drawn] of scene.elements) {
    const found = searching && matches(node, chosen.query);
    drawn.classList.toggle("faded", focus || chosen.hoveredEdge ? !lit.has(node) : searching && !found);
    drawn.classList.toggle("found", found);
    drawn.classList.toggle("pinned", node === chosen.pinned);
    drawn.setAttribute("aria-pressed", node === chosen.pinned);
  }
  svg.style.setProperty("--accent", theme.accent);
}

// --- zoom and pan -----------------------------------------------------------------------------------------------------

function fitView() {
  const all = bounds(scene.layout);
  const scale = Math.max(all.width / svg.clientWidth, all.height / svg.clientHeight, 0.55);
  const width = svg.clientWidth * scale;
  const height = svg.clientHeight * scale;
  setView({ x: all.x - (width - all.width) / 2, y: all.y - (height - all.height) / 2, width, height });
}

function setView(next) {
  view = next;
  svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.width} ${view.height}`);
  const all = bounds(scene.layout);
  const down = Math.max(0, view.y - all.y);
  const scale = clamp(view.width / svg.clientWidth, 1, 1.5); // names stay readable in a small drawing
  for (const text of svg.querySelectorAll("#gutter text")) text.setAttribute("font-size", (10.5 * scale).toFixed(1));
  document.getElementById("gutter").setAttribute("transform", `translate(${(view.x + GUTTER).toFixed(1)} 0)`);
  document.getElementById("header").setAttribute("transform", `translate(0 ${Math.min(down, all.height - 40)})`);
}

/** Zoom by a factor around a point of the window, if none is given around the pinned node or the middle. */
function zoom(factor, clientX, clientY) {
  const frame = svg.getBoundingClientRect();
  const box = scene.layout.boxes.get(chosen.hovered ?? chosen.pinned);
  const middle = box ? [(box.x - view.x) / view.width, (box.y - view.y) / view.height] : [0.5, 0.5];
  const [px, py] =
    clientX === undefined ? middle : [(clientX - frame.left) / frame.width, (clientY - frame.top) / frame.height];
  const width = clamp(view.width / factor, 120, 40000);
  const height = (view.height * width) / view.width;
  setView({ x: view.x + (view.width - width) * px, y: view.y + (view.height - height) * py, width, height });
}

/** Move the view just enough to show the node. */
function reveal(node) {
  const box = scene.layout.boxes.get(node);
  if (!box) return;
  const margin = 20;
  let { x, y } = view;
  x = Math.min(x, box.x - box.width / 2 - margin - GUTTER);
  x = Math.max(x, box.x + box.width / 2 + margin - view.width);
  y = Math.min(y, box.y - box.height / 2 - margin - 30);
  y = Math.max(y, box.y + box.height / 2 + margin - view.height);
  if (x !== view.x || y !== view.y) setView({ ...view, x, y });
}
