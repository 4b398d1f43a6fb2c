// Pictures of every page at three widths in both themes: node tests/ui/pictures.mjs FOLDER [name…], with the server of
// world.py at BASE (and its TOKEN), in a folder that has node_modules (build/ui).
import { createRequire } from "node:module";
import * as fs from "node:fs";
import * as path from "node:path";

const { chromium } = createRequire(path.join(process.cwd(), "/"))("playwright-core");
const [folder, ...only] = process.argv.slice(2);
const { BASE = "http://localhost:8080", TOKEN, CHROMIUM = "/usr/bin/chromium" } = process.env;
const WIDTHS = { wide: [1440, 900], readme: [1200, 720], medium: [1024, 768], phone: [390, 844] };
const PAGES = {
  login: ["/login", async () => {}],
  instances: ["/instances", (page) => page.waitForTimeout(Number(process.env.WAIT ?? 9000))],
  instance: ["/instances/web", (page) => page.waitForTimeout(Number(process.env.WAIT ?? 9000))],
  logs: ["/instances/web/logs", async (page) => { await page.getByLabel("Search the log").fill("GET /assets"); await page.waitForTimeout(900); }],
  terminal: ["/instances/web/terminal", async (page) => {
    await page.locator(".xterm-screen").click();
    for (const line of ["uname -a", "free -m", "df -h /"]) { await page.keyboard.type(line + "\n"); await page.waitForTimeout(300); }
  }],
  files: ["/instances/web/files", (page) => page.waitForTimeout(500)],
  network: ["/instances/web/network", async () => {}],
  snapshots: ["/instances/web/snapshots", (page) => page.waitForTimeout(500)],
  egress: ["/instances/agent/egress", (page) => page.waitForTimeout(700)],
  settings: ["/instances/web/settings", async () => {}],
  create: ["/create?image=docker.io/library/nginx:alpine", async (page) => {
    await page.getByLabel("Name", { exact: true }).fill("shop");
    await page.getByLabel("Ports").fill("8080:80");
    await page.getByLabel("Environment").fill("MODE=production");
  }],
  images: ["/images", async () => {}],
  volumes: ["/volumes", async () => {}],
  ingresses: ["/ingresses", async () => {}],
  approvals: ["/approvals", async () => {}],
  builds: ["/builds", async () => {}],
  devices: ["/devices", async () => {}],
  operations: ["/instances/web/operations", async () => {}],
  usage: ["/usage", async () => {}],
  host: ["/host", async () => {}],
  events: ["/events", async () => {}],
  palette: ["/instances", async (page) => { await page.keyboard.press("Control+k"); await page.keyboard.type("we"); await page.waitForTimeout(200); }],
};

const browser = await chromium.launch({ executablePath: CHROMIUM, args: ["--no-sandbox"] });
fs.mkdirSync(folder, { recursive: true });
const widths = (process.env.WIDTH ?? "wide,medium,phone").split(",");
const themes = (process.env.THEME ?? "light,dark").split(",");
await Promise.all(widths.flatMap((width) => themes.map(async (theme) => {
  const [w, h] = WIDTHS[width];
  const context = await browser.newContext({ viewport: { width: w, height: h }, colorScheme: theme, deviceScaleFactor: Number(process.env.SCALE ?? 1) });
  const page = await context.newPage();
  page.on("console", (message) => { if (["error", "warning"].includes(message.type())) console.log(width, theme, message.text()); });
  page.on("pageerror", (error) => console.log(width, theme, String(error)));
  for (const [name, [at, prepare]] of Object.entries(PAGES)) {
    if (only.length && !only.includes(name)) continue;
    try {
      if (name !== "login") await context.request.post(`${BASE}/ui/session`, { data: { token: TOKEN }, headers: { Origin: BASE } });
      await page.goto(`${BASE}/ui${at}`);
      await page.waitForTimeout(700);
      await prepare(page);
      await page.screenshot({ path: path.join(folder, `${name}-${width}-${theme}.png`) });
    } catch (error) {
      console.log(name, width, theme, String(error).slice(0, 300));
    }
  }
  await context.close();
})));
await browser.close();
