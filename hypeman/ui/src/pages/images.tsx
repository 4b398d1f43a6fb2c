// Images: pulls with the progress of each layer, and the list.
import { useSignal } from "@preact/signals";
import type { Image, Progress } from "api-types";
import { useEffect } from "preact/hooks";
import { missingScope, post, remove, segment } from "../api";
import { bytes, imageName, short } from "../format";
import { go } from "../router";
import { openDialog, Bar, Button, notifyError, Dialog, Empty, Field, Page, Panel, Problem, State, Table, notify, Text, Time, useResource } from "../ui";

const ON_ITS_WAY = new Set(["pending", "pulling", "converting"]);

export function Images() {
  const pulling = useSignal(false);
  const found = useResource<Image[]>(missingScope("image:read") ? "" : "/images", ["image"]);
  const images = [...(found.data ?? [])].sort((a, b) => Number(ON_ITS_WAY.has(b.status)) - Number(ON_ITS_WAY.has(a.status)) || (a.name < b.name ? -1 : 1));
  const button = <Button kind="primary" icon="download" scope="image:write" onClick={() => { pulling.value = true; }}>Pull</Button>;
  async function destroy(image: Image) {
    const sure = await openDialog({ title: `Delete ${imageName(image.name)}?`, action: "Delete", danger: true, text: "Instances that were made from it keep its disk until they are deleted." });
    if (sure !== null) await remove(`/images/${segment(image.name)}`).then(() => { notify("The image was deleted"); found.reload(); }, notifyError);
  }
  return (
    <Page title="Images" subtitle="Root disks, built from OCI images and shared by all their instances." actions={button}>
      {missingScope("image:read") && <Empty icon="shield" title="Not permitted">{missingScope("image:read")}.</Empty>}
      {found.error && <Problem message={found.error} onRetry={found.reload} />}
      {images.filter((one) => ON_ITS_WAY.has(one.status)).map((one) => <Pull key={one.name} image={one} onDone={found.reload} />)}
      {found.data && !images.length && <Empty icon="images" title="No images yet" action={button}><p>Pull any OCI image from a registry. An instance also pulls its image by itself when it is created.</p></Empty>}
      {images.length > 0 && (
        <Panel flush>
          <Table label="Images" rows={images} id={(one) => one.name} columns={[
            { title: "Image", cell: (one) => <span class="two"><b>{imageName(one.name)}</b><small class="mono">{short(one.digest)}</small></span> },
            { title: "State", cell: (one) => <State state={one.status} title={one.error ?? undefined} /> },
            { title: "Size", cell: (one) => bytes(one.size_bytes), class: "number" },
            { title: "Program", cell: (one) => <span class="mono clip">{[...(one.entrypoint ?? []), ...(one.cmd ?? [])].join(" ")}</span>, narrow: true },
            { title: "Created", cell: (one) => <Time at={one.created_at} />, narrow: true },
            { title: "", class: "end", cell: (one) => <>
              <Button kind="plain" icon="play" scope="instance:write" unavailable={one.status === "ready" ? undefined : "It is not ready"} label={`Run ${imageName(one.name)}`} onClick={() => go(`/create?image=${encodeURIComponent(one.name)}`)} />
              <Button kind="plain" icon="trash" scope="image:delete" label={`Delete ${imageName(one.name)}`} onClick={() => destroy(one)} /></> },
          ]} />
          {images.filter((one) => one.status === "failed").map((one) => <div class="panel-body" key={one.name}><p class="field-error">{imageName(one.name)}: {one.error}</p></div>)}
        </Panel>
      )}
      {pulling.value && <PullDialog onClose={() => { pulling.value = false; found.reload(); }} />}
    </Page>
  );
}

function Pull({ image, onDone }: { image: Image; onDone: () => void }) {
  const progress = useResource<Progress>(`/images/${segment(image.name)}/progress`, ["image"], 700);
  const layers = progress.data?.layers ?? [];
  const size = layers.reduce((sum, one) => sum + one.size, 0), done = layers.reduce((sum, one) => sum + one.done, 0);
  const over = progress.data !== undefined && !ON_ITS_WAY.has(progress.data.status);
  useEffect(() => { if (over) onDone(); }, [over]);
  const converted = progress.data?.converted_bytes ?? 0;
  return (
    <Panel title={<>{imageName(image.name)} <State state={progress.data?.status ?? image.status} /></>} label={`Pull of ${image.name}`}
      actions={<span class="muted">{image.queue_position ? `Number ${image.queue_position} in the queue` : size ? `${bytes(done)} of ${bytes(size)}` : ""}{converted ? `, ${bytes(converted)} unpacked` : ""}</span>}>
      <Bar label={`${Math.round((100 * done) / Math.max(1, size))} % pulled`} total={size} parts={[{ value: done, tone: "accent", title: "pulled" }]} />
      {layers.length > 1 && <ul class="layers">{layers.map((layer) => (
        <li key={layer.digest}><span class="mono">{short(layer.digest)}</span><Bar label={`Layer ${short(layer.digest)}`} total={layer.size} parts={[{ value: layer.done, tone: layer.done === layer.size ? "good" : "accent", title: "pulled" }]} /><small>{bytes(layer.size)}</small></li>
      ))}</ul>}
    </Panel>
  );
}

function PullDialog({ onClose }: { onClose: () => void }) {
  const name = useSignal("");
  const error = useSignal("");
  return (
    <Dialog title="Pull an image" onClose={onClose}>
      <form onSubmit={async (event) => {
        event.preventDefault();
        try {
          await post("/images", { name: name.value.trim() });
          onClose();
        } catch (problem) {
          error.value = (problem as Error).message;
        }
      }}>
        <Field label="Reference" hint="As for docker pull. Without a registry, Docker Hub." error={error.value}>
          <Text value={name.value} onValue={(value) => { name.value = value; }} placeholder="docker.io/library/nginx:alpine" required autofocus />
        </Field>
        <div class="dialog-actions"><Button onClick={onClose}>Cancel</Button><Button type="submit" kind="primary">Pull</Button></div>
      </form>
    </Dialog>
  );
}
