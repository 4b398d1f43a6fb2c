// A thousand instances whose states change fifty times a second: what the page holds and how busy it is. The numbers are
// printed; what is asserted is that the page's size does not depend on the number of instances.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { launch, open } from "./page.mjs";

let browser;
before(async () => { browser = await launch(); });
after(async () => { await browser?.close(); });

test("a thousand instances are a page of some rows", async () => {
  const page = await open(browser, "/instances");
  await page.getByText(/^1,00\d instances/).waitFor();
  const measured = await page.evaluate(async () => {
    const body = document.querySelector(".grid-body");
    const times = [];
    let busy = 0;
    new PerformanceObserver((list) => { for (const entry of list.getEntries()) busy += entry.duration; }).observe({ type: "longtask" });
    const begin = performance.now();
    let last = begin;
    while (performance.now() - begin < 10_000) {
      body.scrollTop = ((performance.now() - begin) * 4) % (body.scrollHeight - body.clientHeight);
      const now = await new Promise(requestAnimationFrame);
      times.push(now - last);
      last = now;
    }
    times.sort((a, b) => a - b);
    const at = (share) => Math.round(times[Math.floor(times.length * share)] * 10) / 10;
    return { frames: times.length, median: at(0.5), p95: at(0.95), worst: at(0.999), longTasks: Math.round(busy), rows: document.querySelectorAll("[role=row]").length, nodes: document.querySelectorAll("*").length };
  });
  console.log(`scrolling for 10 s: ${JSON.stringify(measured)} (milliseconds)`);
  assert.ok(measured.rows < 60, `${measured.rows} rows`);
  assert.ok(measured.nodes < 3000, `${measured.nodes} elements`);
  await page.getByLabel("Filter instances").fill("web-12");
  await page.getByText(/of 1,00\d instances/).waitFor();
  await page.done();
});
