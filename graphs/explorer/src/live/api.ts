// Requests to the server that this page is from.

export interface Next {
  id: number;
  token: string;
  before: number;
  after?: number;
  random?: number[];
}
/** Name, activation, effect. */
export type Active = [string, number, number];
export interface Pair {
  case: string;
  clean: string;
  clean_answer: string;
  patch?: string;
  patch_answer?: string;
}
export interface Overview {
  title: string;
  run: string;
  model: string;
  sites: string[];
  features: { name: string; words: string; effect: number }[];
  /** Names that were given to features, of the circuit or not. */
  labels: Record<string, string>;
  /** Features that have a page. */
  with_page: string[];
  pairs: Pair[];
  text: string | null;
  texts: number;
  longest: number;
}
export interface Behaviour {
  overall: { metric: number };
  ce: number | null;
}
export interface Report {
  metric: string;
  n_texts: number;
  before: Behaviour;
  after: Behaviour;
  random: Behaviour[];
  remaining: number | null;
  random_remaining: (number | null)[];
  random_left: number | null;
  ce_increase: number | null;
}
export interface Done {
  name: string;
  title: string;
  left: number | null;
  prompt: string;
}

async function ask<T>(method: string, path: string, body?: unknown): Promise<T> {
  const headers: Record<string, string> = body ? { "content-type": "application/json" } : {};
  let answer: Response;
  try {
    answer = await fetch(path, { method, headers, body: body ? JSON.stringify(body) : undefined });
  } catch {
    throw new Error("the server does not answer: does sfc serve still run?");
  }
  const text = await answer.text();
  if (answer.ok) return JSON.parse(text);
  let sentence = text;
  try {
    sentence = JSON.parse(text).error;
  } catch {
    // refusals are plain text
  }
  throw new Error(sentence);
}

export const overview = () => ask<Overview>("GET", "/run");
export const earlier = () => ask<Done[]>("GET", "/edits");
export const nameFeature = (feature: string, label: string) => ask<Overview>("POST", "/labels", { feature, label });
export const cancel = (id: string) => ask("DELETE", `/jobs/${id}`);

// biome-ignore lint: events are told apart by their kind
export type Event = { kind: string } & Record<string, any>;

/** Begins a job and follows its events to the end; an error of the job is thrown. */
export async function run(
  kind: string,
  request: Record<string, unknown>,
  hear: (event: Event) => void,
  begun: (id: string) => void = () => {},
): Promise<void> {
  const { id } = await ask<{ id: string }>("POST", "/jobs", { kind, ...request });
  begun(id);
  await new Promise<void>((resolve, reject) => {
    const events = new EventSource(`/jobs/${id}`);
    const end = (error?: Error) => {
      events.close();
      if (error) reject(error);
      else resolve();
    };
    events.onmessage = (message) => {
      const event: Event = JSON.parse(message.data);
      if (event.kind === "error") end(new Error(event.message));
      else if (event.kind === "cancelled") end(new Error("cancelled"));
      else if (event.kind === "done") end();
      else hear(event);
    };
    events.onerror = () => {
      if (events.readyState === EventSource.CLOSED) end(new Error("the server does not answer: does sfc serve still run?"));
    };
  });
}
