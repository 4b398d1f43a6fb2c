// How an instance is reached: its address, published ports, and host names.
import { useSignal } from "@preact/signals";
import type { Ingress, Instance, PortMapping } from "api-types";
import { call, missingScope, segment } from "../api";
import { put } from "../live";
import { Button, Dialog, Empty, Facts, Field, Link, Panel, Problem, Table, notify, Text, useResource } from "../ui";

export function Network({ instance }: { instance: Instance }) {
  const unreadable = missingScope("ingress:read");
  const ingresses = useResource<Ingress[]>(unreadable ? "" : "/ingresses", ["ingress"]);
  const editing = useSignal(false);
  const network = instance.network;
  const rules = (ingresses.data ?? []).flatMap((one) => one.rules.filter((rule) => rule.target.instance === instance.name || rule.target.instance === instance.id || rule.target.instance.includes("{")).map((rule) => ({ one, rule })));
  const ports = instance.ports ?? [];
  return (
    <>
      <div class="columns">
        <Panel title="Address">
          {network?.enabled === false ? <Empty icon="ingress" title="No network">This instance was created without one.</Empty> : <Facts rows={[
            ["IPv4", network?.ip && <span class="mono">{network.ip}</span>],
            ["MAC", network?.mac && <span class="mono">{network.mac}</span>],
            ["Name for other guests", <span class="mono">{instance.name}</span>],
            ["Groups of guests", network?.groups?.join(", ")],
            ["Download limit", network?.bandwidth_download],
            ["Upload limit", network?.bandwidth_upload],
          ]} />}
        </Panel>
        <Panel title="Published ports" flush actions={<Button scope="instance:write" onClick={() => { editing.value = true; }}>Change</Button>}>
          {ports.length ? <Table label="Published ports" rows={ports} id={(port) => `${port.host_address}${port.host_port}${port.protocol}`} columns={[
            { title: "Host", cell: (port) => <span class="mono">{port.host_address || "*"}:{port.host_port}{(port.count ?? 1) > 1 ? `–${port.host_port + port.count! - 1}` : ""}</span> },
            { title: "Guest", cell: (port) => <span class="mono">{port.guest_port}</span> },
            { title: "Protocol", cell: (port) => port.protocol ?? "tcp" },
          ]} /> : <Empty icon="ingress" title="No port is published">A published port of the host leads to one of the guest, as <code>-p 8000:80</code> does with <code>hypeman run</code>.</Empty>}
        </Panel>
      </div>
      <Panel title="Host names" flush actions={<Link to="/ingresses" class="link small">All ingresses</Link>}>
        {rules.length ? <Table label="Host names" rows={rules} id={({ one, rule }) => one.id + rule.match.hostname + rule.match.port} columns={[
          { title: "Host name", cell: ({ rule }) => <span class="mono">{rule.match.hostname}:{rule.match.port ?? 80}</span> },
          { title: "Guest port", cell: ({ rule }) => <span class="mono">{rule.target.port}</span> },
          { title: "Ingress", cell: ({ one }) => one.name },
        ]} /> : unreadable || ingresses.error ? <Problem message={unreadable ?? ingresses.error} />
          : ingresses.data && <Empty icon="ingress" title="No host names">An ingress passes requests for a host name on to an instance.</Empty>}
      </Panel>
      {editing.value && <PortsDialog instance={instance} onClose={() => { editing.value = false; }} />}
    </>
  );
}

/** First port and number of ports of "8000" or "8000-8010". */
function range(text: string, part: string): [first: number, count: number] {
  const [first, last = first] = part.split("-").map(Number) as [number, number?];
  if (last > 65535 || last < first) throw new Error(`"${text}": ${part} is not a port or a range of ports`);
  return [first, last - first + 1];
}

/** "127.0.0.1:8000:80/udp" or "8000-8010:80-90" in the form of the API. Throws an Error for malformed text. */
export function parsePort(text: string): Record<string, unknown> {
  const match = /^(?:(?:(\[[\da-f:]+\]|[\d.]+):)?(\d+(?:-\d+)?):)?(\d+(?:-\d+)?)(?:\/(tcp|udp))?$/i.exec(text.trim());
  if (!match) throw new Error(`"${text}" is not HOST:GUEST, such as 8000:80 or 127.0.0.1:5353:53/udp`);
  const [, address, host, guest, protocol] = match;
  const [first, count] = range(text, guest!);
  const [hostPort, hostCount] = host === undefined ? [0, count] : range(text, host);
  if (hostCount !== count) throw new Error(`"${text}" has ranges of different lengths`);
  return { host_port: hostPort, guest_port: first, ...(count > 1 ? { count } : {}), ...(protocol ? { protocol: protocol.toLowerCase() } : {}), ...(address ? { host_address: address.replace(/[[\]]/g, "") } : {}) };
}

/** What parsePort reads. */
function portText(port: PortMapping): string {
  const last = (first: number) => ((port.count ?? 1) > 1 ? `-${first + port.count! - 1}` : "");
  const address = !port.host_address ? "" : port.host_address.includes(":") ? `[${port.host_address}]:` : `${port.host_address}:`;
  return `${address}${port.host_port}${last(port.host_port)}:${port.guest_port}${last(port.guest_port)}${port.protocol === "udp" ? "/udp" : ""}`;
}

function PortsDialog({ instance, onClose }: { instance: Instance; onClose: () => void }) {
  const text = useSignal((instance.ports ?? []).map(portText).join(", "));
  const error = useSignal("");
  return (
    <Dialog title="Published ports" onClose={onClose}>
      <form onSubmit={async (event) => {
        event.preventDefault();
        try {
          const ports = text.value.split(/[\s,]+/).filter(Boolean).map(parsePort);
          put(await call<Instance>("PATCH", `/instances/${segment(instance.id)}`, { ports }));
          notify("The ports were changed");
          onClose();
        } catch (problem) {
          error.value = (problem as Error).message;
        }
      }}>
        <Field label="Ports" hint="HOST:GUEST or ranges of both, separated by commas. They replace the present ones; connections through removed ports are closed." error={error.value}>
          <Text value={text.value} onValue={(value) => { text.value = value; }} placeholder="8000:80, 127.0.0.1:5353:53/udp" autofocus />
        </Field>
        <div class="dialog-actions"><Button onClick={onClose}>Cancel</Button><Button type="submit" kind="primary">Publish</Button></div>
      </form>
    </Dialog>
  );
}
