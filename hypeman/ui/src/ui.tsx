// Components that all pages use.
import { signal, useSignal } from "@preact/signals";
import { cloneElement } from "preact";
import type { ComponentChildren, VNode } from "preact";
import { useEffect, useId, useLayoutEffect, useRef, useState } from "preact/hooks";
import { ApiError, get, missingScope, messageOf } from "./api";
import { ago, dateTime } from "./format";
import { reconnected, version } from "./live";
import { href } from "./router";

// ── Icons: 16 × 16, drawn with the text's colour ───────────────────────────────────────────────

const ICONS = {
  instances: "M2.5 3.5h11v4h-11zM2.5 9.5h11v3h-11zM4.7 5.5h.01M4.7 11h.01",
  images: "M8 1.8 14 5 8 8.2 2 5zM2 8l6 3.2L14 8M2 11l6 3.2L14 11",
  volumes: "M2.5 4.2c0-1.2 2.5-2.2 5.5-2.2s5.5 1 5.5 2.2-2.5 2.2-5.5 2.2-5.5-1-5.5-2.2zM2.5 4.2v7.6c0 1.2 2.5 2.2 5.5 2.2s5.5-1 5.5-2.2V4.2M2.5 8c0 1.2 2.5 2.2 5.5 2.2s5.5-1 5.5-2.2",
  devices: "M4 4h8v8H4zM6.5 1.5V4M9.5 1.5V4M6.5 12v2.5M9.5 12v2.5M1.5 6.5H4M1.5 9.5H4M12 6.5h2.5M12 9.5h2.5",
  ingress: "M2 8h9M8 4.5 11.5 8 8 11.5M14 3v10",
  host: "M2 2.5h12v8H2zM5.5 13.5h5M8 10.5v3",
  events: "M1.5 8.5h3l2-5.5 3 10 2-4.5h3",
  usage: "M2.5 13.5V9M6.2 13.5V3.5M9.9 13.5V7M13.5 13.5V5",
  build: "M2.5 13.5l5-5M6 4.5l5.5 5.5M5 5.5 8 2.5l5.5 5.5-3 3zM3.4 14.4l-1.8-1.8",
  search: "M7 2.5a4.5 4.5 0 1 0 0 9 4.5 4.5 0 0 0 0-9zM10.4 10.4 14 14",
  plus: "M8 3v10M3 8h10",
  play: "M5 3l8 5-8 5z",
  stop: "M4 4h8v8H4z",
  moon: "M13 9.5A5.5 5.5 0 0 1 6.5 3 5.5 5.5 0 1 0 13 9.5z",
  sun: "M8 5a3 3 0 1 0 0 6 3 3 0 0 0 0-6zM8 1.2v1.6M8 13.2v1.6M1.2 8h1.6M13.2 8h1.6M3.2 3.2l1.1 1.1M11.7 11.7l1.1 1.1M3.2 12.8l1.1-1.1M11.7 4.3l1.1-1.1",
  pause: "M5.5 3.5v9M10.5 3.5v9",
  fork: "M4.5 3v10M4.5 9.5c0-3 7-1.5 7-5M11.5 4.5v-.2M3 3a1.5 1.5 0 1 0 3 0 1.5 1.5 0 0 0-3 0zM3 13a1.5 1.5 0 1 0 3 0 1.5 1.5 0 0 0-3 0zM10 3a1.5 1.5 0 1 0 3 0 1.5 1.5 0 0 0-3 0z",
  camera: "M2 5h3l1.2-1.8h3.6L11 5h3v8H2zM8 6.7a2.2 2.2 0 1 0 0 4.4 2.2 2.2 0 0 0 0-4.4z",
  trash: "M3 4.5h10M6.5 4.5V3h3v1.5M4.5 4.5l.6 8.5h5.8l.6-8.5",
  terminal: "M2 3h12v10H2zM4.5 6l2 2-2 2M8 10.5h3",
  file: "M4 1.8h5L12.5 5v9.2H4zM9 1.8V5h3.5",
  folder: "M1.8 4h4.4l1.3 1.6h6.7v7H1.8z",
  download: "M8 2v8M4.8 7 8 10.2 11.2 7M2.5 13.5h11",
  upload: "M8 10.5v-8M4.8 5.6 8 2.4l3.2 3.2M2.5 13.5h11",
  copy: "M5.5 5.5h8v8h-8zM10.5 5.5v-3h-8v8h3",
  check: "M3 8.5l3.2 3.2L13 4.8",
  close: "M4 4l8 8M12 4l-8 8",
  restore: "M3 8a5 5 0 1 0 1.6-3.7M3 2.5v2.8h2.8",
  more: "M3.5 8h.01M8 8h.01M12.5 8h.01",
  menu: "M2.5 4h11M2.5 8h11M2.5 12h11",
  user: "M8 2.5a2.7 2.7 0 1 0 0 5.4 2.7 2.7 0 0 0 0-5.4zM2.8 14c.5-3 2.6-4.4 5.2-4.4s4.7 1.4 5.2 4.4",
  up: "M8 13V3.5M4.5 7 8 3.5 11.5 7",
  down: "M8 3v9.5M4.5 9 8 12.5 11.5 9",
  shield: "M8 1.8l5 1.8v4c0 3.2-2.2 5.4-5 6.6-2.8-1.2-5-3.4-5-6.6v-4z",
} as const;

export type IconName = keyof typeof ICONS;

export function Icon({ name }: { name: IconName }) {
  return <svg class="icon" viewBox="0 0 16 16" aria-hidden="true"><path d={ICONS[name]} /></svg>;
}

// ── Controls ───────────────────────────────────────────────────────────────────────────────────

type ButtonProps = {
  children?: ComponentChildren;
  icon?: IconName;
  /** Accessible name of a button without text. */
  label?: string;
  kind?: "primary" | "danger" | "plain";
  /** A scope that the caller needs. */
  scope?: string;
  /** Why it is disabled. */
  unavailable?: string;
  busy?: boolean;
  onClick?: () => unknown;
  type?: "button" | "submit";
  pressed?: boolean;
};

/** A disabled button stays focusable and shows the reason. */
export function Button({ children, icon, label, kind, scope, unavailable, busy, onClick, type = "button", pressed }: ButtonProps) {
  const reason = (scope && missingScope(scope)) || unavailable;
  return (
    <button
      type={type} class={`button ${kind ?? ""} ${children ? "" : "only-icon"}`} aria-label={label} title={reason ?? label}
      aria-disabled={reason || busy ? "true" : undefined} aria-pressed={pressed} aria-busy={busy ? "true" : undefined}
      onClick={(event) => {
        if (reason || busy) event.preventDefault();
        else onClick?.();
      }}
    >
      {busy ? <span class="spinner" /> : icon && <Icon name={icon} />}
      {children && <span>{children}</span>}
    </button>
  );
}

/** A control with its label, and a hint or an error. */
export function Field({ label, hint, error, children }: { label: string; hint?: ComponentChildren; error?: string; children: VNode<Described> }) {
  const id = useId();
  return (
    <div class="field">
      <label class="field-label" for={id}>{label}</label>
      {cloneElement(children, { id, "aria-describedby": error || hint ? `${id}-hint` : undefined })}
      {error ? <span id={`${id}-hint`} class="field-error" role="alert">{error}</span> : hint && <span id={`${id}-hint`} class="field-hint">{hint}</span>}
    </div>
  );
}

type Described = { id?: string; "aria-describedby"?: string };

type TextProps = Described & {
  value: string; onValue: (value: string) => void; type?: "text" | "number"; placeholder?: string; list?: string; pattern?: string;
  required?: boolean; autofocus?: boolean; min?: number; max?: number; maxLength?: number; "aria-label"?: string;
};

export function Text({ value, onValue, type = "text", ...rest }: TextProps) {
  return <input class="input" spellcheck={false} autocomplete="off" {...rest} type={type as "text"} value={value} onInput={(event) => onValue(event.currentTarget.value)} />;
}

export function Select({ value, onValue, options, label, ...rest }: Described & { value: string; onValue: (value: string) => void; options: readonly (readonly [string, string])[]; label?: string; title?: string }) {
  return (
    <select class="input select" {...rest} aria-label={label} value={value} onChange={(event) => onValue(event.currentTarget.value)}>
      {options.map(([key, text]) => <option key={key} value={key} selected={key === value}>{text}</option>)}
    </select>
  );
}

export function Check({ checked, onValue, children }: { checked: boolean; onValue: (value: boolean) => void; children: ComponentChildren }) {
  return (
    <label class="check">
      <input type="checkbox" checked={checked} onChange={(event) => onValue(event.currentTarget.checked)} />
      <span>{children}</span>
    </label>
  );
}

export function CopyButton({ text, label = "Copy" }: { text: string; label?: string }) {
  const done = useSignal(false);
  return (
    <Button icon={done.value ? "check" : "copy"} label={done.value ? "Copied" : label} kind="plain" onClick={async () => {
      await copyText(text);
      done.value = true;
      setTimeout(() => { done.value = false; }, 1500);
    }} />
  );
}

/** Works without a secure context as well, where there is no clipboard API. */
export async function copyText(text: string): Promise<void> {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

// ── Layout ─────────────────────────────────────────────────────────────────────────────────────

export function Page({ title, subtitle, actions, children, crumbs }: { title: ComponentChildren; subtitle?: ComponentChildren; actions?: ComponentChildren; children: ComponentChildren; crumbs?: ComponentChildren }) {
  return (
    <div class="page">
      <header class="page-head">
        <div class="page-title">
          {crumbs}
          <h1>{title}</h1>
          {subtitle && <p class="muted">{subtitle}</p>}
        </div>
        {actions && <div class="actions">{actions}</div>}
      </header>
      {children}
    </div>
  );
}

export function Panel({ title, actions, children, flush, label }: { title?: ComponentChildren; actions?: ComponentChildren; children: ComponentChildren; flush?: boolean; label?: string }) {
  return (
    <section class="panel" aria-label={label}>
      {(title || actions) && <div class="panel-head"><h2>{title}</h2>{actions && <div class="actions">{actions}</div>}</div>}
      <div class={flush ? "" : "panel-body"}>{children}</div>
    </section>
  );
}

export function Empty({ icon, title, children, action }: { icon: IconName; title: string; children?: ComponentChildren; action?: ComponentChildren }) {
  return (
    <div class="empty">
      <span class="empty-icon"><Icon name={icon} /></span>
      <h2>{title}</h2>
      {children && <div class="empty-text">{children}</div>}
      {action}
    </div>
  );
}

export function Problem({ message, onRetry }: { message: string; onRetry?: () => void }) {
  return <div class="problem" role="alert"><span>{message}</span>{onRetry && <Button kind="plain" onClick={onRetry}>Try again</Button>}</div>;
}

export function Facts({ rows }: { rows: readonly (readonly [string, ComponentChildren])[] }) {
  return <dl class="facts">{rows.filter(([, value]) => value !== undefined && value !== null && value !== "").map(([name, value]) => <div key={name}><dt>{name}</dt><dd>{value}</dd></div>)}</dl>;
}

export function Time({ at }: { at: string | null | undefined }) {
  useTick(20_000);
  if (!at) return <span class="muted">–</span>;
  return <time dateTime={at} title={dateTime(at)}>{ago(at)}</time>;
}

export function Tags({ tags }: { tags: Record<string, string> | undefined }) {
  const entries = Object.entries(tags ?? {});
  if (!entries.length) return null;
  return <span class="tags">{entries.map(([key, value]) => <span class="tag" key={key}>{key}<b>{value}</b></span>)}</span>;
}

export function Link({ to, children, class: name }: { to: string; children: ComponentChildren; class?: string }) {
  return <a href={href(to)} class={name ?? "link"}>{children}</a>;
}

export function Code({ children }: { children: string }) {
  return <div class="code"><pre tabIndex={0}>{children}</pre><CopyButton text={children} /></div>;
}

export function Bar({ parts, total, label }: { parts: readonly { value: number; tone: string; title: string }[]; total: number; label: string }) {
  return (
    <div class="bar" role="img" aria-label={label} title={label}>
      {parts.map((part) => <span key={part.title} class={`tone-${part.tone}`} title={part.title} style={{ width: `${total > 0 ? Math.min(100, (100 * part.value) / total) : 0}%` }} />)}
    </div>
  );
}

export type Column<T> = { title: string; cell: (row: T) => ComponentChildren; class?: string; narrow?: boolean };

/** A table; on a phone, columns that are `narrow` are left out. */
export function Table<T>({ rows, columns, id, label, to }: { rows: readonly T[]; columns: readonly Column<T>[]; id: (row: T) => string; label: string; to?: (row: T) => string }) {
  return (
    <div class="table-wrap" role="region" aria-label={label} tabIndex={0}>
      <table class="table">
        <thead><tr>{columns.map((one) => <th key={one.title} scope="col" class={`${one.class ?? ""} ${one.narrow ? "wide-only" : ""}`}>{one.title || <span class="hidden">Actions</span>}</th>)}</tr></thead>
        <tbody>{rows.map((row) => (
          <tr key={id(row)} class={to ? "clickable" : ""}>
            {columns.map((one) => <td key={one.title} class={`${one.class ?? ""} ${one.narrow ? "wide-only" : ""}`}>{one.cell(row)}</td>)}
          </tr>
        ))}</tbody>
      </table>
    </div>
  );
}

// ── Dialogs and messages ───────────────────────────────────────────────────────────────────────

export function Dialog({ title, onClose, children, wide }: { title: string; onClose: () => void; children: ComponentChildren; wide?: boolean }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useLayoutEffect(() => {
    const element = dialog.current!;
    element.showModal();
    return () => element.close();
  }, []);
  return (
    <dialog ref={dialog} class={`dialog ${wide ? "wide" : ""}`} aria-label={title}
      onCancel={(event) => { event.preventDefault(); onClose(); }}
      onMouseDown={(event) => { if (event.target === event.currentTarget) onClose(); }}>
      <div class="dialog-box">
        <div class="dialog-head"><h2>{title}</h2><Button icon="close" label="Close" kind="plain" onClick={onClose} /></div>
        {children}
      </div>
    </dialog>
  );
}

type Toast = { id: number; text: string; bad: boolean };
const toasts = signal<readonly Toast[]>([]);
let nextToast = 1;

export function notify(text: string, bad = false): void {
  const id = nextToast++;
  toasts.value = [...toasts.value, { id, text, bad }];
  setTimeout(() => { toasts.value = toasts.value.filter((one) => one.id !== id); }, bad ? 9000 : 4000);
}

export const notifyError = (error: unknown) => notify(messageOf(error), true);

export function Toasts() {
  return (
    <div class="toasts" role="status" aria-live="polite">
      {toasts.value.map((one) => (
        <div key={one.id} class={`toast ${one.bad ? "bad" : ""}`}>
          <span>{one.text}</span>
          <Button icon="close" label="Dismiss" kind="plain" onClick={() => { toasts.value = toasts.value.filter((other) => other.id !== one.id); }} />
        </div>
      ))}
    </div>
  );
}

type Question = { title: string; text: ComponentChildren; action: string; danger: boolean; field?: { label: string; value: string; hint?: string }; answer: (value: string | null) => void };
const question = signal<Question | null>(null);

/** The text of the field, "yes" without one, null if it was cancelled. */
export function openDialog(asked: Omit<Question, "answer" | "danger"> & { danger?: boolean }): Promise<string | null> {
  return new Promise((answer) => { question.value = { danger: false, ...asked, answer }; });
}

export function Questions() {
  const asked = question.value;
  return asked && <QuestionDialog key={asked.title} asked={asked} />;
}

function QuestionDialog({ asked }: { asked: Question }) {
  const value = useSignal(asked.field?.value ?? "");
  const finish = (answer: string | null) => {
    question.value = null;
    asked.answer(answer);
  };
  return (
    <Dialog title={asked.title} onClose={() => finish(null)}>
      <form onSubmit={(event) => { event.preventDefault(); finish(asked.field ? value.value : "yes"); }}>
        <div class="dialog-text">{asked.text}</div>
        {asked.field && <Field label={asked.field.label} hint={asked.field.hint}><Text value={value.value} onValue={(text) => { value.value = text; }} required autofocus /></Field>}
        <div class="dialog-actions">
          <Button onClick={() => finish(null)}>Cancel</Button>
          <Button type="submit" kind={asked.danger ? "danger" : "primary"}>{asked.action}</Button>
        </div>
      </form>
    </Dialog>
  );
}

// ── Hooks ──────────────────────────────────────────────────────────────────────────────────────

export function useTick(ms: number): void {
  const [, set] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => set((count) => count + 1), ms);
    return () => clearInterval(timer);
  }, [ms]);
}

/** Statuses of transient errors; 0: no answer. */
const PASSING: ReadonlySet<number> = new Set([0, 429, 502, 503, 504]);
const RETRY_MS = 5000;

export type Resource<T> = { data: T | undefined; error: string; reload: () => void };

/** The answer to GET `path`, read again when an object of `kinds` changes; an empty path reads nothing. */
export function useResource<T>(path: string, kinds: readonly string[] = [], everyMs = 0): Resource<T> {
  const data = useSignal<T | undefined>(undefined);
  const error = useSignal("");
  const [count, again] = useState(0);
  const seen = kinds.map((kind) => version(kind).value).join();
  const last = useRef(path);
  useEffect(() => {
    if (last.current !== path) data.value = undefined;
    last.current = path;
    if (!path) return;
    const abort = new AbortController();
    let retry = 0;
    get<T>(path, abort.signal).then(
      (found) => { data.value = found; error.value = ""; },
      (problem) => {
        if (abort.signal.aborted) return;
        error.value = messageOf(problem);
        if (problem instanceof ApiError && PASSING.has(problem.status)) retry = setTimeout(() => again((value) => value + 1), RETRY_MS);
      },
    );
    return () => {
      abort.abort();
      clearTimeout(retry);
    };
  }, [path, seen, count, reconnected.value]);
  useEffect(() => {
    if (!everyMs || !path) return;
    const timer = setInterval(() => { if (!document.hidden) again((value) => value + 1); }, everyMs);
    return () => clearInterval(timer);
  }, [path, everyMs]);
  return { data: data.value, error: error.value, reload: () => again((value) => value + 1) };
}

/** Runs `work` on a click; shows that it is in progress, and errors. */
export function useWork(): [string, (name: string, work: () => Promise<unknown>, done?: string) => Promise<void>] {
  const busy = useSignal("");
  return [busy.value, async (name, work, done) => {
    if (busy.value) return;
    busy.value = name;
    try {
      await work();
      if (done) notify(done);
    } catch (error) {
      notifyError(error);
    } finally {
      busy.value = "";
    }
  }];
}

// ── Graphs ─────────────────────────────────────────────────────────────────────────────────────

/** A small line over the newest values; its width is that of SAMPLES of them. */
export function Spark({ values, max, count, label, tone }: { values: readonly number[]; max: number; count: number; label: string; tone: string }) {
  const width = 72, height = 20;
  const step = width / (count - 1);
  const from = width - (values.length - 1) * step;
  const points = values.map((value, at) => `${(from + at * step).toFixed(1)},${(height - 1.5 - (height - 3) * Math.min(1, max > 0 ? value / max : 0)).toFixed(1)}`);
  return (
    <svg class={`spark tone-line-${tone}`} viewBox={`0 0 ${width} ${height}`} role="img" aria-label={label} preserveAspectRatio="none">
      <line x1="0" x2={width} y1={height - 0.5} y2={height - 0.5} />
      {points.length > 1 && <polygon points={`${from.toFixed(1)},${height} ${points.join(" ")} ${width},${height}`} />}
      {points.length > 1 && <polyline points={points.join(" ")} />}
    </svg>
  );
}

const STATE_TONES: Record<string, string> = {
  Running: "good", Created: "wait", Initializing: "wait", Paused: "rest", Standby: "rest", Stopped: "off", Shutdown: "off", Unknown: "bad",
  ready: "good", queued: "wait", building: "wait", pushing: "wait", cancelled: "off", pending: "wait", pulling: "wait", converting: "wait", failed: "bad",
};

export function State({ state, title }: { state: string; title?: string }) {
  return <span class={`state tone-${STATE_TONES[state] ?? "off"}`} title={title}><i />{state}</span>;
}
