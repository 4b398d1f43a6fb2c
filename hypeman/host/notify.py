"""Readiness notification to systemd, and the sockets that systemd keeps while the service restarts.

A listening socket that systemd keeps (``FileDescriptorStoreMax`` in the unit) stays open during the restart:
clients that connect meanwhile wait in the kernel's queue for the next process instead of being refused.
Without systemd all of this does nothing.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping, Sequence

_FIRST = 3
"""First descriptor passed by systemd (sd_listen_fds)."""

_log = logging.getLogger(__name__)


def notify(message: str = "READY=1", sockets: Sequence[socket.socket] = ()) -> None:
    """Notify systemd, if it waits for us (``Type=notify``). Never fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address)
            socket.send_fds(sock, [message.encode()], [each.fileno() for each in sockets])
    except OSError as error:
        _log.warning("systemd could not be notified of %s: %s", message, error)


def keep_sockets(name: str, sockets: Sequence[socket.socket]) -> None:
    """Store ``sockets`` with systemd for the next process, replacing all others of that name."""
    notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
    notify(f"FDSTORE=1\nFDNAME={name}", sockets)


def take_kept_sockets(environ: MutableMapping[str, str] = os.environ) -> dict[str, list[socket.socket]]:
    """The sockets that systemd kept for us, by name. Call it once: it removes the variables from ``environ``."""
    ours = environ.pop("LISTEN_PID", "") == str(os.getpid())
    count, names = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[socket.socket]] = {}
    if not ours or not count.isdecimal() or len(names) != int(count):
        return found
    for descriptor, name in enumerate(names, _FIRST):
        try:
            kept = socket.socket(fileno=descriptor)
        except OSError:  # not a socket: not from us
            os.close(descriptor)
            continue
        kept.set_inheritable(False)
        kept.setblocking(False)
        found.setdefault(name, []).append(kept)
    return found
