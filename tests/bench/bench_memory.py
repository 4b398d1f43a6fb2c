"""Standby, restore, fork and volumes of real guests through the API: how long, how much memory, how much disk.

Guests of 256 MB that sleep. "To agent answer" is until the call has returned (the guest then has its new identity,
reported by the agent) and one question to the agent has been answered. What of it is ours and not the VMM's is in
bench_instances ("control plane"), with VMMs that take no time.
"""

from __future__ import annotations

import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.bench.bench_http import receive
from tests.bench.bench_instances import Client, import_image, server
from tests.bench.bench_streams import frame, upgrade
from tests.bench.harness import Result, cpu_of_tasks, process_memory
from tests.real.appliance import IMAGE, Namespace, short_directory

ROUNDS = 7
FORKS = 10
SETTLED = 0.3
"""Seconds after a fill, so that what it leaves to the background is over."""
_BARE = "bare QEMU, the same capture"
_SPEC = {"image": IMAGE, "size": "256MB", "vcpus": 1, "overlay_size": "1GB"}


def run() -> list[Result]:
    if shutil.which("qemu-system-x86_64") is None:
        return []
    results: list[Result] = []
    for directory in short_directory("bench"):
        directory.chmod(0o755)
        namespace = Namespace()
        try:
            with server(directory, namespace, "hypeman serve") as (client, pid, _):
                import_image(client)
                _start(client)
                meter = Meter(directory, pid)
                with _bare_qemu(client, directory, namespace) as bare:
                    results = [
                        *_sleeps(client, meter, bare),
                        *_fork(client, meter, bare),
                        *_snapshot(client, meter, bare),
                    ]
                results += [*_volumes(client), *_pool(client, directory, meter), *_forks_at_once(client, directory)]
                for instance in client.ask("GET", "/instances"):
                    client.ask("DELETE", f"/instances/{instance['id']}")
        finally:
            namespace.remove()
    return results


def _start(client: Client) -> None:
    client.ask("POST", "/instances", {"name": "vm", **_SPEC})
    client.ask("GET", "/instances/vm/wait?state=Running&timeout=120s")
    _answer(client, "vm")


def _answer(client: Client, name: str) -> None:
    assert client.ask("GET", f"/instances/{name}/stat?path=/")["is_dir"]


def _milliseconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1000


Costs = tuple[float, float]
"""Milliseconds, and milliseconds of CPU of everything that took part but the client."""


class Meter:
    def __init__(self, directory: Path, server: int) -> None:
        self._directory = directory
        self._server = server

    def __call__(self, work: Callable[[], object]) -> Costs:
        before = self._cpu()
        took = _milliseconds(work)
        return took, sum(used - before.get(pid, 0) for pid, used in self._cpu().items()) * 1000

    def _cpu(self) -> dict[int, float]:
        return {pid: cpu_of_tasks(pid) for pid in (self._server, *_vmms(self._directory).values())}


def _compare(name: str, ours: Callable[[], Costs], peer_name: str, peer: Callable[[], Costs]) -> list[Result]:
    """Time, and CPU time in the same rounds, which says more where others use the CPUs as well."""
    results = []
    rounds = [(ours(), peer()) if number % 2 else (peer(), ours())[::-1] for number in range(ROUNDS + 1)][1:]
    for what, index in ((name, 0), (f"{name}, CPU", 1)):
        mine, theirs = [own[index] for own, _ in rounds], [other[index] for _, other in rounds]
        ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
        results.append(Result(what, statistics.median(mine), "ms", peer_name, statistics.median(theirs), ratio))
    return results


@contextmanager
def _bare_qemu(client: Client, directory: Path, namespace: Namespace) -> Iterator[Callable[[], Costs]]:
    """Restores the capture of a snapshot with nothing of ours (bare_qemu.py)."""
    made = client.ask("POST", "/instances/vm/snapshots", {"kind": "Standby", "name": "bare"})
    (capture,) = (directory / "data" / "captures").iterdir()
    disks = directory / "bare"
    shutil.copytree(directory / "data" / "snapshots" / made["id"], disks)
    process = subprocess.Popen(
        namespace.command(sys.executable, "-m", "tests.bench.bare_qemu", str(capture), str(disks)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def measure() -> Costs:
        print(file=process.stdin, flush=True)
        took, cpu = process.stdout.readline().split()  # type: ignore[union-attr]
        return float(took), float(cpu)

    try:
        yield measure
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()
        client.ask("DELETE", f"/snapshots/{made['id']}")


def _sleeps(client: Client, meter: Meter, bare: Callable[[], Costs]) -> list[Result]:
    standby: list[Costs] = []

    def restore() -> None:
        client.ask("POST", "/instances/vm/restore")
        _answer(client, "vm")

    def measure() -> Costs:
        standby.append(meter(lambda: client.ask("POST", "/instances/vm/standby", {})))
        return meter(restore)

    back = _compare("restore to agent answer", measure, _BARE, bare)
    took = statistics.median(time for time, _ in standby)
    return [Result("standby, real guest of 256 MB", took, "ms"), *back]


def _volumes(client: Client) -> list[Result]:
    client.ask("POST", "/volumes", {"name": "data", "size_gb": 1})
    path, body = "/instances/vm/volumes/data", {"mount_path": "/data"}
    attach, detach = [], []
    for _ in range(ROUNDS):
        attach.append(_milliseconds(lambda: client.ask("POST", path, body)))
        detach.append(_milliseconds(lambda: client.ask("DELETE", path)))
    client.ask("DELETE", "/volumes/data")
    return [
        Result("attach a volume, mounted in the guest", statistics.median(attach), "ms"),
        Result("detach a volume", statistics.median(detach), "ms"),
    ]


def _fork(client: Client, meter: Meter, bare: Callable[[], Costs]) -> list[Result]:
    def fork() -> None:
        client.ask("POST", "/instances/vm/fork", {"name": "fork", "from_running": True})
        _answer(client, "fork")

    def measure() -> Costs:
        took = meter(fork)
        client.ask("DELETE", "/instances/fork")
        return took

    return _compare("fork of a running one to agent answer", measure, _BARE, bare)


def _snapshot(client: Client, meter: Meter, bare: Callable[[], Costs]) -> list[Result]:
    made = client.ask("POST", "/instances/vm/snapshots", {"kind": "Standby", "name": "one"})

    def fork() -> None:
        client.ask("POST", f"/snapshots/{made['id']}/fork", {"name": "fork"})
        _answer(client, "fork")

    def measure() -> Costs:
        took = meter(fork)
        client.ask("DELETE", "/instances/fork")
        return took

    results = _compare("fork of a snapshot to agent answer", measure, _BARE, bare)
    client.ask("DELETE", f"/snapshots/{made['id']}")
    return results


def _pool(client: Client, directory: Path, meter: Meter) -> list[Result]:
    """A claim until an exec has responded, against an exec in a guest that has run for long."""
    made = client.ask("POST", "/instances/vm/snapshots", {"kind": "Standby", "name": "pooled"})
    pool = f"/snapshots/{made['id']}/pool"
    client.ask("PUT", pool, {"size": 1})

    def settle() -> None:
        while client.ask("GET", pool)["ready"] == 0:
            time.sleep(0.05)
        time.sleep(SETTLED)

    def claim() -> None:
        client.ask("POST", f"/snapshots/{made['id']}/fork", {"name": "claimed"})
        _exec(directory, "claimed")

    def measure() -> Costs:
        settle()
        took = meter(claim)
        client.ask("DELETE", "/instances/claimed")
        return took

    def execute() -> Costs:
        settle()
        return meter(lambda: _exec(directory, "vm"))

    results = _compare("claim from a pool to an exec's end", measure, "exec in a running guest", execute)
    client.ask("DELETE", f"/snapshots/{made['id']}")
    return results


def _exec(directory: Path, name: str) -> None:
    """``true`` in the guest, over a connection of its own."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(directory / "run" / "hypeman.sock"))
        client.sendall(upgrade(f"/instances/{name}/exec", ""))
        receive(client)
        client.sendall(frame(1, b'{"command":["true"]}') + frame(2, b""))
        while b"exitCode" not in receive(client):
            pass


def _forks_at_once(client: Client, directory: Path) -> list[Result]:
    made = client.ask("POST", "/instances/vm/snapshots", {"kind": "Standby", "name": "base"})

    def fork(number: int) -> str:
        own = Client(directory / "run" / "hypeman.sock")
        instance = str(own.ask("POST", f"/snapshots/{made['id']}/fork", {"name": f"many{number}"})["id"])
        _answer(own, f"many{number}")
        own.close()
        return instance

    with ThreadPoolExecutor(FORKS) as pool:
        begin = time.perf_counter()
        forks = list(pool.map(fork, range(FORKS)))
        together = (time.perf_counter() - begin) * 1000
    vmms = _vmms(directory)
    memory = [process_memory(vmms[fork]) for fork in forks]
    on_disk = [_allocated(directory / "data" / "instances" / instance) for instance in forks]
    return [
        Result(f"{FORKS} forks of a snapshot at once, all answered", together, "ms"),
        Result("memory (PSS) of a fork of 256 MB", statistics.median(memory) / 1e6, "MB"),
        Result("disk of a fork, 1 GB overlay", statistics.median(on_disk) / 1024, "KB"),
    ]


def _vmms(directory: Path) -> dict[str, int]:
    """The VMMs' processes by instance."""
    mark, found = f"HYPEMAN_MARK={directory}/run/vm/".encode(), {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        found.update({word.removeprefix(mark).decode(): int(entry.name) for word in words if word.startswith(mark)})
    return found


def _allocated(path: Path) -> int:
    return sum(each.stat().st_blocks * 512 for each in path.rglob("*"))
