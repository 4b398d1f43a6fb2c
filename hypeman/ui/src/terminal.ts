// A terminal in the page: xterm on the WebSocket of exec. Loaded when the first one is opened.
import { FitAddon } from "@xterm/addon-fit";
import { Terminal } from "@xterm/xterm";
import { socketUrl, segment } from "./api";

type Styling = { hypemanStyle(): HTMLElement };

/** In place of xterm's <style> elements, which the page's policy forbids (see build.mjs): an element whose text is a
 *  constructed style sheet. */
(globalThis as unknown as Styling).hypemanStyle = () => {
  const sheet = new CSSStyleSheet();
  document.adoptedStyleSheets.push(sheet);
  const element = document.createElement("span");
  element.hidden = true;
  Object.defineProperty(element, "textContent", { set: (text: string) => sheet.replaceSync(text) });
  Object.defineProperty(element, "sheet", { value: sheet });
  const remove = element.remove.bind(element);
  element.remove = () => {
    document.adoptedStyleSheets = document.adoptedStyleSheets.filter((other) => other !== sheet);
    remove();
  };
  return element;
};

export type Handle = { close(): void; focus(): void; theme(): void };
export type Ended = (message: string) => void;

function colours(): Record<string, string> {
  const style = getComputedStyle(document.documentElement);
  const read = (name: string) => style.getPropertyValue(name).trim();
  return {
    background: read("--terminal"), foreground: read("--terminal-text"), cursor: read("--accent-bright"),
    cursorAccent: read("--terminal"), selectionBackground: read("--terminal-selection"),
    black: "#2a3033", red: "#f07b72", green: "#6fd195", yellow: "#e8c46a", blue: "#79b4f2", magenta: "#cf9df0",
    cyan: "#6fd0cf", white: "#d7dcdd", brightBlack: "#7b868a", brightRed: "#ff9a91", brightGreen: "#8fe8b0",
    brightYellow: "#ffdc86", brightBlue: "#9fcbff", brightMagenta: "#e0b8ff", brightCyan: "#92e8e6", brightWhite: "#fff",
  };
}

/** Runs `command` in the instance, in `place`, until it ends or the handle is closed. */
export function openTerminal(place: HTMLElement, instance: string, command: string[], ended: Ended): Handle {
  const terminal = new Terminal({
    fontFamily: "ui-monospace, 'SF Mono', Menlo, 'DejaVu Sans Mono', monospace", fontSize: 13, lineHeight: 1.25,
    cursorBlink: true, scrollback: 10_000, theme: colours(), screenReaderMode: false,
  });
  const fit = new FitAddon();
  terminal.loadAddon(fit);
  terminal.open(place);
  fit.fit();
  terminal.attachCustomKeyEventHandler((event) => {
    const mod = event.ctrlKey || event.metaKey;
    if (event.type !== "keydown" || !mod) return true;
    const key = event.key.toLowerCase();
    if (key === "c" && (event.shiftKey || terminal.hasSelection())) {
      void navigator.clipboard?.writeText(terminal.getSelection());
      terminal.clearSelection();
      event.preventDefault();
      return false;
    }
    if (key === "v") return false; // the browser pastes
    return true;
  });

  const socket = new WebSocket(socketUrl(`/instances/${segment(instance)}/exec`));
  socket.binaryType = "arraybuffer";
  const encode = new TextEncoder();
  let over = false;
  const end = (message: string) => {
    if (over) return;
    over = true;
    terminal.options.cursorBlink = false;
    terminal.options.disableStdin = true;
    ended(message);
  };
  socket.onopen = () => {
    socket.send(JSON.stringify({ command, tty: true, rows: terminal.rows, cols: terminal.cols, env: { TERM: "xterm-256color" } }));
    terminal.focus();
  };
  socket.onmessage = ({ data }) => {
    if (typeof data !== "string") return terminal.write(new Uint8Array(data as ArrayBuffer));
    const reply = JSON.parse(data) as { exitCode?: number; error?: string };
    end(reply.error ?? `The program ended with ${reply.exitCode}.`);
  };
  socket.onclose = () => end("The connection was closed.");
  const send = (data: Uint8Array<ArrayBuffer>) => { if (socket.readyState === WebSocket.OPEN && data.length) socket.send(data); };
  terminal.onData((text) => {
    const data = encode.encode(text);
    for (let at = 0; at < data.length; at += 16_384) send(data.subarray(at, at + 16_384));
  });
  terminal.onBinary((text) => send(Uint8Array.from(text, (char) => char.charCodeAt(0))));
  terminal.onResize(({ rows, cols }) => {
    if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ resize: { rows, cols } }));
  });
  const observer = new ResizeObserver(() => { if (place.offsetWidth) fit.fit(); });
  observer.observe(place);
  return {
    close() {
      over = true;
      observer.disconnect();
      socket.close();
      terminal.dispose();
    },
    focus: () => terminal.focus(),
    theme: () => { terminal.options.theme = colours(); },
  };
}
