// Files of the guest: browse, download, upload. Directories are listed by the guest's own ls.
import { useSignal } from "@preact/signals";
import type { Instance } from "api-types";
import { useEffect } from "preact/hooks";
import { missingScope } from "../api";
import { copyIn, copyOut, run } from "../sessions";
import { bytes } from "../format";
import { Button, notifyError, Empty, Icon, Panel, notify, Text } from "../ui";
import { save } from "./logs";

const join = (folder: string, name: string) => (folder === "/" ? `/${name}` : `${folder}/${name}`);
const parent = (path: string) => path.replace(/\/[^/]*$/, "") || "/";

export function Files({ instance }: { instance: Instance }) {
  const folder = useSignal("/");
  const typed = useSignal("/");
  const names = useSignal<string[] | undefined>(undefined);
  const problem = useSignal("");
  const progress = useSignal("");
  const over = useSignal(false);
  const turn = useSignal(0);
  const refused = missingScope("instance:write") ?? (instance.state === "Running" ? undefined : `${instance.name} is ${instance.state}. Its files can be reached while it runs.`);

  useEffect(() => {
    if (refused) return;
    let gone = false;
    typed.value = folder.value;
    run(instance.id, ["/bin/sh", "-c", 'cd -- "$1" && ls -1Ap', "ls", folder.value]).then(({ output, code }) => {
      if (gone) return;
      problem.value = code === 0 ? "" : output.trim() || `ls ended with ${code}`;
      names.value = code === 0 ? output.split("\n").filter(Boolean).sort((a, b) => Number(b.endsWith("/")) - Number(a.endsWith("/")) || (a < b ? -1 : 1)) : undefined;
    }, (error) => { if (!gone) problem.value = (error as Error).message; });
    return () => { gone = true; };
  }, [folder.value, turn.value, refused === undefined]);

  async function download(name: string) {
    try {
      progress.value = `Downloading ${name}`;
      const found = await copyOut(instance.id, join(folder.value, name), (done) => { progress.value = `Downloading ${name}, ${bytes(done)}`; });
      save(found.name, found.content);
    } catch (error) {
      notifyError(error);
    } finally {
      progress.value = "";
    }
  }
  async function upload(files: Iterable<File>) {
    try {
      for (const file of files) {
        const written = await copyIn(instance.id, join(folder.value, file.name), file, (done) => {
          progress.value = `Uploading ${file.name}, ${Math.round((100 * done) / Math.max(1, file.size))} %`;
        });
        notify(`${file.name}: ${bytes(written)} were written to ${folder.value}`);
      }
    } catch (error) {
      notifyError(error);
    } finally {
      progress.value = "";
      turn.value++;
    }
  }
  if (refused) return <Panel><Empty icon="folder" title="Files are not available">{refused}</Empty></Panel>;
  return (
    <div class={`drop ${over.value ? "over" : ""}`}
      onDragOver={(event) => { event.preventDefault(); over.value = true; }}
      onDragLeave={() => { over.value = false; }}
      onDrop={(event) => { event.preventDefault(); over.value = false; void upload(event.dataTransfer?.files ?? []); }}>
      <Panel flush title={<Crumbs path={folder.value} onGo={(path) => { folder.value = path; }} />} actions={<>
        <form class="path-form" onSubmit={(event) => { event.preventDefault(); folder.value = typed.value.replace(/(.)\/+$/, "$1") || "/"; turn.value++; }}>
          <Text aria-label="Folder" value={typed.value} onValue={(value) => { typed.value = value; }} />
        </form>
        <label class="button"><Icon name="upload" /><span>Upload</span>
          <input type="file" class="hidden" multiple aria-label="Upload files" onChange={(event) => { void upload([...(event.currentTarget.files ?? [])]); event.currentTarget.value = ""; }} />
        </label>
      </>}>
        {problem.value && <div class="panel-body"><p class="field-error" role="alert">{problem.value}</p></div>}
        <ul class="files" aria-label={`Files in ${folder.value}`}>
          {folder.value !== "/" && <li><button type="button" class="file" onClick={() => { folder.value = parent(folder.value); }}><Icon name="up" /><span>..</span></button></li>}
          {names.value?.map((name) => {
            const directory = name.endsWith("/");
            const plain = directory ? name.slice(0, -1) : name;
            return (
              <li key={name}>
                <button type="button" class="file" onClick={() => { if (directory) folder.value = join(folder.value, plain); else void download(plain); }}>
                  <Icon name={directory ? "folder" : "file"} /><span>{plain}</span>
                </button>
                <Button kind="plain" icon="download" label={directory ? `Download ${plain} as tar` : `Download ${plain}`} onClick={() => download(plain)} />
              </li>
            );
          })}
        </ul>
        {names.value?.length === 0 && <p class="none">This folder is empty.</p>}
        <footer class="list-foot" aria-live="polite">{progress.value || "Drop files here to upload them."}</footer>
      </Panel>
    </div>
  );
}

function Crumbs({ path, onGo }: { path: string; onGo: (path: string) => void }) {
  const parts = path.split("/").filter(Boolean);
  return (
    <span class="crumbs">
      <button type="button" class="link" onClick={() => onGo("/")}>/</button>
      {parts.map((part, at) => <span key={at}><button type="button" class="link" onClick={() => onGo(`/${parts.slice(0, at + 1).join("/")}`)}>{part}</button>{at < parts.length - 1 && " / "}</span>)}
    </span>
  );
}
