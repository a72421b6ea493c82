// The loop: read, merge, draw. Nothing is read while the page is not seen.

import "./style.css";
import * as api from "./api";
import { Chart, type Line, lines } from "./charts";
import { attribute, byId, code, fill, h, text } from "./dom";
import { NONE, ago, count, dateTime, duration, number, percent, rate, seconds } from "./format";
import * as model from "./model";
import { type Detail, Table } from "./table";

const REFRESH_S = 15;
const CHARTS_S = 60;
/** Without an answer for so long, what is shown counts as old. */
const STALE_S = 50;
const EVENTS = 12;
const INSTANT: api.Name[] = [
  "state", "up", "release", "running", "waiting", "tokens", "kv", "temperature", "power", "throttled", "restarts",
  "memory_total", "memory_free", "first_token", "gateway",
];
const DETAIL: (keyof Detail)[] = ["tokens", "kv", "temperature", "memory_free"];

const state = {
  figures: {} as model.Figures,
  fleet: undefined as api.Fleet | undefined,
  alerts: undefined as api.Alert[] | undefined,
  /** Of Prometheus' clock, Unix seconds; 0 before its first answer. */
  now: 0,
  /** Of this page's own clock, seconds. */
  answered: 0,
  problem: undefined as api.Failure | undefined,
  missing: [] as string[],
  fleetProblem: undefined as api.Failure | undefined,
  charted: -Infinity,
  window: 21600,
};

const clock = () => performance.now() / 1000;
/** Prometheus' time now, as far as this page knows. */
const now = () => (state.now ? state.now + clock() - state.answered : Date.now() / 1000);

const table = new Table(byId("fleet"), () => void readDetails());
const charts = {
  tokens: new Chart("Generated tokens a second, by model", rate, 190, "h3"),
  requests: new Chart("Requests", rate, 190, "h3"),
  first: new Chart("Time to the first token, p95", seconds, 190, "h3"),
};
byId("chart-grid").append(...Object.values(charts).map((chart) => chart.element));

async function read(): Promise<void> {
  const [fleet, alerts, ...vectors] = await Promise.allSettled([api.fleet(), api.alerts(), ...INSTANT.map(api.instant)]);
  if (fleet.status === "fulfilled") state.fleet = fleet.value;
  state.fleetProblem = fleet.status === "rejected" ? asFailure(fleet.reason) : undefined;
  if (alerts.status === "fulfilled") state.alerts = alerts.value;
  state.missing = alerts.status === "rejected" ? ["alerts"] : [];
  let problem: api.Failure | undefined;
  let at = 0;
  vectors.forEach((answer, place) => {
    const name = INSTANT[place]!;
    if (answer.status === "fulfilled") {
      state.figures[name] = answer.value;
      at = Math.max(at, answer.value.at);
    } else {
      problem = asFailure(answer.reason);
      state.missing.push(name);
    }
  });
  const silent = state.missing.length === INSTANT.length + 1;
  state.problem = silent ? problem : undefined;
  if (!silent) {
    state.now = at || Date.now() / 1000;
    state.answered = clock();
  }
}

function asFailure(reason: unknown): api.Failure {
  return reason instanceof api.Failure ? reason : new api.Failure(String(reason), "refused");
}

async function readCharts(): Promise<void> {
  const length = state.window;
  const names: api.Name[] = ["model_tokens", "fleet_running", "fleet_waiting", "first_token", "tokens"];
  const found = await Promise.allSettled(names.map((name) => api.windowed(name, length, now())));
  if (length !== state.window) return; // another range was chosen meanwhile
  const [tokens, running, waiting, first, hosts] = found.map((one) => (one.status === "fulfilled" ? one.value : undefined));
  const draw = (chart: Chart, windowed: api.Windowed | undefined, made: Line[]) =>
    chart.draw({ times: windowed?.times ?? [], lines: made });
  const name = (labels: api.Labels) => labels.model ?? "all";
  draw(charts.tokens, tokens, lines(tokens, name, true));
  draw(charts.first, first, lines(first, name, false));
  draw(charts.requests, running, [...lines(running, () => "running", true), ...lines(waiting, () => "waiting", true)]);
  table.draw(hosts);
  state.charted = clock();
}

async function readDetails(): Promise<void> {
  if (!table.needsDetail) return;
  const found = await Promise.allSettled(DETAIL.map((name) => api.windowed(name, state.window, now())));
  const made = Object.fromEntries(found.map((one, place) => [DETAIL[place]!, one.status === "fulfilled" ? one.value : undefined]));
  table.details(made as Detail);
}

// -- drawing ----------------------------------------------------------------------------------------------------------

function draw(): void {
  const sparks = model.sparks(state.fleet, state.figures);
  drawFreshness();
  drawBanner(sparks);
  drawTiles(sparks);
  drawRollout();
  drawAlerts();
  table.update(sparks, now());
  drawEvents();
  drawFooter();
  const serving = sparks.filter(({ tone }) => tone === "good").length;
  document.title = sparks.length ? `${serving}/${sparks.length} serving – Sparkfleet` : "Sparkfleet";
}

function drawFreshness(): void {
  const element = byId("freshness");
  const age = clock() - state.answered;
  const old = !state.now || age > STALE_S;
  attribute(element, "data-tone", !state.now && !state.problem ? "busy" : old || state.problem ? "bad" : "good");
  const words = !state.now ? (state.problem ? "no figures" : "loading") : old ? `${duration(age)} old` : "live";
  text(element.lastElementChild!, words);
}

function drawBanner(sparks: model.Spark[]): void {
  const said: [string, string][] = [];
  const { problem, fleetProblem, missing } = state;
  if (problem) {
    const since = state.now ? `; the figures below are from ${dateTime(state.now)}` : "";
    const what = problem.kind === "key" ? `Not let in: ${problem.message}` : `Prometheus does not answer (${problem.message})`;
    said.push(["bad", `${what}${since}. Asked again every ${REFRESH_S} s.`]);
  } else if (state.now && clock() - state.answered > STALE_S) {
    said.push(["warn", `The figures are from ${dateTime(state.now)}.`]);
  } else if (missing.length) {
    said.push(["warn", `Not read this time: ${missing.join(", ")}. Shown is what was read before.`]);
  }
  if (state.now && !problem && sparks.length && sparks.every(({ state: one }) => one === "no data")) {
    said.push(["warn", "Prometheus has no figures of these Sparks yet: it scrapes every 15 s; its alerts say which targets it does not reach."]);
  }
  if (fleetProblem && fleetProblem.kind !== "key" && (state.now || problem)) {
    const missed = fleetProblem.kind === "missing";
    const why = missed ? "is not there: site.yml writes it at its end" : `could not be read (${fleetProblem.message})`;
    said.push(["warn", `fleet.json ${why}. ${state.fleet ? "Shown is what it said before." : "Models, plans, drift and events are missing."}`]);
  }
  fill(byId("banner"), said, () => said.map(([tone, words]) => h("p", { class: `banner ${tone}` }, words)));
}

function drawTiles(sparks: model.Spark[]): void {
  const sums = model.totals(sparks);
  const firing = state.alerts ? model.firing(state.alerts) : undefined;
  const critical = firing?.filter(({ labels }) => labels.severity === "critical").length ?? 0;
  const known = state.now > 0;
  const tiles: [string, string, string, string][] = [
    [
      "Serving",
      known ? `${number(sums.serving)} / ${number(sums.sparks)}` : NONE,
      sums.differ ? `Sparks; ${number(sums.differ)} with drift` : "Sparks",
      !known ? "" : sums.serving < sums.sparks ? "warn" : "good",
    ],
    ["Tokens a second", known ? rate(sums.tokens) : NONE, "generated, last minute", ""],
    ["Requests", known ? number(sums.running) : NONE, known ? `running; ${number(sums.waiting)} waiting` : "", sums.waiting > Math.max(5, sums.running / 5) ? "warn" : ""],
    ["Fullest KV cache", percent(sums.fullest?.kv), sums.fullest?.name ?? "", (sums.fullest?.kv ?? 0) > 0.95 ? "warn" : ""],
    [
      "Hottest GPU",
      sums.hottest?.temperature === undefined ? NONE : `${number(sums.hottest.temperature)} °C`,
      sums.hottest?.name ?? "",
      (sums.hottest?.temperature ?? 0) > 85 ? "warn" : "",
    ],
    [
      "Alerts",
      firing ? number(firing.length) : NONE,
      critical ? `${number(critical)} critical` : firing?.length ? "none critical" : firing ? "all is well" : "",
      critical ? "bad" : firing?.length ? "warn" : firing ? "good" : "",
    ],
  ];
  fill(byId("tiles"), tiles, () =>
    tiles.map(([title, value, below, tone]) =>
      h("div", { class: "tile", "data-tone": tone || undefined }, h("p", { class: "tile-title" }, title), h("p", { class: "tile-value" }, value), h("p", { class: "tile-below" }, below)),
    ),
  );
}

const MARKS: Record<model.Mark, string> = { done: "serves the new release", failed: "failed", now: "in progress", later: "not yet" };
/** An end that is older is no news. */
const OLD_ROLLOUT_S = 86400;
const SILENT_ROLLOUT_S = 3600;

/** Sparks of a wave that are shown: all that failed or are in progress, and some of the others. */
function shortened<T extends { mark: model.Mark }>(hosts: T[]): T[] {
  const most = 16;
  const calm = hosts.filter(({ mark }) => mark === "done" || mark === "later");
  const left = new Set(calm.slice(most));
  return calm.length > most + 1 ? hosts.filter((host) => !left.has(host)) : hosts;
}

function drawRollout(): void {
  const element = byId("rollout");
  const rollout = state.fleet?.rollout;
  const at = now();
  element.hidden = !rollout || (rollout.ended && at - rollout.changed > OLD_ROLLOUT_S);
  if (!rollout || element.hidden) return;
  const total = rollout.waves.flat().length;
  const silent = !rollout.ended && at - rollout.changed > SILENT_ROLLOUT_S;
  const tone = rollout.failed.length ? "bad" : rollout.ended ? "good" : silent ? "warn" : "busy";
  const word = !rollout.ended
    ? silent ? `no news for ${duration(at - rollout.changed)}` : `wave ${rollout.wave} of ${rollout.waves.length}`
    : rollout.failed.length ? "stopped" : "done";
  const states = model.worst(state.figures.state?.samples ?? []);
  const marks = model.marks(rollout);
  const busy = rollout.waves[rollout.wave - 1]?.map((name) => states.get(name)) ?? [];
  fill(element, [rollout, tone, word, rollout.ended ? [] : busy, Math.floor(at / 60)], () => [
    h(
      "div",
      { class: "head" },
      h("h2", { id: "rollout-title" }, rollout.ended ? "Last rollout" : "Rollout in progress", " ", h("span", { class: "badge", "data-tone": tone }, word)),
      h("p", { class: "aside" }, `${number(rollout.done.length)} of ${count(total, "Spark")}; began ${ago(rollout.began, at)} by ${rollout.by}`),
    ),
    h("progress", { max: String(total), value: String(rollout.done.length), "aria-label": "Sparks that serve the new release" }),
    h(
      "ol",
      { class: "waves" },
      ...marks.map(({ label, hosts }) =>
        h(
          "li",
          {},
          h("span", { class: "wave-name" }, label === "canary" ? "canary" : `wave ${label}`),
          h(
            "ul",
            { class: "wave" },
            ...shortened(hosts).map(({ name, mark }) => {
              const live = mark === "now" ? states.get(name) : undefined;
              const word = live && live !== "serving" ? model.word(live) : "";
              return h("li", { "data-mark": mark }, name, h("span", { class: word ? "live" : "hidden" }, ` ${word || MARKS[mark]}`));
            }),
            hosts.length > shortened(hosts).length && h("li", { class: "more" }, `and ${number(hosts.length - shortened(hosts).length)} more`),
          ),
        ),
      ),
    ),
  ]);
}

function drawAlerts(): void {
  const element = byId("alerts");
  const firing = state.alerts ? model.firing(state.alerts) : [];
  element.hidden = !firing.length;
  const at = now();
  fill(element, [firing, Math.floor(at / 60)], () => [
    h("div", { class: "head" }, h("h2", { id: "alerts-title" }, "Alerts")),
    h(
      "ul",
      { class: "alert-list" },
      ...firing.map((alert) =>
        h(
          "li",
          { "data-tone": alert.labels.severity === "critical" ? "bad" : "warn" },
          h("span", { class: "badge", "data-tone": alert.labels.severity === "critical" ? "bad" : "warn" }, alert.labels.severity ?? "warning"),
          h("strong", {}, alert.annotations.summary ?? alert.labels.alertname ?? ""),
          h("span", { class: "aside" }, `${alert.labels.alertname}, since ${ago(Date.parse(alert.activeAt) / 1000, at).replace(" ago", "")}`),
          h("p", {}, ...code(alert.annotations.description ?? "")),
        ),
      ),
    ),
  ]);
}

function drawEvents(): void {
  const found = model.events(state.fleet, EVENTS);
  const at = now();
  fill(byId("events"), [found, Math.floor(at / 60)], () => [
    h("div", { class: "head" }, h("h2", { id: "events-title" }, "Last events")),
    found.length
      ? h(
          "ul",
          { class: "event-list" },
          ...found.map((event) =>
            h(
              "li",
              { "data-tone": ["failed", "given up"].includes(event.event) ? "bad" : event.event === "restarted" ? "warn" : undefined },
              h("time", { datetime: new Date(event.at * 1000).toISOString(), title: dateTime(event.at) }, ago(event.at, at)),
              h("b", {}, event.host),
              h("span", {}, `${event.event}${event.release ? ` release ${event.release}` : ""}${event.model ? `, ${event.model}` : ""}`),
              h("span", { class: "aside" }, [event.detail, event.by].filter(Boolean).join("; ")),
            ),
          ),
        )
      : h("p", { class: "none" }, state.fleet ? "none recorded" : "not known without fleet.json"),
  ]);
}

function drawFooter(): void {
  const { fleet } = state;
  const behind = (state.figures.gateway?.samples ?? []).map(({ labels, value }) => `${labels.proxy}: ${count(value, "Spark")}`);
  const parts = [
    fleet?.monitor ? `Figures by Prometheus on ${fleet.monitor}, every 15 s.` : "",
    fleet ? `Models, plans, drift and events as of ${dateTime(fleet.written)}, when they last changed.` : "",
    behind.length && behind.length <= 8 ? `Behind the gateway: ${[...new Set(behind)].join(", ")}.` : "",
  ];
  fill(byId("footer"), parts, () => parts.filter(Boolean).map((part) => h("p", {}, part)));
}

// -- the loop ---------------------------------------------------------------------------------------------------------

let running = false;

async function refresh(): Promise<void> {
  if (running) return;
  running = true;
  try {
    await read();
    draw();
    document.body.dataset.table ??= String(Math.round(performance.now()));
    if (!state.problem && clock() - state.charted >= CHARTS_S - 1) {
      await readCharts();
      await readDetails();
    }
    document.body.dataset.drawn ??= String(Math.round(performance.now()));
  } finally {
    running = false;
  }
}

byId("window").addEventListener("change", (event) => {
  state.window = Number((event.target as HTMLInputElement).value);
  state.charted = -Infinity;
  void readCharts().then(readDetails);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const chart of Object.values(charts)) chart.recolour();
  table.recolour();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) void refresh();
});
setInterval(() => {
  if (!document.hidden) void refresh();
}, REFRESH_S * 1000);
setInterval(() => {
  drawFreshness();
  drawBanner(model.sparks(state.fleet, state.figures));
}, 5000);
void refresh();
