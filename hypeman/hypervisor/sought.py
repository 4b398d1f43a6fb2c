"""Looking for a VMM: the half of a driver that is the same for every kind.

A program is taken from the configuration, else from PATH, else from the folder of files that came with us. It is
asked its version; one that is too old is refused with what is wanted. What it can do here, its kind says.
"""

from __future__ import annotations

import abc
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
"""Seconds for a program to tell its version. It takes 2 to 50 ms; but with a VMM that was given up because its host
was busy at that moment, running VMs could not be put into standby until the next start."""


class Sought(msgspec.Struct, frozen=True):
    """Which program a kind wants."""

    name: str
    """As it is called in PATH."""
    product: str
    """As it is called in sentences."""
    told: str
    """Pattern of its answer to ``--version``, the numbers in groups."""
    minimum: tuple[int, ...]


class Missing(Exception):
    """A program that is not there, is another one or too old; says which, for Capabilities."""

    def __init__(self, reason: str, *, binary: str = "", version: str = "") -> None:
        super().__init__(reason)
        self.capabilities = Capabilities(available=False, reason=reason, binary=binary, version=version)


def find_binary(name: str, configured: str = "") -> str:
    """Where the program lies; empty if nowhere."""
    return configured or shutil.which(name) or str(assets.find(name) or "")


async def version_of(processes: Processes, sought: Sought, binary: str) -> str:
    """The version that ``binary`` tells. Raises Missing if it is not what was sought."""
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
    """What a driver knows of its VMM, and how it came to know it."""

    kind: HypervisorKind
    sought: Sought

    def __init__(self, processes: Processes, *, binary: str) -> None:
        self._processes = processes
        self._configured = binary
        self._capabilities = Capabilities(available=False, reason="not looked for yet")

    def programs(self) -> tuple[str, ...]:
        """The files that the answer of ``probe`` depends on, as far as they are there."""
        binary = find_binary(self.sought.name, self._configured)
        return (binary,) if binary else ()

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def adopt_capabilities(self, capabilities: Capabilities) -> None:
        """Take the answer of an earlier ``probe``. It holds as long as the host's kernel, its boot, the
        guest kernel and the VMM's program stay the same; the caller sees to that."""
        self._capabilities = capabilities

    async def probe(self) -> Capabilities:
        """Look for the program and for what it can do here; remembered."""
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
        """What ``binary`` can do on this host. Raises Missing for what else it would need."""

    def _want_available(self) -> None:
        """Raises NotSupported, with the reason, if nothing can be launched."""
        if not self._capabilities.available:
            raise NotSupported(f"{self.kind} can not be used here: {self._capabilities.reason}")

    async def kill_stray(self, run_dir: str) -> bool:
        return await end_stray(self._processes, run_dir)
