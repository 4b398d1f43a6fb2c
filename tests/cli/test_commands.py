"""Every command: what it asks, what it prints, how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import jwt
import msgspec
import pytest
import yaml
from click.testing import CliRunner

from hypeman.cli import output
from hypeman.cli.client import Client
from hypeman.cli.images import progress_line
from hypeman.cli.ingress import parse_rule
from hypeman.cli.main import Commands, hypeman, plain_flags
from hypeman.cli.ports import parse_port
from hypeman.cli.run import boot_line, create_body, parse_mount, random_name
from hypeman.cli.session import Session
from hypeman.cli.settings import Settings, SettingsError, load_settings
from hypeman.config import ConfigError
from hypeman.devices.types import AvailableDevice
from hypeman.guest.boot import UNLIMITED, Pid1, Ulimit
from hypeman.guest.settings import GuestSettings, parse_settings
from hypeman.host.log_times import begin_run
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.ids import check_name
from hypeman.images.types import Image, ImageStatus
from hypeman.instances.model.types import (
    CreateInstanceRequest,
    HealthState,
    InstanceHealthStatus,
    InstanceState,
    RestartMode,
    RestartPolicy,
    RestartStatus,
    UpdateInstanceRequest,
)
from hypeman.network.types import PortMapping, Protocol
from hypeman.server.routes import OPERATIONS
from hypeman.server.serve import ServeError

SECRET = "a secret that is long enough for HS256"


def test_run_pulls_waits_creates(cli: Any, server: Any) -> None:
    done = cli("run", "nginx", "--name", "web", "-e", "A=b=c", "-e", "broken", "--cpus", "4", "-l", "team=x")
    assert done.exit_code == 0, done.output
    [instance] = server.world.instances.instances.values()
    assert done.stdout.strip() == instance.id
    assert "--env broken: there is no such variable" in done.stderr
    assert server.world.images.images["docker.io/library/nginx:latest"].status is ImageStatus.READY
    [(_, request)] = server.world.instances.asked
    assert (request.name, request.env, request.vcpus, request.tags) == ("web", {"A": "b=c"}, 4, {"team": "x"})
    assert (request.size, request.hotplug_size, request.network.enabled) == ("1GB", None, True)
    again = cli("run", "nginx", "--name", "web")
    assert (again.exit_code, "already" in again.stderr) == (125, True)


def test_run_reports_why_a_pull_failed(cli: Any, server: Any) -> None:
    name, made = "docker.io/library/bad:latest", datetime(2026, 1, 2, tzinfo=UTC)
    failed = Image(name, "sha256:0", ImageStatus.FAILED, made, error="no disk")
    server.world.images.images[failed.name] = failed
    done = cli("run", "bad")
    assert (done.exit_code, "no disk" in done.stderr) == (125, True)
    assert server.world.instances.asked == []


def test_boot_line() -> None:
    """What has ended is shown with its time; what an instance ended with, without control characters."""
    booting = {"name": "web", "state": "Initializing", "phase_durations_ms": {"created": 12, "initializing": 3}}
    assert boot_line({**booting, "current_phase": "initializing"}) == (
        "web is Initializing (created 12 ms, initializing 3 ms)"
    )
    running = {**booting, "state": "Running", "current_phase": "running"}
    running["phase_durations_ms"] = {"created": 12, "initializing": 340, "running": 1}
    assert boot_line(running) == "web is Running (created 12 ms, initializing 340 ms)"
    assert boot_line({"name": "web", "state": "Stopped", "exit_message": "no\x1b"}) == "web is Stopped: no�"


def test_flags_with_values(cli: Any, server: Any) -> None:
    """As scripts of the original write them; what is the program's own stays as it is."""
    assert cli("run", "nginx", "--name", "web", "--network=false", "--skip-guest-agent=true").exit_code == 0
    [(_, request)] = server.world.instances.asked
    assert (request.network.enabled, request.skip_guest_agent) == (False, True)
    run, execute = hypeman.commands["run"], hypeman.commands["exec"]
    assert plain_flags(run, ["--network=0", "--skip-guest-agent=false", "--name=true", "--", "--network=false"]) == [
        "--no-network", "--name=true", "--", "--network=false",
    ]  # fmt: skip
    assert plain_flags(execute, ["web", "tool", "--tty=false"]) == ["web", "tool", "--tty=false"]


def test_global_options_anywhere(cli: Any, server: Any) -> None:
    server.world.instances.add("web")
    for written in (["--format", "json", "ps"], ["ps", "--format", "json"], ["ps", "--all", "--format=json"]):
        assert json.loads(cli(*written).stdout)[0]["name"] == "web"
    assert cli("image", "list", "--format", "json").stdout.strip() == "[]"
    assert cli("inspect", "web", "--transform", "name").stdout == "web\n"
    assert cli("ps", "--format").exit_code == 2
    root = click.Context(hypeman)
    assert isinstance(hypeman, Commands)
    for untouched in (["exec", "web", "tool", "--debug"], ["run", "--", "--debug"], ["ps", "--all"]):
        assert hypeman.in_front(root, untouched) == untouched
    assert hypeman.in_front(root, ["ps", "--debug", "--all"]) == ["--debug", "ps", "--all"]


def parsed_flags(*arguments: str) -> CreateInstanceRequest:
    """The request that ``run`` would send."""
    context = hypeman.commands["run"].make_context("run", ["nginx", *arguments])
    flags = dict(context.params)
    return msgspec.convert(create_body(flags.pop("image"), flags), CreateInstanceRequest)


EVERY_FLAG = """
--memory 2GB --hotplug-size 3GB --overlay-size 20GB --no-network --network-egress-mode http_https_only
--bandwidth-down 100mbps --bandwidth-up 50mbps --disk-io 100MB/s --gpu-profile L40S-1Q --device a --device b
--hypervisor ch --auto-standby-enabled --auto-standby-idle-timeout 5m --auto-standby-ignore-destination-port 22
--auto-standby-ignore-source-cidr 10.0.0.0/8 --skip-guest-agent --skip-kernel-headers
--snapshot-compression-algorithm lz4 --snapshot-compression-delay 10m --entrypoint /bin/sh --cmd -c --cmd ls --ttl 2h
-v data:/data:ro:overlay=1GB --health-type http --health-http-port 80 --health-exec true --restart-policy always
--restart-max-attempts 0 --platform linux/arm64
--credentials-json '{"KEY":{"source":{"env":"REAL"},"inject":[{"as":{"header":"A","format":"${value}"}}]}}'
"""


def test_all_flags_of_run() -> None:
    request = parsed_flags(*shlex.split(EVERY_FLAG))
    assert (request.size, request.hotplug_size, request.overlay_size) == ("2GB", "3GB", "20GB")
    assert (request.network.enabled, request.network.egress.enabled) == (False, True)
    assert request.network.egress.enforcement.mode == "http_https_only"
    assert (request.network.bandwidth_download, request.disk_io_bps) == ("100mbps", "100MB/s")
    assert request.gpu is not None and request.auto_standby is not None
    assert (request.gpu.profile, request.devices) == ("L40S-1Q", ("a", "b"))
    assert request.hypervisor is HypervisorKind.CLOUD_HYPERVISOR
    assert request.auto_standby.ignore_destination_ports == (22,)
    assert (request.skip_guest_agent, request.skip_kernel_headers) == (True, True)
    policy, health, restart = request.snapshot_policy, request.health_check, request.restart_policy
    assert policy is not None and policy.compression and policy.compression.enabled
    assert policy.standby_compression_delay == "10m"
    assert (request.entrypoint, request.cmd, request.ttl) == (("/bin/sh",), ("-c", "ls"), "2h")
    assert (request.volumes[0].overlay, request.volumes[0].overlay_size) == (True, "1GB")
    assert health is not None and health.http and health.exec
    assert (health.http.port, health.exec.command) == (80, ("true",))
    assert restart is not None and restart.max_attempts == 0
    assert request.credentials["KEY"].inject[0].as_.header == "A"
    assert request.platform == "linux/arm64"


def test_flags_that_become_tags() -> None:
    flags = "--ulimit nofile=1024:65536 --ulimit core=-1 --sysctl net.core.somaxconn=99 --shm-size 1g --pid1 -l a=b"
    request = parsed_flags(*shlex.split(flags))
    assert parse_settings(request.tags) == GuestSettings(
        pid1=Pid1.WORKLOAD,
        shm_bytes=1 << 30,
        sysctls=("net.core.somaxconn=99",),
        ulimits=(Ulimit(4, UNLIMITED, UNLIMITED), Ulimit(7, 1024, 65536)),
    )
    assert request.tags["a"] == "b"
    assert parsed_flags("--no-pid1").tags == {"hypeman.pid1": "false"}


def test_absent_flags_are_absent() -> None:
    context = hypeman.commands["run"].make_context("run", ["nginx"])
    flags = dict(context.params)
    body = create_body(flags.pop("image"), flags)
    assert set(body) == {"name", "image", "size", "vcpus", "overlay_size", "network"}


@pytest.mark.parametrize("image", ["nginx", "ghcr.io/a/B_c.d:1.2", "x@sha256:00", "a/" + "y" * 99, "localhost:5000/--"])
def test_random_names_are_legal(image: str) -> None:
    assert check_name(random_name(image)) != random_name(image)


@pytest.mark.parametrize("text", ["data", "data:relative", ":/data", "data:/data:rx"])
def test_bad_mounts(text: str) -> None:
    with pytest.raises(Exception, match="data"):
        parse_mount(text)


def test_ps(cli: Any, server: Any) -> None:
    running = server.world.instances.add("web", tags={"a": "b"})
    server.world.instances.add("old", InstanceState.STOPPED)
    lines = cli("ps").stdout.splitlines()
    assert lines[0].split() == ["ID", "NAME", "IMAGE", "STATE", "IP", "VCPUS", "MEMORY", "AGE"]
    assert [line.split()[1] for line in lines[1:]] == ["web"]
    assert cli("ps", "-q").stdout.split() == [running.id]
    assert len(cli("ps", "-aq").stdout.split()) == 2
    assert "old" in cli("ps", "--state", "Stopped").stdout
    assert cli("ps", "-aq", "--tag", "a=b").stdout.split() == [running.id]
    assert json.loads(cli("--format", "json", "ps").stdout)[0]["id"] == running.id


def test_ps_shows_what_policies_do(cli: Any, server: Any) -> None:
    """Columns for health and restarts, only where there is something to show."""
    policy, now = RestartPolicy(policy=RestartMode.ALWAYS), datetime.now(UTC)
    shown: dict[str, dict[str, Any]] = {
        "well": {"health_status": InstanceHealthStatus(status=HealthState.HEALTHY)},
        "loops": {"restart_status": RestartStatus(attempts=3, next_attempt_at=now + timedelta(hours=2, minutes=9))},
        "ended": {"restart_status": RestartStatus(attempts=5, blocked_reason="max_attempts_exceeded")},
    }
    for name, fields in shown.items():
        made = server.world.instances.add(name)
        changed = msgspec.structs.replace(made, restart_policy=policy, **fields)
        server.world.instances.instances[made.id] = changed
    assert "HEALTH" in (text := cli("ps").stdout) and "RESTARTS" in text
    assert "healthy" in text and "3, next in 2h" in text and "5, max_attempts_exceeded" in text


def test_formats(cli: Any, server: Any) -> None:
    server.world.instances.add("web", env={"KEY": "hunter2"})
    hidden = cli("inspect", "web").stdout
    assert "hunter2" not in hidden
    assert "***" in hidden
    shown = json.loads(cli("inspect", "--show-env", "web").stdout)
    assert shown["env"] == {"KEY": "hunter2"}
    assert yaml.safe_load(cli("--format", "yaml", "inspect", "web").stdout)["name"] == "web"
    assert len(cli("--format", "jsonl", "ps").stdout.splitlines()) == 1
    assert "\n" not in cli("--format", "raw", "inspect", "web").stdout.strip()
    assert cli("--transform", "network.ip", "inspect", "web").stdout == "10.100.0.2\n"
    assert json.loads(cli("--transform", "#.name", "ps").stdout) == ["web"]
    assert cli("--transform", "#", "ps").stdout == "1\n"


def test_verbs(cli: Any, server: Any) -> None:
    instance = server.world.instances.add("web")
    for verb, state in [("stop", "Stopped"), ("start", "Running"), ("standby", "Standby"), ("restore", "Running")]:
        assert cli(verb, "web").stdout == f"web is {state}\n"
    cli("stop", "web")
    cli("start", instance.id[:8], "--entrypoint", "/bin/sh", "--cmd", "x")
    cli("standby", "web", "--compression-level", "3")
    asked = dict(server.world.instances.asked)
    assert (asked["start"].entrypoint, asked["start"].cmd) == (("/bin/sh",), ("x",))
    assert asked["standby"].compression.level == 3
    done = cli("stop", "web")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "web is Standby" in done.stderr
    assert "409 invalid_state" in done.stderr
    fork = cli("fork", "web", "copy", "--from-running", "--target-state", "Stopped")
    assert fork.stdout.strip() in server.world.instances.instances


def test_wait(cli: Any, server: Any) -> None:
    server.world.instances.add("web")
    assert cli("wait", "web", "--state", "Running").exit_code == 0
    late = cli("wait", "web", "--state", "Stopped", "--timeout", "1s")
    assert (late.exit_code, late.stdout) == (1, "Running\n")
    assert "the time is over" in late.stderr
    assert server.world.instances.asked[-1] == ("wait", (InstanceState.STOPPED, 1.0))


def test_rm(cli: Any, server: Any) -> None:
    for name, state in [("a", InstanceState.RUNNING), ("b", InstanceState.STOPPED), ("c", InstanceState.STANDBY)]:
        server.world.instances.add(name, state)
    refused = cli("rm", "a", "b")
    assert (refused.exit_code, refused.stdout) == (1, "b\n")
    assert "--force" in refused.stderr
    assert cli("rm", "-f", "a").stdout == "a\n"
    assert cli("rm", "missing").exit_code == 1
    assert cli("rm", "--all").stdout == "c\n"
    assert server.world.instances.instances == {}
    assert cli("rm").exit_code == 2
    assert cli("rm", "--all", "x").exit_code == 2


def test_logs(cli: Any, server: Any) -> None:
    server.world.instances.add("web")
    (server.world.log_directory / "web-app.log").write_text('one\n"two"\nthree\n')
    assert cli("logs", "web", "--tail", "2").stdout == '"two"\nthree\n'
    (server.world.log_directory / "web-app.log").write_bytes(b"\xff\xfe\x00\r\n" + b"y" * 150_000 + b"\n\xe9t\xe9")
    assert cli("logs", "web").stdout_bytes == b"\xff\xfe\x00\n" + b"y" * 150_000 + b"\n\xe9t\xe9\n"
    missing = cli("logs", "web", "-s", "vmm")
    assert (missing.exit_code, "there is no vmm log yet" in missing.stderr) == (1, True)


def test_logs_of_a_time_and_of_a_run(cli: Any, server: Any) -> None:
    server.world.instances.add("web")
    log = server.world.log_directory / "web-app.log"
    begin_run(log)
    log.write_text("one\n")
    os.utime(log, (1_000_000_000, 1_000_000_000))
    begin_run(log)
    with log.open("a") as file:
        file.write("two " + "x" * 100_000 + "\n")
    assert cli("logs", "web", "--previous", "-t").stdout == "2001-09-09T01:46:40.000000000Z one\n"
    [line] = cli("logs", "web", "-t", "--since", "1h").stdout.splitlines()
    assert re.fullmatch(r"20\S{27}Z two x{100000}", line), "one time, although it comes in pieces"
    assert cli("logs", "web", "--since", "soon").exit_code != 0


def test_stats(cli: Any, server: Any) -> None:
    server.world.instances.add("web")
    server.world.instances.add("off", InstanceState.STOPPED)
    asked = server.world.instances.stats
    assert "100MB / 1GB" in cli("stats", "web").stdout
    server.world.instances.stats = None  # one request for all of them
    every = cli("stats").stdout
    assert [line.split()[0] for line in every.splitlines()] == ["NAME", "web"] and "100MB / 1GB" in every
    server.world.instances.stats = asked
    assert json.loads(cli("--format", "json", "stats", "web").stdout)["cpu_seconds"] == 1.5


def test_update(cli: Any, server: Any) -> None:
    server.world.instances.add("web")
    for arguments in (
        ["egress-credentials", "web", "-e", "KEY=new"],
        ["restart-policy", "web", "--policy", "always", "--max-attempts", "0"],
        ["health-check", "web", "--type", "none"],
        ["auto-standby", "web", "--disabled", "--ignore-destination-port", "22"],
    ):
        assert cli("update", *arguments).exit_code == 0
    credentials, restart, health, standby = (request for _, request in server.world.instances.asked)
    assert credentials.env == {"KEY": "new"}
    assert restart.restart_policy.max_attempts == 0
    assert health.health_check.type == "none"
    assert (standby.auto_standby.enabled, standby.auto_standby.ignore_destination_ports) == (False, (22,))


def test_new_credentials_are_no_arguments(
    cli: Any, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.world.instances.add("web")
    file = tmp_path / "secrets"
    file.write_text("# mine\n\nA=1=2\r\nB= spaced \n")
    monkeypatch.setenv("KEY", "from the environment")
    update = ("update", "egress-credentials", "web")
    assert cli(*update, "--env", "KEY").stderr == ""
    assert cli(*update, "--env-file", str(file)).exit_code == 0
    assert cli(*update, "--env-file", "-", input="C=3\n").exit_code == 0
    warned = cli(*update, "--env", "KEY=visible")
    assert (warned.exit_code, "--env-file" in warned.stderr, "visible" in warned.stderr) == (0, True, False)
    assert [request.env for _, request in server.world.instances.asked] == [
        {"KEY": "from the environment"},
        {"A": "1=2", "B": " spaced "},
        {"C": "3"},
        {"KEY": "visible"},
    ]
    for wrong, options in (
        ((), {}),
        (("--env", "NOT_SET"), {}),
        (("--env", "=x"), {}),
        (("--env-file", "-"), {"input": "secret without a name"}),
    ):
        refused = cli(*update, *wrong, **options)
        assert refused.exit_code == 2, wrong
        assert "secret" not in refused.stderr


def test_images(cli: Any, server: Any, tmp_path: Path) -> None:
    assert "ready" in cli("pull", "alpine").stdout
    assert "pending" in cli("image", "create", "nginx", "-d").stdout
    assert cli("images", "ls", "-q").stdout.split() == [
        "docker.io/library/alpine:latest",
        "docker.io/library/nginx:latest",
    ]
    assert json.loads(cli("image", "get", "alpine").stdout)["status"] == "ready"
    assert cli("image", "rm", "docker.io/library/alpine:latest").exit_code == 0
    assert cli("image", "get", "alpine").exit_code == 1
    archive = tmp_path / "My Image.tar.gz"
    archive.write_bytes(b"x" * 1_000_000)
    assert cli("image", "import", str(archive)).exit_code == 0
    assert server.world.images.imported == archive.read_bytes()
    assert "docker.io/library/my-image:latest" in server.world.images.images
    layout = tmp_path / "layout"
    layout.mkdir()
    (layout / "index.json").write_text("{}")
    assert cli("image", "import", str(layout), "--name", "laid", "--tag", "a=b").exit_code == 0
    with tarfile.open(fileobj=io.BytesIO(server.world.images.imported)) as tar:
        assert tar.getnames() == ["index.json"]
    missing = cli("image", "import", str(tmp_path / "missing.tar"))
    assert (missing.exit_code, "No such file" in missing.stderr) == (1, True)


def test_volumes(cli: Any, server: Any, tmp_path: Path) -> None:
    server.world.instances.add("web")
    assert cli("volume", "create", "--name", "data", "--size", "2", "--id", "v1").stdout == "v1\n"
    again = cli("volume", "create", "--name", "data", "--size", "2", "--id", "v1")
    assert (again.exit_code, "409 already_exists" in again.stderr) == (1, True)
    archive = tmp_path / "data.tgz"
    archive.write_bytes(b"tar")
    filled = cli("volume", "create", "--name", "b", "--size", "1", "--id", "v2", "--from-archive", str(archive))
    assert filled.exit_code == 0
    assert server.world.volumes.archives["v2"] == b"tar"
    assert cli("volumes", "list", "-q").stdout.split() == ["v1", "v2"]
    assert cli("volume", "attach", "v1", "-i", "web", "--mount-path", "/data", "--readonly").exit_code == 0
    [instance] = server.world.instances.instances.values()
    assert instance.volumes[0].readonly
    assert cli("volume", "detach", "v1", "--instance", "web").exit_code == 0
    assert cli("volume", "inspect", "v1").exit_code == 0
    assert cli("volume", "rm", "v1").stdout == "v1\n"


def test_auto_standby(cli: Any, server: Any) -> None:
    web = server.world.instances.add("web")
    assert json.loads(cli("--format", "json", "auto-standby", "status", "web").stdout)["status"] == "disabled"
    done = cli("auto-standby", "hold", "web")
    assert done.exit_code == 0 and done.stdout.startswith("held, ")
    assert server.world.policies.held == {web.id}
    assert cli("auto-standby", "hold", "nothing").exit_code == 1


def test_snapshot_schedules(cli: Any, server: Any) -> None:
    server.world.instances.add("web")
    assert cli("snapshot", "schedule", "get", "web").exit_code == 1
    done = cli(
        "snapshot", "schedule", "set", "web", "--interval", "24h", "--max-count", "7", "--max-age", "168h",
        "--name-prefix", "nightly", "--metadata", "a=b",
    )  # fmt: skip
    assert done.exit_code == 0 and done.stdout.startswith("every 24h, next ")
    shown = json.loads(cli("--format", "json", "snapshot", "schedule", "get", "web").stdout)
    assert shown["retention"] == {"max_count": 7, "max_age": "168h"}
    assert (shown["name_prefix"], shown["metadata"]) == ("nightly", {"a": "b"})
    assert cli("snapshot", "schedule", "rm", "web").exit_code == 0
    assert cli("snapshot", "schedule", "delete", "web").exit_code == 1


def test_snapshots(cli: Any, server: Any) -> None:
    server.world.instances.add("web")
    done = cli("--format", "json", "snapshot", "create", "web", "--name", "s", "--compression-enabled")
    made = json.loads(done.stdout)
    assert (made["kind"], made["name"]) == ("Standby", "s")
    assert cli("snapshot", "restore", "web", "abc", "--target-state", "Stopped").exit_code == 0
    assert server.world.instances.asked[-1][1].target_state == "Stopped"
    assert cli("snapshot", "list", "--kind", "Standby").stdout.startswith("ID")
    assert cli("snapshot", "get", "abc").exit_code == 1
    assert cli("snapshot", "fork", "abc", "copy").exit_code == 1


def test_devices(cli: Any, server: Any) -> None:
    server.world.devices.free.append(
        AvailableDevice(pci_address="0000:01:00.0", vendor_id="10de", device_id="2204", iommu_group=1)
    )
    server.world.devices.free.append(
        AvailableDevice(
            pci_address="0000:00:00.0", vendor_id="8086", device_id="29c0", iommu_group=0, reason="is a bridge"
        )
    )
    assert "10de:2204" in cli("device", "available").stdout
    assert "is a bridge" not in cli("device", "available").stdout
    assert "is a bridge" in cli("device", "available", "--all").stdout
    refused = cli("device", "register", "0000:01:00.0", "--name", "gpu")
    assert (refused.exit_code, "device_not_found" in refused.stderr) == (1, True)
    assert cli("device", "register").exit_code == 2
    assert cli("device", "list").exit_code == 0
    assert cli("device", "unregister", "gpu").exit_code == 1


def test_host(cli: Any) -> None:
    assert cli("health").stdout == "ok\n"
    assert json.loads(cli("capabilities").stdout)["default_runtime"]["name"] == "qemu"
    lines = cli("resources").stdout.splitlines()
    assert lines[0].split() == ["RESOURCE", "HAS", "LIMIT", "TAKEN", "FREE"]
    assert "8GB" in lines[2]
    assert "web" in lines[-1]


def test_reclaim_memory(cli: Any, server: Any) -> None:
    done = cli("resources", "reclaim-memory", "--reclaim-bytes", "1GB", "--hold-for", "10m", "--reason", "a build")
    assert done.exit_code == 0, done.output
    [asked] = server.world.instances.reclaimed
    assert (asked.reclaim_bytes, asked.hold_for, asked.dry_run, asked.reason) == (1 << 30, "10m", False, "a build")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("reclaimed 1GB of 1GB planned until 2026-")
    assert lines[-1].split() == ["web", "applied", "4GB", "3GB", "-"]
    assert cli("resources", "reclaim-memory", "--reclaim-bytes", "much").exit_code == 2
    assert cli("resources", "reclaim-memory").exit_code == 2


def test_refusals_say_what_to_do(server: Any) -> None:
    run = CliRunner().invoke
    result = run(hypeman, ["--base-url", server.tcp_url, "ps"])
    assert (result.exit_code, "HYPEMAN_API_KEY" in result.stderr, "401" in result.stderr) == (1, True, True)
    result = run(hypeman, ["--base-url", server.tcp_url, "ps"], env={"HYPEMAN_API_KEY": server.token})
    assert result.exit_code == 0
    result = run(hypeman, ["--base-url", server.tcp_url, "--format-error", "json", "ps"])
    assert json.loads(result.stderr)["code"] == "Unauthorized"
    result = run(hypeman, ["--base-url", server.tcp_url, "--transform-error", "code", "ps"])
    assert result.stderr.strip() == '"Unauthorized"'
    result = run(hypeman, ["--debug", "--base-url", server.tcp_url, "ps"], env={"HYPEMAN_API_KEY": server.token})
    assert "> GET" in result.stderr
    assert server.token not in result.stderr
    for url in ("http://127.0.0.1:1", "unix:///nowhere.sock", "http://no-such-host.invalid"):
        result = run(hypeman, ["--base-url", url, "ps"])
        assert (result.exit_code, "cannot be reached" in result.stderr, "hypeman serve" in result.stderr) == (
            1,
            True,
            True,
        )
    assert run(hypeman, ["--base-url", "ftp://x", "ps"]).exit_code == 1


def test_a_kept_connection_that_was_closed_is_opened_again(server: Any) -> None:
    client = Client(Settings(server.url))
    assert client.get("/health") == {"status": "ok"}
    server.do(server.cut)
    assert client.get("/health") == {"status": "ok"}
    client.close()


def test_where_the_settings_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = str(tmp_path / "none")
    assert load_settings(None, {}, nothing) == Settings("http://localhost:8080")
    local = tmp_path / "here.sock"
    local.touch()
    assert load_settings(None, {}, str(local)).base_url == f"unix://{local}"
    file = tmp_path / ".config/hypeman/cli.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("base_url: https://file/\napi_key: from-file\n")
    assert load_settings(None, {}, str(local)) == Settings("https://file", "from-file")
    environ = {"HYPEMAN_BASE_URL": "http://env", "HYPEMAN_API_KEY": "from-env"}
    assert load_settings(None, environ, nothing) == Settings("http://env", "from-env")
    assert load_settings("http://flag", environ, nothing).base_url == "http://flag"
    assert "from-env" not in repr(load_settings(None, environ, nothing))
    file.write_text("- a list")
    with pytest.raises(SettingsError, match="keys and values"):
        load_settings(None, {}, nothing)
    file.unlink()
    monkeypatch.setattr("os.access", lambda *_: False)  # root may open everything
    with pytest.raises(SettingsError, match="join the group hypeman"):
        load_settings(None, {}, str(local))
    assert load_settings(None, {"HYPEMAN_API_KEY": "x"}, str(local)).base_url == "http://localhost:8080"


def test_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(hypeman, ["token", *arguments])

    assert "JWT_SECRET" in run().stderr
    monkeypatch.setenv("JWT_SECRET", SECRET)
    minted = run("--user-id", "ann", "--scopes", "device:read, image:read").stdout.strip()
    claims = jwt.decode(minted, SECRET, ["HS256"])
    assert (claims["sub"], claims["permissions"]) == ("ann", ["device:read", "image:read"])
    assert "permissions" not in jwt.decode(run().stdout.strip(), SECRET, ["HS256"])
    assert "unknown scope" in run("--scopes", "fly").stderr
    narrow = run("--repository", "team/app:pull", "--repository", "team/lib").stdout.strip()
    assert jwt.decode(narrow, SECRET, ["HS256"])["repo_access"] == [
        {"repo": "team/app", "scope": "pull"},
        {"repo": "team/lib", "scope": "pull"},
        {"repo": "team/lib", "scope": "push"},
    ]
    for wrong in (["--repository", "A"], ["--repository", "a:write"], ["--repository", "a", "--scopes", "image:read"]):
        assert run(*wrong).exit_code == 2, wrong
    listed = run("--list-scopes").stdout.split()
    assert {scope for operation in OPERATIONS for scope in operation.scopes} <= set(listed)


def test_an_upload_that_is_refused_says_why(server: Any, tmp_path: Path) -> None:
    """The server answers before it has everything, and closes."""
    archive = tmp_path / "big.tar"
    archive.write_bytes(bytes(40 * 2**20))
    done = CliRunner().invoke(hypeman, ["--base-url", server.tcp_url, "image", "import", str(archive)])
    assert (done.exit_code, "401 Unauthorized" in done.stderr) == (1, True), done.stderr


def test_serve_reports_that_it_cannot_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(config: Any) -> None:
        raise ExceptionGroup("nursery", [ExceptionGroup("inner", [ServeError("port 1 is taken")])])

    monkeypatch.setattr("hypeman.app.main", main)
    file = tmp_path / "config.yaml"
    file.write_text("port: 1\n")
    done = CliRunner().invoke(hypeman, ["serve", "--config", str(file)])
    assert (done.exit_code, done.stderr) == (1, "Error: port 1 is taken\n")


def test_how_a_pull_is_displayed() -> None:
    def line(status: str, **fields: Any) -> str:
        return progress_line({"status": status, **fields.pop("image", {})}, fields or None)

    layers = [{"size": 2**20, "done": 2**20}, {"size": 3 * 2**20, "done": 0}]
    assert line("pending", image={"queue_position": 3}) == "pending, number 3 in the queue"
    assert line("pulling") == "pulling"
    assert line("pulling", layers=layers) == "pulling [#####···············] 1MB of 4MB, 2 layers"
    assert line("converting", layers=layers, converted_bytes=2**20) == "converting, 1MB written"


def test_serve_with_bad_settings(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("prot: 1\n")
    done = CliRunner().invoke(hypeman, ["serve", "--config", str(file)])
    assert (done.exit_code, "prot" in done.stderr) == (1, True)
    assert issubclass(ConfigError, Exception)


def test_completion_and_manual(cli: Any, server: Any, tmp_path: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_HYPEMAN_COMPLETE" in cli("completion", shell).stdout
    assert ".SH COMMANDS" in cli("man").stdout
    assert cli("@manpages", "-o", str(tmp_path / "man")).exit_code == 0
    page = (tmp_path / "man" / "hypeman-snapshot-create.1").read_text()
    assert ".B \\-\\-kind" in page
    server.world.instances.add("web")
    offered = CliRunner().invoke(
        hypeman,
        prog_name="hypeman",
        complete_var="_HYPEMAN_COMPLETE",
        env={
            "_HYPEMAN_COMPLETE": "bash_complete",
            "COMP_WORDS": "hypeman stop w",
            "COMP_CWORD": "2",
            "HYPEMAN_BASE_URL": server.url,
        },
    )
    assert offered.stdout == "plain,web\n"


def test_tables_and_numbers() -> None:
    rows = [{"a": "x" * 5, "b": None}, {"a": "\x1b[31m", "b": 7}]
    table = output.render_table(rows, [("A", lambda row: row["a"]), ("BEE", lambda row: row["b"])])
    assert table == "A      BEE\nxxxxx  -\n�[31m  7"
    sizes = [output.size(number) for number in (None, 0, 1023, 1536, 2**30, 5 * 2**40)]
    assert sizes == ["-", "0B", "1023B", "1.5KB", "1GB", "5TB"]
    assert output.pick({"a": [{"b": 1}, {"b": 2}]}, "a.1.b") == 2
    assert output.pick({"a": []}, "a.3") is None
    assert output.pick({}, "x.y") is None


def test_colours_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not output.use_colour()
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert output.use_colour()
    monkeypatch.setenv("FORCE_COLOR", "0")
    assert not output.use_colour()


def test_the_session_asks_no_settings_before_it_needs_them() -> None:
    assert "client" not in vars(Session(base_url="nonsense"))


@pytest.mark.parametrize(
    ("text", "mapping"),
    [
        ("8080:80", {"host_port": 8080, "guest_port": 80, "protocol": "tcp"}),
        ("80", {"host_port": 0, "guest_port": 80, "protocol": "tcp"}),
        ("53:5353/udp", {"host_port": 53, "guest_port": 5353, "protocol": "udp"}),
        ("127.0.0.1:8080:80", {"host_port": 8080, "guest_port": 80, "protocol": "tcp", "host_address": "127.0.0.1"}),
        ("127.0.0.1::80", {"host_port": 0, "guest_port": 80, "protocol": "tcp", "host_address": "127.0.0.1"}),
        ("[::1]:8080:80", {"host_port": 8080, "guest_port": 80, "protocol": "tcp", "host_address": "::1"}),
        ("9000-9002:90-92", {"host_port": 9000, "guest_port": 90, "protocol": "tcp", "count": 3}),
        ("90-92", {"host_port": 0, "guest_port": 90, "protocol": "tcp", "count": 3}),
    ],
)
def test_port_mappings_are_written_as_for_docker(text: str, mapping: dict[str, Any]) -> None:
    assert parse_port(text) == mapping


@pytest.mark.parametrize(
    "text",
    ["", "x", "8080:", "1:2:3:4", "8080:80/sctp", "1-2:3", "2-1:2-1", "70000:80", "0:80", "::1:80:80", "1.2.3.4:80"],
)
def test_bad_port_mappings(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_port(text)


def test_ports_are_requested_shown_and_changed(cli: Any, server: Any) -> None:
    mapping = PortMapping(host_port=8080, guest_port=80)
    assert parsed_flags("-p", "8080:80").ports == (mapping,)
    server.world.instances.add("web", ports=(mapping, PortMapping(host_port=53, guest_port=53, protocol=Protocol.UDP)))
    server.world.instances.add("closed")
    assert cli("port", "closed").stdout == ""
    assert "8080->80/tcp, 53->53/udp" in cli("ps").stdout
    assert cli("port", "web").stdout.splitlines() == [
        "80/tcp -> 0.0.0.0:8080", "80/tcp -> [::]:8080", "53/udp -> 0.0.0.0:53", "53/udp -> [::]:53",
    ]  # fmt: skip
    assert cli("port", "web", "80").stdout.splitlines() == ["0.0.0.0:8080", "[::]:8080"]
    missing = cli("port", "web", "81")
    assert (missing.exit_code, "port 81/tcp of web is not published" in missing.stderr) == (1, True)
    for arguments, ports in ((["-p", "8080:80"], (mapping,)), (["--none"], ())):
        assert cli("update", "ports", "web", *arguments).exit_code == 0
        assert server.world.instances.asked[-1] == ("update", UpdateInstanceRequest(ports=ports))
    assert cli("update", "ports", "web").exit_code == 2


def test_changed_ports_are_shown_as_they_were_chosen(cli: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `-p 80` the server finds a free port: only it knows which."""
    web = server.world.instances.add("web")
    chosen = msgspec.structs.replace(web, ports=(PortMapping(host_port=32768, guest_port=80),))

    async def update(ref: str, request: UpdateInstanceRequest) -> Any:
        return chosen

    monkeypatch.setattr(server.world.instances, "update", update)
    shown = cli("update", "ports", "web", "-p", "80").stdout.splitlines()
    assert shown == ["80/tcp -> 0.0.0.0:32768", "80/tcp -> [::]:32768"]


@pytest.mark.parametrize("arguments", [["top", "web"], ["cp", "web:/tmp", "-"]])
def test_an_instance_that_still_boots_is_waited_for(
    cli: Any, server: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """As in Docker, what follows `run -d` need not wait."""
    instances = server.world.instances
    web = instances.add("web", InstanceState.INITIALIZING)
    real = instances.wait_state

    async def wait_state(ref: str, state: InstanceState, timeout: float) -> Any:
        instances.instances[web.id] = msgspec.structs.replace(web, state=InstanceState.RUNNING)
        return await real(ref, state, timeout)

    monkeypatch.setattr(instances, "wait_state", wait_state)
    assert "must be Running" not in cli(*arguments).stderr
    assert ("wait", (InstanceState.RUNNING, 60.0)) in instances.asked
    instances.instances[web.id] = msgspec.structs.replace(web, state=InstanceState.STOPPED)
    refused = cli(*arguments)
    assert refused.exit_code == 1 and "Stopped" in refused.stderr, "only one that boots"


def test_habits_of_names_and_flags(cli: Any, server: Any) -> None:
    assert cli("volume", "create", "mine", "--size", "1GB").exit_code == 0
    assert cli("volume", "create", "--size", "1GB").exit_code == 2
    assert "mine" in cli("volumes").stdout and cli("images").stdout.startswith("NAME")
    assert "Commands:" in cli("images", "--help").stdout
    server.world.instances.add("web")
    assert cli("stats", "--no-stream").exit_code == 0
    (server.world.log_directory / "web-app.log").write_text("one\ntwo\n")
    assert cli("logs", "-n", "1", "web").stdout == "two\n"


def test_ingresses(cli: Any, server: Any) -> None:
    server.world.instances.add("web")
    secret = "0123456789abcdef0123456789abcdef"
    auth = ("--request-header-auth-header", "X-Key", "--request-header-auth-value", secret)
    made = cli("ingress", "create", "web", "-H", "Web.example.com", "-p", "8080", *auth, "--tag", "a=b")
    (ingress,) = server.world.ingresses.ingresses.values()
    assert (ingress.name, ingress.id) == ("web-example-com", made.stdout.strip())
    assert ingress.rules[0].request_header_auth.value == secret
    for command in (("get", "web-example-com"), ("list",)):
        shown = cli("--format", "json", "ingress", *command).stdout
        assert "web.example.com" in shown
        assert secret not in shown
    cli("ingresses", "create", "--name", "two", "--rule", "a.b:81=web:1", "--rule", "{i}.b={i}:2")
    first, second = server.world.ingresses.ingresses[cli("ingress", "list", "-q").stdout.split()[1]].rules
    assert (first.match.port, first.target.port, second.match.port) == (81, 1, 80)
    assert (second.match.hostname, second.target.instance) == ("{i}.b", "{i}")
    cli("ingress", "rm", "two")
    assert len(server.world.ingresses.ingresses) == 1
    cli("ingress", "create", "web", "-H", "web.internal", "-p", "80", "--tls", "--redirect-http")
    cli("ingress", "create", "--name", "both", "--rule", "a.internal=web:1,tls", "--rule", "b.internal:8443=web:1,tls")
    (one,), two = (
        server.world.ingresses.ingresses[ref].rules for ref in cli("ingress", "list", "-q").stdout.split()[1:]
    )
    assert (one.tls, one.redirect_http, one.match.port) == (True, True, 443)
    assert [rule.match.port for rule in two] == [443, 8443]
    cli("ingress", "create", "web", "-H", "raw.example.com", "-p", "443", "--tls-passthrough")
    (raw,) = server.world.ingresses.ingresses[cli("ingress", "list", "-q").stdout.split()[-1]].rules
    assert (raw.tls_passthrough, raw.tls, raw.match.port) == (True, False, 443)
    assert "tls://raw.example.com:443 → web:443" in cli("ingress", "list").stdout
    assert "valid" in cli("ingress", "list").stdout
    assert cli("ingress", "ca").stdout == "-----BEGIN CERTIFICATE-----\n"
    refused = cli("ingress", "create", "web", "-H", "web.example.com", "-p", "80", "--tls")
    assert (refused.exit_code, "no source of certificates" in refused.stderr) == (1, True)


@pytest.mark.parametrize("rule", ["", "a", "a=", "a=web", "a=web:x", "a:x=web:1", "a=web:1,what", "=web:1"])
def test_rules_that_are_not_understood(rule: str) -> None:
    with pytest.raises(click.UsageError):
        parse_rule(rule)


def test_a_rule_with_options() -> None:
    assert parse_rule("a.b=web:1,tls-passthrough")["match"]["port"] == 443
    rule = parse_rule("a.b:8443=web:1,tls,redirect-http,request-header-auth=X-Key:some:value")
    assert rule["request_header_auth"] == {"header": "X-Key", "value": "some:value"}
    assert (rule["tls"], rule["redirect_http"], rule["match"]["port"]) == (True, True, 8443)


def test_a_push_is_cancelled(cli: Any, server: Any) -> None:
    made = cli("push", "-d", "team/app", "quay.io/team/app").stdout.split()[0]
    assert cli("push", "cancel", made).stdout == f"{made}\n"
    assert server.world.pushes.pushes[made].error == "cancelled"
    again = cli("push", "cancel", made)
    assert (again.exit_code, "is over" in again.stderr) == (1, True)
