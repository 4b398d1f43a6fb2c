"""The boot disk: what Python writes the guest's own parser reads back, field by field."""

from __future__ import annotations

import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypeman.errors import InvalidRequest
from hypeman.guest.boot import (
    UNLIMITED,
    BootConfig,
    CaCertificate,
    GuestNetwork,
    GuestVolume,
    Pid1,
    Ulimit,
    check_disk_id,
    parse_outcome,
    render_boot_disk,
)
from hypeman.guest.fields import FieldWriter, Tag
from hypeman.guest.types import Exited, Fatal

from .conftest import TOP

AGENT = TOP / "ext" / "guest_agent"
NONCE = bytes(range(16))

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\x1f"), max_size=30)
configs = st.builds(
    BootConfig,
    instance_id=text,
    hostname=text,
    nonce=st.binary(min_size=16, max_size=16),
    argv=st.lists(text, max_size=8).map(tuple),
    env=st.lists(text, max_size=8).map(tuple),
    cwd=text,
    user=text,
    root_fs=st.sampled_from(["erofs", "ext4"]),
    overlay=st.booleans(),
    volumes=st.lists(
        st.builds(
            GuestVolume,
            disk_id=st.just("v-1"),
            path=text.map(lambda p: "/" + p),
            readonly=st.booleans(),
            files=st.booleans(),
        ),
        max_size=4,
    ).map(tuple),
    network=st.none()
    | st.builds(
        GuestNetwork,
        mac=st.just("02:00:00:aa:bb:cc"),
        address=st.just("10.1.2.3"),
        prefix=st.integers(0, 32),
        gateway=st.sampled_from(["", "10.1.0.1"]),
        mtu=st.integers(0, 65535),
    ),
    ca_certificates=st.lists(st.builds(CaCertificate, pem=text), max_size=2).map(tuple),
    stop_signal=st.integers(1, 64),
    grace_seconds=st.integers(0, 1000).map(float),
    skip_agent=st.booleans(),
    clock_ns=st.integers(0, 2**63),
    console=text,
    volume_dirs=st.lists(text, max_size=3).map(tuple),
    pid1=st.sampled_from(Pid1),
    shm_bytes=st.integers(0, 2**50),
    sysctls=st.lists(text, max_size=3).map(tuple),
    ulimits=st.lists(
        st.builds(Ulimit, st.integers(0, 15), st.integers(0, UNLIMITED), st.integers(0, UNLIMITED)), max_size=3
    ).map(tuple),
)


@pytest.fixture(scope="module")
def dump_boot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest's parser behind a main that prints what it understood."""
    program = tmp_path_factory.mktemp("dump") / "dump_boot"
    sources = [
        Path(__file__).with_name("dump_boot.c"),
        *(AGENT / name for name in ("boot_config.c", "fields.c", "bytes.c")),
    ]
    subprocess.run(["gcc", "-std=c11", "-Wall", "-Werror", "-I", AGENT, "-o", program, *sources], check=True)
    return program


def expected(config: BootConfig) -> list[str]:
    """What the guest prints of it."""
    network = config.network
    return [
        *(f"{name}={value}" for name, value in (
            ("instance_id", config.instance_id), ("hostname", config.hostname), ("nonce", config.nonce.hex()),
            ("cwd", config.cwd), ("user", config.user), ("root_fs", config.root_fs), ("console", config.console),
            ("numbers", f"{config.overlay:d} {config.stop_signal} {config.grace_seconds * 1000:.0f} "
             f"{config.skip_agent:d} {config.power_off_by_reset:d} {config.clock_ns}"),
        )),
        *(f"arg={argument}" for argument in config.argv),
        *(f"env={variable}" for variable in config.env),
        *(
            f"volume={volume.disk_id} {volume.path} {volume.fs_type} {volume.readonly:d} {volume.files:d}"
            for volume in config.volumes
        ),
        *(f"ca={ca.pem}" for ca in config.ca_certificates),
        *([] if network is None else [
            f"network={network.address}/{network.prefix} {network.gateway or '0.0.0.0'} {network.mtu}"]),
        f"guest={config.pid1:d} {config.shm_bytes}",
        *(f"volume_dir={path}" for path in config.volume_dirs),
        *(f"sysctl={sysctl}" for sysctl in config.sysctls),
        *(f"ulimit={limit.resource} {limit.soft} {limit.hard}" for limit in config.ulimits),
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_guest_reads_what_the_host_wrote(dump_boot: Path, data: st.DataObject) -> None:
    config = data.draw(configs)
    disk = render_boot_disk(config)
    assert len(disk) % 4096 == 0
    completed = subprocess.run([dump_boot], input=disk, capture_output=True, check=True).stdout
    assert completed.decode().split("\x1f")[:-1] == expected(config)


def test_torn_and_foreign_disks_are_refused(dump_boot: Path) -> None:
    disk = render_boot_disk(BootConfig("id", "host", NONCE, ("sh",)))
    length = struct.unpack_from("<I", disk, 12)[0]
    for place in (0, 8, 12, 16, 24, 24 + length - 1):
        broken = bytearray(disk)
        broken[place] ^= 0xFF
        assert subprocess.run([dump_boot], input=bytes(broken), capture_output=True).returncode != 0, place
    for cut in (0, 10, 30, 24 + length - 1):
        assert subprocess.run([dump_boot], input=disk[:cut], capture_output=True).returncode != 0, cut


@pytest.mark.parametrize(
    "fields",
    [
        {"nonce": b"short"},
        {"argv": ("a\0b",)},
        {"env": ("x" * 2_000_000,)},
        {"argv": ("a",) * 9000},
        {"volumes": (GuestVolume("much-too-long-for-a-serial-number", "/v"),)},
        {"network": GuestNetwork("no mac", "10.0.0.1", 24)},
        {"network": GuestNetwork("02:00:00:00:00:01", "10.0.0.300", 24)},
        {"clock_ns": -1},
        {"volume_dirs": ("/v",) * 257},
        {"sysctls": ("a.b=1",) * 65},
        {"ulimits": (Ulimit(7, 1, 1),) * 17},
    ],
)
def test_what_no_guest_could_take_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        render_boot_disk(BootConfig(**{"instance_id": "i", "hostname": "h", "nonce": NONCE, "argv": (), **fields}))  # type: ignore[arg-type]


def test_disk_ids_have_twenty_bytes() -> None:
    assert check_disk_id("x" * 20) == "x" * 20
    for bad in ("", "x" * 21, "ü" * 11):
        with pytest.raises(ValueError, match="20 bytes"):
            check_disk_id(bad)


def outcome(event: bytes, nonce: bytes = NONCE) -> bytes:
    """A boot disk with an outcome as the guest writes it."""
    disk = bytearray(render_boot_disk(BootConfig("id", "host", NONCE, ("sh",))))
    record = nonce + event
    offset = struct.unpack_from("<I", disk, 20)[0]
    struct.pack_into("<8sII", disk, offset, b"HYPEOVER", len(record), zlib.crc32(record))
    disk[offset + 16 : offset + 16 + len(record)] = record
    return bytes(disk)


def test_outcomes() -> None:
    exited = b"\3" + FieldWriter().u32(Tag.EXIT_CODE, 137).u32(Tag.SIGNAL, 9).flag(Tag.OOM, True).render()
    fatal = b"\4" + FieldWriter().text(Tag.MESSAGE, "no disk").render()
    assert parse_outcome(outcome(exited), NONCE) == Exited(137, 9, True)
    assert parse_outcome(outcome(fatal), NONCE) == Fatal("no disk")
    for worthless in (outcome(exited, bytes(16)), outcome(b"\1"), outcome(b"\3\1"), outcome(b""), b"", bytes(8192)):
        assert parse_outcome(worthless, NONCE) is None
    good = outcome(exited)
    for cut in range(0, len(good), 97):
        assert parse_outcome(good[:cut], NONCE) is None


@given(st.binary(max_size=200), st.integers(0, 8000))
def test_any_bytes_are_no_outcome_or_one(noise: bytes, place: int) -> None:
    disk = bytearray(outcome(b"\3" + FieldWriter().u32(Tag.EXIT_CODE, 1).render()))
    disk[place : place + len(noise)] = noise
    assert isinstance(parse_outcome(bytes(disk), NONCE), Exited | Fatal | None)
