// A new instance, and the equivalent command line.
import { useSignal } from "@preact/signals";
import type { Capabilities, Image, Instance, Volume } from "api-types";
import { missingScope, messageOf, post } from "../api";
import { imageName, shellWord } from "../format";
import { instances, put } from "../live";
import { go } from "../router";
import { Button, Check, Code, Field, Link, Page, Panel, Select, Text, useResource } from "../ui";
import { parsePort } from "./network";

const FIRST = {
  name: "", image: "", vcpus: "2", size: "1GB", overlay: "10GB", command: "", env: "", ports: "", volume: "", mount: "/data", tags: "",
  hypervisor: "", restart: "never", ttl: "", network: true, groups: "", egress: false, standby: false, idle: "5m",
};
type Form = typeof FIRST;

const pairs = (text: string, what: string): Record<string, string> => Object.fromEntries(text.split("\n").map((line) => line.trim()).filter(Boolean).map((line) => {
  const at = line.indexOf("=");
  if (at < 1) throw new Error(`${what}: "${line}" is not NAME=VALUE`);
  return [line.slice(0, at), line.slice(at + 1)];
}));

/** Words as a shell would split them, quotes included. */
export function words(text: string): string[] {
  const found: string[] = [];
  for (const match of text.matchAll(/(?:[^\s"']+|"(?:\\.|[^"\\])*"|'[^']*')+/g)) {
    found.push(match[0].replace(/"((?:\\.|[^"\\])*)"|'([^']*)'/g, (_, double, single) => (double !== undefined ? String(double).replace(/\\(.)/g, "$1") : String(single))));
  }
  return found;
}

const listed = (text: string) => text.split(/[\s,]+/).filter(Boolean);

/** The body of POST /instances. Throws an Error that names the field. */
function bodyOf(form: Form): Record<string, unknown> {
  const env = pairs(form.env, "Environment"), tags = pairs(form.tags, "Tags");
  const ports = listed(form.ports).map(parsePort);
  const cmd = words(form.command);
  const groups = listed(form.groups);
  const network = !form.network ? { enabled: false } : { ...(form.egress ? { egress: { enabled: true } } : {}), ...(groups.length ? { groups } : {}) };
  return {
    name: form.name, image: form.image.trim(), vcpus: Number(form.vcpus), size: form.size, overlay_size: form.overlay,
    ...(cmd.length ? { cmd } : {}), ...(Object.keys(env).length ? { env } : {}), ...(Object.keys(tags).length ? { tags } : {}), ...(ports.length ? { ports } : {}),
    ...(form.volume ? { volumes: [{ volume_id: form.volume, mount_path: form.mount }] } : {}),
    ...(form.hypervisor ? { hypervisor: form.hypervisor } : {}), ...(form.restart !== "never" ? { restart_policy: { policy: form.restart } } : {}), ...(form.ttl ? { ttl: form.ttl } : {}),
    ...(Object.keys(network).length ? { network } : {}),
    ...(form.standby ? { auto_standby: { enabled: true, idle_timeout: form.idle } } : {}),
  };
}

function runLine(form: Form): string {
  const options: string[] = [];
  const add = (flag: string, value: string) => options.push(`${flag} ${shellWord(value)}`);
  if (form.name) add("--name", form.name);
  if (form.vcpus !== "2") add("--cpus", form.vcpus);
  if (form.size !== "1GB") add("--memory", form.size);
  if (form.overlay !== "10GB") add("--overlay-size", form.overlay);
  for (const line of form.env.split("\n").filter((line) => line.trim())) add("-e", line.trim());
  for (const port of listed(form.ports)) add("-p", port);
  if (form.volume) add("-v", `${form.volume}:${form.mount}`);
  for (const line of form.tags.split("\n").filter((line) => line.trim())) add("--tag", line.trim());
  if (form.hypervisor) add("--hypervisor", form.hypervisor);
  if (form.restart !== "never") add("--restart-policy", form.restart);
  if (form.ttl) add("--ttl", form.ttl);
  if (!form.network) options.push("--no-network");
  else {
    for (const group of listed(form.groups)) add("--network-group", group);
    if (form.egress) options.push("--network-egress-enabled");
  }
  if (form.standby) options.push("--auto-standby-enabled", `--auto-standby-idle-timeout ${shellWord(form.idle)}`);
  const line = ["hypeman run", ...options, shellWord(form.image.trim() || "IMAGE"), ...words(form.command).map(shellWord)];
  return line.join(options.length > 3 ? " \\\n  " : " ");
}

function curlLine(body: Record<string, unknown>): string {
  return `curl -X POST ${location.origin}/instances \\\n  -H "Authorization: Bearer $HYPEMAN_API_KEY" \\\n  -H 'Content-Type: application/json' \\\n  -d ${shellWord(JSON.stringify(body, null, 2))}`;
}

export function Create() {
  const form = useSignal<Form>({ ...FIRST, image: new URLSearchParams(location.search).get("image") ?? "" });
  const error = useSignal("");
  const busy = useSignal(false);
  const shown = useSignal<"run" | "curl">("run");
  const images = useResource<Image[]>(missingScope("image:read") ? "" : "/images", ["image"]);
  const volumes = useResource<Volume[]>(missingScope("volume:read") ? "" : "/volumes", ["volume"]);
  const able = useResource<Capabilities>(missingScope("resource:read") ? "" : "/capabilities");
  const known = [...new Set([...instances.value.values()].flatMap((one) => one.network?.groups ?? []))].sort();
  const set = <K extends keyof Form>(key: K) => (value: Form[K]) => { form.value = { ...form.value, [key]: value }; };
  const now = form.value;
  let line: string;
  try {
    line = shown.value === "run" ? runLine(now) : curlLine(bodyOf(now));
  } catch (problem) {
    line = `# ${messageOf(problem)}`;
  }
  async function submit(event: Event) {
    event.preventDefault();
    if (missingScope("instance:write")) return;
    busy.value = true;
    try {
      put(await post<Instance>("/instances", bodyOf(now)));
      go(`/instances/${now.name}`);
    } catch (problem) {
      error.value = messageOf(problem);
    } finally {
      busy.value = false;
    }
  }
  return (
    <Page title="Create an instance" crumbs={<Link to="/instances" class="crumb">Instances</Link>}>
      <form class="create" onSubmit={submit}>
        <div>
          <Panel title="Program">
            <Field label="Image" hint={images.error || "Any OCI reference. It is pulled if it is missing."}><Text value={now.image} onValue={set("image")} list="images" placeholder="docker.io/library/nginx:alpine" required autofocus /></Field>
            <datalist id="images">{images.data?.filter((one) => one.status === "ready").map((one) => <option key={one.name} value={one.name}>{imageName(one.name)}</option>)}</datalist>
            <Field label="Name" hint="Lowercase letters, digits and -"><Text value={now.name} onValue={set("name")} pattern="[a-z0-9]([a-z0-9\-]*[a-z0-9])?" maxLength={63} required /></Field>
            <Field label="Command" hint="Instead of the image's. Quotes as in a shell."><Text value={now.command} onValue={set("command")} placeholder="the image's" /></Field>
            <Field label="Environment" hint="NAME=VALUE, one per line"><textarea class="input mono" rows={3} spellcheck={false} value={now.env} onInput={(event) => set("env")(event.currentTarget.value)} /></Field>
          </Panel>
          <Panel title="Size">
            <div class="triple">
              <Field label="vCPUs"><Text type="number" min={1} max={256} value={now.vcpus} onValue={set("vcpus")} required /></Field>
              <Field label="Memory"><Text value={now.size} onValue={set("size")} list="sizes" required /></Field>
              <Field label="Disk"><Text value={now.overlay} onValue={set("overlay")} required /></Field>
            </div>
            <datalist id="sizes">{["256MB", "512MB", "1GB", "2GB", "4GB", "8GB", "16GB"].map((one) => <option key={one} value={one} />)}</datalist>
            <Field label="Hypervisor" error={able.error}><Select value={now.hypervisor} onValue={set("hypervisor")} options={[["", `Default${able.data ? ` (${able.data.default_runtime.name})` : ""}`], ...(able.data?.runtimes.map((one) => [one.name, one.available ? one.name : `${one.name}, not available`] as const) ?? [])]} /></Field>
          </Panel>
          <Panel title="Network and data">
            <Check checked={now.network} onValue={set("network")}>Network</Check>
            {now.network && <Check checked={now.egress} onValue={set("egress")}>Mediated egress: every request is seen by the host, credentials stay there</Check>}
            {now.network && <Field label="Ports" hint="HOST:GUEST, separated by commas"><Text value={now.ports} onValue={set("ports")} placeholder="8000:80" /></Field>}
            {now.network && <Field label="Groups" hint="Names, separated by commas: of the other guests, it reaches only those that share one with it. Without any, it reaches those that have none.">
              <Text value={now.groups} onValue={set("groups")} list="groups" pattern="\s*[A-Za-z0-9][A-Za-z0-9_.\-]*([\s,]+[A-Za-z0-9][A-Za-z0-9_.\-]*)*[\s,]*" placeholder="backend" />
            </Field>}
            <datalist id="groups">{known.map((one) => <option key={one} value={one} />)}</datalist>
            <div class="pair">
              <Field label="Volume" error={volumes.error}><Select value={now.volume} onValue={set("volume")} options={[["", "None"], ...(volumes.data ?? []).map((one) => [one.id, `${one.name} (${one.size_gb} GB)`] as const)]} /></Field>
              {now.volume && <Field label="Mounted at"><Text value={now.mount} onValue={set("mount")} required pattern="/.*" /></Field>}
            </div>
          </Panel>
          <Panel title="Life">
            <div class="pair">
              <Field label="Restart"><Select value={now.restart} onValue={set("restart")} options={[["never", "Never"], ["on_failure", "After a failure"], ["always", "Always"]]} /></Field>
              <Field label="Delete after" hint="Such as 2h; empty: never"><Text value={now.ttl} onValue={set("ttl")} /></Field>
            </div>
            <Check checked={now.standby} onValue={set("standby")}>Standby when idle, and wake with the next connection</Check>
            {now.standby && <Field label="Idle for"><Text value={now.idle} onValue={set("idle")} /></Field>}
            <Field label="Tags" hint="KEY=VALUE, one per line"><textarea class="input mono" rows={2} spellcheck={false} value={now.tags} onInput={(event) => set("tags")(event.currentTarget.value)} /></Field>
          </Panel>
        </div>
        <aside>
          <Panel title="The same from a terminal" actions={
            <div class="segments" role="group" aria-label="Form">
              <button type="button" aria-pressed={shown.value === "run"} onClick={() => { shown.value = "run"; }}>hypeman</button>
              <button type="button" aria-pressed={shown.value === "curl"} onClick={() => { shown.value = "curl"; }}>curl</button>
            </div>}>
            <Code>{line}</Code>
          </Panel>
          {error.value && <p class="problem" role="alert">{error.value}</p>}
          <div class="create-actions"><Button type="submit" kind="primary" scope="instance:write" busy={busy.value}>Create and boot</Button></div>
        </aside>
      </form>
    </Page>
  );
}
