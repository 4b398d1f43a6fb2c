"""A VMM whose TAP somebody deleted, put on the TAP of the same name that was made anew.

The descriptor that the VMM holds is not lost with its TAP, only empty: the kernel lets it be attached again,
by whoever has a copy of it. We take a copy out of the VMM (pidfd_getfd), attach it and close it. So no VMM needs
to know, no guest to lose its interface, and nothing of ours to be kept for the purpose.

What the VMM had told the old TAP and no one can ask for is set to what fits always: 12 bytes before each frame
(virtio 1.0, so every guest of ours), and no offloads towards the guest, which gets small segments until it
is started or restored next.
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
    """Attach what process ``pid`` holds of deleted TAPs to the TAP ``name``; how many descriptors that were.

    Each copy is checked before it is used.

    Raises HostError. A process that has ended holds none.
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
        raise HostError(f"process {pid} can not be put on TAP {name} again: {error.strerror}") from error
    return len(lost)


def _lost_descriptors(pid: int) -> list[int]:
    """Those of TAPs that are not there any more: the kernel names the TAP in fdinfo, and here no name."""
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
