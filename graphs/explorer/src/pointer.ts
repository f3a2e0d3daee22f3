// The pointer over the drawing: hover, click, shift-click and lasso.

import { scene } from "./scene";
import type { Stage } from "./stage";
import * as state from "./state";

export function setUpPointer(stage: Stage): void {
  const front = stage.front;
  let pending: [number, number] | null = null;
  let drag: { start: [number, number]; lasso: boolean } | null = null;
  const place = (event: PointerEvent | MouseEvent): [number, number] => {
    const frame = front.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top];
  };
  front.addEventListener("pointermove", (event) => {
    if (drag?.lasso) {
      (stage.lasso ??= [drag.start]).push(place(event));
      return stage.drawFront();
    }
    if (event.buttons || event.pointerType === "touch") return;
    if (!pending)
      requestAnimationFrame(() => {
        if (pending) hoverAt(stage, ...pending);
        pending = null;
      });
    pending = place(event);
  });
  front.addEventListener("pointerleave", () => {
    pending = null;
    state.hovered.value = state.hoveredEdge.value = null;
  });
  front.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    drag = { start: place(event), lasso: state.lassoing.value || event.shiftKey };
    if (drag.lasso) front.setPointerCapture(event.pointerId);
  });
  front.addEventListener("pointerup", () => {
    if (stage.lasso && stage.lasso.length > 3) closeLasso(stage);
    else if (drag?.lasso) chooseAt(stage, ...drag.start);
    stage.lasso = drag = null;
    stage.drawFront();
  });
  front.addEventListener("click", (event) => {
    if (!event.shiftKey && !state.lassoing.value) clickAt(stage, ...place(event));
  });
}

function hoverAt(stage: Stage, x: number, y: number): void {
  const item = stage.itemAt(x, y);
  const link = item ? null : stage.linkAtPoint(x, y);
  state.hovered.value = item?.id ?? null;
  state.hoveredEdge.value = link?.key ?? null;
  stage.front.style.cursor = item || link ? "pointer" : "";
}

function chooseAt(stage: Stage, x: number, y: number): void {
  for (const node of stage.itemAt(x, y)?.members ?? []) state.toggleSelected(node.id);
}

function clickAt(stage: Stage, x: number, y: number): void {
  const item = stage.itemAt(x, y);
  if (item?.group) {
    state.changeGroup(state.groups.value.indexOf(item.group), { collapsed: false });
  } else if (item) {
    state.openEdge.value = null;
    state.togglePin(item.id);
  } else {
    const link = stage.linkAtPoint(x, y);
    state.openEdge.value = link
      ? link.index < 0
        ? state.edgeKey(link.edges[0].source.index, link.edges[0].target.index)
        : link.key
      : null;
    if (!link) state.pins.value = [];
    state.commit();
  }
}

function closeLasso(stage: Stage): void {
  const polygon = stage.lasso!;
  const inside = scene.value.items.filter(
    (item) => contains(polygon, stage.onScreen(item)) && item.node.kind !== "metric",
  );
  const ids = inside.flatMap((item) => item.members.map((node) => node.id));
  state.selected.value = [...new Set([...state.selected.value, ...ids])];
  state.announcement.value = `${ids.length} nodes chosen`;
}

function contains(polygon: [number, number][], [x, y]: [number, number]): boolean {
  let inside = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [[xi, yi], [xj, yj]] = [polygon[i], polygon[j]];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) inside = !inside;
  }
  return inside;
}
