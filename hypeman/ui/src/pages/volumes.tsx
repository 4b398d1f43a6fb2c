// Volumes: all of them, and those of one instance.
import { useSignal } from "@preact/signals";
import type { Instance, Volume } from "api-types";
import { call, missingScope, post, remove, segment } from "../api";
import { instances, put } from "../live";
import { openDialog, Button, Check, notifyError, Dialog, Empty, Field, Link, Page, Panel, Problem, Select, Table, Tags, notify, Text, Time, useResource } from "../ui";

export function Volumes() {
  const making = useSignal(false);
  const found = useResource<Volume[]>(missingScope("volume:read") ? "" : "/volumes", ["volume"]);
  const volumes = [...(found.data ?? [])].sort((a, b) => (a.name < b.name ? -1 : 1));
  const button = <Button kind="primary" icon="plus" scope="volume:write" onClick={() => { making.value = true; }}>Create</Button>;
  async function destroy(volume: Volume) {
    const sure = await openDialog({ title: `Delete volume ${volume.name}?`, action: "Delete", danger: true, text: "Its data is lost." });
    if (sure !== null) await remove(`/volumes/${segment(volume.id)}`).then(() => { notify(`${volume.name} was deleted`); found.reload(); }, notifyError);
  }
  return (
    <Page title="Volumes" subtitle="Disks that outlive instances." actions={button}>
      {missingScope("volume:read") && <Empty icon="shield" title="Not permitted">{missingScope("volume:read")}.</Empty>}
      {found.error && <Problem message={found.error} onRetry={found.reload} />}
      {found.data && !volumes.length && <Empty icon="volumes" title="No volumes" action={button}><p>A volume keeps data when its instance is deleted. It can be attached and detached while the guest runs.</p></Empty>}
      {volumes.length > 0 && <Panel flush><Table label="Volumes" rows={volumes} id={(one) => one.id} columns={[
        { title: "Name", cell: (one) => <span class="two"><b>{one.name}</b><small class="mono">{one.id}</small></span> },
        { title: "Size", cell: (one) => `${one.size_gb} GB`, class: "number" },
        { title: "Attached to", cell: (one) => one.attachments?.length ? one.attachments.map((use) => <span class="two" key={use.instance_id}><Link to={`/instances/${use.instance_id}`}>{instances.value.get(use.instance_id)?.name ?? use.instance_id}</Link><small class="mono">{use.mount_path}{use.readonly ? ", read-only" : ""}</small></span>) : <span class="muted">nobody</span> },
        { title: "Tags", cell: (one) => <Tags tags={one.tags} />, narrow: true },
        { title: "Created", cell: (one) => <Time at={one.created_at} />, narrow: true },
        { title: "", class: "end", cell: (one) => <Button kind="plain" icon="trash" scope="volume:delete" unavailable={one.attachments?.length ? "It is attached; detach it first" : undefined} label={`Delete ${one.name}`} onClick={() => destroy(one)} /> },
      ]} /></Panel>}
      {making.value && <CreateDialog onClose={() => { making.value = false; found.reload(); }} />}
    </Page>
  );
}

function CreateDialog({ onClose }: { onClose: () => void }) {
  const name = useSignal("");
  const size = useSignal("10");
  const error = useSignal("");
  return (
    <Dialog title="Create a volume" onClose={onClose}>
      <form onSubmit={async (event) => {
        event.preventDefault();
        try {
          await post("/volumes", { name: name.value, size_gb: Number(size.value) });
          notify(`${name.value} was created`);
          onClose();
        } catch (problem) {
          error.value = (problem as Error).message;
        }
      }}>
        <Field label="Name" error={error.value}><Text value={name.value} onValue={(value) => { name.value = value; }} required autofocus /></Field>
        <Field label="Size in GB" hint="Space is taken as it is used."><Text type="number" min={1} value={size.value} onValue={(value) => { size.value = value; }} required /></Field>
        <div class="dialog-actions"><Button onClick={onClose}>Cancel</Button><Button type="submit" kind="primary">Create</Button></div>
      </form>
    </Dialog>
  );
}

export function Mounts({ instance }: { instance: Instance }) {
  const attaching = useSignal(false);
  const unreadable = missingScope("volume:read");
  const found = useResource<Volume[]>(unreadable ? "" : "/volumes", ["volume"]);
  const mounts = instance.volumes ?? [];
  const name = (id: string) => found.data?.find((one) => one.id === id)?.name ?? id;
  const button = <Button icon="plus" scope="volume:write" onClick={() => { attaching.value = true; }}>Attach</Button>;
  async function detach(id: string) {
    try {
      put(await call<Instance>("DELETE", `/instances/${segment(instance.id)}/volumes/${segment(id)}`));
      notify(`${name(id)} was detached`);
    } catch (error) {
      notifyError(error);
    }
  }
  return (
    <Panel title="Volumes" flush actions={button}>
      {mounts.length ? <Table label="Volumes" rows={mounts} id={(one) => one.volume_id} columns={[
        { title: "Volume", cell: (one) => <b>{name(one.volume_id)}</b> },
        { title: "Mounted at", cell: (one) => <span class="mono">{one.files ? `files below ${one.mount_path}` : one.mount_path}</span> },
        { title: "Access", cell: (one) => (one.overlay ? "private copy" : one.readonly ? "read-only" : "read and write") },
        { title: "", class: "end", cell: (one) => <Button kind="plain" scope="volume:write" onClick={() => detach(one.volume_id)}>Detach</Button> },
      ]} /> : <Empty icon="volumes" title="No volumes">What the guest writes outside of volumes is on its own disk and is deleted with it.</Empty>}
      {attaching.value && <AttachDialog instance={instance} volumes={found.data ?? []} problem={unreadable ?? found.error} onClose={() => { attaching.value = false; found.reload(); }} />}
    </Panel>
  );
}

function AttachDialog({ instance, volumes, problem, onClose }: { instance: Instance; volumes: readonly Volume[]; problem: string; onClose: () => void }) {
  const free = volumes.filter((one) => !instance.volumes?.some((mount) => mount.volume_id === one.id));
  const volume = useSignal(free[0]?.id ?? "");
  const path = useSignal("/data");
  const readonly = useSignal(false);
  const error = useSignal("");
  return (
    <Dialog title={`Attach a volume to ${instance.name}`} onClose={onClose}>
      {free.length ? (
        <form onSubmit={async (event) => {
          event.preventDefault();
          try {
            put(await post<Instance>(`/instances/${segment(instance.id)}/volumes/${segment(volume.value)}`, { mount_path: path.value, readonly: readonly.value }));
            onClose();
          } catch (problem) {
            error.value = (problem as Error).message;
          }
        }}>
          <Field label="Volume"><Select value={volume.value} options={free.map((one) => [one.id, `${one.name} (${one.size_gb} GB)`] as const)} onValue={(value) => { volume.value = value; }} /></Field>
          <Field label="Mount at" error={error.value}><Text value={path.value} onValue={(value) => { path.value = value; }} pattern="/.*" required /></Field>
          <Check checked={readonly.value} onValue={(value) => { readonly.value = value; }}>Read-only</Check>
          <div class="dialog-actions"><Button onClick={onClose}>Cancel</Button><Button type="submit" kind="primary">Attach</Button></div>
        </form>
      ) : problem ? <Problem message={problem} /> : <Empty icon="volumes" title="No other volume"><Link to="/volumes">Create one first</Link></Empty>}
    </Dialog>
  );
}
