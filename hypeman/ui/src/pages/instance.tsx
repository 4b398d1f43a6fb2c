// One instance: its state, logs, a terminal, files, and what belongs to it.
import { useComputed, useSignal } from "@preact/signals";
import type { Event as Change, Instance } from "api-types";
import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { actionsOf } from "../actions";
import { waiting } from "../approvals";
import { ApiError, get, missingScope, messageOf, segment } from "../api";
import { bytes, duration, parseSize, rate } from "../format";
import { failure, histories, instances, loaded, put, reconnected, refresh, tick } from "../live";
import { go } from "../router";
import { Button, Empty, Facts, Icon, Link, Page, Panel, Problem, State, Tags, Time, useResource, useTick, useWork } from "../ui";
import { Held } from "./approvals";
import { Egress } from "./egress";
import { EventList } from "./events";
import { Files } from "./files";
import { Chart } from "./chart";
import { Logs } from "./logs";
import { Network } from "./network";
import { Operations } from "./operations";
import { Snapshots } from "./snapshots";
import { UsageOf } from "./usage";
import { Mounts } from "./volumes";

const TABS = [
  ["overview", "Overview"], ["logs", "Logs"], ["terminal", "Terminal"], ["files", "Files"], ["network", "Network"],
  ["volumes", "Volumes"], ["snapshots", "Snapshots"], ["egress", "Egress"], ["operations", "Operations"], ["settings", "Settings"],
] as const;

export function InstancePage({ reference, tab }: { reference: string; tab: string }) {
  const found = useComputed(() => instances.value.get(reference) ?? [...instances.value.values()].find((one) => one.name === reference));
  const problem = useSignal<unknown>(undefined);
  const opened = useSignal(false);
  const instance = found.value;
  useEffect(() => {
    if (instance || !loaded.value) return;
    problem.value = undefined;
    get<Instance>(`/instances/${segment(reference)}`).then(put, (error) => { problem.value = error; });
  }, [loaded.value, instance === undefined, reconnected.value]);
  useEffect(() => { if (instance) void refresh(instance.id); }, [instance?.id, tab === "overview"]);
  useEffect(() => { document.getElementById(`tab-${tab}`)?.scrollIntoView({ block: "nearest", inline: "center" }); }, [tab, instance === undefined]);
  if (tab === "terminal") opened.value = true;
  if (!instance) {
    return (
      <Page title={reference} crumbs={<Link to="/instances" class="crumb">Instances</Link>}>
        {problem.value instanceof ApiError && problem.value.status === 404
          ? <Empty icon="instances" title="Instance not found" action={<Link to="/instances">All instances</Link>}>{problem.value.message}</Empty>
          : (problem.value || (failure.value && !loaded.value)) && <Problem message={problem.value ? messageOf(problem.value) : failure.value} />}
      </Page>
    );
  }
  const base = `/instances/${instance.name}`;
  const held = waiting.value.get(instance.id) ?? 0;
  return (
    <div class={`page ${["logs", "terminal"].includes(tab) ? "fill" : ""}`}>
      <header class="page-head">
        <div class="page-title">
          <Link to="/instances" class="crumb">Instances</Link>
          <h1>{instance.name} <State state={instance.current_phase === "pulling" ? "Pulling" : instance.state} /></h1>
          <p class="muted"><span class="mono">{instance.image}</span></p>
        </div>
        <Actions instance={instance} />
      </header>
      <div class="tabs" role="tablist" aria-label="Views of the instance" onKeyDown={(event) => {
        const at = TABS.findIndex(([name]) => name === tab) + (event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0);
        const next = TABS[(at + TABS.length) % TABS.length]![0];
        if (next === tab) return;
        go(`${base}/${next}`);
        setTimeout(() => document.getElementById(`tab-${next}`)?.focus());
      }}>
        {TABS.map(([name, title]) => (
          <button key={name} id={`tab-${name}`} type="button" role="tab" aria-selected={name === tab} aria-controls="view" tabIndex={name === tab ? 0 : -1} onClick={() => go(`${base}${name === "overview" ? "" : `/${name}`}`)}>{title}{name === "egress" && held > 0 && <span class="badge" aria-label={`${held} waiting for approval`}>{held}</span>}</button>
        ))}
      </div>
      <div id="view" class="view" role="tabpanel" aria-labelledby={`tab-${tab}`} key={tab}>
        {tab === "overview" && <Overview instance={instance} />}
        {tab === "logs" && <Logs instance={instance} />}
        {tab === "files" && <Files instance={instance} />}
        {tab === "network" && <Network instance={instance} />}
        {tab === "volumes" && <Mounts instance={instance} />}
        {tab === "snapshots" && <Snapshots instance={instance} />}
        {tab === "egress" && <Egress instance={instance} />}
        {tab === "operations" && <Operations instance={instance} />}
        {tab === "settings" && <Settings instance={instance} />}
      </div>
      {opened.value && <TerminalView instance={instance} shown={tab === "terminal"} />}
    </div>
  );
}

function Actions({ instance }: { instance: Instance }) {
  const [busy, work] = useWork();
  const actions = actionsOf(instance);
  const useful = new Set(instance.state === "Stopped" ? ["start"] : instance.state === "Standby" ? ["restore"] : ["stop", "standby"]);
  return (
    <div class="actions">
      {actions.filter((one) => useful.has(one.name) || ["snapshot", "fork", "delete"].includes(one.name)).map((one) => (
        <Button key={one.name} icon={one.icon} kind={one.name === "delete" ? "danger" : ["start", "restore"].includes(one.name) ? "primary" : undefined} unavailable={one.unavailable}
          busy={busy === one.name} label={one.name === "delete" ? "Delete" : undefined} onClick={() => work(one.name, one.run)}>{one.name === "delete" ? undefined : one.title}</Button>
      ))}
    </div>
  );
}

function Overview({ instance }: { instance: Instance }) {
  const past = useResource<Change[]>(`/events?follow=false&since=168h&limit=10000&instance=${segment(instance.id)}`, ["instance"]);
  const recent = (past.data ?? []).slice(-9).reverse();
  return (
    <>
      {instance.state_error && <Problem message={instance.state_error} />}
      {instance.guest_silent_since && <Problem message="The guest does not answer. It can still be stopped and deleted." />}
      <Held instance={instance} />
      <Phases instance={instance} />
      <Graphs instance={instance} />
      <div class="columns">
        <Panel title="About">
          <Facts rows={[
            ["Id", <span class="mono">{instance.id}</span>],
            ["Image", <span class="mono">{instance.image}</span>],
            ["Size", `${instance.vcpus ?? "?"} vCPU, ${instance.size ?? "?"}${instance.hotplug_size ? ` + ${instance.hotplug_size}` : ""}, disk ${instance.overlay_size ?? "?"}`],
            ["Hypervisor", instance.hypervisor],
            ["Address", instance.network?.ip && <span class="mono">{instance.network.ip}</span>],
            ["Ports", instance.ports?.length ? <Ports instance={instance} /> : undefined],
            ["Created", <Time at={instance.created_at} />],
            ["Started", instance.started_at && <Time at={instance.started_at} />],
            ["Stopped", instance.stopped_at && <Time at={instance.stopped_at} />],
            ["Exit", instance.exit_code !== null && instance.exit_code !== undefined ? `${instance.exit_code}${instance.exit_message ? ` – ${instance.exit_message}` : ""}` : instance.exit_message],
            ["Expires", instance.expires_at && <Time at={instance.expires_at} />],
            ["Health", instance.health_status && instance.health_status.status !== "disabled" ? `${instance.health_status.status}${instance.health_status.last_error ? ` – ${instance.health_status.last_error}` : ""}` : undefined],
            ["Tags", instance.tags && Object.keys(instance.tags).length ? <Tags tags={instance.tags} /> : undefined],
          ]} />
        </Panel>
        <div>
          <Panel title="Recent events" flush actions={<Link to="/events" class="link small">All events</Link>}>
            {recent.length ? <EventList events={recent} /> : past.error ? <Problem message={past.error} onRetry={past.reload} /> : <p class="none">Nothing happened in the last seven days.</p>}
          </Panel>
          <UsageOf instance={instance} />
        </div>
      </div>
    </>
  );
}

export function Ports({ instance }: { instance: Instance }) {
  return <>{instance.ports!.map((port) => (
    <span class="tag mono" key={`${port.host_address}${port.host_port}${port.protocol}`}>{port.host_address ? `${port.host_address}:` : ""}{port.host_port}{(port.count ?? 1) > 1 ? `–${port.host_port + port.count! - 1}` : ""} → {port.guest_port}/{port.protocol ?? "tcp"}</span>
  ))}</>;
}

const PHASES: Record<string, [string, string]> = {
  pulling: ["Pulling the image", "pull"], created: ["Preparing disks and network", "prepare"], initializing: ["Booting", "boot"], running: ["Running", "good"],
  paused: ["Paused", "rest"], standby: ["Standby", "rest"], shutdown: ["Shutting down", "off"], stopped: ["Stopped", "off"], unknown: ["Unknown", "bad"],
};

/** Where the time went. The boot is drawn to scale; phases that may last for days are only listed. */
function Phases({ instance }: { instance: Instance }) {
  const moving = !["Running", "Stopped", "Standby"].includes(instance.state);
  useTick(moving ? 250 : 5000);
  const taken = { ...instance.phase_durations_ms };
  const current = instance.current_phase ?? "";
  const since = instance.current_phase_since ? Date.parse(instance.current_phase_since) : 0;
  const read = useRef({ of: instance, at: Date.now() });
  if (read.current.of !== instance) read.current = { of: instance, at: Date.now() };
  if (current && since) taken[current] = (taken[current] ?? 0) + Date.now() - read.current.at;
  const boot = ["pulling", "created", "initializing"].filter((phase) => taken[phase] !== undefined);
  const rest = Object.keys(taken).filter((phase) => !boot.includes(phase));
  const total = boot.reduce((sum, phase) => sum + taken[phase]!, 0);
  if (!Object.keys(taken).length) return null;
  return (
    <Panel title="Boot" label="Boot phases" actions={boot.length > 0 && <span class="muted">{boot.includes(current) ? "so far" : "took"} {duration(total)}</span>}>
      {boot.length > 0 && (
        <div class="phases" role="img" aria-label={boot.map((phase) => `${PHASES[phase]![0]} ${duration(taken[phase]!)}`).join(", ")}>
          {boot.map((phase) => <span key={phase} class={`phase tone-${PHASES[phase]![1]} ${phase === current ? "current" : ""}`} style={{ flexGrow: Math.max(taken[phase]!, total / 60) }} />)}
        </div>
      )}
      <ul class="legend">
        {[...boot, ...rest].map((phase) => (
          <li key={phase} class={phase === current ? "current" : ""}><i class={`tone-${(PHASES[phase] ?? ["", "off"])[1]}`} /><span>{PHASES[phase]?.[0] ?? phase}</span><b>{duration(taken[phase]!)}</b></li>
        ))}
      </ul>
    </Panel>
  );
}

function Graphs({ instance }: { instance: Instance }) {
  tick.value;
  const history = histories.get(instance.id);
  if (!history || history.at.length < 2) {
    return instance.state === "Running" ? <div class="graphs waiting"><div class="panel"><p class="none">Graphs begin with the second sample, in a few seconds.</p></div></div> : null;
  }
  const memory = parseSize(instance.size) + (parseSize(instance.hotplug_size) || 0);
  const times = history.at;
  return (
    <div class="graphs">
      <Chart title="CPU" now={`${Math.round(100 * history.cpu.at(-1)!)} %`} detail={`of ${100 * (instance.vcpus ?? 1)} %`} times={times} max={100 * (instance.vcpus ?? 1)}
        series={[{ label: "CPU", tone: "cpu", values: history.cpu.map((value) => 100 * value) }]} format={(value) => `${Math.round(value)}%`} />
      <Chart title="Memory" now={bytes(history.memory.at(-1)!)} detail={memory ? `of ${bytes(memory)}` : ""} times={times} max={memory || undefined} binary
        series={[{ label: "Resident", tone: "memory", values: history.memory }]} format={(value) => bytes(value, 0)} />
      <Chart title="Network" now={rate(history.received.at(-1)! + history.sent.at(-1)!)} detail="" times={times} binary
        series={[{ label: "Received", tone: "network", values: history.received }, { label: "Sent", tone: "sent", values: history.sent }]} format={(value) => bytes(value, 0)} />
    </div>
  );
}

function Settings({ instance }: { instance: Instance }) {
  const env = Object.entries(instance.env ?? {});
  const policies: [string, ComponentChildren][] = [
    ["Restart", instance.restart_policy?.policy ?? "never"],
    ["Health check", instance.health_check?.type ?? "none"],
    ["Standby when idle", instance.auto_standby?.enabled ? `after ${instance.auto_standby.idle_timeout ?? "5m"}` : "off"],
    ["Woken by", instance.auto_standby?.wake],
    ["Attempts to restart", instance.restart_status?.attempts],
    ["Platform", instance.platform],
    ["Disk I/O limit", instance.disk_io_bps],
  ];
  return (
    <div class="columns">
      <Panel title="Environment" flush>
        {env.length ? (
          <div class="table-wrap" tabIndex={0} role="region" aria-label="Environment"><table class="table"><thead><tr><th scope="col">Name</th><th scope="col">Value</th></tr></thead>
            <tbody>{env.map(([name, value]) => <tr key={name}><td class="mono">{name}</td><td class="mono wrap">{value}</td></tr>)}</tbody></table></div>
        ) : <Empty icon="terminal" title="No variables">Variables set at creation (<code>-e NAME=VALUE</code>) are in every program's environment.</Empty>}
      </Panel>
      <Panel title="Policies"><Facts rows={policies} /></Panel>
    </div>
  );
}

const SHELL = "command -v bash >/dev/null 2>&1 && exec bash; exec sh";

/** Stays open while other views are shown. */
function TerminalView({ instance, shown }: { instance: Instance; shown: boolean }) {
  const place = useRef<HTMLDivElement>(null);
  const over = useSignal("");
  const turn = useSignal(0);
  const refused = missingScope("instance:write") ?? (instance.state === "Running" ? undefined : `${instance.name} is ${instance.state}. A terminal needs a running instance.`);
  useEffect(() => {
    if (refused) return;
    let gone = false;
    let close = () => {};
    over.value = "";
    import("../terminal").then(({ openTerminal }) => {
      if (gone) return;
      const handle = openTerminal(place.current!, instance.id, ["/bin/sh", "-c", SHELL], (message) => { over.value = message; });
      const observer = new MutationObserver(() => handle.theme());
      observer.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
      close = () => { observer.disconnect(); handle.close(); };
    }, (error) => { over.value = error instanceof ApiError ? error.message : "The terminal could not be loaded."; });
    return () => { gone = true; close(); };
  }, [refused === undefined, turn.value, instance.id]);
  return (
    <div class="terminal-view" hidden={!shown}>
      {refused ? <Empty icon="terminal" title="No terminal">{refused}</Empty> : (
        <>
          <div class="terminal" ref={place} aria-label={`Terminal in ${instance.name}`} role="application" key={turn.value} />
          <div class="terminal-foot">
            <span><Icon name="terminal" /> {over.value || "Copy with Ctrl-Shift-C or Ctrl-C on a selection, paste with Ctrl-V."}</span>
            {over.value && <Button onClick={() => { turn.value++; }}>Open again</Button>}
          </div>
        </>
      )}
    </div>
  );
}
