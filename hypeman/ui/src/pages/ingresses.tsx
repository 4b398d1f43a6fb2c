// Ingresses: host names whose requests go to instances.
import { useSignal } from "@preact/signals";
import type { Ingress } from "api-types";
import { missingScope, post, remove, segment } from "../api";
import { instances } from "../live";
import { openDialog, Button, notifyError, Dialog, Empty, Field, Link, Page, Panel, Problem, Table, notify, Text, Time, useResource } from "../ui";

export function Ingresses() {
  const making = useSignal(false);
  const found = useResource<Ingress[]>(missingScope("ingress:read") ? "" : "/ingresses", ["ingress"]);
  const rows = (found.data ?? []).flatMap((one) => one.rules.map((rule, at) => ({ one, rule, at })));
  const button = <Button kind="primary" icon="plus" scope="ingress:write" onClick={() => { making.value = true; }}>Create</Button>;
  async function destroy(one: Ingress) {
    const sure = await openDialog({ title: `Delete ingress ${one.name}?`, action: "Delete", danger: true, text: `${one.rules.map((rule) => rule.match.hostname).join(", ")} will no longer be served.` });
    if (sure !== null) await remove(`/ingresses/${segment(one.id)}`).then(() => found.reload(), notifyError);
  }
  return (
    <Page title="Ingresses" subtitle="Requests for a host name are passed on to an instance." actions={button}>
      {missingScope("ingress:read") && <Empty icon="shield" title="Not permitted">{missingScope("ingress:read")}.</Empty>}
      {found.error && <Problem message={found.error} onRetry={found.reload} />}
      {found.data && !rows.length && <Empty icon="ingress" title="No ingresses" action={button}><p>With <code>web.example.com</code> → <code>web:80</code>, the host answers for that name and passes each request to the instance. A pattern such as <code>{"{instance}.example.com"}</code> serves all instances.</p></Empty>}
      {rows.length > 0 && <Panel flush><Table label="Ingresses" rows={rows} id={({ one, at }) => one.id + at} columns={[
        { title: "Host name", cell: ({ rule }) => <b class="mono">{rule.match.hostname}{(rule.match.port ?? 80) === 80 ? "" : `:${rule.match.port}`}</b> },
        { title: "Target", cell: ({ rule }) => <span>{[...instances.value.values()].some((one) => one.name === rule.target.instance) ? <Link to={`/instances/${rule.target.instance}`}>{rule.target.instance}</Link> : rule.target.instance}<span class="mono muted">:{rule.target.port}</span></span> },
        { title: "Ingress", cell: ({ one }) => one.name },
        { title: "TLS", cell: ({ rule }) => (rule.tls ? "yes" : "no"), narrow: true },
        { title: "Created", cell: ({ one }) => <Time at={one.created_at} />, narrow: true },
        { title: "", class: "end", cell: ({ one, at }) => at === 0 && <Button kind="plain" icon="trash" scope="ingress:delete" label={`Delete ${one.name}`} onClick={() => destroy(one)} /> },
      ]} /></Panel>}
      {making.value && <CreateDialog onClose={() => { making.value = false; found.reload(); }} />}
    </Page>
  );
}

function CreateDialog({ onClose }: { onClose: () => void }) {
  const name = useSignal("");
  const host = useSignal("");
  const target = useSignal("");
  const port = useSignal("80");
  const error = useSignal("");
  return (
    <Dialog title="Create an ingress" onClose={onClose}>
      <form onSubmit={async (event) => {
        event.preventDefault();
        try {
          await post("/ingresses", { name: name.value, rules: [{ match: { hostname: host.value }, target: { instance: target.value, port: Number(port.value) } }] });
          notify(`Requests for ${host.value} go to ${target.value}`);
          onClose();
        } catch (problem) {
          error.value = (problem as Error).message;
        }
      }}>
        <Field label="Name"><Text value={name.value} onValue={(value) => { name.value = value; }} required autofocus /></Field>
        <Field label="Host name"><Text value={host.value} onValue={(value) => { host.value = value; }} placeholder="web.example.com" required /></Field>
        <Field label="Instance"><Text value={target.value} onValue={(value) => { target.value = value; }} list="targets" required /></Field>
        <datalist id="targets">{[...instances.value.values()].slice(0, 200).map((one) => <option key={one.id} value={one.name} />)}</datalist>
        <Field label="Port of the guest" error={error.value}><Text type="number" min={1} max={65535} value={port.value} onValue={(value) => { port.value = value; }} required /></Field>
        <div class="dialog-actions"><Button onClick={onClose}>Cancel</Button><Button type="submit" kind="primary">Create</Button></div>
      </form>
    </Dialog>
  );
}
