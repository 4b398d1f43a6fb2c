"""What a Cloud Hypervisor or Firecracker that was taken over does to the names and descriptors in its reach.

Runs in tests/fakes/remote_vmm.py, at every request, as the user and in the directory of the VMM, with nothing but the
standard library. ``test_hostile_remote_vmm.py`` writes what ``PLAN`` is.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import socket
from pathlib import Path
from typing import Any

PLAN: dict[str, Any] = {"everything": False, "when": "", "victims": []}
KINDS = ("symlink", "hard link", "FIFO", "directory", "socket", "huge file")
NAMES = (
    *("disk-overlay", "disk-root", "disk-more", "kernel", "initrd", "vmm.log", "events", "channel.new", "saved"),
    *("state", "memory", "config.json", "state.json", "memory-ranges", "memory.new", "capture.json", "vsock.sock"),
    *("../events", "../api.sock", "../vmm.log", "../overlay.raw", "restored-from", "../restored-from", "..", "."),
)
NEEDED = ("api.sock", "vsock.sock_1024")
"""Without these no operation would go on; a plan of ``everything`` attacks them too, from the first request on."""
LARGEST = 1 << 50


_requests = itertools.count()


def attack(when: str, body: Any, *, running: bool) -> None:
    """The request has ``body``. Each name is replaced by something of another kind at each request."""
    everything = PLAN["everything"]
    if PLAN["when"] != when or not (running or everything):
        return
    turn = next(_requests)
    directories = [Path.cwd(), *_directories(body)]
    for directory in directories:
        with contextlib.suppress(OSError):
            found = os.listdir(directory)
            for number, name in enumerate(sorted({*found, *NAMES, *(NEEDED if everything else ())})):
                if everything or name not in (*NEEDED, "requests"):
                    victim = PLAN["victims"][number % len(PLAN["victims"])]
                    _replace(directory / name, KINDS[(number + turn) % len(KINDS)], victim)
    for number in map(int, os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else range(3, 64):
        _spoil(number)


def _directories(body: Any) -> list[Path]:
    """Those that the server has named."""
    texts = [text for text in json.loads(json.dumps(body)).values() if isinstance(text, str)] if body else []
    paths = [Path(text.removeprefix("file://")) for text in texts if "/" in text]
    return [path for path in paths if path.is_dir()]


def _replace(path: Path, kind: str, victim: str) -> None:
    with contextlib.suppress(OSError):
        os.rename(path, f"{path}.away")
    with contextlib.suppress(OSError):
        os.unlink(path)
    with contextlib.suppress(OSError):
        os.rmdir(path)
    with contextlib.suppress(OSError):
        if kind == "symlink":
            os.symlink(victim, path)
        elif kind == "hard link":
            os.link(victim, path)
        elif kind == "FIFO" and PLAN["when"] == "after":  # before, it would wait for a writer itself
            os.mkfifo(path, 0o666)
        elif kind == "directory":
            os.mkdir(path, 0o777)
            (path / "file").write_text("in the way")
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(os.path.relpath(path))
        elif kind == "huge file":
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, 1 << 20)
                file.truncate(1 << 30)
                os.chmod(path, 0o6777)
                file.truncate(LARGEST)


def _spoil(number: int) -> None:
    """One descriptor of ours: enlarged, leased, made everybody's, flooded."""
    if number < 3:
        return
    for act in (
        lambda: os.ftruncate(number, LARGEST),
        lambda: os.fchmod(number, 0o6777),
        lambda: os.fchown(number, 0, 0),
        lambda: fcntl.fcntl(number, fcntl.F_SETLEASE, fcntl.F_RDLCK),
        lambda: fcntl.fcntl(number, fcntl.F_SETLEASE, fcntl.F_WRLCK),
        lambda: fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB),
        lambda: os.link(f"/proc/self/fd/{number}", "linked", follow_symlinks=True),
    ):
        with contextlib.suppress(OSError):
            act()
    with contextlib.suppress(OSError):
        if "events" in os.readlink(f"/proc/self/fd/{number}"):
            os.set_blocking(number, False)
            for _ in range(100):
                os.write(number, b'{"source": "\x1b]0;x\x07", "event": ' + b"[" * 4000)
