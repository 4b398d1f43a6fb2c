"""psql of Debian and a newer libpq (psycopg) in a redirected guest's place, in front of a real server of Postgres."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.egress.conftest import SECRET
from tests.egress.lab import DATABASE_HOST, ORIGINS, Lab, a_lab, run
from tests.egress.test_mtls import readable

pytestmark = pytest.mark.real

PROGRAMS = Path("/usr/lib/postgresql/15/bin")
PLACEHOLDER = "mock-PGPASSWORD"
AS_POSTGRES = ("runuser", "-u", "postgres", "--")
SETTINGS = {"listen_addresses": ORIGINS[DATABASE_HOST], "unix_socket_directories": "", "ssl": "on",
            "ssl_cert_file": "leaf.pem", "ssl_key_file": "leaf.pem", "fsync": "off"}  # fmt: skip
ACCESS = "hostssl all all 0.0.0.0/0 scram-sha-256\nhostnossl all all 0.0.0.0/0 reject\n"


class Database:
    """A cluster in the world, with role and database ``app``."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.data = directory / "data"

    def create(self) -> None:
        passwords = self.data.parent / "password"
        passwords.write_text("of-the-superuser")
        for path in (passwords.parent, passwords):
            shutil.chown(path, "postgres", "postgres")
        run(*AS_POSTGRES, str(PROGRAMS / "initdb"), "-D", str(self.data), "-A", "scram-sha-256", "--no-sync",
            f"--pwfile={passwords}", cwd=self.data.parent)  # fmt: skip
        key = self.data / "leaf.pem"
        shutil.copy(self.lab.dir / "leaf.pem", key)
        shutil.chown(key, "postgres", "postgres")
        key.chmod(0o600)
        (self.data / "pg_hba.conf").write_text(ACCESS)
        with (self.data / "postgresql.conf").open("a") as settings:
            settings.writelines(f"{name} = '{value}'\n" for name, value in SETTINGS.items())
        self.control("start")
        self.direct(f"CREATE ROLE app LOGIN PASSWORD '{SECRET}'")
        self.direct("CREATE DATABASE app OWNER app")

    def control(self, action: str) -> None:
        command = (str(PROGRAMS / "pg_ctl"), "-D", str(self.data), "-w", "-l", str(self.data / "log"), action)
        done = subprocess.run(["ip", "netns", "exec", self.lab.world, *AS_POSTGRES, *command], cwd=self.data.parent,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)  # fmt: skip
        assert done.returncode == 0, (self.data / "log").read_text()

    def direct(self, statement: str) -> str:
        """As the superuser, from beside the server."""
        address = f"host={ORIGINS[DATABASE_HOST]} user=postgres dbname=postgres sslmode=require"
        environment = {**os.environ, "PGPASSWORD": "of-the-superuser"}
        return run("ip", "netns", "exec", self.lab.world, "psql", "-XAtq", address, "-c", statement,
                   env=environment).stdout  # fmt: skip


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    if not (PROGRAMS / "initdb").exists():
        pytest.skip("postgresql-15 is not installed")
    with (
        a_lab(tmp_path_factory.mktemp("postgres")) as lab,
        tempfile.TemporaryDirectory() as directory,  # which another user can enter
    ):
        made = Database(lab, Path(directory))
        made.create()
        try:
            yield made
        finally:
            made.control("stop")


def settings_of(**more: str) -> str:
    given = {"host": DATABASE_HOST, "user": "app", "dbname": "app", "sslmode": "verify-full"} | more
    return " ".join(f"{name}={value}" for name, value in given.items())


def psql(database: Database, *statements: str, **settings: str) -> str:
    root = str(database.lab.dir / "bundle.pem")
    argv = [each for statement in statements for each in ("-c", statement)]
    return database.lab.in_guest("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", settings_of(**settings), *argv,
                                 PGPASSWORD=PLACEHOLDER, PGSSLROOTCERT=root)  # fmt: skip


def refused(database: Database, **settings: str) -> str:
    with pytest.raises(AssertionError) as caught:
        psql(database, "select 1", **settings)
    return str(caught.value)


def test_psql(database: Database) -> None:
    """A session over TLS on both sides, verified in the guest; the server has seen SCRAM of the role."""
    said = psql(database, "select current_user, inet_server_addr() is not null",
                "create table t (x text); insert into t select repeat('x', 1000) from generate_series(1, 3000)",
                "select count(*), sum(length(x)) from t",
                "select ssl, version from pg_stat_ssl where pid = pg_backend_pid()")  # fmt: skip
    assert said.split() == ["app|t", "3000|3000000", "t|TLSv1.3"]
    assert len(psql(database, "copy t to stdout")) == 3000 * 1001
    assert "app" in psql(database, "\\conninfo")


def test_bulk_copy(database: Database) -> None:
    """5 MB each way."""
    bulk = database.lab.dir / "bulk"
    bulk.write_text(("y" * 999 + "\n") * 5_000)
    psql(database, "create table b (x text)", f"\\copy b from '{bulk}'")
    back = database.lab.dir / "back"
    psql(database, f"\\copy b to '{back}'")
    assert back.read_bytes() == bulk.read_bytes()


@pytest.mark.parametrize("binding", ["disable", "prefer", "require"])
def test_channel_binding(database: Database, binding: str) -> None:
    assert psql(database, "select 1", channel_binding=binding) == "1\n"


def test_refusals_of_psql(database: Database) -> None:
    """What a user reads: without TLS, as another role, to another host, with another password or database."""
    assert "(tls_required)" in refused(database, sslmode="disable")
    assert "(role_denied)" in refused(database, user="postgres")
    assert "(host_denied)" in refused(database, host="other.test")
    assert "(placeholder_expected)" in refused(database, password="mine")
    told = refused(database, dbname="nowhere")
    assert 'database "nowhere" does not exist' in told and "hypeman" not in told


def test_cancel_by_psql(database: Database) -> None:
    """Ctrl-C: libpq before 17 asks in clear, on another connection."""
    script = "\\! (sleep 1; kill -INT $PPID) &\nselect pg_sleep(300);\n"
    path = database.lab.dir / "cancel.sql"
    path.write_text(script)
    with pytest.raises(AssertionError, match="canceling statement due to user request"):
        psql_file(database, path)


def psql_file(database: Database, path: Path) -> str:
    root = str(database.lab.dir / "bundle.pem")
    return database.lab.in_guest("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", settings_of(), "-f", str(path),
                                 PGPASSWORD=PLACEHOLDER, PGSSLROOTCERT=root)  # fmt: skip


PSYCOPG = """
import sys, threading, psycopg
from psycopg import pq
with psycopg.connect(sys.argv[1]) as c:
    answer = c.execute("select current_user || count(*) from generate_series(1, 1000)").fetchone()[0]
    print(pq.version() // 10000, answer)
    with c.cursor(name="portal") as big:
        print(sum(1 for _ in big.execute("select * from generate_series(1, 20000)")))
    with c.pipeline():
        print([c.execute("select %s::int", [n]) for n in range(50)][-1].fetchone()[0])
    threading.Timer(0.5, c.cancel_safe).start()
    try:
        c.execute("select pg_sleep(300)")
    except psycopg.errors.QueryCanceled:
        print("cancelled")
"""


@pytest.mark.parametrize(
    "settings",
    [
        {"require_auth": "scram-sha-256", "channel_binding": "require", "sslsni": "0"},
        {"sslnegotiation": "direct"},
        {"max_protocol_version": "latest"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_psycopg(database: Database, settings: dict[str, str]) -> None:
    """Of a newer libpq: its demands on authentication, TLS at once, protocol 3.2; cancellation over TLS."""
    said = database.lab.in_guest(sys.executable, "-c", PSYCOPG, settings_of(**settings), PGPASSWORD=PLACEHOLDER,
                                 PGSSLROOTCERT=str(database.lab.dir / "bundle.pem"))  # fmt: skip
    assert said.split()[1:] == ["app1000", "20000", "49", "cancelled"] and int(said.split()[0]) >= 17


def test_the_password_is_nowhere_else(database: Database) -> None:
    """The engine has it in the two rules of this lab that have it as it is; the server's log never."""
    for _ in range(3):
        psql(database, "select 1")
    memory = b"".join(readable(database.lab.proxy))
    assert memory.count(PLACEHOLDER.encode()), "else this looks at nothing"
    assert memory.count(SECRET.encode()) == 2
    assert SECRET not in (database.data / "log").read_text()
    psql(database, "alter role app password 'of-its-own'")  # what its role may do, a guest may do: see the README
    assert "password authentication failed" in refused(database)
