"""``build`` and ``builder``: images from a Dockerfile, built on the server."""

from __future__ import annotations

import base64
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
import msgspec

from hypeman.cli.client import ApiError
from hypeman.cli.groups import DefaultGroup, NounGroup
from hypeman.cli.output import age
from hypeman.cli.session import (
    GIGABYTES,
    Session,
    environment,
    fail,
    pairs,
    present,
    reports,
)
from hypeman.errors import InvalidRequest
from hypeman.text import one_line
from hypeman.units import parse_size
from hypeman.urls import segment

if TYPE_CHECKING:
    from hypeman.builds.progress import SolveStatus, Step

_CHUNK = 256 << 10
_GZIP = b"\x1f\x8b"
_TAR_MAGIC = slice(257, 262)
"""Where the first header of a tar says that it is one."""
_REDRAW_SECONDS = 0.1
_FINAL = ("ready", "failed", "cancelled")


@click.group("build", cls=DefaultGroup)
def build() -> None:
    """Build an image from a Dockerfile: build PATH."""


@build.command("create")
@click.argument("path", default=".")
@click.option("-f", "--file", "file", help="Dockerfile; default: PATH/Dockerfile; - reads standard input.")
@click.option("-t", "--tag", "tags", multiple=True, help="Name of the image; KEY=VALUE is a tag of the build.")
@click.option("--image-name", help="Same as --tag.")
@click.option("--build-arg", "build_args", multiple=True, metavar="KEY[=VALUE]")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE")
@click.option("--target", help="Stage to build.")
@click.option("--platform", help="As in linux/amd64.")
@click.option(
    "--secret", "secret", multiple=True, metavar="id=ID[,src=FILE|,env=NAME]", help="For RUN --mount=type=secret."
)
@click.option("--secrets", "secret_ids", help="Comma-separated ids of secrets on the server, or JSON.")
@click.option("--ssh", "ssh", multiple=True, metavar="ID=KEYFILE", help="Private key for RUN --mount=type=ssh.")
@click.option("--no-cache", is_flag=True, help="Run every step.")
@click.option("--pull", is_flag=True, help="Check registries for newer base images.")
@click.option("--cache-from", multiple=True, metavar="REF", help="REF, or type=registry,ref=REF.")
@click.option("--cache-to", multiple=True, metavar="REF", help="REF, type=registry,ref=REF,mode=max, or type=inline.")
@click.option("--provenance", help="true, mode=min or mode=max.")
@click.option("--sbom", help="true or generator=IMAGE.")
@click.option(
    "--network", type=click.Choice(["egress", "isolated", "default", "none"]), help="Network of the VM that builds."
)
@click.option(
    "--builder",
    "--builder-id",
    "builder_id",
    envvar="HYPEMAN_BUILDER",
    help="Builder whose cache is used; default: HYPEMAN_BUILDER, or no cache.",
)
@click.option("--cache-scope", help="Use the cache of this name in the server's registry.")
@click.option("--global-cache-key", help="Use the shared cache of this name.")
@click.option("--is-admin-build", is_flag=True, help="Allow writing to the shared cache.")
@click.option("--base-image-digest", help="Require a base image with this digest.")
@click.option("--timeout", type=int, help="Seconds until the build is stopped.")
@click.option("--cpus", type=int, help="CPUs of the VM that builds.")
@click.option("-m", "--memory", help="Memory of the VM that builds; a plain number is MB.")
@click.option("--registry-auth", type=click.Path(exists=True, dir_okay=False), help="A docker config.json with logins.")
@click.option(
    "--progress", type=click.Choice(["auto", "plain", "tty", "quiet", "rawjson"]), default="auto", show_default=True
)
@click.option("-q", "--quiet", is_flag=True, help="Print only the image's digest.")
@click.option("-d", "--detach", is_flag=True, help="Do not wait; print the build's id.")
@reports
def create(
    session: Session, path: str, file: str | None, detach: bool, quiet: bool, progress: str, **options: Any
) -> None:
    """Build the directory PATH; - reads a Dockerfile, a tar or a tar.gz from standard input."""
    made = begin(session, path, file, _fields(**options))
    if detach:
        session.show(made, lambda: str(made["id"]))
        return
    done = finish(session, made["id"], "quiet" if quiet else progress)
    session.show(done, lambda: str(done["image_digest"] if quiet else done["image_ref"]))


def begin(session: Session, path: str, file: str | None, fields: dict[str, Any], *, inline: str | None = None) -> Any:
    """Send the directory ``path`` and the ``fields`` of the form; the build that began. ``inline``: text of the
    Dockerfile, instead of a file."""
    import secrets
    import tempfile

    with tempfile.TemporaryFile() as source:
        fields |= _write_source(path, file, source, inline)
        source.seek(0)
        if "registry_auth" not in fields and (auths := _logins(path, fields)):
            fields["registry_auth"] = {"auths": auths}
        boundary = f"hypeman-{secrets.token_hex(16)}"
        body = _form(fields, source, boundary)
        return session.client.upload("/builds", body, f"multipart/form-data; boundary={boundary}", {})


def finish(session: Session, build_id: str, progress: str) -> Any:
    """Show the build until it ends, and return it; ends the command if it fails. Ctrl-C cancels it."""
    path = f"/builds/{segment(build_id)}"
    try:
        _follow(session, path, progress)
        done = session.client.get(path)
    except KeyboardInterrupt:
        session.client.close()  # its connection is that of the stream
        try:
            session.client.call("DELETE", path)
            click.echo(f"\nInterrupted: build {build_id} is cancelled", err=True)
        except ApiError as error:
            click.echo(f"\nInterrupted: {one_line(error.message)}", err=True)
        raise SystemExit(130) from None
    if done["status"] != "ready":
        fail(f"build {build_id} {done['status']}: {done.get('error') or 'no image was produced'}")
    return done


def _follow(session: Session, path: str, progress: str) -> None:
    if progress == "auto":
        progress = "tty" if sys.stderr.isatty() else "plain"
    display = _DISPLAYS[progress]()
    ended = False
    held = ""
    try:
        for event in session.client.events(f"{path}/events", follow=True, progress=True):
            if event["type"] not in ("status", "heartbeat") and held:
                display.line(held)
                held = ""
            if event["type"] == "log":
                if (text := event.get("content", "")).startswith("ERROR: "):
                    held = text  # the last one is the build's, with which the command ends
                else:
                    display.line(text)
            elif event["type"] == "progress":
                display.progress(event["progress"])
            elif event["type"] == "status":
                ended = event["status"] in _FINAL
                display.status(event["status"])
    finally:
        display.close()
    if not ended:
        fail("the server ended the stream before the build", "hypeman build get ID shows its state")


# ── What is sent ─────────────────────────────────────────────────────────────────────────────────


def _fields(
    *,
    tags: tuple[str, ...],
    image_name: str | None,
    build_args: tuple[str, ...],
    labels: tuple[str, ...],
    secret: tuple[str, ...],
    secret_ids: str | None,
    ssh: tuple[str, ...],
    no_cache: bool,
    pull: bool,
    is_admin_build: bool,
    cache_from: tuple[str, ...],
    cache_to: tuple[str, ...],
    network: str | None,
    memory: str | None,
    registry_auth: str | None,
    **same: Any,
) -> dict[str, Any]:
    """The fields of the form besides the context."""
    names = [name for name in ((image_name,) if image_name else ()) + tags if "=" not in name]
    given = [_secret(text) for text in secret] + _server_secrets(secret_ids)
    return present(
        image_name=names[0] if names else None,
        image_names=names[1:],
        tags=pairs([text for text in tags if "=" in text]),
        build_args=environment(build_args),
        labels=pairs(labels, "--label"),
        secrets=given,
        ssh=[_ssh_key(text) for text in ssh],
        no_cache="true" if no_cache else None,
        pull="true" if pull else None,
        is_admin_build="true" if is_admin_build else None,
        cache_from=[cache_place(text) for text in cache_from],
        cache_to=[cache_place(text) for text in cache_to],
        network={"default": "egress", "none": "isolated"}.get(network or "", network),
        memory_mb=_megabytes(memory),
        registry_auth=Path(registry_auth).read_text() if registry_auth else None,
        **{{"timeout": "timeout_seconds"}.get(key, key): value for key, value in same.items()},
    )


def _secret(text: str) -> dict[str, str]:
    """``id=ID`` with ``src=FILE`` or ``env=NAME``; without either, the variable or else the file of that name."""
    parts = dict(part.partition("=")[::2] for part in text.split(","))
    name = parts.get("id", "")
    unknown = parts.keys() - {"id", "src", "source", "env", "type"}
    if not name or unknown:
        raise click.BadParameter(f"{text!r} must be id=ID,src=FILE or id=ID,env=NAME", param_hint="--secret")
    file = parts.get("src") or parts.get("source")
    variable = parts.get("env") or (name if not file and name in os.environ else None)
    if variable is not None:
        if variable not in os.environ:
            raise click.BadParameter(f"environment variable {variable!r} is not set", param_hint="--secret")
        data = os.environb[variable.encode()] if hasattr(os, "environb") else os.environ[variable].encode()
    else:
        data = _read(file or name, "--secret")
    return {"id": name, "value_base64": base64.b64encode(data).decode()}


def _server_secrets(text: str | None) -> list[Any]:
    if not text:
        return []
    if text.lstrip().startswith("["):
        try:
            return msgspec.json.decode(text, type=list[Any])
        except msgspec.MsgspecError as error:
            raise click.BadParameter(str(error), param_hint="--secrets") from None
    return [{"id": name.strip()} for name in text.split(",")]


def _ssh_key(text: str) -> dict[str, str]:
    name, _, file = text.partition("=")
    if not file:
        raise click.BadParameter(
            f"{text!r}: name a key file, as in default=~/.ssh/id_ed25519; an agent cannot be forwarded to the server",
            param_hint="--ssh",
        )
    return {"id": name, "value": _read(str(Path(file).expanduser()), "--ssh").decode()}


def _read(file: str, option: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise click.BadParameter(f"{file!r} cannot be read: {error.strerror}", param_hint=option) from None


def cache_place(text: str) -> str:
    """A cache as the form of a build names it: a reference is one in a registry."""
    return text if "type=" in text else f"type=registry,ref={text}"


def _megabytes(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(text) if text.isdigit() else parse_size(text) >> 20
    except InvalidRequest as error:
        raise click.BadParameter(error.message, param_hint="--memory") from None


def _write_source(path: str, file: str | None, source: IO[bytes], inline: str | None) -> dict[str, str]:
    """Write the context to ``source``; returns the fields that say where the Dockerfile is."""
    import gzip
    import tempfile

    from hypeman.cli.context import place_in, write_context

    if path == "-":
        if file == "-":
            raise click.UsageError("standard input cannot be both the context and the Dockerfile")
        data = sys.stdin.buffer
        begin = data.read(_TAR_MAGIC.stop)
        if begin.startswith(_GZIP):
            source.write(begin)
            shutil.copyfileobj(data, source, _CHUNK)
            return {"dockerfile_path": file} if file else {}
        if begin[_TAR_MAGIC] == b"ustar":
            with gzip.GzipFile(fileobj=source, mode="wb", compresslevel=1) as packed:
                packed.write(begin)
                shutil.copyfileobj(data, packed, _CHUNK)
            return {"dockerfile_path": file} if file else {}
        with tempfile.TemporaryDirectory() as empty:
            write_context(Path(empty), source, dockerfile=None)
        return {"dockerfile": (begin + data.read()).decode()}
    directory = Path(path)
    if not directory.is_dir():
        raise click.BadParameter(f"{path!r} is not a directory", param_hint="PATH")
    if inline is not None or file == "-":
        write_context(directory, source, dockerfile=None)
        return {"dockerfile": sys.stdin.read() if inline is None else inline}
    dockerfile = Path(file) if file else directory / "Dockerfile"
    if not dockerfile.is_file():
        raise click.UsageError(f"there is no Dockerfile {str(dockerfile)!r}")
    place = place_in(directory, dockerfile)
    write_context(directory, source, dockerfile=place)
    return {"dockerfile": dockerfile.read_text()} if place is None else {"dockerfile_path": place}


def _logins(path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Kept logins of the registries that the build asks: for base images and caches, as Docker's ``auths``."""
    from hypeman.builds.dockerfile import find_images, find_syntax
    from hypeman.cli.logins import login_key, registry_of, sent_login

    text = fields.get("dockerfile") or ""
    if not text and path != "-":
        text = (Path(path) / fields["dockerfile_path"]).read_text(errors="replace")
    names = [*map(str, find_images(text, fields.get("build_args") or {})), *find_syntax(text)]
    for cache in (*fields.get("cache_from", ()), *fields.get("cache_to", ())):
        names += [part.removeprefix("ref=") for part in cache.split(",") if part.startswith("ref=")]
    found = dict[str, Any]()
    asked = set[str]()
    for name in names:
        try:
            registry = registry_of(name)
        except InvalidRequest:
            continue  # BuildKit says what is wrong with it
        if registry not in asked and (login := sent_login(name)):
            auth = base64.b64encode(f"{login['username']}:{login['password']}".encode()).decode()
            found[login_key(registry)] = {"auth": auth}
        asked.add(registry)
    return found


def _form(fields: Mapping[str, Any], source: IO[bytes], boundary: str) -> Iterator[bytes]:
    """The body of the request, in pieces; what is no text is JSON."""
    for name, value in fields.items():
        data = value.encode() if isinstance(value, str) else msgspec.json.encode(value)
        yield f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + data + b"\r\n"
    disposition = 'form-data; name="source"; filename="context.tar.gz"'
    yield (f"--{boundary}\r\nContent-Disposition: {disposition}\r\nContent-Type: application/gzip\r\n\r\n".encode())
    while piece := source.read(_CHUNK):
        yield piece
    yield f"\r\n--{boundary}--\r\n".encode()


# ── What is shown, on standard error ─────────────────────────────────────────────────────────────


class _Quiet:
    def line(self, text: str) -> None:
        pass

    def progress(self, update: Any) -> None:
        pass

    def status(self, status: str) -> None:
        pass

    def close(self) -> None:
        pass


def _parsed(update: Any) -> SolveStatus | None:
    from hypeman.builds.progress import parse_status

    return parse_status(msgspec.json.encode(update))


class _RawJson(_Quiet):
    """BuildKit's updates as they come, on standard output."""

    def progress(self, update: Any) -> None:
        sys.stdout.write(msgspec.json.encode(update).decode() + "\n")
        sys.stdout.flush()


class _Plain(_Quiet):
    def __init__(self) -> None:
        from hypeman.builds.progress import PlainText

        self._text = PlainText()

    def line(self, text: str) -> None:
        self._write([text])

    def progress(self, update: Any) -> None:
        status = _parsed(update)
        if status is not None:
            self._write(self._text.feed(status))

    def close(self) -> None:
        self._write(self._text.flush())

    def _write(self, lines: Iterable[str]) -> None:
        for line in lines:
            sys.stderr.write(one_line(line) + "\n")
        sys.stderr.flush()


class _Terminal(_Plain):
    """Steps that are done scroll away; below them those that run, and what they print."""

    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()
        self._drawn = 0.0
        self._height = 0
        self._done: set[str] = set()
        self._last: dict[str, str] = {}
        self._state = "queued"

    def line(self, text: str) -> None:
        self._clear()
        self._write([text])
        self._draw()

    def progress(self, update: Any) -> None:
        status = _parsed(update)
        if status is None:
            return
        self._text.feed(status)
        for output in status.logs:
            if text := output.data.decode(errors="replace").strip():
                self._last[output.vertex] = text.splitlines()[-1]
        ended = [
            (digest, step)
            for digest, step in self._text.steps.items()
            if step.completed is not None and digest not in self._done
        ]
        if ended or time.monotonic() - self._drawn > _REDRAW_SECONDS:
            self._clear()
            for digest, step in ended:
                self._done.add(digest)
                sys.stderr.write(self._row(step) + "\n")
                self._write(self._text.failure(step))
            self._draw()

    def status(self, status: str) -> None:
        self._state = status
        self._clear()
        if status not in _FINAL:
            self._draw()

    def close(self) -> None:
        self._clear()
        total = len(self._text.steps)
        sys.stderr.write(f"[+] {self._state} after {time.monotonic() - self._began:.1f}s, {total} steps\n")
        sys.stderr.flush()

    def _draw(self) -> None:
        running = [(digest, step) for digest, step in self._text.steps.items() if step.completed is None]
        rows = [f"[+] {self._state} {time.monotonic() - self._began:.1f}s ({len(self._done)}/{len(self._text.steps)})"]
        for digest, step in running[-8:]:
            rows.append(self._row(step))
            if digest in self._last:
                rows.append(_cut(f"    {self._last[digest]}"))
        sys.stderr.write("\n".join(rows) + "\n")
        sys.stderr.flush()
        self._height = len(rows)
        self._drawn = time.monotonic()

    def _clear(self) -> None:
        if self._height:
            sys.stderr.write(f"\x1b[{self._height}A\x1b[J")
            self._height = 0

    def _row(self, step: Step) -> str:
        if step.error:
            mark = "ERROR "
        elif step.cached:
            mark = "CACHED "
        else:
            mark = ""
        seconds = f" {step.seconds:.1f}s" if step.completed is not None else ""
        return _cut(f" => {mark}{step.name}", len(seconds)) + seconds


def _cut(text: str, less: int = 0) -> str:
    width = max(20, shutil.get_terminal_size().columns - less - 1)
    text = one_line(text)
    return text if len(text) <= width else text[: width - 1] + "…"


_DISPLAYS: Mapping[str, type[_Quiet]] = {"quiet": _Quiet, "rawjson": _RawJson, "plain": _Plain, "tty": _Terminal}


# ── Looking at builds ────────────────────────────────────────────────────────────────────────────


@build.command("list")
@click.option("-q", "--quiet", is_flag=True, help="Only ids.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", help="Only those with this tag.")
@reports
def list_builds(session: Session, quiet: bool, tags: tuple[str, ...]) -> None:
    """List builds, newest first."""
    columns = [
        ("ID", lambda row: row["id"]),
        ("STATUS", lambda row: row["status"]),
        ("IMAGE", lambda row: row.get("image_ref") or ""),
        ("BUILDER", lambda row: row.get("builder_id") or ""),
        ("TIME", lambda row: f"{row['duration_ms'] / 1000:.1f}s" if row.get("duration_ms") is not None else ""),
        ("AGE", lambda row: age(row["created_at"])),
        ("ERROR", lambda row: row.get("error") or ""),
    ]
    session.show_list(session.client.get("/builds", tags=pairs(tags)), columns, quiet="id" if quiet else None)


@build.command("get")
@click.argument("build_id", metavar="ID")
@reports
def get_build(session: Session, build_id: str) -> None:
    """Show everything about a build."""
    session.show(session.client.get(f"/builds/{segment(build_id)}"))


@build.command("logs")
@click.argument("build_id", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Continue until the build ends.")
@reports
def logs(session: Session, build_id: str, follow: bool) -> None:
    """Print the output of a build, from its start."""
    for event in session.client.events(f"/builds/{segment(build_id)}/events", follow=follow):
        if event["type"] == "log":
            click.echo(one_line(event.get("content", "")))


@build.command("cancel")
@click.argument("build_ids", metavar="ID", nargs=-1, required=True)
@reports
def cancel(session: Session, build_ids: Sequence[str]) -> None:
    """Cancel queued or running builds."""
    session.delete_each(build_ids, lambda build_id: f"/builds/{segment(build_id)}")


# ── Builders ─────────────────────────────────────────────────────────────────────────────────────


@click.group("builder", cls=NounGroup)
def builder() -> None:
    """Builders: caches and queues of builds."""


@builder.command("create")
@click.option("--id", "builder_id", help="Id of the builder. Default: a new one.")
@click.option("--name")
@click.option("--disk-size", type=GIGABYTES, help="Size of the cache.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE")
@reports
def create_builder(
    session: Session, builder_id: str | None, name: str | None, disk_size: int | None, tags: tuple[str, ...]
) -> None:
    """Create a builder: hypeman build --builder ID uses its cache."""
    body = present(id=builder_id, name=name, disk_size_gb=disk_size, tags=pairs(tags))
    made = session.client.post("/builders", body)
    session.show(made, lambda: str(made["id"]))


@builder.command("list")
@click.option("-q", "--quiet", is_flag=True, help="Only ids.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", help="Only those with this tag.")
@reports
def list_builders(session: Session, quiet: bool, tags: tuple[str, ...]) -> None:
    """List builders."""
    columns = [
        ("ID", lambda row: row["id"]),
        ("NAME", lambda row: row.get("name") or ""),
        ("STATUS", lambda row: row["status"]),
        ("CACHE", lambda row: f"{row['disk_size_gb']}GB"),
        ("BUILD", lambda row: row.get("active_build_id") or ""),
        ("QUEUED", lambda row: str(len(row["queued_builds"]))),
        ("USED", lambda row: age(row["last_used_at"]) if row.get("last_used_at") else ""),
    ]
    session.show_list(session.client.get("/builders", tags=pairs(tags)), columns, quiet="id" if quiet else None)


@builder.command("get")
@click.argument("builder_id", metavar="ID")
@reports
def get_builder(session: Session, builder_id: str) -> None:
    """Show everything about a builder."""
    session.show(session.client.get(f"/builders/{segment(builder_id)}"))


@builder.command("delete")
@click.argument("builder_ids", metavar="ID", nargs=-1, required=True)
@reports
def delete_builder(session: Session, builder_ids: Sequence[str]) -> None:
    """Delete builders that have no builds, with their caches."""
    session.delete_each(builder_ids, lambda builder_id: f"/builders/{segment(builder_id)}")


@builder.command("prune")
@click.argument("builder_id", metavar="ID")
@reports
def prune(session: Session, builder_id: str) -> None:
    """Empty a builder's cache."""
    made = session.client.post(f"/builders/{segment(builder_id)}/prune")
    session.show(made, lambda: str(made["id"]))
