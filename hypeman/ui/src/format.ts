// Numbers, sizes and times as text.
const UNITS = ["B", "KB", "MB", "GB", "TB", "PB"];

export function bytes(value: number | null | undefined, digits = 1): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  let unit = 0;
  while (Math.abs(value) >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit++;
  }
  const shown = unit === 0 || value >= 100 ? Math.round(value).toString() : value.toFixed(digits);
  return `${shown.replace(/\.0$/, "")} ${UNITS[unit]}`;
}

export const rate = (value: number) => `${bytes(value)}/s`;

/** "1GB", "512MB" of the API in bytes; NaN if it is not a size. */
export function parseSize(text: string | undefined): number {
  const match = /^\s*([\d.]+)\s*([KMGTP]?)(i?B)?\s*$/i.exec(text ?? "");
  if (!match) return NaN;
  return Number(match[1]) * 1024 ** (" KMGTP".indexOf((match[2] || " ").toUpperCase()));
}

export function duration(ms: number): string {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  const seconds = ms / 1000;
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(seconds % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export function ago(time: string | null | undefined, now = Date.now()): string {
  if (!time) return "–";
  const seconds = (now - Date.parse(time)) / 1000;
  const future = seconds < 0;
  const s = Math.abs(seconds);
  const text = s < 5 ? "now" : s < 60 ? `${Math.floor(s)} s` : s < 3600 ? `${Math.floor(s / 60)} min`
    : s < 172_800 ? `${Math.floor(s / 3600)} h` : `${Math.floor(s / 86_400)} d`;
  return text === "now" ? text : future ? `in ${text}` : `${text} ago`;
}

export const clock = (time: string) => new Date(time).toLocaleTimeString(undefined, { hour12: false });
export const dateTime = (time: string) =>
  new Date(time).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium", hour12: false });

export const plural = (count: number, one: string, many = `${one}s`) => `${count.toLocaleString()} ${count === 1 ? one : many}`;
export const short = (id: string) => (id.startsWith("sha256:") ? id.slice(7, 19) : id.slice(0, 12));

/** An image without the default registry and path. */
export const imageName = (name: string) => name.replace(/^docker\.io\/(library\/)?/, "");

/** `text` as one word of a shell. */
export function shellWord(text: string): string {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}
