// Search over everything in the page: names, labels, tokens, promoted tokens, contexts; drawn or not.

import { computed } from "@preact/signals";
import MiniSearch from "minisearch";
import { type GraphNode, nodes } from "./data";
import { query } from "./state";
import { describe, labelOf, promoted } from "./text";

const FIELDS = ["name", "label", "tokens", "promoted", "contexts"] as const;
type Field = (typeof FIELDS)[number];
export interface Hit {
  node: GraphNode;
  where: Field;
}

const texts = new Map<GraphNode, Record<Exclude<Field, "label">, string>>();
let index: MiniSearch | null = null;

function textsOf(node: GraphNode) {
  let found = texts.get(node);
  if (!found) {
    found = {
      name: `${node.id} ${node.kind}`.toLowerCase(),
      tokens: (node.attributes.top_tokens ?? []).join(" ").toLowerCase(),
      promoted: [...promoted(node, "top_logits"), ...promoted(node, "bottom_logits")]
        .map(([t]) => t)
        .join(" ")
        .toLowerCase(),
      contexts: (node.attributes.contexts ?? [])
        .map((c) => c.tokens.join(""))
        .join("\n")
        .toLowerCase(),
    };
    texts.set(node, found);
  }
  return found;
}

/** Built when it is first needed: words of all fields, for prefixes and slips of the keyboard. */
function words(): MiniSearch {
  if (!index) {
    index = new MiniSearch({
      fields: ["name", "tokens", "promoted", "contexts"],
      searchOptions: { prefix: true, fuzzy: 0.15, combineWith: "AND" },
    });
    index.addAll(nodes.map((node) => ({ id: node.index, ...textsOf(node) })));
  }
  return index;
}

/** Exact parts of a text first, in the order of fields, then words that begin alike; each by |effect|. */
export const hits = computed<Hit[]>(() => {
  const wanted = query.value.trim().toLowerCase();
  if (!wanted) return [];
  const found = new Map<GraphNode, Field>();
  const bySize = [...nodes].sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect));
  for (const field of FIELDS)
    for (const node of bySize) {
      const text =
        field === "label" ? labelOf(node) || (node.kind === "metric" ? describe(node) : "") : textsOf(node)[field];
      if (!found.has(node) && text.toLowerCase().includes(wanted)) found.set(node, field);
    }
  if (!found.size)
    for (const { id, match } of words().search(wanted)) {
      const field = (Object.values(match)[0]?.[0] ?? "contexts") as Field;
      found.set(nodes[id], field);
    }
  const order = (hit: Hit) => FIELDS.indexOf(hit.where);
  return [...found].map(([node, where]) => ({ node, where })).sort((a, b) => order(a) - order(b));
});

/** Ids of what the search found; null while nothing is searched. */
export const foundNodes = computed(() => (query.value.trim() ? new Set(hits.value.map(({ node }) => node.id)) : null));
