// The edit that is made up: which features, what becomes of them, and where.

import { visible } from "../words";
import { Problem, Progress } from "./pieces";
import * as state from "./state";

const OPERATIONS: [state.Operation, string, string][] = [
  ["zero", "ablate", "set to zero"],
  ["mean", "mean", "set to their mean on the held-out text"],
  ["scale", "× n", "multiply the activation by n"],
  ["set", "set to n", "set the activation to n"],
  ["steer", "steer by n", "add n times the feature's direction, active or not"],
];

export function EditMaker() {
  const { tokens } = state.reading.value!;
  const here = visible(tokens[state.position.value] ?? "").trim();
  const strongest = state.overview.value!.features.slice(0, 10).map((feature) => feature.name);
  const places: [state.Where, string][] = [
    ["everywhere", "everywhere"],
    ["here", `at “${here}” (token ${state.position.value})`],
    ["generated", "only generated tokens"],
  ];
  return (
    <section aria-labelledby="edit-title">
      <h2 id="edit-title">Edit</h2>
      <form
        id="edit-form"
        onSubmit={(event) => {
          event.preventDefault();
          state.tryEdit();
        }}
      >
        <div class="row chosen">
          {state.chosen.value.map((name) => (
            <button type="button" class="chip" title={`do not edit ${name}`} onClick={() => state.toggle(name)}>
              {visible(state.words.value.get(name) || "") || name} <small>{state.words.value.get(name) ? name : ""}</small> ×
            </button>
          ))}
          {!state.chosen.value.length && <span class="hint">Choose features with +, or take</span>}
          <button type="button" class="small" onClick={() => (state.chosen.value = strongest)}>
            the circuit's 10 strongest
          </button>
          {state.supernodes.value.map((group) => (
            <button
              type="button"
              class="small"
              onClick={() => (state.chosen.value = [...new Set([...state.chosen.value, ...group.features])])}
            >
              supernode {visible(group.name)} ({group.features.length})
            </button>
          ))}
          {state.chosen.value.length > 1 && (
            <button type="button" class="small" onClick={() => (state.chosen.value = [])}>
              none
            </button>
          )}
        </div>
        <fieldset class="choices">
          <legend>What becomes of them</legend>
          {OPERATIONS.filter(([name]) => name !== "mean" || state.overview.value!.text).map(([name, title, explanation]) => (
            <label title={explanation}>
              <input
                type="radio"
                name="operation"
                value={name}
                checked={state.operation.value === name}
                onChange={() => (state.operation.value = name)}
              />
              <span>{title}</span>
            </label>
          ))}
          {state.needsValue.value && (
            <label class="amount">
              n ={" "}
              <input
                type="number"
                step="any"
                required
                id="value"
                value={state.value.value}
                onInput={(event) => (state.value.value = event.currentTarget.value)}
              />
            </label>
          )}
        </fieldset>
        <fieldset class="choices">
          <legend>Where</legend>
          {places.map(([name, title]) => (
            <label>
              <input
                type="radio"
                name="where"
                value={name}
                checked={state.where.value === name}
                onChange={() => (state.where.value = name)}
              />
              <span>
                <bdi>{title}</bdi>
              </span>
            </label>
          ))}
        </fieldset>
        <div class="row">
          <button class="main" id="try" disabled={!state.chosen.value.length || Boolean(state.running.value.edit)}>
            Try it
          </button>
          <label
            class="hint"
            title="Every head looks where it looks in the unedited model, at all tokens but generated ones: the edit acts through what heads copy, not through where they look"
          >
            <input
              type="checkbox"
              id="freeze"
              checked={state.frozen.value}
              onChange={(event) => (state.frozen.value = event.currentTarget.checked)}
            />{" "}
            freeze attention
          </label>
          <label class="hint">
            and go on for{" "}
            <input
              type="number"
              min={0}
              max={200}
              value={state.newTokens.value}
              onInput={(event) => (state.newTokens.value = event.currentTarget.value)}
            />{" "}
            tokens
          </label>
        </div>
      </form>
      <Progress name="edit" what={state.outcome.value?.next.length ? "measuring beside random features and on other text" : "editing"} />
      <Problem name="edit" />
    </section>
  );
}
