"""What the life cycle needs of the machine (``../machine/machine.py``) and of a VM that is watched."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from hypeman.captures.records import CaptureRow
from hypeman.captures.types import SnapshotCompressionConfig
from hypeman.guest.types import Exited, Fatal
from hypeman.hypervisor.interface import Capabilities, Vmm
from hypeman.instances.model.events import VmEvent
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.steps import Reversible, Step
from hypeman.paths import Paths


class LiveVm(Protocol):
    """A running VM, while it is watched."""

    @property
    def vmm(self) -> Vmm: ...
    @property
    def started(self) -> bool:
        """Whether the workload was started."""
        ...

    @property
    def exited(self) -> Exited | None:
        """How the workload ended, once it has ended."""
        ...

    @property
    def fatal(self) -> Fatal | None: ...
    async def run(self, tell: Callable[[LiveVm, VmEvent], None]) -> None:
        """Report events until the VMM exits."""
        ...


class Machine(Protocol):
    """Carries out steps (``saga/runner.py``) and answers what only the host knows."""

    @property
    def boot_id(self) -> str:
        """The host's boot id."""
        ...

    @property
    def paths(self) -> Paths: ...
    async def do(self, step: Step) -> None: ...
    async def undo(self, step: Reversible) -> None: ...
    def live(self, instance_id: str) -> LiveVm | None:
        """The running VM, if it is watched."""
        ...

    def unwatch(self, instance_id: str) -> None:
        """Forget the VM, which may keep running."""
        ...

    async def reattach(self, instance_id: str) -> bool:
        """Find the record's VMM after a server restart; returns whether it is running."""
        ...

    def give_up_guest(self, instance_id: str, given_up: bool) -> None:
        """Abort all waits for the guest of an instance, including its next VM's, until called with False."""
        ...

    async def end_vmm(self, instance_id: str) -> None:
        """Kill the VMM while a task waits for it; the wait fails. A no-op if there is none."""
        ...

    def capabilities(self, record: InstanceRecord) -> Capabilities: ...
    async def plug_memory(self, instance_id: str) -> None:
        """Plug all of the guest's assigned memory."""
        ...

    async def read_outcome(self, instance_id: str) -> Exited | Fatal | None:
        """How the workload ended, as the guest wrote it to its boot disk."""
        ...

    def journal(self, instance_id: str, line: str) -> None:
        """Append one line to the instance's ``hypeman`` log."""
        ...

    def restorable(self, capture_id: str) -> AbstractAsyncContextManager[None]:
        """Within the block, the capture's memory is uncompressed on disk and not being compressed."""
        ...

    async def describe_capture(
        self,
        instance_id: str,
        capture_id: str,
        *,
        holder: str,
        compression: SnapshotCompressionConfig | None = None,
    ) -> CaptureRow:
        """The row of a capture just made of the instance."""
        ...
