// Calls of the API with the page's session. Every failure is an ApiError with the server's message.
import { signal } from "@preact/signals";

export type Session = { subject: string; scopes: string[]; expires_at: string | null; version: string };

/** undefined: not known yet; null: not logged in. */
export const session = signal<Session | null | undefined>(undefined);
/** Why the session has ended; empty if there was none, or after a logout. */
export const ended = signal("");

function end(): void {
  if (session.value) ended.value = "Your session has ended. Log in again.";
  session.value = null;
}

export class ApiError extends Error {
  constructor(readonly status: number, readonly code: string, message: string) {
    super(message);
  }
}

const TIMEOUT = 90_000;

export async function call<T>(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<T> {
  const limit = AbortSignal.timeout(TIMEOUT);
  let response: Response;
  try {
    response = await fetch(path, {
      method,
      credentials: "same-origin",
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: signal ? AbortSignal.any([signal, limit]) : limit,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(0, "unreachable", "The server does not answer. Check the connection.");
  }
  const text = await response.text();
  if (response.ok) return (text ? JSON.parse(text) : undefined) as T;
  let code = "", message = `${response.status} ${response.statusText}`;
  try {
    ({ code, message } = JSON.parse(text));
  } catch { /* not our error body: a proxy's */ }
  if (response.status === 401 && path !== "/ui/session") end();
  throw new ApiError(response.status, code, message);
}

export const get = <T>(path: string, signal?: AbortSignal) => call<T>("GET", path, undefined, signal);
export const post = <T>(path: string, body?: unknown) => call<T>("POST", path, body);
export const remove = (path: string) => call<void>("DELETE", path);

export const segment = encodeURIComponent;
export const messageOf = (error: unknown) => (error instanceof Error ? error.message : String(error));

export function can(scope: string): boolean {
  return session.value?.scopes.includes(scope) ?? false;
}

/** Why the session cannot use `scope`; undefined if it can. */
export function missingScope(scope: string): string | undefined {
  return can(scope) ? undefined : `Your token lacks the scope ${scope}`;
}

export function socketUrl(path: string): string {
  return `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${path}`;
}

/** Logs in with the page's one-time link if it has one, else with the cookie of an earlier login. */
export async function begin(): Promise<string | undefined> {
  const link = /^#link=([\w-]+)$/.exec(location.hash)?.[1];
  if (link) {
    history.replaceState(null, "", location.pathname);
    try {
      session.value = await post<Session>("/ui/session", { link });
      return;
    } catch (error) {
      session.value = null;
      return messageOf(error);
    }
  }
  try {
    session.value = await get<Session>("/ui/session");
  } catch (error) {
    session.value = null;
    if (!(error instanceof ApiError && error.status === 401)) return messageOf(error);
  }
}

/** False once the server no longer knows the session; the page shows the login then. */
export async function stillLoggedIn(): Promise<boolean> {
  try {
    await get<Session>("/ui/session");
  } catch (error) {
    if (!(error instanceof ApiError && error.status === 401)) return true;
    end();
    return false;
  }
  return true;
}

export async function logout(): Promise<void> {
  ended.value = "";
  await remove("/ui/session").catch(() => {});
  session.value = null;
}
