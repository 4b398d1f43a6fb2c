// Requests of guests that wait for a decision: of all instances, or of one.
import { useSignal } from "@preact/signals";
import type { EgressApproval, Instance } from "api-types";
import { approvals, decide, instanceName, target, TIMES } from "../approvals";
import { missingScope } from "../api";
import { plural } from "../format";
import { Button, Empty, Link, Page, Panel, Select, Time, useWork } from "../ui";

export function Approvals() {
  const refused = missingScope("instance:read");
  return (
    <Page title="Approvals" subtitle="Requests that an egress rule holds until someone decides. They are refused when their time is over.">
      {refused ? <Empty icon="shield" title="Not permitted">{refused}.</Empty>
        : approvals.value.length ? <Panel flush><ApprovalList of={approvals.value} named /></Panel>
        : <Empty icon="shield" title="Nothing waits for approval"><p>An egress rule with <code>"action": "ask"</code> holds what it matches. Such requests appear here and can be approved or denied while the guest waits.</p></Empty>}
    </Page>
  );
}

/** Of one instance; nothing if none waits. */
export function Held({ instance }: { instance: Instance }) {
  const mine = approvals.value.filter((one) => one.instance_id === instance.id);
  return mine.length ? <Panel title="Waiting for approval" flush><ApprovalList of={mine} /></Panel> : null;
}

/** `named`: with the instance of each. */
function ApprovalList({ of, named }: { of: readonly EgressApproval[]; named?: boolean }) {
  return <ul class="approvals" aria-label="Waiting for approval">{of.map((one) => <Approval key={one.id} one={one} named={named} />)}</ul>;
}

function Approval({ one, named }: { one: EgressApproval; named?: boolean }) {
  const time = useSignal<string>("");
  const [busy, work] = useWork();
  const choose = (verb: "approve" | "deny", done: string) => work(verb, () => decide(one, verb, time.value), `${done}: ${one.method} ${one.host}`);
  const name = `${one.method} ${target(one)}`;
  return (
    <li>
      <div class="approval-what">
        <span class="mono wrap"><b>{one.method}</b> {target(one)}</span>
        <small>
          {named && <><Link to={`/instances/${instanceName(one.instance_id)}/egress`}>{instanceName(one.instance_id)}</Link> · </>}
          rule {one.rule} · {plural(one.waiting, "request")}, the first <Time at={one.since} /> · refused <Time at={one.expires_at} />
        </small>
      </div>
      <div class="actions">
        <Select label={`How long, ${name}`} value={time.value} options={TIMES} onValue={(value) => { time.value = value; }} title={`A time also covers other requests that rule ${one.rule} asks about, to ${one.host}:${one.port}`} />
        <Button icon="check" scope="instance:write" busy={busy === "approve"} label={`Approve ${name}`} onClick={() => choose("approve", "Approved")}>Approve</Button>
        <Button icon="close" kind="danger" scope="instance:write" busy={busy === "deny"} label={`Deny ${name}`} onClick={() => choose("deny", "Denied")}>Deny</Button>
      </div>
    </li>
  );
}
