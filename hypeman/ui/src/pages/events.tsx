// Events of the host, newest first: the retained ones, and new ones as they happen.
import { useSignal } from "@preact/signals";
import type { Event as Change } from "api-types";
import { useMemo } from "preact/hooks";
import { instanceName } from "../approvals";
import { clock, dateTime, plural } from "../format";
import { changes } from "../live";
import { Empty, Icon, Link, Page, Panel, Problem, Select, useResource } from "../ui";
import type { IconName } from "../ui";

const ICONS: Record<string, IconName> = { instance: "instances", image: "images", volume: "volumes", snapshot: "camera", device: "devices", ingress: "ingress", egress: "shield", host: "host", build: "build", builder: "build", push: "upload" };
const KINDS = [["", "All kinds"], ["instance", "Instances"], ["image", "Images"], ["volume", "Volumes"], ["snapshot", "Snapshots"], ["build", "Builds"], ["device", "Devices"], ["ingress", "Ingresses"], ["egress", "Egress"], ["push", "Pushes"]] as const;
const SINCE = [["1h", "Last hour"], ["24h", "Last day"], ["168h", "Last week"], ["0", "Everything"]] as const;

function words(event: Change): string {
  const data = event.data ?? {};
  if (event.type === "instance.state_changed") {
    const end = data.exit_code !== undefined && data.exit_code !== null ? `, exit code ${data.exit_code}` : "";
    return `${data.from} → ${data.to}${end}${data.error ? `: ${data.error}` : ""}`;
  }
  const facts = Object.entries(data).filter(([, value]) => value !== null && value !== "").map(([key, value]) => `${key.replaceAll("_", " ")} ${value}`);
  return [event.type.split(".")[1]!.replaceAll("_", " "), ...facts].join(", ");
}

/** The object by its name; for egress the instance, since an approval has no name. */
function About({ event }: { event: Change }) {
  const { kind, id, name } = event.object;
  const instance = kind === "instance" ? id : kind === "egress" ? event.instance_id : undefined;
  const shown = instance && kind === "egress" ? instanceName(instance) : name ?? id;
  return instance ? <Link to={`/instances/${instance}${kind === "egress" ? "/egress" : ""}`} class="event-name">{shown}</Link> : <b>{shown}</b>;
}

export function EventList({ events }: { events: readonly Change[] }) {
  return (
    <ol class="events">
      {events.map((event) => (
        <li key={event.cursor}>
          <Icon name={ICONS[event.object.kind] ?? "events"} />
          <span class="event-what"><About event={event} /> <span>{words(event)}</span></span>
          <span class="event-who muted">{event.actor?.subject ?? ""}</span>
          <time dateTime={event.time} title={dateTime(event.time)} class="muted mono">{clock(event.time)}</time>
        </li>
      ))}
    </ol>
  );
}

export function Events() {
  const kind = useSignal("");
  const since = useSignal("24h");
  const text = useSignal("");
  const past = useResource<Change[]>(`/events?follow=false&limit=10000&since=${since.value}${kind.value ? `&type=${kind.value}` : ""}`);
  const now = changes.value;
  const shown = useMemo(() => {
    const by = new Map<number, Change>();
    for (const event of [...(past.data ?? []), ...now]) if (!kind.value || event.object.kind === kind.value) by.set(event.cursor, event);
    const wanted = text.value.toLowerCase();
    return [...by.values()].sort((a, b) => b.cursor - a.cursor)
      .filter((event) => !wanted || `${event.type} ${event.object.name} ${event.object.id} ${words(event)} ${event.actor?.subject}`.toLowerCase().includes(wanted));
  }, [past.data, now, kind.value, text.value]);
  return (
    <Page title="Events" subtitle="Every life-cycle change on this host, and who asked for it.">
      <div class="toolbar">
        <input class="input filter" data-filter type="search" placeholder="Filter by name, type, person" aria-label="Filter events" value={text.value} onInput={(event) => { text.value = event.currentTarget.value; }} />
        <Select label="Kind" value={kind.value} options={KINDS} onValue={(value) => { kind.value = value; }} />
        <Select label="Since" value={since.value} options={SINCE} onValue={(value) => { since.value = value; }} />
      </div>
      {past.error && <Problem message={past.error} onRetry={past.reload} />}
      <Panel flush>
        {shown.length ? <EventList events={shown.slice(0, 500)} /> : past.data && <Empty icon="events" title="Nothing happened">Creating, starting, stopping, pulling: each change appears here the moment it is made.</Empty>}
      </Panel>
      <footer class="list-foot">{shown.length > 500 ? `The newest 500 of ${shown.length.toLocaleString()} events` : plural(shown.length, "event")}</footer>
    </Page>
  );
}
