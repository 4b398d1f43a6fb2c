"""The chroot that the jailer confines Firecracker to.

    <jail>/<program>/<name>/root/    all that the VMM can see
        disk-<id> kernel initrd vmm.log          hard links to our files, each accessible while it opens it
        api.sock vsock.sock vsock.sock_1024
        firecracker dev/…                        made by the jailer
    run_dir/jail                                 leads there

It lies beside the VM's disks and not in the run directory: that is a tmpfs, which has no device nodes and no
links to disks. So all disks and captures have to be on the file system of the data directory, as they are.
The VMM owns its root: files in it are never trusted, and never opened up or changed by their names in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hypeman.host.processes import mark_argument
from hypeman.host.temporary_access import temporary_access
from hypeman.hypervisor.interface import LaunchFailed, VmConfig
from hypeman.hypervisor.remote import clear, emptied, populated
from hypeman.hypervisor.run_dir import INITRD, KERNEL, LOG
from hypeman.hypervisor.vmm_process import take_back_directories

_WAY_IN = "jail"


def room_of(run_dir: str) -> Path:
    """The root directory of the VMM, by a path that is short enough for sockets."""
    return Path(run_dir, _WAY_IN)


def name_of(config: VmConfig) -> str:
    """The VMM's name, which is also its mark, since the jailer clears the environment."""
    return mark_argument(config.run_dir)


@contextlib.contextmanager
def jail(config: VmConfig, program: str) -> Iterator[Path]:
    """A jail for ``program`` with the disks in it, taken down if the block fails. Gives its base."""
    base = base_of(config)
    root = base / os.path.basename(os.path.realpath(program)) / name_of(config) / "root"
    try:
        with contextlib.ExitStack() as opened:
            try:
                take_back_directories(config)
                emptied(Path(config.run_dir))
                shutil.rmtree(base, ignore_errors=True)
                for directory in (base, root.parent.parent, root.parent, root):
                    directory.mkdir(mode=0o711)
                room_of(config.run_dir).symlink_to(root)
                log = Path(config.vmm_log)
                log.touch(mode=0o600)
                opened.enter_context(temporary_access(log, config.uid))
                let_in(log, root / LOG)
            except OSError as error:
                raise LaunchFailed(f"{error.filename or base}: {error.strerror}") from error
            opened.enter_context(populated(root, config, let_in, kernel=False))
            yield base
    except BaseException:
        take_down(config.run_dir)
        raise


def base_of(config: VmConfig) -> Path:
    return Path(config.jail)


def let_in(source: Path, name: Path) -> None:
    """``source`` under ``name`` in a jail. Raises OSError."""
    try:
        name.hardlink_to(source)
    except OSError as error:
        if error.errno != errno.EXDEV or name.name not in _COPIED:
            raise
        shutil.copyfile(source, name)
        name.chmod(0o444)


def take_out(name: Path) -> None:
    """Remove what ``let_in`` placed; what the VMM made of it goes with the jail."""
    with contextlib.suppress(OSError):
        clear(name)


_COPIED = (KERNEL, INITRD)
"""Files that may be copied in from another file system: small and never written."""


def take_down(run_dir: str) -> None:
    """Remove the jail that was made for ``run_dir``, if there is one. Its VMM must have exited."""
    with contextlib.suppress(OSError):
        root = Path(os.readlink(room_of(run_dir)))
        shutil.rmtree(root.parents[2], ignore_errors=True)
        room_of(run_dir).unlink()
