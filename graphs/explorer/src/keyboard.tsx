// The keyboard: shortcuts, and a list box that stands for the canvas.

import { useState } from "preact/hooks";
import { scene } from "./scene";
import { stage } from "./stage";
import * as state from "./state";
import { describe, effectWords, nodeTitle } from "./text";

const DIRECTIONS: Record<string, [number, number]> = {
  ArrowUp: [0, -1],
  ArrowDown: [0, 1],
  ArrowLeft: [-1, 0],
  ArrowRight: [1, 0],
};

/** The nearest node in a direction; sideways distance counts double. */
function neighbourIn(id: string, [dx, dy]: [number, number]): string | null {
  const from = stage.itemOf(id);
  if (!from) return null;
  let best: { id: string; distance: number } | null = null;
  for (const other of scene.value.items) {
    const ahead = (other.x - from.x) * dx + (other.y - from.y) * dy;
    const aside = Math.abs((other.x - from.x) * dy) + Math.abs((other.y - from.y) * dx);
    if (ahead > 1 && (dx === 0 || aside < 20) && (!best || ahead + 2 * aside < best.distance))
      best = { id: other.id, distance: ahead + 2 * aside };
  }
  return best?.id ?? null;
}

/** A list box that a keyboard and a screen reader see in place of the canvas: one tab stop, arrows go from node to node. */
export function Twin() {
  const [at, setAt] = useState<string | null>(null);
  const items = scene.value.items;
  const current = items.find((item) => item.id === at) ?? items.find((item) => item.node.kind === "metric") ?? items[0];
  const place = items.indexOf(current);
  const go = (id: string | null) => {
    if (!id) return;
    setAt(id);
    state.hovered.value = id;
    stage.reveal(id);
  };
  const press = (event: KeyboardEvent) => {
    if (!current) return;
    if (DIRECTIONS[event.key]) go(neighbourIn(current.id, DIRECTIONS[event.key]));
    else if (event.key === "Home" || event.key === "End") go(items.at(event.key === "Home" ? 0 : -1)!.id);
    else if ((event.key === "Enter" || event.key === " ") && event.shiftKey)
      for (const node of current.members) state.toggleSelected(node.id);
    else if (event.key === "Enter" || event.key === " ")
      current.group
        ? state.changeGroup(state.groups.value.indexOf(current.group), { collapsed: false })
        : state.togglePin(current.id);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const near = items.slice(Math.max(0, place - 5), place + 6);
  return (
    <div
      id="nodes-list"
      class="visually-hidden focus-drawing"
      role="listbox"
      tabIndex={0}
      aria-multiselectable="true"
      aria-label="Nodes of the circuit, first site at the bottom, metric on top. Arrow keys go from node to node, Enter pins."
      aria-activedescendant={current ? `option-${place}` : undefined}
      onKeyDown={press}
      onFocus={() => current && go(current.id)}
      onBlur={() => (state.hovered.value = null)}
    >
      {near.map((item) => {
        const i = items.indexOf(item);
        const words = item.group
          ? `${item.group.name}, supernode of ${item.members.length}`
          : `${nodeTitle(item.node)}, ${describe(item.node)}, ${effectWords(item.node)}, ${item.node.incoming.length} in, ${item.node.outgoing.length} out`;
        return (
          <div
            role="option"
            id={`option-${i}`}
            data-id={item.id}
            aria-selected={state.pins.value.includes(item.id)}
            aria-setsize={items.length}
            aria-posinset={i + 1}
          >
            {words}
          </div>
        );
      })}
    </div>
  );
}

export function setUpKeyboard(): void {
  addEventListener("keydown", (event) => {
    const target = event.target as HTMLElement;
    const typing = target.matches?.("input[type=text], input[type=search]");
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !typing) {
      event.preventDefault();
      return event.shiftKey ? state.redo() : state.undo();
    }
    if (event.key === "Escape") return escape(target);
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") document.getElementById("search")!.focus();
    else if (event.key === "+" || event.key === "=") stage.zoomBy(1.25);
    else if (event.key === "-") stage.zoomBy(0.8);
    else if (event.key === "0") stage.fit();
    else return;
    event.preventDefault();
  });
}

/** Lets go of one thing after the other: lasso, search, hover, chosen nodes, pins. */
function escape(target: HTMLElement): void {
  if (state.lassoing.value) state.lassoing.value = false;
  else if (state.query.value) {
    state.query.value = "";
    target.blur?.();
  } else if (state.selected.value.length) state.selected.value = [];
  else {
    state.pins.value = [];
    state.openEdge.value = state.hovered.value = state.hoveredEdge.value = null;
    state.commit();
  }
}
