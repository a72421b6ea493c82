// A few helpers instead of a framework: the page makes its elements once, and then changes only what differs.

type Child = Node | string | null | undefined | false;

export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Record<string, string | boolean | undefined> = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child): child is Node | string => !!child));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg<K extends keyof SVGElementTagNameMap>(
  tag: K,
  attributes: Record<string, string>,
  ...children: Node[]
): SVGElementTagNameMap[K] {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function byId(id: string): HTMLElement {
  const found = document.getElementById(id);
  if (!found) throw new Error(`#${id} is not on the page`);
  return found;
}

/** Set text only where it differs, so that nothing is drawn, or read aloud, again. */
export function text(element: Element, value: string): void {
  if (element.textContent !== value) element.textContent = value;
}

export function attribute(element: Element, name: string, value: string | undefined): void {
  if (value === undefined) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/** Text in which `words` are code. */
export function code(value: string): Child[] {
  return value.split("`").map((part, place) => (place % 2 ? h("code", {}, part) : part));
}

/** Replace children where `signature` differs from the last time. */
export function fill(element: HTMLElement, signature: unknown, make: () => Child[]): boolean {
  const now = JSON.stringify(signature) ?? "";
  if (element.dataset.signature === now) return false;
  element.dataset.signature = now;
  element.replaceChildren(...make().filter((child): child is Node | string => !!child));
  return true;
}
