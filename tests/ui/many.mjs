// A thousand instances whose states change fifty times a second: what the page holds and how busy it is. The numbers are
// printed; what is asserted is that the page's size does not depend on the number of instances.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { frames, launch, open } from "./page.mjs";

let browser;
before(async () => { browser = await launch(); });
after(async () => { await browser?.close(); });

test("a thousand instances are a page of some rows", async () => {
  const page = await open(browser, "/instances");
  await page.getByText(/^1,00\d instances/).waitFor();
  const measured = await frames(page, 10);
  console.log(`scrolling for 10 s: ${JSON.stringify(measured)} (milliseconds)`);
  assert.ok(measured.rows < 60, `${measured.rows} rows`);
  assert.ok(measured.nodes < 3000, `${measured.nodes} elements`);
  await page.getByLabel("Filter instances").fill("web-12");
  await page.getByText(/of 1,00\d instances/).waitFor();
  await page.done();
});
