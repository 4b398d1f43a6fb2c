"""``hypeman doctor``: what this host can do, what is missing, and the commands that fix it.

Read-only; a server may be running. Each finding covers one item; they are in the order in which they
should be fixed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path

import trio

from hypeman import assets
from hypeman.architecture import HOST
from hypeman.config import Config
from hypeman.host import facts
from hypeman.host.cgroups import CGroups
from hypeman.host.processes import Processes
from hypeman.hypervisor.cloud_hypervisor.driver import landlocked
from hypeman.hypervisor.drivers import make_drivers
from hypeman.hypervisor.interface import Capabilities
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.ingress.certificates.files import CertificateFile
from hypeman.ingress.certificates.pem import is_expired
from hypeman.network import doctor as network
from hypeman.telemetry.findings import Finding, Verdict
from hypeman.units import format_size

_TOOLS = {"mkfs.ext4": "e2fsprogs", "nft": "nftables"}
_LITTLE_DISK = 2 << 30
_KERNEL = (5, 10)
_NEWER_KERNELS = {
    (6, 1): "Cloud Hypervisor restores read all memory before they run",
    (6, 2): "Cloud Hypervisor is not behind landlock",
    (6, 12): "Firecracker with a network can connect to the host's abstract sockets",
}
"""What is lost before a version of Linux."""


def examine(config: Config) -> list[Finding]:
    """All findings about this host for a server with ``config``. Takes up to ten seconds if KVM hangs."""
    return trio.run(_examine, config)


class Doctor:
    """Examines this host for the API, for one caller at a time."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._one = trio.CapacityLimiter(1)

    async def examine(self) -> list[Finding]:
        """In a thread with a loop of its own: most checks read files, and KVM may hang."""
        return await trio.to_thread.run_sync(examine, self._config, limiter=self._one)


async def _examine(config: Config) -> list[Finding]:
    async with aclosing(_findings(config)) as findings:
        return [finding async for finding in findings]


async def _findings(config: Config) -> AsyncGenerator[Finding]:
    for finding in (
        *_rights(),
        *_kernel(os.uname().release),
        *_tools(),
        *_guest_files(config),
        *_data_directory(config),
        *_secret(config),
        *_users(config),
        *_certificates(config),
    ):
        yield finding
    async for finding in _hypervisor(config):
        yield finding
    for finding in await network.examine(config.network):
        yield finding
    for finding in (*_control_groups(), *_devices(config)):
        yield finding


def _rights() -> Iterator[Finding]:
    if os.geteuid() == 0:
        yield Finding(name="rights", verdict=Verdict.OK, message="running as root")
    else:
        yield Finding(
            name="rights",
            verdict=Verdict.FAIL,
            message="the server needs root: it makes TAPs, rules and users' processes",
            remedy="sudo hypeman doctor",
        )


def _kernel(release: str) -> Iterator[Finding]:
    numbers = re.match(r"(\d+)\.(\d+)", release)
    version = (int(numbers[1]), int(numbers[2])) if numbers else _KERNEL
    lost = [
        f"{text} (Linux {major}.{minor})" for (major, minor), text in _NEWER_KERNELS.items() if version < (major, minor)
    ]
    if version < _KERNEL:
        yield Finding(
            name="kernel",
            verdict=Verdict.FAIL,
            message=f"Linux {release} is too old, {_KERNEL[0]}.{_KERNEL[1]} is required",
            remedy="install a newer kernel of the distribution and boot it",
        )
    else:
        yield Finding(
            name="kernel",
            verdict=Verdict.OK,
            message=f"Linux {release}" + (f"; with a newer one this would not hold: {'; '.join(lost)}" if lost else ""),
        )


def _tools() -> Iterator[Finding]:
    for tool, package in _TOOLS.items():
        found = shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if found:
            yield Finding(name=tool, verdict=Verdict.OK, message=found)
        else:
            yield Finding(
                name=tool, verdict=Verdict.FAIL, message="is not installed", remedy=f"apt-get install {package}"
            )


def _guest_files(config: Config) -> Iterator[Finding]:
    for name, configured, asset in (
        ("guest kernel", config.hypervisor.kernel, assets.KERNEL),
        ("guest initrd", config.hypervisor.initrd, assets.INITRD),
    ):
        path = Path(configured) if configured else assets.find(asset)
        if path is not None and path.is_file():
            yield Finding(name=name, verdict=Verdict.OK, message=str(path))
        else:
            yield Finding(
                name=name,
                verdict=Verdict.FAIL,
                message=f"{path or asset} is not there",
                remedy="set hypervisor.kernel and hypervisor.initrd, or reinstall hypeman",
            )


def _data_directory(config: Config) -> Iterator[Finding]:
    path = Path(config.data_dir)
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize
    if not os.access(path, os.W_OK):
        yield Finding(
            name="data directory",
            verdict=Verdict.FAIL,
            message=f"{config.data_dir} cannot be written",
            remedy="run as root, or set data_dir to a directory that can",
        )
    elif free < _LITTLE_DISK:
        yield Finding(
            name="data directory",
            verdict=Verdict.WARN,
            message=f"only {format_size(free >> 20 << 20)} are free below {config.data_dir}",
            remedy="make room, or set data_dir to a larger disk",
        )
    else:
        yield Finding(
            name="data directory",
            verdict=Verdict.OK,
            message=f"{config.data_dir}, {format_size(free >> 30 << 30)} free",
        )


def _secret(config: Config) -> Iterator[Finding]:
    if not config.jwt_secret:
        yield Finding(
            name="jwt_secret",
            verdict=Verdict.WARN,
            message="is empty: over TCP every call is refused; clients can only use the unix socket",
            remedy="set jwt_secret in /etc/hypeman/config.yaml, e.g. to the output of: openssl rand -hex 32",
        )
    else:
        yield Finding(name="jwt_secret", verdict=Verdict.OK, message="is set")


def _users(config: Config) -> Iterator[Finding]:
    base = config.hypervisor.uid_base
    if base == 0:
        yield Finding(
            name="users of VMMs",
            verdict=Verdict.WARN,
            message="hypervisor.uid_base is 0: VMMs run as the server's user",
            remedy="remove hypervisor.uid_base from the configuration",
        )
    elif conflicts := facts.uid_conflicts(base):
        yield Finding(
            name="users of VMMs",
            verdict=Verdict.WARN,
            message=f"others may use the same user ids as VMMs: {', '.join(conflicts)}",
            remedy="set hypervisor.uid_base so that no account uses it or the 65536 ids from it on",
        )
    else:
        yield Finding(name="users of VMMs", verdict=Verdict.OK, message=f"{base} to {base + facts.VMM_UIDS - 1}")


def _certificates(config: Config) -> Iterator[Finding]:
    for label, paths in config.ingress.certificates.items():
        name = f"ingress.certificates.{label}"
        file = CertificateFile(Path(paths.certificate), Path(paths.key))
        file.reload()
        if file.pair is None:
            yield Finding(
                name=name,
                verdict=Verdict.WARN,
                message=file.error,
                remedy="without them, ingresses with tls cannot be made for their names",
            )
        elif is_expired(file.pair, datetime.now(UTC)):
            yield Finding(
                name=name,
                verdict=Verdict.WARN,
                message=f"{', '.join(file.pair.names)[:200]}: expired at {file.pair.not_after:%Y-%m-%d %H:%M} UTC",
                remedy=f"renew {paths.certificate}; the server reads it again by itself",
            )
        else:
            yield Finding(
                name=name,
                verdict=Verdict.OK,
                message=f"{', '.join(file.pair.names)[:200]}: until {file.pair.not_after:%Y-%m-%d %H:%M} UTC",
            )


async def _hypervisor(config: Config) -> AsyncGenerator[Finding]:
    settings = config.hypervisor
    kernel = settings.kernel or str(assets.find(assets.KERNEL) or "")
    processes = Processes()
    try:
        for driver in make_drivers(settings, processes, _no_tap, kernel=kernel):
            found = await driver.probe()
            if driver.kind is not HypervisorKind.QEMU:
                yield _other(driver.kind, found)
                continue
            yield _qemu(found)
            if found.available:
                yield _kvm(found)
    finally:
        processes.close()


def _qemu(found: Capabilities) -> Finding:
    if found.available:
        return Finding(name="qemu", verdict=Verdict.OK, message=f"{found.binary}, version {found.version}")
    if found.version:  # it is there, but too old or without our machine
        remedy = "install another QEMU and set hypervisor.qemu_binary, or use Cloud Hypervisor or Firecracker"
    else:
        remedy = f"apt-get install {HOST.qemu_package}"
    return Finding(name="qemu", verdict=Verdict.FAIL, message=found.reason, remedy=remedy)


def _kvm(found: Capabilities) -> Finding:
    if found.accelerator == "kvm":
        return Finding(name="kvm", verdict=Verdict.OK, message="an ordinary kernel runs on it")
    return Finding(
        name="kvm",
        verdict=Verdict.WARN,
        message=f"not usable, VMs are emulated (20 to 50 times slower): {found.accelerator_reason}",
        remedy="switch on virtualisation in the firmware, load kvm_intel or kvm_amd; in a cloud, take a bare-metal "
        "machine",
    )


def _other(kind: HypervisorKind, found: Capabilities) -> Finding:
    """A finding on an optional VMM, of interest if it is installed."""
    name = kind.value
    if not found.binary:
        return Finding(name=name, verdict=Verdict.OK, message="not installed, and not needed")
    if not found.available:
        return Finding(name=name, verdict=Verdict.WARN, message=f"{found.binary} cannot be used: {found.reason}")
    walls = ""
    if kind is HypervisorKind.CLOUD_HYPERVISOR:
        walls = ", behind landlock" if landlocked() else "; without landlock, which requires Linux 6.2"
    return Finding(name=name, verdict=Verdict.OK, message=f"{found.binary}, version {found.version}{walls}")


async def _no_tap(name: str) -> int:
    raise AssertionError("looking needs no TAP")


def _control_groups() -> Iterator[Finding]:
    groups = CGroups.detect()
    if groups.root is not None:
        yield Finding(name="control groups", verdict=Verdict.OK, message=str(groups.root))
    else:
        yield Finding(
            name="control groups",
            verdict=Verdict.WARN,
            message="no cgroup v2 for us: CPU and memory of VMMs are not bounded",
            remedy="boot with systemd.unified_cgroup_hierarchy=1, or install the systemd units",
        )


def _devices(config: Config) -> Iterator[Finding]:
    groups = Path(config.devices.sysfs_root, "kernel/iommu_groups")
    number = len(list(groups.iterdir())) if groups.is_dir() else 0
    if number:
        yield Finding(name="iommu", verdict=Verdict.OK, message=f"{number} groups on {facts.cpus()} CPUs")
    else:
        yield Finding(
            name="iommu",
            verdict=Verdict.OK,
            message="no groups; devices cannot be passed through (intel_iommu=on or amd_iommu=on may make some)",
        )
