// The page of `sfc serve`: type a prompt, see what is active, edit it, see what the model says then.

import { render } from "preact";
import { EditMaker } from "./edit";
import { Earlier, PairForm } from "./more";
import { Features, NextTokens, PromptForm, Tokens } from "./prompt";
import { OutcomeView } from "./outcome";
import * as state from "./state";

function App() {
  const run = state.overview.value;
  return (
    <>
      <header>
        <h1>{run?.title ?? "Experiments"}</h1>
        <p class="hint">{run ? `${run.model} · ${run.run}` : "opening the run …"}</p>
        <nav>
          <a href="/circuit" target="_blank">
            Circuit
          </a>
          <a href="/report" target="_blank">
            Report
          </a>
        </nav>
      </header>
      <main>
        {state.errors.value.page && <p role="alert">{state.errors.value.page}</p>}
        {run && (
          <>
            <PromptForm />
            {state.reading.value && (
              <>
                <div class="columns">
                  <div>
                    <Tokens />
                    <Features />
                  </div>
                  <div>
                    <NextTokens />
                    <EditMaker />
                  </div>
                </div>
                <OutcomeView />
              </>
            )}
            <div class="columns">
              <PairForm />
              <Earlier />
            </div>
          </>
        )}
      </main>
      <p class="visually-hidden" role="status" aria-live="polite">
        {state.announcement.value}
      </p>
    </>
  );
}

render(<App />, document.getElementById("app")!);
state.start().then(() => {
  document.documentElement.dataset.ready = "true";
});
