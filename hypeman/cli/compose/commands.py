"""``hypeman compose``: plan, up, watch, down, standby, start, fork, ps, logs and config of a stack."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from hypeman.cli.client import ApiError, Client, Unreachable
from hypeman.cli.compose.copies import archive
from hypeman.cli.compose.model import (
    COPY,
    NAME_TAG,
    ComposeError,
    Service,
    Stack,
    Volume,
    tags,
)
from hypeman.cli.compose.plan import Act, Action, Found, plan_down, plan_up
from hypeman.cli.images import image_path
from hypeman.cli.instances import path_of
from hypeman.cli.output import age
from hypeman.cli.run import ensure_image
from hypeman.cli.session import Session, fail, interrupted, reports, write_log
from hypeman.ids import SERVICE_TAG, stack_member
from hypeman.text import one_line
from hypeman.units import parse_duration
from hypeman.urls import segment

FILES = ("hypeman.compose.yaml", "hypeman.compose.yml", "compose.yaml", "compose.yml", "docker-compose.yml")
_POLL_SECONDS = 0.5
_INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class Options(msgspec.Struct, frozen=True):
    """Which stack is meant."""

    files: tuple[Path, ...]
    name: str | None
    profiles: frozenset[str]

    def load(self) -> Stack:
        """Read the file; ends the command if it cannot be used."""
        from hypeman.cli.compose import native, spec  # other commands need neither

        paths = self.files or tuple(found_files())
        if not paths:
            fail(f"there is no {', '.join(FILES)} here; -f names another file")
        try:
            tree = spec.read_all(paths)
            if isinstance(tree, dict) and tree.get("version") == 1:
                stack = native.parse(tree, paths[0].parent)
            else:
                stack = spec.parse(tree, paths[0].parent, profiles=self.profiles, name=self.name)
            stack.ordered()
        except ComposeError as error:
            fail(f"{', '.join(map(str, paths))}: {error}")
        for warning in stack.warnings:
            click.echo(one_line(warning), err=True)
        return msgspec.structs.replace(stack, name=self.name) if self.name else stack

    def stack_name(self) -> str:
        return self.name or self.load().name


def found_files() -> list[Path]:
    """The file of this directory, and what is laid over it."""
    path = next((Path(name) for name in FILES if Path(name).is_file()), None)
    if path is None:
        return []
    over = (path.with_name(f"{path.stem}.override{suffix}") for suffix in (".yaml", ".yml"))
    return [path, *([found] if (found := next((one for one in over if one.is_file()), None)) else [])]


@click.group()
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Default: {FILES[0]}, {FILES[2]}, …, and its .override; repeatable, each over those before it.",
)
@click.option("-p", "--project-name", "name", help="Name of the stack; default: as the file says, or its directory.")
@click.option("--profile", "profiles", multiple=True, help="Include services of this profile.")
@click.pass_context
def compose(context: click.Context, files: tuple[Path, ...], name: str | None, profiles: tuple[str, ...]) -> None:
    """Stacks: several instances, their volumes and ingresses from one file."""
    context.meta["compose"] = Options(files, name, frozenset(profiles))


def _options() -> Options:
    found = click.get_current_context().meta["compose"]
    assert isinstance(found, Options)
    return found


@compose.command()
@reports
def config(session: Session) -> None:
    """Check the file, and show what would be requested of the server."""
    stack = _options().load()
    shown = [
        msgspec.structs.replace(
            service,
            secrets=dict.fromkeys(service.secrets, "***"),
            build_secrets=dict.fromkeys(service.build_secrets, "***"),
        )
        for service in stack.services
    ]
    session.show(msgspec.to_builtins(msgspec.structs.replace(stack, services=tuple(shown)), enc_hook=os.fspath))


@compose.command()
@click.option("--replace", is_flag=True, help="Replace instances whose service has changed.")
@click.option("--remove-orphans", is_flag=True, help="Delete instances of the stack that are not in the file.")
@reports
def plan(session: Session, replace: bool, remove_orphans: bool) -> None:
    """Show what `up` would do."""
    stack = _options().load()
    actions = _plan(stack, find(session.client, stack.name), replace, remove_orphans)
    session.show(msgspec.to_builtins(actions), lambda: "\n".join(map(str, actions)))


@compose.command()
@click.option("--replace", is_flag=True, help="Replace instances whose service has changed.")
@click.option("--remove-orphans", is_flag=True, help="Delete instances of the stack that are not in the file.")
@click.option("--build", "rebuild", is_flag=True, help="Build images again, also those that are there.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Until all run, and are healthy if checked.")
@click.option("--wait-timeout", default="2m", show_default=True)
@click.option("-d", "--detach", is_flag=True, hidden=True)
@reports
def up(
    session: Session,
    replace: bool,
    remove_orphans: bool,
    rebuild: bool,
    wait: bool,
    wait_timeout: str,
    detach: bool,
) -> None:
    """Create what is missing, start what is stopped, and replace what has changed if --replace says so."""
    stack = _options().load()
    actions = _plan(stack, find(session.client, stack.name), replace, remove_orphans)
    runner = Up(session.client, stack, parse_duration(wait_timeout))
    with interrupted(f"what was begun continues; hypeman compose -p {stack.name} ps shows it"):
        _bring_up(session, stack, actions, runner, rebuild=rebuild, wait=wait)
    _show(session, find(session.client, stack.name).instances)


def _bring_up(
    session: Session, stack: Stack, actions: Sequence[Action], runner: Up, *, rebuild: bool, wait: bool
) -> None:
    services = {service.key: service for service in stack.services}
    for service in stack.services:
        if service.build:
            build_image(session, service, always=rebuild)
    for action in actions:
        if action.act is not Act.KEEP:
            click.echo(str(action), err=True)
        runner.carry_out(action, services)
    if wait:
        for service in stack.ordered():
            runner.wait_for(service, "healthy" if service.body.get("health_check") else "started")


@compose.command()
@click.argument("services", nargs=-1)
@click.option("--no-up", is_flag=True, help="The stack runs already: do not create or start anything first.")
@click.option("--wait-timeout", default="2m", show_default=True)
@reports
def watch(session: Session, services: tuple[str, ...], no_up: bool, wait_timeout: str) -> None:
    """Bring the stack up, then carry files that change here into it, as develop.watch of the services says.

    sync copies them into the guest, restart boots it again, rebuild builds the image and replaces the instance.
    """
    from hypeman.cli.compose.watcher import Watcher

    stack = _options().load()
    if missing := set(services) - {service.key for service in stack.services}:
        fail(f"there is no service {', '.join(sorted(missing))} in the file")
    runner = Up(session.client, stack, parse_duration(wait_timeout))

    def rebuild(service: Service) -> None:
        action = Action(Act.REPLACE, "instance", service.name, service.key, "built again")
        try:
            build_image(session, service, always=True)
            click.echo(str(action), err=True)
            runner.carry_out(action, {service.key: service})
        except SystemExit as failed:  # the reason was shown; the next change builds again
            if failed.code == _INTERRUPTED:
                raise

    watcher = Watcher(session, stack, services, rebuild)
    if not watcher.rules:
        fail("no service has develop.watch, which says what is watched")
    with interrupted(f"the stack keeps running; hypeman compose -p {stack.name} ps shows it"):
        if not no_up:
            actions = _plan(stack, find(session.client, stack.name), replace=False, remove_orphans=False)
            _bring_up(session, stack, actions, runner, rebuild=False, wait=True)
        watcher.sync_at_first()
        for path in sorted({str(rule.path) for rule in watcher.rules}):
            click.echo(one_line(f"watch    {path}"), err=True)
        watcher.run()


@compose.command()
@click.option("-v", "--volumes", is_flag=True, help="Also the volumes and what is in them.")
@reports
def down(session: Session, volumes: bool) -> None:
    """Delete the stack's ingresses and instances."""
    name = _options().stack_name()
    found = find(session.client, name)
    ids = {("instance", row["name"]): row["id"] for row in found.instances}
    ids |= {("volume", row["name"]): row["id"] for row in found.volumes}
    ids |= {("ingress", row["name"]): row["id"] for row in found.ingresses}
    for action in plan_down(found, volumes=volumes):
        click.echo(str(action), err=True)
        _delete(session.client, action.kind, ids[action.kind, action.name])


@compose.command()
@reports
def standby(session: Session) -> None:
    """Put all running instances of the stack into standby, the newest first."""
    rows = find(session.client, _options().stack_name()).instances
    for row in reversed(rows):
        if row["state"] == "Running":
            click.echo(f"standby  instance  {row['name']}", err=True)
            session.client.post(f"{path_of(row['id'])}/standby")
    _show(session, find(session.client, _options().stack_name()).instances)


@compose.command()
@reports
def start(session: Session) -> None:
    """Bring the stack's instances back from standby, and start those that are stopped."""
    rows = find(session.client, _options().stack_name()).instances
    for row in rows:
        if verb := {"Standby": "restore", "Stopped": "start"}.get(row["state"]):
            click.echo(f"{verb:<8} instance  {row['name']}", err=True)
            session.client.post(f"{path_of(row['id'])}/{verb}")
    _show(session, find(session.client, _options().stack_name()).instances)


@compose.command()
@click.option("-p", "--to", "name", required=True, metavar="NAME", help="Name of the new stack.")
@reports
def fork(session: Session, name: str) -> None:
    """Fork all instances of the stack: a second one with the same memory and disks, and names of its own.

    Its instances find each other by the names of their services. Published ports and ingresses stay with the first one;
    an instance with a volume that it may write to cannot be forked.
    """
    source = _options().stack_name()
    if find(session.client, name).instances:
        fail(f"there is a stack {name} already")
    rows = find(session.client, source).instances
    if not rows:
        fail(f"there is no stack {source}")
    made: list[str] = []
    try:
        for row in rows:
            member = stack_member(name, _service_of(row))
            click.echo(f"fork     instance  {row['name']} → {member}", err=True)
            labels = {**(row.get("tags") or {}), NAME_TAG: name}
            body = {"name": member, "from_running": True, "tags": labels}
            made.append(session.client.post(f"{path_of(row['id'])}/fork", body)["id"])
    except ApiError:
        for instance_id in made:
            _delete(session.client, "instance", instance_id)
        raise
    _show(session, find(session.client, name).instances)


@compose.command()
@click.option("-q", "--quiet", is_flag=True, help="Only ids.")
@reports
def ps(session: Session, quiet: bool) -> None:
    """List the stack's instances."""
    _show(session, find(session.client, _options().stack_name()).instances, quiet=quiet)


@compose.command()
@click.argument("services", nargs=-1)
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines.")
@click.option("--tail", type=click.IntRange(0), default=100, show_default=True, help="Lines from before, of each.")
@reports
def logs(session: Session, services: tuple[str, ...], follow: bool, tail: int) -> None:
    """Show what the stack's instances print, each line with its service."""
    rows = find(session.client, _options().stack_name()).instances
    wanted = {_service_of(row): row for row in rows if not services or _service_of(row) in services}
    if missing := set(services) - wanted.keys():
        fail(f"there is no service {', '.join(sorted(missing))} in the stack")
    width = max(map(len, wanted), default=0)
    lock = threading.Lock()

    def show(key: str, row: dict[str, Any]) -> None:
        client = Client(session.client.settings)
        try:
            lines = client.followed_lines if follow else client.lines
            for line, _ in lines(f"{path_of(row['id'])}/logs", tail=tail, source="app"):
                with lock:
                    write_log(f"{key:<{width}} | ".encode() + line, ends=True)
        except (ApiError, Unreachable) as error:
            with lock:
                click.echo(one_line(f"{key}: {error}"), err=True)
        finally:
            client.close()

    threads = [threading.Thread(target=show, args=item, daemon=True) for item in wanted.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # a join without a limit would not notice Ctrl-C
            thread.join(0.2)


def find(client: Client, name: str) -> Found:
    """What the server has of a stack."""
    query = {"tags": {NAME_TAG: name}}
    return Found(
        sorted(client.get("/instances", **query), key=lambda row: str(row["created_at"])),
        client.get("/volumes", **query),
        client.get("/ingresses", **query),
    )


def build_image(session: Session, service: Service, *, always: bool) -> None:
    """Build the image of ``service`` if it is missing."""
    from hypeman.cli import builds

    image = str(service.body["image"])
    if not always:
        try:
            session.client.get(image_path(image))
            return
        except ApiError as error:
            if error.status != 404:
                raise
    click.echo(f"build    image     {image}", err=True)
    given = service.build
    context, dockerfile, inline = str(given["context"]), given.get("dockerfile"), given.get("dockerfile_inline")
    fields = {key: value for key, value in given.items() if key not in ("context", "dockerfile", "dockerfile_inline")}
    if secrets := service.build_secrets:
        fields["secrets"] = [{"id": name, "value_base64": value} for name, value in secrets.items()]
    file = dockerfile and str(Path(context) / dockerfile)
    made = builds.begin(session, context, file, {"image_name": image, **fields}, inline=inline)
    builds.finish(session, made["id"], "auto")


def _plan(stack: Stack, found: Found, replace: bool, remove_orphans: bool) -> list[Action]:
    try:
        return plan_up(stack, found, replace=replace, remove_orphans=remove_orphans)
    except ComposeError as error:
        fail(str(error))


def _service_of(row: dict[str, Any]) -> str:
    return str((row.get("tags") or {}).get(SERVICE_TAG) or row["name"])


def _show(session: Session, rows: Sequence[dict[str, Any]], *, quiet: bool = False) -> None:
    columns: list[tuple[str, Callable[[Any], Any]]] = [
        ("SERVICE", _service_of),
        ("INSTANCE", lambda row: row["name"]),
        ("STATE", lambda row: row["state"]),
        ("HEALTH", lambda row: (row.get("health_status") or {}).get("status")),
        ("IP", lambda row: (row.get("network") or {}).get("ip")),
        ("AGE", lambda row: age(row["created_at"])),
    ]
    session.show_list(rows, columns, quiet="id" if quiet else None)


def _delete(client: Client, kind: str, resource_id: str) -> None:
    paths = {"instance": "/instances", "volume": "/volumes", "ingress": "/ingresses"}
    try:
        client.call("DELETE", f"{paths[kind]}/{segment(resource_id)}")
    except ApiError as error:
        if error.status != 404:
            raise


class Up:
    """Carries out the actions of ``up``."""

    def __init__(self, client: Client, stack: Stack, seconds: float) -> None:
        self._client = client
        self._stack = stack
        self._seconds = seconds

    def carry_out(self, action: Action, services: dict[str, Service]) -> None:
        match action.act, action.kind:
            case Act.KEEP, _:
                return
            case Act.DELETE, kind:
                _delete(self._client, kind, action.name)
            case _, "volume":
                self._volume(next(volume for volume in self._stack.volumes if volume.name == action.name))
            case act, "instance":
                self._instance(act, services[action.key])
            case act, _:
                if act is Act.REPLACE:
                    _delete(self._client, "ingress", action.name)
                ingress = next(ingress for ingress in services[action.key].ingresses if ingress.name == action.name)
                labels = tags(self._stack, "ingress", action.key, ingress.body)
                self._client.post("/ingresses", {**ingress.body, "tags": labels})

    def _volume(self, volume: Volume) -> None:
        labels = tags(self._stack, COPY if volume.by_content else "volume")
        body = {"name": volume.name, "size_gb": volume.size_gb, "tags": labels}
        if not volume.copied:
            self._client.post("/volumes", body)
            return
        try:
            self._client.upload("/volumes/from-archive", archive(volume), "application/gzip", body)
        except OSError as error:
            fail(f"{error.filename or volume.copied}: {error.strerror or error}")

    def _instance(self, act: Act, service: Service) -> None:
        for key, condition in service.depends_on.items():
            self.wait_for(next(service for service in self._stack.services if service.key == key), condition)
        if act is Act.START:
            state = self._client.get(path_of(service.name))["state"]
            self._client.post(f"{path_of(service.name)}/{'restore' if state == 'Standby' else 'start'}")
            return
        if act is Act.REPLACE:
            _delete(self._client, "instance", service.name)
        if not service.build:
            ensure_image(self._client, str(service.body["image"]), service.body.get("platform"))
        volumes = {row["name"]: row["id"] for row in self._client.get("/volumes", tags={NAME_TAG: self._stack.name})}
        volumes |= {volume.name: self._external(volume) for volume in self._stack.volumes if volume.external}
        mounts = [{**mount, "volume_id": volumes[mount["volume_id"]]} for mount in service.mounts]
        labels = {**service.tags, **tags(self._stack, "instance", service.key, service.content)}
        body = {**service.body, **({"volumes": mounts} if mounts else {}), "tags": labels}
        if service.secrets:
            body["env"] = {**body.get("env", {}), **service.secrets}
        self._client.post("/instances", body)

    def _external(self, volume: Volume) -> str:
        try:
            return str(self._client.get(f"/volumes/{segment(volume.name)}")["id"])
        except ApiError as error:
            if error.status != 404:
                raise
            fail(f"volumes.{volume.key} is external, and there is no volume {volume.name!r}", "hypeman volume create")

    def wait_for(self, service: Service, condition: str) -> None:
        """Until a service has started, is healthy, or has completed with exit code 0. Ends the command otherwise."""
        deadline = time.monotonic() + self._seconds
        while True:
            row = self._client.get(path_of(service.name))
            state, ended = row["state"], row["state"] in ("Stopped", "Unknown")
            if condition == "completed" and state == "Stopped":
                if row.get("exit_code") == 0:
                    return
                fail(f"{service.key} ended with exit code {row.get('exit_code')}: {row.get('exit_message') or ''}")
            if condition == "started" and (state in ("Running", "Standby") or (ended and row.get("exit_code") == 0)):
                return
            if condition == "healthy" and (row.get("health_status") or {}).get("status") == "healthy":
                return
            if ended and condition != "completed":
                fail(f"{service.key} is {state}: {row.get('exit_message') or row.get('state_error') or 'it ended'}")
            if time.monotonic() > deadline:
                fail(f"{service.key} is not {condition} after {self._seconds:.0f} s: hypeman logs {service.name}")
            time.sleep(_POLL_SECONDS)
