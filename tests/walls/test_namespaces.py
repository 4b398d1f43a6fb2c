"""Rule 5: a VMM can communicate with nothing but us. What it sees, golden; what it calls, call by call.

The programs here stand in the place of a VMM that was taken over: started as VMMs are, with the same walls.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import trio

from hypeman.host.processes import Process, Processes, Program, SpawnFailed
from hypeman.hypervisor.qemu.files import DEVICES, root_files

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="wants root: makes namespaces and changes users")

GOLDEN = Path(__file__).parents[1] / "golden" / "walls" / "qemu.txt"
QEMU = shutil.which("qemu-system-x86_64") or ""
BUSYBOX = "/bin/busybox"
UID = 510017

LOOK = r"""
echo "# what is there"; busybox find / -path /proc -prune -o -print
echo "# in /proc"; for name in $(busybox ls /proc); do case $name in [0-9]*) ;; *) echo /proc/$name;; esac; done
echo "# processes"; for name in $(busybox ls /proc); do case $name in [0-9]*) echo $name;; esac; done | busybox head -1
echo "# writable"
busybox find / -path /proc -prune -o -print | while read -r name; do [ -w "$name" ] && echo "$name"; done
echo "# network interfaces"; busybox tail -n +3 /proc/self/net/dev | busybox cut -d: -f1 | busybox tr -d ' '
echo "# unix sockets"; busybox tail -n +2 /proc/self/net/unix
echo "# host name"; busybox hostname
echo "# privileges"; busybox grep -E '^(CapEff|CapPrm|CapInh|NoNewPrivs|Seccomp|Groups):' /proc/self/status
""".replace("busybox ", f"{BUSYBOX} ")


def program(tmp_path: Path, *argv: str, **changes: object) -> Program:
    whole = Program(argv=argv, log=str(tmp_path / "log"), mark=str(tmp_path), uid=UID, gid=UID)
    return msgspec.structs.replace(whole, **changes)


async def said(tmp_path: Path, wanted: Program) -> str:
    process: Process = await Processes().spawn(wanted)
    with trio.fail_after(60):
        await process.wait()
    process.close()
    return (tmp_path / "log").read_text()


def parents(path: str) -> set[str]:
    return {str(parent) for parent in Path(path).parents}


async def test_what_a_qemu_can_open_list_write_or_connect_to(tmp_path: Path) -> None:
    """A new line is a new way out: it has to be looked at before it goes into the golden file."""
    if not QEMU or not Path(BUSYBOX).exists():
        pytest.skip("wants qemu-system-x86_64 and busybox-static")
    files = root_files(QEMU)
    wanted = program(tmp_path, BUSYBOX, "sh", "-c", LOOK, root_files=(*files, BUSYBOX), other_devices=DEVICES)
    text = await said(tmp_path, wanted)
    own = set(files) | {BUSYBOX}
    libraries = {path for path in own if ".so" in path}
    above = set().union(*map(parents, own)) - {"/"}
    kept: list[str] = []
    for line in text.splitlines():
        if line in libraries:
            line = "<a library of QEMU>"
        elif line in above:
            line = "<a directory above one of these>"
        elif line == BUSYBOX:
            line = "<this test>"
        elif line in own:
            line = f"<firmware> {os.path.basename(line)}" if "/share/" in line else "<QEMU>"
        if line not in kept[-1:]:
            kept.append(line)
    sections: list[str] = []
    found: list[str] = []
    for line in kept:
        if line.startswith("# "):
            sections += sorted(set(found))
            found = []
            sections.append(line)
        else:
            found.append(line)
    rendered = "\n".join([*sections, *sorted(set(found))]) + "\n"
    if os.environ.get("HYPEMAN_WRITE_GOLDEN"):
        GOLDEN.write_text(rendered)
    assert _by_section(rendered) - _by_section(GOLDEN.read_text()) == set()


def _by_section(text: str) -> set[tuple[str, str]]:
    section = ""
    found: set[tuple[str, str]] = set()
    for line in text.splitlines():
        section = line if line.startswith("# ") else section
        found.add((section, line))
    return found


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
    text = await said(tmp_path, program(tmp_path, sys.executable, "-c", CALL, *numbers, uid=0, gid=0, jailer=jailer))
    answers = dict(line.split() for line in text.splitlines())
    assert {name for name, number in calls.items() if answers[str(number)] != "1"} == set(), "EPERM"


async def test_every_vmm_has_namespaces_of_its_own(tmp_path: Path) -> None:
    kinds = ("mnt", "net", "ipc", "uts", "pid")
    processes = Processes()
    running = [await processes.spawn(program(tmp_path, "/bin/sleep", "60")) for _ in range(2)]
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
        text = await said(
            tmp_path,
            program(tmp_path, sys.executable, "-c", SEND, "@hypeman-test-walls", str(place), hidden=(str(tmp_path),)),
        )
        assert "refused @hypeman-test-walls" in text and "reached" not in text
        for sock in (abstract, named):
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(100)


async def test_processes_of_others_are_not_there(tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/sleep", "60"]) as other:
        script = "import os; print(os.getpid(), sorted(filter(str.isdigit, os.listdir('/proc'))))"
        text = await said(tmp_path, program(tmp_path, sys.executable, "-c", script, hidden=(str(tmp_path),)))
        other.kill()
    assert text.split("\n")[0] == "1 ['1']"


async def test_walls_that_cannot_be_built_let_nothing_start(tmp_path: Path) -> None:
    with pytest.raises(SpawnFailed, match="/no/such/file"):
        await Processes().spawn(program(tmp_path, "/bin/sleep", "60", root_files=("/bin/sleep", "/no/such/file")))
