// What operations on an instance did, phase by phase: when each phase ran, what it took, and which one failed.
import { useSignal } from "@preact/signals";
import type { Instance, OperationTrace, TraceSpan } from "api-types";
import { useEffect } from "preact/hooks";
import { segment } from "../api";
import { duration } from "../format";
import { Empty, Icon, Panel, Problem, Time, useResource } from "../ui";

const SHOWN = 30;
/** How often the list is read again: the actions of policies have no events of their own. */
const LOOK_MS = 10_000;
/** Likewise while an operation has not ended. */
const LOOK_SOON_MS = 1500;
/** Width of a bar that would be too short to see, in percent. */
const MIN_WIDTH = 0.6;

export function Operations({ instance }: { instance: Instance }) {
  const running = useSignal(false);
  const found = useResource<OperationTrace[]>(`/traces?instance=${segment(instance.id)}&limit=${SHOWN}`, ["instance", "snapshot"], running.value ? LOOK_SOON_MS : LOOK_MS);
  useEffect(() => { running.value = found.data?.some((one) => one.duration_ms === null) ?? false; }, [found.data]);
  if (found.error) return <Problem message={found.error} onRetry={found.reload} />;
  if (!found.data) return null;
  if (!found.data.length) {
    return (
      <Panel><Empty icon="events" title="No operations">
        <p>The server keeps the newest operations of all instances in memory: calls that may change something, and what policies did.</p>
      </Empty></Panel>
    );
  }
  return (
    <Panel title="Operations" label="Operations" flush actions={<span class="muted">The newest {SHOWN} that the server remembers</span>}>
      {found.data.map((one, at) => <Operation key={one.id} one={one} open={at === 0} />)}
    </Panel>
  );
}

function Operation({ one, open }: { one: OperationTrace; open: boolean }) {
  const phases = one.spans.slice(1);
  const total = one.duration_ms ?? Math.max(0, ...one.spans.map((span) => span.begin_ms + (span.duration_ms ?? 0)));
  const depths = new Map([[one.spans[0]!.id, 0]]);
  for (const span of phases) depths.set(span.id, (depths.get(span.parent) ?? 0) + 1);
  return (
    <details class="operation" open={open}>
      <summary>
        <span class="mono wrap">{one.name}</span>
        {one.error && <span class="pill bad">failed</span>}
        <span class="grow" />
        <b>{one.duration_ms === null ? "not ended yet" : duration(one.duration_ms)}</b>
        <small><Time at={one.started_at} /></small>
      </summary>
      {one.error && <p class="operation-error">{one.error}</p>}
      <ol class="timeline" aria-label={`Phases of ${one.name}`}>
        {phases.map((span) => <Phase key={span.id} span={span} total={total} depth={depths.get(span.id)!} whole={one.error} />)}
      </ol>
      {!phases.length && <p class="none">It had no phases.</p>}
      {(one.dropped_spans ?? 0) > 0 && <p class="none">And {one.dropped_spans} more phases.</p>}
    </details>
  );
}

function Phase({ span, total, depth, whole }: { span: TraceSpan; total: number; depth: number; whole?: string }) {
  const share = (ms: number) => (total > 0 ? (100 * ms) / total : 0);
  const left = Math.min(100 - MIN_WIDTH, share(span.begin_ms));
  const width = Math.max(MIN_WIDTH, Math.min(100 - left, share(span.duration_ms ?? total - span.begin_ms)));
  const facts = Object.entries(span.attributes ?? {}).map(([key, value]) => `${key} ${value}`).join("\n");
  return (
    <li title={facts}>
      <span class="phase-name" style={{ paddingLeft: `${14 * (depth - 1)}px` }}>{span.name}</span>
      <span class="track" aria-hidden="true"><i class={span.error ? "tone-bad" : span.duration_ms === null ? "tone-wait" : "tone-accent"} style={{ marginLeft: `${left}%`, width: `${width}%` }} /></span>
      <span class="phase-took">{span.duration_ms === null ? "…" : duration(span.duration_ms)}</span>
      {span.error && span.error !== whole && <span class="phase-error"><Icon name="close" />{span.error}</span>}
    </li>
  );
}
