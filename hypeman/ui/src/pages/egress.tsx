// The requests of a guest whose egress is mediated, as they end.
import { useSignal } from "@preact/signals";
import type { EgressPolicy, Instance } from "api-types";
import { useEffect } from "preact/hooks";
import { ApiError, get, segment } from "../api";
import { bytes, clock } from "../format";
import { Empty, Facts, Panel, Problem, Table } from "../ui";

const MAX = 1000;

/** One of a stream, so /spec.json does not describe it. */
type EgressRecord = {
  time: string; kind: string; host: string; port: number; method: string; status: number; reason: string;
  credentials: string[]; bytes_up: number; bytes_down: number; ms: number;
};

export function Egress({ instance }: { instance: Instance }) {
  const policy = useSignal<EgressPolicy | null | undefined>(undefined);
  const records = useSignal<readonly (EgressRecord & { number: number })[]>([]);
  const problem = useSignal("");
  const denied = useSignal(false);
  const path = `/instances/${segment(instance.id)}/egress`;
  useEffect(() => {
    get<EgressPolicy>(path).then((found) => { policy.value = found; }, (error) => {
      if (error instanceof ApiError && error.status === 404) policy.value = null;
      else problem.value = (error as Error).message;
    });
  }, [path]);
  useEffect(() => {
    if (!policy.value) return;
    let number = 0, waiting: (EgressRecord & { number: number })[] = [], timer = 0;
    const stream = new EventSource(`${path}/requests?follow=true&tail=200`);
    stream.onopen = () => { records.value = []; };
    stream.onmessage = ({ data }) => {
      waiting.push({ ...(JSON.parse(data) as EgressRecord), number: number++ });
      timer ||= setTimeout(() => {
        timer = 0;
        records.value = [...waiting.reverse(), ...records.value].slice(0, MAX);
        waiting = [];
      }, 150);
    };
    return () => { stream.close(); clearTimeout(timer); };
  }, [policy.value]);
  if (problem.value) return <Problem message={problem.value} />;
  if (policy.value === undefined) return null;
  if (policy.value === null) {
    return (
      <Panel><Empty icon="shield" title="This instance reaches the network directly">
        <p>With mediated egress the host sees each request, and puts real credentials into those that a rule names: the guest holds stand-ins only.</p>
        <p>It is chosen when an instance is created: <code>--network-egress-enabled</code>.</p>
      </Empty></Panel>
    );
  }
  const credentials = Object.entries(policy.value.credentials);
  const shown = denied.value ? records.value.filter((one) => one.reason !== "ok") : records.value;
  return (
    <>
      <Panel title="Policy"><Facts rows={[
        ["Direct TCP", policy.value.mode === "all" ? "refused" : "refused to ports 80 and 443 only"],
        ...credentials.map(([name, one]) => [name, one.inject.map((rule) => `${rule.as.header} at ${rule.hosts?.join(", ") ?? "every host"}`).join("; ")] as const),
      ]} /></Panel>
      <Panel title="Requests" flush actions={
        <div class="segments" role="group" aria-label="Outcome">
          <button type="button" aria-pressed={!denied.value} onClick={() => { denied.value = false; }}>All</button>
          <button type="button" aria-pressed={denied.value} onClick={() => { denied.value = true; }}>Denied<span>{records.value.filter((one) => one.reason !== "ok").length}</span></button>
        </div>}>
        {shown.length ? <Table label="Requests" rows={shown} id={(one) => String(one.number)} columns={[
          { title: "Time", cell: (one) => <span class="mono muted">{clock(one.time)}</span> },
          { title: "Request", cell: (one) => <span class="mono">{one.method || one.kind.replace("_", " ")} {one.host}{one.port === 443 ? "" : `:${one.port}`}</span> },
          { title: "Outcome", cell: (one) => <span class={`pill ${one.reason === "ok" ? "good" : "bad"}`}>{one.reason === "ok" ? one.status || "passed" : one.reason}</span> },
          { title: "Credentials", cell: (one) => one.credentials.join(", "), narrow: true },
          { title: "Traffic", cell: (one) => <span class="muted">↑ {bytes(one.bytes_up, 0)} ↓ {bytes(one.bytes_down, 0)}</span>, narrow: true },
          { title: "Took", cell: (one) => <span class="muted">{Math.round(one.ms)} ms</span>, narrow: true },
        ]} /> : <Empty icon="shield" title="No requests yet">They appear here as they end.</Empty>}
      </Panel>
    </>
  );
}
