"""The disk of the virtual bare-metal host: a Debian root with a real kernel, made once and kept.

    build/metal/<key>/root.ext4   the root, never written: each boot works on an overlay of its own
                      vmlinuz     the host's kernel and initramfs, also used for the guests inside it
                      initrd.img
    build/metal/mdev-<release>/   the kernel's sample mdev drivers, built for that kernel

``key`` is a digest of the recipe: another package list or agent gives another image. Requires root, mmdebstrap, mke2fs
and the Debian mirror of the host's own apt; about two minutes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "metal"

SUITE = "bookworm"
BACKPORTS = "bookworm-backports"
_KERNEL = "linux-image-amd64"
BASE = (
    "systemd-sysv", "udev", "dbus", "kmod", "pciutils", "iproute2", "procps", "initramfs-tools", "zstd", "nftables",
    "e2fsprogs", "erofs-utils", "busybox-static", "curl", "ca-certificates",
    "qemu-system-x86",
)  # fmt: skip
MAX_ROOT = "8G"
"""The file is sparse: 1 GB of it is used."""
_INITRAMFS_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4")
_EXCLUDED = (
    "/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/lintian/*",
    *(f"/lib/modules/*/kernel/{name}/*" for name in (
        "drivers/media", "drivers/staging", "drivers/infiniband", "drivers/iio", "drivers/isdn", "drivers/mtd",
        "drivers/hwmon", "drivers/net/wireless", "drivers/net/can", "drivers/gpu/drm/amd", "drivers/gpu/drm/i915",
        "drivers/gpu/drm/nouveau", "drivers/gpu/drm/radeon", "drivers/scsi", "drivers/usb/serial", "drivers/input",
        "drivers/leds", "drivers/power", "drivers/video", "sound/soc", "sound/usb", "sound/firewire", "fs/ocfs2",
        "fs/gfs2", "fs/ceph", "fs/afs", "fs/cifs", "fs/ksmbd",
    )),
)  # fmt: skip


_MMDEBSTRAP = (
    "unshare", "--mount",  # its mounts in the tree must end with it: trees of failed builds are removed
    "mmdebstrap", "--variant=minbase", '--aptopt=APT::Install-Recommends "false"',
    *(f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED),
)  # fmt: skip


class Image(NamedTuple):
    """What a boot needs."""

    root: Path
    kernel: Path
    initrd: Path
    release: str
    """Of the kernel, as in ``uname -r``."""


def missing() -> str:
    """Why no image can be made here; empty if one can."""
    if os.geteuid() != 0:
        return "requires root, for mmdebstrap and device nodes"
    tools = ("mmdebstrap", "mke2fs", "qemu-system-x86_64", "qemu-img")
    absent = [tool for tool in tools if shutil.which(tool) is None]
    return f"requires {', '.join(absent)}" if absent else ""


def build_image(
    *, suite: str = SUITE, python: bool = True, newer_kernel: bool = False, extra: tuple[str, ...] = ()
) -> Image:
    """The image of a suite of Debian with or without Python (an appliance must run without), with its own kernel or
    the one of bookworm's backports, and ``extra`` Debian packages."""
    kernel = f"{_KERNEL}/{BACKPORTS}" if newer_kernel else _KERNEL
    packages = (*BASE, kernel, *(("python3",) if python else ()), *extra)
    recipe = "\n".join((suite, *packages, *_EXCLUDED, *_INITRAMFS_MODULES, MAX_ROOT))
    recipe += "".join((HERE / name).read_text() for name in ("agent.sh", "rig-agent.service"))
    directory = CACHE / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    with _locked(directory):
        if not (directory / "done").exists():
            _make_root(directory, suite, packages)
            (directory / "done").write_text(_release(directory))
    release = (directory / "done").read_text()
    return Image(directory / "root.ext4", directory / "vmlinuz", directory / "initrd.img", release)


def build_mdev_modules(release: str) -> Path:
    """A directory with mtty.ko, mdpy.ko and mbochs.ko for kernel ``release``."""
    directory = CACHE / f"mdev-{release}"
    with _locked(directory):
        if not (directory / "done").exists():
            _make_modules(directory, release)
            (directory / "done").touch()
    return directory


def _make_root(directory: Path, suite: str, packages: tuple[str, ...]) -> None:
    tree = directory / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    initramfs = "$1/etc/initramfs-tools"
    modules = "\\n".join(_INITRAMFS_MODULES)
    # The kernel's package builds the initramfs while it is installed, so its settings come before.
    early = (
        f"mkdir -p {initramfs}/conf.d; echo MODULES=list > {initramfs}/conf.d/rig; "
        f"printf '{modules}\\n' > {initramfs}/modules"
    )
    backports = f"deb http://deb.debian.org/debian {BACKPORTS} main"  # used only for packages requested from it by name
    setup = f"echo '{backports}' > $1/etc/apt/sources.list.d/backports.list" if suite == SUITE else "true"
    late = (
        f"install -D -m 755 {HERE}/agent.sh $1/usr/local/lib/rig-agent",
        f"install -D -m 644 {HERE}/rig-agent.service $1/etc/systemd/system/rig-agent.service",
        'ln -s ../rig-agent.service "$1/etc/systemd/system/multi-user.target.wants/rig-agent.service"',
        'echo metal > "$1/etc/hostname"; echo "127.0.0.1 localhost metal" > "$1/etc/hosts"; rm -f "$1/etc/fstab"',
        'ln -sf /dev/null "$1/etc/systemd/system/systemd-networkd-wait-online.service"',
        'chroot "$1" passwd -d root',
    )
    run(
        *_MMDEBSTRAP,
        f"--include={','.join(packages)}", f"--essential-hook={early}",
        f"--setup-hook={setup}", *(f"--customize-hook={hook}" for hook in late), suite, str(tree),
    )  # fmt: skip
    kernel = next((tree / "boot").glob("vmlinuz-*"))
    shutil.copy(kernel, directory / "vmlinuz")
    shutil.copy(tree / "boot" / kernel.name.replace("vmlinuz", "initrd.img"), directory / "initrd.img")
    (directory / "release").write_text(kernel.name.removeprefix("vmlinuz-"))
    image = directory / "root.ext4"
    image.unlink(missing_ok=True)
    run("mke2fs", "-q", "-t", "ext4", "-L", "metal", "-d", str(tree), str(image), MAX_ROOT)
    shutil.rmtree(tree)


def _make_modules(directory: Path, release: str) -> None:
    """In a Debian of their own: the headers need their compiler and absolute paths."""
    tree = directory / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    series = ".".join(release.split(".")[:2])
    run(
        *_MMDEBSTRAP,
        f"--include=gcc,make,xz-utils,linux-headers-{release},linux-source-{series}", SUITE, str(tree),
    )  # fmt: skip
    work = tree / "root/mdev"
    work.mkdir()
    run(
        "tar", "-C", str(work), "--strip-components=3", "-xf", str(tree / f"usr/src/linux-source-{series}.tar.xz"),
        "--wildcards", "*/samples/vfio-mdev/*.[ch]",
    )  # fmt: skip
    (work / "Makefile").write_text("obj-m += mtty.o mdpy.o mbochs.o\n")
    run("chroot", str(tree), "make", "-C", f"/usr/src/linux-headers-{release}", "M=/root/mdev", "modules")
    for module in work.glob("*.ko"):
        shutil.copy(module, directory)
    shutil.rmtree(tree)


def _release(directory: Path) -> str:
    return (directory / "release").read_text()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One builder at a time; others wait and find it done."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(*argv: str) -> None:
    """Run a command of the build; its output is in the error."""
    result = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(argv[:3])} … failed with {result.returncode}:\n{result.stdout[-4000:]}")
