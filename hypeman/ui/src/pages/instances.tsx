// All instances, live. Only the visible rows are in the page, so that thousands do not slow it down.
import { useComputed, useSignal } from "@preact/signals";
import type { Instance } from "api-types";
import { useEffect, useRef } from "preact/hooks";
import { actionsOf } from "../actions";
import { missingScope } from "../api";
import { bytes, imageName, parseSize, plural, rate } from "../format";
import { failure, histories, instances, loaded, tick } from "../live";
import { go } from "../router";
import { Button, Code, Empty, Link, Page, Problem, Spark, State, Time } from "../ui";

const ROW = 44;
const MARGIN = 8;
/** Of a small graph: about a minute. */
const POINTS = 32;
const ORDER: Record<string, number> = { Unknown: 0, Initializing: 1, Created: 1, Running: 2, Paused: 3, Standby: 4, Shutdown: 5, Stopped: 6 };
const FILTERS = ["All", "Running", "Standby", "Stopped", "Other"] as const;
const MAIN = new Set<string>(["Running", "Standby", "Stopped"]);
type Sort = "name" | "state" | "created" | "cpu" | "memory";

/** Kept while the page is away. */
const kept = { text: "", filter: "All" as string, sort: "state" as Sort, top: 0 };

function matches(one: Instance, words: readonly string[]): boolean {
  if (!words.length) return true;
  const text = `${one.name} ${one.id} ${one.image} ${one.state} ${one.network?.ip ?? ""} ${Object.entries(one.tags ?? {}).map(([key, value]) => `${key}=${value}`).join(" ")}`.toLowerCase();
  return words.every((word) => text.includes(word));
}

export function Instances() {
  const text = useSignal(kept.text);
  const filter = useSignal(kept.filter);
  const sort = useSignal<Sort>(kept.sort);
  const scroller = useRef<HTMLDivElement>(null);
  const view = useSignal({ top: kept.top, height: 800 });
  const selected = useSignal(-1);
  const counts = useComputed(() => {
    const found: Record<string, number> = { All: instances.value.size, Other: 0 };
    for (const one of instances.value.values()) {
      const key = MAIN.has(one.state) ? one.state : "Other";
      found[key] = (found[key] ?? 0) + 1;
    }
    return found;
  });
  const rows = useComputed(() => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [...instances.value.values()].filter((one) =>
      (filter.value === "All" || (filter.value === "Other" ? !MAIN.has(one.state) : one.state === filter.value)) && matches(one, words));
    const by = sort.value;
    if (by === "cpu" || by === "memory") tick.value; // only these move with the samples
    const newest = (one: Instance) => (by === "cpu" ? histories.get(one.id)?.cpu : histories.get(one.id)?.memory)?.at(-1) ?? -1;
    const measure = by === "cpu" || by === "memory" ? new Map(found.map((one) => [one.id, newest(one)])) : undefined;
    return found.sort((a, b) => {
      const first = measure ? measure.get(b.id)! - measure.get(a.id)!
        : by === "state" ? ORDER[a.state]! - ORDER[b.state]!
        : by === "created" ? (a.created_at < b.created_at ? 1 : -1) : 0;
      return first || (a.name < b.name ? -1 : 1);
    });
  });
  useEffect(() => {
    const element = scroller.current;
    if (!element) return;
    element.scrollTop = kept.top;
    const measure = () => { view.value = { top: element.scrollTop, height: element.clientHeight }; };
    measure();
    const observer = new ResizeObserver(measure);
    observer.observe(element);
    return () => observer.disconnect();
  }, [loaded.value && instances.value.size > 0]);
  Object.assign(kept, { text: text.value, filter: filter.value, sort: sort.value, top: view.value.top });

  const total = rows.value.length;
  const first = Math.max(0, Math.floor(view.value.top / ROW) - MARGIN);
  const last = Math.min(total, Math.ceil((view.value.top + view.value.height) / ROW) + MARGIN);
  function move(to: number) {
    selected.value = Math.max(0, Math.min(total - 1, to));
    const element = scroller.current!;
    const at = selected.value * ROW;
    if (at < element.scrollTop) element.scrollTop = at;
    else if (at + ROW > element.scrollTop + element.clientHeight - ROW) element.scrollTop = at + 2 * ROW - element.clientHeight;
  }
  function keys(event: KeyboardEvent) {
    if ((event.target as Element).closest("button, input, select")) return;
    if (event.key === "ArrowDown" || event.key === "j") move(selected.value + 1);
    else if (event.key === "ArrowUp" || event.key === "k") move(selected.value - 1);
    else if (event.key === "Home") move(0);
    else if (event.key === "End") move(total - 1);
    else if (event.key === "Enter" && rows.value[selected.value]) go(`/instances/${rows.value[selected.value]!.name}`);
    else return;
    event.preventDefault();
  }
  const header = (key: Sort, title: string, name: string) => (
    <div role="columnheader" class={name} aria-sort={sort.value === key ? (key === "name" || key === "state" ? "ascending" : "descending") : "none"}>
      <button type="button" class="sort" onClick={() => { sort.value = key; }}>{title}</button>
    </div>
  );

  const create = <Button kind="primary" icon="plus" scope="instance:write" onClick={() => go("/create")}>Create</Button>;
  if (missingScope("instance:read")) return <Page title="Instances"><Empty icon="shield" title="Not permitted">{missingScope("instance:read")}.</Empty></Page>;
  if (failure.value && !loaded.value) return <Page title="Instances"><Problem message={failure.value} /></Page>;
  if (loaded.value && !instances.value.size) return <Page title="Instances"><Welcome /></Page>;
  return (
    <div class="page fill" onKeyDown={keys}>
      <header class="page-head"><div class="page-title"><h1>Instances</h1></div><div class="actions">{create}</div></header>
      <div class="toolbar">
        <input class="input filter" data-filter type="search" placeholder="Filter by name, image, tag, address" aria-label="Filter instances" value={text.value}
          onInput={(event) => { text.value = event.currentTarget.value; scroller.current?.scrollTo(0, 0); selected.value = -1; }}
          onKeyDown={(event) => { if (event.key === "ArrowDown" || event.key === "Enter") { move(0); scroller.current?.focus(); event.preventDefault(); } }} />
        <div class="segments" role="group" aria-label="State">
          {FILTERS.map((one) => (one !== "Other" || counts.value.Other ? (
            <button key={one} type="button" aria-pressed={filter.value === one} onClick={() => { filter.value = one; scroller.current?.scrollTo(0, 0); }}>
              {one}<span>{(counts.value[one] ?? 0).toLocaleString()}</span>
            </button>) : null))}
        </div>
      </div>
      <div class="grid" role="table" aria-label="Instances" aria-rowcount={total + 1}>
        <div class="grid-row grid-head" role="row" aria-rowindex={1}>
          {header("state", "State", "col-state")}{header("name", "Name", "col-name")}{header("cpu", "CPU", "col-graph")}{header("memory", "Memory", "col-graph")}
          <div role="columnheader" class="col-graph col-network">Network</div><div role="columnheader" class="col-address">Address</div>{header("created", "Created", "col-time")}
          <div role="columnheader" class="col-more"><span class="hidden">Actions</span></div>
        </div>
        <div class="grid-body" role="rowgroup" ref={scroller} tabIndex={0} aria-label="Rows"
          onScroll={(event) => { view.value = { top: event.currentTarget.scrollTop, height: event.currentTarget.clientHeight }; }}>
          <div style={{ height: `${total * ROW}px`, position: "relative" }} role="presentation">
            {rows.value.slice(first, last).map((one, number) => <Row key={one.id} one={one} at={first + number} chosen={selected.value === first + number} />)}
          </div>
          {loaded.value && !total && <p class="none">No instance matches.</p>}
        </div>
      </div>
      <footer class="list-foot" aria-live="polite">{total === instances.value.size ? plural(total, "instance") : `${total.toLocaleString()} of ${plural(instances.value.size, "instance")}`}</footer>
    </div>
  );
}

function Row({ one, at, chosen }: { one: Instance; at: number; chosen: boolean }) {
  tick.value;
  const history = histories.get(one.id);
  const cpus = one.vcpus ?? 1;
  const size = parseSize(one.size);
  const cpu = history?.cpu.at(-1), memory = history?.memory.at(-1);
  const down = history?.received.at(-1) ?? 0, up = history?.sent.at(-1) ?? 0;
  const traffic = history?.received.map((value, number) => value + history.sent[number]!).slice(-POINTS) ?? [];
  const quick = actionsOf(one).find((action) => !action.unavailable && ["start", "restore", "stop"].includes(action.name));
  return (
    <div class={`grid-row ${chosen ? "chosen" : ""}`} role="row" aria-rowindex={at + 2} style={{ transform: `translateY(${at * ROW}px)` }}>
      <div role="cell" class="col-state"><State state={one.current_phase === "pulling" ? "Pulling" : one.state} title={one.state_error ?? undefined} /></div>
      <div role="cell" class="col-name"><Link to={`/instances/${one.name}`} class="row-link">{one.name}</Link><small title={one.image}>{imageName(one.image)}</small></div>
      <div role="cell" class="col-graph">{cpu !== undefined && <><Spark values={history!.cpu.slice(-POINTS)} max={cpus} count={POINTS} tone="cpu" label={`CPU ${Math.round(100 * cpu)} %`} /><span>{Math.round(100 * cpu)}%</span></>}</div>
      <div role="cell" class="col-graph">{memory !== undefined && <><Spark values={history!.memory.slice(-POINTS)} max={size} count={POINTS} tone="memory" label={`Memory ${bytes(memory)}`} /><span>{bytes(memory, 0)}</span></>}</div>
      <div role="cell" class="col-graph col-network">{history && <><Spark values={traffic} max={Math.max(16_384, ...traffic)} count={POINTS} tone="network" label={`Network ${rate(down + up)}`} /><span>{rate(down + up)}</span></>}</div>
      <div role="cell" class="col-address mono">{one.network?.ip ?? ""}</div>
      <div role="cell" class="col-time"><Time at={one.created_at} /></div>
      <div role="cell" class="col-more">{quick && <Button kind="plain" icon={quick.icon} label={`${quick.title} ${one.name}`} onClick={quick.run} />}</div>
    </div>
  );
}

function Welcome() {
  return (
    <Empty icon="instances" title="Run your first instance" action={<Button kind="primary" icon="plus" scope="instance:write" onClick={() => go("/create")}>Create an instance</Button>}>
      <p>An instance is a small virtual machine with its own kernel, made from any OCI image. It boots in about a second, can be put in standby, and forked while it runs.</p>
      <p>The same from a terminal:</p>
      <Code>hypeman run --name web docker.io/library/nginx:alpine</Code>
    </Empty>
  );
}
