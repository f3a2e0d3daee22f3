// The feature pages: a list of all features to search and sort, and everything about the one that is open.

import { computed, signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { byId, circuit, type GraphNode, largestEffect, nodes, ranked } from "./data";
import { saveLabels } from "./exports";
import { evidence, FeatureSections, LabelEditor, sourceOf } from "./feature";
import { Bar } from "./pieces";
import * as state from "./state";
import { count, describe, labelOf, nodeTitle, percent, plain } from "./text";

type Order = "effect" | "density" | "largest" | "site";
const order = signal<Order>("effect");
const open = signal<string | null>(null);

const largest = (node: GraphNode) => node.attributes.max_activation ?? 0;
const BY: Record<Order, (a: GraphNode, b: GraphNode) => number> = {
  effect: (a, b) => Math.abs(b.effect) - Math.abs(a.effect) || largest(b) - largest(a),
  density: (a, b) => (b.attributes.density ?? 0) - (a.attributes.density ?? 0),
  largest: (a, b) => largest(b) - largest(a),
  site: (a, b) =>
    circuit.sites.indexOf(a.site) - circuit.sites.indexOf(b.site) || (a.feature ?? 0) - (b.feature ?? 0),
};

/** One node a feature, the strongest where it is at several positions. */
function features(): GraphNode[] {
  const first = new Map<string, GraphNode>();
  for (const node of ranked) if (node.kind === "feature" && !first.has(node.name)) first.set(node.name, node);
  return [...first.values()];
}

const listed = computed(() => {
  const words = state.query.value.trim().toLowerCase();
  const holds = (node: GraphNode) =>
    [node.name, describe(node), ...(node.attributes.top_tokens ?? [])].join(" ").toLowerCase().includes(words);
  return features().filter(holds).sort(BY[order.value]);
});

const openNode = () => (open.value ? (state.featureNode(open.value) ?? null) : null);

function fromHash(): void {
  let name = location.hash.replace(/^#/, "");
  try {
    name = decodeURIComponent(name);
  } catch {
    // a stray % is part of the name
  }
  const asked = byId.get(name)?.name ?? name;
  open.value = state.featureNode(asked) ? asked : (listed.value[0]?.name ?? null);
}

export function FeaturePages() {
  useEffect(() => {
    state.opener.open = (id) => (location.hash = encodeURIComponent(byId.get(id)?.name ?? id));
    fromHash();
    addEventListener("hashchange", fromHash);
    addEventListener("keydown", step);
  }, []);
  const all = features();
  const node = openNode();
  return (
    <>
      <header>
        <h1 dir="auto">{circuit.title}</h1>
        <p class="about">
          {count(all.length, "feature")}
          {circuit.about ? `, ${circuit.about}` : ""}
        </p>
        <nav aria-label="Pages of this run">
          {circuit.links?.circuit && <a href={circuit.links.circuit}>The circuit</a>}
          {circuit.links?.report && <a href={circuit.links.report}>The report</a>}
          <button type="button" class="small" id="save-labels" onClick={saveLabels}>
            Save labels
          </button>
        </nav>
      </header>
      <main>
        <List />
        <article id="feature" tabIndex={-1} aria-label={node ? node.name : "No feature"}>
          {node ? <FullPage key={node.name} node={node} /> : <p class="hint">There is no feature on this page.</p>}
        </article>
      </main>
    </>
  );
}

/** Up and down, or j and k, go through the list. */
function step(event: KeyboardEvent): void {
  if (event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement) return;
  const by = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
  if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
  const names = listed.value.map((node) => node.name);
  const next = names[names.indexOf(open.value ?? "") + by];
  if (next) {
    event.preventDefault();
    location.hash = encodeURIComponent(next);
  }
}

function List() {
  const rows = listed.value;
  return (
    <nav id="list" aria-label="Features">
      <div class="controls">
        <input
          type="search"
          id="search"
          placeholder="Search names, labels, tokens"
          aria-label="Search names, labels and tokens"
          autocomplete="off"
          spellcheck={false}
          value={state.query.value}
          onInput={(event) => (state.query.value = event.currentTarget.value)}
        />
        <label>
          <span class="visually-hidden">Order</span>
          <select id="order" onChange={(event) => (order.value = event.currentTarget.value as Order)}>
            <option value="effect">by effect</option>
            <option value="density">by frequency</option>
            <option value="largest">by largest activation</option>
            <option value="site">by site</option>
          </select>
        </label>
      </div>
      {!rows.length && <p class="hint">No feature matches.</p>}
      <ol>
        {rows.map((node) => (
          <Row key={node.name} node={node} />
        ))}
      </ol>
    </nav>
  );
}

function Row({ node }: { node: GraphNode }) {
  const own = useRef<HTMLLIElement>(null);
  const isOpen = open.value === node.name;
  useEffect(() => {
    if (isOpen) own.current?.scrollIntoView({ block: "nearest" });
  }, [isOpen]);
  const words = describe(node);
  return (
    <li ref={own} class={isOpen ? "open" : ""}>
      <a href={`#${encodeURIComponent(node.name)}`} aria-current={isOpen ? "page" : undefined}>
        <b dir="auto" class={labelOf(node) ? "" : "automatic"}>
          {words || "never on"}
        </b>
        <small>
          {node.name}
          {typeof node.attributes.density === "number" ? ` · ${percent(node.attributes.density)}` : ""}
        </small>
        {node.attributes.outside !== true && <Bar value={node.effect} largest={largestEffect} />}
      </a>
    </li>
  );
}

function FullPage({ node }: { node: GraphNode }) {
  const { density, max_activation: most, outside } = node.attributes;
  const places = nodes.filter((other) => other.name === node.name);
  const facts = [
    typeof density === "number" ? `on at ${percent(density)} of tokens` : "",
    typeof most === "number" && most > 0 ? `largest activation ${plain(Number(most.toPrecision(3)))}` : "",
    outside ? "not in the circuit" : "",
  ].filter(Boolean);
  return (
    <>
      <div class="title">
        <h2>
          {node.name} <span dir="auto">{describe(node)}</span>
        </h2>
        <small class={`source ${labelOf(node) ? "hand" : ""}`}>{sourceOf(node)}</small>
      </div>
      <ul class="places">
        {!outside &&
          places.map((place) => (
            <li>
              {places.length > 1 || place.position !== null ? `${nodeTitle(place).replace(`${node.name} `, "")}: ` : ""}
              {evidence(place)} · rank {place.rank + 1} of {ranked.filter((other) => other.attributes.outside !== true).length}{" "}
              {circuit.links?.circuit && (
                <a href={`${circuit.links.circuit}#node-${encodeURIComponent(place.id)}`}>in the drawing</a>
              )}
            </li>
          ))}
        <li>{facts.join(" · ")}</li>
      </ul>
      <LabelEditor node={node} />
      <FeatureSections node={node} full />
    </>
  );
}
