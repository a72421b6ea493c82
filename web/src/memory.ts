// The memory bar: what was planned, and a mark at what is in use.

import type { Memory } from "./api";
import { attribute, h, svg } from "./dom";
import { NONE, number } from "./format";

export const PARTS: [string, string][] = [
  ["weights", "weights"],
  ["activations", "activations"],
  ["runtime", "runtime"],
  ["cuda_graphs", "CUDA graphs"],
  ["kv_cache", "KV cache"],
];
const [WIDTH, HEIGHT] = [200, 14];

export function planned(memory: Memory): number {
  return PARTS.reduce((so, [key]) => so + (memory.planned[key] ?? 0), 0);
}

export function words(memory: Memory | null, used: number | undefined, total: number | undefined): string {
  const plan = memory ? `${number(planned(memory))} of ${number(memory.total)} GiB planned for engines` : "no plan known";
  const now = used === undefined ? "use not measured" : `${number(used)}${total ? ` of ${number(total)}` : ""} GiB in use on the host`;
  return `${plan}; ${now}`;
}

/** Draw into an SVG; drawn again only where something differs. */
export function bar(element: SVGElement, memory: Memory | null, used: number | undefined, total: number | undefined): void {
  const length = Math.max(total ?? 0, memory?.total ?? 0, memory ? planned(memory) : 0);
  const at = (gib: number) => Math.round((gib / length) * WIDTH * 2) / 2;
  const signature = length ? [memory ? Object.values(memory.planned).map(at) : 0, used === undefined ? "" : at(used)].join() : "none";
  if (element.dataset.signature === signature) return;
  element.dataset.signature = signature;
  attribute(element, "viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  attribute(element, "preserveAspectRatio", "none");
  const parts: Node[] = [svg("rect", { class: "part-free", width: String(WIDTH), height: "10", y: "2", rx: "2" })];
  if (length && memory) {
    let start = 0;
    for (const [key] of PARTS) {
      const size = memory.planned[key] ?? 0;
      if (!size) continue;
      const [left, right] = [at(start), at(start + size)];
      parts.push(svg("rect", { class: `part-${key}`, x: String(left), y: "2", width: String(Math.max(right - left, 0.5)), height: "10" }));
      start += size;
    }
  }
  if (length && used !== undefined) {
    parts.push(svg("rect", { class: "part-used", x: String(Math.max(at(used) - 1, 0)), y: "0", width: "2.5", height: String(HEIGHT) }));
  }
  element.replaceChildren(...parts);
}

/** Plan against the engine's own log, part by part, and against the host. */
export function table(name: string, memory: Memory, used: number | undefined, total: number | undefined): HTMLElement {
  const gib = (value: number | undefined) => (value === undefined ? NONE : number(value, 1));
  const rows = PARTS.filter(([key]) => memory.planned[key] || memory.logged[key]).map(([key, label]) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, h("span", { class: `swatch part-${key}`, "aria-hidden": "true" }), label),
      h("td", {}, gib(memory.planned[key])),
      h("td", {}, gib(memory.logged[key])),
    ),
  );
  rows.push(
    h("tr", { class: "sum" }, h("th", { scope: "row" }, "engines"), h("td", {}, gib(planned(memory))), h("td", {}, NONE)),
    h(
      "tr",
      {},
      h("th", { scope: "row" }, h("span", { class: "swatch part-used", "aria-hidden": "true" }), `host, of ${gib(total)}`),
      h("td", {}, NONE),
      h("td", {}, gib(used)),
    ),
  );
  return h(
    "table",
    { class: "plain" },
    h("caption", {}, `Memory of ${name}, GiB`),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "part"), h("th", { scope: "col" }, "planned"), h("th", { scope: "col" }, "measured"))),
    h("tbody", {}, ...rows),
  );
}
