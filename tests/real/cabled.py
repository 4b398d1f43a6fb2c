"""The real server, whose VMs have no VM: each guest is a network namespace, joined to its real TAP by a real process.

``python -m tests.real.cabled`` reads its configuration from the environment, as ``hypeman serve``.

    the appliance's rules, TAPs, hm-wake, engine ── TAP ── cable (cable.c) ── eth0 of the guest's namespace

So whatever a packet meets on its way is real, but for the VM; saving and restoring take no time, and there may be as
many as one likes. The cable stands for the VMM: it is paused with SIGSTOP, killed with SIGKILL, outlives the server,
and is found again by the next one. Namespaces are made by who starts the server (``wakes.py``), and found by the MAC.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import trio

from hypeman.host.processes import MARK_VARIABLE
from hypeman.hypervisor.interface import ExitReason, LaunchFailed, VmConfig, VmmGone, VmmHandle, VmmState
from tests.bench.fake_vmm_server import serve
from tests.fakes.fake_vmm import FakeDriver, FakeMachine, FakeProcess, FakeVmm, Memory
from tests.real.appliance import BOOT_ID

CABLE = "HYPEMAN_TEST_CABLE"
"""The program."""
GUESTS = "HYPEMAN_TEST_GUESTS"
"""What the names of the guests' namespaces begin with."""


def namespace_of(mac: str) -> str:
    """The name of a guest's namespace, after GUESTS."""
    return mac[-8:].replace(":", "")


class CabledProcess(FakeProcess):
    """A cable, whichever server started it."""

    def __init__(self, pid: int, config: VmConfig, memory: Memory, *, private: bool = False) -> None:
        self._state = VmmState.PAUSED
        super().__init__(pid, config, memory, private=private)
        self._pidfd = os.pidfd_open(pid)
        trio.lowlevel.spawn_system_task(self._follow)

    @property
    def state(self) -> VmmState:
        return self._state

    @state.setter
    def state(self, state: VmmState) -> None:
        if self._state is not state:
            self._state = state
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT if state is VmmState.RUNNING else signal.SIGSTOP)

    def end(self, reason: ExitReason, message: str = "") -> None:
        if self.exit is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        super().end(reason, message)

    async def _follow(self) -> None:
        await trio.lowlevel.wait_readable(self._pidfd)
        os.close(self._pidfd)
        _reap(self.pid)
        super().end(ExitReason.KILLED)


class CabledMachine(FakeMachine):
    def start(self, config: VmConfig, memory: Memory, *, private: bool = False) -> CabledProcess:
        nic = config.nics[0]
        namespace = f"/run/netns/{os.environ[GUESTS]}{namespace_of(nic.mac)}"
        cable = subprocess.Popen(
            [os.environ[CABLE], nic.tap, namespace, config.run_dir],
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={MARK_VARIABLE: config.run_dir},
        )
        assert cable.stdout is not None
        with cable.stdout:
            if not cable.stdout.readline():
                raise LaunchFailed("there is no cable")
        while _state_of(cable.pid) != "T":
            time.sleep(0.0001)
        process = self.processes[cable.pid] = CabledProcess(cable.pid, config, memory, private=private)
        return process

    def adopt(self, handle: VmmHandle) -> None:
        """Take over a cable of the server before."""
        if handle.pid not in self.processes and _is_cable(handle.pid, handle.run_dir):
            process = self.processes[handle.pid] = CabledProcess(handle.pid, handle.config, Memory())
            process._state = VmmState.PAUSED if _state_of(handle.pid) == "T" else VmmState.RUNNING


class CabledDriver(FakeDriver):
    def __init__(self, machine: CabledMachine) -> None:
        super().__init__(machine)
        self.boot_id = BOOT_ID.read_text().strip()

    async def launch(self, config: VmConfig) -> FakeVmm:
        vmm = await super().launch(config)
        namespace = os.environ[GUESTS] + namespace_of(config.nics[0].mac)
        await trio.run_process(["ip", "netns", "exec", namespace, "ss", "-K"], capture_stdout=True)  # it has booted
        return vmm

    async def reattach(self, handle: VmmHandle) -> FakeVmm:
        assert isinstance(self.machine, CabledMachine)
        self.machine.adopt(handle)
        return await super().reattach(handle)

    async def kill_stray(self, run_dir: str) -> bool:
        if await super().kill_stray(run_dir):
            return True
        strays = [int(each) for each in os.listdir("/proc") if each.isdigit() and _is_cable(int(each), run_dir)]
        for pid in strays:
            os.kill(pid, signal.SIGKILL)
        return bool(strays)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):  # of the server before
        os.waitpid(pid, 0)


def _state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError as error:
        raise VmmGone(f"pid {pid} has ended") from error


def _is_cable(pid: int, run_dir: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return words[3:4] == [run_dir.encode()] and _state_of(pid) != "Z"
    except (OSError, VmmGone):
        return False


if __name__ == "__main__":
    serve(CabledDriver(CabledMachine()))
