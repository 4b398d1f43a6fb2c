"""The whole guest on a real kernel, under QEMU without KVM: init, agent, disks, network and the end."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from hypeman.errors import HypemanError, InvalidRequest
from hypeman.guest.boot import BootConfig, CaCertificate, GuestNetwork, GuestVolume, parse_outcome
from hypeman.guest.client import GuestClient
from hypeman.guest.failures import GuestLost, GuestTimeout, VolumeBusy
from hypeman.guest.programs import ExecResult
from hypeman.guest.types import CopyEntry, CopyToRequest, ExecRequest, Exited, Fatal, GuestEvent, Ready, Started
from tests.conformance.check_guest import Bench, run_all
from tests.machine import COMPILER, MACHINE, busybox

from .conftest import TOP
from .qemu import Guest, make_overlay, run_guest
from .test_agent_exec import run

pytestmark = [pytest.mark.real, pytest.mark.slow]

MAC = "02:00:00:12:34:56"
NETWORK = GuestNetwork(mac=MAC, address="10.0.2.15", prefix=24, gateway="10.0.2.2", dns=("10.0.2.3",), mtu=1400)
NETDEV = ("-netdev", "user,id=n0", "-device", f"virtio-net-pci,netdev=n0,mac={MAC},romfile=,id=net0")
HOSTS = 60
PEM = "-----BEGIN CERTIFICATE-----\nbm90IHJlYWxseQ==\n-----END CERTIFICATE-----\n"


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with a kernel and an initrd that holds the agent of this tree."""
    if shutil.which(MACHINE.qemu) is None:
        pytest.skip(f"no {MACHINE.qemu} here")
    directory = tmp_path_factory.mktemp("kernel")
    environ = {**os.environ, "ARCH": MACHINE.name}
    made = subprocess.run(
        [TOP / "packaging/kernel/choose", directory], cwd=TOP, env=environ, capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip(f"no guest kernel: {made.stderr.strip()[-200:]}")
    return directory


@pytest.fixture(scope="session")
def busybox_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image in the manner of busybox: users, groups, an init, a CA bundle, a symlink that dangles."""
    tree = tmp_path_factory.mktemp("busybox")
    for directory in (
        "bin",
        "tmp",
        "etc/ssl/certs",
        "home/bob",
        "usr/local/share/ca-certificates",
        "var/lib",
        "data-link-target",
    ):
        (tree / directory).mkdir(parents=True)
    shutil.copy(busybox(), tree / "bin/busybox")
    for applet in subprocess.check_output(["/bin/busybox", "--list"], text=True).split():
        (tree / "bin" / applet).symlink_to("busybox") if applet != "busybox" else None
    (tree / "sbin").mkdir()
    (tree / "sbin/init").symlink_to("/bin/busybox")
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nbob:x:1000:1000:Bob:/home/bob:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\nbob:x:1000:\nvideo:x:44:alice,bob\n")
    (tree / "etc/resolv.conf").symlink_to("../run/nobody/resolv.conf")
    (tree / "etc/ssl/certs/ca-certificates.crt").write_text("roots of the image\n")
    (tree / "etc/inittab").write_text("::sysinit:/bin/echo init is up\n::respawn:/bin/sleep 1000\n")
    (tree / "etc/machine-id").write_text("")
    (tree / "data-link").symlink_to("/data-link-target")
    return make_erofs(tree, tmp_path_factory.mktemp("images") / "busybox.erofs")


@pytest.fixture(scope="session")
def scratch_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but one static program."""
    tree = tmp_path_factory.mktemp("scratch")
    source = tree.parent / "hello.c"
    source.write_text('#include <stdio.h>\nint main(int c, char **v) { printf("hello %s\\n", v[1]); return c; }\n')
    subprocess.run([COMPILER, "-static", "-O1", "-o", tree / "hello", source], check=True)
    return make_erofs(tree, tmp_path_factory.mktemp("images") / "scratch.erofs")


def make_erofs(tree: Path, image: Path) -> Path:
    tree.chmod(0o755)
    subprocess.run(["mkfs.erofs", "--quiet", "--all-root", image, tree], check=True, capture_output=True)
    return image


def boot_config(*argv: str, **fields: Any) -> BootConfig:
    return BootConfig(
        instance_id="test", hostname="box", nonce=secrets.token_bytes(16), argv=argv, env=("PATH=/bin",), **fields
    )


@pytest.fixture(scope="session")
def systemd_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Debian with systemd as its init, and Podman; made once (two minutes) and kept with the other test images."""
    kept = TOP / "build" / "test-images" / "debian-systemd-podman.erofs"
    if kept.exists():
        return kept
    if shutil.which("mmdebstrap") is None:
        pytest.skip("no mmdebstrap here")
    work = tmp_path_factory.mktemp("systemd")
    packages = "--include=systemd,systemd-sysv,dbus,podman,crun,netavark,iptables,busybox-static"
    command = ["mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", str(work / "root")]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no Debian to be had: {made.stderr.strip()[-200:]}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    make_erofs(work / "root", work / "root.erofs").replace(kept)
    shutil.rmtree(work)
    return kept


@asynccontextmanager
async def booted(config: BootConfig, root: Path, kernel: Path, tmp_path: Path, **options: Any) -> AsyncIterator[Guest]:
    async with run_guest(config, root, tmp_path, initrd=kernel / "initrd.cpio", **options) as guest:
        yield guest


async def collect_end(guest: Guest, client: GuestClient) -> list[GuestEvent]:
    """All events until the guest is off."""
    events: list[GuestEvent] = []
    with trio.fail_after(60):
        async for event in client.events:
            events.append(event)
            if isinstance(event, Exited):
                break
        await guest.wait_exit()
    return events


async def shell(client: GuestClient, script: str, **options: Any) -> str:
    result, out, err = await run(client, "sh", "-c", script, **options)
    assert result.exit_code == 0, err
    return out.decode()


async def test_a_whole_life(kernel: Path, busybox_root: Path, tmp_path: Path) -> None:
    """One guest with everything in its boot configuration, used in every way, to its orderly end."""
    big = "BIG=" + "v" * 12_000
    config = boot_config(
        "sh",
        "-c",
        "id; pwd; echo ${#BIG} $A; printf 'one\\ntwo\\r\\nthree'; echo; echo err >&2; "
        "while ! test -e /tmp/go; do sleep 0.1; done; exit 42",
        cwd="work/dir",
        user="bob",
        machine_id="0123456789abcdef0123456789abcdef",
        network=NETWORK,
        ca_certificates=(CaCertificate(pem=PEM, subject_hash="0a1b2c3d"),),
        volumes=(
            GuestVolume("v-rw", "/data/deep"),
            GuestVolume("v-ro", "/ro", readonly=True),
            GuestVolume("v-base", "/mixed", readonly=True, overlay_disk_id="v-layer"),
            GuestVolume("v-link", "/data-link/below"),
        ),
    )
    config = msgspec.structs.replace(config, env=("PATH=/bin", "A=b c", big))
    disks = [
        (name, make_overlay(tmp_path / name, "64M"), name == "v-ro")
        for name in ("v-rw", "v-ro", "v-base", "v-layer", "v-link")
    ]
    async with booted(config, busybox_root, kernel, tmp_path, disks=disks, extra=NETDEV) as guest:  # noqa: SIM117
        async with guest.connect() as client:
            assert client.ready is not None
            assert list(client.ready.phases_ms)[-1] == "ready"
            assert list(client.ready.phases_ms.values()) == sorted(client.ready.phases_ms.values())

            mounts = await shell(client, "cat /proc/mounts")
            for path, options in (
                ("/data/deep", "rw"),
                ("/ro", "ro"),
                ("/mixed", "rw"),
                ("/data-link-target/below", "rw"),
            ):
                [line] = [line for line in mounts.splitlines() if line.split()[1] == path]
                assert line.split()[3].split(",")[0] == options, line
            assert {"/proc", "/sys", "/dev", "/dev/pts", "/dev/shm", "/sys/fs/cgroup"} <= {
                line.split()[1] for line in mounts.splitlines()
            }
            await shell(client, "echo x > /data/deep/file; echo y > /mixed/file; ! touch /ro/file 2>/dev/null")

            assert (await shell(client, "hostname; cat /etc/hostname")).split() == ["box", "box"]
            assert "10.0.2.15\tbox" in await shell(client, "cat /etc/hosts")
            assert await shell(client, "cat /etc/resolv.conf") == "nameserver 10.0.2.3\n"
            assert (await shell(client, "cat /etc/machine-id")).strip() == config.machine_id
            address = await shell(client, "ip addr show eth0; ip route; cat /proc/sys/net/ipv6/conf/all/disable_ipv6")
            assert "10.0.2.15/24" in address
            assert "mtu 1400" in address
            assert "default via 10.0.2.2" in address
            assert address.endswith("1\n"), "IPv6 is closed"

            bundle = await shell(client, "cat /etc/ssl/certs/ca-certificates.crt")
            assert bundle == "roots of the image\n" + PEM
            assert await shell(client, "cat /etc/hypeman/ca-bundle.pem") == bundle
            assert await shell(client, "cat /etc/hypeman/ca.pem /etc/ssl/certs/0a1b2c3d.0") == PEM + PEM
            assert "hypeman" in await shell(client, "ls /usr/local/share/ca-certificates")

            _, out, _ = await run(client, "sh", "-c", "id; pwd; echo $A", user="bob:video")
            assert b"uid=1000(bob) gid=44(video)" in out
            assert b"/work/dir\nb c\n" in out
            await check_terminal(client)
            await check_copy(client)
            assert (await client.metrics()).memory_total > 100_000_000
            rss = int(await shell(client, "grep VmRSS /proc/1/status | tr -dc 0-9"))
            assert rss < 3000, f"init and agent use {rss} KB"
            await run(client, "touch", "/tmp/go")  # which may be killed with the rest before it has ended
            events = await collect_end(guest, client)
    assert [type(event) for event in events] == [Ready, Started, Exited]
    assert events[-1] == Exited(42)
    assert guest.console == (
        b"uid=1000(bob) gid=1000(bob) groups=44(video),1000(bob)\n/work/dir\n12000 b c\none\ntwo\r\nthree\nerr\n"
    ), "the log holds what was printed, byte for byte"
    assert parse_outcome(guest.boot_disk, config.nonce) == Exited(42)
    assert parse_outcome(guest.boot_disk, bytes(16)) is None
    for name in ("v-rw", "v-layer", "overlay.raw"):
        check = subprocess.run(["e2fsck", "-fn", tmp_path / name], capture_output=True, text=True)
        assert check.returncode == 0, check.stdout


async def check_clock(client: GuestClient) -> None:
    """The guest's clock is within 50 ms of ours, as far as the time that questions take lets us know."""
    sample, last = await client.read_clock(), client.last_correction
    assert last is not None
    assert abs(sample.behind) - sample.uncertainty < 50_000_000 + 2 * last.uncertainty, (sample, last)


async def check_terminal(client: GuestClient) -> None:
    output = b""
    async with await client.exec(ExecRequest(argv=("sh",), tty=True, rows=40, cols=90)) as session:
        await session.send_stdin(b"stty size; tty; exit 3\n")
        while not isinstance(got := await session.receive(), ExecResult):
            output += got.data
    assert got.exit_code == 3
    assert b"40 90" in output
    assert b"/dev/pts/" in output


async def check_copy(client: GuestClient, megabytes: int = 32) -> None:
    block = os.urandom(1_000_000)
    digest = hashlib.sha256()
    async with await client.copy_to(CopyToRequest(path="/tmp/a/big", mode=0o600, uid=1000, gid=0)) as copy:
        for _ in range(megabytes):
            await copy.send(block)
            digest.update(block)
        assert await copy.finish() == megabytes * 1_000_000
    back = hashlib.sha256()
    async with client.copy_from("/tmp/a") as tree:
        async for item in tree:
            if isinstance(item, CopyEntry):
                entry = item
            else:
                back.update(item)
    assert (entry.path, entry.mode, entry.uid, entry.gid) == ("a/big", 0o600, 1000, 0)
    assert back.digest() == digest.digest()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("kill -TERM $$", Exited(143, signal=15)),
        ("tail /dev/zero", Exited(137, signal=9, oom=True)),
        ("kill -KILL $$", Exited(137, signal=9, oom=False)),
    ],
)
async def test_ends_are_distinguished(
    kernel: Path, busybox_root: Path, tmp_path: Path, script: str, expected: Exited
) -> None:
    config = boot_config("sh", "-c", f"sleep 1; exec {script}" if script.startswith("tail") else f"sleep 1; {script}")
    async with booted(config, busybox_root, kernel, tmp_path, memory_mb=128) as guest, guest.connect() as client:
        assert (await collect_end(guest, client))[-1] == expected
    assert parse_outcome(guest.boot_disk, config.nonce) == expected


async def test_a_missing_program_is_reported_and_ends_the_guest(
    kernel: Path, busybox_root: Path, tmp_path: Path
) -> None:
    config = boot_config("no-such-program")
    async with booted(config, busybox_root, kernel, tmp_path) as guest, guest.connect() as client:
        events = await collect_end(guest, client)
    assert isinstance(events[-2], Fatal)
    assert "executable file not found" in events[-2].message
    assert events[-1] == Exited(127)
    assert Started() not in events
    assert b"executable file not found" in guest.console


async def test_a_guest_runs_without_a_host_on_its_channel(kernel: Path, busybox_root: Path, tmp_path: Path) -> None:
    """A host that is away does not keep a guest from ending, and reads the result from the disk."""
    config = boot_config("sh", "-c", "echo done; exit 9")
    async with booted(config, busybox_root, kernel, tmp_path) as guest:
        await guest.wait_exit()
    assert parse_outcome(guest.boot_disk, config.nonce) == Exited(9)
    assert guest.console == b"done\n"


async def test_a_broken_disk_is_reported_and_ends_the_guest(kernel: Path, busybox_root: Path, tmp_path: Path) -> None:
    (tmp_path / "overlay.raw").write_bytes(bytes(1 << 20))
    config = boot_config("sleep", "1000")
    async with booted(config, busybox_root, kernel, tmp_path) as guest:
        client = GuestClient(await guest.open_channel(), nonce=config.nonce)
        events: list[GuestEvent] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ignore_end, client)
            with trio.fail_after(60):
                async for event in client.events:
                    events.append(event)
                await guest.wait_exit()
    [fatal] = [event for event in events if isinstance(event, Fatal)]
    assert fatal.message.startswith('cannot mount disk "overlay"')
    assert b'cannot mount disk "overlay"' in guest.console


async def _ignore_end(client: GuestClient) -> None:
    try:
        await client.run()
    except HypemanError:
        return


async def test_an_image_of_one_static_program(kernel: Path, scratch_root: Path, tmp_path: Path) -> None:
    """No shell, no /etc, no /proc directory, writes in memory."""
    config = boot_config("/hello", "world", overlay=False)
    async with booted(config, scratch_root, kernel, tmp_path) as guest:
        await guest.wait_exit()
    assert guest.console == b"hello world\n"
    assert parse_outcome(guest.boot_disk, config.nonce) == Exited(2)


async def test_shutdown_with_grace_then_by_force(kernel: Path, busybox_root: Path, tmp_path: Path) -> None:
    gentle, stubborn = tmp_path / "gentle", tmp_path / "stubborn"
    for directory, trap, expected in (
        (gentle, "trap 'echo bye; exit 5' INT", Exited(5)),
        (stubborn, "trap '' INT", Exited(137, signal=9)),
    ):
        directory.mkdir()
        config = boot_config("sh", "-c", f"{trap}; echo up; while :; do sleep 0.05; done", stop_signal=2)
        async with booted(config, busybox_root, kernel, directory) as guest, guest.connect() as client:
            with trio.fail_after(60):
                while b"up\n" not in guest.console:
                    await trio.sleep(0.02)
            await client.shutdown(grace_seconds=30 if directory is gentle else 0.5)
            assert (await collect_end(guest, client))[-1] == expected
    assert (gentle / "console.log").read_bytes() == b"up\nbye\n"


async def test_halt_ends_the_vm(kernel: Path, busybox_root: Path, tmp_path: Path) -> None:
    """On our kernel at once; on a distribution's the guest falls silent, which is reported."""
    config = boot_config("sleep", "1000")
    async with booted(config, busybox_root, kernel, tmp_path) as guest, guest.connect() as client:
        with pytest.raises((GuestLost, GuestTimeout)):
            await shell(client, "halt -f; sleep 1000")
        if (kernel / "release").read_text().strip().endswith("-hypeman"):
            await guest.wait_exit()
        else:
            assert client.silent_since is not None


async def test_a_kernel_that_stopped_is_silent(kernel: Path, busybox_root: Path, tmp_path: Path) -> None:
    """It has panicked and does not reset: its processor spins, its devices are there, nothing answers."""
    config = boot_config("sleep", "1000")
    async with booted(config, busybox_root, kernel, tmp_path) as guest, guest.connect() as client:
        with pytest.raises(GuestTimeout):
            await shell(client, "echo 0 > /proc/sys/kernel/panic; echo c > /proc/sysrq-trigger")
        assert client.silent_since is not None
        with pytest.raises(GuestTimeout, match="has not responded since"):
            await client.freeze()
        assert guest.process.returncode is None


async def test_a_fork_bomb_does_not_silence_the_agent(kernel: Path, busybox_root: Path, tmp_path: Path) -> None:
    """Until there is neither memory nor a process number: requests may fail, the agent answers or is silent."""
    config = boot_config("sh", "-c", "b() { b | b & }; b; sleep 1000")
    async with booted(config, busybox_root, kernel, tmp_path) as guest, guest.connect() as client:
        outcomes = []
        for _ in range(3):
            try:
                await client.stat("/")
                outcomes.append("answered")
            except HypemanError as error:
                outcomes.append(type(error).__name__)
        assert len(outcomes) == 3, "each request ended"
        assert guest.process.returncode is None


async def test_an_init_is_process_1_of_its_own(kernel: Path, busybox_root: Path, tmp_path: Path) -> None:
    config = boot_config("/sbin/init")
    async with booted(config, busybox_root, kernel, tmp_path) as guest, guest.connect() as client:
        assert "init" in (await shell(client, "cat /proc/1/comm"))
        assert "hypeman" not in await shell(client, "ps")
        await shell(client, "mount -t tmpfs tmpfs /mnt 2>/dev/null || mkdir /mnt && mount -t tmpfs tmpfs /mnt")
        async with await client.copy_to(CopyToRequest(path="/tmp/x")) as copy:
            await copy.send(b"seen")
            await copy.finish()
        assert await shell(client, "cat /tmp/x") == "seen"
        await run(client, "sh", "-c", "kill -9 1; kill -9 -1")
        assert "init" in (await shell(client, "cat /proc/1/comm")), "neither init nor agent can be killed"
        await shell(client, "poweroff")
        assert (await collect_end(guest, client))[-1] == Exited(0)
    assert b"init is up" in guest.console


async def test_systemd_is_at_home(kernel: Path, systemd_root: Path, tmp_path: Path) -> None:
    """And runs containers, on an overlay on the volume that an image for Podman declares."""
    config = boot_config("/sbin/init", volume_dirs=("/var/lib/containers",))
    config = msgspec.structs.replace(config, env=("PATH=/usr/bin:/bin:/usr/sbin:/sbin",))
    make_overlay(tmp_path / "overlay.raw", "512M")
    async with booted(config, systemd_root, kernel, tmp_path, memory_mb=512) as guest, guest.connect() as client:
        state = ""
        with trio.fail_after(200):
            while state not in ("running", "degraded"):
                _, out, _ = await run(client, "systemctl", "is-system-running", "--wait", timeout_seconds=15)
                state = out.decode().strip()
        failed = await shell(client, "systemctl --failed --no-legend --no-pager --plain")
        assert not failed, failed
        assert "systemd" in await shell(client, "cat /proc/1/comm")
        await shell(client, "systemctl is-active dbus; echo x > /tmp/in-its-own-tmp")
        assert (await client.stat("/tmp/in-its-own-tmp")).exists
        await check_podman(client)
        await client.freeze()
        await client.thaw()
        await client.shutdown(grace_seconds=100)
        with trio.fail_after(120):
            async for event in client.events:
                if isinstance(event, Exited):
                    break
            await guest.wait_exit()
        assert event == Exited(0)
    assert b"Halting system." in guest.console, "in order, not by force"


async def check_podman(client: GuestClient) -> None:
    """A container with a network and limits of its own, made without a registry."""
    script = """
        mkdir -p /root/tree/bin && cp /bin/busybox /root/tree/bin/ && ln -s busybox /root/tree/bin/sh
        tar -C /root/tree -c . | podman import - tree
        podman info --format '{{.Store.GraphDriverName}} {{.Host.CgroupsVersion}}'
        podman run --rm --memory 32m tree sh -c 'busybox hostname -i; busybox cat /sys/fs/cgroup/memory.max'
    """
    async with await client.exec(ExecRequest(argv=("sh", "-ec", script), timeout_seconds=200)) as session:
        output = b""
        while not isinstance(got := await session.receive(), ExecResult):
            output += got.data
    assert got.exit_code == 0, output
    assert b"overlay v2\n" in output and output.endswith(b"\n33554432\n"), output


async def test_hosts_come_and_go(kernel: Path, busybox_root: Path, tmp_path: Path) -> None:
    """A server that is restarted, also in the middle of a transfer: the next one is served, and gets all events."""
    config = boot_config("sleep", "1000")
    async with booted(config, busybox_root, kernel, tmp_path) as guest:
        for round_number in range(6):
            async with guest.connect() as client:
                assert await shell(client, f"echo {round_number}") == f"{round_number}\n"
                assert isinstance(await client.events.receive(), Ready)
                async with await client.exec(ExecRequest(argv=("yes",))) as flood:
                    await flood.receive()
                    copy = await client.copy_to(CopyToRequest(path="/tmp/cut"))
                    with trio.move_on_after(0.05 * round_number):
                        while True:
                            await copy.send(bytes(100_000))
        async with guest.connect() as client:
            assert await shell(client, "ls -A /tmp; ps | grep '[y]es' || true") == ""


class Qmp:
    """Just enough to plug a disk."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = b""

    async def _line(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._buffer += await self._stream.receive_some(65536)
        line, self._buffer = self._buffer.split(b"\n", 1)
        parsed: dict[str, Any] = json.loads(line)
        return parsed

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def command(self, name: str, **arguments: Any) -> None:
        await self._stream.send_all(json.dumps({"execute": name, "arguments": arguments}).encode())
        while True:
            answer = await self._line()
            assert "error" not in answer, answer
            if "return" in answer:
                return


async def test_every_host_is_answered(kernel: Path, busybox_root: Path, tmp_path: Path) -> None:
    """A host's first bytes may reach the agent before the word that a host is there, and must not be lost."""
    config = boot_config("sleep", "1000")
    async with booted(config, busybox_root, kernel, tmp_path) as guest:
        for turn in range(HOSTS):
            client = GuestClient(await guest.open_channel(), nonce=config.nonce)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_ignore_end, client)
                with trio.move_on_after(30) as limit:
                    await client.wait_ready()
                assert not limit.cancelled_caught, f"host {turn} got no answer"
                nursery.cancel_scope.cancel()
            await trio.sleep(turn % 10 * 0.02)


async def test_volumes_come_and_go_and_identity_changes(kernel: Path, busybox_root: Path, tmp_path: Path) -> None:
    volume = make_overlay(tmp_path / "hot.raw", "64M")
    config = boot_config("sh", "-c", "i=0; while :; do i=$((i+1)); echo $i > /tmp/count; done", network=NETWORK)
    async with booted(config, busybox_root, kernel, tmp_path, extra=NETDEV) as guest:
        async with guest.connect() as client:
            qmp = Qmp(await trio.open_unix_socket(str(tmp_path / "qmp.sock")))
            await qmp.command("qmp_capabilities")
            await qmp.command(
                "blockdev-add", driver="raw", **{"node-name": "hot"}, file={"driver": "file", "filename": str(volume)}
            )
            await qmp.command("device_add", driver="virtio-blk-pci", id="hotd", drive="hot", serial="v-hot", bus="rp1")
            await qmp.aclose()
            await client.mount_volume(GuestVolume("v-hot", "/vol/hot"))
            holder = await client.exec(
                ExecRequest(argv=("sh", "-c", "cd /vol/hot; echo x > kept; echo here; sleep 1000"))
            )
            await holder.receive()
            with pytest.raises(VolumeBusy) as busy:
                await client.unmount_volume("/vol/hot")
            assert "(sleep)" in busy.value.holders[0]
            assert await shell(client, "cat /vol/hot/kept") == "x\n", "a refused detach loses nothing"
            await holder.aclose()
            with trio.fail_after(20):
                while True:
                    try:
                        await client.unmount_volume("/vol/hot")
                        break
                    except VolumeBusy:
                        await trio.sleep(0.05)
            await client.unmount_volume("/vol/hot")
            check = subprocess.run(["e2fsck", "-fn", volume], capture_output=True, text=True)
            assert check.returncode == 0, check.stdout

            await client.freeze()
            first = await client.stat("/tmp/count")
            assert first.exists
            frozen = [data async for data in _read(client, "/tmp/count")]
            assert frozen == [data async for data in _read(client, "/tmp/count")]
            await client.thaw()
            await shell(client, "hostname mine")
            await client.set_identity(hostname=config.hostname, network=NETWORK, entropy=secrets.token_bytes(64))
            reported = await shell(client, "hostname; ip addr show eth0")
            assert reported.startswith("mine\n"), "a guest that stays who it was is left alone"
            assert "10.0.2.15/24" in reported
            other = GuestNetwork(mac="02:00:00:65:43:20", address="10.0.2.76", prefix=16, gateway="10.0.2.2")
            with pytest.raises(InvalidRequest, match="host name"):
                await client.set_identity(hostname="x" * 100, network=other)
            await client.set_identity(hostname=config.hostname, network=NETWORK)
            assert "10.0.2.15/24" in await shell(client, "ip addr show eth0"), "what failed halfway is made good"
            await client.freeze()
            frozen = [data async for data in _read(client, "/tmp/count")]

            new_nonce = secrets.token_bytes(16)
            await client.set_identity(
                hostname="fork",
                machine_id="f" * 32,
                network=GuestNetwork(mac="02:00:00:65:43:21", address="10.0.2.77", prefix=16, gateway="10.0.2.2"),
                entropy=secrets.token_bytes(64),
                clock_ns=1_800_000_000_000_000_000,  # as if it came late; the clock is corrected before the thaw
                nonce=new_nonce,
            )
            await client.thaw()
            reported = await shell(client, "hostname; cat /etc/machine-id; ip addr show eth0; ip route; cat /etc/hosts")
            assert reported.startswith("fork\n" + "f" * 32)
            assert "02:00:00:65:43:21" in reported
            assert "10.0.2.77/16" in reported
            assert "10.0.2.15" not in reported
            assert "default via 10.0.2.2" in reported
            await check_clock(client)
            with trio.fail_after(20):
                while frozen == [(await shell(client, "cat /tmp/count")).encode()]:
                    await trio.sleep(0.05)
        guest.config = msgspec.structs.replace(config, nonce=new_nonce)
        async with guest.connect() as client:
            assert await shell(client, "hostname") == "fork\n", "the next host knows the new nonce"


async def test_memory_that_is_plugged_in_is_used(kernel: Path, busybox_root: Path, tmp_path: Path) -> None:
    """Asked again and again while the kernel brings the same blocks up by itself."""
    plug: tuple[str, ...] = ("-m", "256M,slots=2,maxmem=2G", "-object", "memory-backend-ram,id=hot,size=512M")
    plug += ("-device", "virtio-mem-pci,id=plug,memdev=hot,requested-size=0")
    config = boot_config("sleep", "1000")
    async with booted(config, busybox_root, kernel, tmp_path, extra=plug) as guest, guest.connect() as client:
        before = await client.online_memory()
        qmp = Qmp(await trio.open_unix_socket(str(tmp_path / "qmp.sock")))
        await qmp.command("qmp_capabilities")
        size: Any = {"path": "/machine/peripheral/plug", "property": "requested-size", "value": 256 << 20}
        await qmp.command("qom-set", **size)
        with trio.fail_after(60):
            while await client.online_memory() < before + (250 << 20):
                pass
        await qmp.aclose()


async def _read(client: GuestClient, path: str) -> AsyncIterator[bytes]:
    async with client.copy_from(path) as tree:
        async for item in tree:
            if isinstance(item, bytes):
                yield item


async def test_a_real_guest_is_what_the_fake_one_pretends(kernel: Path, busybox_root: Path, tmp_path: Path) -> None:
    """The suite of tests/conformance/check_guest.py, which the fake guest of the crash matrix passes as well."""
    disk = make_overlay(tmp_path / "extra.raw", "32M")
    script = "(while :; do date >> /tmp/tick; done) & exec sleep 100000"
    config = boot_config("sh", "-c", script, stop_signal=15)
    async with (
        booted(config, busybox_root, kernel, tmp_path, disks=[("v-one", disk, False)]) as guest,
        guest.connect() as client,
    ):

        async def is_frozen() -> bool:
            before = await client.stat("/tmp/tick")
            await trio.sleep(0.5)
            return before.size == (await client.stat("/tmp/tick")).size

        async def hostname() -> str:
            return (await shell(client, "hostname")).strip()

        @asynccontextmanager
        async def busy(path: str) -> AsyncIterator[None]:
            request = ExecRequest(argv=("sh", "-c", f"cd {path}; echo here; sleep 1000"))
            async with await client.exec(request) as user:
                await user.receive()
                yield

        bench = Bench(client, disk="v-one", is_frozen=is_frozen, hostname=hostname, busy=busy, wait_off=guest.wait_exit)
        with trio.fail_after(60):
            while not (await client.stat("/tmp/tick")).exists:
                await trio.sleep(0.05)
        await run_all(bench)
