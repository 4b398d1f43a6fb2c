"""Run inside the virtual host by test_limits.py: a guest under the server that systemd started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import time
from pathlib import Path

import httpx

from hypeman.cli.execute import capture
from hypeman.cli.session import Session
from hypeman.host.cgroups import UNDER_SYSTEMD
from tests.real.appliance import IMAGE, busybox_archive

SOCKET = "/run/hypeman/hypeman.sock"
TIMEOUT = 300
SERVE = ["sh", "-c", "echo from the guest > /tmp/index.html; exec httpd -f -p 80 -h /tmp"]


def program_in(group: Path) -> int:
    """The one program in a control group; KVM's worker for a VM, a kernel thread, is in it as well."""
    pids = (group / "cgroup.procs").read_text().split()
    programs = [pid for pid in pids if Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(programs) == 1, pids
    return int(programs[0])


def has_no_privileges(pid: int) -> bool:
    fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    found = (fields["Seccomp"], fields["NoNewPrivs"], int(fields["CapEff"], 16))
    return found == ("2", "1", 0) and "0" not in fields["Uid"].split()


def ask(command: tuple[str, ...]) -> tuple[int | None, str]:
    """Exit code and output of a program in the guest."""
    session = Session(base_url=f"unix://{SOCKET}")
    try:
        return capture(session, "one", command)
    finally:
        session.close()


def wait_resolved() -> None:
    """The guest's resolver gives up after 5 s, of which a busy virtual host may have run for less than one."""
    begun, answers = time.monotonic(), list[tuple[float, int | None, str]]()
    while not any("10.100.0.1" in output for _, _, output in answers):
        assert time.monotonic() < begun + TIMEOUT, answers
        answers.append((time.monotonic() - begun, *ask(("nslookup", "-type=a", "gateway.hypeman.local"))))
    if len(answers) > 1:
        print(f"resolved after {answers}", flush=True)


def reached() -> None:
    """Through its agent, its published port, and the gateway's DNS."""
    assert ask(("echo", "there")) == (0, "there\n")
    wait_resolved()
    assert page("127.0.0.1:8080") == "from the guest\n"


def page(address: str) -> str:
    command = ["curl", "-sS", "--max-time", str(TIMEOUT), f"http://{address}/"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


NAMESPACES = 0x00020000 | 0x40000000 | 0x08000000 | 0x04000000
"""Mount, network, IPC and UTS, for setns."""
KINDS = (socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET)


def sockets_of_the_host() -> set[str]:
    """Names of all unix sockets, abstract ones with an @."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return {words[7] for words in map(str.split, lines) if len(words) > 7}


def reached_by(user: int, names: set[str], *, inside: int | None) -> set[str]:
    """Which of ``names``, and of the sockets that it finds itself, a process with that user id could send
    ``STOPPING=1`` to; ``inside`` the namespaces of a VMM, or in those of the host."""
    answers, question = os.pipe()
    if child := os.fork():
        os.close(question)
        with open(answers) as file:
            reached = set(file.read().splitlines())
        assert os.waitpid(child, 0)[1] == 0
        return reached
    if inside is not None:
        if ctypes.CDLL(None).setns(os.pidfd_open(inside), NAMESPACES):
            os._exit(1)
        os.chdir("/")
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    found = (
        {os.path.join(top, name) for top, _, files in os.walk("/") for name in files} if inside is not None else set()
    )
    for name in names | found:
        for kind in KINDS:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as sock:
                sock.settimeout(1)
                sock.connect("\0" + name[1:] if name.startswith("@") else name)
                sock.send(b"STOPPING=1")
                os.write(question, f"{name}\n".encode())
    os._exit(0)


def check_reaches_nobody(vmm: int) -> None:
    """The attack that ended all VMs: datagrams to every socket of the host, systemd's above all."""
    user = int(Path(f"/proc/{vmm}/status").read_text().partition("Uid:")[2].split()[0])
    notify = {"/run/systemd/notify"}
    assert reached_by(user, notify, inside=None) == notify, "without its namespaces it would be received"
    assert reached_by(user, notify | sockets_of_the_host(), inside=vmm) == set()
    subprocess.run(["systemctl", "is-active", "hypeman", "hypeman-vms"], check=True)


def main() -> None:
    engine = program_in(UNDER_SYSTEMD / "egress-engine")
    assert has_no_privileges(engine)
    with httpx.Client(transport=httpx.HTTPTransport(uds=SOCKET), base_url="http://hypeman", timeout=900) as client:
        client.post("/images/import", params={"name": IMAGE}, content=busybox_archive()).raise_for_status()
        image = f"/images/{IMAGE.replace('/', '%2F').replace(':', '%3A')}"
        while (found := client.get(image).json())["status"] != "ready":
            assert found["status"] != "failed", found
            time.sleep(0.5)
        wanted = {
            "name": "one", "image": IMAGE, "size": "128MB", "vcpus": 1, "overlay_size": "64MB", "cmd": SERVE,
            "ports": [{"host_port": 8080, "guest_port": 80}],
            "auto_standby": {"enabled": True, "idle_timeout": "1h", "wake": "all"},
        }  # fmt: skip
        client.post("/instances", json=wanted).raise_for_status()
        for _ in range(3):  # 5 minutes each, the maximum of a request
            answer = client.get("/instances/one/wait", params={"state": "Running", "timeout": "300s"}).json()
            if not answer["timed_out"]:
                break
        assert answer["state"] == "Running", answer
        one = client.get("/instances/one").json()
        group = UNDER_SYSTEMD / one["id"]
        assert has_no_privileges(program_in(group))
        assert (group / "memory.max").read_text().strip() != "max"
        check_reaches_nobody(program_in(group))
        reached()
        client.post("/instances/one/standby").raise_for_status()
        client.post("/instances/one/restore").raise_for_status()
        reached()
        client.post("/instances/one/standby").raise_for_status()
        assert page(one["network"]["ip"]) == "from the guest\n", "the packet was held and woke it"
        assert client.get("/instances/one/auto-standby/status").json()["last_wake"]
        client.delete("/instances/one").raise_for_status()
        assert not group.exists()
    assert program_in(UNDER_SYSTEMD / "egress-engine") == engine, "it is still the same"
    print("under the units: ok")


main()
