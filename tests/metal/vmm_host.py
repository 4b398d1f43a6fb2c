"""A virtual host with the VMMs that are not Debian's, our code, and the Python packages that it needs.

Its kernel is the one of Debian's backports, for landlock. The VMMs come from the folder that HYPEMAN_TEST_VMMS names,
else from PATH. ``python -m tests.metal.vmm_host`` measures all kinds side by side on such a host
(``tests/bench/bench_kinds.py``).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import tomllib
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest

from packaging.requirements import Requirement
from tests.hypervisor.conftest import NoGuest, build_guest
from tests.metal.image import Image, build_image, missing
from tests.metal.rig import MetalHost, nvme

ROOT = Path(__file__).parents[2]
PROGRAMS = ("cloud-hypervisor", "firecracker", "jailer")
SLOWNESS = 10
"""By what factor timeouts are longer in there than on a real host."""

_OURS = (
    "hypeman", "build/guest", "tests/__init__.py", "tests/conftest.py", "tests/conformance", "tests/fakes",
    "tests/hypervisor", "tests/real", "tests/metal/limits_inside.py",
    "tests/metal/under_units.py", "tests/bench/__main__.py",
    "tests/bench/harness.py", "tests/bench/bench_hypervisor.py", "tests/bench/bench_kinds.py",
)  # fmt: skip
_UNITS = ("hypeman-vms.service", "hypeman.service", "hypeman.slice")
_SERVER = b"""[Service]
ExecStart=
ExecStart=/usr/bin/python3 -m hypeman serve
WorkingDirectory=/opt/hypeman
Environment=HYPERVISOR__KVM_PATIENCE=100 REQUEST_TIMEOUT=900 PORT=0
WatchdogSec=0
TimeoutStartSec=15min
"""
"""What differs in the virtual host: our code is not installed, and everything takes longer."""
_TOOLS = ("pytest", "pytest-trio", "hypothesis")
_SETTINGS = b"""[pytest]
trio_mode = true
addopts = -ra --import-mode=importlib -p no:cacheprovider
markers =
    real: on real kernels and guests
    slow: over ten seconds
filterwarnings = error
"""
_MODULES = "kvm-amd tun vhost_net vhost_vsock vfio-pci"


def programs() -> dict[str, Path]:
    """The installed ones, by name."""
    folder = os.environ.get("HYPEMAN_TEST_VMMS")
    found = {name: shutil.which(name, path=folder) for name in PROGRAMS}
    return {name: Path(path).resolve() for name, path in found.items() if path}


def boot_for_tests(folder: Path, *, newer_kernel: bool = False, cpus: int = 1) -> MetalHost:
    """``boot`` in a test, which is skipped on machines where no host can be made."""
    if reason := missing():
        pytest.skip(reason)
    try:
        return boot(build_image(newer_kernel=newer_kernel), folder, cpus=cpus)
    except NoGuest as error:
        pytest.fail(f"{error}: make ready-own")


def boot(image: Image, folder: Path, *, cpus: int = 1) -> MetalHost:
    """A host with our code in /opt/hypeman, a guest for it in /opt/guest, the programs in /opt/vmms, and an NVMe."""
    kernel, initrd = build_guest(folder)
    files: dict[str, bytes | Path] = {
        "/opt/guest/vmlinux": kernel,
        "/opt/guest/initrd.cpio": initrd,
        "/opt/hypeman/pytest.ini": _SETTINGS,
    }
    files |= {f"/opt/vmms/{name}": path for name, path in programs().items()}
    files |= {f"/opt/hypeman/{name}": ROOT / name for name in _OURS if (ROOT / name).exists()}
    files |= {f"/opt/hypeman/{name}": path for name, path in packages(*_TOOLS).items()}
    medium = folder / "nvme"
    medium.touch()
    os.truncate(medium, 16 << 20)
    host = MetalHost.boot(image, devices=(nvme("nvme", 0, medium),), files=files, memory_mb=4096, cpus=cpus)
    try:
        host.check(
            f"for module in {_MODULES}; do modprobe $module; done; "
            "mkdir -p /opt/vmms; chmod -R 755 /opt/vmms /opt/guest"
        )
        host.keep_vms()
    except BaseException:
        host.close()
        raise
    return host


def start_keeper(host: MetalHost) -> None:
    """Install the package's units and start the one that keeps the VMs; ``systemctl start hypeman`` adds a server."""
    units: dict[str, bytes | Path] = {f"/etc/systemd/system/{unit}": ROOT / "systemd" / unit for unit in _UNITS}
    host.put({**units, "/etc/systemd/system/hypeman.service.d/test.conf": _SERVER})
    host.check("systemctl daemon-reload && systemctl start hypeman-vms")


def packages(*tools: str) -> dict[str, Path]:
    """The files and folders of all packages that the product and ``tools`` need, by name; the host's Debian has the
    same Python series as we do."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted, found = [*tools, *project["dependencies"]], dict[str, Distribution]()
    while wanted:
        requirement = Requirement(wanted.pop())
        here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if here and requirement.name not in found:
            found[requirement.name] = distribution(requirement.name)
            wanted += found[requirement.name].requires or ()
    tops = {
        (file.parts[0], package.locate_file(file.parts[0]))
        for package in found.values()
        for file in package.files or ()
        if file.parts[0] not in ("..", "__pycache__")
    }
    return {name: Path(str(path)) for name, path in tops}


def run_tests(host: MetalHost, selection: str, *, seconds: float, **environ: str) -> str:
    """Run tests of ours in there; the output of pytest."""
    settings = " ".join(f"{name}={value}" for name, value in environ.items())
    return host.check(f"{_ENTER} env {settings} python3 -m pytest -q {selection}", timeout=seconds)


_ENTER = (
    "cd /opt/hypeman && export HYPEMAN_TEST_VMMS=/opt/vmms HYPEMAN_TEST_GUEST=/opt/guest "
    f"HYPEMAN_TEST_SLOWNESS={SLOWNESS} HYPEMAN_TEST_WARM=/opt/warm && exec unshare --net"
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, boot(build_image(newer_kernel=True), Path(folder)) as host:
        print(host.check(f"{_ENTER} python3 -m tests.bench kinds", timeout=3600))


if __name__ == "__main__":
    main()
