// Usage of instances, including deleted ones: the ledger, by instance, by the values of a tag, or by day.
import { useSignal } from "@preact/signals";
import type { Instance, UsageReport, UsageRow, UsageVerification } from "api-types";
import { get, missingScope, segment } from "../api";
import { bytes, dateTime } from "../format";
import { instances } from "../live";
import { Button, Empty, Facts, Link, Page, Panel, Problem, Select, Table, useResource, useWork } from "../ui";
import type { Column } from "../ui";

const SINCE = [["24h", "Last day"], ["168h", "Last week"], ["720h", "Last 30 days"], ["", "Everything kept"]] as const;
/** How often the current period, which grows, is read again. */
const LOOK_MS = 30_000;

const cpuHours = (row: UsageRow) => (row.cpu_seconds / 3600).toFixed(2);
const gbHours = (value: number) => value.toFixed(2);

export function Usage() {
  const by = useSignal("instance");
  const since = useSignal("720h");
  const tag = useSignal("");
  const keys = [...new Set([...instances.value.values()].flatMap((one) => Object.keys(one.tags ?? {})))].sort();
  const key = tag.value || keys[0] || "";
  const readable = !missingScope("instance:read");
  const wanted = `/usage?by=${by.value}${since.value ? `&since=${since.value}` : ""}${by.value === "tag" ? `&tag=${segment(key)}` : ""}`;
  const found = useResource<UsageReport>(readable && (by.value !== "tag" || key) ? wanted : "", [], LOOK_MS);
  const report = found.data;
  return (
    <Page title="Usage" subtitle="CPU time, memory, disk and traffic of each instance, deleted ones as well.">
      {!readable && <Empty icon="shield" title="Not permitted">{missingScope("instance:read")}.</Empty>}
      <div class="toolbar">
        <div class="segments" role="group" aria-label="Rows">
          {[["instance", "By instance"], ["tag", "By tag"], ["day", "By day"]].map(([value, title]) => (
            <button key={value} type="button" aria-pressed={by.value === value} onClick={() => { by.value = value!; }}>{title}</button>
          ))}
        </div>
        {by.value === "tag" && keys.length > 0 && <Select label="Tag" value={key} options={keys.map((one) => [one, one] as const)} onValue={(value) => { tag.value = value; }} />}
        <Select label="Since" value={since.value} options={SINCE} onValue={(value) => { since.value = value; }} />
        <span class="grow" />
        <Verify />
      </div>
      {found.error && <Problem message={found.error} onRetry={found.reload} />}
      {by.value === "tag" && !key && <Panel><Empty icon="usage" title="No instance has a tag">Tags group instances: <code>hypeman run --tag team=core</code>.</Empty></Panel>}
      {report && (report.rows.length ? <Panel flush><Rows report={report} tag={key} /></Panel> : <Panel><Empty icon="usage" title="Nothing was used">An instance appears here once it has run.</Empty></Panel>)}
    </Page>
  );
}

function Rows({ report, tag }: { report: UsageReport; tag: string }) {
  const first: Record<UsageReport["by"], Column<UsageRow>> = {
    instance: { title: "Instance", cell: (row) => (instances.value.has(row.instance_id!) ? <Link to={`/instances/${row.instance_name}`}>{row.instance_name}</Link> : <span>{row.instance_name} <small class="muted">deleted</small></span>) },
    tag: { title: tag, cell: (row) => row.value || <span class="muted">without it</span> },
    day: { title: "Day", cell: (row) => row.day },
  };
  const rows = [...report.rows].sort((a, b) => (report.by === "day" ? (a.day! < b.day! ? 1 : -1) : b.cpu_seconds - a.cpu_seconds));
  const title = first[report.by];
  return <Table label="Usage" rows={[...rows, report.total]} id={(row) => (row === report.total ? "total" : row.instance_id ?? row.day ?? `=${row.value}`)} columns={[
    { title: title.title, cell: (row) => (row === report.total ? <b>Total</b> : title.cell(row)) },
    { title: "CPU hours", cell: cpuHours, class: "number" },
    { title: "Memory GB·h", cell: (row) => gbHours(row.memory_gb_hours), class: "number" },
    { title: "Disk GB·h", cell: (row) => gbHours(row.disk_gb_hours), class: "number", narrow: true },
    { title: "Received", cell: (row) => bytes(row.network_rx_bytes), class: "number", narrow: true },
    { title: "Sent", cell: (row) => bytes(row.network_tx_bytes), class: "number", narrow: true },
  ]} />;
}

/** Whether the ledger is unmodified. */
function Verify() {
  const result = useSignal<UsageVerification | undefined>(undefined);
  const [busy, work] = useWork();
  const reply = result.value;
  return (
    <span class="actions">
      {reply && <span role="status" class={`pill ${reply.valid ? "good" : "bad"}`} title={reply.hash}>{reply.valid ? `unmodified up to block ${reply.last}` : `block ${reply.block}: ${reply.fault}`}</span>}
      <Button icon="check" scope="instance:read" busy={busy === "verify"} onClick={() => work("verify", async () => { result.value = await get<UsageVerification>("/usage/verify"); })}>Verify the ledger</Button>
    </span>
  );
}

/** Usage of one instance since it was created. */
export function UsageOf({ instance }: { instance: Instance }) {
  const found = useResource<UsageReport>(`/usage?instance=${segment(instance.id)}`, [], LOOK_MS);
  const total = found.data?.total;
  return (
    <Panel title="Used so far" label="Used so far" actions={<Link to="/usage" class="link small">All instances</Link>}>
      {found.error && <p class="field-error">{found.error}</p>}
      {total && <Facts rows={[
        ["CPU", `${cpuHours(total)} hours`],
        ["Memory", `${gbHours(total.memory_gb_hours)} GB·h`],
        ["Disk", `${gbHours(total.disk_gb_hours)} GB·h`],
        ["Traffic", `${bytes(total.network_rx_bytes)} received, ${bytes(total.network_tx_bytes)} sent`],
        ["Since", total.begin && dateTime(total.begin)],
      ]} />}
    </Panel>
  );
}
