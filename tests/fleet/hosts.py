"""Hosts of the fleet: each a network namespace on the control plane's bridge, with a server and ``hypeman node``.

The server is the real one. On most hosts its VMMs are fakes (tests/bench/fake_vmm_server.py) that take no time and end
with it, and so are the GPUs; on one they are real.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.control import ADDRESS, PATIENCE, SERVER, ControlPlane, Program, eventually
from tests.real import kind
from tests.real.appliance import IMAGE, ROOT, Namespace, busybox_archive

FENCE_SECONDS = 15


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("hypeman", timeout=PATIENCE)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


class Host:
    def __init__(self, control: ControlPlane, directory: Path, number: int, *, real: bool = False) -> None:
        """Not started; ``number`` from 1 on decides its name and address."""
        self.control = control
        self.name = f"host{number}"
        self.address = f"10.87.0.{10 + number}"
        self.real = real
        self.directory = directory / self.name
        self.directory.mkdir()
        self.directory.chmod(0o755)
        self.socket = self.directory / "run" / "hypeman.sock"
        self.namespace = Namespace()
        self._link = f"veth{number}"
        subprocess.run(
            ["ip", "link", "add", self._link, "netns", control.namespace.name, "type", "veth",
             "peer", "name", "eth0", "netns", self.namespace.name], check=True,
        )  # fmt: skip
        control.namespace.run("ip", "link", "set", self._link, "master", "br0", "up")
        self.namespace.run("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.namespace.run("ip", "link", "set", "eth0", "up")
        self.server = Program("server", self.namespace, self.directory)
        self.node = Program("node", self.namespace, self.directory)
        self.environ = {
            "DATA_DIR": str(self.directory / "data"), "RUN_DIR": str(self.socket.parent), "PORT": "0",
            "METRICS__ENABLED": "false", "OVERSUBSCRIPTION__CPU": "64", "LOG__FORMAT": "text", "LOG__LEVEL": "info",
            "IMAGES__INSECURE_REGISTRIES": f'["{ADDRESS}:5000"]',
            "NETWORK__SUBNET_CIDR": f"10.{100 + number}.0.0/16",
            "NODE__NAME": self.name, "NODE__ADDRESS": self.address, "NODE__STATE_DIR": str(self.directory / "node"),
            "NODE__KUBECONFIG": str(self.directory / "kubeconfig"),
            "NODE__BOOTSTRAP_KUBECONFIG": str(self.directory / "bootstrap-kubeconfig"),
            "NODE__LEASE_DURATION": "8", "NODE__FENCE_AFTER": str(FENCE_SECONDS), "NODE__MAX_PODS": "200",
            **(kind.settings() if real else {"HYPERVISOR__ACCELERATOR": "tcg", "OVERSUBSCRIPTION__MEMORY": "64",
                                             "OVERSUBSCRIPTION__DISK": "64",
                                             "FAKE_DEVICES": str(self.directory / "devices"), "FAKE_LOAD": "yes"}),
        }  # fmt: skip

    def other_clock(self, offset: str) -> dict[str, str]:
        """Environment of a program whose clock is off by ``offset``, as "+2h"; skips without libfaketime."""
        libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
        if not libraries:
            pytest.skip("a clock that is off needs the package faketime")
        return {"LD_PRELOAD": str(libraries[0]), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}

    # ── Its programs ────────────────────────────────────────────────────────────────────────────

    def start_server(self, **environ: str) -> None:
        """Returns once it answers."""
        module = ["hypeman", "serve"] if self.real else ["tests.bench.fake_vmm_server"]
        self.server.start(sys.executable, "-m", *module, PYTHONPATH=str(ROOT), **self.environ, **environ)
        eventually(lambda: self.socket.exists() and self.ask("GET", "/health"), f"{self.name} answers", self.server)

    def start_node(self, **environ: str) -> None:
        self.node.start(sys.executable, "-m", "hypeman", "node", PYTHONPATH=str(ROOT), **self.environ, **environ)

    def join(self, **environ: str) -> None:
        """As an administrator does it: the two commands of docs/kubernetes.md, then the program; on the host with
        ``environ``."""
        ca_file = self.control.directory / "ca.pem"
        command = [sys.executable, "-m", "hypeman", "node", "join", "--server", SERVER, "--ca-file", str(ca_file)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, check=False,
            env={**os.environ, **self.environ, **environ},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.control.kubectl("apply", "-f", "-", stdin=done.stdout)
        self.start_node(**environ)

    def import_image(self) -> None:
        self.ask("POST", f"/images/import?name={IMAGE}", busybox_archive())
        eventually(lambda: self.ask("GET", "/images/localhost%2Fbusybox%3Atest")["status"] == "ready", "the image")

    def cut(self, cut: bool) -> None:
        """Take its link down, or up again: a partition; its programs go on."""
        self.control.namespace.run("ip", "link", "set", self._link, "down" if cut else "up")

    def power_off(self) -> None:
        """All programs end at once; fake VMs with them."""
        self.node.end(kill=True)
        self.server.end(kill=True)

    def close(self) -> None:
        self.power_off()
        for pid in self.namespace_pids():
            os.kill(pid, signal.SIGKILL)
        self.namespace.remove()

    def namespace_pids(self) -> list[int]:
        """Of what outlives the server: VMMs and the engine."""
        found = subprocess.run(["ip", "netns", "pids", self.namespace.name], capture_output=True, text=True, check=True)
        return [int(pid) for pid in found.stdout.split()]

    # ── Asking its server ───────────────────────────────────────────────────────────────────────

    def ask(self, method: str, path: str, body: object = None) -> Any:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = UnixConnection(self.socket)
        try:
            connection.request(method, path, data)
            answer = connection.getresponse()
            content = answer.read()
        except OSError as error:
            raise AssertionError(f"{self.name} does not answer: {error}") from None
        finally:
            connection.close()
        assert answer.status < 400, (method, path, answer.status, content)
        return json.loads(content) if content else None

    def instances(self, **tags: str) -> list[dict[str, Any]]:
        """Those of pods; ``tags`` without the prefix."""
        found = [each for each in self.ask("GET", "/instances") if "kubernetes.io/pod-uid" in each.get("tags", {})]
        wanted = {f"kubernetes.io/{name.replace('_', '-')}": value for name, value in tags.items()}
        return [each for each in found if all(each["tags"].get(key) == value for key, value in wanted.items())]
