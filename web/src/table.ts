// The table of the fleet: a row for each Spark, made once; on a phone each row is a card.

import type { Windowed } from "./api";
import { Chart, sparkline } from "./charts";
import { attribute, fill, h, svg, text } from "./dom";
import { NONE, ago, count, dateTime, number, percent, rate } from "./format";
import * as memory from "./memory";
import { type Order, type Spark, matching, sorted } from "./model";

const GIB = 1024 ** 3;
const COLUMNS: [Order | "", string, string][] = [
  ["name", "Spark", ""],
  ["models", "Model", ""],
  ["release", "Release", "figure"],
  ["state", "Health", ""],
  ["requests", "Requests", "figure"],
  ["tokens", "Tokens/s", "figure"],
  ["kv", "KV cache", "figure"],
  ["memory", "Memory: plan, use", ""],
  ["temperature", "GPU", "figure"],
  ["restarts", "Restarts", "figure"],
  ["drift", "Drift", ""],
];
/** What a row's charts need, read when the first row is opened. */
export type Detail = Record<"tokens" | "kv" | "temperature" | "memory_free", Windowed | undefined>;

class Row {
  readonly element: HTMLTableRowElement;
  readonly details: HTMLTableRowElement;
  private readonly cells: HTMLTableCellElement[];
  private readonly open: HTMLButtonElement;
  private readonly line = sparkline();
  private readonly tokens = h("span", { class: "value" });
  private readonly bar = svg("svg", { class: "membar", role: "img" });
  private readonly meter = h("span", { class: "meter", "aria-hidden": "true" }, h("span"));
  private readonly kv = h("span", { class: "value" });
  private readonly badge = h("span", { class: "badge" });
  private readonly flag = h("span", { class: "badge", hidden: true }, "drained");
  private readonly body: HTMLElement;
  private charts: Map<keyof Detail, Chart> | undefined;
  spark: Spark | undefined;

  constructor(
    readonly name: string,
    private readonly opened: (row: Row) => void,
  ) {
    this.body = h("div", { class: "detail" });
    const id = `detail-${name.replace(/[^\w-]/g, "_")}`;
    this.details = h("tr", { class: "details", role: "row", id, hidden: true }, h("td", { role: "cell", colspan: String(COLUMNS.length) }, this.body));
    this.open = h("button", { type: "button", class: "open", "aria-expanded": "false", "aria-controls": id }, name);
    this.open.addEventListener("click", () => this.toggle());
    this.cells = COLUMNS.map(([order, label, kind]) =>
      h(order === "name" ? "th" : "td", {
        class: `${kind} of-${order}`,
        role: order === "name" ? "rowheader" : "cell",
        "data-label": label,
        scope: order === "name" ? "row" : undefined,
      }),
    ) as HTMLTableCellElement[];
    this.cell("name").append(this.open);
    this.cell("state").append(this.badge, this.flag);
    this.cell("tokens").append(this.line.element, this.tokens);
    this.cell("kv").append(this.meter, this.kv);
    this.cell("memory").append(this.bar);
    this.element = h("tr", { class: "row", role: "row" }, ...this.cells);
  }

  private cell(order: Order): HTMLTableCellElement {
    return this.cells[COLUMNS.findIndex(([name]) => name === order)]!;
  }

  update(spark: Spark, now: number): void {
    this.spark = spark;
    attribute(this.element, "data-tone", spark.tone);
    text(this.cell("models"), spark.models || NONE);
    text(this.cell("release"), spark.release === undefined ? NONE : String(spark.release));
    text(this.badge, spark.word);
    attribute(this.badge, "data-tone", spark.tone);
    this.flag.hidden = !spark.drained;
    const waiting = spark.waiting ? ` + ${number(spark.waiting)} waiting` : "";
    text(this.cell("requests"), spark.running === undefined ? NONE : `${number(spark.running)}${waiting}`);
    text(this.tokens, rate(spark.tokens));
    text(this.kv, percent(spark.kv));
    (this.meter.firstElementChild as HTMLElement).style.width = `${Math.min(spark.kv ?? 0, 1) * 100}%`;
    attribute(this.meter, "data-full", (spark.kv ?? 0) > 0.95 ? "yes" : undefined);
    memory.bar(this.bar, spark.memory, spark.used, spark.total);
    attribute(this.bar, "aria-label", memory.words(spark.memory, spark.used, spark.total));
    const heat = spark.temperature === undefined ? NONE : `${number(spark.temperature)} °C`;
    const hot = this.cell("temperature");
    text(hot, spark.throttled ? `${heat}, slowed` : heat);
    attribute(hot, "data-tone", spark.throttled || (spark.temperature ?? 0) > 85 ? "warn" : undefined);
    text(this.cell("restarts"), number(spark.restarts));
    const drift = this.cell("drift");
    text(drift, spark.drift === null ? (spark.problem ? "not known" : NONE) : spark.drift.length ? count(spark.drift.length, "difference") : "none");
    attribute(drift, "data-tone", spark.drift?.length ? "warn" : undefined);
    if (!this.details.hidden) this.fill(now);
  }

  draw(values: (number | null)[] | undefined, top: number): void {
    this.line.draw(values ?? [], top);
  }

  show(shown: boolean): void {
    this.element.hidden = !shown;
    if (!shown) this.details.hidden = true;
    attribute(this.open, "aria-expanded", String(!this.details.hidden));
  }

  toggle(): void {
    this.details.hidden = !this.details.hidden;
    attribute(this.open, "aria-expanded", String(!this.details.hidden));
    if (!this.details.hidden) this.opened(this);
  }

  get isOpen(): boolean {
    return !this.details.hidden;
  }

  fill(now: number): void {
    const spark = this.spark;
    if (!spark) return;
    if (!this.charts) {
      const gib = (value: number | undefined) => (value === undefined ? NONE : `${number(value, value < 10 ? 1 : 0)} GiB`);
      this.charts = new Map<keyof Detail, Chart>([
        ["tokens", new Chart("Tokens a second", rate, 130, "h4")],
        ["kv", new Chart("KV cache in use", percent, 130, "h4", 1)],
        ["temperature", new Chart("Temperature", (value) => (value === undefined ? NONE : `${number(value)} °C`), 130, "h4")],
        ["memory_free", new Chart("Memory available", gib, 130, "h4")],
      ]);
      this.body.append(
        h("div", { class: "facts" }),
        h("div", { class: "charts small" }, ...[...this.charts.values()].map((chart) => chart.element)),
      );
    }
    const { engines, drift, problem, damaged, events, limit, power, used, total } = spark;
    const minute = Math.floor(now / 60);
    fill(this.body.firstElementChild as HTMLElement, [engines, drift, problem, damaged, events, limit, power, used && Math.round(used * 10), minute], () => [
      spark.memory && h("div", {}, memory.table(spark.name, spark.memory, used, total)),
      h(
        "div",
        {},
        h("h4", {}, "Engine"),
        h(
          "dl",
          {},
          ...engines.flatMap((engine) => [
            h("dt", {}, engine.service),
            h("dd", {}, `${engine.repo ?? engine.model ?? NONE}, ${engine.profile ?? NONE}, port ${engine.port ?? NONE}`),
            h("dt", {}, "image"),
            h("dd", { title: engine.image ?? undefined }, (engine.image ?? NONE).replace(/(@sha256:.{12}).*/, "$1…")),
          ]),
          ...(limit ? [h("dt", {}, "limit"), h("dd", {}, `one stream: at most ${number(limit, 1)} tokens/s (memory bandwidth)`)] : []),
          ...(power === undefined ? [] : [h("dt", {}, "power"), h("dd", {}, `${number(power)} W (GPU)`)]),
        ),
      ),
      (!!drift?.length || !!damaged.length || !!problem) &&
        h(
          "div",
          {},
          h("h4", {}, "Differences from the inventory"),
          h("ul", {}, ...[...(drift ?? []), ...damaged.map((line) => `damaged: ${line}`), ...(problem ? [`not compared: ${problem}`] : [])].map((line) => h("li", {}, line))),
        ),
      h(
        "div",
        {},
        h("h4", {}, "Last events"),
        events.length
          ? h(
              "ul",
              { class: "events" },
              ...[...events].reverse().map((event) =>
                h(
                  "li",
                  {},
                  h("time", { datetime: new Date(event.at * 1000).toISOString(), title: dateTime(event.at) }, ago(event.at, now)),
                  ` ${event.event}${event.release ? ` release ${event.release}` : ""}${event.detail ? `: ${event.detail}` : ""}${event.by ? ` (${event.by})` : ""}`,
                ),
              ),
            )
          : h("p", { class: "none" }, "none recorded"),
      ),
    ]);
  }

  detail(found: Detail): void {
    for (const [name, chart] of this.charts ?? []) {
      const windowed = found[name];
      const mine = windowed?.series.find(({ labels }) => labels.host === this.name);
      const scale = name === "memory_free" ? GIB : 1;
      const values = mine?.values.map((value) => (value === null ? null : value / scale));
      chart.draw({ times: windowed?.times ?? [], lines: values ? [{ label: this.name, values }] : [] });
    }
  }

  recolour(): void {
    for (const chart of this.charts?.values() ?? []) chart.recolour();
  }
}

export class Table {
  private readonly rows = new Map<string, Row>();
  private readonly body = h("tbody", { role: "rowgroup" });
  private readonly found = h("p", { class: "found", role: "status" });
  private readonly heads: HTMLElement[];
  private readonly text: HTMLInputElement;
  private readonly only: HTMLInputElement;
  private readonly select: HTMLSelectElement;
  private order: Order = "name";
  private turned = false;
  private all: Spark[] = [];
  private shown = "";
  private detail: Detail | undefined;

  constructor(
    place: HTMLElement,
    /** Asked for the figures of details when a row is opened. */
    private readonly wanted: () => void,
  ) {
    this.text = h("input", { type: "search", id: "filter", placeholder: "name, model, state", autocomplete: "off", spellcheck: "false" });
    this.only = h("input", { type: "checkbox", id: "only" });
    this.select = h("select", { id: "order" }, ...COLUMNS.map(([order, label]) => h("option", { value: order }, label)));
    for (const control of [this.text, this.only]) control.addEventListener("input", () => this.arrange());
    this.select.addEventListener("input", () => this.sort(this.select.value as Order, false));
    this.heads = COLUMNS.map(([order, label, kind]) => {
      const button = h("button", { type: "button" }, label, h("span", { class: "arrow", "aria-hidden": "true" }));
      button.addEventListener("click", () => this.sort(order as Order, order === this.order && !this.turned));
      return h("th", { scope: "col", role: "columnheader", class: `${kind} of-${order}`, "aria-sort": order === "name" ? "ascending" : "none" }, button);
    });
    place.replaceChildren(
      h(
        "div",
        { class: "head" },
        h("h2", { id: "fleet-title" }, "Fleet"),
        h(
          "div",
          { class: "controls" },
          h("label", { class: "check" }, this.only, "needs attention"),
          h("label", { class: "field phone" }, "Sort", this.select),
          h("label", { class: "field" }, "Filter", this.text),
        ),
      ),
      this.found,
      h(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of the fleet" },
        h("table", { class: "fleet", role: "table", "aria-labelledby": "fleet-title" }, h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, ...this.heads)), this.body),
      ),
      legend(),
    );
  }

  update(all: Spark[], now: number): void {
    this.all = all;
    for (const spark of all) {
      let row = this.rows.get(spark.name);
      if (!row) {
        row = new Row(spark.name, (opened) => {
          opened.fill(now);
          if (this.detail) opened.detail(this.detail);
          this.wanted();
        });
        this.rows.set(spark.name, row);
      }
      row.update(spark, now);
    }
    this.arrange();
  }

  /** Sparklines: all with the same scale, so that rows can be compared. */
  draw(tokens: Windowed | undefined): void {
    const by = new Map((tokens?.series ?? []).map(({ labels, values }) => [labels.host ?? "", values]));
    let top = 0;
    for (const values of by.values()) for (const value of values) if (value !== null && value > top) top = value;
    for (const [name, row] of this.rows) row.draw(by.get(name), top);
  }

  get needsDetail(): boolean {
    return [...this.rows.values()].some((row) => row.isOpen);
  }

  details(found: Detail): void {
    this.detail = found;
    for (const row of this.rows.values()) if (row.isOpen) row.detail(found);
  }

  recolour(): void {
    for (const row of this.rows.values()) row.recolour();
  }

  private sort(order: Order, turned: boolean): void {
    this.order = order;
    this.turned = turned;
    this.select.value = order;
    this.heads.forEach((head, place) => {
      const mine = COLUMNS[place]?.[0] === order;
      const figures = !["name", "models", "release"].includes(order);
      attribute(head, "aria-sort", mine ? (turned !== figures ? "descending" : "ascending") : "none");
    });
    this.arrange();
  }

  private arrange(): void {
    const chosen = matching(this.all, this.text.value, this.only.checked ? "attention" : "");
    const list = sorted(chosen, this.order, this.turned);
    const signature = list.map(({ name }) => name).join("\n");
    if (signature !== this.shown) {
      this.shown = signature;
      const focused = document.activeElement;
      for (const row of this.rows.values()) row.show(false);
      const rows = list.map(({ name }) => this.rows.get(name)!);
      for (const row of rows) row.show(true);
      this.body.replaceChildren(...rows.flatMap((row) => [row.element, row.details]));
      if (focused instanceof HTMLElement && this.body.contains(focused)) focused.focus();
    }
    const part = list.length < this.all.length ? `${number(list.length)} of ` : "";
    text(this.found, this.all.length ? `${part}${count(this.all.length, "Spark")}` : "");
    this.found.classList.toggle("hidden", !part);
  }
}

function legend(): HTMLElement {
  return h(
    "ul",
    { class: "legend memory-legend", "aria-label": "Memory bar" },
    ...memory.PARTS.map(([key, label]) => h("li", {}, h("span", { class: `swatch part-${key}`, "aria-hidden": "true" }), label)),
    h("li", {}, h("span", { class: "swatch part-free", "aria-hidden": "true" }), "left to the host"),
    h("li", {}, h("span", { class: "swatch part-used", "aria-hidden": "true" }), "in use on the host, measured"),
  );
}
