// The circuit of a pair of prompts, and the edits that were tried before.

import { number, visible } from "../words";
import { left } from "./outcome";
import { Command, Problem, Progress } from "./pieces";
import * as state from "./state";

const FIELDS = [
  ["clean", "prompt", "The secretary near the cars"],
  ["clean_answer", "its answer", "␣has"],
  ["patch", "contrasting prompt", "The secretaries near the cars"],
  ["patch_answer", "its answer", "␣have"],
] as const;

export function PairForm() {
  const found = state.found.value;
  return (
    <section aria-labelledby="pair-title">
      <h2 id="pair-title">Find the circuit of a pair</h2>
      <form
        id="pair-form"
        class="pair-form"
        onSubmit={(event) => {
          event.preventDefault();
          state.findCircuit();
        }}
      >
        {FIELDS.map(([name, title, placeholder]) => (
          <label>
            {title}
            <input
              type="text"
              name={name}
              dir="auto"
              required
              placeholder={placeholder}
              value={state.pair.value[name]}
              onInput={(event) => (state.pair.value = { ...state.pair.value, [name]: event.currentTarget.value })}
            />
          </label>
        ))}
        <button class="main" disabled={Boolean(state.running.value.circuit)}>
          Find
        </button>
      </form>
      <p class="hint">Attribution patching from the first prompt to the second; an answer begins with a space where it is a new word.</p>
      <Progress name="circuit" what="attributing" />
      <Problem name="circuit" />
      {found && (
        <>
          <p>
            <a href={`/circuits/${found.id}`} target="_blank" id="found">
              Open the circuit
            </a>{" "}
            (total effect {number(found.total_effect)}), or{" "}
            <button type="button" class="small" onClick={() => (state.chosen.value = found.strongest)}>
              edit its 10 strongest features
            </button>
          </p>
          <Command line={found.command} />
        </>
      )}
    </section>
  );
}

export function Earlier() {
  const done = state.done.value;
  return (
    <section aria-labelledby="earlier-title">
      <h2 id="earlier-title">Edits of this run</h2>
      {done.length ? (
        <table class="data earlier">
          <tbody>
            {done.slice(0, 20).map((edit) => (
              <tr>
                <td>
                  <a href={`/report#edit-${encodeURIComponent(edit.name)}`} target="_blank">
                    {edit.title}
                  </a>
                  <small dir="auto">{visible(edit.prompt)}</small>
                </td>
                <td class="value">{edit.left === null ? "" : left(edit.left)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      ) : (
        <p class="hint">Nothing was edited yet.</p>
      )}
    </section>
  );
}
