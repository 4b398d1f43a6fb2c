// Frame times of the list of instances, as one line of JSON. Started by tests/bench/bench_ui.py.
import { frames, launch, open } from "./page.mjs";

const browser = await launch();
const page = await open(browser, "/instances");
await page.locator(".grid-body [role=row]").first().waitFor();
console.log(JSON.stringify(await frames(page, Number(process.env.SECONDS))));
await browser.close();
