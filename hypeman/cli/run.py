"""``run``: pulls the image if needed, creates the instance and shows progress."""

from __future__ import annotations

import string
import sys
import time
from typing import Any

import click
import msgspec

from hypeman.cli.client import ApiError, Client
from hypeman.cli.images import PullDisplay, image_path, wait_ready
from hypeman.cli.instances import HYPERVISORS, path_of
from hypeman.cli.output import plain
from hypeman.cli.policies import (
    compression_body,
    compression_options,
    health_body,
    health_options,
    restart_body,
    restart_options,
)
from hypeman.cli.ports import parse_port, ports_option
from hypeman.cli.session import Session, fail, pairs, present, reports

_BOOTING = ("Created", "Initializing")
_POLL_SECONDS = 0.3
_WATCH_SECONDS = 120.0
_NAME_CHARACTERS = string.ascii_lowercase + string.digits


@click.command()
@click.argument("image")
@click.option("--name", help="Default: the image's name and four random characters.")
@click.option("-e", "--env", multiple=True, metavar="KEY=VALUE")
@click.option("--credentials-json", help="Credentials as the API takes them; @FILE reads a file.")
@click.option("--platform", help="As in linux/arm64.")
@click.option("--memory", default="1GB", show_default=True)
@click.option("--cpus", type=click.IntRange(1), default=2, show_default=True)
@click.option("--overlay-size", default="10GB", show_default=True, help="Writable layer over the image.")
@click.option("--hotplug-size", help="Memory that may be plugged later.")
@click.option("--network/--no-network", default=True, show_default=True)
@click.option("--network-egress-enabled", is_flag=True, help="Mediate outbound connections.")
@click.option("--network-egress-mode", type=click.Choice(["all", "http_https_only"]))
@click.option("--bandwidth-down", help="As in 100mbps.")
@click.option("--bandwidth-up", help="As in 100mbps.")
@click.option("--disk-io", help="As in 100MB/s.")
@click.option("--gpu-profile")
@click.option("--device", "devices", multiple=True, help="Registered device, by id or name; repeatable.")
@click.option("--hypervisor", help="cloud-hypervisor (ch), firecracker (fc), qemu, qemu-microvm (microvm).")
@click.option("--auto-standby-enabled/--auto-standby-disabled", default=None)
@click.option("--auto-standby-idle-timeout")
@click.option("--auto-standby-ignore-destination-port", type=int, multiple=True)
@click.option("--auto-standby-ignore-source-cidr", multiple=True)
@click.option("--skip-guest-agent", is_flag=True, help="No exec, cp or stat.")
@click.option("--skip-kernel-headers", is_flag=True)
@compression_options("snapshot-")
@click.option("--entrypoint", multiple=True, help="Instead of the image's; one word each.")
@click.option("--cmd", multiple=True, help="Instead of the image's; one word each.")
@click.option("-l", "--tag", "--metadata", "tags", multiple=True, metavar="KEY=VALUE")
@click.option("-v", "--volume", "volumes", multiple=True, metavar="ID:/PATH[:ro[:overlay=SIZE]]")
@ports_option
@click.option("--ttl", help="Delete it after this time, as in 2h.")
@health_options("health-")
@restart_options("restart-")
@reports
def run(session: Session, image: str, **flags: Any) -> None:
    """Make an instance from IMAGE and boot it; prints its id."""
    body = create_body(image, flags)
    ensure_image(session.client, image, flags["platform"])
    made = session.client.post("/instances", body)
    session.show(made, lambda: str(made["id"]))
    if sys.stdout.isatty() and sys.stderr.isatty():  # interactive; a script that only needs the id does not wait
        watch_boot(session.client, made)


def create_body(image: str, flags: dict[str, Any]) -> dict[str, Any]:
    """CreateInstanceRequest from the flags. Pure except for the random name."""
    network = present(
        enabled=flags["network"],
        bandwidth_download=flags["bandwidth_down"],
        bandwidth_upload=flags["bandwidth_up"],
    )
    if flags["network_egress_enabled"] or flags["network_egress_mode"]:
        network["egress"] = {"enabled": True}
        if flags["network_egress_mode"]:
            network["egress"]["enforcement"] = {"mode": flags["network_egress_mode"]}
    policy = present(compression=compression_body(flags), standby_compression_delay=flags["compression_delay"])
    auto_standby = present(
        enabled=flags["auto_standby_enabled"],
        idle_timeout=flags["auto_standby_idle_timeout"],
        ignore_destination_ports=flags["auto_standby_ignore_destination_port"],
        ignore_source_cidrs=flags["auto_standby_ignore_source_cidr"],
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
        env=pairs(flags["env"]),
        credentials=_credentials(flags["credentials_json"]),
        tags=pairs(flags["tags"]),
        ttl=flags["ttl"],
        network=network,
        devices=flags["devices"],
        gpu=present(profile=flags["gpu_profile"]),
        volumes=[parse_mount(text) for text in flags["volumes"]],
        ports=[parse_port(text) for text in flags["ports"]],
        hypervisor=HYPERVISORS.get(flags["hypervisor"], flags["hypervisor"]),
        snapshot_policy=policy,
        auto_standby=auto_standby,
        health_check=health_body(flags),
        restart_policy=restart_body(flags),
        skip_guest_agent=flags["skip_guest_agent"] or None,
        skip_kernel_headers=flags["skip_kernel_headers"] or None,
        entrypoint=flags["entrypoint"],
        cmd=flags["cmd"],
    )


def random_name(image: str) -> str:
    """``nginx-x7k2`` for ``docker.io/library/nginx:1.25``; always a legal name."""
    import secrets  # loads OpenSSL

    base = image.partition("@")[0].rpartition("/")[2].partition(":")[0].lower()
    legal = "".join(c if c in _NAME_CHARACTERS else "-" for c in base).strip("-")[:50].rstrip("-")
    return f"{legal or 'vm'}-{''.join(secrets.choice(_NAME_CHARACTERS) for _ in range(4))}"


def parse_mount(text: str) -> dict[str, Any]:
    """``id:/path[:ro[:overlay=SIZE]]`` as a VolumeMount."""
    volume, _, rest = text.partition(":")
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
        raise click.BadParameter(f"{text!r} must read ID:/PATH[:ro[:overlay=SIZE]]")
    return mount


def ensure_image(client: Client, image: str, platform: str | None) -> None:
    """Pull the image if it is missing, and wait until it is ready."""
    try:
        found = client.get(image_path(image))
    except ApiError as error:
        if error.status != 404:
            raise
        found = client.post("/images", present(name=image, platform=platform))
    if found["status"] == "failed":
        found = client.post("/images", present(name=image, platform=platform))
    if found["status"] != "ready":
        wait_ready(client, found["name"], PullDisplay.for_terminal(found["name"]))


def _credentials(text: str | None) -> Any:
    if not text:
        return None
    try:
        if text.startswith("@"):
            with open(text[1:], "rb") as file:
                return msgspec.json.decode(file.read())
        return msgspec.json.decode(text)
    except (OSError, msgspec.DecodeError) as error:
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
