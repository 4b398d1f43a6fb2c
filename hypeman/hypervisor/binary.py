"""Finding a VMM binary: the part of a driver that is common to all kinds.

A program is taken from the configuration, else from PATH, else from the bundled files. Its version is checked;
one that is too old is refused, naming the required version. Each kind determines the capabilities itself.
"""

from __future__ import annotations

import abc
import os
import re
import shutil

import msgspec

from hypeman import assets
from hypeman.errors import NotSupported
from hypeman.host.processes import Processes, ToolFailed
from hypeman.hypervisor.interface import Capabilities
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.vmm_process import end_stray

LOOK_PATIENCE = 120.0
"""Seconds for ``--version`` and its kind. It takes 2 to 50 ms; but if a VMM counted as unavailable because the host was
busy at that moment, running VMs could not be put into standby until the next start."""


class BinarySpec(msgspec.Struct, frozen=True):
    """The program that a kind needs."""

    name: str
    """Name in PATH."""
    product: str
    """Name in messages."""
    version_pattern: str
    """Regular expression for its ``--version`` output, with the numbers in groups."""
    minimum: tuple[int, ...]


class Missing(Exception):
    """A program is missing, is a different one or is too old; the message is for Capabilities."""

    def __init__(self, reason: str, *, binary: str = "", version: str = "") -> None:
        super().__init__(reason)
        self.capabilities = Capabilities(available=False, reason=reason, binary=binary, version=version)


def find_binary(name: str, configured: str = "") -> str:
    """Path of the program; empty if not found.

    Its directory is free of links, as /bin is one: QEMU looks for its modules relative to where it was started from.
    """
    if configured or (found := shutil.which(name)) is None:
        return configured or str(assets.find(name) or "")
    return os.path.join(os.path.realpath(os.path.dirname(found)), os.path.basename(found))


async def version_of(processes: Processes, spec: BinarySpec, binary: str) -> str:
    """The version that ``binary`` reports. Raises Missing if it is not the required program."""
    if not binary:
        raise Missing(f"{spec.name} is not installed")
    try:
        output = (await processes.run([binary, "--version"], timeout=LOOK_PATIENCE)).decode(errors="replace")
    except ToolFailed as error:
        raise Missing(error.message, binary=binary) from None
    if (match := re.search(spec.version_pattern, output)) is None:
        raise Missing(f"{binary} is not {spec.product}: {output[:80]!r}", binary=binary)
    numbers = tuple(int(part or 0) for part in match.groups())
    version = ".".join(map(str, numbers))
    if numbers < spec.minimum:
        wanted = ".".join(map(str, spec.minimum))
        raise Missing(f"{spec.product} {version} is too old, {wanted} is required", binary=binary, version=version)
    return version


class BinaryProbe(abc.ABC):
    """A driver's VMM binary and capabilities, and how they are determined."""

    kind: HypervisorKind
    spec: BinarySpec

    def __init__(self, processes: Processes, *, binary: str) -> None:
        self._processes = processes
        self._configured = binary
        self._capabilities = Capabilities(available=False, reason="not probed yet")

    def programs(self) -> tuple[str, ...]:
        """The existing files that the result of ``probe`` depends on."""
        binary = find_binary(self.spec.name, self._configured)
        return (binary,) if binary else ()

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def adopt_capabilities(self, capabilities: Capabilities) -> None:
        """Use the result of an earlier ``probe``. It is valid as long as the host's kernel and boot, the
        guest kernel and the VMM binary stay the same; the caller ensures that."""
        self._capabilities = capabilities

    async def probe(self) -> Capabilities:
        """Find the program and determine its capabilities here; the result is kept."""
        binary = find_binary(self.spec.name, self._configured)
        try:
            version = await version_of(self._processes, self.spec, binary)
            found = await self._able(binary, version)
            self._capabilities = msgspec.structs.replace(found, version=version, binary=binary)
        except Missing as missing:
            self._capabilities = missing.capabilities
        return self._capabilities

    @abc.abstractmethod
    async def _able(self, binary: str, version: str) -> Capabilities:
        """Capabilities of ``binary`` on this host. Raises Missing if something else that it needs is missing."""

    def _require_available(self) -> None:
        """Raise NotSupported, with the reason, if this VMM cannot launch VMs."""
        if not self._capabilities.available:
            raise NotSupported(f"{self.kind} cannot be used here: {self._capabilities.reason}")

    async def kill_stray(self, run_dir: str) -> bool:
        return await end_stray(self._processes, run_dir)
