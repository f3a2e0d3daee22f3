// What an edit did: next tokens, continuation, and its cost elsewhere, beside the same edit of random features.

import { number, percent, plain, visible } from "../words";
import type { Next, Report } from "./api";
import { Command } from "./pieces";
import * as state from "./state";

export function OutcomeView() {
  const outcome = state.outcome.value;
  if (!outcome || !(outcome.next.length || outcome.command)) return null;
  const names = outcome.features.map((name) => visible(state.words.value.get(name) || "") || name);
  return (
    <section id="outcome" tabIndex={-1} aria-labelledby="outcome-title">
      <h2 id="outcome-title">
        {names.slice(0, 3).join("; ")}
        {names.length > 3 ? ` and ${names.length - 3} more` : ""}: {outcome.what}
      </h2>
      <div class="columns">
        <NextTable rows={outcome.next} />
        <Said said={outcome.said} />
      </div>
      {outcome.report && <Measured report={outcome.report} />}
      {outcome.report && (
        <p class="hint">
          In <code>edits/{outcome.file}.json</code>, and so in the{" "}
          <a href={`/report#edit-${outcome.file}`} target="_blank">
            report
          </a>
          . The same on the command line:
        </p>
      )}
      {outcome.report && <Command line={outcome.command} />}
    </section>
  );
}

function NextTable({ rows }: { rows: Next[] }) {
  const most = Math.max(1e-9, ...rows.flatMap((row) => [row.before, row.after ?? 0]));
  const bar = (share: number, kind: string) => (
    <span class="track">
      <span class={`bar ${kind}`} style={{ width: `${(100 * share) / most}%` }} />
    </span>
  );
  return (
    <div>
      <table class="bars changes">
        <caption>Probability of the next token</caption>
        <thead>
          <tr>
            <th scope="col">token</th>
            <th scope="col" colSpan={2}>
              before → after
            </th>
            <th scope="col">random features</th>
          </tr>
        </thead>
        <tbody>
          {rows.map((row) => (
            <tr>
              <th scope="row">
                <code>{visible(row.token)}</code>
              </th>
              <td>
                {bar(row.before, "was")}
                {bar(row.after ?? 0, "is")}
              </td>
              <td class="value">
                {percent(row.before)} → <b>{percent(row.after ?? 0)}</b>
              </td>
              <td class="value">{row.random?.length ? spread(row.random, percent) : ""}</td>
            </tr>
          ))}
        </tbody>
      </table>
      <p class="hint">
        <i class="key was" /> before <i class="key is" /> after; random features: mean and range over draws of as many
        active features at the same sites.
      </p>
    </div>
  );
}

function spread(values: number[], show: (value: number) => string): string {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return `${show(mean)} (${show(Math.min(...values))} to ${show(Math.max(...values))})`;
}

const TITLES: Record<string, string> = { before: "as it is", after: "edited", random: "random features edited, draw 1" };

function Said({ said }: { said: Record<string, string> }) {
  if (!Object.keys(said).length) return null;
  return (
    <dl class="said">
      {Object.entries(TITLES).map(([run, title]) =>
        said[run] === undefined ? null : (
          <>
            <dt>{title}</dt>
            <dd dir="auto">
              <Marked from={said.before ?? ""} to={said[run]} />
            </dd>
          </>
        ),
      )}
    </dl>
  );
}

/** The second text, with the words marked that the first has not in this order. */
function Marked({ from, to }: { from: string; to: string }) {
  const [a, b] = [from, to].map((text) => text.split(/\s+/).filter(Boolean));
  const same = sharedWords(a, b);
  return (
    <>
      {b.map((word, i) => (
        <>
          {same.has(i) ? visible(word) : <mark>{visible(word)}</mark>}{" "}
        </>
      ))}
    </>
  );
}

/** Numbers of the words of b in a longest common subsequence with a. */
function sharedWords(a: string[], b: string[]): Set<number> {
  const lengths = Array.from({ length: a.length + 1 }, () => new Array<number>(b.length + 1).fill(0));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      lengths[i][j] = a[i] === b[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
  const shared = new Set<number>();
  for (let i = 0, j = 0; i < a.length && j < b.length; )
    if (a[i] === b[j]) {
      shared.add(j);
      i++;
      j++;
    } else if (lengths[i + 1][j] >= lengths[i][j + 1]) i++;
    else j++;
  return shared;
}

/** What is left of the behaviour; less than nothing where it is turned around. */
export const left = (share: number) => (share < -0.05 ? `reversed (${percent(share)} left)` : `${percent(share)} left`);

function Measured({ report }: { report: Report }) {
  const { before, after, random } = report;
  const shares = report.random_remaining.filter((share): share is number => share !== null);
  const costs = random.map((run) => (run.ce ?? 0) - (before.ce ?? 0));
  return (
    <table class="data measured">
      <thead>
        <tr>
          <td />
          <th scope="col">before</th>
          <th scope="col">after</th>
          <th scope="col">change</th>
          <th scope="col">random features</th>
        </tr>
      </thead>
      <tbody>
        <tr>
          <th scope="row">{visible(report.metric)}</th>
          <td>{plain(before.overall.metric)}</td>
          <td>{plain(after.overall.metric)}</td>
          <td>{report.remaining === null ? "" : left(report.remaining)}</td>
          <td>{shares.length ? `${spread(shares, percent)} left` : ""}</td>
        </tr>
        {before.ce !== null && after.ce !== null ? (
          <tr>
            <th scope="row">cross-entropy on {report.n_texts} other texts</th>
            <td>{plain(before.ce)}</td>
            <td>{plain(after.ce)}</td>
            <td>{number(after.ce - before.ce)} nats a token</td>
            <td>{costs.length ? spread(costs, number) : ""}</td>
          </tr>
        ) : (
          <tr>
            <th scope="row">side effects</th>
            <td colSpan={4} class="hint">
              {state.overview.value!.text
                ? "other text has no such place: edit everywhere to measure them"
                : "start sfc serve with --text FILE to measure them on held-out text"}
            </td>
          </tr>
        )}
      </tbody>
    </table>
  );
}
