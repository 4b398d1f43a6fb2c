"""A real server of MariaDB for tests, in a network namespace: TLS, a database ``shop`` and its user ``app``."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class MariaDb:
    def __init__(self, namespace: str, address: str, directory: Path) -> None:
        self.namespace, self.address, self.dir = namespace, address, directory
        self.socket = directory / "socket"
        self.log = directory / "log.err"

    def create(self, certificate: Path, password: str) -> None:
        """``certificate``: with its key, in PEM; ``password``: of the user."""
        data = self.dir / "data"
        shutil.copy(certificate, self.dir / "leaf.pem")
        result = subprocess.run(["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}",
                               "--auth-root-authentication-method=normal", "--skip-test-db"],
                              capture_output=True, text=True, timeout=300)  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        settings = {"user": "root", "datadir": data, "socket": self.socket, "bind-address": self.address,
                    "pid-file": self.dir / "pid", "ssl-cert": self.dir / "leaf.pem", "ssl-key": self.dir / "leaf.pem",
                    "log-error": self.log, "max-allowed-packet": "64M", "general-log": 1,
                    "general-log-file": self.dir / "queries", "plugin-maturity": "unknown"}  # fmt: skip
        argv = ["mariadbd", "--no-defaults", "--skip-name-resolve", "--local-infile",
                *(f"--{name}={value}" for name, value in settings.items())]  # fmt: skip
        self._server = subprocess.Popen(["ip", "netns", "exec", self.namespace, *argv], cwd=self.dir,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        for _ in range(1200):
            if self.socket.exists():
                break
            assert self._server.poll() is None, self.log.read_text()
            time.sleep(0.05)
        self.direct(f"create database shop; create user app@'%' identified by '{password}' require ssl; "
                    "grant all on shop.* to app@'%'")  # fmt: skip

    def direct(self, statement: str) -> str:
        """As the superuser, from beside the server."""
        result = subprocess.run(["mariadb", "--no-defaults", "-uroot", "-N", "-B", f"--socket={self.socket}", "-e",
                               statement], capture_output=True, text=True, timeout=60)  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout

    def stop(self) -> None:
        self._server.terminate()
        self._server.wait(60)


@contextmanager
def a_mariadb(namespace: str, address: str, certificate: Path, password: str) -> Iterator[MariaDb]:
    if shutil.which("mariadbd") is None:
        pytest.skip("mariadb-server-core is not installed")
    with tempfile.TemporaryDirectory() as directory:
        made = MariaDb(namespace, address, Path(directory))
        made.create(certificate, password)
        try:
            yield made
        finally:
            made.stop()
