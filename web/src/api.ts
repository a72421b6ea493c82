// Reading: Prometheus' HTTP API and fleet.json, both of the host that the page came from.

import queries from "./queries.json";

export type Name = keyof typeof queries;
export type Labels = Record<string, string>;
export interface Sample {
  labels: Labels;
  value: number;
}
export interface Series {
  labels: Labels;
  values: (number | null)[];
}
/** A window of time: `times` in Unix seconds, the same for each series. */
export interface Windowed {
  times: number[];
  series: Series[];
}
export interface Alert {
  labels: Labels;
  annotations: Labels;
  activeAt: string;
  state: string;
}
export interface Event {
  at: number;
  event: string;
  release?: number;
  model?: string;
  by?: string;
  detail?: string;
}
export interface Engine {
  service: string;
  model: string | null;
  profile: string | null;
  repo: string | null;
  image: string | null;
  port: number | null;
}
export interface Memory {
  total: number;
  planned: Record<string, number>;
  logged: Record<string, number>;
}
export interface SparkEntry {
  release?: number | null;
  previous?: number | null;
  engines?: Engine[];
  memory?: Memory | null;
  limit?: number | null;
  drift?: string[] | null;
  problem?: string;
  damaged?: string[];
  drained?: boolean;
  events?: Event[];
}
export interface Rollout {
  waves: string[][];
  labels: string[];
  wave: number;
  done: string[];
  failed: string[];
  ended: boolean;
  began: number;
  changed: number;
  by: string;
}
export interface Fleet {
  format: number;
  written: number;
  sparks: Record<string, SparkEntry>;
  gateways: string[];
  monitor: string;
  rollout: Rollout | null;
}

/** Why something could not be read, in words for the page. */
export class Failure extends Error {
  constructor(
    message: string,
    readonly kind: "key" | "silent" | "refused" | "missing",
  ) {
    super(message);
  }
}

const TIMEOUT_MS = 20_000;
/** Prometheus itself serves the page below /user, a gateway below /status. */
const API = location.pathname.includes("/user/") ? "../api/v1/" : "api/v1/";

async function read(address: string): Promise<unknown> {
  let answer: Response;
  try {
    answer = await fetch(address, { cache: "no-cache", signal: AbortSignal.timeout(TIMEOUT_MS) });
  } catch (error) {
    const late = error instanceof DOMException && error.name === "TimeoutError";
    throw new Failure(late ? `no answer within ${TIMEOUT_MS / 1000} s` : "no connection", "silent");
  }
  if (answer.status === 401) throw new Failure("the gateway asks for a client key: reload this page", "key");
  if (answer.status === 404) throw new Failure("not there", "missing");
  if (answer.status >= 500) throw new Failure(`status ${answer.status}`, "silent");
  if (!answer.ok) throw new Failure(`status ${answer.status}`, "refused");
  try {
    return await answer.json();
  } catch {
    throw new Failure("an answer that is not JSON", "refused");
  }
}

interface Answer {
  status: string;
  data: { result: { metric: Labels; value?: [number, string]; values?: [number, string][] }[]; alerts: Alert[] };
}

async function ask(path: string): Promise<Answer["data"]> {
  const answer = (await read(API + path)) as Answer;
  if (answer.status !== "success") throw new Failure("Prometheus refused the query", "refused");
  return answer.data;
}

export interface Vector {
  at: number;
  samples: Sample[];
}

export async function instant(name: Name): Promise<Vector> {
  const { result } = await ask(`query?query=${encodeURIComponent(queries[name].expr)}`);
  let at = 0;
  const samples: Sample[] = [];
  for (const { metric, value } of result) {
    if (!value) continue;
    at = Math.max(at, value[0]);
    samples.push({ labels: metric, value: Number(value[1]) });
  }
  return { at, samples };
}

const POINTS = 120;

export async function windowed(name: Name, length: number, end: number): Promise<Windowed> {
  const step = Math.max(15, Math.round(length / POINTS));
  const last = Math.floor(end / step) * step;
  const first = last - Math.floor(length / step) * step;
  const { result } = await ask(
    `query_range?query=${encodeURIComponent(queries[name].expr)}&start=${first}&end=${last}&step=${step}`,
  );
  const times: number[] = [];
  for (let at = first; at <= last; at += step) times.push(at);
  const series = result.map(({ metric, values }) => {
    const line: (number | null)[] = new Array(times.length).fill(null);
    for (const [at, value] of values ?? []) {
      const place = Math.round((at - first) / step);
      const figure = Number(value);
      if (place in line && Number.isFinite(figure)) line[place] = figure;
    }
    return { labels: metric, values: line };
  });
  return { times, series };
}

export async function alerts(): Promise<Alert[]> {
  return (await ask("alerts")).alerts;
}

export async function fleet(): Promise<Fleet> {
  const found = (await read("fleet.json")) as Fleet;
  if (found.format !== 1 || typeof found.sparks !== "object") {
    throw new Failure("written by another version of Sparkfleet", "refused");
  }
  return found;
}
