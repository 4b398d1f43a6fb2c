// The frame of the page: login, navigation, shortcuts, and which page a path shows.
import "@xterm/xterm/css/xterm.css";
import "uplot/dist/uPlot.min.css";
import "./style.css";
import { useSignal } from "@preact/signals";
import { render } from "preact";
import { useEffect } from "preact/hooks";
import { begin, ended, logout, messageOf, post, session } from "./api";
import type { Session } from "./api";
import { approvals, watchApprovals } from "./approvals";
import { plural } from "./format";
import { connected, instances, live, lost } from "./live";
import { PAGES } from "./navigation";
import { Help, openPalette, Palette, useShortcuts } from "./palette";
import { Approvals } from "./pages/approvals";
import { BuildPage, Builds } from "./pages/builds";
import { Create } from "./pages/create";
import { Devices } from "./pages/devices";
import { Events } from "./pages/events";
import { Host } from "./pages/host";
import { Images } from "./pages/images";
import { Ingresses } from "./pages/ingresses";
import { InstancePage } from "./pages/instance";
import { Instances } from "./pages/instances";
import { Usage } from "./pages/usage";
import { Volumes } from "./pages/volumes";
import { followLinks, href, route } from "./router";
import { dark, toggleTheme } from "./theme";
import { Button, Empty, Icon, Link, Questions, Toasts } from "./ui";

function View() {
  const [, first = "", second, third] = route.value.split("/");
  switch (first) {
    case "": case "instances":
      return second ? <InstancePage key={second} reference={second} tab={third ?? "overview"} /> : <Instances />;
    case "create": return <Create />;
    case "images": return <Images />;
    case "builds": return second ? <BuildPage key={second} id={second} /> : <Builds />;
    case "volumes": return <Volumes />;
    case "ingresses": return <Ingresses />;
    case "approvals": return <Approvals />;
    case "devices": return <Devices />;
    case "usage": return <Usage />;
    case "host": return <Host />;
    case "events": return <Events />;
  }
  return <Empty icon="search" title="Page not found" action={<Link to="/instances">Go to the instances</Link>} />;
}

function Navigation({ onGo }: { onGo: () => void }) {
  const first = "/" + (route.value.split("/")[1] || "instances");
  return (
    <nav aria-label="Pages" onClick={onGo}>
      {PAGES.map((page) => (
        <a key={page.path} href={href(page.path)} class="nav-link" aria-current={first === page.path || (first === "/create" && page.path === "/instances") ? "page" : undefined}>
          <Icon name={page.icon} /><span>{page.title}</span>
          {page.path === "/instances" && instances.value.size > 0 && <span class="count">{instances.value.size.toLocaleString()}</span>}
          {page.path === "/approvals" && <Waiting />}
        </a>
      ))}
    </nav>
  );
}

/** How many requests wait for a decision. */
function Waiting() {
  const count = approvals.value.length;
  return count ? <span class="badge" aria-label={`${count} waiting`}>{count}</span> : null;
}

function Frame() {
  const open = useSignal(false);
  const who = session.value!;
  useShortcuts();
  useEffect(() => {
    const name = route.value.split("/").filter(Boolean).map((part) => part[0]!.toUpperCase() + part.slice(1)).slice(0, 2).reverse().join(" · ");
    const count = approvals.value.length ? `(${approvals.value.length}) ` : "";
    document.title = count + (name ? `${name} – Hypeman` : "Hypeman");
  }, [route.value, approvals.value.length]);
  useEffect(() => { document.querySelector("main")?.scrollTo(0, 0); }, [route.value.split("/").slice(0, 3).join("/")]);
  return (
    <div class="frame" onClick={followLinks as never}>
      <a class="skip" href="#main">Skip to the content</a>
      <div class={`side ${open.value ? "open" : ""}`}>
        <div class="brand"><img src="/ui/icon.svg" alt="" width="22" height="22" /><b>Hypeman</b>
          <span class={`live ${connected.value ? "on" : ""}`} title={connected.value ? "Live" : "Not connected; trying again"}><i /><span class="hidden">{connected.value ? "Live" : "Not connected"}</span></span>
        </div>
        <button class="search-button" type="button" onClick={openPalette}><Icon name="search" /><span>Search…</span><kbd>Ctrl K</kbd></button>
        <Navigation onGo={() => { open.value = false; }} />
        <div class="side-foot">
          <div class="who" title={who.scopes.join("\n")}><Icon name="user" /><span>{who.subject || "token"}</span><small>{scopesText(who)}</small></div>
          <div class="side-actions">
            <Button kind="plain" icon={dark.value ? "sun" : "moon"} label={dark.value ? "Light theme" : "Dark theme"} onClick={toggleTheme} />
            <a class="link small" href="/swagger" target="_blank" rel="noreferrer">API</a>
            <Button kind="plain" onClick={logout}>Log out</Button>
          </div>
          <small class="muted">Version {who.version}</small>
        </div>
      </div>
      <header class="top">
        <Button icon="menu" kind="plain" label="Menu" onClick={() => { open.value = !open.value; }} />
        <b>Hypeman</b>
        <span class="actions">
          {approvals.value.length > 0 && <Link to="/approvals" class="badge">{plural(approvals.value.length, "approval")}</Link>}
          <Button icon="search" kind="plain" label="Search" onClick={openPalette} />
        </span>
      </header>
      <main id="main" tabIndex={-1}>
        {lost.value && <p class="lost" role="status">The server does not answer. What is shown may be old; trying again…</p>}
        <View />
      </main>
      <Palette /><Help />
    </div>
  );
}

function scopesText(who: Session): string {
  const writes = who.scopes.filter((scope) => !scope.endsWith(":read")).length;
  return who.scopes.length === 23 ? "all scopes" : writes === 0 ? "read only" : `${who.scopes.length} scopes`;
}

function Login({ problem }: { problem: string }) {
  const token = useSignal("");
  const error = useSignal(ended.value || problem);
  const busy = useSignal(false);
  async function submit(event: Event) {
    event.preventDefault();
    busy.value = true;
    try {
      session.value = await post<Session>("/ui/session", { token: token.value.trim() });
      ended.value = "";
    } catch (problem) {
      error.value = messageOf(problem);
    } finally {
      busy.value = false;
    }
  }
  return (
    <main class="login">
      <form class="login-box" onSubmit={submit}>
        <img src="/ui/icon.svg" alt="" width="40" height="40" />
        <h1>Log in to Hypeman</h1>
        <label class="field">
          <span class="field-label">API token</span>
          <input class="input" type="password" name="token" autocomplete="current-password" required autofocus value={token.value} aria-describedby="login-error"
            onInput={(event) => { token.value = event.currentTarget.value; }} />
        </label>
        <p id="login-error" class="field-error" role="alert">{error.value}</p>
        <Button type="submit" kind="primary" busy={busy.value}>Log in</Button>
        <div class="login-hint">
          <p>On the server, <code>hypeman ui</code> prints a link that logs you in without a token, and <code>hypeman token</code> issues one.</p>
        </div>
      </form>
    </main>
  );
}

function App({ problem }: { problem: string }) {
  if (session.value === undefined) return null;
  return <>{session.value ? <Frame /> : <Login problem={problem} />}<Toasts /><Questions /></>;
}

const problem = await begin();
live();
watchApprovals();
render(<App problem={problem ?? ""} />, document.getElementById("app")!);
