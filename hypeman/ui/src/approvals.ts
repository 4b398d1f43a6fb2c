// Requests that egress rules hold until someone approves or denies them, of all instances. Loaded again when an event
// reports one, and regularly while there are any, since neither their number nor their end is an event.
import { computed, effect, signal } from "@preact/signals";
import type { EgressApproval } from "api-types";
import { can, get, post, segment, session } from "./api";
import { instances, version } from "./live";

const POLL_MS = 4000;

/** Oldest first. */
export const approvals = signal<readonly EgressApproval[]>([]);
/** By instance. */
export const waiting = computed(() => {
  const found = new Map<string, number>();
  for (const one of approvals.value) found.set(one.instance_id, (found.get(one.instance_id) ?? 0) + 1);
  return found;
});

/** "" is only the requests that wait. */
export const TIMES = [["", "Just these requests"], ["10m", "For 10 minutes"], ["1h", "For an hour"], ["24h", "For a day"]] as const;

async function load(): Promise<void> {
  if (!session.value || !can("instance:read")) approvals.value = [];
  else approvals.value = await get<EgressApproval[]>("/egress/approvals");
}

/** Rejects with the server's message, for example if the approval has ended meanwhile. */
export async function decide(one: EgressApproval, verb: "approve" | "deny", time: string): Promise<void> {
  try {
    await post(`/instances/${segment(one.instance_id)}/egress/approvals/${segment(one.id)}/${verb}`, time ? { for: time } : {});
  } finally {
    await load().catch(() => {});
  }
}

export const target = (one: EgressApproval) =>
  `${one.scheme}://${one.host}${one.port === (one.scheme === "https" ? 443 : 80) ? "" : `:${one.port}`}${one.path}`;

export const instanceName = (id: string) => instances.value.get(id)?.name ?? id;

export function watchApprovals(): void {
  const reload = () => { void load().catch(() => {}); };
  effect(() => {
    session.value;
    version("egress").value;
    reload();
  });
  setInterval(() => { if (approvals.value.length && !document.hidden) reload(); }, POLL_MS);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) reload(); });
}
