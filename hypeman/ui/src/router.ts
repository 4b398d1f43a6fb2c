// Paths below /ui: /ui/instances/web/logs is the route /instances/web/logs.
import { signal } from "@preact/signals";

const BASE = "/ui";

function current(): string {
  return decodeURI(location.pathname.slice(BASE.length)) || "/";
}

export const route = signal(current());
addEventListener("popstate", () => { route.value = current(); });

export const href = (path: string) => BASE + path;

export function go(path: string, replace = false): void {
  const [plain = "/", query] = path.split("?");
  if (path !== route.value) history[replace ? "replaceState" : "pushState"](null, "", href(path));
  if (query === undefined || plain !== route.value) route.value = plain;
}

/** Follows links within the page without a reload. */
export function followLinks(event: MouseEvent): void {
  const link = (event.target as Element).closest("a");
  if (!link || event.defaultPrevented || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey) return;
  if (link.target || link.hasAttribute("download") || link.origin !== location.origin || !link.pathname.startsWith(BASE + "/")) return;
  event.preventDefault();
  go(decodeURI(link.pathname.slice(BASE.length)) || "/");
}
