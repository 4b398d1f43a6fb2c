"""Reattaches a VMM whose TAP was deleted to the recreated TAP of the same name.

The VMM's descriptor outlives its TAP, only detached: the kernel lets any process with a copy of it attach it
again. We copy it from the VMM (pidfd_getfd), attach it and close it. So the VMM is not involved, the guest keeps
its interface, and we need not keep a descriptor for the purpose.

Settings that the VMM made on the old TAP and that cannot be read back get safe values: a 12-byte header before
each frame (virtio 1.0, so all our guests), and no offloads towards the guest, which gets small segments until it
is next started or restored.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from hypeman.host.files import HostError
from hypeman.host.links import TAP_FLAGS, TUN_DEVICE, TUNSETIFF
from hypeman.host.processes import copy_descriptor

_TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454D0, 0x400454D8
_VIRTIO_1_HEADER = 12


def revive(pid: int, name: str) -> int:
    """Attach process ``pid``'s descriptors of deleted TAPs to the TAP ``name``; returns their number.

    Each copy is checked before it is used.

    Raises HostError. An exited process has none.
    """
    try:
        lost = _lost_descriptors(pid)
        for number in lost:
            copy = copy_descriptor(pid, number)
            try:
                if os.readlink(f"/proc/self/fd/{copy}") != TUN_DEVICE:
                    raise OSError(errno.EBADF, "it has replaced its descriptor of the TAP")
                fcntl.ioctl(copy, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_FLAGS))
                fcntl.ioctl(copy, _TUNSETVNETHDRSZ, struct.pack("i", _VIRTIO_1_HEADER))
                fcntl.ioctl(copy, _TUNSETOFFLOAD, 0)
            finally:
                os.close(copy)
    except OSError as error:
        raise HostError(f"process {pid} cannot be put on TAP {name} again: {error.strerror}") from error
    return len(lost)


def _lost_descriptors(pid: int) -> list[int]:
    """Descriptors of deleted TAPs: fdinfo contains the TAP's name, and for these no name."""
    found: list[int] = []
    if not Path(f"/proc/{pid}/fd").is_dir():
        return found
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(entry) == TUN_DEVICE and "iff:\t\n" in Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text():
                found.append(int(entry.name))
        except FileNotFoundError:  # closed meanwhile
            continue
    return found
