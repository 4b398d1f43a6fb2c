// The host: its resources, who holds them, its capabilities, and reclaiming memory from guests.
import { useSignal } from "@preact/signals";
import type { Capabilities, Finding, MemoryReclaimResponse, ResourceAllocation, Resources, ResourceStatus } from "api-types";
import { get, missingScope, post } from "../api";
import { bytes, parseSize, plural, rate } from "../format";
import { Bar, Button, Dialog, Empty, Facts, Field, Link, Page, Panel, Problem, Table, notify, Text, useResource, useWork } from "../ui";

export function Host() {
  const readable = !missingScope("resource:read");
  const resources = useResource<Resources>(readable ? "/resources" : "", ["instance", "volume", "image"]);
  const capabilities = useResource<Capabilities>(readable ? "/capabilities" : "");
  const reclaiming = useSignal(false);
  const found = resources.data, able = capabilities.data;
  return (
    <Page title="Host" subtitle={able && `${able.host.os}/${able.host.arch}, Hypeman ${able.server.version}`}
      actions={<Button scope="resource:write" onClick={() => { reclaiming.value = true; }}>Reclaim memory</Button>}>
      {!readable && <Empty icon="shield" title="Not permitted">{missingScope("resource:read")}.</Empty>}
      {(resources.error || capabilities.error) && <Problem message={resources.error || capabilities.error} onRetry={() => { resources.reload(); capabilities.reload(); }} />}
      {found && (
        <>
          <div class="meters">
            <Meter title="CPU" status={found.cpu} format={(value) => `${value} vCPU`} />
            <Meter title="Memory" status={found.memory} format={(value) => bytes(value)} />
            <Meter title="Disk" status={found.disk} format={(value) => bytes(value)} />
            <Meter title="Network" status={found.network} format={rate} />
          </div>
          <div class="columns">
            <Panel title="Allocations" flush>
              {found.allocations.length ? <Table<ResourceAllocation> label="Allocations" rows={[...found.allocations].sort((a, b) => (b.memory_bytes ?? 0) - (a.memory_bytes ?? 0)).slice(0, 200)} id={(one) => one.instance_id ?? ""} columns={[
                { title: "Instance", cell: (one) => <Link to={`/instances/${one.instance_name ?? one.instance_id}`}>{one.instance_name ?? one.instance_id}</Link> },
                { title: "vCPU", cell: (one) => one.cpu, class: "number" },
                { title: "Memory", cell: (one) => bytes(one.memory_bytes), class: "number" },
                { title: "Disk", cell: (one) => bytes(one.disk_bytes), class: "number", narrow: true },
              ]} /> : <Empty icon="host" title="Nothing is allocated">Each instance with a VM reserves what it was created with.</Empty>}
              {found.allocations.length > 200 && <p class="none">The largest 200 of {plural(found.allocations.length, "instance")}.</p>}
            </Panel>
            <div>
              {found.disk_breakdown && <Panel title="Disk"><Facts rows={[
                ["Images", bytes(found.disk_breakdown.images_bytes)], ["Layer cache", bytes(found.disk_breakdown.oci_cache_bytes)],
                ["Volumes", bytes(found.disk_breakdown.volumes_bytes)], ["Instances", bytes(found.disk_breakdown.overlays_bytes)],
              ]} /></Panel>}
              {able && <Panel title="Capabilities"><Facts rows={[
                ...able.runtimes.map((one) => [one.name, <span>{one.available ? <span class="pill good">{one.name === able.default_runtime.name ? "default" : "available"}</span> : <span class="pill">not available</span>} <small class="muted">{one.features.join(", ")}</small></span>] as const),
                ["Network", `${able.network.model}, ${able.network.subnet ?? ""}`],
                ["Between guests", able.network.guest_to_guest ? "allowed" : "closed"],
                ["Platforms", able.images.platforms.join(", ")],
                ["GPU", found.gpu ? `${found.gpu.used_slots} of ${found.gpu.total_slots} slots, ${found.gpu.mode}` : "none"],
              ]} /></Panel>}
            </div>
          </div>
        </>
      )}
      {readable && <Doctor />}
      {reclaiming.value && <ReclaimDialog onClose={() => { reclaiming.value = false; }} />}
    </Page>
  );
}

/** The worst first. */
const VERDICTS: Record<Finding["verdict"], [number, string]> = { fail: [0, "bad"], warn: [1, "wait"], ok: [2, "good"] };

/** What `hypeman doctor` reports. It takes some seconds, so it runs on request. */
function Doctor() {
  const found = useSignal<readonly Finding[] | undefined>(undefined);
  const [busy, work] = useWork();
  const rows = [...(found.value ?? [])].sort((a, b) => VERDICTS[a.verdict][0] - VERDICTS[b.verdict][0]);
  return (
    <Panel title="Doctor" flush actions={<Button icon="check" scope="resource:write" busy={busy === "doctor"} onClick={() => work("doctor", async () => { found.value = await get<Finding[]>("/doctor"); })}>Check this host</Button>}>
      {rows.length ? <Table label="Findings" rows={rows} id={(one) => `${one.name} ${one.message}`} columns={[
        { title: "Verdict", cell: (one) => <span class={`pill ${VERDICTS[one.verdict][1]}`}>{one.verdict}</span> },
        { title: "Check", cell: (one) => <span class="mono">{one.name}</span> },
        { title: "Finding", cell: (one) => <span class="two"><span class="wrap">{one.message}</span>{one.remedy && <small class="mono wrap">{one.remedy}</small>}</span> },
      ]} /> : <p class="none">The same checks as hypeman doctor: what is missing on this host, and how to fix it.</p>}
    </Panel>
  );
}

function Meter({ title, status, format }: { title: string; status: ResourceStatus; format: (value: number) => string }) {
  const share = status.effective_limit > 0 ? status.allocated / status.effective_limit : 0;
  return (
    <section class="panel meter" aria-label={title}>
      <div class="chart-head"><h2>{title}</h2><b>{status.capacity ? `${Math.round(100 * share)} %` : "unknown"}</b></div>
      <Bar label={`${title}: ${format(status.allocated)} of ${format(status.effective_limit)}`} total={status.effective_limit} parts={[{ value: status.allocated, tone: share > 0.9 ? "bad" : share > 0.75 ? "wait" : "accent", title: "allocated" }]} />
      <p class="muted">{format(status.allocated)} of {format(status.effective_limit)}{status.oversub_ratio !== 1 ? ` (${status.oversub_ratio} × ${format(status.capacity)})` : ""}<br />{format(status.available)} free</p>
    </section>
  );
}

function ReclaimDialog({ onClose }: { onClose: () => void }) {
  const amount = useSignal("1GB");
  const hold = useSignal("5m");
  const plan = useSignal<MemoryReclaimResponse | undefined>(undefined);
  const error = useSignal("");
  async function submit(dry: boolean) {
    try {
      const size = parseSize(amount.value);
      if (!Number.isFinite(size)) throw new Error(`"${amount.value}" is not a size such as 512MB`);
      plan.value = await post<MemoryReclaimResponse>("/resources/memory/reclaim", { reclaim_bytes: Math.round(size), hold_for: hold.value, dry_run: dry });
      error.value = "";
      if (!dry) {
        notify(`Guests lend ${bytes(plan.value.applied_reclaim_bytes)}`);
        onClose();
      }
    } catch (problem) {
      error.value = (problem as Error).message;
    }
  }
  return (
    <Dialog title="Reclaim memory" onClose={onClose} wide>
      <form onSubmit={(event) => { event.preventDefault(); void submit(false); }}>
        <p class="dialog-text">Guests lend unused memory to the host for a while, and then get it back.</p>
        <div class="pair">
          <Field label="All guests together" error={error.value}><Text value={amount.value} onValue={(value) => { amount.value = value; }} required autofocus /></Field>
          <Field label="For" hint="Up to 1h"><Text value={hold.value} onValue={(value) => { hold.value = value; }} required /></Field>
        </div>
        {plan.value && <Table label="Plan" rows={plan.value.actions} id={(one) => one.instance_id} columns={[
          { title: "Instance", cell: (one) => one.instance_name }, { title: "Has", cell: (one) => bytes(one.assigned_memory_bytes), class: "number" },
          { title: "Keeps", cell: (one) => bytes(one.planned_target_guest_memory_bytes), class: "number" }, { title: "", cell: (one) => one.error ?? one.status },
        ]} />}
        <div class="dialog-actions"><Button onClick={() => submit(true)}>Show the plan</Button><Button type="submit" kind="primary">Reclaim</Button></div>
      </form>
    </Dialog>
  );
}
