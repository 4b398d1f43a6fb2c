"""The bundle beside the same code run from the virtual environment: start, size, memory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.harness import Result, compare, process_memory, wall_time

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "build" / "appliance" / "bundle" / "hypeman"
COMMANDS = {"bundle": [str(BUNDLE / "hypeman")], "virtual environment": [sys.executable, "-m", "hypeman"]}
ROUNDS = 5
PATIENCE = 60.0


def run() -> list[Result]:
    if not BUNDLE.exists():
        print("appliance: not built here (make appliance)")
        return []
    memory: dict[str, list[float]] = {name: [] for name in COMMANDS}

    def first_answer(name: str) -> float:
        with serving(COMMANDS[name]) as (pid, seconds):
            memory[name].append(process_memory(pid) / 1e6)
            return seconds * 1000

    start = compare(
        "appliance.first_answer",
        "ms",
        lambda: first_answer("bundle"),
        "virtual environment",
        lambda: first_answer("virtual environment"),
        ROUNDS,
    )
    with serving(COMMANDS["virtual environment"]):
        command = compare(
            "appliance.ps",
            "ms",
            lambda: list_instances("bundle"),
            "virtual environment",
            lambda: list_instances("virtual environment"),
            ROUNDS,
        )
    size = sum(path.stat().st_size for path in BUNDLE.rglob("*") if not path.is_symlink()) / 1e6
    mine, theirs = (sorted(memory[name])[len(memory[name]) // 2] for name in COMMANDS)
    return [
        start,
        command,
        Result("appliance.memory", mine, "MB", "virtual environment", theirs),
        Result("appliance.size", size, "MB"),
    ]


def list_instances(name: str) -> float:
    return 1000 * wall_time(
        lambda: subprocess.run([*COMMANDS[name], "ps"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    )


@contextmanager
def serving(command: list[str]) -> Iterator[tuple[int, float]]:
    """A server of its own; its process id and the seconds from start to the first answer."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/run/hypeman.sock"
        environment = {
            **os.environ,
            "DATA_DIR": f"{folder}/data",
            "RUN_DIR": f"{folder}/run",
            "PORT": "0",
            "METRICS__ENABLED": "false",
            "JWT_SECRET": "a secret that is only for benchmarks",
        }
        begin = time.perf_counter()
        process = subprocess.Popen(
            [*command, "serve"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while not answers(address):
                if process.poll() is not None or time.perf_counter() - begin > PATIENCE:
                    raise RuntimeError(f"{command[0]} serve does not answer")
                time.sleep(0.002)
            os.environ["HYPEMAN_BASE_URL"] = f"unix://{address}"
            yield process.pid, time.perf_counter() - begin
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)


def answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        if connection.connect_ex(address):
            return False
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.1 200")
        except ConnectionError:  # it listens, but does not serve yet
            return False
