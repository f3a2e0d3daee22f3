// The prompt: its form, its tokens, what comes next, and the features that are active.

import { percent, plain, number, visible } from "../words";
import { Problem, Progress } from "./pieces";
import * as state from "./state";

export function PromptForm() {
  const run = state.overview.value!;
  const busy = Boolean(state.running.value.prompt);
  return (
    <section>
      <form
        id="prompt-form"
        onSubmit={(event) => {
          event.preventDefault();
          state.read();
        }}
      >
        <label class="wide" for="prompt">
          Prompt
        </label>
        <textarea
          id="prompt"
          rows={2}
          dir="auto"
          value={state.prompt.value}
          placeholder="Type some words, and see what the model makes of them"
          onInput={(event) => (state.prompt.value = event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key !== "Enter" || event.shiftKey) return;
            event.preventDefault();
            state.read();
          }}
        />
        <button class="main" disabled={busy}>
          Read
        </button>
      </form>
      {run.pairs.length > 0 && (
        <p class="row examples">
          <span class="hint">From the circuit's prompts:</span>
          {run.pairs.map((pair) => (
            <button
              type="button"
              class="small"
              title={`answer ${pair.clean_answer} against ${pair.patch_answer ?? "the next most probable"}`}
              onClick={() => {
                state.prompt.value = pair.clean;
                state.pair.value = {
                  clean: pair.clean,
                  patch: (pair.patch ?? "").trim(),
                  clean_answer: pair.clean_answer,
                  patch_answer: pair.patch_answer ?? "",
                };
                state.read(pair.clean_answer, pair.patch_answer);
              }}
            >
              <bdi>{pair.clean}</bdi>
            </button>
          ))}
        </p>
      )}
      <Progress name="prompt" what="reading" />
      <Problem name="prompt" />
    </section>
  );
}

export function Tokens() {
  const { tokens, special, features } = state.reading.value!;
  const shaded = state.shading.value;
  const values = features.map((of) => of.find(([name]) => name === shaded)?.[1] ?? 0);
  const most = Math.max(1e-9, ...values);
  const move = (event: KeyboardEvent) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    state.position.value = Math.min(tokens.length - 1, Math.max(0, state.position.value + step));
    document.getElementById(`token-${state.position.value}`)?.focus();
  };
  return (
    <section aria-labelledby="tokens-title">
      <h2 id="tokens-title">Tokens</h2>
      <div class="tokens" role="group" aria-labelledby="tokens-title" onKeyDown={move}>
        {tokens.map((token, i) => (
          <button
            type="button"
            id={`token-${i}`}
            class={`token ${special.includes(i) ? "special" : ""}`}
            tabIndex={i === state.position.value ? 0 : -1}
            aria-pressed={i === state.position.value}
            title={shaded ? `token ${i}: ${shaded} is ${plain(values[i] ?? 0)}` : `token ${i}`}
            style={{ "--strength": ((values[i] ?? 0) / most).toFixed(3) }}
            onClick={() => (state.position.value = i)}
          >
            <bdi>{visible(token)}</bdi>
          </button>
        ))}
      </div>
      {shaded && (
        <p class="hint">
          Shaded by <code>{shaded}</code>, darkest at {plain(most)}.{" "}
          <button type="button" class="small" onClick={() => (state.shading.value = null)}>
            no shading
          </button>
        </p>
      )}
    </section>
  );
}

export function NextTokens() {
  const { next, answer, against } = state.reading.value!;
  const most = Math.max(...next.map((entry) => entry.before));
  return (
    <section>
      <h2>What comes next</h2>
      <table class="bars next">
        <thead>
          <tr>
            <th scope="col">token</th>
            <th scope="col" colSpan={2}>
              probability
            </th>
            <th scope="col">answer</th>
            <th scope="col">against</th>
          </tr>
        </thead>
        <tbody>
          {next.map((entry) => (
            <tr>
              <th scope="row">
                <code>{visible(entry.token)}</code>
              </th>
              <td>
                <span class="track">
                  <span class="bar positive" style={{ width: `${(100 * entry.before) / most}%` }} />
                </span>
              </td>
              <td class="value">{percent(entry.before)}</td>
              {(["answer", "against"] as const).map((role) => (
                <td class="pick">
                  <input
                    type="radio"
                    name={role}
                    aria-label={`${visible(entry.token)} as ${role}`}
                    checked={entry.id === (role === "answer" ? answer : against)}
                    disabled={entry.id === (role === "answer" ? against : answer)}
                    onChange={() => (role === "answer" ? state.read(entry.id, against) : state.read(answer, entry.id))}
                  />
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
      <form
        class="row"
        onSubmit={(event) => {
          event.preventDefault();
          const field = event.currentTarget.elements.namedItem("token") as HTMLInputElement;
          if (field.value) state.read(answer, field.value.replaceAll("␣", " "));
        }}
      >
        <input type="text" name="token" aria-label="Another token to compare with" placeholder="another, such as ␣have" size={22} />
        <button class="small">against this</button>
      </form>
    </section>
  );
}

export function Features() {
  const { features, answer, against, tokens } = state.reading.value!;
  const run = state.overview.value!;
  const wanted = state.search.value.trim().toLowerCase();
  const byEffect = state.sortBy.value === "effect";
  const here = (features[state.position.value] ?? [])
    .filter(([name]) => !state.site.value || name.startsWith(`${state.site.value}/`))
    .filter(([name]) => !wanted || `${name} ${state.words.value.get(name) ?? ""}`.toLowerCase().includes(wanted))
    .sort((a, b) => (byEffect ? Math.abs(b[2]) - Math.abs(a[2]) : b[1] - a[1]));
  const most = Math.max(1e-9, ...here.map((feature) => Math.abs(feature[byEffect ? 2 : 1])));
  const token = visible(tokens[state.position.value] ?? "").trim();
  return (
    <section aria-labelledby="features-title">
      <h2 id="features-title">
        Features at “<bdi>{token}</bdi>”
      </h2>
      <div class="row filters">
        <label>
          by{" "}
          <select
            value={state.sortBy.value}
            onChange={(event) => (state.sortBy.value = event.currentTarget.value as "effect" | "activation")}
          >
            <option value="effect">effect on the answer</option>
            <option value="activation">activation</option>
          </select>
        </label>
        <label>
          site{" "}
          <select value={state.site.value} onChange={(event) => (state.site.value = event.currentTarget.value)}>
            <option value="">all</option>
            {run.sites.map((name) => (
              <option>{name}</option>
            ))}
          </select>
        </label>
        <input
          type="search"
          aria-label="Search features"
          placeholder="search"
          value={state.search.value}
          onInput={(event) => (state.search.value = event.currentTarget.value)}
        />
      </div>
      <ul class="features">
        {here.slice(0, state.shownCount.value).map((feature) => (
          <FeatureRow feature={feature} most={most} byEffect={byEffect} />
        ))}
      </ul>
      {!here.length && <p class="hint">{features.length ? "no feature is active here" : "looking …"}</p>}
      {here.length > state.shownCount.value && (
        <button type="button" class="small" onClick={() => (state.shownCount.value += 24)}>
          {here.length - state.shownCount.value} more
        </button>
      )}
      <p class="hint">
        Effect: what m = logit(<code>{visible(state.tokenText(against))}</code>) − logit(
        <code>{visible(state.tokenText(answer))}</code>) gains when the feature is set to zero at this token, to first
        order. Above zero it speaks for the answer.
      </p>
    </section>
  );
}

function FeatureRow({ feature, most, byEffect }: { feature: [string, number, number]; most: number; byEffect: boolean }) {
  const [name, activation, effect] = feature;
  const size = byEffect ? effect : activation;
  const isChosen = state.chosen.value.includes(name);
  const inCircuit = state.effects.value.has(name);
  return (
    <li>
      <button
        type="button"
        class="pick"
        aria-pressed={isChosen}
        aria-label={`${isChosen ? "do not edit" : "edit"} ${name}`}
        onClick={() => state.toggle(name)}
      >
        {isChosen ? "✓" : "+"}
      </button>
      <button
        type="button"
        class="what"
        aria-pressed={state.shading.value === name}
        title="Shade the tokens by this feature"
        onClick={() => (state.shading.value = state.shading.value === name ? null : name)}
      >
        <b>{visible(state.words.value.get(name) ?? "") || name}</b>
        <small>
          {name}
          {inCircuit ? " · in the circuit" : ""} · activation {plain(activation)}
        </small>
      </button>
      <span class="track">
        <span
          class={`bar ${size < 0 ? "negative" : "positive"}`}
          style={{ width: `${(100 * Math.abs(size)) / most}%` }}
        />
      </span>
      <span class="value">{byEffect ? number(effect) : plain(activation)}</span>
      <span class="more">
        <button
          type="button"
          class="small"
          aria-expanded={state.naming.value === name}
          aria-label={`name ${name}`}
          onClick={() => (state.naming.value = state.naming.value === name ? null : name)}
        >
          name
        </button>
        {state.withPage.value.has(name) && (
          <a class="small" href={`/features#${encodeURIComponent(name)}`} target="_blank" rel="noopener" aria-label={`page of ${name}`}>
            page
          </a>
        )}
      </span>
      {state.naming.value === name && <NameForm name={name} />}
    </li>
  );
}

/** A field for what a feature is called; an empty name takes the old one away. */
function NameForm({ name }: { name: string }) {
  return (
    <form
      class="row name-form"
      onSubmit={(event) => {
        event.preventDefault();
        const field = event.currentTarget.elements.namedItem("label") as HTMLInputElement;
        state.nameFeature(name, field.value.trim());
      }}
    >
      <input
        type="text"
        name="label"
        maxLength={200}
        ref={(field) => field?.focus()}
        aria-label={`Name of ${name}`}
        placeholder="what it stands for"
        value={state.overview.value?.labels[name] ?? ""}
      />
      <button class="small">save</button>
      <Problem name="label" />
    </form>
  );
}
