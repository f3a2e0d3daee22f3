// What is known of a feature: under the pointer in short, pinned in full; and how one feeds another.

import { circuit, classOf, type Edge, type GraphNode, touchesZero } from "./data";
import { EdgeList, evidence, Facts, FeatureSections, LabelEditor, Subtitle } from "./feature";
import { classColour, theme } from "./colour";
import { Bar, ClassBars, Contexts, FactTable, Token } from "./pieces";
import * as state from "./state";
import { describe, nodeTitle, number, percent, promoted, range, visible } from "./text";

/** The card under the pointer. */
export function HoverCard({ node }: { node: GraphNode }) {
  const { contexts, density } = node.attributes;
  const [top, bottom] = [promoted(node, "top_logits"), promoted(node, "bottom_logits")];
  return (
    <>
      <b class="name" dir="auto">
        {describe(node) || nodeTitle(node)}
      </b>
      <Subtitle node={node} />
      <p class="numbers">
        {evidence(node)}
        {typeof density === "number" ? ` · on at ${percent(density)} of tokens` : ""}
      </p>
      <ClassBars node={node} />
      {contexts?.length ? <Contexts contexts={contexts} most={3} /> : null}
      {top.length ? (
        <p class="promotes">
          raises{" "}
          {top.slice(0, 5).map(([t]) => (
            <Token text={t} />
          ))}
        </p>
      ) : null}
      {bottom.length ? (
        <p class="promotes">
          lowers{" "}
          {bottom.slice(0, 5).map(([t]) => (
            <Token text={t} />
          ))}
        </p>
      ) : null}
    </>
  );
}

export function EdgeSummary({ edges }: { edges: Edge[] }) {
  const weight = edges.reduce((sum, edge) => sum + edge.weight, 0);
  const [{ source, target, interval }] = edges;
  return (
    <>
      <b class="name">
        {nodeTitle(source)} → {nodeTitle(target)}
      </b>
      <p class="numbers">
        {edges.length > 1 ? `${edges.length} edges, sum ` : "weight "}
        {number(weight)}
        {edges.length === 1 && interval ? ` ${range(interval)}` : ""}
      </p>
      <small>
        {describe(source)} → {describe(target)}
      </small>
    </>
  );
}

// --- pinned ---------------------------------------------------------------------------------------------------------------

export function PinnedCard({ node }: { node: GraphNode }) {
  const chosen = state.selected.value.includes(node.id);
  return (
    <article class="card" aria-label={nodeTitle(node)} data-id={node.id}>
      <div class="heading">
        <h2>{nodeTitle(node)}</h2>
        {node.kind !== "metric" && (
          <button
            type="button"
            class="small"
            aria-pressed={chosen}
            onClick={() => state.toggleSelected(node.id)}
            title="Choose for a supernode (shift-click in the drawing)"
          >
            group
          </button>
        )}
        <button
          type="button"
          class="close"
          aria-label={`Let go of ${nodeTitle(node)}`}
          title="Let go"
          onClick={() => state.togglePin(node.id)}
        >
          ×
        </button>
      </div>
      {node.kind === "metric" ? (
        <p class="hint">The output of the circuit: {visible(circuit.metadata.metric ?? "the metric")}.</p>
      ) : (
        <LabelEditor node={node} />
      )}
      {node.kind === "error" && (
        <p class="hint">What the SAE of this site misses: the activation minus its reconstruction.</p>
      )}
      {node.kind === "skip" && (
        <p class="hint">What the skip connection of this site's transcoder writes: a linear map of what it reads.</p>
      )}
      {circuit.links?.features && node.attributes.quantiles && (
        <p class="hint">
          <a href={`${circuit.links.features}#${encodeURIComponent(node.name)}`}>Everything about this feature</a>
        </p>
      )}
      <Facts node={node} />
      <FeatureSections node={node} />
      <EdgeList title="Reads from" edges={node.incoming} end="source" />
      <EdgeList title="Feeds" edges={node.outgoing} end="target" />
    </article>
  );
}

/** Mean weight of an edge on the prompts of each case: where the sign turns, the two features pass the difference on. */
function WeightsByCase({ byCase }: { byCase: [string, number | null][] }) {
  const largest = Math.max(...byCase.map(([, weight]) => Math.abs(weight ?? 0)), 1e-12);
  return (
    <table class="bars">
      <caption>weight by case</caption>
      <tbody>
        {byCase.map(([name, weight]) => (
          <tr>
            <th scope="row">{visible(name.replaceAll("_", " "))}</th>
            <td>
              <Bar value={weight ?? 0} largest={largest} colour={classColour(theme.value, classOf(name))} />
            </td>
            <td class="value">{weight === null ? "–" : number(weight)}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

/** How one feature feeds another. */
export function EdgeCard({ edge }: { edge: Edge }) {
  const { source, target, weight, interval } = edge;
  const share = target.effect ? weight / target.effect : null;
  const side = (node: GraphNode) => (
    <div>
      <small>{nodeTitle(node)}</small>
      <b class="name" dir="auto">
        {describe(node)}
      </b>
      <ClassBars node={node} />
      {node.attributes.contexts?.length ? <Contexts contexts={node.attributes.contexts} most={3} /> : null}
      <button
        type="button"
        class="small"
        onClick={() => !state.pins.value.includes(node.id) && state.togglePin(node.id)}
      >
        pin
      </button>
    </div>
  );
  return (
    <article class="card edge-card" aria-label="Edge">
      <div class="heading">
        <h2>
          {nodeTitle(source)} → {nodeTitle(target)}
        </h2>
        <button
          type="button"
          class="close"
          aria-label="Close the edge"
          title="Close"
          onClick={() => ((state.openEdge.value = null), state.commit())}
        >
          ×
        </button>
      </div>
      <FactTable
        rows={[
          ["weight", number(weight)],
          ...(interval
            ? [
                [
                  "interval",
                  `${number(interval[0])} to ${number(interval[1])}${touchesZero(interval) ? " (touches zero)" : ""}`,
                ] as [string, string],
              ]
            : []),
          ...(share !== null && target.kind !== "metric"
            ? [["of the target's effect", percent(share)] as [string, string]]
            : []),
          [
            "rank",
            `${source.outgoing.indexOf(edge) + 1} of ${source.outgoing.length} edges out, ${target.incoming.indexOf(edge) + 1} of ${target.incoming.length} in`,
          ],
        ]}
      />
      {edge.byCase && <WeightsByCase byCase={edge.byCase} />}
      <div class="pair">
        {side(source)}
        <div class="arrow" aria-hidden="true">
          →
        </div>
        {side(target)}
      </div>
    </article>
  );
}
