// Numbers and times for people. Everything unknown is a dash.

export const NONE = "–";

export function number(value: number | undefined, digits = 0): string {
  if (value === undefined || !Number.isFinite(value)) return NONE;
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** Three significant places at most: 0.4, 3.2, 47, 1,240. */
export function rate(value: number | undefined): string {
  return number(value, value !== undefined && value !== 0 && Math.abs(value) < 10 ? 1 : 0);
}

export function percent(value: number | undefined): string {
  return value === undefined || !Number.isFinite(value) ? NONE : `${number(value * 100)}%`;
}

export function seconds(value: number | undefined): string {
  if (value === undefined || !Number.isFinite(value)) return NONE;
  if (value < 1) return `${number(value * 1000)} ms`;
  return value < 10 ? `${number(value, 1)} s` : duration(value);
}

/** 40 s, 12 min, 3 h, 5 days. */
export function duration(value: number): string {
  const whole = Math.max(0, Math.round(value));
  if (whole < 90) return `${whole} s`;
  if (whole < 90 * 60) return `${Math.round(whole / 60)} min`;
  if (whole < 36 * 3600) return `${Math.round(whole / 3600)} h`;
  return `${Math.round(whole / 86400)} days`;
}

export function ago(at: number, now: number): string {
  return now - at < 5 ? "just now" : `${duration(now - at)} ago`;
}

const stamp = new Intl.DateTimeFormat("en-GB", {
  year: "numeric",
  month: "short",
  day: "numeric",
  hour: "2-digit",
  minute: "2-digit",
});
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });

export function dateTime(at: number): string {
  return stamp.format(new Date(at * 1000));
}

export function time(at: number): string {
  return clock.format(new Date(at * 1000));
}

export function count(value: number, what: string, plural = `${what}s`): string {
  return `${number(value)} ${value === 1 ? what : plural}`;
}

const names = new Intl.Collator("en", { numeric: true });

/** spark-10 after spark-9. */
export function byName(one: string, other: string): number {
  return names.compare(one, other);
}
