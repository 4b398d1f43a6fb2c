"""``run``: pulls the image if needed, creates the instance and shows progress."""

from __future__ import annotations

import contextlib
import math
import string
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

import click
import msgspec

from hypeman.cli.client import ApiError, Client, Unreachable
from hypeman.cli.complete import complete_image
from hypeman.cli.images import PullDisplay, image_path, wait_ready
from hypeman.cli.instances import ALL_LINES, HYPERVISOR_HELP, HYPERVISORS, WAKES, path_of, read_egress_rules
from hypeman.cli.logins import sent_login
from hypeman.cli.output import plain
from hypeman.cli.policies import (
    compression_body,
    compression_options,
    docker_restart,
    health_body,
    health_options,
    restart_body,
    restart_options,
)
from hypeman.cli.ports import parse_port, ports_option
from hypeman.cli.program import ProgramEnded, RunCommand
from hypeman.cli.session import (
    SIZE,
    ParamType,
    Session,
    environment,
    fail,
    interrupted,
    pairs,
    present,
    reports,
    write_log,
)
from hypeman.cli.volumes import DEFAULT_GB
from hypeman.text import one_line
from hypeman.urls import segment

_INTERRUPTED = 130
_BOOTING = ("Created", "Initializing")
_ENDED = ("Stopped", "Standby", "Unknown")
_POLL_SECONDS = 0.3
_WATCH_SECONDS = 120.0
_UNTIL_ATTACHED = "10m"
"""How long an instance that is to be deleted waits for its program, whose client may have been killed meanwhile."""
_PRINTING = threading.Lock()
_MOST_CPUS = 10_000
_NAME_CHARACTERS = string.ascii_lowercase + string.digits


_PLAIN = frozenset(["--privileged", "--read-only", "--publish-all", "-P", "--oom-kill-disable", "--no-healthcheck"])
"""Refused options without a value."""


class Cpus(ParamType):
    """A number of processors. Docker takes fractions; a VM has whole ones."""

    name = "number"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number <= _MOST_CPUS:
            self.fail(f"{value!r} is not a number of CPUs above 0", parameter, context)
        return math.ceil(number)


def refused(*flags: str, instead: str) -> Callable[[Any], Any]:
    """Hidden options of Docker that are refused by design; the refusal names the alternative."""

    def refuse(_context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value:
            raise click.UsageError(f"{parameter.opts[0]} is not supported: {instead}")

    def decorate(command: Any) -> Any:
        for flag in flags:
            is_flag = flag in _PLAIN
            option = click.option(
                flag, is_flag=is_flag, hidden=True, expose_value=False, callback=refuse, multiple=not is_flag
            )
            command = option(command)
        return command

    return decorate


@click.command(cls=RunCommand)
@click.argument("image", shell_complete=complete_image)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--name", help="Default: the image's name and four random characters.")
@click.option("-d", "--detach", is_flag=True, help="Print the id and do not wait for the boot.")
@click.option("-i", "--interactive", is_flag=True, help="Run the program here with standard input; then stop the VM.")
@click.option("-t", "--tty", is_flag=True, help="Like -i, with a terminal.")
@click.option(
    "--rm", "remove", is_flag=True, help="Delete the VM when the program has ended; without -d, show its output."
)
@click.option("-e", "--env", multiple=True, metavar="KEY[=VALUE]", help="Without a value: taken from this shell.")
@click.option("--env-file", "env_files", type=click.File(), multiple=True, metavar="FILE", help="Lines of KEY=VALUE.")
@click.option("-u", "--user", help="Instead of the image's: a name or number, and a group after a colon.")
@click.option("-w", "--workdir", help="Instead of the image's.")
@click.option("-h", "--hostname", help="Default: the instance's name.")
@click.option("--ulimit", "ulimits", multiple=True, metavar="NAME=SOFT[:HARD]", help="Limit of programs; repeatable.")
@click.option("--sysctl", "sysctls", multiple=True, metavar="NAME=VALUE", help="Setting of the kernel; repeatable.")
@click.option("--shm-size", type=SIZE, help="Size of /dev/shm. Default: half of the memory.")
@click.option("--pid1/--no-pid1", default=None, help="Run the program as process 1. Default: only init systems.")
@click.option("--credentials-json", help="Credentials in the API's format; @FILE reads a file.")
@click.option("--platform", help="As in linux/arm64.")
@click.option("-m", "--memory", type=SIZE, default="1GB", show_default=True)
@click.option("--cpus", type=Cpus(), default=2, show_default=True, help="Whole ones; a fraction is rounded up.")
@click.option(
    "--pull", type=click.Choice(["missing", "always", "never"]), default="missing", show_default=True, help="The image."
)
@click.option("--overlay-size", type=SIZE, default="10GB", show_default=True, help="Writable layer over the image.")
@click.option("--hotplug-size", type=SIZE, help="Memory that may be plugged later.")
@click.option("--network/--no-network", default=True, show_default=True)
@click.option(
    "--network-group",
    "network_groups",
    multiple=True,
    metavar="NAME",
    help="Reach only guests that share a group with it; repeatable.",
)
@click.option("--network-egress-enabled", is_flag=True, help="Mediate outbound connections.")
@click.option("--network-egress-mode", type=click.Choice(["all", "http_https_only"]))
@click.option("--network-egress-rules", type=click.File(), help="JSON file: where the instance may go.")
@click.option("--bandwidth-down", help="As in 100mbps.")
@click.option("--bandwidth-up", help="As in 100mbps.")
@click.option("--disk-io", help="As in 100MB/s.")
@click.option("--gpu-profile")
@click.option("--device", "devices", multiple=True, help="Registered device, by id or name; repeatable.")
@click.option("--hypervisor", help=HYPERVISOR_HELP)
@click.option("--auto-standby-enabled/--auto-standby-disabled", default=None)
@click.option("--auto-standby-idle-timeout")
@click.option("--auto-standby-ignore-destination-port", type=int, multiple=True)
@click.option("--auto-standby-ignore-source-cidr", multiple=True)
@click.option("--auto-standby-wake", type=click.Choice(WAKES))
@click.option("--auto-standby-count-udp/--no-auto-standby-count-udp", default=None)
@click.option("--skip-guest-agent", is_flag=True, help="No exec, cp or stat.")
@click.option("--skip-kernel-headers", is_flag=True)
@compression_options("snapshot-")
@click.option("--entrypoint", multiple=True, help="Instead of the image's; one word each.")
@click.option("--cmd", multiple=True, help="Instead of the image's; one word each.")
@click.option("-l", "--tag", "--label", "--metadata", "tags", multiple=True, metavar="KEY=VALUE")
@click.option(
    "-v",
    "--volume",
    "volumes",
    multiple=True,
    metavar="NAME:/PATH[:ro[:overlay=SIZE]]",
    help="Made if it does not exist.",
)
@ports_option
@click.option("--ttl", help="Delete it after this time, as in 2h.")
@health_options("health-")
@restart_options("restart-")
@click.option("--restart", metavar="no|always|unless-stopped|on-failure[:N]", help="Docker's form of --restart-policy.")
@refused(
    "--privileged",
    "--cap-add",
    "--cap-drop",
    "--security-opt",
    instead="a VM has a kernel of its own: root in it has every capability there and none on the host",
)
@refused(
    "--net",
    "--network-alias",
    "--link",
    "--add-host",
    instead="each instance has its own network; see --network, "
    "and network.guest_to_guest in the server's configuration",
)
@refused("--mount", "--tmpfs", "--volumes-from", instead="use -v VOLUME:/PATH with a volume of `hypeman volume create`")
@refused("--gpus", instead="use --device or --gpu-profile; `hypeman device available` lists devices")
@refused("--dns", "--dns-search", "--dns-option", instead="guests look names up at the host; see network.dns_server")
@refused("--publish-all", "-P", instead="name the ports: -p GUEST_PORT publishes one at a free port of the host")
@refused("--read-only", instead="the writable layer is the instance's own and goes with it")
@refused(
    "--memory-swap", "--memory-reservation", "--oom-kill-disable", instead="-m is the VM's memory; guests have no swap"
)
@refused("--cpu-shares", "--cpuset-cpus", "--cpu-quota", "--cpu-period", instead="--cpus says how many CPUs the VM has")
@refused("--pids-limit", instead="use --ulimit nproc=N")
@refused("--stop-signal", "--stop-timeout", instead="the image's STOPSIGNAL is sent; `hypeman stop -t SECONDS` waits")
@refused("--health-cmd", "--no-healthcheck", instead="see --health-type, --health-exec and the other --health-… flags")
@refused("--log-driver", "--log-opt", instead="`hypeman logs` has the output; sizes are logs.… in the configuration")
@refused("--group-add", instead="-u USER:GROUP names a group")
@refused("--runtime", "--userns", "--cgroup-parent", instead="every instance is a VM of its own")
@refused("--pid", "--ipc", "--uts", "--cgroupns", instead="a VM shares no namespace with the host")
@reports
def run(session: Session, image: str, command: tuple[str, ...], **flags: Any) -> None:
    """Create an instance from IMAGE and boot it; prints its id.

    COMMAND replaces the arguments of the image's program. With -it the program runs in this terminal, and Ctrl-P Ctrl-Q
    leaves it running (`hypeman attach` comes back); with --rm its output is shown and its exit code returned.
    """
    if command:
        if flags["cmd"]:
            raise click.UsageError("give either --cmd or COMMAND")
        flags["cmd"] = command[1:] if command[0] == "--" else command
    pull = flags.pop("pull")
    attached = flags["interactive"] or flags["tty"]
    if flags["remove"] and flags["restart"] not in (None, "no"):
        raise click.UsageError("--restart and --rm exclude each other")
    if flags["detach"] and attached:
        raise click.UsageError("-d excludes -i and -t")
    body = create_body(image, flags)
    if pull != "never":
        ensure_image(session.client, image, flags["platform"], always=pull == "always")
    else:
        session.client.get(image_path(image))
    if attached:
        raise ProgramEnded(run_attached(session, body, tty=flags["tty"], remove=flags["remove"]))
    ensure_volumes(session.client, body)
    made = session.client.post("/instances", body)
    if flags["remove"] and not flags["detach"]:
        raise ProgramEnded(run_to_end(session, made))
    session.show(made, lambda: str(made["id"]))
    # interactive; a script that only needs the id does not wait
    if sys.stdout.isatty() and sys.stderr.isatty() and not flags["detach"]:
        with interrupted(f"{made['name']} continues to boot: hypeman logs -f {made['name']}"):
            watch_boot(session.client, made)


def run_attached(session: Session, body: dict[str, Any], *, tty: bool, remove: bool) -> int:
    """Boot without starting the image's program, then run it here; returns its exit code. The VM ends with it."""
    from hypeman.cli.execute import Left, interrupted_by_signals, run_program

    client = session.client
    image = client.get(image_path(body["image"]))
    is_guarded = remove and "ttl" not in body
    if is_guarded:
        body = {"ttl": _UNTIL_ATTACHED, **body}
    ensure_volumes(client, body)
    made = client.post("/instances", {**body, "idle": True})
    name, path = made["name"], path_of(made["id"])
    program = [
        *(body.get("entrypoint") or image.get("entrypoint") or ()),
        *(body.get("cmd") or (() if body.get("entrypoint") else image.get("cmd")) or ()),
    ]
    is_left = False
    try:
        with interrupted_by_signals():
            query = {"state": "Running", "timeout": f"{_WATCH_SECONDS:.0f}s"}
            booted = client.call("GET", f"{path}/wait", query=query, timeout=_WATCH_SECONDS + 10)
            if booted["state"] != "Running":
                fail(booted.get("state_error") or f"{name} is {booted['state']}", f"hypeman logs --source vmm {name}")
            if is_guarded:
                client.call("PATCH", path, {"ttl": "0s"})
        return run_program(session, name, tuple(program), tty=tty, wait_for_agent=int(_WATCH_SECONDS), main=True)
    except Left:
        is_left = True
        click.echo(f"\r\n{name} continues: hypeman attach {name}", err=True)
        return 0
    finally:
        if not is_left:
            _end(client, path, remove=remove)


def _end(client: Client, path: str, *, remove: bool) -> None:
    """Delete or stop an instance, which the server may have done already."""
    try:
        client.call("DELETE", path) if remove else client.post(f"{path}/stop")
    except ApiError as error:
        if error.status not in (404, 409):
            raise


def run_to_end(session: Session, made: dict[str, Any]) -> int:
    """Show the output of an instance until it ends, delete it, and return its exit code."""
    from hypeman.cli.execute import interrupted_by_signals

    client, path = session.client, path_of(made["id"])
    output = _Output(Client(client.settings), f"{path}/logs")
    try:
        with interrupted_by_signals():
            output.start()
            ended = client.get(path)
            while ended["state"] not in _ENDED:
                time.sleep(_POLL_SECONDS)
                ended = client.get(path)
            output.finish(client)
    except KeyboardInterrupt:
        _end(client, path, remove=True)
        return _INTERRUPTED
    _end(client, path, remove=True)
    if ended.get("exit_code") is None:
        fail(ended.get("exit_message") or ended.get("state_error") or f"{made['name']} ended without an exit code")
    return int(ended["exit_code"]) & 0xFF


class _Output(threading.Thread):
    """Prints an instance's output as it comes. A followed log has no end, so the caller says when it is over."""

    def __init__(self, client: Client, path: str) -> None:
        super().__init__(name="output", daemon=True)
        self._client = client
        self._path = path
        self._printed = 0
        self._over = False

    def run(self) -> None:
        with contextlib.suppress(Unreachable, ApiError):
            for line in self._client.lines(self._path, follow=True, tail=ALL_LINES, source="app"):
                with _PRINTING:
                    if self._over:
                        return
                    self._print(line)

    def finish(self, client: Client) -> None:
        """Print what the stream had not delivered yet; nothing is printed afterwards."""
        lines = list(client.lines(self._path, follow=False, tail=ALL_LINES, source="app"))
        with _PRINTING:
            self._over = True
            for line in lines[self._printed :]:
                self._print(line)

    def _print(self, line: tuple[bytes, bool]) -> None:
        write_log(*line)
        self._printed += 1


def create_body(image: str, flags: dict[str, Any]) -> dict[str, Any]:
    """CreateInstanceRequest from the flags. Pure except for the random name."""
    network = present(
        enabled=flags["network"],
        bandwidth_download=flags["bandwidth_down"],
        bandwidth_upload=flags["bandwidth_up"],
    )
    if flags["network_groups"]:
        network["groups"] = flags["network_groups"]
    if flags["network_egress_enabled"] or flags["network_egress_mode"]:
        network["egress"] = {"enabled": True}
        if flags["network_egress_mode"]:
            network["egress"]["enforcement"] = {"mode": flags["network_egress_mode"]}
    if flags["network_egress_rules"]:
        network["egress"] = {
            **network.get("egress", {"enabled": True}),
            **read_egress_rules(flags["network_egress_rules"]),
        }
    policy = present(compression=compression_body(flags), standby_compression_delay=flags["compression_delay"])
    auto_standby = present(
        enabled=flags["auto_standby_enabled"],
        idle_timeout=flags["auto_standby_idle_timeout"],
        ignore_destination_ports=flags["auto_standby_ignore_destination_port"],
        ignore_source_cidrs=flags["auto_standby_ignore_source_cidr"],
        wake=flags["auto_standby_wake"],
        count_udp=flags["auto_standby_count_udp"],
    )
    return present(
        name=flags["name"] or random_name(image),
        image=image,
        platform=flags["platform"],
        size=flags["memory"],
        vcpus=flags["cpus"],
        overlay_size=flags["overlay_size"],
        hotplug_size=flags["hotplug_size"],
        disk_io_bps=flags["disk_io"],
        env={
            **{name: value for file in flags["env_files"] for name, value in variables_in(file).items()},
            **environment(flags["env"]),
        },
        user=flags["user"],
        working_dir=flags["workdir"],
        hostname=flags["hostname"],
        credentials=_credentials(flags["credentials_json"]),
        tags={**guest_tags(flags), **pairs(flags["tags"])},
        ttl=flags["ttl"],
        auto_remove=flags["remove"] or None,
        network=network,
        devices=flags["devices"],
        gpu=present(profile=flags["gpu_profile"]),
        volumes=[parse_mount(text) for text in flags["volumes"]],
        ports=[parse_port(text) for text in flags["ports"]],
        hypervisor=HYPERVISORS.get(flags["hypervisor"], flags["hypervisor"]),
        snapshot_policy=policy,
        auto_standby=auto_standby,
        health_check=health_body(flags),
        restart_policy=docker_restart(flags["restart"]) or restart_body(flags),
        skip_guest_agent=flags["skip_guest_agent"] or None,
        skip_kernel_headers=flags["skip_kernel_headers"] or None,
        entrypoint=flags["entrypoint"],
        cmd=flags["cmd"],
    )


def guest_tags(flags: dict[str, Any]) -> dict[str, str]:
    """The tags that say how the guest is set up. Raises UsageError. Pure."""
    one = present(**{"hypeman.shm-size": flags["shm_size"]})
    if flags["pid1"] is not None:
        one["hypeman.pid1"] = "true" if flags["pid1"] else "false"
    return {
        **one,
        **{f"hypeman.ulimit.{name}": value for name, value in pairs(flags["ulimits"], "--ulimit").items()},
        **{f"hypeman.sysctl.{name}": value for name, value in pairs(flags["sysctls"], "--sysctl").items()},
    }


def variables_in(file: TextIO) -> dict[str, str]:
    """Docker's env files: KEY=VALUE, or KEY for the caller's value; empty lines and comments (#) are skipped, and a
    byte order mark, and white space before a name. Raises UsageError for white space in a name, and for what is not
    UTF-8."""
    try:
        lines = [line.strip("\r\n").removeprefix("\ufeff").lstrip() for line in file]
    except UnicodeError:
        raise click.UsageError(f"--env-file {getattr(file, 'name', '')}: not text in UTF-8") from None
    found = [line for line in lines if line and not line.startswith("#")]
    for line in found:
        name = line.partition("=")[0]
        if any(character.isspace() for character in name):
            raise click.UsageError(f"--env-file {getattr(file, 'name', '')}: white space in the name {name!r}")
    return environment(found)


def random_name(image: str) -> str:
    """``nginx-x7k2`` for ``docker.io/library/nginx:1.25``; always a legal name."""
    import secrets  # loads OpenSSL

    base = image.partition("@")[0].rpartition("/")[2].partition(":")[0].lower()
    legal = "".join(c if c in _NAME_CHARACTERS else "-" for c in base).strip("-")[:50].rstrip("-")
    return f"{legal or 'vm'}-{''.join(secrets.choice(_NAME_CHARACTERS) for _ in range(4))}"


def parse_mount(text: str) -> dict[str, Any]:
    """``id:/path[:ro[:overlay=SIZE]]`` as a VolumeMount."""
    volume, _, rest = text.partition(":")
    if volume.startswith(("/", ".", "~")):
        raise click.BadParameter(
            f"{text!r}: directories of the host are not shared with a VM; make a volume (hypeman volume create "
            "--name NAME --size 1GB, --from-archive fills it), or copy with hypeman cp",
            param_hint="-v",
        )
    path, *options = rest.split(":")
    mount: dict[str, Any] = {"volume_id": volume, "mount_path": path}
    for option in options:
        if option == "ro":
            mount["readonly"] = True
        elif option.startswith("overlay="):
            mount |= {"overlay": True, "overlay_size": option.removeprefix("overlay=")}
        elif option != "rw":
            raise click.BadParameter(f"{option!r} in {text!r} is none of ro, rw, overlay=SIZE")
    if not volume or not path.startswith("/"):
        raise click.BadParameter(f"{text!r} must read NAME:/PATH[:ro[:overlay=SIZE]]")
    return mount


def ensure_image(client: Client, image: str, platform: str | None, *, always: bool = False) -> None:
    """Pull the image if it is missing, or ``always``, and wait until it is ready."""

    def begin() -> Any:
        return client.post("/images", present(name=image, platform=platform, credentials=sent_login(image)))

    try:
        found = client.get(image_path(image))
    except ApiError as error:
        if error.status != 404:
            raise
        found, always = begin(), False
    if always or found["status"] == "failed":
        found = begin()
    if found["status"] != "ready":
        wait_ready(client, found["name"], PullDisplay.for_terminal(found["name"]))


def ensure_volumes(client: Client, body: dict[str, Any]) -> None:
    """Make the volumes that ``body`` mounts and that do not exist, as Docker does, and say so."""
    for mount in body.get("volumes") or ():
        name = mount["volume_id"]
        try:
            client.get(f"/volumes/{segment(name)}")
        except ApiError as error:
            if error.status != 404:
                raise
            client.post("/volumes", {"name": name, "size_gb": DEFAULT_GB})
            click.echo(f"made the volume {one_line(name)}, {DEFAULT_GB}GB", err=True)


def _credentials(text: str | None) -> Any:
    if not text:
        return None
    try:
        if text.startswith("@"):
            with open(text[1:], "rb") as file:
                return msgspec.json.decode(file.read())
        return msgspec.json.decode(text)
    except OSError as error:
        fail(f"--credentials-json {text}: {error.strerror}")
    except msgspec.DecodeError as error:
        fail(f"--credentials-json: {error}")


def watch_boot(client: Client, instance: dict[str, Any]) -> None:
    """A progress line on stderr while an instance boots. Interrupting it does not stop the boot."""
    sys.stdout.flush()
    deadline = time.monotonic() + _WATCH_SECONDS
    while instance["state"] in _BOOTING and time.monotonic() < deadline:
        sys.stderr.write(f"\r\x1b[K{boot_line(instance)}")
        sys.stderr.flush()
        time.sleep(_POLL_SECONDS)
        try:
            instance = client.get(path_of(instance["id"]))
        except ApiError:
            return  # deleted meanwhile
    sys.stderr.write(f"\r\x1b[K{boot_line(instance)}\n")


def boot_line(instance: dict[str, Any]) -> str:
    """``web is Running (created 512 ms, initializing 240 ms)``, or how it ended."""
    now = instance.get("current_phase")
    phases = [
        f"{name} {duration} ms" for name, duration in (instance.get("phase_durations_ms") or {}).items()
        if name != now or instance["state"] in _BOOTING
    ]  # fmt: skip
    ended = instance.get("state_error") or instance.get("exit_message")
    text = f"{instance['name']} is {instance['state']}" + (f" ({', '.join(phases)})" if phases else "")
    return plain(f"{text}: {ended}" if ended else text)
