"""Standby, restore, fork and volumes of real guests through the API: how long, how much memory, how much disk.

Guests of 256 MB that sleep. "To agent answer" is until the call has returned (the guest then has its new identity,
told by the agent) and one question to the agent has been answered. What of it is ours and not the VMM's is in
bench_instances ("control plane"), with VMMs that take no time.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench.bench_instances import Client, import_image, server
from tests.bench.harness import Result, process_memory
from tests.real.appliance import IMAGE, Namespace, short_directory

ROUNDS = 7
FORKS = 10
_SPEC = {"image": IMAGE, "size": "256MB", "vcpus": 1, "overlay_size": "1GB"}


def run() -> list[Result]:
    if shutil.which("qemu-system-x86_64") is None:
        return []
    results: list[Result] = []
    for directory in short_directory("bench"):
        directory.chmod(0o755)
        namespace = Namespace()
        try:
            with server(directory, namespace, "hypeman serve") as (client, _, _):
                import_image(client)
                _start(client)
                results = [*_sleeps(client), *_volumes(client), *_fork(client), *_forks_at_once(client, directory)]
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


def _sleeps(client: Client) -> list[Result]:
    def restore() -> None:
        client.ask("POST", "/instances/vm/restore")
        _answer(client, "vm")

    standby, back = [], []
    for _ in range(ROUNDS):
        standby.append(_milliseconds(lambda: client.ask("POST", "/instances/vm/standby", {})))
        back.append(_milliseconds(restore))
    return [
        Result("standby, real guest of 256 MB", statistics.median(standby), "ms"),
        Result("restore to agent answer", statistics.median(back), "ms"),
    ]


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


def _fork(client: Client) -> list[Result]:
    def fork(number: int) -> None:
        client.ask("POST", "/instances/vm/fork", {"name": f"fork{number}", "from_running": True})
        _answer(client, f"fork{number}")

    took = []
    for number in range(ROUNDS):
        took.append(_milliseconds(lambda number=number: fork(number)))  # type: ignore[misc]
        client.ask("DELETE", f"/instances/fork{number}")
    return [Result("fork of a running one to agent answer", statistics.median(took), "ms")]


def _forks_at_once(client: Client, directory: Path) -> list[Result]:
    made = client.ask("POST", "/instances/vm/snapshots", {"kind": "Standby", "name": "base"})

    def fork(number: int) -> str:
        own = Client(directory / "run" / "hypeman.sock")
        instance = str(own.ask("POST", f"/snapshots/{made['id']}/fork", {"name": f"many{number}"})["id"])
        _answer(own, f"many{number}")
        own.close()
        return instance

    alone = _milliseconds(lambda: fork(FORKS))
    client.ask("DELETE", f"/instances/many{FORKS}")
    with ThreadPoolExecutor(FORKS) as pool:
        begin = time.perf_counter()
        forks = list(pool.map(fork, range(FORKS)))
        together = (time.perf_counter() - begin) * 1000
    pids = [_pid(directory, instance) for instance in forks]
    on_disk = [_allocated(directory / "data" / "instances" / instance) for instance in forks]
    return [
        Result("fork of a snapshot to agent answer", alone, "ms"),
        Result(f"{FORKS} forks of a snapshot at once, all answered", together, "ms"),
        Result("memory (PSS) of a fork of 256 MB", statistics.median(map(process_memory, pids)) / 1e6, "MB"),
        Result("disk of a fork, 1 GB overlay", statistics.median(on_disk) / 1024, "KB"),
    ]


def _pid(directory: Path, instance: str) -> int:
    """Of the instance's VMM."""
    mark = f"HYPEMAN_MARK={directory}/run/vm/{instance}".encode()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"no VMM of {instance}")


def _allocated(path: Path) -> int:
    return sum(each.stat().st_blocks * 512 for each in path.rglob("*"))
