// What this page knows: the run, the prompt that was read, the edit that is made up, and what came of it.

import { batch, computed, type Signal, signal } from "@preact/signals";
import * as api from "./api";

export type Operation = "zero" | "mean" | "scale" | "set" | "steer";
export type Where = "everywhere" | "here" | "generated";
export interface Reading {
  prompt: string;
  tokens: string[];
  special: number[];
  next: api.Next[];
  answer: number;
  against: number;
  features: api.Active[][];
}
export interface Outcome {
  features: string[];
  what: string;
  prompt: string;
  command: string;
  file: string;
  next: api.Next[];
  said: Record<string, string>;
  report: api.Report | null;
}
/** A job that runs: its number where it can be cancelled, and the share that is done. */
export interface Running {
  id: string | null;
  share: number;
}

export const overview = signal<api.Overview | null>(null);
export const words = computed(
  () =>
    new Map([
      ...(overview.value?.features.map((f) => [f.name, f.words] as [string, string]) ?? []),
      ...Object.entries(overview.value?.labels ?? {}),
    ]),
);
export const withPage = computed(() => new Set(overview.value?.with_page ?? []));
/** The feature that is being named. */
export const naming = signal<string | null>(null);
export const effects = computed(() => new Map(overview.value?.features.map((f) => [f.name, f.effect]) ?? []));

export const prompt = signal("");
export const reading = signal<Reading | null>(null);
/** The token whose features are listed. */
export const position = signal(0);
export const sortBy = signal<"effect" | "activation">("effect");
export const site = signal("");
export const search = signal("");
export const shownCount = signal(12);
/** The feature whose activations shade the tokens. */
export const shading = signal<string | null>(null);

export const chosen = signal<string[]>([]);
export const operation = signal<Operation>("zero");
export const value = signal("2");
export const where = signal<Where>("everywhere");
/** Whether heads look where they look in the unedited model. */
export const frozen = signal(false);
export const newTokens = signal("20");
export const outcome = signal<Outcome | null>(null);
export const done = signal<api.Done[]>([]);

export const running = signal<Record<string, Running>>({});
export const errors = signal<Record<string, string>>({});
export const announcement = signal("");

export const tokenText = (id: number) => reading.value?.next.find((entry) => entry.id === id)?.token ?? `#${id}`;

function set<T>(target: Signal<Record<string, T>>, key: string, entry: T | null): void {
  const { [key]: _, ...rest } = target.value;
  target.value = entry === null ? (rest as Record<string, T>) : { ...target.value, [key]: entry };
}

/** Runs a job under a name: its progress, its error and its end are told. */
async function follow(name: string, request: Record<string, unknown>, hear: (event: api.Event) => void) {
  if (running.value[name]) return false;
  set(errors, name, null);
  set(running, name, { id: null, share: 0 });
  try {
    const begun = (id: string) => set(running, name, { id, share: 0 });
    const heard = (event: api.Event) => {
      if (event.kind === "progress") set(running, name, { ...running.value[name], share: event.share });
      else batch(() => hear(event));
    };
    await api.run(name, request, heard, begun);
    return true;
  } catch (error) {
    set(errors, name, (error as Error).message);
    return false;
  } finally {
    set(running, name, null);
  }
}

export async function cancel(name: string): Promise<void> {
  const id = running.value[name]?.id;
  if (id) await api.cancel(id);
}

/** Reads the prompt; answers are ids or texts, the most probable tokens by default. */
export async function read(answer?: number | string, against?: number | string): Promise<void> {
  const text = prompt.value;
  const again = reading.value?.prompt === text;
  history.replaceState(null, "", `#${new URLSearchParams({ prompt: text })}`);
  await follow("prompt", { prompt: text, answer: answer ?? null, against: against ?? null }, (event) => {
    if (event.kind === "prompt") {
      const { tokens, special, next, answer, against } = event;
      reading.value = { prompt: text, tokens, special, next, answer, against, features: [] };
      if (!again) position.value = tokens.length - 1;
      shading.value = null;
      announcement.value = `${tokens.length} tokens; most probable next: ${next[0].token}`;
    } else if (event.kind === "features" && reading.value) reading.value = { ...reading.value, features: event.tokens };
  });
}

const VALUED = ["scale", "set", "steer"];
export const needsValue = computed(() => VALUED.includes(operation.value));
const DID: Record<Operation, string> = {
  zero: "ablated", mean: "set to their mean", scale: "× ", set: "set to ", steer: "steered by ",
}; // prettier-ignore

/** Tries the edit that is made up on the prompt that was read. */
export async function tryEdit(): Promise<void> {
  const now = reading.value;
  if (!now || !chosen.value.length) return;
  const place = where.value === "here" ? position.value : where.value;
  const amount = needsValue.value ? Number(value.value) : null;
  const at = { everywhere: "everywhere", generated: "at generated tokens", here: `at token ${position.value}` };
  outcome.value = {
    features: chosen.value,
    what: `${DID[operation.value]}${amount ?? ""} ${at[where.value]}${frozen.value ? ", attention frozen" : ""}`,
    prompt: now.prompt,
    command: "",
    file: "",
    next: [],
    said: {},
    report: null,
  };
  const request = {
    prompt: now.prompt,
    answer: now.answer,
    against: now.against,
    features: chosen.value,
    operation: operation.value,
    value: amount,
    where: place,
    freeze: frozen.value ? "attention" : null,
    new_tokens: Number(newTokens.value) || 0,
  };
  const finished = await follow("edit", request, (event) => {
    const before = outcome.value!;
    if (event.kind === "command") {
      outcome.value = { ...before, command: event.line, file: event.name };
      requestAnimationFrame(() => document.getElementById("outcome")?.scrollIntoView({ block: "start" }));
    }
    else if (event.kind === "next") outcome.value = { ...before, next: event.rows };
    else if (event.kind === "text") outcome.value = { ...before, said: { ...before.said, [event.run]: event.text } };
    else if (event.kind === "report") outcome.value = { ...before, report: event.report };
  });
  if (finished) announcement.value = `the edit was tried; it is in edits/${outcome.value!.file}.json`;
  done.value = await api.earlier();
}

export const pair = signal({ clean: "", patch: "", clean_answer: "", patch_answer: "" });
export const found = signal<{ id: string; command: string; total_effect: number; strongest: string[] } | null>(null);

/** Looks for the circuit of the pair. */
export async function findCircuit(): Promise<void> {
  let command = "";
  found.value = null;
  await follow("circuit", { ...pair.value }, (event) => {
    if (event.kind === "command") command = event.line;
    else if (event.kind === "circuit")
      found.value = { id: event.id, command, total_effect: event.total_effect, strongest: event.strongest };
  });
}

export function toggle(name: string): void {
  chosen.value = chosen.value.includes(name) ? chosen.value.filter((other) => other !== name) : [...chosen.value, name];
  announcement.value = `${chosen.value.length} features to edit`;
}

/** Writes down what a feature is called, for all circuits of its autoencoders. */
export async function nameFeature(name: string, label: string): Promise<void> {
  set(errors, "label", null);
  try {
    overview.value = await api.nameFeature(name, label);
    naming.value = null;
    announcement.value = label ? `${name} is called ${label}` : `${name} has no name any more`;
  } catch (error) {
    set(errors, "label", (error as Error).message);
  }
}

export interface Supernode {
  name: string;
  features: string[];
}
/** Supernodes that were made in the explorer, which keeps them in this browser. */
export const supernodes = signal<Supernode[]>([]);

export function readSupernodes(): void {
  const all: Supernode[] = [];
  for (let i = 0; i < localStorage.length; i++) {
    const key = localStorage.key(i)!;
    if (!key.startsWith("circuit-groups-")) continue;
    try {
      for (const { name, nodes } of JSON.parse(localStorage.getItem(key)!)) {
        const names = nodes.map((id: string) => id.split("@")[0]).filter((id: string) => /^\w+\/\d+$/.test(id));
        if (names.length) all.push({ name: String(name), features: [...new Set<string>(names)] });
      }
    } catch {
      // not what the explorer wrote
    }
  }
  supernodes.value = all;
}

export async function start(): Promise<void> {
  readSupernodes();
  addEventListener("storage", readSupernodes);
  try {
    overview.value = await api.overview();
    done.value = await api.earlier();
  } catch (error) {
    set(errors, "page", (error as Error).message);
    return;
  }
  document.title = `${overview.value.title}: experiments`;
  const given = new URLSearchParams(location.hash.slice(1)).get("prompt");
  if (given) {
    prompt.value = given;
    await read();
  }
}
