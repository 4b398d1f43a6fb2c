// Builds of images, and the log of one as it runs.
import type { Build, Builder } from "api-types";
import { missingScope, remove, segment } from "../api";
import { duration, imageName } from "../format";
import { openDialog, Button, Code, notifyError, Empty, Link, Page, Panel, Problem, State, Table, notify, Time, useResource } from "../ui";
import { LogView } from "./logs";

const OVER = new Set(["ready", "failed", "cancelled"]);

export function Builds() {
  const readable = !missingScope("build:read");
  const found = useResource<Build[]>(readable ? "/builds" : "", ["build"]);
  const builders = useResource<Builder[]>(readable ? "/builders" : "", ["build", "builder"]);
  const builds = [...(found.data ?? [])].sort((a, b) => (a.created_at < b.created_at ? 1 : -1));
  async function destroy(one: Builder) {
    const sure = await openDialog({ title: `Delete builder ${one.name ?? one.id}?`, action: "Delete", danger: true, text: "Its cache is lost; the next builds take longer." });
    if (sure !== null) await remove(`/builders/${segment(one.id)}`).then(() => builders.reload(), notifyError);
  }
  return (
    <Page title="Builds" subtitle="Images made from a Dockerfile, each in a VM of its own.">
      {!readable && <Empty icon="shield" title="Not permitted">{missingScope("build:read")}.</Empty>}
      {found.error && <Problem message={found.error} onRetry={found.reload} />}
      {found.data && !builds.length && <Empty icon="build" title="No builds yet"><p>In a directory with a Dockerfile:</p><Code>hypeman build -t app .</Code></Empty>}
      {builds.length > 0 && <Panel flush><Table label="Builds" rows={builds} id={(one) => one.id} columns={[
        { title: "Build", cell: (one) => <span class="two"><Link to={`/builds/${one.id}`}>{one.image_ref ? imageName(one.image_ref) : one.id}</Link><small class="mono">{one.id}</small></span> },
        { title: "State", cell: (one) => <State state={one.queue_position ? `queued, number ${one.queue_position}` : one.status} title={one.error ?? undefined} /> },
        { title: "Took", cell: (one) => (one.duration_ms ? duration(one.duration_ms) : ""), class: "number" },
        { title: "Builder", cell: (one) => one.builder_id ?? <span class="muted">none</span>, narrow: true },
        { title: "Created", cell: (one) => <Time at={one.created_at} />, narrow: true },
      ]} /></Panel>}
      {(builders.data?.length ?? 0) > 0 && <Panel title="Builders" flush><Table label="Builders" rows={builders.data!} id={(one) => one.id} columns={[
        { title: "Name", cell: (one) => <span class="two"><b>{one.name ?? one.id}</b><small class="mono">{one.id}</small></span> },
        { title: "State", cell: (one) => (one.active_build_id ? <Link to={`/builds/${one.active_build_id}`}>building</Link> : one.status) },
        { title: "Waiting", cell: (one) => one.queued_builds?.length ?? 0, class: "number" },
        { title: "Cache", cell: (one) => `${one.disk_size_gb} GB`, class: "number", narrow: true },
        { title: "", class: "end", cell: (one) => <Button kind="plain" icon="trash" scope="build:delete" label={`Delete ${one.name ?? one.id}`} onClick={() => destroy(one)} /> },
      ]} /></Panel>}
    </Page>
  );
}

export function BuildPage({ id }: { id: string }) {
  const found = useResource<Build>(`/builds/${segment(id)}`, ["build"]);
  const build = found.data;
  async function cancel() {
    const sure = await openDialog({ title: "Cancel this build?", action: "Cancel the build", danger: true, text: "What it has done so far stays in its builder's cache." });
    if (sure !== null) await remove(`/builds/${segment(id)}`).then(() => notify("The build was cancelled"), notifyError);
  }
  return (
    <div class="page fill">
      <header class="page-head">
        <div class="page-title">
          <Link to="/builds" class="crumb">Builds</Link>
          <h1>{build?.image_ref ? imageName(build.image_ref) : id} {build && <State state={build.status} />}</h1>
          {build && <p class="muted">{build.duration_ms ? `Took ${duration(build.duration_ms)}` : <>Begun <Time at={build.created_at} /></>}</p>}
        </div>
        {build && !OVER.has(build.status) && <div class="actions"><Button kind="danger" icon="stop" scope="build:delete" onClick={cancel}>Cancel</Button></div>}
      </header>
      {(found.error || build?.error) && <Problem message={found.error || build!.error!} />}
      <div class="view"><LogView label="Log of the build" file={`build-${id}.log`} url={`/builds/${segment(id)}/events?follow=true`} read={(data) => {
        const event = JSON.parse(data) as { type: string; content?: string; status?: string };
        return event.type === "log" ? event.content : event.type === "status" && OVER.has(event.status ?? "") ? null : undefined;
      }} /></div>
    </div>
  );
}
