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

_PATIENCE = 120.0
"""Seconds for ``--version``. It takes 2 to 50 ms; but if a VMM counted as unavailable because the host was busy at
that moment, running VMs could not be put into standby until the next start."""


class Sought(msgspec.Struct, frozen=True):
    """The program that a kind needs."""

    name: str
    """Name in PATH."""
    product: str
    """Name in messages."""
    told: str
    """Pattern of its ``--version`` output, with the numbers in groups."""
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


async def version_of(processes: Processes, sought: Sought, binary: str) -> str:
    """The version that ``binary`` reports. Raises Missing if it is not the required program."""
    if not binary:
        raise Missing(f"{sought.name} is not installed")
    try:
        said = (await processes.run([binary, "--version"], timeout=_PATIENCE)).decode(errors="replace")
    except ToolFailed as error:
        raise Missing(error.message, binary=binary) from None
    if (match := re.search(sought.told, said)) is None:
        raise Missing(f"{binary} is no {sought.product}: {said[:80]!r}", binary=binary)
    numbers = tuple(int(part or 0) for part in match.groups())
    version = ".".join(map(str, numbers))
    if numbers < sought.minimum:
        wanted = ".".join(map(str, sought.minimum))
        raise Missing(f"{sought.product} {version} is too old, {wanted} is wanted", binary=binary, version=version)
    return version


class Seeker(abc.ABC):
    """A driver's VMM binary and capabilities, and how they are determined."""

    kind: HypervisorKind
    sought: Sought

    def __init__(self, processes: Processes, *, binary: str) -> None:
        self._processes = processes
        self._configured = binary
        self._capabilities = Capabilities(available=False, reason="not looked for yet")

    def programs(self) -> tuple[str, ...]:
        """The existing files that the result of ``probe`` depends on."""
        binary = find_binary(self.sought.name, self._configured)
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
        binary = find_binary(self.sought.name, self._configured)
        try:
            version = await version_of(self._processes, self.sought, binary)
            able = await self._able(binary, version)
            self._capabilities = msgspec.structs.replace(able, version=version, binary=binary)
        except Missing as missing:
            self._capabilities = missing.capabilities
        return self._capabilities

    @abc.abstractmethod
    async def _able(self, binary: str, version: str) -> Capabilities:
        """Capabilities of ``binary`` on this host. Raises Missing if something else that it needs is missing."""

    def _want_available(self) -> None:
        """Raise NotSupported, with the reason, if this VMM cannot launch VMs."""
        if not self._capabilities.available:
            raise NotSupported(f"{self.kind} cannot be used here: {self._capabilities.reason}")

    async def kill_stray(self, run_dir: str) -> bool:
        return await end_stray(self._processes, run_dir)
