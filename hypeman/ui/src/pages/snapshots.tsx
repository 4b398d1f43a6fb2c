// Snapshots of an instance as a tree: captures in their order, and below each what was forked from it.
import type { Event as Change, Instance, Snapshot } from "api-types";
import { missingScope, post, remove, segment } from "../api";
import { snapshot as take } from "../actions";
import { bytes } from "../format";
import { instances, put } from "../live";
import { go } from "../router";
import { openDialog, Button, notifyError, Empty, Icon, Link, Panel, Problem, State, notify, Time, useResource } from "../ui";

type Fork = { id: string; name: string; snapshot?: string };

export function Snapshots({ instance }: { instance: Instance }) {
  const path = `/snapshots?source_instance_id=${segment(instance.id)}`;
  const found = useResource<Snapshot[]>(missingScope("snapshot:read") ? "" : path, ["snapshot"]);
  const born = useResource<Change[]>("/events?follow=false&since=0&limit=10000&type=instance.created", ["instance"]);
  const forks: Fork[] = (born.data ?? [])
    .filter((event) => event.data?.forked_from === instance.id || event.data?.forked_from === instance.name)
    .map((event) => ({ id: event.object.id, name: event.object.name ?? event.object.id, snapshot: event.data?.snapshot as string | undefined }));
  const snapshots = [...(found.data ?? [])].sort((a, b) => (a.created_at < b.created_at ? -1 : 1));
  const unavailable = ["Running", "Standby", "Stopped"].includes(instance.state) ? undefined : `${instance.name} is ${instance.state}`;
  const button = <Button icon="camera" scope="snapshot:write" unavailable={unavailable} onClick={() => take(instance)}>Take snapshot</Button>;
  if (missingScope("snapshot:read")) return <Panel><Empty icon="shield" title="Not permitted">{missingScope("snapshot:read")}.</Empty></Panel>;
  if (found.error) return <Problem message={found.error} onRetry={found.reload} />;
  if (found.data && !snapshots.length && !forks.length) {
    return (
      <Panel><Empty icon="camera" title="No snapshots" action={button}>
        <p>A snapshot keeps memory and disks at one moment. The instance can go back to it, and any number of forks can start from it, each in a fraction of a second.</p>
      </Empty></Panel>
    );
  }
  const direct = forks.filter((fork) => !snapshots.some((one) => one.id === fork.snapshot));
  return (
    <Panel title="Snapshots and forks" actions={button}>
      <ul class="tree" aria-label={`Snapshots of ${instance.name}`}>
        <li>
          <div class="node"><Icon name="instances" /><b>{instance.name}</b><State state={instance.state} /><small><Time at={instance.created_at} /></small></div>
          <ul>
            {snapshots.map((one) => <Node key={one.id} one={one} instance={instance} forks={forks.filter((fork) => fork.snapshot === one.id)} />)}
            {direct.map((fork) => <ForkNode key={fork.id} fork={fork} />)}
          </ul>
        </li>
      </ul>
    </Panel>
  );
}

function ForkNode({ fork }: { fork: Fork }) {
  const now = instances.value.get(fork.id);
  return (
    <li><div class="node"><Icon name="fork" />{now ? <Link to={`/instances/${now.name}`}>{now.name}</Link> : <span class="muted">{fork.name}</span>}
      {now ? <State state={now.state} /> : <small>deleted</small>}</div></li>
  );
}

function Node({ one, instance, forks }: { one: Snapshot; instance: Instance; forks: readonly Fork[] }) {
  const name = one.name ?? one.id.slice(0, 12);
  async function restore() {
    const sure = await openDialog({ title: `Restore ${instance.name} to ${name}?`, action: "Restore", danger: true,
      text: "Everything that happened since is lost. Take another snapshot first if you may need it." });
    if (sure === null) return;
    try {
      put(await post<Instance>(`/instances/${segment(instance.id)}/snapshots/${segment(one.id)}/restore`, {}));
      notify(`${instance.name} was restored to ${name}`);
    } catch (error) {
      notifyError(error);
    }
  }
  async function fork() {
    const made = await openDialog({ title: `Fork from ${name}`, action: "Fork", text: "A new instance that continues from the snapshot.",
      field: { label: "Name of the fork", value: `${instance.name}-${Math.random().toString(36).slice(2, 6)}`, hint: "Lowercase letters, digits and -" } });
    if (made === null) return;
    try {
      put(await post<Instance>(`/snapshots/${segment(one.id)}/fork`, { name: made }));
      notify(`${made} was forked`);
      go(`/instances/${made}`);
    } catch (error) {
      notifyError(error);
    }
  }
  async function destroy() {
    const sure = await openDialog({ title: `Delete snapshot ${name}?`, action: "Delete", danger: true, text: "Forks made from it are kept." });
    if (sure === null) return;
    await remove(`/snapshots/${segment(one.id)}`).then(() => notify(`${name} was deleted`), notifyError);
  }
  return (
    <li>
      <div class="node">
        <Icon name="camera" /><b>{name}</b><span class="tag">{one.kind === "Standby" ? "memory and disks" : "disks"}</span>
        <small>{bytes(one.compressed_size_bytes ?? one.size_bytes)} · <Time at={one.created_at} /></small>
        <span class="node-actions">
        <Button kind="plain" icon="fork" scope="snapshot:write" onClick={fork}>Fork</Button>
        <Button kind="plain" icon="restore" scope="snapshot:write" onClick={restore}>Restore</Button>
        <Button kind="plain" icon="trash" scope="snapshot:delete" label={`Delete ${name}`} onClick={destroy} />
        </span>
      </div>
      {forks.length > 0 && <ul>{forks.map((one) => <ForkNode key={one.id} fork={one} />)}</ul>}
    </li>
  );
}
