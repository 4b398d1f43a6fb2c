"""From what was asked to what is meant: each refusal with the code of its field."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.captures.types import CompressionAlgorithm, SnapshotCompressionConfig
from hypeman.config import LimitsConfig, SnapshotsConfig
from hypeman.egress.types import AccessDefault, CredentialPolicy, EgressAccess, EgressEnforcementMode
from hypeman.errors import HypemanError, InvalidRequest, NotSupported
from hypeman.hypervisor.interface import Capabilities
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.instances.model.policies import (
    HealthRules,
    RestartRules,
    StandbyRules,
    health_rules,
    restart_rules,
    standby_rules,
)
from hypeman.instances.model.record import InstanceSpec
from hypeman.instances.model.types import (
    AutoStandbyPolicy,
    CreateInstanceRequest,
    EgressUpdate,
    ExecHealthCheck,
    HealthCheck,
    HealthCheckType,
    HttpHealthCheck,
    RestartMode,
    RestartPolicy,
    SnapshotPolicy,
    TcpHealthCheck,
    VolumeMount,
    WakeOn,
)
from hypeman.instances.model.validate import (
    changed_access,
    check_capturable,
    check_compression,
    check_create,
    check_mount_path,
    expiry,
    guest_env,
    usual_compression,
)
from tests.fakes.fake_vmm import ALL

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def check(capabilities: Capabilities = ALL, **body: Any) -> InstanceSpec:
    request = msgspec.convert({"name": "a", "image": "b", **body}, CreateInstanceRequest)
    return check_create(
        request,
        limits=LimitsConfig(),
        kind=HypervisorKind.QEMU,
        capabilities=capabilities,
        platform="linux/amd64",
    )


def test_defaults() -> None:
    spec = check()
    assert (spec.memory_bytes, spec.hotplug_bytes, spec.overlay_bytes, spec.vcpus) == (1 << 30, 0, 10 << 30, 2)
    assert (spec.disk_io_bps, spec.download_bps, spec.upload_bps) == (0, 0, 0)
    assert spec.network and spec.egress is None


def test_text_becomes_numbers() -> None:
    spec = check(size="1536MB", hotplug_size="1G", overlay_size="20GB", disk_io_bps="100MB/s", vcpus=16)
    assert (spec.memory_bytes, spec.hotplug_bytes, spec.overlay_bytes) == (1536 << 20, 1 << 30, 20 << 30)
    assert (spec.disk_io_bps, spec.vcpus) == (100 << 20, 16)
    rates = check(network={"bandwidth_download": "100mbps", "bandwidth_upload": "1MB/s"})
    assert (rates.download_bps, rates.upload_bps) == (12_500_000, 1 << 20)


def test_everything_that_is_requested_is_in_the_spec() -> None:
    policies: dict[str, Any] = {
        "snapshot_policy": {"standby_compression_delay": "5m"},
        "auto_standby": {"enabled": True},
        "health_check": {"type": "tcp", "tcp": {"port": 80}},
        "restart_policy": {"policy": "always"},
    }
    spec = check(
        size="1GB", hotplug_size="1GB", overlay_size="20MB", vcpus=3, disk_io_bps="5MB/s",
        env={"REAL": "x"}, credentials=CREDENTIAL, tags={"a": "b"}, entrypoint=["/init"], cmd=["x"], user="u",
        working_dir="/w", hostname="h", idle=True, devices=["d"], gpu={"profile": "p"},
        volumes=[{"volume_id": "v", "mount_path": "/v/", "readonly": True}], **policies,
        network={"bandwidth_download": "1MB/s", "bandwidth_upload": "2MB/s", "groups": ["g", "g"],
                 "egress": {"enabled": True, "default": "deny", "enforcement": {"mode": "http_https_only"}}},
    )  # fmt: skip
    assert spec == InstanceSpec(
        image="b",
        platform="linux/amd64",
        hypervisor=HypervisorKind.QEMU,
        vcpus=3,
        memory_bytes=1 << 30,
        hotplug_bytes=1 << 30,
        overlay_bytes=20 << 20,
        disk_io_bps=5 << 20,
        env={"REAL": "x"},
        credentials=msgspec.convert(CREDENTIAL, dict[str, CredentialPolicy]),
        tags={"a": "b"},
        network=True,
        download_bps=1 << 20,
        upload_bps=2 << 20,
        groups=("g",),
        egress=EgressEnforcementMode.HTTP_HTTPS_ONLY,
        access=EgressAccess(default=AccessDefault.DENY),
        devices=("d",),
        gpu_profile="p",
        volumes=(VolumeMount(volume_id="v", mount_path="/v", readonly=True),),
        entrypoint=("/init",),
        cmd=("x",),
        user="u",
        working_dir="/w",
        hostname="h",
        idle=True,
        snapshot_policy=SnapshotPolicy(standby_compression_delay="5m"),
        auto_standby=AutoStandbyPolicy(enabled=True),
        health_check=HealthCheck(type=HealthCheckType.TCP, tcp=TcpHealthCheck(port=80)),
        restart_policy=RestartPolicy(policy=RestartMode.ALWAYS),
    )
    assert check(skip_guest_agent=True).skip_guest_agent and not check(network={"enabled": False}).network
    same = {field.name for field in msgspec.structs.fields(InstanceSpec) if getattr(spec, field.name) == field.default}
    assert same == {"network", "skip_guest_agent", "auto_remove"}, "of every other field something is seen"
    assert check(auto_remove=True).auto_remove


CREDENTIAL = {"K": {"source": {"env": "REAL"}, "inject": [{"as": {"header": "X", "format": "${value}"}}]}}


def mounts(*mounts: dict[str, Any]) -> dict[str, Any]:
    """A body with volumes; each has id v and path /x unless it says otherwise."""
    return {"volumes": [{"volume_id": "v", "mount_path": "/x", **mount} for mount in mounts]}


TOO_HIGH = {"compression": {"enabled": True, "algorithm": "lz4", "level": 12}}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"name": "A"}, "invalid_request"),
        ({"image": ""}, "invalid_request"),
        ({"size": "1.5GB"}, "invalid_size"),
        ({"size": "1MB"}, "invalid_size"),
        ({"hotplug_size": "x"}, "invalid_hotplug_size"),
        ({"size": "20GB", "hotplug_size": "20GB"}, "invalid_request"),
        ({"overlay_size": "1KB"}, "invalid_overlay_size"),
        ({"overlay_size": "101GB"}, "invalid_overlay_size"),
        ({"vcpus": 17}, "invalid_request"),
        ({"disk_io_bps": "fast"}, "invalid_disk_io_bps"),
        ({"network": {"bandwidth_download": "0"}}, "invalid_bandwidth_download"),
        ({"network": {"bandwidth_upload": "fast"}}, "invalid_bandwidth_upload"),
        ({"env": {"A=B": "x"}}, "invalid_request"),
        ({"env": {"": "x"}}, "invalid_request"),
        ({"env": {"A": "x" * 600_000}}, "invalid_request"),
        ({"tags": {"k\n": "v"}}, "invalid_request"),
        ({"network": {"enabled": False, "egress": {"enabled": True}}}, "invalid_request"),
        ({"credentials": CREDENTIAL}, "invalid_request"),
        *(
            ({"credentials": {name: CREDENTIAL["K"]}, "env": {"REAL": "x"}, "network": {"egress": {"enabled": True}}},
             "invalid_request")
            for name in ("", "A=B", "A\0")
        ),
        ({"credentials": CREDENTIAL, "network": {"egress": {"enabled": True}}}, "invalid_request"),
        ({"snapshot_policy": TOO_HIGH}, "invalid_snapshot_policy"),
        ({"restart_policy": {"policy": "always", "backoff": "soon"}}, "invalid_restart_policy"),
        ({"restart_policy": {"policy": "always", "backoff": "0s"}}, "invalid_restart_policy"),
        ({"restart_policy": {"policy": "always", "stable_after": "-1s"}}, "invalid_restart_policy"),
        ({"health_check": {"type": "tcp"}}, "invalid_health_check"),
        ({"health_check": {"type": "http"}}, "invalid_health_check"),
        ({"health_check": {"type": "http", "http": {"port": 80, "path": "x"}}}, "invalid_health_check"),
        ({"health_check": {"type": "http", "http": {"port": 80, "path": "/ HTTP/1.1"}}}, "invalid_health_check"),
        ({"health_check": {"type": "exec"}}, "invalid_health_check"),
        ({"health_check": {"type": "none", "interval": "1ms"}}, "invalid_health_check"),
        ({"health_check": {"type": "none", "timeout": "0s"}}, "invalid_health_check"),
        ({"auto_standby": {"idle_timeout": "0s"}}, "invalid_auto_standby"),
        ({"auto_standby": {"ignore_source_cidrs": ["10.0.0.0/99"]}}, "invalid_auto_standby"),
        ({"auto_standby": {"ignore_source_cidrs": ["::/0"]}}, "invalid_auto_standby"),
        ({"restart_policy": {"max_attempts": 1_000_001}}, "invalid_restart_policy"),
        ({"health_check": {"failure_threshold": 1001}}, "invalid_health_check"),
        ({"health_check": {"success_threshold": 1001}}, "invalid_health_check"),
        ({"auto_standby": {"ignore_destination_ports": list(range(1, 99))}}, "invalid_auto_standby"),
        ({"snapshot_policy": {"standby_compression_delay": "soon"}}, "invalid_snapshot_policy"),
        (mounts({"overlay": True}), "invalid_request"),
        (mounts({"overlay": True, "readonly": True}), "invalid_overlay_size"),
        (mounts({"overlay": True, "readonly": True, "overlay_size": "much"}), "invalid_overlay_size"),
        (mounts({}, {"volume_id": "w", "mount_path": "/x/"}), "invalid_request"),
        (mounts({"mount_path": "/"}), "invalid_request"),
        (mounts({"mount_path": "/proc/sys", "files": True}), "invalid_request"),
        (mounts({"files": True, "readonly": True, "overlay": True, "overlay_size": "1GB"}), "invalid_request"),
        (mounts({}, {"mount_path": "/y"}), "invalid_request"),
        ({"volumes": [{"volume_id": f"v{n}", "mount_path": f"/d{n}"} for n in range(24)]}, "invalid_request"),
    ],
)  # fmt: skip
def test_refusals(body: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(**body)
    assert caught.value.code == code
    assert caught.value.message


def health(kind: str, **fields: Any) -> dict[str, Any]:
    return {"health_check": {"type": kind, **fields}}


def web(**fields: Any) -> dict[str, Any]:
    return health("http", http={"port": 80, **fields})


def words(count: int) -> dict[str, Any]:
    return health("exec", exec={"command": ["x"] * count})


@pytest.mark.parametrize(
    ("last", "beyond", "code"),
    [
        ({"size": "64MB"}, {"size": "62MB"}, "invalid_size"),
        ({"size": "16GB", "hotplug_size": "16GB"}, {"size": "16GB", "hotplug_size": "16386MB"}, "invalid_request"),
        ({"overlay_size": "16MB"}, {"overlay_size": "15MB"}, "invalid_overlay_size"),
        ({"overlay_size": "100GB"}, {"overlay_size": "102401MB"}, "invalid_overlay_size"),
        ({"vcpus": 16}, {"vcpus": 17}, "invalid_request"),
        ({"env": {"AB": "x" * ((512 << 10) - 4)}}, {"env": {"AB": "x" * ((512 << 10) - 3)}}, "invalid_request"),
        ({"env": {"A": "=\n"}}, {"env": {"A": "\0"}}, "invalid_request"),
        ({"env": {"A": ""}}, {"env": {"A\0": ""}}, "invalid_request"),
        ({"idle": True}, {"idle": True, "skip_guest_agent": True}, "invalid_request"),
        ({"ports": [{"host_port": 80, "guest_port": 80}]},
         {"ports": [{"host_port": 80, "guest_port": 80}], "network": {"enabled": False}}, "invalid_ports"),
        ({"network": {"groups": ["g"]}}, {"network": {"groups": ["g"], "enabled": False}}, "invalid_request"),
        ({"network": {"egress": {"enabled": True, "default": "deny"}}}, {"network": {"egress": {"default": "deny"}}},
         "invalid_request"),
        ({"snapshot_policy": {"standby_compression_delay": "0s"}},
         {"snapshot_policy": {"standby_compression_delay": "1"}}, "invalid_snapshot_policy"),
        (mounts({"overlay": True, "readonly": True, "overlay_size": "16MB"}),
         mounts({"overlay": True, "readonly": True, "overlay_size": "15MB"}), "invalid_overlay_size"),
        ({"volumes": [{"volume_id": f"v{n}", "mount_path": f"/d{n}"} for n in range(23)]},
         {"volumes": [{"volume_id": f"v{n}", "mount_path": f"/d{n}"} for n in range(24)]}, "invalid_request"),
        ({"restart_policy": {"max_attempts": 1_000_000}}, {"restart_policy": {"max_attempts": 1_000_001}},
         "invalid_restart_policy"),
        ({"restart_policy": {"backoff": "1ns", "stable_after": "0s"}}, {"restart_policy": {"backoff": "0s"}},
         "invalid_restart_policy"),
        (health("none", interval="100ms"), health("none", interval="99ms"), "invalid_health_check"),
        (health("none", timeout="300s"), health("none", timeout="301s"), "invalid_health_check"),
        (health("none", start_period="0s"), health("none", start_period="soon"), "invalid_health_check"),
        (health("none", failure_threshold=1000), health("none", failure_threshold=1001), "invalid_health_check"),
        (health("none", success_threshold=1000), health("none", success_threshold=1001), "invalid_health_check"),
        (web(path="/!~"), web(path="/\x7f"), "invalid_health_check"),
        (web(expected_status=300, expected_status_max=300), web(expected_status=300, expected_status_max=299),
         "invalid_health_check"),
        (words(64), words(65), "invalid_health_check"),
        (health("exec", exec={"command": ["x", ""]}), health("exec", exec={"command": ["", "x"]}),
         "invalid_health_check"),
        (words(1), health("exec", exec={"command": ["x\0"]}), "invalid_health_check"),
        (words(1), words(1) | {"skip_guest_agent": True}, "invalid_health_check"),
        (health("tcp", tcp={"port": 1}), health("tcp", tcp={"port": 1}) | {"network": {"enabled": False}},
         "invalid_health_check"),
        (web(), web() | {"network": {"enabled": False}}, "invalid_health_check"),
        ({"auto_standby": {"idle_timeout": "1ns"}}, {"auto_standby": {"idle_timeout": "0"}}, "invalid_auto_standby"),
        ({"auto_standby": {"ignore_destination_ports": list(range(1, 65))}},
         {"auto_standby": {"ignore_destination_ports": list(range(1, 66))}}, "invalid_auto_standby"),
        ({"auto_standby": {"ignore_source_cidrs": ["10.0.0.1/8"] * 64}},
         {"auto_standby": {"ignore_source_cidrs": ["10.0.0.1/8"] * 65}}, "invalid_auto_standby"),
        ({"size": "1GB"}, {"size": f"{(1 << 50) + 1}"}, "invalid_size"),
    ],
)  # fmt: skip
def test_the_last_that_is_accepted_and_the_first_that_is_refused(
    last: dict[str, Any], beyond: dict[str, Any], code: str
) -> None:
    able = msgspec.structs.replace(ALL, max_disks=64)
    check(able, **last)
    with pytest.raises(InvalidRequest) as caught:
        check(able, **beyond)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("check", "rules"),
    [
        (None, HealthRules()),
        (HealthCheck(), HealthRules()),
        (
            HealthCheck(type=HealthCheckType.TCP, tcp=TcpHealthCheck(port=22), interval="1m", timeout="5s"),
            HealthRules(type=HealthCheckType.TCP, port=22, interval=60, timeout=5),
        ),
        (
            HealthCheck(type=HealthCheckType.HTTP, http=HttpHealthCheck(port=80), start_period="1s"),
            HealthRules(type=HealthCheckType.HTTP, port=80, path="/", expected_status=200, start_period=1),
        ),
        (
            HealthCheck(
                type=HealthCheckType.HTTP,
                http=HttpHealthCheck(
                    port=443, path="/up", scheme="https", expected_status=204, expected_status_max=299
                ),
                failure_threshold=5,
                success_threshold=2,
            ),
            HealthRules(
                type=HealthCheckType.HTTP, port=443, path="/up", tls=True, expected_status=204,
                expected_status_max=299, failure_threshold=5, success_threshold=2,
            ),
        ),
        (
            HealthCheck(type=HealthCheckType.EXEC, exec=ExecHealthCheck(command=("a", "b"), working_dir="/srv")),
            HealthRules(type=HealthCheckType.EXEC, command=("a", "b"), working_dir="/srv"),
        ),
    ],
)  # fmt: skip
def test_a_health_check_with_its_defaults_filled_in(check: HealthCheck | None, rules: HealthRules) -> None:
    assert health_rules(check) == rules


@pytest.mark.parametrize(
    ("policy", "rules"),
    [
        (None, StandbyRules()),
        (AutoStandbyPolicy(), StandbyRules(idle_timeout=300)),
        (AutoStandbyPolicy(wake=WakeOn.ALL), StandbyRules(wake=WakeOn.ALL)),
        (AutoStandbyPolicy(enabled=True), StandbyRules(enabled=True, wake=WakeOn.TRAFFIC)),
        (AutoStandbyPolicy(enabled=True, wake=WakeOn.NONE), StandbyRules(enabled=True)),
        (
            AutoStandbyPolicy(
                idle_timeout="90s", ignore_source_cidrs=("10.1.2.3/8", "192.0.2.1"), ignore_destination_ports=(22, 22)
            ),
            StandbyRules(
                idle_timeout=90,
                ignored_sources=(IPv4Network("10.0.0.0/8"), IPv4Network("192.0.2.1/32")),
                ignored_ports=frozenset([22]),
            ),
        ),
    ],
)
def test_a_standby_policy_with_its_defaults_filled_in(policy: AutoStandbyPolicy | None, rules: StandbyRules) -> None:
    assert standby_rules(policy) == rules


@pytest.mark.parametrize(
    ("policy", "rules"),
    [
        (None, RestartRules()),
        (RestartPolicy(), RestartRules(mode=RestartMode.NEVER, backoff=5, max_attempts=0, stable_after=600)),
        (
            RestartPolicy(policy=RestartMode.ALWAYS, backoff="1m", max_attempts=3, stable_after="0s"),
            RestartRules(mode=RestartMode.ALWAYS, backoff=60, max_attempts=3, stable_after=0),
        ),
    ],
)
def test_a_restart_policy_with_its_defaults_filled_in(policy: RestartPolicy | None, rules: RestartRules) -> None:
    assert restart_rules(policy) == rules


@pytest.mark.parametrize(
    ("text", "words"), [("::/0", "is IPv6"), ("10.0.0.0/99", "is not an IPv4 network"), ("", "not an IPv4")]
)
def test_networks_that_are_none_are_named(text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        check(auto_standby={"ignore_source_cidrs": [text]})
    assert repr(text) in caught.value.message


@pytest.mark.parametrize("field", ["working_dir", "user", "hostname"])
def test_a_nul_is_refused_by_the_name_of_its_field(field: str) -> None:
    body: dict[str, Any] = {field: "/a\0b"}
    with pytest.raises(msgspec.ValidationError, match=field):
        check(**body)


@pytest.mark.parametrize(
    ("field", "policy"),
    [
        ("auto_standby", {}),
        ("auto_standby", {"enabled": False, "idle_timeout": "5m"}),
        ("health_check", {"type": "none"}),
        ("restart_policy", {"policy": "never", "max_attempts": 0}),
    ],
)
def test_a_policy_that_asks_for_nothing_is_kept(field: str, policy: dict[str, Any]) -> None:
    """Clients of the original send such defaults."""
    assert msgspec.to_builtins(getattr(check(ALL, **{field: policy}), field)) == policy


@pytest.mark.parametrize(
    ("body", "without"),
    [
        ({"hotplug_size": "1GB"}, {"hotplug_memory": False}),
        ({"devices": ["gpu"]}, {"pci_passthrough": False}),
        ({"gpu": {"profile": "p"}}, {"pci_passthrough": False}),
        ({"disk_io_bps": "1MB"}, {"disk_io_limit": False}),
        ({"volumes": [{"volume_id": "v", "mount_path": "/x"}]}, {"max_disks": 3}),
    ],
)
def test_what_the_vmm_cannot_do_is_refused_before_anything_happens(
    body: dict[str, Any], without: dict[str, Any]
) -> None:
    check(**body)
    with pytest.raises(NotSupported):
        check(msgspec.structs.replace(ALL, **without), **body)


def test_what_is_not_wanted_the_vmm_need_not_be_able_to_do() -> None:
    check(msgspec.structs.replace(ALL, hotplug_memory=False, pci_passthrough=False, disk_io_limit=False))
    overlay = mounts({"overlay": True, "readonly": True, "overlay_size": "16MB"})
    check(msgspec.structs.replace(ALL, max_disks=4), **mounts({}))
    check(msgspec.structs.replace(ALL, max_disks=5), **overlay)
    with pytest.raises(NotSupported, match="takes 4 disks, this instance needs 5"):
        check(msgspec.structs.replace(ALL, max_disks=4), **overlay)


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        ("/data", "/data"),
        ("/data/", "/data"),
        ("//data//x", "/data/x"),
        ("/home/a", "/home/a"),
        ("/var/lib/postgresql/data", "/var/lib/postgresql/data"),
        ("/etc/nginx", "/etc/nginx"),
        ("/usr/local", "/usr/local"),
        ("/root", "/root"),
        ("/tmp", "/tmp"),
        ("/run/app", "/run/app"),
        ("/" + "x" * 1023, "/" + "x" * 1023),
    ],
)
def test_mount_paths(path: str, normal: str) -> None:
    assert check_mount_path(path) == normal


@pytest.mark.parametrize(
    "path",
    [
        "",
        "data",
        "/",
        "//",
        "/etc",
        "/bin",
        "/lib",
        "/lib64",
        "/sbin",
        "//etc/",
        "/usr",
        "/data/../etc",
        "/a\0b",
        "/proc",
        "/dev/shm",
        "/sys/x",
        "/" + "x" * 1024,
    ],
)
def test_mount_paths_that_would_hide_the_system(path: str) -> None:
    with pytest.raises(InvalidRequest):
        check_mount_path(path)


@given(st.text(max_size=40))
def test_any_mount_path_is_normal_or_refused(path: str) -> None:
    try:
        normal = check_mount_path(path)
    except InvalidRequest:
        return
    assert normal.startswith("/") and ".." not in normal.split("/") and normal != "/"
    assert check_mount_path(normal) == normal


def test_expiry() -> None:
    assert expiry(None, None, now=NOW) is None
    assert expiry("0s", None, now=NOW) is None
    assert expiry("90m", None, now=NOW) == NOW + timedelta(minutes=90)
    assert expiry(None, NOW + timedelta(1), now=NOW) == NOW + timedelta(1)


@pytest.mark.parametrize(
    ("ttl", "at", "code"),
    [
        ("soon", None, "invalid_ttl"),
        ("1h", NOW + timedelta(1), "invalid_ttl"),
        (None, NOW, "invalid_expires_at"),
        (None, NOW - timedelta(1), "invalid_expires_at"),
        ("2562047h", None, None),
    ],
)
def test_expiry_refusals(ttl: str | None, at: datetime | None, code: str | None) -> None:
    if code is None:
        expiry(ttl, at, now=NOW)
        return
    with pytest.raises(InvalidRequest) as caught:
        expiry(ttl, at, now=NOW)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("algorithm", "level", "fine"),
    [("zstd", 1, True), ("zstd", 19, True), ("zstd", 0, False), ("lz4", 0, True), ("lz4", 10, False), (None, 19, True)],
)
def test_compression_levels(algorithm: str | None, level: int, fine: bool) -> None:
    config = SnapshotCompressionConfig(
        enabled=True, algorithm=CompressionAlgorithm(algorithm) if algorithm else None, level=level
    )
    if fine:
        assert check_compression(config) is config
    else:
        with pytest.raises(InvalidRequest) as caught:
            check_compression(config)
        assert caught.value.code == "invalid_snapshot_compression"


def test_the_level_of_a_compression_that_is_off_does_not_matter() -> None:
    off = SnapshotCompressionConfig(enabled=False, level=99)
    assert check_compression(off) is off


def test_the_compression_of_a_request_that_names_none() -> None:
    """The instance's policy, else the server's setting."""
    policy = SnapshotCompressionConfig(enabled=False)
    server = SnapshotsConfig(compression="lz4", level=3)
    assert usual_compression(check(snapshot_policy={"compression": {"enabled": False}}), server) == policy
    usual = SnapshotCompressionConfig(enabled=True, algorithm=CompressionAlgorithm.LZ4, level=3)
    assert usual_compression(check(snapshot_policy={}), server) == usual_compression(check(), server) == usual
    assert usual_compression(check(), SnapshotsConfig(compression="")) is None


@pytest.mark.parametrize(
    ("body", "able", "reason"),
    [
        ({}, {"standby": False}, "cannot save a VM"),
        ({"devices": ["gpu"]}, {}, "passed-through"),
        ({"gpu": {"profile": "p"}}, {}, "passed-through"),
        ({"skip_guest_agent": True}, {}, "without guest agent"),
    ],
)
def test_what_cannot_be_saved(body: dict[str, Any], able: dict[str, Any], reason: str) -> None:
    check_capturable(check(), ALL, "captured")
    with pytest.raises(NotSupported, match=f"{reason}.*captured"):
        check_capturable(check(**body), msgspec.structs.replace(ALL, **able), "captured")


def test_a_change_of_egress_keeps_what_it_does_not_name() -> None:
    rule = {"action": "allow", "hosts": ["a.b"]}
    everything = {"rules": [rule], "default": "deny", "observe": True, "private_networks": "closed"}
    spec = check(network={"egress": {"enabled": True, **everything}})
    assert spec.access is not None and msgspec.convert(everything, EgressAccess) == spec.access
    assert changed_access(spec, EgressUpdate()) == spec.access
    other: dict[str, Any] = {"rules": (), "default": AccessDefault.ALLOW, "observe": False, "private_networks": None}
    for field, value in other.items():
        changed = changed_access(spec, EgressUpdate(**{field: value}))
        assert changed == msgspec.structs.replace(spec.access, **{field: value}), field
    assert changed_access(spec, EgressUpdate(**other)) is None, "anywhere, as without access rules"
    with pytest.raises(InvalidRequest, match="not mediated"):
        changed_access(check(), EgressUpdate())


def test_no_network_is_opened_on_a_port_of_postgres() -> None:
    """The port ends in the proxy whatever the address, so the rule would do nothing."""
    use = {"hosts": ["db.test"], "ports": [6432], "as": {"postgres": {"user": "app"}}}
    network: dict[str, Any] = {"action": "allow", "networks": ["203.0.113.0/24"], "ports": [6432]}

    def created(rules: list[dict[str, Any]]) -> InstanceSpec:
        credentials = {"K": {"source": {"env": "REAL"}, "inject": [use]}}
        return check(
            env={"REAL": "s3cret"},
            credentials=credentials,
            network={"egress": {"enabled": True, "default": "deny", "rules": rules}},
        )

    spec = created([network | {"ports": [5432]}, network | {"protocol": "udp"}])
    with pytest.raises(InvalidRequest, match="tcp port 6432 belongs to the proxy"):
        created([network])
    with pytest.raises(InvalidRequest, match="tcp port 6432 belongs to the proxy"):
        changed_access(spec, msgspec.convert({"rules": [network]}, EgressUpdate))


def test_the_guest_sees_stand_ins() -> None:
    """Neither the real value nor its name, whatever the key is called."""
    spec = check(
        env={"PLAIN": "1", "REAL": "s3cret"},
        credentials=CREDENTIAL,
        network={"egress": {"enabled": True}},
    )
    env = guest_env(spec)
    assert env == {"PLAIN": "1", "K": "mock-K"}
    assert "s3cret" not in repr(env)


REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "size": st.text(max_size=8),
        "hotplug_size": st.text(max_size=8),
        "overlay_size": st.sampled_from(["1GB", "x", "-1", "99999999TB"]),
        "vcpus": st.integers(1, 40),
        "env": st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3),
        "tags": st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3),
        "volumes": st.lists(
            st.builds(
                dict,
                volume_id=st.text(max_size=4),
                mount_path=st.text(max_size=8),
                readonly=st.booleans(),
                overlay=st.booleans(),
            ),
            max_size=3,
        ),
    },
)


@given(REQUESTS)
def test_any_request_is_a_spec_or_a_clear_refusal(body: dict[str, Any]) -> None:
    try:
        spec = check(**body)
    except HypemanError as error:
        assert error.status in (400, 501) and error.message
    else:
        assert spec.memory_bytes % (2 << 20) == 0 and spec.memory_bytes > 0


def test_a_mount_is_echoed_as_given() -> None:
    mount = VolumeMount(volume_id="v", mount_path="/data", readonly=True)
    assert check(volumes=[{"volume_id": "v", "mount_path": "/data/", "readonly": True}]).volumes == (mount,)


def test_clients_of_the_contract_see_no_field_of_ours_in_a_mount() -> None:
    assert b"files" not in msgspec.json.encode(VolumeMount(volume_id="data", mount_path="/data"))
    assert b'"files":true' in msgspec.json.encode(VolumeMount(volume_id="data", mount_path="/", files=True))
