"""What a compromised engine could do: looked at from inside, and at the real process from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.egress.conftest import World

ROOT = Path(__file__).parents[2]
UID = 510000

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only an engine that root starts gives up files and its user")

PROBE = r"""
import ctypes, errno, os, signal, socket, sys, threading, mmap
from hypeman._native.egress import confine
server = socket.create_server(("127.0.0.1", 0))
abstract = socket.socket(socket.AF_UNIX); abstract.bind("\0hypeman-probe"); abstract.listen()
parent = os.getppid()
libc = ctypes.CDLL(None, use_errno=True)
confine(int(sys.argv[1]))

def attempt(name, act):
    try:
        act()
        print(name, "yes")
    except OSError as error:
        print(name, errno.errorcode[error.errno])

def call(name, number, *arguments):
    result = libc.syscall(number, *arguments)
    print(name, "yes" if result >= 0 else errno.errorcode[ctypes.get_errno()])

def connected(family, kind, address):
    with socket.socket(family, kind) as s:
        s.connect(address)

attempt("open /", lambda: os.open("/", os.O_RDONLY))
attempt("open /etc/passwd", lambda: open("/etc/passwd"))
attempt("open /proc/self/mem", lambda: open("/proc/self/mem"))
attempt("create a file", lambda: open("/x", "w"))
attempt("list /", lambda: os.listdir("/"))
attempt("make a directory", lambda: os.mkdir("/x"))
attempt("memfd", lambda: os.memfd_create("x"))
attempt("run a program", lambda: os.execv("/bin/sh", ["sh"]))
attempt("fork", os.fork)
attempt("signal itself", lambda: os.kill(os.getpid(), 0))
attempt("signal its parent", lambda: os.kill(parent, 0))
attempt("signal everybody", lambda: os.kill(-1, 0))
attempt("pidfd of its parent", lambda: os.pidfd_open(parent))
attempt("become root", lambda: os.setresuid(0, 0, 0))
call("new namespaces", 272, 0x10000000)
call("ptrace", 101, 16, parent, 0, 0)
call("read memory of its parent", 310, parent, 0, 0, 0, 0, 0)
call("mount", 165, b"none", b"/", b"tmpfs", 0, 0)
call("bpf", 321, 0, 0, 0)
call("io_uring", 425, 1, 0)
call("perf events", 298, 0, 0, 0, 0, 0)
call("keys", 248, 0, 0, 0, 0, 0)
call("userfaultfd", 323, 0)
call("memory that is executed", 9, 0, 4096, 7, 0x22, -1, 0)
call("raise its limits", 302, 0, 7, ctypes.byref(ctypes.c_uint64(0)), 0)
attempt("connect TCP", lambda: connected(socket.AF_INET, socket.SOCK_STREAM, server.getsockname()))
attempt("connect UDP", lambda: connected(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 9)))
attempt("listen on TCP", lambda: socket.create_server(("127.0.0.1", 0)))
attempt("bind UDP", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind(("127.0.0.1", 0)))
attempt("abstract unix socket", lambda: connected(socket.AF_UNIX, socket.SOCK_STREAM, "\0hypeman-probe"))
attempt("unix socket pair", socket.socketpair)
attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
attempt("packet socket", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
attempt("raw socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
attempt("ping socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 1))
attempt("vsock", lambda: socket.socket(40, socket.SOCK_STREAM))
attempt("a filter on a socket", lambda: server.setsockopt(socket.SOL_SOCKET, 26, bytes(16)))
thread = threading.Thread(target=lambda: print("thread yes")); thread.start(); thread.join()
"""

GOLDEN = """\
open / EPERM
open /etc/passwd EPERM
open /proc/self/mem EPERM
create a file EPERM
list / EPERM
make a directory EPERM
memfd EPERM
run a program EPERM
fork EPERM
signal itself EPERM
signal its parent EPERM
signal everybody EPERM
pidfd of its parent EPERM
become root EPERM
new namespaces EPERM
ptrace EPERM
read memory of its parent EPERM
mount EPERM
bpf EPERM
io_uring EPERM
perf events EPERM
keys EPERM
userfaultfd EPERM
memory that is executed EPERM
raise its limits EPERM
connect TCP yes
connect UDP yes
listen on TCP EPERM
bind UDP EPERM
abstract unix socket EPERM
unix socket pair EPERM
netlink EPERM
packet socket EPERM
raw socket EPERM
ping socket EPERM
vsock EPERM
a filter on a socket EPERM
thread yes
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of system calls are those of x86-64")
def test_what_can_be_opened_connected_to_or_signalled() -> None:
    # In a namespace of its own: the rules of a server that runs beside it restrict whatever has the engine's uid.
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, "-c", PROBE]
    result = subprocess.run([*command, str(UID)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.returncode) == (GOLDEN, 0), result.stderr


async def test_the_process_has_nothing(world: World) -> None:
    proc = Path(f"/proc/{world.egress.engine_pid}")
    status = dict(re.findall(r"^(\w+):\t(.*)$", (proc / "status").read_text(), re.MULTILINE))
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2" and status["Groups"].split() == []
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert status["Uid"].split() == status["Gid"].split() == [str(world.egress.settings.uid)] * 4
    assert os.listdir(proc / "root") == []
    for kind in ("mnt", "ipc", "uts"):
        assert os.readlink(proc / "ns" / kind) != os.readlink(f"/proc/self/ns/{kind}")
    kinds = [re.sub(r"\[\d+\]", "", os.readlink(path)) for path in (proc / "fd").iterdir()]
    errors = "/memfd:engine-errors (deleted)"
    assert set(kinds) == {"/dev/null", errors, "socket:", "anon_inode:[eventfd]", "anon_inode:[eventpoll]"}
    assert kinds.count("socket:") == 3, "the server, and a listener twice: for the loop, and to be passed on"
    assert "SECRET" not in (proc / "environ").read_text() + (proc / "cmdline").read_text()
