"""A real server of Postgres for tests, in a network namespace: TLS, SCRAM-SHA-256, a role and a database ``app``."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAMS = Path("/usr/lib/postgresql/15/bin")
AS_POSTGRES = ("runuser", "-u", "postgres", "--")
SUPERUSER = "of-the-superuser"
ACCESS = "hostssl all all 0.0.0.0/0 scram-sha-256\nhostnossl all all 0.0.0.0/0 reject\n"


class Database:
    def __init__(self, namespace: str, address: str, directory: Path) -> None:
        self.namespace, self.address = namespace, address
        self.data = directory / "data"

    def create(self, certificate: Path, password: str) -> None:
        """``certificate``: with its key, in PEM; ``password``: of the role."""
        passwords = self.data.parent / "password"
        passwords.write_text(SUPERUSER)
        for path in (passwords.parent, passwords):
            shutil.chown(path, "postgres", "postgres")
        self._run(*AS_POSTGRES, str(PROGRAMS / "initdb"), "-D", str(self.data), "-A", "scram-sha-256", "--no-sync",
                  f"--pwfile={passwords}")  # fmt: skip
        key = self.data / "leaf.pem"
        shutil.copy(certificate, key)
        shutil.chown(key, "postgres", "postgres")
        key.chmod(0o600)
        (self.data / "pg_hba.conf").write_text(ACCESS)
        settings = {"listen_addresses": self.address, "unix_socket_directories": "", "ssl": "on",
                    "ssl_cert_file": "leaf.pem", "ssl_key_file": "leaf.pem", "fsync": "off"}  # fmt: skip
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        self.control("start")
        self.direct(f"CREATE ROLE app LOGIN PASSWORD '{password}'", "CREATE DATABASE app OWNER app")

    def _run(self, *argv: str, **environment: str) -> str:
        result = subprocess.run(argv, cwd=self.data.parent, env={**os.environ, **environment}, capture_output=True,
                              text=True, timeout=120)  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def control(self, action: str) -> None:
        argv = (str(PROGRAMS / "pg_ctl"), "-D", str(self.data), "-w", "-l", str(self.data / "log"), action)
        inside = ("ip", "netns", "exec", self.namespace, *AS_POSTGRES, *argv)
        result = subprocess.run(inside, cwd=self.data.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              timeout=120)  # fmt: skip
        assert result.returncode == 0, (self.data / "log").read_text()

    def direct(self, *statements: str) -> str:
        """As the superuser, from beside the server."""
        settings = f"host={self.address} user=postgres dbname=postgres sslmode=require"
        commands = [each for statement in statements for each in ("-c", statement)]
        return self._run("ip", "netns", "exec", self.namespace, "psql", "-XAtq", settings, *commands,
                         PGPASSWORD=SUPERUSER)  # fmt: skip


@contextmanager
def a_database(namespace: str, address: str, certificate: Path, password: str) -> Iterator[Database]:
    if not (PROGRAMS / "initdb").exists():
        pytest.skip("postgresql-15 is not installed")
    with tempfile.TemporaryDirectory() as directory:  # which another user can enter
        made = Database(namespace, address, Path(directory))
        made.create(certificate, password)
        try:
            yield made
        finally:
            made.control("stop")
