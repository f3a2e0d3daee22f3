// Small pieces that several parts of the page use.

import { useState } from "preact/hooks";
import { visible } from "../words";
import * as state from "./state";

/** What went wrong with a job, in the server's sentence. */
export function Problem({ name }: { name: string }) {
  const message = state.errors.value[name];
  return message ? (
    <p class="problem" role="alert">
      {visible(message)}
    </p>
  ) : null;
}

/** How far a job is, with a button that ends it. */
export function Progress({ name, what }: { name: string; what: string }) {
  const running = state.running.value[name];
  if (!running) return null;
  return (
    <p class="progress row">
      <span>{what} …</span>
      <progress aria-label={what} value={running.share || undefined} max={1} />
      <button type="button" class="small" disabled={!running.id} onClick={() => state.cancel(name)}>
        Cancel
      </button>
    </p>
  );
}

/** A command line that can be copied. */
export function Command({ line }: { line: string }) {
  const [copied, setCopied] = useState(false);
  return (
    <div class="command">
      <code>{line}</code>
      <button
        type="button"
        class="small"
        onClick={async () => {
          await navigator.clipboard.writeText(line);
          setCopied(true);
          setTimeout(() => setCopied(false), 1500);
        }}
      >
        {copied ? "copied" : "copy"}
      </button>
    </div>
  );
}
