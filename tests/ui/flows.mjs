// What people do in the web UI, in Chromium, on the fakes of world.py. Started by browser.py, which gives BASE and TOKENS.
import assert from "node:assert/strict";
import * as fs from "node:fs";
import { after, before, test } from "node:test";
import { api, findings, launch, must, open, tokens, waitState, BASE } from "./page.mjs";

let browser;
before(async () => { browser = await launch(); });
after(async () => { await browser?.close(); });

test("a wrong token is refused, the right one opens the UI, a logout closes it", async () => {
  const page = await open(browser, "/", null);
  await page.getByLabel("API token").fill("nonsense");
  await page.getByRole("button", { name: "Log in" }).click();
  await page.getByRole("alert").filter({ hasText: "not valid" }).waitFor();
  page.expected.push(/401/);
  await page.getByLabel("API token").fill(tokens.all);
  await page.keyboard.press("Enter");
  await page.getByRole("heading", { name: "Instances" }).waitFor();
  assert.equal(await page.evaluate(() => document.cookie), "", "a script can read the session's cookie");
  await page.getByRole("button", { name: "Log out" }).click();
  await page.getByRole("heading", { name: "Log in to Hypeman" }).waitFor();
  await page.reload();
  await page.getByRole("heading", { name: "Log in to Hypeman" }).waitFor();
  await page.done();
});

test("a link logs in once and does not stay in the address", async () => {
  const made = await api("POST", "/ui/links");
  const page = await open(browser, made.path.slice(3), null);
  await page.getByRole("heading", { name: "Instances" }).waitFor();
  assert.ok(!page.url().includes("link"), page.url());
  await page.done();
  const second = await open(browser, made.path.slice(3), null);
  second.expected.push(/401/);
  await second.getByText("was used already").waitFor();
  await second.done();
});

test("the list filters, is walked by keys, and follows what others do", async () => {
  const page = await open(browser, "/instances");
  await page.getByRole("link", { name: "agent", exact: true }).waitFor();
  await page.keyboard.press("/");
  await page.keyboard.type("env=production postgres");
  const rows = page.getByRole("row");
  await page.getByText(/of 4\d instances/).waitFor();
  assert.ok((await rows.count()) < 10);
  await page.getByLabel("Filter instances").fill("redis");
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("Enter");
  await page.getByRole("heading", { name: /^redis/ }).waitFor();
  await page.getByRole("link", { name: "Instances" }).first().click();
  await page.getByLabel("Filter instances").fill("worker");
  const row = page.getByRole("row").filter({ has: page.getByRole("link", { name: "worker", exact: true }) });
  await row.getByText("Running").waitFor();
  await api("POST", "/instances/worker/standby");
  await row.getByText("Standby").waitFor();
  await page.done();
});

test("create, watch it boot, use its terminal, logs and files, snapshot, fork, delete", async () => {
  const page = await open(browser, "/create");
  await page.getByLabel("Image", { exact: true }).fill("docker.io/library/nginx:alpine");
  await page.getByLabel("Name", { exact: true }).fill("shop");
  await page.getByLabel("Environment").fill("GREETING=hello world");
  await page.getByLabel("Ports").fill("8088:80");
  const line = page.locator(".code pre");
  assert.match(await line.innerText(), /hypeman run --name shop -e 'GREETING=hello world' -p 8088:80 docker.io\/library\/nginx:alpine/);
  await page.getByRole("button", { name: "curl" }).click();
  assert.match(await line.innerText(), /"host_port": 8088/);
  await page.getByRole("button", { name: "Create and boot" }).click();
  await page.getByText("Booting").waitFor();
  await waitState(page, "Running");

  await page.getByRole("tab", { name: "Terminal" }).click();
  await page.getByText("web:/#").first().waitFor();
  await page.keyboard.type("echo it-works\n");
  await page.locator(".xterm-rows").getByText(/^it-works/).waitFor();
  const columns = (await page.locator(".xterm-rows").boundingBox()).width;
  await page.setViewportSize({ width: 900, height: 700 });
  await page.waitForFunction((before) => document.querySelector(".xterm-rows").getBoundingClientRect().width < before, columns);

  await page.getByRole("tab", { name: "Logs" }).click();
  await page.getByText("ready for start up").waitFor();
  await page.getByLabel("Search the log").fill("linux version");
  await page.getByText("1 of 2").waitFor();

  await page.getByRole("tab", { name: "Files" }).click();
  await page.getByRole("button", { name: "tmp" }).first().click();
  const content = Buffer.from("a file\n".repeat(20_000));
  await page.getByLabel("Upload files").setInputFiles({ name: "notes.txt", mimeType: "text/plain", buffer: content });
  await page.getByText("were written to /tmp").waitFor();
  const [download] = await Promise.all([page.waitForEvent("download"), page.getByRole("button", { name: "Download notes.txt" }).click()]);
  assert.deepEqual(fs.readFileSync(await download.path()), content);

  await page.getByRole("tab", { name: "Snapshots" }).click();
  await page.getByRole("button", { name: "Take snapshot" }).first().click();
  await page.getByLabel("Name").fill("shop-warm");
  await page.getByRole("dialog").getByRole("button", { name: "Take snapshot" }).click();
  const node = page.locator(".node").filter({ hasText: "shop-warm" });
  await node.getByRole("button", { name: "Fork" }).click();
  await page.getByLabel("Name of the fork").fill("shop-trial");
  await page.getByRole("dialog").getByRole("button", { name: "Fork" }).click();
  await page.getByRole("heading", { name: /^shop-trial/ }).waitFor();
  await page.goBack();
  await page.locator(".tree li li li").getByText("shop-trial").waitFor();
  await node.getByRole("button", { name: "Restore" }).click();
  await page.getByRole("dialog").getByRole("button", { name: "Restore" }).click();
  await page.getByText("was restored to shop-warm").waitFor();

  await page.getByRole("button", { name: "Delete", exact: true }).click();
  await page.getByRole("dialog").getByRole("button", { name: "Delete" }).click();
  await page.getByRole("heading", { name: "Instances" }).waitFor();
  assert.equal((await api("GET", "/instances")).some((one) => one.name === "shop"), false);
  await page.done();
});

test("events from before and new ones are listed, and filtered", async () => {
  const page = await open(browser, "/events");
  await page.getByText("created, image docker.io/library/nginx:alpine").first().waitFor();
  await api("POST", "/instances/redis/standby");
  await page.getByText("Running → Standby").first().waitFor();
  await page.getByLabel("Kind").selectOption("volume");
  await page.getByText("0 events").waitFor();
  await page.done();
});

test("requests that wait for approval are counted on every page, and decided once or for a time", async () => {
  const page = await open(browser, "/instances");
  const count = page.getByRole("navigation").getByLabel("2 waiting");
  await count.click();
  const held = page.getByRole("list", { name: "Waiting for approval" }).getByRole("listitem");
  const created = held.filter({ hasText: "POST https://api.github.com/repos/acme/site/pulls" });
  await created.getByRole("combobox").selectOption("10m");
  await created.getByRole("button", { name: "Approve" }).click();
  await page.getByText("Approved: POST api.github.com").waitFor();
  await created.waitFor({ state: "detached" });
  await page.getByRole("navigation").getByLabel("1 waiting").waitFor();

  await held.getByRole("link", { name: "agent" }).click();
  const records = page.getByRole("region", { name: "Requests" }).getByRole("row");
  await records.filter({ hasText: "approved by writes" }).waitFor();
  await page.getByRole("tab", { name: "Egress" }).getByLabel("1 waiting").waitFor();
  await held.getByRole("button", { name: "Deny" }).click();
  await records.filter({ hasText: "not approved" }).filter({ hasText: "DELETE" }).waitFor();
  await held.waitFor({ state: "detached" });
  await page.getByRole("tab", { name: "Overview" }).click();
  await held.filter({ hasText: "DELETE" }).waitFor(); // the guest repeats it
  await held.getByRole("button", { name: "Approve" }).click();
  await page.getByRole("navigation").getByLabel("waiting").waitFor({ state: "detached" });
  assert.deepEqual(await api("GET", "/egress/approvals"), []);
  await page.done();
});

test("an operation can be tried on the page of the API, with the session and with a token", async () => {
  const page = await open(browser, "/instances");
  await page.goto(`${BASE}/swagger`);
  const operation = page.locator("details").filter({ has: page.locator("summary", { hasText: /^GET\/instances\/\{id\}One/ }) });
  await operation.locator("summary").click();
  await operation.getByRole("button", { name: "Try it" }).click();
  await operation.getByLabel("id *").fill("web");
  await operation.getByRole("button", { name: "Send" }).click();
  await operation.getByText('"name": "web"').waitFor();
  await page.getByLabel("Token", { exact: true }).fill("nonsense");
  page.expected.push(/401/);
  await operation.getByRole("button", { name: "Send" }).click();
  await operation.getByText("→ 401").waitFor();
  await page.done();
});

test("images are pulled with the progress of each layer", async () => {
  const page = await open(browser, "/images");
  await page.getByRole("button", { name: "Pull" }).click();
  await page.getByLabel("Reference").fill("quay.io/acme/new:1");
  await page.getByRole("dialog").getByRole("button", { name: "Pull" }).click();
  await page.locator(".layers li").first().waitFor();
  await page.getByRole("row").filter({ hasText: "quay.io/acme/new:1" }).getByText("ready").waitFor();
  await page.done();
});

test("what the token may not do is shown with the reason, and does nothing", async () => {
  const page = await open(browser, "/instances/web", tokens.read);
  const stop = page.getByRole("button", { name: "Stop" });
  assert.equal(await stop.getAttribute("aria-disabled"), "true");
  assert.match(await stop.getAttribute("title"), /lacks the scope instance:write/);
  await stop.click({ force: true });
  await page.getByRole("tab", { name: "Terminal" }).click();
  await page.getByText("lacks the scope instance:write").waitFor();
  assert.equal((await api("GET", "/instances/web")).state, "Running");
  await page.done();
});

test("the palette finds, and letters go to pages", async () => {
  const page = await open(browser, "/instances");
  await page.getByRole("link", { name: "agent", exact: true }).waitFor();
  await page.keyboard.press("Control+k");
  await page.getByRole("option", { name: /^postgres/ }).first().waitFor();
  await page.keyboard.type("postgr");
  await page.keyboard.press("Enter");
  await page.getByRole("heading", { name: /^postgres/ }).waitFor();
  await page.keyboard.press("g");
  await page.keyboard.press("v");
  await page.getByRole("heading", { name: "Volumes" }).waitFor();
  await page.keyboard.press("?");
  await page.getByRole("dialog", { name: "Keyboard shortcuts" }).waitFor();
  await page.keyboard.press("Escape");
  const theme = () => page.evaluate(() => document.documentElement.dataset.theme);
  const before = await theme();
  await page.getByRole("button", { name: `${before === "dark" ? "Light" : "Dark"} theme` }).click();
  assert.notEqual(await theme(), before);
  await page.done();
});

test("what an operation spent its time on is a timeline, and a failed one says why", async () => {
  const page = await open(browser, "/instances/runner/operations");
  await page.getByText("No operations").waitFor();
  await api("POST", "/instances/runner/standby");
  const operation = page.locator("details").filter({ hasText: "/standby" });
  const phases = operation.getByRole("list", { name: /Phases of POST/ }).getByRole("listitem");
  await phases.filter({ hasText: "SaveMemory" }).waitFor();
  const bars = await phases.evaluateAll((items) => Object.fromEntries(items.map((item) => {
    const bar = item.querySelector("i").getBoundingClientRect();
    return [item.querySelector(".phase-name").textContent, [bar.left, bar.right]];
  })));
  assert.ok(bars.SaveMemory[0] >= bars.PauseVm[1] - 1, "SaveMemory is drawn after PauseVm");
  assert.ok(bars.SaveMemory[1] - bars.SaveMemory[0] > 3 * (bars.PauseVm[1] - bars.PauseVm[0]), "bars are to scale");
  assert.ok(bars.standby[0] <= bars.PauseVm[0] && bars.standby[1] >= bars.SaveMemory[1] - 1, "standby has both phases");
  const refused = await fetch(`${BASE}/instances/runner/standby`, { method: "POST", headers: { Authorization: `Bearer ${tokens.all}` } });
  assert.equal(refused.status, 409);
  await page.getByRole("tab", { name: "Overview" }).click();
  await page.getByRole("tab", { name: "Operations" }).click();
  await page.locator("details").filter({ hasText: "failed" }).getByText("runner is Standby", { exact: false }).first().waitFor();
  await page.done();
});

test("usage of one instance, of all, by tag, and whether the ledger is as it was written", async () => {
  const page = await open(browser, "/instances/web");
  const used = page.getByRole("region", { name: "Used so far" });
  await used.getByText("1.00 hours").waitFor();
  await used.getByRole("link", { name: "All instances" }).click();
  const rows = page.getByRole("region", { name: "Usage" }).getByRole("row");
  await rows.filter({ hasText: "old-report deleted" }).waitFor();
  await rows.filter({ hasText: "Total" }).waitFor();
  await page.getByRole("button", { name: "By tag" }).click();
  await page.getByLabel("Tag").selectOption("team");
  for (const team of ["core", "data", "ml"]) await rows.filter({ hasText: new RegExp(`^${team}`) }).waitFor();
  assert.equal(await rows.count(), 6); // head, three teams, those without it, total
  await page.getByRole("button", { name: "Verify the ledger" }).click();
  await page.getByRole("status").filter({ hasText: "up to block 1" }).waitFor();
  await page.done();
});

test("the host: what it has, its allocations, its doctor, and memory that would be reclaimed", async () => {
  const page = await open(browser, "/host");
  await page.getByRole("region", { name: "Allocations" }).getByRole("link", { name: "web", exact: true }).waitFor();
  await page.getByLabel(/^Memory: .* of 256 GB/).waitFor();
  await page.getByRole("button", { name: "Check this host" }).click();
  const findings = page.getByRole("region", { name: "Findings" }).getByRole("row");
  await findings.filter({ hasText: "running as root" }).waitFor();
  await page.getByRole("button", { name: "Reclaim memory" }).click();
  await page.getByLabel("All guests together").fill("2GB");
  await page.getByRole("button", { name: "Show the plan" }).click();
  const planned = page.getByRole("region", { name: "Plan" }).getByRole("row").filter({ hasText: "web" });
  assert.match(await planned.innerText(), /4 GB\s+2 GB/); // has, keeps
  await page.keyboard.press("Escape");
  assert.match(await findings.nth(1).innerText(), /warn[^]*no \/dev\/kvm[^]*modprobe kvm_intel/);
  await page.done();
  const viewer = await open(browser, "/host", tokens.read);
  const check = viewer.getByRole("button", { name: "Check this host" });
  assert.match(await check.getAttribute("title"), /lacks the scope resource:write/);
  await viewer.done();
});

test("a host of a denied request is allowed by a rule in front of the others", async () => {
  const page = await open(browser, "/instances/agent/egress");
  await page.getByRole("button", { name: "Denied", exact: false }).first().click();
  await page.getByRole("button", { name: "Allow paste.example.net" }).first().click();
  await page.getByRole("dialog").getByRole("button", { name: "Allow" }).click();
  await page.getByRole("region", { name: "Rules" }).getByRole("row").nth(1).filter({ hasText: "paste.example.net" }).waitFor();
  const rules = (await api("GET", "/instances/agent/egress")).access.rules;
  assert.deepEqual([rules[0].action, rules[0].hosts, rules.length], ["allow", ["paste.example.net"], 4]);
  await page.done();
});

test("a build has its log, a device the reason why it stays with the host", async () => {
  const page = await open(browser, "/builds");
  await page.getByRole("link", { name: "team/shop:v3" }).click();
  await page.getByRole("log", { name: "Log of the build" }).getByText("#1 FROM scratch").waitFor();
  await page.goto(`${BASE}/ui/devices`);
  const devices = page.getByRole("region", { name: "Devices of the host" }).getByRole("row");
  await devices.filter({ hasText: "E810-C" }).getByText("it is the host's uplink").waitFor();
  await page.getByLabel("Show those that cannot be passed through").uncheck();
  await devices.filter({ hasText: "E810-C" }).waitFor({ state: "detached" });
  await page.done();
});

test("text is copied from the terminal and pasted into it", async () => {
  const page = await open(browser, "/instances/web/terminal", tokens.all, { permissions: ["clipboard-read", "clipboard-write"] });
  const screen = page.locator(".xterm-rows");
  await screen.getByText("web:/#").first().waitFor();
  await page.evaluate(() => navigator.clipboard.writeText("echo pasted-text"));
  await page.keyboard.press("Control+v");
  await page.keyboard.press("Enter");
  const printed = screen.getByText(/^pasted-text/);
  await printed.waitFor();
  await printed.dblclick({ position: { x: 20, y: 5 }, force: true }); // xterm has a layer above its text
  await page.keyboard.press("Control+c");
  await page.waitForFunction(async () => (await navigator.clipboard.readText()).includes("pasted"));
  assert.match(await page.evaluate(() => navigator.clipboard.readText()), /^pasted-text/);
  await page.done();
});

test("an ingress and ports are made for an instance, and shown with it", async () => {
  const page = await open(browser, "/ingresses");
  await page.getByRole("button", { name: "Create" }).click();
  const dialog = page.getByRole("dialog");
  await dialog.getByLabel("Name", { exact: true }).fill("cache");
  await dialog.getByLabel("Host name").fill("cache.example.com");
  await dialog.getByLabel("Instance").fill("redis");
  await dialog.getByLabel("Port of the guest").fill("6379");
  await dialog.getByRole("button", { name: "Create" }).click();
  await page.getByRole("row").filter({ hasText: "cache.example.com" }).getByRole("link", { name: "redis" }).click();
  await page.getByRole("tab", { name: "Network" }).click();
  await page.getByRole("region", { name: "Host names" }).getByText("cache.example.com:80").waitFor();
  await page.getByRole("button", { name: "Change" }).click();
  await page.getByRole("textbox", { name: "Ports" }).fill("[::1]:7000-7009:6000-6009/udp");
  await page.getByRole("button", { name: "Publish" }).click();
  await page.getByRole("region", { name: "Published ports" }).getByText("::1:7000–7009").waitFor();
  await page.getByRole("button", { name: "Change" }).click(); // as it is: nothing is lost
  await page.getByRole("button", { name: "Publish" }).click();
  await page.getByRole("dialog").waitFor({ state: "detached" });
  const [port] = (await api("GET", "/instances/redis")).ports;
  assert.deepEqual([port.host_address, port.host_port, port.guest_port, port.count, port.protocol], ["::1", 7000, 6000, 10, "udp"]);
  await page.done();
});

test("groups of guests are chosen where an instance is made, and shown with it", async () => {
  const page = await open(browser, "/create");
  await page.getByLabel("Image", { exact: true }).fill("docker.io/library/nginx:alpine");
  await page.getByLabel("Name", { exact: true }).fill("apart");
  await page.getByLabel("Groups").fill("front, no/good");
  await page.getByRole("button", { name: "Create and boot" }).click();
  assert.equal(await page.getByLabel("Groups").evaluate((field) => field.validity.patternMismatch), true);
  await page.getByLabel("Groups").fill("front, back");
  assert.match(await page.locator(".code pre").innerText(), /--network-group front \\?\s*--network-group back/);
  await page.getByRole("button", { name: "Create and boot" }).click();
  await page.getByRole("heading", { name: /^apart/ }).waitFor();
  await page.getByRole("tab", { name: "Network" }).click();
  await page.getByText("front, back").waitFor();
  assert.deepEqual((await api("GET", "/instances/apart")).network.groups, ["front", "back"]);
  await page.goto(`${BASE}/ui/create`);
  await page.locator('#groups option[value="back"]').waitFor({ state: "attached" });
  await api("DELETE", "/instances/apart");
  await page.done();
});

test("a session that ends says so", async () => {
  const page = await open(browser, "/volumes");
  page.expected.push(/401/);
  await page.getByRole("heading", { name: "Volumes" }).waitFor();
  await page.context().clearCookies();
  await page.getByRole("link", { name: "Images" }).click();
  await page.getByRole("alert").filter({ hasText: "Your session has ended" }).waitFor();
  await page.getByLabel("API token").fill(tokens.all);
  await page.keyboard.press("Enter");
  await page.getByRole("heading", { name: "Images" }).waitFor();
  await page.done();
});

test("a server that goes away is shown, and what could not be read is read when it is back", async () => {
  const page = await open(browser, "/volumes");
  page.expected.push(/ERR_|Failed to load/);
  await page.getByRole("heading", { name: "Volumes" }).waitFor();
  await page.locator(".live.on").waitFor();
  const away = (route) => route.abort("connectionrefused");
  await page.route(/\/(images|events|instances|stats|ui\/session)(\?|$)/, away);
  await page.getByRole("link", { name: "Images" }).click();
  await page.getByRole("alert").filter({ hasText: "The server does not answer" }).waitFor();
  assert.equal(await page.getByText("No images yet").count(), 0, "an error is no empty list");
  await page.unroute(/\/(images|events|instances|stats|ui\/session)(\?|$)/, away);
  await page.getByRole("alert").filter({ hasText: "The server does not answer" }).waitFor({ state: "detached" });
  await page.done();
});

for (const [status, message] of [[403, "this token lacks a scope"], [429, "too many requests"], [500, "something is wrong"]]) {
  test(`a refusal with ${status} is shown as it is, and not as an empty list`, async () => {
    const page = await open(browser, "/instances/web/network");
    page.expected.push(/Failed to load/);
    await page.getByRole("region", { name: "Host names" }).or(page.getByText("No host names")).first().waitFor();
    const refuse = (route) => route.fulfill({ status, contentType: "application/json", body: JSON.stringify({ code: "x", message }) });
    await page.route(/\/(ingresses|volumes|images|devices|builds|usage|resources|instances\/gone)(\?|$)/, refuse);
    for (const path of ["/instances/web/network", "/volumes", "/images", "/ingresses", "/builds", "/instances/gone"]) {
      await page.goto(`${BASE}/ui${path}`);
      await page.getByText(message).first().waitFor();
      for (const lie of [/^No (builds|images|ingresses|volumes)( yet)?$/, "No host names", "Instance not found"])
        assert.equal(await page.getByText(lie).count(), 0, `${path}: ${lie}`);
    }
    await page.done();
  });
}

test("the longest names fit", async () => {
  const name = `long${"-name".repeat(11)}`.slice(0, 63);
  await api("POST", "/instances", { name, image: `docker.io/${"deep/".repeat(30)}nginx:alpine` });
  for (const width of [1280, 390]) {
    const page = await open(browser, `/instances/${name}`, tokens.all, { viewport: { width, height: 800 } });
    await page.getByRole("heading", { name }).waitFor();
    const [content, shown] = await page.evaluate(() => { const main = document.querySelector("main"); return [main.scrollWidth, main.clientWidth]; });
    assert.ok(content <= shown, `${width}: the page is ${content} wide where ${shown} fit`);
    await page.done();
  }
  await api("DELETE", `/instances/${name}`);
});

const PATHS = ["/instances", "/instances/web", "/instances/web/logs", "/instances/web/terminal", "/instances/web/files", "/instances/web/network",
  "/instances/web/volumes", "/instances/web/snapshots", "/instances/agent/egress", "/instances/web/operations", "/instances/web/settings", "/create", "/images", "/builds", "/volumes",
  "/ingresses", "/approvals", "/devices", "/usage", "/host", "/events", "/nowhere"];

for (const colorScheme of ["light", "dark"]) {
  test(`axe has no serious finding on any page, ${colorScheme}`, async () => {
    const login = await open(browser, "/", null, { colorScheme });
    login.expected.push(/401/);
    assert.deepEqual(await findings(login, "login"), []);
    await login.done();
    const page = await open(browser, "/instances", tokens.all, { colorScheme });
    const bad = [];
    for (const path of PATHS) {
      await page.goto(`${BASE}/ui${path}`);
      await page.locator("h1, h2").first().waitFor();
      await page.waitForLoadState("networkidle", { timeout: 1500 }).catch(() => {});
      bad.push(...await findings(page, path));
    }
    await page.keyboard.press("Control+k");
    bad.push(...await findings(page, "palette"));
    assert.deepEqual(bad, []);
    await page.done();
  });
}

test("a page on a phone has nothing that is wider than it", async () => {
  const page = await open(browser, "/instances", tokens.all, { viewport: { width: 390, height: 844 } });
  for (const path of PATHS) {
    await page.goto(`${BASE}/ui${path}`);
    await page.locator("h1, h2").first().waitFor();
    await page.waitForTimeout(300);
    assert.ok(await page.evaluate(() => document.querySelector("main").scrollWidth <= document.querySelector("main").clientWidth), path);
  }
  await must(page.getByRole("button", { name: "Menu" })).click();
  await page.getByRole("link", { name: "Images" }).click();
  await page.getByRole("heading", { name: "Images" }).waitFor();
  await page.done();
});
