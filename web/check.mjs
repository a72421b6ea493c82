// Opens the status page, or a report (ADDRESS is file:///…), in headless Chromium and says what it found, as JSON on
// standard output.
//
//   node web/check.mjs ADDRESS [--out FOLDER] [--key KEY] [--only SCENE:SIZE:SCHEME,...]
//
// CHROMIUM names the browser (default: /usr/bin/chromium). tests/unit/web/test_page.py runs it with figures behind a gateway.

import { readFile } from "node:fs/promises";
import { parseArgs } from "node:util";
import puppeteer from "puppeteer-core";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { out: { type: "string" }, key: { type: "string" }, only: { type: "string" } },
});
const [address] = positionals;
const axe = await readFile(new URL("./node_modules/axe-core/axe.min.js", import.meta.url), "utf8");
const SIZES = { desktop: [1440, 900], phone: [390, 844] };
const SCHEMES = ["light", "dark"];
const API = /\/api\/v1\//;

/** What of the world is taken away: each request is answered as the scene says, or let through. */
const SCENES = {
  well: undefined,
  silent: (request) => API.test(request.url()) && { status: 503, body: "down" },
  empty: (request) =>
    API.test(request.url()) && {
      status: 200,
      contentType: "application/json",
      body: JSON.stringify({ status: "success", data: { result: [], alerts: [] } }),
    },
  "no-fleet-file": (request) => request.url().endsWith("/fleet.json") && { status: 404, body: "" },
};

const REPORT = address.startsWith("file:");

async function look(browser, scene, size, scheme) {
  const context = await browser.createBrowserContext();
  const page = await context.newPage();
  const found = { scene, size, scheme, errors: [], elsewhere: [], requests: 0, bytes: 0 };
  await page.setViewport({ width: SIZES[size][0], height: SIZES[size][1], isMobile: size === "phone", hasTouch: size === "phone" });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  if (values.key) await page.authenticate({ username: "any", password: values.key });
  const host = new URL(address).host;
  const taken = SCENES[scene];
  page.on("console", (message) => {
    // The browser's own word on an answer that the scene replaced is no error of the page.
    const own = taken && /Failed to load resource/.test(message.text());
    if (["error", "warn"].includes(message.type()) && !own) found.errors.push(message.text());
  });
  page.on("pageerror", (error) => found.errors.push(String(error)));
  page.on("request", (request) => {
    found.requests += 1;
    const { host: there, protocol } = new URL(request.url());
    if (there !== host && protocol !== "data:") found.elsewhere.push(request.url());
    if (request.isInterceptResolutionHandled()) return;
    const answer = taken?.(request);
    if (taken) void (answer ? request.respond(answer) : request.continue());
  });
  page.on("response", (response) => {
    found.bytes += Number(response.headers()["content-length"] ?? 0);
  });
  if (taken) await page.setRequestInterception(true);
  await page.goto(address, { waitUntil: "load" });
  found.sideways = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  const shoot = async (name, more = {}) => {
    if (values.out) await page.screenshot({ path: `${values.out}/${name}-${size}-${scheme}.png`, ...more });
  };
  if (REPORT) {
    await shoot("report", { fullPage: true });
    if (values.out && size === "desktop" && scheme === "light") await page.pdf({ path: `${values.out}/report.pdf`, preferCSSPageSize: true });
    await audit(page, found);
    await context.close();
    return found;
  }
  await page.waitForSelector("body[data-drawn]", { timeout: 30_000 });
  await page.waitForNetworkIdle({ idleTime: 300 });
  found.drawn_ms = Number(await page.$eval("body", (body) => body.dataset.drawn));
  found.table_ms = Number(await page.$eval("body", (body) => body.dataset.table));
  found.sparks = await page.$$eval(".fleet .row", (rows) => rows.length);
  found.banner = await page.$eval("#banner", (banner) => banner.textContent);
  found.freshness = await page.$eval("#freshness", (element) => element.textContent.trim());
  found.rollout = await page.$eval("#rollout", (element) => (element.hidden ? "" : element.innerText));
  found.sideways = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  await shoot(scene);
  if (scene === "well") {
    // With the keyboard alone: the first row opens, and its figures come.
    await page.focus(".fleet .row .open");
    await page.keyboard.press("Enter");
    await page.waitForSelector(".details:not([hidden]) .plot canvas", { timeout: 10_000 });
    found.opened = await page.$eval(".fleet .row .open", (button) => button.getAttribute("aria-expanded"));
    await page.focus("#charts .plot");
    await page.keyboard.press("ArrowLeft");
    found.moment = await page.$eval("#charts .moment", (element) => element.textContent);
    if (values.out) {
      await page.$eval("#charts", (section) => section.scrollIntoView({ block: "start" }));
      await new Promise((resolve) => setTimeout(resolve, 200));
      await shoot("charts");
    }
    await page.focus(".fleet .row .open");
    await page.$eval(".fleet .row", (row) => row.scrollIntoView({ block: "start" }));
    await new Promise((resolve) => setTimeout(resolve, 200));
    await shoot("row");
    const states = (rows) => Object.fromEntries(rows.map((row) => [row.querySelector(".open").textContent.trim(), row.querySelector(".badge").textContent]));
    found.states = await page.$$eval(".fleet .row", states);
    await page.click("label.check input");
    found.attention = await page.$$eval(".fleet .row", states);
    await page.click("label.check input");
    await page.type("#filter", "spark-137 serving");
    found.filtered = await page.$$eval(".fleet .row", (rows) => rows.length);
    await page.$eval("#filter", (input) => {
      input.value = "";
      input.dispatchEvent(new Event("input"));
    });
  }
  await audit(page, found);
  if (values.out && scene === "well") {
    await page.evaluate(() => scrollTo(0, document.body.scrollHeight));
    await shoot("end");
  }
  await context.close();
  return found;
}

async function audit(page, found) {
  await page.evaluate(axe);
  const result = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  found.axe = result.violations.map(({ id, help, nodes }) => `${id}: ${help} (${nodes.length}: ${nodes[0].html.slice(0, 160)} ${nodes[0].any[0]?.message ?? ""})`);
}

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"],
  env: { ...process.env, LC_ALL: "C.UTF-8" },
});
const all = [];
try {
  const every = Object.keys(SCENES).flatMap((scene) => Object.keys(SIZES).flatMap((size) => SCHEMES.map((scheme) => [scene, size, scheme])));
  const looks = values.only ? values.only.split(",").map((words) => words.split(":")) : every;
  for (const [scene, size, scheme] of looks) all.push(await look(browser, scene, size, scheme));
} finally {
  await browser.close();
}
process.stdout.write(`${JSON.stringify(all, null, 1)}\n`);
