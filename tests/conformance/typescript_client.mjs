// Every method of the published TypeScript SDK, once.
//
//     node typescript_client.mjs PACKAGE URL TOKEN     run by tests/conformance/sdks.py
//
// Prints {"failed": {method: error}, "unused": [methods that are not called]}; see python_client.py, which it follows.

import { createRequire } from "node:module";
import { gzipSync } from "node:zlib";

const [home, url, token] = process.argv.slice(2);
const require = createRequire(`${home}/package.json`);
const sdk = require("@onkernel/hypeman");
const client = new sdk.default({ baseURL: url, apiKey: token, maxRetries: 0 });
const failed = {};
const used = new Set();

// Names of all methods of the client, such as instances.volumes.attach.
function* methods(resource, path = "") {
  const prototype = Object.getPrototypeOf(resource);
  for (const name of Object.getOwnPropertyNames(prototype)) {
    if (path && name !== "constructor" && !name.startsWith("_")) yield path + name;
  }
  for (const [name, found] of Object.entries(resource)) {
    if (name !== "_client" && found && found._client === client) yield* methods(found, `${path}${name}.`);
  }
}

// The response of a method; undefined if it failed, which is noted. 501 is an answer.
async function call(name, ...args) {
  used.add(name);
  const parts = name.split(".");
  const last = parts.pop();
  try {
    const owner = parts.reduce((found, part) => found[part], client);
    const answer = await owner[last](...args);
    if (answer && answer[Symbol.asyncIterator]) for await (const _ of answer);
    return answer;
  } catch (error) {
    if (error.status !== 501) failed[name] = String(error);
  }
}

await call("health.check");
await call("capabilities.get");
await call("resources.get");
await call("resources.reclaimMemory", { reclaim_bytes: 0, dry_run: true });

await call("images.create", { name: "nginx", tags: { a: "b" } });
await call("images.list", { tags: { a: "b" } });
await call("images.get", "alpine");
await call("images.tag", "alpine", { target: "alpine:copy" });
await call("images.delete", "docker.io/library/nginx:latest");

await call("instances.create", { name: "made", image: "alpine", vcpus: 1, size: "512MB", tags: { team: "x" } });
await call("instances.list", { state: "Running", tags: { team: "x" } });
await call("instances.get", "web");
await call("instances.update", "web", { ttl: "1h" });
await call("instances.wait", "web", { state: "Running", timeout: "1s" });
await call("instances.logs", "web", { tail: 1, follow: false });
await call("instances.stat", "web", { path: "/etc" });
await call("instances.stats", "web");
await call("instances.volumes.attach", "data", { id: "web", mount_path: "/data", readonly: true });
await call("instances.volumes.detach", "data", { id: "web" });
await call("instances.autoStandby.status", "web");
await call("instances.autoStandby.hold", "web");
await call("instances.snapshotSchedule.update", "web", { interval: "1h", retention: { max_count: 2 } });
await call("instances.snapshotSchedule.get", "web");
await call("instances.snapshotSchedule.delete", "web");
await call("instances.standby", "web");
await call("instances.restore", "web");
const snapshot = (await call("instances.snapshots.create", "web", { kind: "Standby", name: "first" }))?.id ?? "none";
await call("instances.snapshots.restore", snapshot, { id: "web", target_state: "Running" });
await call("instances.fork", "web", { name: "forked", from_running: true });
await call("instances.stop", "web");
await call("instances.start", "web", { cmd: ["true"] });
await call("instances.delete", "made", { graceful_shutdown: false });

await call("snapshots.list", { kind: "Standby", name: "first" });
await call("snapshots.get", snapshot);
await call("snapshots.fork", snapshot, { name: "again", target_state: "Running" });
await call("snapshots.delete", snapshot);

await call("volumes.create", { name: "more", size_gb: 1, id: "more" });
await call("volumes.createFromArchive", gzipSync(""), { name: "filled", size_gb: 1 });
await call("volumes.list", { tags: { a: "b" } });
await call("volumes.get", "more");
await call("volumes.delete", "more");

await call("devices.listAvailable");
const device = (await call("devices.create", { pci_address: "0000:03:00.0", name: "card" }))?.id ?? "none";
await call("devices.list");
await call("devices.retrieve", device);
await call("devices.delete", device);

const rule = { match: { hostname: "a.example.com" }, target: { instance: "web", port: 80 } };
const ingress = (await call("ingresses.create", { name: "front", rules: [rule] }))?.id ?? "none";
await call("ingresses.list");
await call("ingresses.get", ingress);
await call("ingresses.delete", ingress);

const builder = (await call("builders.create", { name: "fast", id: "fast", disk_size_gb: 1 }))?.id ?? "fast";
await call("builders.list");
await call("builders.get", builder);
await call("builders.prune", builder);
await call("builders.delete", builder);
const source = new File([gzipSync("")], "source.tar.gz");
const build = (await call("builds.create", { source, dockerfile: "FROM scratch" }))?.id ?? "none";
await call("builds.list");
await call("builds.get", build);
await call("builds.events", build, { follow: false });
await call("builds.cancel", build);
const push = (await call("pushes.create", { image: "alpine", target: "registry.example.com/alpine:1" }))?.id ?? "none";
await call("pushes.list");
await call("pushes.get", push);

const unused = [...methods(client)].filter((name) => !used.has(name)).sort();
console.log(JSON.stringify({ failed, unused }));
