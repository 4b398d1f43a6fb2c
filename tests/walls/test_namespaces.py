"""Rule 5: a VMM can communicate with nothing but us: what it calls, call by call, and which namespaces it is in.

The programs here stand in the place of a VMM that was taken over: started as VMMs are, with the same walls.
"""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import msgspec
import pytest
import trio

from hypeman.host.processes import Process, Processes, Program, SpawnFailed

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="requires root: makes namespaces and changes users")

PYTHON = "/usr/bin/python3"
SYSTEM = ("/usr", "/lib", "/lib64")
"""What Python needs of the host."""
UID = 510017


def program(tmp_path: Path, *argv: str, **changes: object) -> Program:
    whole = Program(argv=argv, log=str(tmp_path / "log"), mark=str(tmp_path), uid=UID, gid=UID)
    return msgspec.structs.replace(whole, **changes)


async def output_of(tmp_path: Path, wanted: Program) -> str:
    process: Process = await Processes().spawn(wanted)
    with trio.fail_after(60):
        await process.wait()
    process.close()
    return (tmp_path / "log").read_text()


CALLS = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "perf_event_open": 298,
    "bpf": 321,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "userfaultfd": 323,
    "ptrace": 101,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "pidfd_getfd": 438,
    "kexec_load": 246,
    "kexec_file_load": 320,
    "init_module": 175,
    "finit_module": 313,
    "open_by_handle_at": 304,
    "name_to_handle_at": 303,
    "fanotify_init": 300,
    "iopl": 172,
    "ioperm": 173,
    "modify_ldt": 154,
    "swapon": 167,
    "reboot": 169,
    "syslog": 103,
    "getpid, by its number in the x32 interface": 0x40000000 | 39,
}
WITHOUT_JAILER = {
    "mount": 165,
    "umount2": 166,
    "pivot_root": 155,
    "chroot": 161,
    "unshare": 272,
    "setns": 308,
    "mknod": 133,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsmount": 432,
    "mount_setattr": 442,
}
CALL = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
for number in sys.argv[1:]:
    libc.syscall(int(number), 0, 0, 0, 0, 0)
    print(number, ctypes.get_errno())
"""


@pytest.mark.parametrize("jailer", [False, True], ids=["VMM", "jailer"])
async def test_these_calls_are_refused_for_every_kind(jailer: bool, tmp_path: Path) -> None:
    """As root, who would be allowed most of them: it is the filter that refuses."""
    calls = {**CALLS, **({} if jailer else WITHOUT_JAILER)}
    numbers = [str(number) for number in calls.values()]
    text = await output_of(tmp_path, program(tmp_path, PYTHON, "-c", CALL, *numbers, uid=0, gid=0, jailer=jailer))
    answers = dict(line.split() for line in text.splitlines())
    assert {name for name, number in calls.items() if answers[str(number)] != "1"} == set(), "EPERM"


@pytest.mark.parametrize("jailer", [False, True], ids=["VMM", "jailer"])
async def test_every_vmm_has_namespaces_of_its_own(jailer: bool, tmp_path: Path) -> None:
    kinds = ("mnt", "net", "ipc", "uts", "pid")
    processes = Processes()
    running = [await processes.spawn(program(tmp_path, "/bin/sleep", "60", jailer=jailer)) for _ in range(2)]
    try:
        for kind in kinds:
            inodes = {os.stat(f"/proc/{pid}/ns/{kind}").st_ino for pid in (*(p.pid for p in running), os.getpid())}
            assert len(inodes) == 3, kind
    finally:
        for process in running:
            process.kill()
            await process.wait()
            process.close()


SEND = """
import os, socket, sys
for name in sys.argv[1:]:
    address = "\\0" + name[1:] if name.startswith("@") else name
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with socket.socket(socket.AF_UNIX, kind) as sock:
            try:
                sock.connect(address)
                sock.send(b"STOPPING=1")
                print("reached", name)
            except OSError as error:
                print("refused", name, error.errno)
"""


async def test_no_abstract_socket_and_no_notification_socket_is_reached(tmp_path: Path) -> None:
    """The tried attack: STOPPING=1 to the socket of systemd. And whatever listens under an abstract name."""
    place = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract, socket.socket(socket.AF_UNIX, 2) as named:
        abstract.bind("\0hypeman-test-walls")
        named.bind(str(place))
        place.chmod(0o777)
        text = await output_of(
            tmp_path,
            program(tmp_path, PYTHON, "-c", SEND, "@hypeman-test-walls", str(place), root_files=SYSTEM),
        )
        assert "refused @hypeman-test-walls" in text and "reached" not in text
        for sock in (abstract, named):
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(100)


async def test_processes_of_others_are_not_there(tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/sleep", "60"]) as other:
        script = "import os; print(os.getpid(), sorted(filter(str.isdigit, os.listdir('/proc'))))"
        text = await output_of(tmp_path, program(tmp_path, PYTHON, "-c", script, root_files=SYSTEM))
        other.kill()
    assert text.split("\n")[0] == "1 ['1']"


async def test_walls_that_cannot_be_built_let_nothing_start(tmp_path: Path) -> None:
    with pytest.raises(SpawnFailed, match="/no/such/file"):
        await Processes().spawn(program(tmp_path, "/bin/sleep", "60", root_files=("/bin/sleep", "/no/such/file")))
