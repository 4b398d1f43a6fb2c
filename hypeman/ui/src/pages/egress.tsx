// What a guest may reach, and its requests: those that wait for approval, and those that ended, as they end.
import { useSignal } from "@preact/signals";
import type { AccessRule, EgressPolicy, InjectAs, Instance } from "api-types";
import { useEffect } from "preact/hooks";
import { ApiError, call, get, segment } from "../api";
import { bytes, clock } from "../format";
import { openDialog, Button, notifyError, Empty, Facts, Panel, Problem, Table, notify } from "../ui";
import { Held } from "./approvals";

const MAX = 1000;

/** An item of a stream, which /spec.json does not describe. */
type EgressRecord = {
  time: string; kind: string; host: string; port: number; method: string; status: number; reason: string;
  credentials: string[]; bytes_up: number; bytes_down: number; ms: number;
  decision?: "allowed" | "denied" | "observed" | "approved" | "held"; rule?: string; target?: string;
};

const passed = (one: EgressRecord) => one.reason === "ok";

/** The form in which a credential enters requests. */
function formOf(form: InjectAs): string {
  if (form.header) return `header ${form.header}`;
  const [name] = Object.entries(form).find(([, value]) => value) ?? ["?"];
  return { basic: "Basic authentication", query: `query parameter ${form.query}`, sigv4: "AWS signature", oauth2: "OAuth 2.0 token", hmac: "signature", body: "body", mtls: "client certificate", postgres: "login to Postgres", mysql: "login to MySQL" }[name] ?? name;
}

/** Puts a rule for one host before the others; returns the new policy, or undefined if the user cancelled. */
async function decideHost(instance: Instance, path: string, host: string, action: "allow" | "deny"): Promise<EgressPolicy | undefined> {
  const verb = action === "allow" ? "Allow" : "Deny";
  const sure = await openDialog({ title: `${verb} ${host}?`, action: verb, danger: action === "deny",
    text: `A rule before the others: ${action} every request of ${instance.name} to ${host}, from the next one on.` });
  if (sure === null) return undefined;
  const before = (await get<EgressPolicy>(path)).access?.rules ?? [];
  const rules = [{ action, hosts: [host] }, ...before];
  await call("PATCH", `/instances/${segment(instance.id)}`, { network: { egress: { rules } } });
  notify(`${action === "allow" ? "Allowed" : "Denied"}: ${host}`);
  return get<EgressPolicy>(path);
}

function RuleList({ rules, otherwise, observe }: { rules: readonly AccessRule[]; otherwise: string; observe: boolean }) {
  const rows = [...rules.map((rule, at) => ({ ...rule, name: rule.name ?? `#${at + 1}` })), { name: "default", action: otherwise } as AccessRule];
  return (
    <Panel title="Rules" flush actions={<span class="muted">{observe ? "They only observe: nothing is refused" : "The first that matches decides"}</span>}>
      <Table label="Rules" rows={rows} id={(rule) => rule.name!} columns={[
        { title: "Rule", cell: (rule) => <span class="mono">{rule.name}</span> },
        { title: "Action", cell: (rule) => <span class={`pill ${{ allow: "good", deny: "bad", ask: "wait" }[rule.action]}`}>{rule.action}</span> },
        { title: "To", cell: (rule) => <span class="mono wrap">{(rule.networks ?? rule.hosts)?.join(", ") ?? <span class="muted">{rule.name === "default" ? "everything else" : "every host"}</span>}{rule.ports ? ` : ${rule.ports.join(", ")}` : ""}</span> },
        { title: "Requests", narrow: true, cell: (rule) => <span class="mono wrap">{[rule.protocol, rule.methods?.join(", "), rule.paths?.join(", ")].filter(Boolean).join(" ")}</span> },
      ]} />
    </Panel>
  );
}

export function Egress({ instance }: { instance: Instance }) {
  const policy = useSignal<EgressPolicy | null | undefined>(undefined);
  const records = useSignal<readonly (EgressRecord & { number: number })[]>([]);
  const problem = useSignal("");
  const denied = useSignal(false);
  const path = `/instances/${segment(instance.id)}/egress`;
  useEffect(() => {
    get<EgressPolicy>(path).then((found) => { policy.value = found; }, (error) => {
      if (error instanceof ApiError && error.status === 404) policy.value = null;
      else problem.value = (error as Error).message;
    });
  }, [path]);
  useEffect(() => {
    if (!policy.value) return;
    let number = 0, waiting: (EgressRecord & { number: number })[] = [], timer = 0;
    const stream = new EventSource(`${path}/requests?follow=true&tail=200`);
    stream.onopen = () => { records.value = []; };
    stream.onmessage = ({ data }) => {
      waiting.push({ ...(JSON.parse(data) as EgressRecord), number: number++ });
      timer ||= setTimeout(() => {
        timer = 0;
        records.value = [...waiting.reverse(), ...records.value].slice(0, MAX);
        waiting = [];
      }, 150);
    };
    return () => { stream.close(); clearTimeout(timer); };
  }, [path, policy.value === null || policy.value === undefined]);
  if (problem.value) return <Problem message={problem.value} />;
  if (policy.value === undefined) return null;
  if (policy.value === null) {
    return (
      <Panel><Empty icon="shield" title="This instance reaches the network directly">
        <p>With mediated egress the host sees each request, and puts real credentials into those that a rule names: the guest holds stand-ins only.</p>
        <p>It is chosen when an instance is created: <code>--network-egress-enabled</code>.</p>
      </Empty></Panel>
    );
  }
  const credentials = Object.entries(policy.value.credentials);
  const refused = records.value.filter((one) => !passed(one));
  const shown = denied.value ? refused : records.value;
  const { access } = policy.value;
  async function decide(host: string, action: "allow" | "deny") {
    await decideHost(instance, path, host, action).then((changed) => { if (changed) policy.value = changed; }, notifyError);
  }
  return (
    <>
      <Held instance={instance} />
      {access && <RuleList rules={access.rules ?? []} otherwise={access.default ?? "allow"} observe={access.observe ?? false} />}
      <Panel title="Requests" flush actions={
        <div class="segments" role="group" aria-label="Outcome">
          <button type="button" aria-pressed={!denied.value} onClick={() => { denied.value = false; }}>All<span>{records.value.length}</span></button>
          <button type="button" aria-pressed={denied.value} onClick={() => { denied.value = true; }}>Denied<span>{refused.length}</span></button>
        </div>}>
        {shown.length ? <Table label="Requests" rows={shown} id={(one) => String(one.number)} columns={[
          { title: "Time", cell: (one) => <span class="mono muted">{clock(one.time)}</span> },
          { title: "Request", cell: (one) => <span class="mono wrap">{one.method || one.kind.replace("_", " ")} {one.host}{one.port === 443 ? "" : `:${one.port}`}<span class="muted">{one.target}</span></span> },
          { title: "Outcome", cell: (one) => <span class={`pill ${passed(one) ? "good" : "bad"}`}>{passed(one) ? one.status || "passed" : one.reason.replaceAll("_", " ")}</span> },
          { title: "Rule", cell: (one) => one.decision && <span class="muted">{one.decision}{one.rule ? ` by ${one.rule}` : ""}</span>, narrow: true },
          { title: "Credentials", cell: (one) => one.credentials.join(", "), narrow: true },
          { title: "Traffic", cell: (one) => <span class="muted">↑ {bytes(one.bytes_up, 0)} ↓ {bytes(one.bytes_down, 0)}</span>, narrow: true },
          { title: "Took", cell: (one) => <span class="muted">{Math.round(one.ms)} ms</span>, narrow: true },
          { title: "", class: "end", narrow: true, cell: (one) => one.host && (passed(one)
            ? <Button kind="plain" scope="instance:write" label={`Deny ${one.host}`} onClick={() => decide(one.host, "deny")}>Deny</Button>
            : <Button kind="plain" scope="instance:write" label={`Allow ${one.host}`} onClick={() => decide(one.host, "allow")}>Allow</Button>) },
        ]} /> : <Empty icon="shield" title={denied.value && records.value.length ? "Nothing was denied" : "No requests yet"}>They appear here as they end.</Empty>}
      </Panel>
      <Panel title="Policy"><Facts rows={[
        ["Direct TCP", policy.value.mode === "all" ? "refused" : "refused to ports 80 and 443 only"],
        ...credentials.map(([name, one]) => [name, one.inject.map((rule) => `${formOf(rule.as)} at ${rule.hosts?.join(", ") ?? "every host"}`).join("; ")] as const),
      ]} /></Panel>
    </>
  );
}
