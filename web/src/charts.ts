// Charts with uPlot, whose lines can be followed with the arrow keys; sparklines as SVG, one for each Spark.

import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import type { Windowed } from "./api";
import { attribute, h, svg, text } from "./dom";
import { NONE, byName, time } from "./format";

export interface Line {
  label: string;
  values: (number | null)[];
}
export interface Drawing {
  times: number[];
  lines: Line[];
}
/** Lines that can be told apart; what is beyond them is summed up. */
export const MOST_LINES = 6;

function style(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** The lines of a window by label, so that a label has the same colour in each chart; of more than MOST_LINES the
 *  smallest are put together. */
export function lines(found: Windowed | undefined, label: (labels: Record<string, string>) => string, sums: boolean): Line[] {
  const all = (found?.series ?? []).map(({ labels, values }) => ({ label: label(labels), values }));
  const size = ({ values }: Line) => values.reduce<number>((so, value) => so + (value ?? 0), 0);
  const named = (some: Line[]) => some.sort((one, other) => byName(one.label, other.label));
  if (all.length <= MOST_LINES) return named(all);
  all.sort((one, other) => size(other) - size(one));
  const rest = all.slice(MOST_LINES - 1);
  const joined = (found?.times ?? []).map((_, place) => {
    const here = rest.map(({ values }) => values[place]).filter((value): value is number => value != null);
    if (!here.length) return null;
    return sums ? here.reduce((so, value) => so + value, 0) : Math.max(...here);
  });
  return [...named(all.slice(0, MOST_LINES - 1)), { label: `${rest.length} more${sums ? "" : " (largest)"}`, values: joined }];
}

export class Chart {
  readonly element: HTMLElement;
  private readonly canvas: HTMLElement;
  private readonly legend: HTMLElement;
  private readonly moment: HTMLElement;
  private plot: uPlot | undefined;
  private drawn: Drawing = { times: [], lines: [] };
  private shape = "";

  constructor(
    private readonly title: string,
    private readonly show: (value: number | undefined) => string,
    private readonly height: number,
    heading: "h3" | "h4",
    /** The top of the scale where it is fixed. */
    private readonly top?: number,
  ) {
    this.canvas = h("div", { class: "plot", role: "img", tabindex: "0" });
    this.legend = h("ul", { class: "legend" });
    this.moment = h("span", { class: "moment" }, "now");
    this.element = h(
      "figure",
      { class: "chart" },
      h("figcaption", {}, h(heading, {}, title), this.moment),
      this.canvas,
      this.legend,
    );
    this.canvas.addEventListener("keydown", (event) => this.step(event));
    this.canvas.addEventListener("blur", () => this.plot?.setCursor({ left: -10, top: -10 }));
    new ResizeObserver(() => {
      const width = this.canvas.clientWidth;
      if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: this.height });
      else if (!this.plot && width) this.draw(this.drawn);
    }).observe(this.canvas);
  }

  /** Draw, or draw again with other figures. */
  draw(drawing: Drawing): void {
    this.drawn = drawing;
    const { times, lines } = drawing;
    const shape = lines.map(({ label }) => label).join("\n");
    attribute(this.canvas, "aria-label", this.words());
    if (!lines.length) {
      this.plot?.destroy();
      this.plot = undefined;
      this.canvas.replaceChildren(h("p", { class: "none" }, "no figures in this range"));
    } else if (this.plot && shape === this.shape) {
      this.plot.setData([times, ...lines.map(({ values }) => values)]);
    } else if (this.canvas.clientWidth) {
      this.plot?.destroy();
      this.canvas.replaceChildren();
      this.plot = new uPlot(this.options(lines), [times, ...lines.map(({ values }) => values)], this.canvas);
    }
    this.shape = shape;
    this.list();
    this.say(null);
  }

  /** With the colours of the other scheme. */
  recolour(): void {
    this.plot?.destroy();
    this.plot = undefined;
    this.draw(this.drawn);
  }

  private words(): string {
    const parts = this.drawn.lines.map(({ label, values }) => {
      const known = values.filter((value): value is number => value !== null);
      if (!known.length) return `${label}: no figures`;
      return `${label}: now ${this.show(known.at(-1))}, from ${this.show(Math.min(...known))} to ${this.show(Math.max(...known))}`;
    });
    return `${this.title}. ${parts.join("; ") || "No figures in this range"}`;
  }

  private options(lines: Line[]): uPlot.Options {
    const [text, grid] = [style("--muted"), style("--line")];
    const font = "11px system-ui, sans-serif";
    const axis = { stroke: text, font, grid: { stroke: grid, width: 1 }, ticks: { show: false } };
    return {
      width: this.canvas.clientWidth,
      height: this.height,
      padding: [8, 8, 0, 0],
      legend: { show: false },
      cursor: { y: false, points: { size: 7 }, drag: { x: false, y: false } },
      scales: {
        x: { time: true },
        y: { range: (_self, _low, high) => [0, this.top ?? (high > 0 ? high * 1.1 : 1)] },
      },
      axes: [
        {
          ...axis,
          grid: { show: false },
          size: 26,
          space: 70,
          values: (_self, splits) => splits.map((at) => time(at)),
        },
        { ...axis, size: 54, space: 32, values: (_self, splits) => splits.map((value) => this.show(value)) },
      ],
      series: [
        {},
        ...lines.map(({ label }, place) => ({
          label,
          stroke: style(`--series-${place + 1}`),
          fill: lines.length === 1 ? style("--series-1-fill") : "transparent",
          width: 1.75,
          points: { show: false },
          spanGaps: false,
        })),
      ],
      hooks: { setCursor: [(plot) => this.say(plot.cursor.idx ?? null)] },
    };
  }

  private list(): void {
    this.legend.replaceChildren(
      ...this.drawn.lines.map(({ label }, place) =>
        h("li", {}, h("span", { class: `swatch series-${place + 1}`, "aria-hidden": "true" }), `${label} `, h("b", {}, NONE)),
      ),
    );
  }

  /** The figures at a point of time in the legend; the newest without one. */
  private say(place: number | null): void {
    const { times, lines } = this.drawn;
    const at = place === null ? undefined : times[place];
    text(this.moment, at === undefined ? "now" : time(at));
    lines.forEach(({ values }, row) => {
      const value = place === null ? values.filter((one) => one !== null).at(-1) : values[place];
      const cell = this.legend.children[row]?.querySelector("b");
      if (cell) text(cell, this.show(value ?? undefined));
    });
  }

  private step(event: KeyboardEvent): void {
    const ways: Record<string, number> = { ArrowLeft: -1, ArrowRight: 1, Home: -1e6, End: 1e6 };
    const way = ways[event.key];
    if (way === undefined || !this.plot) return;
    event.preventDefault();
    const last = this.drawn.times.length - 1;
    const place = Math.min(Math.max((this.plot.cursor.idx ?? last) + way, 0), last);
    const left = this.plot.valToPos(this.drawn.times[place] ?? 0, "x");
    this.plot.setCursor({ left, top: 10 });
    this.say(place);
  }
}

const WIDTH = 88;
const HEIGHT = 22;

/** The path of a sparkline over `values`, gaps left open; `top` is the value at its upper edge. */
export function path(values: (number | null)[], top: number): string {
  const step = WIDTH / Math.max(values.length - 1, 1);
  let made = "";
  let open = false;
  values.forEach((value, place) => {
    if (value === null) {
      open = false;
      return;
    }
    const x = (place * step).toFixed(1);
    const y = (HEIGHT - 1.5 - (top > 0 ? Math.min(value / top, 1) : 0) * (HEIGHT - 3)).toFixed(1);
    made += `${open ? "L" : "M"}${x} ${y}`;
    open = true;
  });
  return made;
}

export function sparkline(): { element: SVGElement; draw: (values: (number | null)[], top: number) => void } {
  const line = svg("path", { class: "spark-line" });
  const element = svg("svg", { class: "sparkline", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true" }, line);
  return { element, draw: (values, top) => attribute(line, "d", path(values, top)) };
}
