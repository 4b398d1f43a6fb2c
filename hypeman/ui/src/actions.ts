// The actions on an instance, and why one is unavailable.
import type { Instance } from "api-types";
import { missingScope, post, remove, segment } from "./api";
import { drop, put } from "./live";
import { go } from "./router";
import { openDialog, notifyError, notify } from "./ui";
import type { IconName } from "./ui";

export type Action = { name: string; title: string; icon: IconName; scope: string; unavailable?: string; run: () => Promise<void> };

async function perform(work: () => Promise<unknown>, done: string): Promise<void> {
  try {
    await work();
    notify(done);
  } catch (error) {
    notifyError(error);
  }
}

export function actionsOf(instance: Instance): Action[] {
  const { name, state } = instance;
  const path = `/instances/${segment(instance.id)}`;
  const only = (states: readonly string[], text: string) => (states.includes(state) ? undefined : `${name} is ${state}; ${text}`);
  const verb = (what: string) => async () => { put(await post<Instance>(`${path}/${what}`)); };
  const actions: Action[] = [
    { name: "start", title: "Start", icon: "play", scope: "instance:write", unavailable: only(["Stopped"], "only a stopped instance can be started"),
      run: () => perform(verb("start"), `${name} starts`) },
    { name: "restore", title: "Wake", icon: "play", scope: "instance:write", unavailable: only(["Standby"], "only one in standby can be woken"),
      run: () => perform(verb("restore"), `${name} is back`) },
    { name: "standby", title: "Standby", icon: "pause", scope: "instance:write", unavailable: only(["Running"], "only a running instance can enter standby"),
      run: () => perform(verb("standby"), `${name} is in standby`) },
    { name: "stop", title: "Stop", icon: "stop", scope: "instance:write", unavailable: only(["Running", "Paused", "Initializing", "Created"], "there is nothing to stop"),
      run: () => perform(verb("stop"), `${name} is stopped`) },
    { name: "snapshot", title: "Snapshot", icon: "camera", scope: "snapshot:write", unavailable: only(["Running", "Standby", "Stopped"], "a snapshot needs it running, in standby or stopped"),
      run: () => snapshot(instance) },
    { name: "fork", title: "Fork", icon: "fork", scope: "instance:write", unavailable: only(["Running", "Standby", "Stopped"], "a fork needs it running, in standby or stopped"),
      run: () => fork(instance) },
    { name: "delete", title: "Delete", icon: "trash", scope: "instance:delete", run: () => destroy(instance) },
  ];
  return actions.map((action) => ({ ...action, unavailable: missingScope(action.scope) ?? action.unavailable }));
}

const suffix = () => Math.random().toString(36).slice(2, 6);

export async function snapshot(instance: Instance): Promise<void> {
  const kind = instance.state === "Stopped" ? "Stopped" : "Standby";
  const name = await openDialog({
    title: `Snapshot ${instance.name}`, action: "Take snapshot",
    text: kind === "Stopped" ? "Its disks are kept." : "Its memory and disks are kept. A running guest is paused for the moment of the capture.",
    field: { label: "Name", value: `${instance.name}-${suffix()}`, hint: "Lowercase letters, digits and -" },
  });
  if (name !== null) await perform(() => post(`/instances/${segment(instance.id)}/snapshots`, { kind, name }), `Snapshot ${name} was taken`);
}

export async function fork(instance: Instance): Promise<void> {
  const name = await openDialog({
    title: `Fork ${instance.name}`, action: "Fork",
    text: "A new instance with the same memory and disks, a name and an address of its own.",
    field: { label: "Name of the fork", value: `${instance.name}-${suffix()}`, hint: "Lowercase letters, digits and -" },
  });
  if (name === null) return;
  await perform(async () => {
    put(await post<Instance>(`/instances/${segment(instance.id)}/fork`, { name, from_running: instance.state === "Running" }));
    go(`/instances/${name}`);
  }, `${name} was forked from ${instance.name}`);
}

export async function destroy(instance: Instance): Promise<void> {
  const sure = await openDialog({ title: `Delete ${instance.name}?`, action: "Delete", danger: true,
    text: "Its VM is stopped, and its disk is removed. Volumes and snapshots are kept." });
  if (sure === null) return;
  await perform(async () => {
    await remove(`/instances/${segment(instance.id)}`);
    drop(instance.id);
    go("/instances");
  }, `${instance.name} was deleted`);
}
