// Dark or light: the system's setting, unless one is chosen here.
import { effect, signal } from "@preact/signals";

const system = matchMedia("(prefers-color-scheme: dark)");
const KEY = "hypeman-theme";

function stored(): string {
  try {
    return localStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

const chosen = signal(stored());
const systemDark = signal(system.matches);
system.addEventListener("change", () => { systemDark.value = system.matches; });

export const dark = signal(false);
effect(() => {
  dark.value = chosen.value ? chosen.value === "dark" : systemDark.value;
  document.documentElement.dataset.theme = dark.value ? "dark" : "light";
});

export function toggleTheme(): void {
  chosen.value = dark.value ? "light" : "dark";
  try {
    localStorage.setItem(KEY, chosen.value);
  } catch { /* it is kept until the page is closed */ }
}
