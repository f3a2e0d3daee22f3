// The same nodes and edges as tables, sortable: for screen readers, and for whoever likes numbers.

import { useState } from "preact/hooks";
import { activationByCase, cases } from "./data";
import { scene } from "./scene";
import * as state from "./state";
import { describe, nodeTitle, number, plain, range } from "./text";

interface Column<T> {
  name: string;
  value: (row: T) => number | string;
  show?: (row: T) => string;
}
const MOST = 500;

function Sortable<T extends object>({
  title,
  rows,
  columns,
  open,
}: {
  title: string;
  rows: T[];
  columns: Column<T>[];
  open: (row: T) => void;
}) {
  const [sorting, setSorting] = useState<{ column: number; down: boolean } | null>(null);
  const sorted = sorting
    ? [...rows].sort(
        (a, b) => compare(columns[sorting.column].value(a), columns[sorting.column].value(b)) * (sorting.down ? -1 : 1),
      )
    : rows;
  return (
    <table class="data">
      <caption>
        {title}
        {rows.length > MOST ? `, the first ${MOST} of ${rows.length}` : ` (${rows.length})`}
      </caption>
      <thead>
        <tr>
          {columns.map((column, i) => (
            <th scope="col" aria-sort={sorting?.column === i ? (sorting.down ? "descending" : "ascending") : "none"}>
              <button
                type="button"
                onClick={() => setSorting({ column: i, down: sorting?.column === i ? !sorting.down : true })}
              >
                {column.name}
                {sorting?.column === i ? (sorting.down ? " ↓" : " ↑") : ""}
              </button>
            </th>
          ))}
        </tr>
      </thead>
      <tbody>
        {sorted.slice(0, MOST).map((row) => (
          <tr>
            {columns.map((column, i) => {
              const text = column.show?.(row) ?? String(column.value(row));
              return i === 0 ? (
                <th scope="row">
                  <button type="button" onClick={() => open(row)}>
                    {text}
                  </button>
                </th>
              ) : (
                <td dir="auto" class={typeof column.value(row) === "number" ? "value" : ""}>
                  {text}
                </td>
              );
            })}
          </tr>
        ))}
      </tbody>
    </table>
  );
}

const compare = (a: number | string, b: number | string) =>
  typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));

export function Table() {
  const nodes = scene.value.items.flatMap((item) => item.members);
  const links = scene.value.links.flatMap((link) => link.edges).sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  return (
    <div id="table" tabIndex={0} role="region" aria-label="Tables">
      <Sortable
        title="Nodes shown"
        rows={nodes}
        open={(node) => state.togglePin(node.id)}
        columns={[
          { name: "node", value: (n) => nodeTitle(n) },
          { name: "what it is", value: (n) => describe(n) },
          { name: "effect", value: (n) => n.effect, show: (n) => number(n.effect) },
          {
            name: "interval",
            value: (n) => n.attributes.interval?.[0] ?? 0,
            show: (n) => (n.attributes.interval ? range(n.attributes.interval) : ""),
          },
          ...cases.map((name) => ({
            name: `on for ${name.replaceAll("_", " ")}`,
            value: (n: (typeof nodes)[0]) => activationByCase(n).find(([c]) => c === name)?.[1] ?? 0,
            show: (n: (typeof nodes)[0]) => {
              const found = activationByCase(n).find(([c]) => c === name);
              return found ? plain(Number(found[1].toPrecision(3))) : "";
            },
          })),
        ]}
      />
      <Sortable
        title="Edges shown"
        rows={links}
        open={(edge) => {
          state.openEdge.value = state.edgeKey(edge.source.index, edge.target.index);
          state.commit();
        }}
        columns={[
          { name: "from", value: (e) => nodeTitle(e.source) },
          { name: "to", value: (e) => nodeTitle(e.target) },
          { name: "weight", value: (e) => e.weight, show: (e) => number(e.weight) },
          { name: "interval", value: (e) => e.interval?.[0] ?? 0, show: (e) => (e.interval ? range(e.interval) : "") },
        ]}
      />
    </div>
  );
}
