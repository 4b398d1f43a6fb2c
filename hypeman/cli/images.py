"""Commands on images, and waiting for a pull."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from hypeman.cli.client import ApiError, Client
from hypeman.cli.complete import complete_image
from hypeman.cli.groups import NounGroup
from hypeman.cli.logins import sent_login
from hypeman.cli.output import age, size
from hypeman.cli.progress import counted
from hypeman.cli.session import Session, complain, fail, format_option, interrupted, pairs, present, reports, templated
from hypeman.text import one_line
from hypeman.urls import segment

_POLL_SECONDS = 0.3
_CHUNK = 256 * 1024


def image_path(name: str) -> str:
    """The reference as one path segment."""
    return f"/images/{segment(name)}"


class PullDisplay:
    """A progress line on stderr during a pull."""

    def __init__(self, name: str, *, visible: bool) -> None:
        self._name = name
        self._visible = visible

    @classmethod
    def for_terminal(cls, name: str) -> PullDisplay:
        return cls(name, visible=sys.stderr.isatty())

    def update(self, image: dict[str, Any], progress: dict[str, Any] | None) -> None:
        if self._visible:
            sys.stderr.write("\r\x1b[K" + one_line(f"{self._name}: {progress_line(image, progress)}"))
            sys.stderr.flush()

    def end(self) -> None:
        if self._visible:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def progress_line(image: dict[str, Any], progress: dict[str, Any] | None) -> str:
    """``pulling [####····] 40MB of 120MB, 5 layers``."""
    status = str(image["status"])
    if image.get("queue_position"):
        return f"{status}, number {image['queue_position']} in the queue"
    layers = (progress or {}).get("layers") or []
    total = sum(layer["size"] for layer in layers)
    done = sum(layer["done"] for layer in layers)
    if status == "converting" and (progress or {}).get("converted_bytes"):
        return f"{status}, {size((progress or {})['converted_bytes'])} written"
    if not total:
        return status
    bar = "#" * int(20 * done / total)
    return f"{status} [{bar:·<20}] {size(done)} of {size(total)}, {len(layers)} layer{'s' * (len(layers) != 1)}"


def wait_ready(client: Client, name: str, display: PullDisplay) -> dict[str, Any]:
    """Wait until the image is ready; ends the command if it failed."""
    asks_progress = True
    while True:
        image = _look(client, name)
        if image["status"] in ("ready", "failed"):
            display.end()
            if image["status"] == "failed":
                fail(f"{name} could not be pulled: {image.get('error') or 'no reason given'}")
            return image
        progress = None
        if asks_progress:
            try:
                progress = client.get(f"{image_path(name)}/progress")
            except ApiError:
                asks_progress = False  # an older server without it
        display.update(image, progress)
        time.sleep(_POLL_SECONDS)


def _look(client: Client, name: str) -> dict[str, Any]:
    """The image; one just requested may not exist yet for a moment."""
    deadline = time.monotonic() + 3
    while True:
        try:
            return dict(client.get(image_path(name)))
        except ApiError as error:
            if error.status != 404 or time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)


@click.command()
@click.argument("image")
@click.option("--platform", help="As in linux/arm64.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE")
@click.option("-d", "--detach", is_flag=True, help="Do not wait until it is ready.")
@reports
def pull(session: Session, image: str, platform: str | None, tags: tuple[str, ...], detach: bool) -> None:
    """Pull an image from a registry."""
    body = present(name=image, platform=platform, tags=pairs(tags), credentials=sent_login(image))
    found = session.client.post("/images", body)
    _finish(session, found, detach)


def _finish(session: Session, image: dict[str, Any], detach: bool) -> None:
    if not detach and image["status"] != "ready":
        name = image["name"]
        with interrupted(f"the server continues; to see how far it is: hypeman image get {name}"):
            image = wait_ready(session.client, name, PullDisplay.for_terminal(name))
    session.show(image, lambda: f"{image['name']} {image['digest']} {image['status']}")


@click.group("image", cls=NounGroup)
def images() -> None:
    """Images: root disks made from OCI images."""


images.add_command(pull, "create")


@images.command("list")
@click.option("-q", "--quiet", is_flag=True, help="Only names.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE")
@reports
@templated("image_row")
def list_images(session: Session, quiet: bool, tags: tuple[str, ...]) -> None:
    """List images."""
    columns = [
        ("NAME", lambda row: row["name"]),
        ("DIGEST", lambda row: row["digest"].partition(":")[2][:12]),
        ("STATUS", lambda row: row["status"]),
        ("SIZE", lambda row: size(row.get("size_bytes"))),
        ("AGE", lambda row: age(row["created_at"])),
    ]
    session.show_list(session.client.get("/images", tags=pairs(tags)), columns, quiet="name" if quiet else None)


@images.command("get")
@click.argument("name", shell_complete=complete_image)
@format_option
@reports
@templated("image")
def get_image(session: Session, name: str) -> None:
    """Show everything about an image."""
    session.show(session.client.get(image_path(name)))


@images.command("tag")
@click.argument("name", shell_complete=complete_image)
@click.argument("target")
@reports
def tag_image(session: Session, name: str, target: str) -> None:
    """Make TARGET another name of the image NAME, without a pull."""
    session.show(session.client.call("POST", f"{image_path(name)}/tag", {"target": target}), lambda: "")


@images.command("delete")
@click.argument("names", nargs=-1, required=True, shell_complete=complete_image)
@reports
def delete_image(session: Session, names: tuple[str, ...]) -> None:
    """Delete images that no instance uses."""
    session.delete_each(names, image_path)


@images.command("prune")
@click.option("-a", "--all", "everything", is_flag=True, help="Needed: what has no name is deleted by the server.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@reports
def prune_images(session: Session, everything: bool, force: bool) -> None:
    """Delete all images that no instance uses."""
    from hypeman.cli.prune import delete_after_question, unused_images

    if not everything:
        click.echo("the server deletes what has no name: --all deletes images that no instance uses", err=True)
    targets = unused_images(session.client, session.client.get("/instances")) if everything else []
    raise SystemExit(delete_after_question(session, targets, force=force))


@images.command("import")
@click.argument("archive")
@click.option("--name", help="Name of the image; default: the name in the archive, or else the file's name.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE")
@click.option("--on-server", is_flag=True, help="ARCHIVE is a path on the server, allowed by its configuration.")
@click.option("-d", "--detach", is_flag=True, help="Do not wait until it is ready.")
@reports
def import_image(
    session: Session, archive: str, name: str | None, tags: tuple[str, ...], on_server: bool, detach: bool
) -> None:
    """Make an image from ARCHIVE: a tar as `docker save` or `skopeo copy … oci-archive:` write it, or an
    OCI layout directory; - reads standard input."""
    query = {"name": name or "", "tags": pairs(tags)}
    if archive != "-":
        query["default_name"] = _name_from(archive)
    try:
        chunks: Iterator[bytes] = iter(()) if on_server else upload_chunks(archive)
        if on_server:
            query["path"] = archive
        found = session.client.upload("/images/import", chunks, "application/x-tar", query)
    except OSError as error:
        complain(f"{archive}: {error.strerror or error}")
        raise SystemExit(1) from None
    _finish(session, found, detach)


def _name_from(archive: str) -> str:
    base = os.path.basename(os.path.abspath(archive))
    for ending in (".gz", ".tar", ".tgz", ".oci"):
        base = base.removesuffix(ending)
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in base.lower()) or "image"


def upload_chunks(archive: str) -> Iterator[bytes]:
    """The bytes of a file or of standard input; a directory as a tar of its contents."""
    if os.path.isdir(archive):
        return counted(_tarred(archive), archive)
    if archive == "-":
        return counted(_read(sys.stdin.fileno()), "standard input")
    fd = os.open(archive, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    return counted(_read(fd), archive, os.fstat(fd).st_size)


def _read(fd: int) -> Iterator[bytes]:
    with os.fdopen(fd, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _tarred(directory: str) -> Iterator[bytes]:
    """A tar created while it is sent: a thread writes into a pipe, so that memory use is constant."""
    import tarfile
    import threading

    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "wb") as pipe, tarfile.open(fileobj=pipe, mode="w|") as tar:
            for entry in sorted(os.listdir(directory)):
                tar.add(os.path.join(directory, entry), arcname=entry)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    yield from _read(reading)
    thread.join()
