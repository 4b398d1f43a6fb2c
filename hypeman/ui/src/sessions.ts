// Programs and copies over the API's WebSockets.
import { segment, socketUrl } from "./api";

const CHUNK = 32 * 1024;
const HIGH_WATER = 1 << 20;
const MAX_OUTPUT = 1 << 20;

function connect(path: string): WebSocket {
  const socket = new WebSocket(socketUrl(path));
  socket.binaryType = "arraybuffer";
  return socket;
}

const REFUSED = "The guest cannot be reached at the moment.";

/** Runs a program without a terminal. */
export function run(instance: string, command: string[]): Promise<{ output: string; code: number }> {
  return new Promise((resolve, reject) => {
    const socket = connect(`/instances/${segment(instance)}/exec`);
    const decode = new TextDecoder();
    let output = "";
    socket.onopen = () => socket.send(JSON.stringify({ command, timeout: 20 }));
    socket.onmessage = ({ data }) => {
      if (typeof data !== "string") {
        if (output.length < MAX_OUTPUT) output += decode.decode(data as ArrayBuffer, { stream: true });
        return;
      }
      const reply = JSON.parse(data) as { exitCode?: number; error?: string };
      if (reply.error) reject(new Error(reply.error));
      else resolve({ output, code: reply.exitCode ?? -1 });
    };
    socket.onclose = () => reject(new Error(REFUSED));
  });
}

/** Writes a file of the guest; returns the bytes written. */
export function copyIn(instance: string, path: string, file: File, progress: (done: number) => void): Promise<number> {
  return new Promise((resolve, reject) => {
    const socket = connect(`/instances/${segment(instance)}/cp`);
    socket.onopen = async () => {
      try {
        socket.send(JSON.stringify({ direction: "to", guest_path: path, is_dir: false, mtime: Math.floor(file.lastModified / 1000) }));
        for (let at = 0; at < file.size && socket.readyState === WebSocket.OPEN; at += CHUNK) {
          socket.send(await file.slice(at, at + CHUNK).arrayBuffer());
          while (socket.bufferedAmount > HIGH_WATER) await new Promise((resolve) => setTimeout(resolve, 20));
          progress(Math.min(file.size, at + CHUNK));
        }
        socket.send(JSON.stringify({ type: "end" }));
      } catch (error) {
        reject(error as Error);
        socket.close();
      }
    };
    socket.onmessage = ({ data }) => {
      const reply = JSON.parse(data as string) as { success?: boolean; error?: string; message?: string; bytes_written?: number };
      if (reply.success) resolve(reply.bytes_written ?? file.size);
      else reject(new Error(reply.error ?? reply.message ?? "The copy failed."));
    };
    socket.onclose = () => reject(new Error(REFUSED));
  });
}

type Header = { type: "header"; path: string; mode: number; is_dir: boolean; is_symlink: boolean; link_target: string; size: number; mtime: number; uid: number; gid: number };

/** Reads a file of the guest; a directory becomes a tar archive. */
export function copyOut(instance: string, path: string, progress: (done: number) => void): Promise<{ name: string; content: Blob }> {
  return new Promise((resolve, reject) => {
    const socket = connect(`/instances/${segment(instance)}/cp`);
    const base = path.split("/").filter(Boolean).pop() ?? "root";
    const entries: { header: Header; data: BlobPart[] }[] = [];
    let done = 0;
    socket.onopen = () => socket.send(JSON.stringify({ direction: "from", guest_path: path }));
    socket.onmessage = ({ data }) => {
      if (typeof data !== "string") {
        entries.at(-1)?.data.push(data as ArrayBuffer);
        progress(done += (data as ArrayBuffer).byteLength);
        return;
      }
      const reply = JSON.parse(data) as Header | { type: "end"; final?: boolean } | { type: "error"; message: string };
      if (reply.type === "header") entries.push({ header: reply, data: [] });
      else if (reply.type === "error") reject(new Error(reply.message));
      else if (reply.final) {
        const only = entries.length === 1 && !entries[0]!.header.is_dir && !entries[0]!.header.is_symlink ? entries[0] : undefined;
        resolve(only ? { name: base, content: new Blob(only.data) } : { name: `${base}.tar`, content: archive(base, entries) });
        socket.close();
      }
    };
    socket.onclose = () => reject(new Error(entries.length ? "The copy was interrupted." : REFUSED));
  });
}

/** A tar archive (ustar, with a PAX record for a name that is too long). */
function archive(base: string, entries: readonly { header: Header; data: BlobPart[] }[]): Blob {
  const parts: BlobPart[] = [];
  for (const { header, data } of entries) {
    const inside = header.path.replace(/^\/+|\/+$/g, "");
    const name = (inside === base || inside.startsWith(`${base}/`) ? inside : inside ? `${base}/${inside}` : base) + (header.is_dir ? "/" : "");
    const long = new TextEncoder().encode(name).length > 100;
    if (long) {
      const record = (size: number) => `${size} path=${name}\n`;
      const bare = new TextEncoder().encode(record(0)).length - 1;
      let size = bare + String(bare).length;
      size = bare + String(size).length;
      const text = new TextEncoder().encode(record(size));
      parts.push(block("PaxHeader", 0o644, text.length, header, "x"), text, padding(text.length));
    }
    const kind = header.is_dir ? "5" : header.is_symlink ? "2" : "0";
    parts.push(block(long ? name.slice(0, 90) : name, header.mode, kind === "0" ? header.size : 0, header, kind), ...data, padding(kind === "0" ? header.size : 0));
  }
  parts.push(new Uint8Array(1024));
  return new Blob(parts, { type: "application/x-tar" });
}

const padding = (size: number) => new Uint8Array((512 - (size % 512)) % 512);

function block(name: string, mode: number, size: number, about: Header, kind: string): Uint8Array<ArrayBuffer> {
  const made = new Uint8Array(512);
  const put = (at: number, text: string, length: number) => made.set(new TextEncoder().encode(text).subarray(0, length), at);
  const octal = (at: number, value: number, length: number) => put(at, value.toString(8).padStart(length - 1, "0"), length - 1);
  put(0, name, 100);
  octal(100, mode & 0o7777, 8);
  octal(108, Math.min(about.uid, 0o7777777), 8);
  octal(116, Math.min(about.gid, 0o7777777), 8);
  octal(124, size, 12);
  octal(136, Math.max(0, about.mtime), 12);
  put(148, "        ", 8);
  put(156, kind, 1);
  if (kind === "2") put(157, about.link_target, 100);
  put(257, "ustar\0" + "00", 8);
  octal(148, made.reduce((sum, value) => sum + value, 0), 7);
  made[155] = 32;
  return made;
}
