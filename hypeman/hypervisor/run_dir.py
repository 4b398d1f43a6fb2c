"""Names in the run directory of a VMM with an HTTP API; pure, for the command lines and bodies that use them.

Every path that such a VMM gets is a name in its working directory, so that a saved state, which
remembers them, fits every other run directory too.
"""

from __future__ import annotations

API_SOCKET = "api.sock"
VSOCK = "vsock.sock"
KERNEL = "kernel"
INITRD = "initrd"
LOG = "vmm.log"
GUEST_CID = 3
"""The same for all: CIDs of a vsock behind a unix socket are private to the VMM."""


ROOM = "room"
"""Directory below its run directory that Cloud Hypervisor works in and may write to. What root opens lies beside it."""
SAVING = "vmm"
"""Directory below that of a new capture which Cloud Hypervisor writes its files to. Root takes them out of there."""


def disk_link(disk_id: str) -> str:
    """File name of a disk."""
    return f"disk-{disk_id}"
