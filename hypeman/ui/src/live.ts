// Live data: instances, kept current by the event log; usage, from one request for all of them; recent events.
//
// A hidden page holds no connection: browsers allow six for one server, over all pages. A shown one continues after the
// last event that it saw, and lists everything again if the log no longer reaches back that far.
import { batch, effect, signal } from "@preact/signals";
import type { Event as Change, Instance, UsageOfAll } from "api-types";
import { ApiError, can, get, segment, session, stillLoggedIn } from "./api";

export const instances = signal<ReadonlyMap<string, Instance>>(new Map());
export const loaded = signal(false);
export const connected = signal(false);
export const failure = signal("");
/** The connection broke and was not restored at once: what is shown may be old. */
export const lost = signal(false);
/** Grows when the connection is restored: what could not be read meanwhile is read again. */
export const reconnected = signal(0);
/** Newest first. */
export const changes = signal<readonly Change[]>([]);
/** Grows when an object of that kind changes. */
export const versions: Record<string, ReturnType<typeof signal<number>>> = {};
export function version(kind: string) {
  return (versions[kind] ??= signal(0));
}

const MAX_CHANGES = 2000;
const BATCH_MS = 120;
/** Delay before changed instances are fetched again: one by one if they are few, else with a new list. */
const REFRESH_MS = 700;
const MAX_SINGLE = 6;
const LIST_MS = 5000;
const LOST_MS = 3000;
const RETRY_MS = 2000;
const MAX_RETRY_MS = 30_000;

let source: EventSource | undefined;
let cursor = "";
let pending: Change[] = [];
let timer = 0;
let lastList = 0;
let stale = new Set<string>();
let refreshTimer = 0;
let breaking = 0;
let retry = RETRY_MS;
let listing = 0;

async function list(): Promise<void> {
  if (!can("instance:read")) {
    loaded.value = true;
    return;
  }
  lastList = Date.now();
  try {
    const found = await get<Instance[]>("/instances");
    instances.value = new Map(found.map((one) => [one.id, one]));
    failure.value = "";
    loaded.value = true;
  } catch (error) {
    failure.value = (error as Error).message;
    listing ||= setTimeout(() => {
      listing = 0;
      if (session.value && !document.hidden) void list();
    }, LIST_MS);
  }
}

function open(): void {
  source?.close();
  source = new EventSource(cursor ? `/events?since=${cursor}` : "/events");
  source.onopen = () => {
    clearTimeout(breaking);
    retry = RETRY_MS;
    batch(() => {
      connected.value = true;
      if (breaking) reconnected.value++;
      lost.value = false;
    });
    breaking = 0;
  };
  source.onmessage = (message) => {
    cursor = message.lastEventId;
    pending.push(JSON.parse(message.data) as Change);
    timer ||= setTimeout(apply, BATCH_MS);
  };
  source.addEventListener("error", (event) => {
    if (connected.value) breaking ||= setTimeout(() => { lost.value = !connected.value; }, LOST_MS);
    connected.value = false;
    const broken = event as MessageEvent;
    // A message: the log no longer reaches back. Closed: refused, and the browser does not try again.
    if (broken.data || source?.readyState === EventSource.CLOSED) {
      source?.close();
      cursor = "";
      setTimeout(async () => { if (session.value && !document.hidden && await stillLoggedIn()) start(); }, retry);
      retry = Math.min(2 * retry, MAX_RETRY_MS);
    }
  });
}

/** Applies a batch of events: states at once; the rest of a changed instance is fetched again later. */
function apply(): void {
  timer = 0;
  const events = pending;
  pending = [];
  const next = new Map(instances.value);
  batch(() => {
    const kinds = new Set<string>();
    for (const event of events) {
      const { kind, id } = event.object;
      kinds.add(kind);
      const about = kind === "instance" ? id : event.instance_id;
      if (event.type === "instance.deleted") {
        next.delete(id);
        stale.delete(id);
        continue;
      }
      if (!about) continue;
      const known = next.get(about);
      if (event.type === "instance.state_changed" && known) {
        const state = event.data?.to as Instance["state"];
        next.set(about, { ...known, state, current_phase: state.toLowerCase() });
      }
      stale.add(about);
    }
    for (const kind of kinds) version(kind).value = (version(kind).value ?? 0) + 1;
    instances.value = next;
    changes.value = [...events.reverse(), ...changes.value].slice(0, MAX_CHANGES);
  });
  if (stale.size) refreshTimer ||= setTimeout(refreshChanged, REFRESH_MS);
}

function refreshChanged(): void {
  refreshTimer = 0;
  if (stale.size <= MAX_SINGLE) {
    for (const id of stale) void refresh(id);
    stale = new Set();
  } else if (Date.now() - lastList >= LIST_MS) {
    stale = new Set();
    void list();
  } else refreshTimer = setTimeout(refreshChanged, lastList + LIST_MS - Date.now());
}

export async function refresh(id: string): Promise<void> {
  try {
    put(await get<Instance>(`/instances/${segment(id)}`));
  } catch (error) {
    if (error instanceof ApiError && error.status === 404 && instances.value.has(id)) drop(id);
  }
}

export function put(one: Instance): void {
  instances.value = new Map(instances.value).set(one.id, one);
}

export function drop(id: string): void {
  const next = new Map(instances.value);
  next.delete(id);
  instances.value = next;
}

// ── Usage ──────────────────────────────────────────────────────────────────────────────────────

export const SAMPLES = 90;
export const PERIOD_MS = 2000;
const GAP_MS = 15_000;

/** Rates of one instance, oldest first. CPU in processors, memory in bytes, traffic in bytes per second. */
export type History = { at: number[]; cpu: number[]; memory: number[]; received: number[]; sent: number[] };

export const histories = new Map<string, History>();
/** Grows with each sample. */
export const tick = signal(0);
let before: { at: number; by: Map<string, UsageOfAll["instances"][number]> } | undefined;

async function sample(): Promise<void> {
  const usage = await get<UsageOfAll>("/stats");
  const at = Date.parse(usage.time);
  if (before && at === before.at) return;
  const by = new Map(usage.instances.map((one) => [one.instance_id, one]));
  if (before && at - before.at < GAP_MS && at > before.at) {
    const seconds = (at - before.at) / 1000;
    for (const [id, now] of by) {
      const then = before.by.get(id);
      if (!then || now.cpu_seconds < then.cpu_seconds) continue;
      let history = histories.get(id);
      if (!history) histories.set(id, history = { at: [], cpu: [], memory: [], received: [], sent: [] });
      history.at.push(at);
      history.cpu.push((now.cpu_seconds - then.cpu_seconds) / seconds);
      history.memory.push(now.memory_rss_bytes);
      history.received.push(Math.max(0, now.network_rx_bytes - then.network_rx_bytes) / seconds);
      history.sent.push(Math.max(0, now.network_tx_bytes - then.network_tx_bytes) / seconds);
      if (history.at.length > SAMPLES) for (const row of Object.values(history)) row.shift();
    }
  }
  for (const id of histories.keys()) if (!by.has(id)) histories.delete(id);
  before = { at, by };
  tick.value++;
}

async function sampling(): Promise<void> {
  for (;;) {
    if (!document.hidden && session.value && can("instance:read")) await sample().catch(() => {});
    await new Promise((resolve) => setTimeout(resolve, PERIOD_MS));
  }
}

// ── Life of the page ───────────────────────────────────────────────────────────────────────────

function start(): void {
  open();
  void list();
}

function stop(): void {
  source?.close();
  source = undefined;
  clearTimeout(breaking);
  breaking = 0;
  connected.value = false;
  lost.value = false;
}

export function live(): void {
  effect(() => {
    if (session.value) start();
    else {
      stop();
      cursor = "";
      batch(() => {
        instances.value = new Map();
        changes.value = [];
        loaded.value = false;
      });
    }
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) stop();
    else if (session.value) start();
  });
  void sampling();
}
