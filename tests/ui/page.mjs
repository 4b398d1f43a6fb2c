// What the browser tests share: pages that are logged in, the API next to them, axe.
import assert from "node:assert/strict";
import * as fs from "node:fs";
import { createRequire } from "node:module";
import * as path from "node:path";

const require = createRequire(path.join(process.cwd(), "/"));
const { chromium } = require("playwright-core");
const AXE = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

export const BASE = process.env.BASE;
/** `all` has every scope, `read` only those for reading. */
export const tokens = JSON.parse(process.env.TOKENS);
const PATIENCE = Number(process.env.PATIENCE ?? 30) * 1000;

export const launch = () => chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });
export const must = (locator) => locator.first();

export async function api(method, at, body) {
  const answer = await fetch(BASE + at, {
    method, headers: { Authorization: `Bearer ${tokens.all}`, "Content-Type": "application/json" }, body: body && JSON.stringify(body),
  });
  const text = await answer.text();
  assert.ok(answer.ok, `${method} ${at}: ${text}`);
  return text ? JSON.parse(text) : undefined;
}

/** A page at `at`, with a session unless `token` is null. `page.done()` fails if the console had an error that is not
 *  in `page.expected`: a violation of the page's policy is one. */
export async function open(browser, at, token = tokens.all, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, acceptDownloads: true, ...options });
  context.setDefaultTimeout(PATIENCE);
  if (token) {
    const answer = await context.request.post(`${BASE}/ui/session`, { data: { token }, headers: { Origin: BASE } });
    assert.equal(answer.status(), 200);
  }
  const page = await context.newPage();
  const errors = [];
  page.expected = token ? [] : [/401/];
  page.on("console", (message) => { if (message.type() === "error") errors.push(message.text()); });
  page.on("pageerror", (error) => errors.push(String(error)));
  page.done = async () => {
    await context.close();
    assert.deepEqual(errors.filter((text) => !page.expected.some((pattern) => pattern.test(text))), []);
  };
  await page.goto(`${BASE}/ui${at}`);
  return page;
}

export const waitState = (page, state) => page.locator("h1 .state").filter({ hasText: state }).waitFor();

/** Findings of axe that are serious or critical. */
export async function findings(page, name) {
  // Through the debugger, since the page's policy admits no script of ours.
  await page.evaluate(AXE);
  const found = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  return found.violations.filter((one) => ["serious", "critical"].includes(one.impact))
    .map((one) => `${name}: ${one.id}: ${one.help}: ${one.nodes.slice(0, 3).map((node) => `${node.html.slice(0, 120)} ${node.any[0]?.message ?? ""}`).join(" | ")}`);
}

/** Scrolls the list of instances for some seconds: times between frames in milliseconds, and what the page holds. */
export const frames = (page, seconds) => page.evaluate(async (limit) => {
  const body = document.querySelector(".grid-body");
  const times = [];
  let busy = 0;
  new PerformanceObserver((list) => { for (const entry of list.getEntries()) busy += entry.duration; }).observe({ type: "longtask" });
  const begin = performance.now();
  let last = begin;
  while (performance.now() - begin < limit) {
    body.scrollTop = ((performance.now() - begin) * 4) % (body.scrollHeight - body.clientHeight);
    const now = await new Promise(requestAnimationFrame);
    times.push(now - last);
    last = now;
  }
  times.sort((a, b) => a - b);
  const at = (share) => Math.round(times[Math.floor(times.length * share)] * 10) / 10;
  return { frames: times.length, median: at(0.5), p95: at(0.95), worst: at(0.999), longTasks: Math.round(busy), rows: document.querySelectorAll("[role=row]").length, nodes: document.querySelectorAll("*").length };
}, 1000 * seconds);
