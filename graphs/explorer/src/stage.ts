// The drawing on the screen: two canvases (the whole, and what stands out over it), zoom, pointer and lasso.
//
// While a large drawing moves, the finished canvas moves as a bitmap; it is drawn anew when the drawing comes to rest.

import { effect as react, untracked } from "@preact/signals";
import { type Quadtree, quadtree } from "d3-quadtree";
import { select } from "d3-selection";
import { zoom as d3zoom, zoomIdentity, type ZoomTransform } from "d3-zoom";
import { theme } from "./colour";
import { byId } from "./data";
import {
  detailAt,
  drawBands,
  drawEdges,
  drawItem,
  drawNames,
  GUTTER,
  HEADER,
  MARGIN,
  type Look,
  type Tally,
  type Transform,
} from "./draw";
import { CanvasPen } from "./pen";
import { type Item, type Link, linkAt, linksAround, room, scaleToFit, type Scene, scene } from "./scene";
import { foundNodes } from "./search";
import { setUpPointer } from "./pointer";
import * as state from "./state";

const REACH = 8; // half the band, in pixels, in which a pointer hits an edge
const LARGE = 100; // nodes and edges beyond which a bitmap moves
const CALM = 120; // ms without movement before the drawing is drawn anew
const BUTTONS = 40; // room for the zoom buttons on the right
const narrow = matchMedia("(max-width: 820px)"); // buttons and panel then stand below the drawing

export class Stage {
  private canvases: HTMLCanvasElement[];
  private pens: CanvasPen[];
  private transform: Transform = { k: 1, x: GUTTER, y: HEADER };
  /** The transform that the bitmap was drawn with. */
  private drawn: Transform = this.transform;
  private zooming = d3zoom<HTMLCanvasElement, unknown>();
  private tree: Quadtree<Item> | null = null;
  private calm = 0;
  private waiting = 0;
  private fitted = true;
  private width = 0;
  private height = 0;
  /** The line that is being drawn around nodes, in pixels of the window. */
  lasso: [number, number][] | null = null;
  private stopReacting: (() => void)[] = [];
  tally: Tally = { labels: 0, cut: 0, smallest: Infinity };

  constructor(readonly host: HTMLElement) {
    this.canvases = ["whole", "front"].map((name) => {
      const canvas = document.createElement("canvas");
      canvas.className = `layer ${name}`;
      canvas.setAttribute("aria-hidden", "true");
      host.append(canvas);
      return canvas;
    });
    this.pens = this.canvases.map((canvas) => new CanvasPen(canvas.getContext("2d")!));
    this.setUpZoom();
    setUpPointer(this);
    new ResizeObserver(() => this.resize()).observe(host);
    this.resize();
    this.stopReacting.push(
      react(() => {
        const { layout } = scene.value;
        void [theme.value, state.lens.value, state.labels.value, layout];
        untracked(() => {
          this.tree = null;
          if (this.fitted) this.fit(false);
          this.redraw(false);
        });
      }),
      react(() => {
        void [
          state.hovered.value,
          state.hoveredEdge.value,
          state.openEdge.value,
          state.pins.value,
          state.selected.value,
        ];
        void [foundNodes.value, state.wholePaths.value, state.lassoing.value, scene.value, theme.value];
        void [state.lens.value, state.labels.value];
        untracked(() => this.drawFront());
      }),
    );
  }

  private get right(): number {
    return narrow.matches ? MARGIN : BUTTONS;
  }

  /** Whether a panel that has opened below the drawing takes a part of its room. */
  private get covered(): boolean {
    const open = this.host.closest("main")?.classList.contains("open") ?? false;
    return narrow.matches && open && room.value.width === this.width - GUTTER - this.right;
  }

  get front(): HTMLCanvasElement {
    return this.canvases[1];
  }

  // --- zoom ---------------------------------------------------------------------------------------------------------------

  private setUpZoom(): void {
    this.zooming
      .scaleExtent([0.02, 6])
      .clickDistance(5)
      .filter(
        (event: Event & { ctrlKey?: boolean; button?: number; shiftKey?: boolean }) =>
          !(state.lassoing.value && event.type !== "wheel") &&
          !event.button &&
          !(event.shiftKey && event.type === "mousedown"),
      )
      .on("start", (event) => event.sourceEvent && this.host.classList.add("dragging"))
      .on("zoom", (event) => this.moved(event.transform, Boolean(event.sourceEvent)))
      .on("end", () => this.host.classList.remove("dragging"));
    select(this.front).call(this.zooming).on("dblclick.zoom", null);
  }

  private moved({ k, x, y }: ZoomTransform, byHand: boolean): void {
    this.transform = { k, x, y };
    if (byHand) this.fitted = false;
    const { items, links } = scene.value;
    if (items.length + links.length <= LARGE || !byHand) return this.redraw();
    clearTimeout(this.calm);
    this.calm = window.setTimeout(() => this.redraw(), CALM);
    if (!this.waiting) this.waiting = requestAnimationFrame(() => this.moveBitmap());
  }

  private moveBitmap(): void {
    this.waiting = 0;
    const scale = this.transform.k / this.drawn.k;
    const move = `translate(${this.transform.x - this.drawn.x * scale}px, ${this.transform.y - this.drawn.y * scale}px) scale(${scale})`;
    this.canvases[0].style.transform = move;
    this.clear(1);
    drawNames(this.pens[1], scene.value, this.transform, theme.value, this.height);
  }

  private go(t: Transform): void {
    select(this.front).call(this.zooming.transform, zoomIdentity.translate(t.x, t.y).scale(t.k));
  }

  /** The whole drawing in the window. */
  fit(redraw = true): void {
    const [left, top, right, bottom] = scene.value.bounds;
    const header = scene.value.layout.columns.length ? HEADER : MARGIN;
    const [width, height] = [this.width - GUTTER - this.right, this.height - header - MARGIN];
    const columns = scene.value.layout.columns.length > 0;
    const k = this.covered
      ? Math.max(0.02, Math.min(width / (right - left), height / (bottom - top), 1.5))
      : scaleToFit(right - left, bottom - top, columns);
    const x = GUTTER + (width - (right - left) * k) / 2;
    const t = { k, x, y: header + (height - (bottom - top) * k) / 2 - top * k };
    this.fitted = true;
    if (redraw) return this.go(t);
    this.transform = t;
    this.front.__zoom = zoomIdentity.translate(t.x, t.y).scale(t.k);
  }

  /** Zoom by a factor around what is hovered or pinned, or the middle of the window. */
  zoomBy(factor: number): void {
    const item = this.itemOf(state.hovered.value ?? state.pins.value[0]);
    const [x, y] = item ? this.onScreen(item) : [this.width / 2, this.height / 2];
    const k = Math.min(6, Math.max(0.02, this.transform.k * factor));
    const scale = k / this.transform.k;
    this.fitted = false;
    this.go({ k, x: x - (x - this.transform.x) * scale, y: y - (y - this.transform.y) * scale });
  }

  /** Move just enough to show the node. */
  reveal(id: string): void {
    const item = this.itemOf(id);
    if (!item) return;
    const [x, y] = this.onScreen(item);
    const [half, tall] = [(item.width * this.transform.k) / 2 + 14, (item.height * this.transform.k) / 2 + 14];
    const dx = Math.max(GUTTER + half - x, 0) + Math.min(this.width - half - x, 0);
    const top = scene.value.layout.columns.length ? HEADER : -MARGIN;
    const dy = Math.max(top + tall - y, 0) + Math.min(this.height - tall - y, 0);
    if (dx || dy) this.go({ ...this.transform, x: this.transform.x + dx, y: this.transform.y + dy });
  }

  onScreen(item: Item): [number, number] {
    return [item.x * this.transform.k + this.transform.x, item.y * this.transform.k + this.transform.y];
  }

  /** Middle of a node or edge in the window, for cards and for tests; null where it is not drawn. */
  where(id: string): { x: number; y: number; height: number } | null {
    const item = this.itemOf(id);
    if (!item) return null;
    const [x, y] = this.onScreen(item);
    return { x, y, height: item.height * this.transform.k };
  }

  whereEdge(key: string): { x: number; y: number } | null {
    const link = scene.value.links.find((candidate) => candidate.key === key);
    if (!link) return null;
    const p = link.path;
    const middle = 6 * Math.floor((p.length - 2) / 12); // the piece in the middle, at its middle
    const at = (i: number) => (p[middle + i] + 3 * p[middle + 2 + i] + 3 * p[middle + 4 + i] + p[middle + 6 + i]) / 8;
    return { x: at(0) * this.transform.k + this.transform.x, y: at(1) * this.transform.k + this.transform.y };
  }

  /** Where a card of this size hides least of what is brought out around the point: beside it, above or below. */
  placeCard(
    target: { x: number; y: number; height?: number },
    width: number,
    height: number,
  ): { left: number; top: number } {
    const clampTo = (value: number, most: number) => Math.max(6, Math.min(most - 6, value));
    const half = (target.height ?? 0) / 2 + 10;
    const side = target.height ? (134 * this.transform.k) / 2 + 12 : 14;
    const { links, focus } = this.outstanding();
    const lit = new Set([...focus, ...links.flatMap((link) => [link.source, link.target])]);
    const places = [
      [target.x + side, target.y - height / 2],
      [target.x - side - width, target.y - height / 2],
      [target.x - width / 2, target.y + half],
      [target.x - width / 2, target.y - half - height],
      [target.x + side, target.y + half],
      [target.x - side - width, target.y + half],
      [target.x + side, target.y - half - height],
      [target.x - side - width, target.y - half - height],
    ].map(([left, top]) => ({ left: clampTo(left, this.width - width), top: clampTo(top, this.height - height) }));
    const hides = ({ left, top }: { left: number; top: number }) => {
      let area = 0;
      for (const item of lit) {
        const [x, y] = this.onScreen(item);
        const [w, h] = [item.width * this.transform.k, item.height * this.transform.k];
        const across = Math.min(left + width, x + w / 2) - Math.max(left, x - w / 2);
        const down = Math.min(top + height, y + h / 2) - Math.max(top, y - h / 2);
        if (across > 0 && down > 0) area += across * down * (focus.includes(item) ? 5 : 1);
      }
      return area + 3 * Math.hypot(left + width / 2 - target.x, top + height / 2 - target.y);
    };
    return places.reduce((best, place) => (hides(place) < hides(best) ? place : best));
  }

  itemOf(id: string | undefined | null): Item | null {
    if (!id) return null;
    const node = byId.get(id);
    return (node ? scene.value.byNode.get(node) : scene.value.items.find((item) => item.id === id)) ?? null;
  }

  // --- drawing ------------------------------------------------------------------------------------------------------------

  private resize(): void {
    const { clientWidth: width, clientHeight: height } = this.host;
    if (!width || !height || (width === this.width && height === this.height)) return;
    [this.width, this.height] = [width, height];
    const ratio = Math.min(2, devicePixelRatio || 1);
    for (const canvas of this.canvases) {
      canvas.width = width * ratio;
      canvas.height = height * ratio;
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
      canvas.getContext("2d")!.setTransform(ratio, 0, 0, ratio, 0, 0);
    }
    const before = scene.peek();
    // A panel that opens below the drawing must not change how many nodes are drawn.
    if (!this.covered) room.value = { width: width - GUTTER - this.right, height: height - MARGIN };
    if (scene.value !== before || !this.stopReacting.length) return; // the scene's own change draws
    if (this.fitted && !this.covered) this.fit(false);
    this.redraw();
    if (this.covered && state.pins.value.length) this.reveal(state.pins.value[0]);
  }

  private clear(layer: number): void {
    this.pens[layer].context.clearRect(0, 0, this.width, this.height);
  }

  private look(): Look {
    const pins = new Set(state.pins.value);
    const chosen = new Set(state.selected.value);
    const some = (set: { has(id: string): boolean }) => (item: Item) => item.members.some((node) => set.has(node.id));
    const found = foundNodes.value;
    return { pinned: some(pins), selected: some(chosen), found: some({ has: (id) => found?.has(id) ?? false }) };
  }

  redraw(front = true): void {
    if (!this.width) return;
    clearTimeout(this.calm);
    const { transform: t, width, height } = this;
    const colours = theme.value;
    const current = scene.value;
    this.drawn = t;
    const pen = this.pens[0];
    this.canvases[0].style.transform = "";
    this.clear(0);
    drawBands(pen, current, t, colours, width);
    drawEdges(pen, visibleLinks(current, t, height), t, colours);
    this.tally = { labels: 0, cut: 0, smallest: Infinity };
    const look = { pinned: () => false, selected: () => false, found: () => false };
    for (const item of current.items)
      if (this.inWindow(item)) drawItem(pen, item, t, colours, look, this.tally);
    if (front) this.drawFront();
  }

  private inWindow(item: Item): boolean {
    const [x, y] = this.onScreen(item);
    const [half, tall] = [(item.width * this.transform.k) / 2, (item.height * this.transform.k) / 2];
    return x > -half && x < this.width + half && y > -tall && y < this.height + tall;
  }

  /** What is hovered, pinned, found or chosen, over the rest, which fades. */
  drawFront(): void {
    if (!this.width) return;
    this.clear(1);
    const [pen, colours, t] = [this.pens[1], theme.value, this.transform];
    const { links, focus } = this.outstanding();
    const found = foundNodes.value;
    const look = this.look();
    const lit = new Set<Item>(focus);
    for (const link of links) lit.add(link.source).add(link.target);
    for (const item of scene.value.items)
      if (look.found(item) || look.selected(item) || look.pinned(item)) lit.add(item);
    const dim = focus.length > 0 || links.length > 0;
    this.host.classList.toggle("focused", dim);
    this.host.classList.toggle("searching", Boolean(found) && !dim);
    drawEdges(pen, links, t, colours, true);
    for (const item of lit) if (this.inWindow(item)) drawItem(pen, item, t, colours, look);
    if (this.lasso)
      pen.polygon(this.lasso.flat(), { fill: colours.accent + "22", stroke: colours.accent, width: 1.5, dash: [5, 4] });
    drawNames(pen, scene.value, t, colours, this.height);
  }

  /** The links and items that are brought out. */
  outstanding(): { links: Link[]; focus: Item[] } {
    const { links } = scene.value;
    const key = state.hoveredEdge.value ?? (state.hovered.value ? null : state.openEdge.value);
    const link = key && links.find((candidate) => candidate.key === key);
    if (link) return { links: [link], focus: [] };
    const ids = state.hovered.value ? [state.hovered.value] : state.pins.value;
    const focus = [...new Set(ids.map((id) => this.itemOf(id)).filter((item) => item !== null))];
    const around = focus.flatMap((item) => linksAround(item, links, state.wholePaths.value));
    return { links: [...new Set(around)].sort((a, b) => Math.abs(a.weight) - Math.abs(b.weight)), focus };
  }

  // --- pointer ------------------------------------------------------------------------------------------------------------

  itemAt(px: number, py: number): Item | null {
    const { k } = this.transform;
    const [x, y] = [(px - this.transform.x) / k, (py - this.transform.y) / k];
    this.tree ??= quadtree<Item>()
      .x((i) => i.x)
      .y((i) => i.y)
      .addAll(scene.value.items);
    const slack = 3 / k;
    let best: Item | null = null;
    this.tree.visit((quad, x0, y0, x1, y1) => {
      if (!quad.length) {
        let leaf: typeof quad | undefined = quad;
        for (; leaf; leaf = leaf.next) {
          const item: Item = leaf.data;
          if (
            Math.abs(item.x - x) <= this.reachOf(item, 0) + slack &&
            Math.abs(item.y - y) <= this.reachOf(item, 1) + slack
          )
            best = item;
        }
      }
      return x0 > x + 140 || x1 < x - 140 || y0 > y + 40 || y1 < y - 40;
    });
    return best;
  }

  /** Half the width or height of what is drawn of an item: dots are smaller than their boxes. */
  private reachOf(item: Item, axis: 0 | 1): number {
    const [w, h] = [item.width, item.height];
    const isDot = detailAt(w * this.transform.k, h * this.transform.k) === "dot" && item.node.kind !== "metric";
    return isDot ? Math.max(Math.min(w, h * 1.6) / 2, 4 / this.transform.k) : (axis ? h : w) / 2;
  }

  linkAtPoint(px: number, py: number): Link | null {
    const { k, x, y } = this.transform;
    return linkAt(scene.value.links, (px - x) / k, (py - y) / k, REACH / k);
  }
}

export let stage: Stage;
/** Puts the drawing into the element. */
export const startStage = (host: HTMLElement) => (stage = new Stage(host));

declare global {
  interface HTMLCanvasElement {
    /** Where d3-zoom keeps an element's transform. */
    __zoom?: ZoomTransform;
  }
}

/** Links of which a part is in the window. */
function visibleLinks({ links }: Scene, t: Transform, height: number): Link[] {
  const [top, bottom] = [-t.y / t.k, (height - t.y) / t.k];
  return links.filter(
    ({ path }) => Math.max(path[1], path[path.length - 1]) > top && Math.min(path[1], path[path.length - 1]) < bottom,
  );
}
