"""The steps that plans consist of. Pure data: a step is stored before it runs, and read back after a crash.

What a step does, and how it is undone, is in ../machine/effects.py. A Reversible step can be undone; an Irreversible
one only goes forward.
"""

from __future__ import annotations

import msgspec


class _Step(msgspec.Struct, frozen=True, tag=True):
    """Base: a step on one instance, stored with its class name."""

    instance: str


class MakeDisks(_Step, frozen=True):
    """The instance's directory, its writable layer, and the write layers of its volumes."""


class CopyDisks(_Step, frozen=True):
    """Like MakeDisks, as a copy of another instance's or a snapshot's disks (``source`` is a directory)."""

    source: str


class TakeDisks(_Step, frozen=True):
    """Like MakeDisks, moved from directory ``source``, which belongs to this plan alone."""

    source: str


class PrepareRun(_Step, frozen=True):
    """The runtime directory and the disk that contains the guest's boot configuration."""


class AttachNetwork(_Step, frozen=True):
    """TAP, route, rules and limits for the instance's lease; blocked until all are in place."""


class SetEgress(_Step, frozen=True):
    """The policy of the egress proxy for the instance's address."""


class BindDevices(_Step, frozen=True):
    """VFIO drivers on the instance's devices, and its mediated device."""


class LaunchVmm(_Step, frozen=True):
    """A VMM that boots the guest."""


class RestoreVmm(_Step, frozen=True):
    """A VMM with the captured guest, paused and with its link down: nothing has run yet."""

    capture: str
    keep: bool


class WarmGuest(_Step, frozen=True):
    """The restored guest of a pool gets its machine-id and network before it is requested, and is paused again:
    what a claim does has then run once. Its program stays frozen, its link down. Undo: nothing, its VMM is ended."""


class AwakenGuest(_Step, frozen=True):
    """The restored guest gets its clock, entropy and identity, and only then its network and program.

    Irreversible: from here on the guest has run, and its capture, if consumed, no longer matches it.
    """

    fresh: bool
    """A fork also gets a new machine-id, and the source's connections are closed."""


class HoldTraffic(_Step, frozen=True):
    """Hold packets to an instance that enters standby, if its policy has them wake it. Undo: they go to its TAP or,
    if it has none, are answered with an error."""


class SaveCapture(_Step, frozen=True):
    """Freeze the workload, pause the VM and publish its capture. Undo: resume the VM."""

    capture: str
    transient: bool = False
    """Restored at once: it need not outlive a crash of the host, so it is not flushed to disk."""


class CopyDisksAway(_Step, frozen=True):
    """Copy the instance's writable layers into directory ``target``, while nothing writes."""

    target: str


class PlugVolume(_Step, frozen=True):
    """Plug a volume's disk into the running VM and have the guest mount it."""

    volume: str
    path: str
    readonly: bool
    port: int


class StageDisks(_Step, frozen=True):
    """Copy the disks of a snapshot next to the instance's own, to replace them by rename."""

    source: str


class PauseVm(_Step, frozen=True):
    """Freeze the workload and pause the VM: nothing writes until it is resumed. Undo: resume it."""


class GoOn(_Step, frozen=True):
    """Resume the VM after its capture, as if nothing had happened."""


class ShutdownGuest(_Step, frozen=True):
    """Ask the guest to end its workload and power off; wait up to ``grace`` seconds."""

    grace: float


class SwapDisks(_Step, frozen=True):
    """Replace the instance's disks with the staged ones."""


class FreeCapture(msgspec.Struct, frozen=True, tag=True):
    """Remove a capture if it has no holders."""

    capture: str


Reversible = (
    MakeDisks
    | CopyDisks
    | TakeDisks
    | PrepareRun
    | AttachNetwork
    | SetEgress
    | BindDevices
    | LaunchVmm
    | RestoreVmm
    | WarmGuest
    | HoldTraffic
    | SaveCapture
    | CopyDisksAway
    | PauseVm
    | GoOn
    | PlugVolume
    | StageDisks
)


class TakeBack(msgspec.Struct, frozen=True, tag=True):
    """The undo of a step as a step: a stop tears down what a start set up."""

    step: Reversible


class Together(msgspec.Struct, frozen=True, tag=True):
    """Undos that do not depend on each other, at the same time."""

    steps: tuple[TakeBack, ...]


Irreversible = AwakenGuest | ShutdownGuest | SwapDisks | FreeCapture | TakeBack | Together

Step = Reversible | Irreversible


def reversible(steps: tuple[Step, ...]) -> tuple[Reversible, ...]:
    """Those of ``steps`` that can be undone."""
    return tuple(step for step in steps if isinstance(step, Reversible))
