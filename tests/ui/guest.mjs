// The same as flows.mjs with one real guest. Started by browser.py.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { api, BASE, launch, open, waitState } from "./page.mjs";

let browser;
before(async () => { browser = await launch(); });
after(async () => { await browser?.close(); });

test("a real guest from its creation to its deletion", async () => {
  const page = await open(browser, "/create");
  await page.getByLabel("Image", { exact: true }).fill("localhost/busybox:test");
  await page.getByLabel("Name", { exact: true }).fill("guest");
  await page.getByLabel("Memory").fill("256MB");
  await page.getByLabel("vCPUs").fill("1");
  await page.getByLabel("Command").fill('sh -c "echo hello from the guest; sleep 100000"');
  await page.getByRole("button", { name: "Create and boot" }).click();
  await page.getByRole("heading", { name: /^guest/ }).waitFor();
  await page.getByLabel("Boot phases").waitFor();
  await waitState(page, "Running");
  await page.getByText("Booting").waitFor();
  await page.getByLabel(/^CPU: /).waitFor(); // two samples of a real VMM
  await page.getByText("Initializing → Running").waitFor();

  await page.getByRole("tab", { name: "Operations" }).click();
  await page.getByRole("list", { name: "Phases of POST /instances" }).getByText("LaunchVmm").waitFor();

  await page.getByRole("tab", { name: "Logs" }).click();
  await page.getByText("hello from the guest").waitFor();

  await page.getByRole("tab", { name: "Terminal" }).click();
  await page.locator(".xterm-rows").getByText("#").first().waitFor();
  await page.keyboard.type("echo $((6*7)) $(stty size) > /tmp/typed; cat /tmp/typed\n");
  const typed = await page.locator(".xterm-rows").getByText(/^42 \d+ \d+/).first().innerText();
  const [, lines, columns] = typed.trim().split(" ").map(Number);
  assert.ok(lines > 10 && columns > 60, `the guest's terminal has ${lines} × ${columns}`);
  await page.keyboard.type("exit\n");
  await page.getByText("The program ended with 0").waitFor();

  await page.getByRole("tab", { name: "Files" }).click();
  await page.getByRole("button", { name: "tmp", exact: true }).click();
  await page.getByRole("button", { name: "typed", exact: true }).waitFor();
  const content = Buffer.from(Array.from({ length: 300_000 }, (_, at) => (at * 7 + (at >> 8)) & 255));
  await page.getByLabel("Upload files").setInputFiles({ name: "bytes.bin", mimeType: "application/octet-stream", buffer: content });
  await page.getByText("were written to /tmp").waitFor();
  const [download] = await Promise.all([page.waitForEvent("download"), page.getByRole("button", { name: "Download bytes.bin" }).click()]);
  assert.deepEqual(readFileSync(await download.path()), content);

  await page.getByRole("tab", { name: "Snapshots" }).click();
  await page.getByRole("button", { name: "Take snapshot" }).first().click();
  await page.getByLabel("Name").fill("guest-warm");
  await page.getByRole("dialog").getByRole("button", { name: "Take snapshot" }).click();
  const node = page.locator(".node").filter({ hasText: "guest-warm" });
  await node.getByRole("button", { name: "Fork" }).click();
  await page.getByLabel("Name of the fork").fill("fork");
  await page.getByRole("dialog").getByRole("button", { name: "Fork" }).click();
  await page.getByRole("heading", { name: /^fork/ }).waitFor();
  await waitState(page, "Running");
  await page.getByRole("tab", { name: "Files" }).click();
  await page.getByRole("button", { name: "tmp", exact: true }).click();
  await page.getByRole("button", { name: "bytes.bin", exact: true }).waitFor();

  await page.goto(`${BASE}/ui/usage`);
  await page.getByRole("region", { name: "Usage" }).getByRole("row").filter({ hasText: "guest" }).waitFor();
  await page.goto(`${BASE}/ui/host`);
  await page.getByRole("button", { name: "Check this host" }).click();
  await page.getByRole("region", { name: "Findings" }).getByText("running as root").waitFor();

  for (const name of ["fork", "guest"]) {
    await page.goto(`${BASE}/ui/instances/${name}`);
    await page.getByRole("button", { name: "Delete", exact: true }).click();
    await page.getByRole("dialog").getByRole("button", { name: "Delete" }).click();
    await page.getByText(`${name} was deleted`).waitFor();
  }
  assert.deepEqual(await api("GET", "/instances"), []);
  await page.done();
});
