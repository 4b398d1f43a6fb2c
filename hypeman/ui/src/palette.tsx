// Ctrl-K: finds pages, instances and commands by a few letters. Also the other shortcuts, and their list.
import { signal, useComputed, useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { logout } from "./api";
import { instances } from "./live";
import { PAGES } from "./navigation";
import { actionsOf } from "./actions";
import { go, route } from "./router";
import { toggleTheme } from "./theme";
import { Dialog, Icon, State } from "./ui";
import type { IconName } from "./ui";

const shown = signal(false);
const help = signal(false);
export const openPalette = () => { shown.value = true; };

type Entry = { key: string; title: string; detail?: string; icon: IconName; state?: string; run: () => unknown };

/** How well `text` matches the letters of `wanted` in order; 0: not at all. */
function score(text: string, wanted: string): number {
  text = text.toLowerCase();
  const whole = text.indexOf(wanted);
  if (whole >= 0) return 1000 - whole - text.length / 100;
  let at = -1, gaps = 0;
  for (const letter of wanted) {
    const next = text.indexOf(letter, at + 1);
    if (next < 0) return 0;
    gaps += next - at - 1;
    at = next;
  }
  return Math.max(1, 400 - gaps);
}

function entries(): Entry[] {
  const [, first, reference] = route.value.split("/");
  const current = first === "instances" && reference ? [...instances.value.values()].find((one) => one.id === reference || one.name === reference) : undefined;
  return [
    ...(current ? actionsOf(current).filter((action) => !action.unavailable).map((action) => ({
      key: `do ${action.name}`, title: `${action.title} ${current.name}`, icon: action.icon, run: action.run })) : []),
    { key: "create", title: "Create an instance", icon: "plus", run: () => go("/create") },
    ...PAGES.map((page) => ({ key: page.path, title: `Go to ${page.title}`, icon: page.icon, run: () => go(page.path) })),
    { key: "theme", title: "Switch between dark and light", icon: "moon", run: toggleTheme },
    { key: "help", title: "Keyboard shortcuts", icon: "terminal", run: () => { help.value = true; } },
    { key: "logout", title: "Log out", icon: "user", run: logout },
    ...[...instances.value.values()].flatMap((one) => [
      { key: one.id, title: one.name, detail: one.image, icon: "instances" as const, state: one.state, run: () => go(`/instances/${one.name}`) },
    ]),
  ];
}

export function Palette() {
  return shown.value ? <Open /> : null;
}

function Open() {
  const text = useSignal("");
  const at = useSignal(0);
  const found = useComputed(() => {
    const wanted = text.value.toLowerCase().replaceAll(" ", "");
    const all = entries();
    if (!wanted) return all.slice(0, 40);
    return all.map((entry) => [Math.max(score(entry.title.replaceAll(" ", ""), wanted), score((entry.detail ?? "").replaceAll(" ", ""), wanted) / 2), entry] as const)
      .filter(([points]) => points > 0).sort((a, b) => b[0] - a[0]).slice(0, 40).map(([, entry]) => entry);
  });
  const close = () => { shown.value = false; };
  const run = (entry: Entry | undefined) => {
    close();
    void entry?.run();
  };
  useEffect(() => { document.getElementById(`entry-${at.value}`)?.scrollIntoView({ block: "nearest" }); }, [at.value]);
  return (
    <Dialog title="Commands" onClose={close}>
      <div class="palette">
        <input class="palette-input" role="combobox" aria-label="Search pages, instances and commands" aria-expanded="true" aria-controls="entries"
          aria-activedescendant={found.value.length ? `entry-${at.value}` : undefined} placeholder="Search pages, instances and commands" autofocus value={text.value}
          onInput={(event) => { text.value = event.currentTarget.value; at.value = 0; }}
          onKeyDown={(event) => {
            const count = found.value.length;
            if (event.key === "ArrowDown") at.value = (at.value + 1) % Math.max(1, count);
            else if (event.key === "ArrowUp") at.value = (at.value + count - 1) % Math.max(1, count);
            else if (event.key === "Enter") run(found.value[at.value]);
            else return;
            event.preventDefault();
          }} />
        <div class="palette-list" id="entries" role="listbox" aria-label="Results">
          {found.value.map((entry, number) => (
            <div key={entry.key} id={`entry-${number}`} role="option" aria-selected={number === at.value} class="palette-entry"
              onClick={() => run(entry)} onMouseMove={() => { at.value = number; }}>
              <Icon name={entry.icon} /><span>{entry.title}</span>
              {entry.detail && <small>{entry.detail}</small>}
              {entry.state && <State state={entry.state} />}
            </div>
          ))}
        </div>
        {!found.value.length && <p class="palette-none">Nothing matches.</p>}
      </div>
    </Dialog>
  );
}

const SHORTCUTS: readonly (readonly [string, string])[] = [
  ["Ctrl K", "Search pages, instances and commands"],
  ["/", "Filter the list"],
  ["c", "Create an instance"],
  [`g then ${PAGES.map((page) => page.key).join(", ")}`, `Go to ${PAGES.map((page) => page.title.toLowerCase()).join(", ")}`],
  ["↑ ↓ or k j", "Move in the list of instances"],
  ["Enter", "Open the selected instance"],
  ["?", "This list"],
];

export function Help() {
  if (!help.value) return null;
  return (
    <Dialog title="Keyboard shortcuts" onClose={() => { help.value = false; }}>
      <dl class="shortcuts">{SHORTCUTS.map(([keys, what]) => <div key={keys}><dt>{keys.split(" ").map((key, at) => (/^(then|or)$/.test(key) ? ` ${key} ` : <kbd key={at}>{key.replace(",", "")}</kbd>))}</dt><dd>{what}</dd></div>)}</dl>
    </Dialog>
  );
}

export function useShortcuts(): void {
  useEffect(() => {
    let prefix = 0;
    const listen = (event: KeyboardEvent) => {
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
        event.preventDefault();
        shown.value = !shown.value;
        return;
      }
      const place = event.target as HTMLElement;
      if (event.ctrlKey || event.metaKey || event.altKey || place.closest("input, textarea, select, dialog, .xterm")) return;
      const page = Date.now() - prefix < 1200 && PAGES.find((one) => one.key === event.key);
      prefix = 0;
      if (page) go(page.path);
      else if (event.key === "g") prefix = Date.now();
      else if (event.key === "c") go("/create");
      else if (event.key === "?") help.value = true;
      else if (event.key === "/") document.querySelector<HTMLElement>("[data-filter]")?.focus();
      else return;
      event.preventDefault();
    };
    addEventListener("keydown", listen);
    return () => removeEventListener("keydown", listen);
  }, []);
}
