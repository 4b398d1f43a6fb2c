"""Commands on instances: list, inspect, and all lifecycle verbs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import click

from hypeman.cli.client import ApiError, Client
from hypeman.cli.complete import complete_instance
from hypeman.cli.output import age, render_table, size, until, use_colour
from hypeman.cli.policies import (
    compression_body,
    compression_options,
    health_body,
    health_options,
    restart_body,
    restart_options,
)
from hypeman.cli.session import (
    ParamType,
    Session,
    fail,
    format_option,
    interrupted,
    pairs,
    present,
    reports,
    templated,
    warn,
    write_log,
)
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.text import one_line
from hypeman.urls import segment

STATES = ("Created", "Initializing", "Running", "Paused", "Shutdown", "Stopped", "Standby", "Unknown")
WAKES = ("none", "traffic", "all")
TARGETS = ("Stopped", "Standby", "Running")
HYPERVISORS = {
    "ch": HypervisorKind.CLOUD_HYPERVISOR.value,
    "fc": HypervisorKind.FIRECRACKER.value,
    "microvm": HypervisorKind.QEMU_MICROVM.value,
}
"""Short names."""
HYPERVISOR_HELP = "{}.".format(
    ", ".join(
        " ".join((kind, *(f"({short})" for short, name in HYPERVISORS.items() if name == kind)))
        for kind in HypervisorKind
        if kind is not HypervisorKind.VZ
    )
)
ALL_LINES = 100_000
"""At most so many are kept of a run."""
_LIVE = ("Running", "Initializing", "Paused", "Shutdown")
_HIDDEN = "***"
_WAIT = "5m"
"""The longest wait of one request."""
_LOOK_SECONDS = 1.0


instance_argument = click.argument("instance", shell_complete=complete_instance)


def path_of(instance: str) -> str:
    return f"/instances/{segment(instance)}"


def restart_instance(client: Client, name: str, grace: int | None = None) -> Any:
    """Shut an instance down if it runs, within ``grace`` seconds, and boot it."""
    if client.get(path_of(name))["state"] in _LIVE:
        client.post(f"{path_of(name)}/stop", grace_body(grace))
    return client.post(f"{path_of(name)}/start")


def grace_body(seconds: int | None) -> dict[str, Any]:
    """A request to stop that gives the program so long to end."""
    return present(grace=None if seconds is None else f"{seconds}s")


def show_instance(session: Session, instance: dict[str, Any]) -> None:
    """Output after a verb: one line for people, everything for programs."""
    session.show(instance, lambda: f"{instance['name']} is {instance['state']}")


def _health(row: Mapping[str, Any]) -> str | None:
    status = (row.get("health_status") or {}).get("status", "disabled")
    return None if status == "disabled" else str(status)


def _restarts(row: Mapping[str, Any]) -> str | None:
    """How often the restart policy has started it, and what it will do next."""
    status = row.get("restart_status")
    if not status or (row.get("restart_policy") or {}).get("policy", "never") == "never":
        return None
    if status.get("next_attempt_at"):
        return f"{status['attempts']}, next {until(status['next_attempt_at'])}"
    reason = status.get("blocked_reason")
    return f"{status['attempts']}, {reason}" if reason else str(status["attempts"])


def _ports(row: dict[str, Any]) -> str:
    """``8080->80/tcp, 127.0.0.1:53->53/udp, 9000-9009->9000/tcp``."""
    shown = []
    for each in row.get("ports") or ():
        address, last = each.get("host_address") or "", each["host_port"] + each.get("count", 1) - 1
        where = f"[{address}]:" if ":" in address else f"{address}:" if address else ""
        ports = f"{each['host_port']}-{last}" if last > each["host_port"] else str(last)
        shown.append(f"{where}{ports}->{each['guest_port']}/{each['protocol']}")
    return ", ".join(shown)


_POLICY_COLUMNS = [("HEALTH", _health), ("RESTARTS", _restarts)]
"""Shown if there is something to show."""


def docker_filter(text: str) -> str:
    """A filter of Docker's ``ps`` as one by the fields of an instance; any other unchanged. Pure."""
    key, equals, value = text.partition("=")
    match key:
        case "status":
            states = {"exited": "Stopped", "dead": "Unknown", **{state.lower(): state for state in STATES}}
            return f"state={states.get(value.lower(), value)}"
        case "label":
            name, _, wanted = value.partition("=")
            return f"tags.{name}={wanted or '*'}"
        case "name" if value and not {"*", "?"} & set(value):
            return f"name=*{value}*"
        case "ancestor":
            return f"image={value if ':' in value or '*' in value else f'*{value}:*'}"
    return f"{key}{equals}{value}"


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Include instances that are not running.")
@click.option("-q", "--quiet", is_flag=True, help="Only ids.")
@click.option("--state", type=click.Choice(STATES), help="Only those in this state.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", help="Only those with this tag; repeatable.")
@click.option("--no-trunc", "whole", is_flag=True, help="Ids in full.")
@click.option("-n", "--last", type=click.IntRange(1), help="Only so many, those created last, in any state.")
@click.option("-l", "--latest", is_flag=True, help="Only the one created last, in any state.")
@reports
@templated("instance_row")
def ps(
    session: Session,
    everything: bool,
    quiet: bool,
    state: str | None,
    tags: tuple[str, ...],
    whole: bool,
    last: int | None,
    latest: bool,
) -> None:
    """List instances."""
    last = 1 if latest else last
    session.fields = "whole_instance_row" if whole else session.fields
    session.filters = [docker_filter(text) for text in session.filters]
    found = session.client.get("/instances", state=state, tags=pairs(tags))
    if last is not None:
        found = sorted(found, key=lambda row: str(row["created_at"]), reverse=True)[:last]
    rows = found
    by_state = any(text.startswith("state=") for text in session.filters)
    if not everything and state is None and not by_state and last is None:
        rows = [row for row in found if row["state"] in ("Running", "Initializing")]
    columns = [
        ("ID", lambda row: row["id"] if whole else row["id"][:12]),
        ("NAME", lambda row: row["name"]),
        ("IMAGE", lambda row: row["image"]),
        ("STATE", lambda row: row["state"]),
        *(column for column in _POLICY_COLUMNS if any(column[1](row) for row in rows)),
        ("IP", lambda row: (row.get("network") or {}).get("ip")),
        ("VCPUS", lambda row: row.get("vcpus")),
        ("MEMORY", lambda row: row.get("size")),
        ("AGE", lambda row: age(row["created_at"])),
        *([("PORTS", _ports)] if any(row.get("ports") for row in rows) else []),
    ]
    session.show_list(rows, columns, quiet="id" if quiet else None)
    hidden = len(found) - len(rows)
    if hidden and session.form == "auto" and session.template is None and not quiet:
        click.echo(f"{hidden} more that {'is' if hidden == 1 else 'are'} not running: hypeman ps --all", err=True)


@click.command()
@click.argument("instances", nargs=-1, required=True, shell_complete=complete_instance)
@click.option("--show-env", is_flag=True, help="Show the values of the environment.")
@format_option
@reports
@templated("anything")
def inspect(session: Session, instances: tuple[str, ...], show_env: bool) -> None:
    """Show everything about an instance, image or volume, or a list of several.

    One that is missing does not hide the others.
    """
    found = []

    def look(name: str) -> None:
        one = _found(session.client, name)
        if not show_env and one.get("env"):
            one["env"] = dict.fromkeys(one["env"], _HIDDEN)
        found.append(one)

    try:
        session.each(instances, look)
    finally:
        if found:
            session.show(found if len(instances) > 1 else found[0])


def _found(client: Client, name: str) -> Any:
    """The instance with that name, or else the image, or else the volume."""
    try:
        return client.get(path_of(name))
    except ApiError as error:
        if error.status != 404:
            raise
        missing = error
    for kind in ("images", "volumes"):
        try:
            return client.get(f"/{kind}/{segment(name)}")
        except ApiError as error:
            if error.status not in (400, 404):  # 400: not a name that an image or volume can have
                raise
    raise missing


class Lines(ParamType):
    """How many lines of a log: a number, or Docker's ``all``."""

    name = "integer|all"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        text = str(value)
        if text == "all":
            return ALL_LINES
        if not text.isascii() or not text.isdigit():
            self.fail(f"{text!r} is neither a number of lines nor all", parameter, context)
        return int(text)


@click.command()
@instance_argument
@click.option("-f", "--follow", is_flag=True, help="Continue with new lines.")
@click.option("-n", "--tail", type=Lines(), default=100, show_default=True, help="Lines from before, or all.")
@click.option("-s", "--source", type=click.Choice(["app", "vmm", "hypeman"]), default="app", show_default=True)
@click.option("-t", "--timestamps", is_flag=True, help="Begin each line with when it was written, to about a second.")
@click.option("--since", default="", metavar="TIME", help="Only lines since then: 10m, or an RFC 3339 time.")
@click.option("-p", "--previous", is_flag=True, help="The output of the run before the last boot.")
@reports
def logs(session: Session, instance: str, follow: bool, timestamps: bool, previous: bool, **query: Any) -> None:
    """Show what an instance printed."""
    client, path = session.client, f"{path_of(instance)}/logs"
    query |= present(times=timestamps, run="previous" if previous else None)
    source = query["source"]
    lines = client.followed_lines if follow and not previous else client.lines
    for line, ends in lines(path, **query):
        # Workload output is data, as with exec. The other logs are hypeman's and quote untrusted text.
        write_log(line if source == "app" else one_line(line.decode(errors="replace")).encode(), ends)


@click.command()
@click.argument("instances", nargs=-1, required=True, shell_complete=complete_instance)
@click.option("--entrypoint", multiple=True, help="Instead of the last one; one word each.")
@click.option("--cmd", multiple=True, help="Instead of the last one; one word each.")
@reports
def start(session: Session, instances: tuple[str, ...], entrypoint: tuple[str, ...], cmd: tuple[str, ...]) -> None:
    """Boot stopped instances."""
    body = present(entrypoint=entrypoint, cmd=cmd)
    session.each(instances, lambda name: show_instance(session, session.client.post(f"{path_of(name)}/start", body)))


@click.command()
@click.argument("instances", nargs=-1, required=True, shell_complete=complete_instance)
@click.option("-t", "--time", "grace", type=click.IntRange(0), help="Seconds until it is killed. Default: 10.")
@reports
def stop(session: Session, instances: tuple[str, ...], grace: int | None) -> None:
    """Shut instances down."""

    def one(name: str) -> None:
        show_instance(session, session.client.post(f"{path_of(name)}/stop", grace_body(grace)))

    session.each(instances, one)


@click.command()
@instance_argument
@compression_options()
@reports
def standby(session: Session, instance: str, **flags: Any) -> None:
    """Save memory to disk and free everything else."""
    body = present(compression=compression_body(flags), compression_delay=flags["compression_delay"])
    show_instance(session, session.client.post(f"{path_of(instance)}/standby", body))


@click.command()
@instance_argument
@reports
def restore(session: Session, instance: str) -> None:
    """Bring an instance back from standby."""
    show_instance(session, session.client.post(f"{path_of(instance)}/restore"))


@click.command()
@click.argument("source", shell_complete=complete_instance)
@click.argument("name")
@click.option("--from-running", is_flag=True, help="Allow a running source; it pauses for the capture.")
@click.option("--target-state", type=click.Choice(TARGETS), help="Default: the state of the source.")
@reports
def fork(session: Session, source: str, name: str, from_running: bool, target_state: str | None) -> None:
    """Create an instance NAME from the state of SOURCE."""
    body = present(name=name, from_running=from_running, target_state=target_state)
    made = session.client.post(f"{path_of(source)}/fork", body)
    session.show(made, lambda: str(made["id"]))


@click.command()
@click.argument("instances", nargs=-1, required=True, shell_complete=complete_instance)
@click.option("--state", type=click.Choice(STATES), help="Default: until its program has ended.")
@click.option("--timeout", default="60s", show_default=True, help="With --state; as in 90s or 2m, at most 5m.")
@reports
def wait(session: Session, instances: tuple[str, ...], state: str | None, timeout: str) -> None:
    """Wait until instances have ended, and print their exit codes, or until they are in a state.

    The exit code is 1 if one does not reach the state.
    """
    if state is None:
        with interrupted("the instances continue"):
            session.each(instances, lambda name: _wait_for_end(session, name))
        return
    query = {"state": state, "timeout": timeout}

    def one(name: str) -> None:
        found = session.client.call("GET", f"{path_of(name)}/wait", query=query, timeout=330)
        session.show(found, lambda: str(found["state"]))
        if found["state"] != state:
            why = "the time is over" if found["timed_out"] else found.get("state_error") or "it ended there"
            fail(f"{name} is {found['state']}, not {state}: {why}")

    session.each(instances, one)


def _wait_for_end(session: Session, name: str) -> None:
    """As `docker wait`; standby is no end."""
    query = {"state": "Stopped", "timeout": _WAIT}
    while True:
        found = session.client.call("GET", f"{path_of(name)}/wait", query=query, timeout=330)
        if found["state"] == "Stopped":
            break
        if not found["timed_out"] and found["state"] == "Unknown":
            fail(f"{name} is {found['state']}: {found.get('state_error') or 'the server does not know its VM'}")
        if not found["timed_out"]:
            time.sleep(_LOOK_SECONDS)
    row = session.client.get(path_of(name))
    session.show(row, lambda: str(row.get("exit_code", "-")))


@click.command()
@click.argument("instances", nargs=-1, shell_complete=complete_instance)
@click.option("-f", "--force", is_flag=True, help="Delete running instances too.")
@click.option("--all", "everything", is_flag=True, help="All instances.")
@reports
def rm(session: Session, instances: tuple[str, ...], force: bool, everything: bool) -> None:
    """Delete instances."""
    if everything == bool(instances):
        raise click.UsageError("name instances, or say --all")
    client = session.client

    def one(row: dict[str, Any]) -> None:
        if row["state"] in ("Running", "Initializing", "Paused") and not force:
            fail(f"{row['name']} is {row['state']}", "stop it first, or say --force")
        try:
            client.call("DELETE", path_of(row["id"]))
        except ApiError as error:
            if error.status != 404:  # already deleted
                raise
        else:
            click.echo(row["name"])

    if everything:
        session.each(client.get("/instances"), one)
    else:
        session.each(instances, lambda name: one(client.get(path_of(name))))


@click.command()
@click.argument("instances", nargs=-1, shell_complete=complete_instance)
@click.option("--once", "--no-stream", "once", is_flag=True, help="Print once, even on a terminal.")
@click.option("--interval", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds.")
@reports
def stats(session: Session, instances: tuple[str, ...], once: bool, interval: float) -> None:
    """Show what instances, by default all that have a VM, use; live on a terminal."""
    live = session.form == "auto" and sys.stdout.isatty() and not once
    before: dict[str, tuple[float, float]] = {}
    try:
        while True:
            now = time.monotonic()
            rows = _usage(session.client, instances)
            for row in rows:
                then = before.get(row["instance_id"])
                row["cpu_percent"] = _percent(then, now, row["cpu_seconds"])
                before[row["instance_id"]] = (now, row["cpu_seconds"])
            if not live:
                for row in rows:
                    del row["cpu_percent"]
                wanted: Any = rows[0] if len(instances) == 1 else rows
                session.show(wanted, lambda: render_table(rows, _STATS_COLUMNS))  # noqa: B023 shown at once
                return
            click.echo("\x1b[H\x1b[J" + render_table(rows, _LIVE_COLUMNS, colour=use_colour()))
            time.sleep(interval)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _usage(client: Client, instances: Sequence[str]) -> list[dict[str, Any]]:
    if instances:
        return [client.get(f"{path_of(instance)}/stats") for instance in instances]
    rows: list[dict[str, Any]] = client.get("/stats")["instances"]
    return rows


def _percent(then: tuple[float, float] | None, now: float, cpu_seconds: float) -> str:
    """Percentage of one CPU since the last sample; none for the first one."""
    if then is None or now <= then[0]:
        return "-"
    return f"{100 * (cpu_seconds - then[1]) / (now - then[0]):.0f}%"


_STATS_COLUMNS = [
    ("NAME", lambda row: row["instance_name"]),
    ("VCPUS", lambda row: row["allocated_vcpus"]),
    ("CPU TIME", lambda row: f"{row['cpu_seconds']:.1f}s"),
    ("MEMORY", lambda row: f"{size(row['memory_rss_bytes'])} / {size(row['allocated_memory_bytes'])}"),
    ("NET IN", lambda row: size(row["network_rx_bytes"])),
    ("NET OUT", lambda row: size(row["network_tx_bytes"])),
]
_LIVE_COLUMNS = [_STATS_COLUMNS[0], ("CPU", lambda row: row["cpu_percent"]), *_STATS_COLUMNS[1:]]


@click.group("auto-standby")
def auto_standby() -> None:
    """Instances that enter standby when idle."""


@auto_standby.command("status")
@instance_argument
@reports
def auto_standby_status(session: Session, instance: str) -> None:
    """Show whether an instance is about to enter standby, and why or why not."""
    session.show(session.client.get(f"{path_of(instance)}/auto-standby/status"))


@auto_standby.command("hold")
@instance_argument
@reports
def auto_standby_hold(session: Session, instance: str) -> None:
    """Keep an instance running for one idle timeout from now."""
    shown = session.client.post(f"{path_of(instance)}/auto-standby/hold")
    session.show(shown, lambda: f"held, {until(shown['hold_until'])}" if shown.get("hold_until") else shown["reason"])


@click.group()
def update() -> None:
    """Change settings of an instance without a reboot."""


@update.command("auto-standby")
@instance_argument
@click.option("--enabled/--disabled", default=None)
@click.option("--idle-timeout", help="As in 5m.")
@click.option("--ignore-destination-port", "ports", type=int, multiple=True)
@click.option("--ignore-source-cidr", "cidrs", multiple=True)
@click.option("--wake", type=click.Choice(WAKES), help="What ends its standby: packets, or API requests as well.")
@click.option("--count-udp/--no-count-udp", default=None, help="Whether UDP keeps it running as TCP connections do.")
@reports
def update_auto_standby(
    session: Session,
    instance: str,
    enabled: bool | None,
    idle_timeout: str | None,
    ports: tuple[int, ...],
    cidrs: tuple[str, ...],
    wake: str | None,
    count_udp: bool | None,
) -> None:
    """Set when an instance enters standby on its own, and what wakes it."""
    policy = present(
        enabled=enabled,
        idle_timeout=idle_timeout,
        ignore_destination_ports=ports,
        ignore_source_cidrs=cidrs,
        wake=wake,
        count_udp=count_udp,
    )
    patch(session, instance, {"auto_standby": policy})


@update.command("egress-credentials")
@instance_argument
@click.option("-e", "--env", multiple=True, metavar="KEY", help="Take the new value from this variable; repeatable.")
@click.option("--env-file", type=click.File(), metavar="FILE", help="New values as lines of KEY=VALUE; - is stdin.")
@reports
def update_egress_credentials(session: Session, instance: str, env: tuple[str, ...], env_file: TextIO | None) -> None:
    """Rotate secrets; takes effect at once.

    Values come from the caller's environment (--env KEY) or from a file (--env-file), since every user of this host
    can read the arguments of a program. --env KEY=VALUE works as well, with a warning.
    """
    values = secrets_in_file(env_file) if env_file is not None else {}
    for word in env:
        key, equals, value = word.partition("=")
        if equals:
            warn(f"every user of this host could read the value of {key}; use --env {key} or --env-file")
        elif (value := os.environ.get(key, "")) == "":
            raise click.UsageError(f"--env {key}: there is no such variable in the environment")
        if not key:
            raise click.UsageError("--env: the name is missing")
        values[key] = value
    if not values:
        raise click.UsageError("say what to change with --env KEY or --env-file FILE")
    patch(session, instance, {"env": values})


@update.command("egress-rules")
@instance_argument
@click.argument("file", type=click.File())
@reports
def update_egress_rules(session: Session, instance: str, file: TextIO) -> None:
    """Set where an instance may go, from a JSON file; in force from the next request.

    FILE (- is stdin) has any of rules, default, observe and private_networks, as network.egress in the API; what is
    left out stays. See egress learn and egress check.
    """
    patch(session, instance, {"network": {"egress": read_egress_rules(file)}})


def read_egress_rules(file: TextIO) -> dict[str, Any]:
    """Raises UsageError unless the file is a JSON object."""
    import json

    try:
        found = json.load(file)
    except ValueError as error:
        raise click.UsageError(f"{file.name} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise click.UsageError(f"{file.name} must have an object with rules, default, observe or private_networks")
    return found


def secrets_in_file(file: TextIO) -> dict[str, str]:
    """Lines of KEY=VALUE; empty ones and comments (#) are skipped. Raises UsageError naming the line, not its text."""
    values = {}
    for number, line in enumerate(file, 1):
        line = line.removesuffix("\n").removesuffix("\r")
        key, equals, value = line.partition("=")
        if not line.strip() or line.startswith("#"):
            continue
        if not equals or not key or key != key.strip():
            raise click.UsageError(f"--env-file: line {number} is not KEY=VALUE")
        values[key] = value
    return values


@update.command("health-check")
@instance_argument
@health_options("")
@reports
def update_health_check(session: Session, instance: str, **flags: Any) -> None:
    """Set how to check whether the workload is healthy."""
    patch(session, instance, {"health_check": health_body(flags) or {}})


@update.command("restart-policy")
@instance_argument
@restart_options("")
@reports
def update_restart_policy(session: Session, instance: str, **flags: Any) -> None:
    """Set what to do when the workload has ended."""
    patch(session, instance, {"restart_policy": restart_body(flags) or {}})


def patch(session: Session, instance: str, body: dict[str, Any]) -> None:
    show_instance(session, session.client.call("PATCH", path_of(instance), body))
