// What the page shows, of what was read: pure functions.

import type { Alert, Engine, Event, Fleet, Memory, Name, Rollout, Sample, SparkEntry, Vector } from "./api";
import { byName } from "./format";

/** How bad a state is, and its word. An engine that starts on demand is well asleep; of several the others say more. */
const STATES: Record<string, [number, string]> = {
  asleep: [-1, "asleep"],
  serving: [0, "serving"],
  answers: [0, "answers"],
  switching: [1, "switching"],
  loading: [1, "starting"],
  healing: [2, "restarting"],
  stopped: [2, "stopped"],
  "no data": [2, "no data"],
  missing: [3, "missing"],
  "no answer": [3, "no answer"],
  wedged: [3, "wedged"],
  "docker-down": [3, "Docker down"],
  "given-up": [3, "given up"],
};
export function word(state: string): string {
  return STATES[state]?.[1] ?? state;
}

export type Tone = "good" | "busy" | "warn" | "bad";
const TONES: Tone[] = ["good", "busy", "warn", "bad"];

export interface Spark {
  name: string;
  models: string;
  engines: Engine[];
  release: number | undefined;
  state: string;
  word: string;
  tone: Tone;
  drained: boolean;
  running: number | undefined;
  waiting: number | undefined;
  tokens: number | undefined;
  kv: number | undefined;
  temperature: number | undefined;
  power: number | undefined;
  throttled: boolean;
  restarts: number | undefined;
  memory: Memory | null;
  /** GiB that are in use on the host, and all it has. */
  used: number | undefined;
  total: number | undefined;
  drift: string[] | null;
  problem: string;
  damaged: string[];
  events: Event[];
  limit: number | undefined;
}

export type Figures = Partial<Record<Name, Vector>>;
const GIB = 1024 ** 3;

function byHost(vector: Vector | undefined): Map<string, number> {
  const found = new Map<string, number>();
  for (const { labels, value } of vector?.samples ?? []) if (labels.host) found.set(labels.host, value);
  return found;
}

export function worst(samples: Sample[]): Map<string, string> {
  const found = new Map<string, string>();
  for (const { labels } of samples) {
    const { host, state } = labels;
    if (!host || !state) continue;
    const before = found.get(host);
    const level = (name: string) => STATES[name]?.[0] ?? 2;
    if (before === undefined || level(state) > level(before)) found.set(host, state);
  }
  return found;
}

export function sparks(fleet: Fleet | undefined, figures: Figures): Spark[] {
  const of = (name: Name) => byHost(figures[name]);
  const states = worst(figures.state?.samples ?? []);
  const [up, release, running, waiting, tokens, kv] = [of("up"), of("release"), of("running"), of("waiting"), of("tokens"), of("kv")];
  const [temperature, power, throttled, restarts] = [of("temperature"), of("power"), of("throttled"), of("restarts")];
  const [total, free] = [of("memory_total"), of("memory_free")];
  const entries: Record<string, SparkEntry> = fleet?.sparks ?? {};
  // Without fleet.json those that Prometheus knows: gateways and monitors have no engine.
  const names = fleet ? Object.keys(entries) : [...new Set([...states.keys(), ...up.keys()])];
  return names.sort(byName).map((name) => {
    const entry = entries[name] ?? {};
    const seen = up.get(name);
    const state = states.get(name) ?? (seen === undefined ? "no data" : seen > 0 ? "answers" : "no answer");
    const [level, word] = STATES[state] ?? [2, state];
    const whole = total.get(name);
    const rest = free.get(name);
    const engines = entry.engines ?? [];
    const models = [...new Set(engines.map((engine) => engine.model).filter((model): model is string => !!model))];
    return {
      name,
      models: models.join(" + "),
      engines,
      release: release.get(name) || entry.release || undefined,
      state,
      word,
      tone: TONES[Math.max(level, 0)] ?? "warn",
      drained: entry.drained ?? false,
      running: running.get(name),
      waiting: waiting.get(name),
      tokens: tokens.get(name),
      kv: kv.get(name),
      temperature: temperature.get(name),
      power: power.get(name),
      throttled: (throttled.get(name) ?? 0) > 0,
      restarts: restarts.get(name),
      memory: entry.memory ?? null,
      used: whole !== undefined && rest !== undefined ? (whole - rest) / GIB : undefined,
      total: whole !== undefined ? whole / GIB : entry.memory?.total,
      drift: entry.drift ?? null,
      problem: entry.problem ?? "",
      damaged: entry.damaged ?? [],
      events: entry.events ?? [],
      limit: entry.limit ?? undefined,
    };
  });
}

export interface Totals {
  sparks: number;
  serving: number;
  running: number;
  waiting: number;
  tokens: number;
  hottest: Spark | undefined;
  fullest: Spark | undefined;
  differ: number;
}

export function totals(all: Spark[]): Totals {
  const sum = (key: "running" | "waiting" | "tokens") => all.reduce((so, spark) => so + (spark[key] ?? 0), 0);
  const most = (key: "temperature" | "kv") =>
    all.reduce<Spark | undefined>((so, spark) => ((spark[key] ?? -1) > (so?.[key] ?? -1) ? spark : so), undefined);
  return {
    sparks: all.length,
    serving: all.filter((spark) => spark.tone === "good").length,
    running: sum("running"),
    waiting: sum("waiting"),
    tokens: sum("tokens"),
    hottest: most("temperature"),
    fullest: most("kv"),
    differ: all.filter((spark) => (spark.drift?.length ?? 0) > 0).length,
  };
}

/** Alerts that fire, the worst and the newest first. */
export function firing(all: Alert[]): Alert[] {
  const level = (alert: Alert) => (alert.labels.severity === "critical" ? 0 : 1);
  return all
    .filter((alert) => alert.state === "firing")
    .sort((one, other) => level(one) - level(other) || Date.parse(other.activeAt) - Date.parse(one.activeAt));
}

export function events(fleet: Fleet | undefined, most: number): (Event & { host: string })[] {
  const found = Object.entries(fleet?.sparks ?? {}).flatMap(([host, entry]) =>
    (entry.events ?? []).map((event) => ({ ...event, host })),
  );
  return found.sort((one, other) => other.at - one.at).slice(0, most);
}

export type Mark = "done" | "failed" | "now" | "later";

/** How far each Spark of a rollout is. */
export function marks(rollout: Rollout): { label: string; hosts: { name: string; mark: Mark }[] }[] {
  const done = new Set(rollout.done);
  const failed = new Set(rollout.failed);
  return rollout.waves.map((wave, place) => ({
    label: rollout.labels[place] ?? String(place + 1),
    hosts: wave.map((name) => {
      const current = !rollout.ended && place === rollout.wave - 1;
      return { name, mark: failed.has(name) ? "failed" : done.has(name) ? "done" : current ? "now" : "later" };
    }),
  }));
}

export type Order = "name" | "models" | "release" | "state" | "requests" | "tokens" | "kv" | "memory" | "temperature" | "restarts" | "drift";

function key(spark: Spark, order: Order): number | string {
  switch (order) {
    case "name":
      return spark.name;
    case "models":
      return spark.models;
    case "release":
      return spark.release ?? -1;
    case "state":
      return -TONES.indexOf(spark.tone);
    case "requests":
      return -((spark.running ?? -1) + (spark.waiting ?? 0));
    case "tokens":
      return -(spark.tokens ?? -1);
    case "kv":
      return -(spark.kv ?? -1);
    case "memory":
      return -(spark.used ?? -1);
    case "temperature":
      return -(spark.temperature ?? -1);
    case "restarts":
      return -(spark.restarts ?? -1);
    case "drift":
      return -(spark.drift?.length ?? -1);
  }
}

/** Names from A, figures from the largest; `turned` the other way round. */
export function sorted(all: Spark[], order: Order, turned: boolean): Spark[] {
  const way = turned ? -1 : 1;
  return [...all].sort((one, other) => {
    const [a, b] = [key(one, order), key(other, order)];
    const by = typeof a === "string" || typeof b === "string" ? byName(String(a), String(b)) : a - b;
    return by * way || byName(one.name, other.name);
  });
}

export function matching(all: Spark[], text: string, only: string): Spark[] {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  return all.filter((spark) => {
    if (only === "attention" && spark.tone === "good" && !spark.drift?.length && !spark.problem) return false;
    const whole = `${spark.name} ${spark.models} ${spark.word} ${spark.drained ? "drained" : ""}`.toLowerCase();
    return words.every((word) => whole.includes(word));
  });
}
