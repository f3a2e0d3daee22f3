// The panel: an overview when nothing is pinned, everything known about a node when one is.

const panel = document.getElementById("panel");
const LISTED = 40;

/** An HTML element: html("li", {class: "x", onclick: f}, "text", child). */
function html(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value !== null && value !== undefined)
      made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

function showPanel() {
  panel.replaceChildren(...(chosen.pinned ? nodeSections(chosen.pinned) : overviewSections()));
  panel.scrollTop = 0;
}

const section = (title, ...children) => html("section", {}, html("h3", {}, title), ...children);

// --- overview ---------------------------------------------------------------------------------------------------------

function overviewSections() {
  const count = (kind) => nodes.filter((node) => node.kind === kind).length;
  const facts = [
    ["features", count("feature")],
    ["errors", count("error")],
    ["edges", edges.length],
    ...Object.entries(circuit.metadata).filter(([, value]) => ["string", "number", "boolean"].includes(typeof value)),
  ];
  return [
    html("h2", {}, "This circuit"),
    factTable(
      facts.map(([name, value]) => [
        name.replaceAll("_", " "),
        typeof value === "number" ? plainNumber(value) : String(value),
      ]),
    ),
    html(
      "p",
      { class: "hint" },
      "Point at a node to see what it reads and what it feeds; click or press Enter to keep it here. ",
      "Drag to move, scroll to zoom. Arrow keys go from node to node, Escape lets go, / searches.",
    ),
    section("Strongest nodes", nodeList(strongestNodes.slice(0, 15))),
  ];
}

const factTable = (rows) =>
  html("dl", { class: "facts" }, ...rows.flatMap(([name, value]) => [html("dt", {}, name), html("dd", {}, value)]));

function nodeList(listed) {
  return html("ol", { class: "links" }, ...listed.map((node) => linkTo(node, node.effect, largestEffect)));
}

/** A line that names a node and a value with its bar; it pins the node when clicked. */
function linkTo(node, value, largest, edge = null) {
  const share = Math.abs(value) / (largest || 1);
  const label = describe(node);
  return html(
    "li",
    {},
    html(
      "button",
      {
        type: "button",
        class: "link",
        onclick: () => pin(node),
        onmouseenter: () => hoverFromPanel(node, edge),
        onmouseleave: () => hoverFromPanel(null, null),
        onfocus: () => hoverFromPanel(node, edge),
        onblur: () => hoverFromPanel(null, null),
      },
      html(
        "span",
        { class: "who" },
        html("b", {}, label || nodeTitle(node)),
        label ? html("small", {}, nodeTitle(node)) : null,
      ),
      html("span", { class: `bar ${value < 0 ? "negative" : "positive"}`, style: `--share:${share.toFixed(3)}` }),
      html("span", { class: "value" }, number(value)),
    ),
  );
}

function hoverFromPanel(node, edge) {
  chosen.hovered = edge || node === null ? null : node;
  chosen.hoveredEdge = edge;
  highlight();
}

// --- one node ---------------------------------------------------------------------------------------------------------

function nodeSections(node) {
  const { contexts, top_tokens: tokens, top_logits: top, bottom_logits: bottom } = node.attributes;
  return [
    html(
      "div",
      { class: "heading" },
      html("h2", {}, nodeTitle(node)),
      html(
        "button",
        {
          type: "button",
          class: "close",
          title: "Let go (Escape)",
          "aria-label": "Close details",
          onclick: () => pin(null),
        },
        "×",
      ),
    ),
    node.kind === "feature" ? labelEditor(node) : html("p", { class: "hint" }, kindHint(node)),
    factTable(nodeFacts(node)),
    tokens?.length ? section("Top tokens", html("p", { class: "chips" }, ...tokens.map(tokenText))) : null,
    contexts?.length ? section("Strongest contexts", ...contextLines(contexts)) : null,
    top?.length || bottom?.length
      ? section(
          "Direct effect on the logits",
          html(
            "div",
            { class: "logits" },
            logitList("raises", top ?? [], "positive"),
            logitList("lowers", bottom ?? [], "negative"),
          ),
        )
      : null,
    edgeSection("Reads from", node.incoming, (edge) => edge.source),
    edgeSection("Feeds", node.outgoing, (edge) => edge.target),
  ].filter(Boolean);
}

/** A token in type of fixed width, its leading space as a faint dot. */
function tokenText(token) {
  const text = visibleText(token);
  return text.startsWith(" ") ? html("code", {}, html("i", {}, "·"), text.slice(1)) : html("code", {}, text);
}

const kindHint = (node) =>
  node.kind === "error"
    ? "What the SAE of this site misses: the activation minus its reconstruction."
    : `The output of the circuit: ${circuit.metadata.metric ?? "the metric"}.`;

function nodeFacts(node) {
  const facts = effectWords(node) ? [[node.kind === "metric" ? "total effect" : "effect", number(node.effect)]] : [];
  for (const [name, value] of Object.entries(node.attributes)) {
    if (typeof value === "number")
      facts.push([name.replaceAll("_", " "), name.includes("effect") ? number(value) : factValue(name, value)]);
    else if (name === "interval") facts.push([name, `${number(value[0])} to ${number(value[1])}`]);
    else if (typeof value === "string") facts.push([name.replaceAll("_", " "), value]);
  }
  if (node.position !== null)
    facts.push([
      "position",
      `${node.position}${typeof node.position === "number" ? ` “${positionNames.get(node.position)}”` : ""}`,
    ]);
  return facts;
}

const factValue = (name, value) =>
  name === "density" ? `${plainNumber(value * 100)} % of tokens` : plainNumber(value);

function labelEditor(node) {
  const input = html("input", {
    id: "label",
    type: "text",
    value: labelOf(node),
    placeholder: "What does this feature mean?",
    spellcheck: false,
  });
  input.addEventListener("input", () => {
    setLabel(node, input.value.trim());
    redrawLabels();
  });
  return html("label", { class: "label", for: "label" }, html("span", {}, "Label"), input);
}

/** Contexts with every token shaded by its activation, relative to the strongest of all. */
function contextLines(contexts) {
  const largest = Math.max(...contexts.flatMap((context) => context.activations), 1e-12);
  return contexts.map(({ tokens, activations }) =>
    html(
      "p",
      { class: "context" },
      ...tokens.map((token, i) => {
        const strength = Math.max(0, activations[i] ?? 0) / largest;
        const shown = String(token).replaceAll("\n", "⏎");
        return strength > 0.005
          ? html("mark", { style: `--strength:${strength.toFixed(3)}`, title: plainNumber(activations[i]) }, shown)
          : html("span", {}, shown);
      }),
    ),
  );
}

function logitList(title, items, sign) {
  const pairs = items.map((item) => (Array.isArray(item) ? item : [item, null]));
  const largest = Math.max(...pairs.map(([, value]) => Math.abs(value ?? 0)), 1e-12);
  return html(
    "div",
    {},
    html("h4", {}, title),
    html(
      "ol",
      {},
      ...pairs.map(([token, value]) =>
        html(
          "li",
          {},
          tokenText(token),
          value === null
            ? null
            : html("span", { class: `bar ${sign}`, style: `--share:${(Math.abs(value) / largest).toFixed(3)}` }),
          value === null ? null : html("span", { class: "value" }, number(value)),
        ),
      ),
    ),
  );
}

function edgeSection(title, list, end) {
  if (!list.length) return null;
  const items = (count) =>
    list.slice(0, count).map((edge) => linkTo(end(edge), edge.weight, Math.abs(list[0].weight), edge));
  const shown = html("ol", { class: "links" }, ...items(LISTED));
  const more =
    list.length > LISTED
      ? html(
          "button",
          {
            type: "button",
            class: "more",
            onclick: () => {
              shown.replaceChildren(...items(list.length));
              more.remove();
            },
          },
          `Show all ${list.length}`,
        )
      : null;
  return section(`${title} (${list.length})`, shown, more);
}
