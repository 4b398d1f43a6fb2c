"""A virtual host with the VMMs that are not Debian's, and our code to drive them.

Their programs come from the folder that HYPEMAN_TEST_VMMS names, else from PATH. ``python -m tests.metal.vmm_host``
measures all kinds side by side on such a host (``tests/bench/bench_kinds.py``).
"""

from __future__ import annotations

import os
import shutil
import site
import tempfile
from pathlib import Path

from tests.hypervisor.conftest import build_guest
from tests.metal.image import Image, build_image
from tests.metal.rig import MetalHost

ROOT = Path(__file__).parents[2]
PROGRAMS = ("cloud-hypervisor", "firecracker", "jailer")
SLOWNESS = 10
"""How many times longer everything may take in there than on a host."""

_OURS = (
    "hypeman", "tests/conftest.py", "tests/conformance", "tests/fakes", "tests/hypervisor", "tests/bench/__main__.py",
    "tests/bench/harness.py", "tests/bench/bench_hypervisor.py", "tests/bench/bench_kinds.py",
)  # fmt: skip
_PACKAGES = (
    "trio", "attr", "attrs", "outcome", "sniffio", "sortedcontainers", "idna", "msgspec", "lmdb", "h11", "yaml",
    "_yaml", "pytest", "_pytest", "py.py", "pluggy", "iniconfig", "packaging", "pygments", "pytest_trio",
)  # fmt: skip
_METADATA = ("pytest-", "pytest_trio-", "pluggy-")
"""pytest finds its plugins by these."""
_SETTINGS = b"""[pytest]
trio_mode = true
addopts = -ra --import-mode=importlib -p no:cacheprovider
markers =
    real: on real kernels and guests
filterwarnings = error
"""
_MODULES = "kvm-amd tun vhost_net vhost_vsock"


def programs() -> dict[str, Path]:
    """Those that are here, by name."""
    folder = os.environ.get("HYPEMAN_TEST_VMMS")
    found = {name: shutil.which(name, path=folder) for name in PROGRAMS}
    return {name: Path(path).resolve() for name, path in found.items() if path}


def boot(image: Image, folder: Path) -> MetalHost:
    """A host with our code in /opt/hypeman, a guest for it in /opt/guest and the programs in /opt/vmms."""
    kernel, initrd = build_guest(folder)
    packages = Path(site.getsitepackages()[0])
    files: dict[str, bytes | Path] = {
        "/opt/guest/vmlinux": kernel,
        "/opt/guest/initrd.cpio": initrd,
        "/opt/hypeman/pytest.ini": _SETTINGS,
    }
    files |= {f"/opt/vmms/{name}": path for name, path in programs().items()}
    files |= {f"/opt/hypeman/{name}": ROOT / name for name in _OURS}
    files |= {f"/opt/hypeman/{name}": packages / name for name in _PACKAGES if (packages / name).exists()}
    for path in packages.glob("*.dist-info"):
        if path.name.startswith(_METADATA):
            files[f"/opt/hypeman/{path.name}"] = path
    host = MetalHost.boot(image, files=files, memory_mb=4096)
    try:
        host.check(f"for module in {_MODULES}; do modprobe $module; done; chmod 755 /opt/vmms/* /opt/guest")
    except BaseException:
        host.close()
        raise
    return host


def run_tests(host: MetalHost, selection: str, *, seconds: float) -> str:
    """Run tests of ours in there; what pytest said."""
    return host.check(f"{_ENTER} python3 -m pytest -q {selection}", timeout=seconds)


_ENTER = (
    "cd /opt/hypeman && export HYPEMAN_TEST_VMMS=/opt/vmms HYPEMAN_TEST_GUEST=/opt/guest "
    f"HYPEMAN_TEST_SLOWNESS={SLOWNESS} && exec unshare --net"
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, boot(build_image(), Path(folder)) as host:
        print(host.check(f"{_ENTER} python3 -m tests.bench kinds", timeout=3600))


if __name__ == "__main__":
    main()
