"""Waits for file changes: inotify through ctypes, limited to what following a log needs.

Why not polling: polling every 50 ms costs 20 wake-ups a second per idle follower and delays a line
by up to 50 ms. With inotify an idle follower costs nothing and a line arrives at once. The kernel
limits the number of inotify instances per user (often 128); beyond that we poll, so that the 129th
follower is slower instead of refused.
"""

from __future__ import annotations

import ctypes
import errno
import os

import trio

_CLOEXEC_NONBLOCK = os.O_CLOEXEC | os.O_NONBLOCK
_FILE_MASK = 0x2 | 0x4 | 0x400 | 0x800  # MODIFY, ATTRIB (last link gone), DELETE_SELF, MOVE_SELF
_DIRECTORY_MASK = 0x100 | 0x80 | 0x200  # CREATE, MOVED_TO, DELETE
_POLL_SECONDS = 0.05
_LOOK_ANYWAY_SECONDS = 2.0
"""Some file systems do not support inotify; a periodic check keeps followers correct even there."""

_libc = ctypes.CDLL(None, use_errno=True)


class ChangeWatch:
    """Reports when a file, or its directory's entries, have changed since the last wait."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = _libc.inotify_init1(_CLOEXEC_NONBLOCK)
        if self._fd < 0 and ctypes.get_errno() not in (errno.EMFILE, errno.ENFILE):
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._add(os.path.dirname(path), _DIRECTORY_MASK)
        self.watch_file()

    def watch_file(self) -> None:
        """Watch the file currently at the path; call again after it was replaced."""
        self._add(self._path, _FILE_MASK)

    async def wait_change(self) -> None:
        """Return after a change; occasionally also without one."""
        if self._fd < 0:
            await trio.sleep(_POLL_SECONDS)
            return
        with trio.move_on_after(_LOOK_ANYWAY_SECONDS):
            await trio.lowlevel.wait_readable(self._fd)
        try:
            while os.read(self._fd, 4096):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _add(self, path: str, mask: int) -> None:
        # A missing path is not an error here: the reader of the file notices it.
        if self._fd >= 0:
            _libc.inotify_add_watch(self._fd, os.fsencode(path), ctypes.c_uint32(mask))
