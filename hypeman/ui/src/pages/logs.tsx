// The log of an instance as it grows. Only the visible lines are in the page.
import { useComputed, useSignal } from "@preact/signals";
import type { Instance } from "api-types";
import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { segment } from "../api";
import { plural } from "../format";
import { Button, Select } from "../ui";

const LINE = 19;
const MAX_LINES = 50_000;
const MARGIN = 20;
const SOURCES = [["app", "Program and console"], ["vmm", "Hypervisor"], ["hypeman", "Server"]] as const;
const ESCAPES = /\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-_]|[\x00-\x08\x0b-\x1f\x7f]/g;

export function Logs({ instance }: { instance: Instance }) {
  const source = useSignal("app");
  return (
    <LogView label={`Log of ${instance.name}`} file={`${instance.name}-${source.value}.log`} again={instance.state === "Running"}
      url={`/instances/${segment(instance.id)}/logs?follow=true&tail=2000&source=${source.value}`} read={(data) => JSON.parse(data) as string}
      tools={<Select label="Log" value={source.value} options={SOURCES} onValue={(value) => { source.value = value; }} />} />
  );
}

type LogProps = {
  label: string;
  /** Name of the file to save. */
  file: string;
  /** Of server-sent events. */
  url: string;
  /** The line in an event; undefined if it has none, null if the stream ends with it. */
  read: (data: string) => string | undefined | null;
  /** A change opens the stream again. */
  again?: unknown;
  tools?: ComponentChildren;
};

export function LogView({ label, file, url, read, again, tools }: LogProps) {
  const lines = useSignal<string[]>([]);
  const version = useSignal(0);
  const search = useSignal("");
  const only = useSignal(false);
  const follow = useSignal(true);
  const problem = useSignal("");
  const at = useSignal(0);
  const view = useSignal({ top: 0, height: 600 });
  const scroller = useRef<HTMLDivElement>(null);

  useEffect(() => {
    lines.value = [];
    version.value++;
    problem.value = "";
    let waiting: string[] = [], frame = 0, fresh = true;
    const flush = () => {
      frame = 0;
      const all = fresh ? waiting : lines.value.concat(waiting);
      fresh = false;
      waiting = [];
      lines.value = all.length > MAX_LINES ? all.slice(-MAX_LINES) : all;
      version.value++;
    };
    const stream = new EventSource(url);
    stream.onopen = () => { fresh = true; waiting = []; problem.value = ""; }; // after a break the lines come again
    stream.onmessage = ({ data }) => {
      const line = read(data as string);
      if (line === null) stream.close();
      if (typeof line !== "string") return;
      waiting.push(line.replace(ESCAPES, ""));
      frame ||= requestAnimationFrame(flush);
    };
    stream.onerror = () => { problem.value = stream.readyState === EventSource.CLOSED ? "This log does not exist yet." : "The connection was lost; trying again."; };
    return () => { stream.close(); cancelAnimationFrame(frame); };
  }, [url, again]);

  const hits = useComputed(() => {
    version.value;
    const wanted = search.value.toLowerCase();
    const found: number[] = [];
    if (wanted) lines.value.forEach((line, number) => { if (line.toLowerCase().includes(wanted)) found.push(number); });
    return found;
  });
  const shown = only.value && search.value ? hits.value.map((number) => lines.value[number]!) : lines.value;
  useEffect(() => {
    const element = scroller.current!;
    const measure = () => { view.value = { top: element.scrollTop, height: element.clientHeight }; };
    const observer = new ResizeObserver(measure);
    observer.observe(element);
    return () => observer.disconnect();
  }, []);
  useEffect(() => { if (follow.value) scroller.current!.scrollTop = shown.length * LINE; }, [version.value, follow.value, shown.length]);

  function jump(by: number) {
    if (!hits.value.length) return;
    at.value = (at.value + by + hits.value.length) % hits.value.length;
    follow.value = false;
    const line = only.value ? at.value : hits.value[at.value]!;
    scroller.current!.scrollTop = line * LINE - view.value.height / 2;
  }
  const first = Math.max(0, Math.floor(view.value.top / LINE) - MARGIN);
  const last = Math.min(shown.length, Math.ceil((view.value.top + view.value.height) / LINE) + MARGIN);
  const current = hits.value.length ? (only.value ? at.value : hits.value[at.value]) : -1;
  return (
    <div class="logs">
      <div class="toolbar">
        <input class="input filter" data-filter type="search" placeholder="Search" aria-label="Search the log" value={search.value}
          onInput={(event) => { search.value = event.currentTarget.value; at.value = 0; }}
          onKeyDown={(event) => { if (event.key === "Enter") jump(event.shiftKey ? -1 : 1); }} />
        {search.value && <>
          <span class="muted" aria-live="polite">{hits.value.length ? `${at.value + 1} of ${hits.value.length.toLocaleString()}` : "nothing"}</span>
          <Button kind="plain" icon="up" label="Previous match" onClick={() => jump(-1)} /><Button kind="plain" icon="down" label="Next match" onClick={() => jump(1)} />
          <Button kind="plain" pressed={only.value} onClick={() => { only.value = !only.value; }}>Only matches</Button>
        </>}
        <span class="grow" />
        {tools}
        <Button pressed={follow.value} icon="down" onClick={() => { follow.value = !follow.value; }}>Follow</Button>
        <Button icon="download" label="Save what is shown" onClick={() => save(file, new Blob([lines.value.join("\n"), "\n"]))} />
      </div>
      <div class="log" ref={scroller} tabIndex={0} role="log" aria-label={label} aria-live="off" onScroll={(event) => {
        const element = event.currentTarget;
        view.value = { top: element.scrollTop, height: element.clientHeight };
        if (element.scrollTop + element.clientHeight < element.scrollHeight - 3 * LINE) follow.value = false;
        else if (element.scrollHeight > element.clientHeight) follow.value = true;
      }}>
        <div style={{ height: `${shown.length * LINE}px` }}>
          <div style={{ transform: `translateY(${first * LINE}px)` }}>
            {shown.slice(first, last).map((line, number) => <div key={first + number} class={`log-line ${first + number === current ? "current" : ""}`}>{marked(line, search.value)}</div>)}
          </div>
        </div>
        {!shown.length && <p class="none">{problem.value || (search.value ? "Nothing matches." : "No output yet. It appears here as it is written.")}</p>}
      </div>
      <footer class="list-foot">{plural(lines.value.length, "line")}{problem.value && lines.value.length ? ` – ${problem.value}` : ""}</footer>
    </div>
  );
}

function marked(line: string, search: string) {
  if (!search) return line || " ";
  const parts = [];
  const lower = line.toLowerCase(), wanted = search.toLowerCase();
  let from = 0;
  for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, from)) {
    parts.push(line.slice(from, at), <mark>{line.slice(at, at + wanted.length)}</mark>);
    from = at + wanted.length;
  }
  parts.push(line.slice(from) || " ");
  return parts;
}

export function save(name: string, content: Blob): void {
  const url = URL.createObjectURL(content);
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
