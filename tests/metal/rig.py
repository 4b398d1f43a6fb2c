"""A bare-metal host, virtual: real KVM, IOMMU, VFIO, mdev, vhost-vsock and systemd, only slow.

QEMU's TCG emulates AMD's SVM and an Intel IOMMU, so the Debian inside finds what a server has.

    with MetalHost.boot(image, devices=(E1000E, NVME)) as host:
        host.put({"/opt/job.py": b"..."})
        code, output = host.run("python3 /opt/job.py", timeout=60)
        host.qmp("device_del", id="nic0")     # hot-unplug
        host.power_cut()                      # as if the plug was pulled; boots again from the same disk

A boot takes 12 to 30 s of CPU time, everything inside is 20 to 50 times slower than on metal, a guest inside slower
still: do not measure times here. Each MetalHost has an overlay of its own, which is removed at the end; ``run`` never
waits longer than its timeout, nor for a host that hangs, and its error contains the end of the console. Slow requests
are logged (``pytest -o log_cli=true -o log_cli_level=INFO``).
"""

from __future__ import annotations

import compileall
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from tests.metal.image import Image

HERE = Path(__file__).parent
BOOT_SECONDS = 600
"""15 s where the host gets all of two processors."""
_CONNECT_SECONDS = 30
_ARCHIVE = "rig-files"
_SOFT_LOCKUP = re.compile(rb"soft lockup - CPU#\d+ stuck for (\d+)s")
_STUCK_SECONDS = 100
"""A processor of the host that was stuck for so long, by its own clock, is considered hung."""
_CHECK_SECONDS = 5
_LOG_SECONDS = 5.0
"""Requests that take more seconds are logged."""

log = logging.getLogger(__name__)


class RigError(Exception):
    """The host failed, or did not answer in time; with the end of its console."""


class Result(NamedTuple):
    code: int
    output: str


def root_port(number: int) -> tuple[str, ...]:
    """A PCIe root port ``rp<number>``: its device is in an IOMMU group of its own."""
    port = f"pcie-root-port,id=rp{number},chassis={number},slot={number},addr=8.{number}"
    return ("-device", port + (",multifunction=on" if number == 0 else ""))


def nic(name: str, port: int) -> tuple[str, ...]:
    return (*root_port(port), "-device", f"e1000e,id={name},bus=rp{port},romfile=")


def dual_nic(name: str, port: int) -> tuple[str, ...]:
    """Two functions in one group."""
    functions = (f"e1000e,id={name}{n},bus=rp{port},addr=0.{n},romfile=" for n in (0, 1))
    first, second = functions
    return (*root_port(port), "-device", first + ",multifunction=on", "-device", second)


def gpu(name: str, port: int) -> tuple[str, ...]:
    """A VGA card and its audio in one group."""
    card = f"VGA,id={name},bus=rp{port},addr=0.0,multifunction=on,romfile="
    return (*root_port(port), "-device", card, "-device", f"intel-hda,bus=rp{port},addr=0.1")


def nvme(name: str, port: int, disk: Path) -> tuple[str, ...]:
    drive = ("-drive", f"if=none,id={name}-disk,file={disk},format=raw,cache=unsafe,file.locking=off")
    return (*root_port(port), *drive, "-device", f"nvme,id={name},serial={name},drive={name}-disk,bus=rp{port}")


class MetalHost:
    """One running machine. ``boot`` makes it; leaving the ``with`` block ends it."""

    def __init__(self, argv: list[str], directory: Path) -> None:
        self._argv = argv
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._agent: socket.socket | None = None
        self._received = b""
        self._unanswered = 0
        """Requests whose answers are still to come."""
        self._seen = 0
        """Bytes of the console before the request in progress."""

    @classmethod
    def boot(
        cls,
        image: Image,
        *,
        devices: Iterable[tuple[str, ...]] = (),
        files: Mapping[str, bytes | Path] | None = None,
        memory_mb: int = 3072,
        cpus: int = 1,
        append: str = "",
    ) -> MetalHost:
        """Start a host with ``devices`` (each the QEMU arguments of one) and wait until it accepts requests.

        One processor is the cheapest: with two, a boot takes half as much CPU time again, since they wait for each
        other, and more where the machine outside has no processor to spare for the second.

        ``files`` are as for ``put``, but on a disk: 100 MB take seconds, and minutes over the port.
        """
        directory = Path(tempfile.mkdtemp(prefix="metal-"))
        if files:
            _write_archive(files, directory / "files.tar")
            devices = (*devices, _archive_disk(directory / "files.tar"))
        overlay = directory / "root.qcow2"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(image.root), str(overlay)], check=True
        )
        host = cls(_command(image, overlay, directory, devices, memory_mb, cpus, append), directory)
        try:
            host._start()
            if files:
                disk = f"/dev/disk/by-id/virtio-{_ARCHIVE}"
                host.check(f"until [ -e {disk} ]; do sleep 0.1; done; tar -xf {disk} -C /", timeout=BOOT_SECONDS)
        except BaseException:
            host.close()
            raise
        return host

    def __enter__(self) -> MetalHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, script: str, *, timeout: float = 120) -> Result:
        """Run a shell script as root and wait; its exit code and both outputs."""
        code, output = self._ask("RUN", script.encode(), timeout)
        return Result(code, output.decode("utf-8", "replace"))

    def check(self, script: str, *, timeout: float = 120) -> str:
        """The output of a script that must succeed; AssertionError with all of it otherwise."""
        code, output = self.run(script, timeout=timeout)
        assert code == 0, f"exit code {code} of: {script}\n{output}\nconsole:\n{self.console(2000)}"
        return output

    def put(self, files: Mapping[str, bytes | Path], *, timeout: float = 300) -> None:
        """Write files and directories: absolute path in the host → content, or a file or directory of this machine."""
        archive = io.BytesIO()
        _write_archive(files, archive)
        code, output = self._ask("PUT", archive.getvalue(), timeout)
        if code:
            raise RigError(f"the host could not unpack: {output.decode()}")

    def get(self, path: str, *, timeout: float = 60) -> bytes:
        """The content of a file in the host; FileNotFoundError if it cannot be read."""
        code, output = self._ask("GET", path.encode(), timeout)
        if code:
            raise FileNotFoundError(path)
        return output

    def qmp(self, command: str, **arguments: object) -> Any:
        """Send a command to QEMU: plug, unplug, press the power button."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_CONNECT_SECONDS)
            connection.connect(str(self._directory / "qmp"))
            lines = connection.makefile("rwb")
            lines.readline()
            for request in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                lines.write(json.dumps(request).encode() + b"\n")
                lines.flush()
                answer: dict[str, Any] = {}
                while "return" not in answer and "error" not in answer:
                    answer = json.loads(lines.readline())
                if "error" in answer:
                    raise RigError(f"{command}: {answer['error']}")
            return answer["return"]

    def power_cut(self) -> None:
        """Cut the power and boot again from the same disk, without unwritten data."""
        self._stop()
        self._start()

    def keep_vms(self) -> None:
        """From now on, also after boots, keep some VMs in KVM; keep_vms.c gives the reason."""
        program = self._directory / "keep-vms"
        subprocess.run(["cc", "-O1", "-static", "-o", program, HERE / "keep_vms.c"], check=True)
        unit = "keep-vms.service"
        self.put({f"/usr/local/lib/{program.name}": program, f"/etc/systemd/system/{unit}": HERE / unit})
        self.check(f"systemctl -q enable --now {unit}")

    def console(self, last: int = 20000) -> str:
        """The end of what the serial console showed."""
        return self._console()[-last:].decode("utf-8", "replace")

    def close(self) -> None:
        self._stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    # Inside

    def _start(self) -> None:
        with (self._directory / "qemu.log").open("ab") as log_file:
            self._process = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file)
        self._received = b""
        self._unanswered = 0
        self._seen = 0
        self._agent = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + _CONNECT_SECONDS
        while True:  # QEMU makes the socket and waits for us before it starts the machine
            try:
                self._agent.connect(str(self._directory / "rig"))
                break
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RigError(f"QEMU did not start: {self._log()}") from None
                time.sleep(0.02)
        begun = time.monotonic()
        if self._line(begun + BOOT_SECONDS) != "READY":
            raise RigError("the agent did not answer READY")
        log.info("%4.0f s, %4.0f of CPU: boot", time.monotonic() - begun, self._cpu_seconds())

    def _stop(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _ask(self, verb: str, body: bytes, timeout: float) -> tuple[int, bytes]:
        if self._agent is None:
            raise RigError("the host is off")
        begun, cpu_begun = time.monotonic(), self._cpu_seconds()
        deadline = begun + timeout
        self._seen = len(self._console())
        self._agent.settimeout(timeout)
        try:
            self._agent.sendall(f"{verb} {len(body)}\n".encode() + body)
        except TimeoutError:
            raise self._late(f"{verb} of {len(body)} bytes") from None
        self._unanswered += 1
        while self._unanswered > 1:  # to abandoned requests: the agent handles one after the other
            self._answer(deadline)
        words, output = self._answer(deadline)
        if (seconds := time.monotonic() - begun) > _LOG_SECONDS:
            what = " ".join(body[:100].decode("utf-8", "replace").split()) if verb != "PUT" else f"{len(body)} bytes"
            cpu = self._cpu_seconds() - cpu_begun
            log.info("%4.0f s, %4.0f of CPU, exit code %s: %s %s", seconds, cpu, words[1], verb, what)
        return int(words[1]), output

    def _cpu_seconds(self) -> float:
        """CPU time that the machine has used so far; 0 before it is started."""
        if self._process is None:
            return 0.0
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _line(self, deadline: float) -> str:
        while b"\n" not in self._received:
            self._receive(deadline)
        line, _, self._received = self._received.partition(b"\n")
        return line.decode().strip()

    def _answer(self, deadline: float) -> tuple[list[str], bytes]:
        """The words and the output of the next answer; consumed as a whole, or left for another attempt."""
        while (end := self._received.find(b"\n")) < 0:
            self._receive(deadline)
        words = self._received[:end].decode().split()
        if len(words) != 3 or words[0] != "DONE":
            raise RigError(f"the agent answered {words}")
        start, stop = end + 1, end + 1 + int(words[2])
        while len(self._received) < stop:
            self._receive(deadline)
        output, self._received = self._received[start:stop], self._received[stop:]
        self._unanswered -= 1
        return words, output

    def _receive(self, deadline: float) -> None:
        assert self._agent is not None
        left = deadline - time.monotonic()
        if left <= 0:
            raise self._late("an answer")
        self._agent.settimeout(min(left, _CHECK_SECONDS))
        try:
            data = self._agent.recv(1 << 16)
        except TimeoutError:
            if self._is_hung():
                raise RigError(f"the host hangs; console:\n{self.console(3000)}") from None
            self._nudge()
            return
        except ConnectionError:
            data = b""
        if not data:
            raise RigError(f"the host went off ({self._end()}): {self._log()}\nconsole:\n{self.console(3000)}")
        self._received += data

    def _nudge(self) -> None:
        """Press a key that does nothing, for its interrupt.

        When a guest of KVM inside exits, QEMU's emulation of SVM clears a flag of the processor without the lock that
        others take to set one (7.2; corrected in later versions). So an interrupt can be lost: it is pending in the
        interrupt controller, and the idle processor sleeps until the next one, which never comes if it was that of
        the timer. A host was seen to sleep for eight minutes, with the timer's vector pending, and to continue at
        a key.
        """
        with suppress(OSError, ValueError):  # it may just go off, which the caller notices
            self.qmp("send-key", keys=[{"type": "qcode", "data": "shift"}])

    def _end(self) -> str:
        """How QEMU ended: 0 is a shutdown, or a reset, as after a fault that its processor could not handle."""
        assert self._process is not None
        try:
            return f"exit code {self._process.wait(_CONNECT_SECONDS)}"
        except subprocess.TimeoutExpired:
            return "QEMU still runs"

    def _late(self, what: str) -> RigError:
        return RigError(f"{what} did not come in time; console:\n{self.console(3000)}")

    def _console(self) -> bytes:
        try:
            return (self._directory / "console").read_bytes()
        except FileNotFoundError:
            return b""

    def _is_hung(self) -> bool:
        found = _SOFT_LOCKUP.findall(self._console()[self._seen :])
        return any(int(seconds) >= _STUCK_SECONDS for seconds in found)

    def _log(self) -> str:
        return (self._directory / "qemu.log").read_text(errors="replace")[-2000:]


def _command(
    image: Image,
    overlay: Path,
    directory: Path,
    devices: Iterable[tuple[str, ...]],
    memory_mb: int,
    cpus: int,
    append: str,
) -> list[str]:
    # no_timer_check: on a loaded machine the timer's interrupts come too late for the kernel's check of them
    kernel_line = (
        "root=/dev/vda rw console=ttyS0 intel_iommu=on quiet mitigations=off panic=-1 nokaslr no_timer_check "
        f"systemd.show_status=0 {append}"
    )
    # -erms: `rep movsb` is emulated byte by byte; without it, kernel and libc copy and clear by words
    return [
        "qemu-system-x86_64", "-M", "q35,kernel-irqchip=split", "-accel", "tcg,thread=multi",
        "-cpu", "max,+svm,la57=off,-erms", "-smp", str(cpus), "-m", str(memory_mb),
        "-nodefaults", "-display", "none", "-vga", "none", "-no-reboot",
        "-device", "intel-iommu,intremap=on,caching-mode=on,aw-bits=48",  # Cloud Hypervisor puts BARs up to 2^40
        "-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", kernel_line.strip(),
        "-drive", f"if=none,id=root,file={overlay},format=qcow2,cache=unsafe",
        "-device", "virtio-blk-pci,drive=root,bus=pcie.0,addr=2",
        "-chardev", f"file,id=console,path={directory}/console", "-serial", "chardev:console",
        "-chardev", f"socket,id=rig,path={directory}/rig,server=on,wait=on",
        "-device", "virtio-serial-pci,bus=pcie.0,addr=3", "-device", "virtserialport,chardev=rig,name=rig",
        "-qmp", f"unix:{directory}/qmp,server=on,wait=off",
        *(argument for device in devices for argument in device),
    ]  # fmt: skip


def _write_archive(files: Mapping[str, bytes | Path], target: Path | io.BytesIO) -> None:
    """A tar of ``files``; Python in directories is compiled here, which would take minutes in there."""
    with tarfile.open(target, "w") if isinstance(target, Path) else tarfile.open(fileobj=target, mode="w") as tar:
        for name, content in files.items():
            if isinstance(content, Path):
                compileall.compile_dir(content, quiet=2)
                tar.add(content, arcname=name.lstrip("/"), filter=_of_root)
                continue
            info = tarfile.TarInfo(name.lstrip("/"))
            info.size, info.mode = len(content), 0o755
            tar.addfile(info, io.BytesIO(content))


def _archive_disk(archive: Path) -> tuple[str, ...]:
    drive = f"if=none,id={_ARCHIVE},file={archive},format=raw,readonly=on"
    return ("-drive", drive, "-device", f"virtio-blk-pci,drive={_ARCHIVE},serial={_ARCHIVE},bus=pcie.0,addr=4")


def _of_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Owned by root. Times are kept: Python compares those of source and compiled file."""
    member.uid = member.gid = 0
    return member
