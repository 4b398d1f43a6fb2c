"""The drivers of Cloud Hypervisor and Firecracker against programs that answer like them.

That shows what is ours: processes, users, descriptors, run directories, loans, captures, the guest's way in.
Whether the real ones take these requests is asked of their published documents, where the folder that
holds them is named by HYPEMAN_VMM_SPECS, and of themselves, where they and KVM are present.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing
import yaml

from hypeman.architecture import AMD64, ARM64
from hypeman.errors import InvalidRequest, NotSupported
from hypeman.host.processes import Process, Processes
from hypeman.hypervisor.cloud_hypervisor import config as cloud
from hypeman.hypervisor.cloud_hypervisor import files
from hypeman.hypervisor.cloud_hypervisor.driver import CloudHypervisorDriver
from hypeman.hypervisor.cloud_hypervisor.vmm import Event, parse_events, room_of
from hypeman.hypervisor.firecracker import config as fire
from hypeman.hypervisor.firecracker.driver import FirecrackerDriver
from hypeman.hypervisor.firecracker.jail import room_of as jail_of
from hypeman.hypervisor.interface import Disk, Driver, ExitReason, LaunchFailed, Nic, PciDevice, VmConfig, Vmm, VmmExit
from hypeman.hypervisor.kvm import KvmProof
from hypeman.hypervisor.run_dir import API_SOCKET
from hypeman.hypervisor.unix_http import UnixHttp
from tests.conformance.check_driver import CHECKS, Check, Guest, check_driver, ending
from tests.hypervisor.conftest import MakeConfig, config_maker

_PROGRAM = Path(__file__).parents[1] / "fakes" / "remote_vmm.py"
_PYTHON = "/usr/bin/python3"
KINDS = ("cloud-hypervisor", "firecracker")

Make = Callable[[str], Driver]


@pytest.fixture
async def make_driver(folder: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A probed driver by kind, with the program that answers like its VMM."""
    if not os.access(_PYTHON, os.X_OK):
        pytest.skip(f"no {_PYTHON} that every user can run")

    async def open_tap(name: str) -> int:
        return os.open("/dev/null", os.O_RDWR)

    monkeypatch.setattr(files, "files_of", lambda binary: (binary, "/usr", "/lib", "/lib64"))  # what Python needs
    binaries = {}
    programs = folder / "programs"
    programs.mkdir()
    programs.chmod(0o755)
    for kind in (*KINDS, "jailer"):
        binaries[kind] = programs / kind
        binaries[kind].write_text(f"#!{_PYTHON} -IS\n" + _PROGRAM.read_text())
        binaries[kind].chmod(0o755)

    class Proved(KvmProof):
        async def why_not_as_root(self) -> str:
            return ""

    kvm = Proved(processes, kernel="")
    drivers: dict[str, Driver] = {}
    for kind in KINDS:
        binary = binaries[kind]
        driver: CloudHypervisorDriver | FirecrackerDriver
        if kind == "cloud-hypervisor":
            folders = (str(folder),)
            driver = CloudHypervisorDriver(processes, open_tap, kvm=kvm, binary=str(binary), folders=folders)
        else:
            driver = FirecrackerDriver(processes, kvm=kvm, binary=str(binary))
        assert (await driver.probe()).available
        drivers[kind] = driver
    return lambda kind: drivers[kind]


@pytest.fixture
def make_config(folder: Path) -> MakeConfig:
    """Configs whose directories their users may enter, and whose capture directories may be written."""
    kernel = folder / "vmlinux"
    kernel.write_bytes(b"kernel")
    kernel.chmod(0o600)
    made = config_maker(folder, kernel, None)

    def make(name: str) -> VmConfig:
        config = made(name)
        for disk in config.disks:
            Path(disk.path).chmod(0o600)
        return config

    return make


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", KINDS)
async def test_conformance(kind: str, check: Check, make_driver: Make, make_config: MakeConfig, folder: Path) -> None:
    captures = folder / "captures"
    captures.mkdir(mode=0o711)
    await check_driver(check, lambda: make_driver(kind), make_config, captures, captures / "warm")


async def test_what_the_vmm_said_is_in_the_error(make_driver: Make, make_config: MakeConfig) -> None:
    for kind in KINDS:
        config = make_config(kind)
        with pytest.raises(LaunchFailed, match="No such file"):
            await make_driver(kind).launch(msgspec.structs.replace(config, kernel="/no/such/kernel"))


async def test_a_console_that_cannot_be_reopened_is_rotated(make_driver: Make, make_config: MakeConfig) -> None:
    for kind in KINDS:
        config = make_config(kind)
        async with ending(await make_driver(kind).launch(config)) as vmm:
            log = Path(config.console_log)
            log.write_bytes(b"old\n")
            inode = log.stat().st_ino
            log.rename(log.with_suffix(".log.1"))
            await vmm.rotate_console()
            assert log.read_bytes() == b"" and log.stat().st_ino == inode
            assert log.with_suffix(".log.1").read_bytes() == b"old\n"


async def test_a_guest_of_firecracker_is_reached_after_a_save_that_never_came(
    make_driver: Make, make_config: MakeConfig
) -> None:
    """The server that had it paused was killed then; the next one lets it go on."""
    driver, config = make_driver("firecracker"), make_config("one")
    first = await driver.launch(config)
    await Guest.of(first)
    pause = fire.state_call(running=False)
    await UnixHttp(str(jail_of(config.run_dir) / API_SOCKET)).request(pause.method, pause.target, pause.body)
    await first.aclose()
    async with ending(await driver.reattach(first.handle)) as vmm:
        await vmm.resume()
        with trio.fail_after(60):
            await Guest.of(vmm)


@pytest.mark.parametrize(
    ("kind", "how", "reason"),
    [
        ("cloud-hypervisor", "poweroff", ExitReason.POWEROFF),
        ("cloud-hypervisor", "reboot", ExitReason.RESET),
        ("cloud-hypervisor", "SIGKILL", ExitReason.KILLED),
        ("firecracker", "poweroff", ExitReason.KILLED),  # it has no events: the agent's word is all there is
        ("firecracker", "SIGKILL", ExitReason.KILLED),
    ],
)
async def test_how_a_vmm_of_an_earlier_server_ended(
    kind: str, how: str, reason: ExitReason, make_driver: Make, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exit code goes to init. A kill must not look like a power-off, after which nothing is restarted.

    Signals other than SIGKILL have no effect from outside: the VMM is process 1 of its PID namespace.
    """
    driver = make_driver(kind)
    first = await driver.launch(make_config("one"))
    await first.aclose()
    async with ending(await driver.reattach(first.handle)) as vmm:
        monkeypatch.setattr(Process, "_reap", lambda process: None)
        async with trio.open_nursery() as nursery:
            exits: list[VmmExit] = []

            async def wait() -> None:
                with trio.fail_after(60):
                    exits.append(await vmm.wait_exit())

            nursery.start_soon(wait)
            guest = await Guest.of(vmm)
            if how.startswith("SIG"):
                os.kill(vmm.handle.pid, signal.Signals[how])
            else:
                await guest.tell(how)
        assert exits[0].reason == reason
        monkeypatch.undo()


@pytest.mark.parametrize("linked", ["-static", "-dynamic"])
async def test_a_firecracker_that_needs_libraries_counts_as_not_available(
    linked: str, make_driver: Make, folder: Path, processes: Processes
) -> None:
    """It prints its version on the host, but could not start in its jail."""
    compiler = shutil.which("cc")
    if compiler is None or os.geteuid() != 0:
        pytest.skip("requires a C compiler and root")
    binary = folder / "programs" / "firecracker-linked"
    source = folder / "firecracker.c"
    source.write_text('#include <stdio.h>\nint main(void) { puts("Firecracker v1.16.1"); return 0; }\n')
    arguments = [compiler, "-o", str(binary), str(source), *(["-static"] if linked == "-static" else [])]
    await processes.run(arguments, timeout=120)
    binary.chmod(0o755)
    good = make_driver("firecracker")
    assert isinstance(good, FirecrackerDriver)
    jailer = folder / "programs" / "jailer"
    driver = FirecrackerDriver(processes, kvm=good._kvm, binary=str(binary), jailer=str(jailer))
    found = await driver.probe()
    assert (found.available, "static build" in found.reason) == (linked == "-static", linked != "-static"), found


async def test_a_guest_whose_vm_has_ended_is_not_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    class Ended:
        async def open_channel(self) -> trio.abc.Stream:
            await trio.sleep_forever()
            raise AssertionError("unreachable")

        async def wait_exit(self) -> VmmExit:
            return VmmExit(ExitReason.FAILED)

    with trio.fail_after(1), pytest.raises(AssertionError, match="ended before its guest answered"):
        await Guest.of(cast(Vmm, Ended()))


def test_events_are_taken_apart_wherever_they_are_cut() -> None:
    one = b'{\n  "source": "vm",\n  "event": "booted",\n  "properties": null\n}\n\n'
    text = one + b"nonsense\n\n" + one.replace(b"booted", b"rebooting")
    for cut in range(len(text) + 1):
        first, rest = parse_events(text[:cut])
        second, rest = parse_events(rest + text[cut:])
        assert first + second == [Event("vm", "booted"), Event("vm", "rebooting")] and rest == b""


def test_a_vm_that_they_cannot_run_is_refused() -> None:
    config = config_maker(Path("/tmp"), Path("/kernel"), None)("refused")
    shutil.rmtree("/tmp/refused")
    with pytest.raises(NotSupported):
        fire.check(msgspec.structs.replace(config, pci_devices=(PciDevice("gpu", "/sys/x"),)))
    with pytest.raises(NotSupported):
        fire.check(msgspec.structs.replace(config, disks=(Disk("a", "/a", port=1),)))
    for check in (fire.check, cloud.check):
        for changes in (
            {"vcpus": 0},
            {"vcpus": 999},
            {"memory_bytes": 1},
            {"hotplug_bytes": 1 << 20},
            {"disks": (Disk("a", "/a"), Disk("a", "/b"))},
            {"disks": (Disk("A", "/a"),)},
            {"run_dir": "/" + "x" * 90},
        ):
            with pytest.raises(InvalidRequest):
                check(msgspec.structs.replace(config, **changes))


# Their requests against the published documents


class Document:
    """A published API document: is a request one that it knows, and its body what it says?"""

    UNDOCUMENTED = {"RestoreConfig": {"net_fds"}}
    """Told in Cloud Hypervisor's manual of snapshots, and missing in its API document."""

    def __init__(self, path: Path) -> None:
        self.tree: dict[str, Any] = yaml.safe_load(path.read_text())
        self.schemas = self.tree.get("definitions") or self.tree["components"]["schemas"]

    def check(self, method: str, target: str, body: object) -> None:
        target = target.removeprefix("/api/v1")
        path = next(path for path in self.tree["paths"] if re.fullmatch(re.sub(r"{\w+}", r"[^/]+", path), target))
        operation = self.tree["paths"][path][method.lower()]
        schema = None
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "body":
                schema = parameter["schema"]
        if "requestBody" in operation:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert (body is None) == (schema is None), f"{method} {target} has a body, or should have one"
        if schema is not None:
            self._check(schema, body, target)

    def _check(self, schema: dict[str, Any], value: object, where: str) -> None:
        name = schema.get("$ref", "").rpartition("/")[2]
        schema = self.schemas[name] if name else schema
        if "enum" in schema:
            assert value in schema["enum"], where
        match schema.get("type"):
            case "object":
                assert isinstance(value, dict), where
                assert set(schema.get("required", [])) <= set(value), where
                unknown = set(value) - set(schema.get("properties", {})) - self.UNDOCUMENTED.get(name, set())
                assert not unknown, f"{where}: {unknown}"
                for key, each in value.items():
                    self._check(schema.get("properties", {}).get(key, {}), each, f"{where}.{key}")
            case "array":
                assert isinstance(value, list), where
                for each in value:
                    self._check(schema["items"], each, where)
            case "integer":
                assert type(value) is int and value >= schema.get("minimum", 0), where
                assert value <= schema.get("maximum", 1 << 63), where
            case "string":
                assert isinstance(value, str), where
            case "boolean":
                assert isinstance(value, bool), where


def requests_of(config: VmConfig) -> list[str]:
    """What the program that answers was asked; it wrote that down in its working directory."""
    jail = jail_of(config.run_dir)
    return (jail if jail.exists() else room_of(config.run_dir)).joinpath("requests").read_text().splitlines()


@pytest.fixture
def specs() -> Path:
    """The folder with the VMMs' published API documents, which are not ours to carry."""
    folder = os.environ.get("HYPEMAN_VMM_SPECS")
    if not folder:
        pytest.skip("HYPEMAN_VMM_SPECS names no folder with the VMMs' API documents")
    return Path(folder)


@pytest.mark.parametrize(
    ("kind", "document"),
    [("cloud-hypervisor", "cloud-hypervisor-v53.yaml"), ("firecracker", "firecracker-v1.16.1.yaml")],
)
async def test_every_request_is_in_the_published_document(
    kind: str, document: str, specs: Path, make_driver: Make, make_config: MakeConfig, folder: Path
) -> None:
    published = Document(specs / document)
    driver = make_driver(kind)
    plain = make_config(kind)
    config = msgspec.structs.replace(
        plain,
        hotplug_bytes=256 << 20,
        initrd=plain.kernel,
        disks=(plain.disks[0], msgspec.structs.replace(plain.disks[1], bps=1 << 20)),
        nics=(Nic("net0", "tap0", "02:00:00:00:00:01"),),
    )
    captured = folder / "captured"
    captured.mkdir()
    captured.chmod(0o777)
    requests: list[str] = []
    with trio.fail_after(60):
        async with ending(await driver.launch(config)) as vmm:
            await Guest.of(vmm)
            await vmm.resize_memory(config.memory_bytes + (128 << 20))
            await vmm.set_balloon(64 << 20)
            await vmm.resize_disk("overlay", 1 << 22)
            if driver.capabilities.hotplug_disk:
                await vmm.add_disk(Disk("extra", config.disks[1].path))
                await vmm.remove_disk("extra")
            await vmm.capture(captured)
            requests += requests_of(config)
        async with ending(await driver.restore(config, captured, keep_capture=True)) as vmm:
            await vmm.state()
            requests += requests_of(config)
    seen = set()
    for line in requests:
        method, target, body, _ = json.loads(line)
        published.check(method, target, body)
        seen.add(target)
    assert len(seen) >= 11, seen
    if kind == "cloud-hypervisor":
        device = msgspec.structs.replace(config, pci_devices=(PciDevice("gpu", "/sys/bus/pci/devices/0000:01:00.0"),))
        published.check("PUT", "/vm.create", cloud.vm_config(device, landlock=("/var/lib/hypeman",)))


def test_kernel_command_lines_by_architecture() -> None:
    """Cloud Hypervisor has a PL011 on arm64, Firecracker an 8250 on both; a reset needs words on x86 alone."""
    ch = "quiet loglevel=1 panic=-1 {}cryptomgr.notests random.trust_cpu=on x=1"
    assert cloud.kernel_cmdline("x=1", machine=AMD64) == "console=ttyS0 " + ch.format("reboot=t ")
    assert cloud.kernel_cmdline("x=1", machine=ARM64) == "console=ttyAMA0 " + ch.format("")
    fc = "console=ttyS0 quiet loglevel=1 panic=-1 {}pci=off cryptomgr.notests x=1"
    assert fire.kernel_cmdline("x=1", machine=AMD64) == fc.format("reboot=k ")
    assert fire.kernel_cmdline("x=1", machine=ARM64) == fc.format("")
