"""psql of Debian and a newer libpq (psycopg) in a redirected guest's place, in front of a real server of Postgres."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.egress.conftest import SECRET
from tests.egress.lab import DATABASE_HOST, ORIGINS, RULES_WITH_SECRET, Lab, a_lab
from tests.egress.postgres_server import Database, a_database
from tests.egress.test_mtls import readable

pytestmark = pytest.mark.real

PLACEHOLDER = "mock-PGPASSWORD"


class Shop(msgspec.Struct):
    lab: Lab
    database: Database


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with (
        a_lab(tmp_path_factory.mktemp("postgres")) as lab,
        a_database(lab.world, ORIGINS[DATABASE_HOST], lab.dir / "leaf.pem", SECRET) as database,
    ):
        yield Shop(lab, database)


def settings_of(**more: str) -> str:
    given = {"host": DATABASE_HOST, "user": "app", "dbname": "app", "sslmode": "verify-full"} | more
    return " ".join(f"{name}={value}" for name, value in given.items())


def psql(shop: Shop, *statements: str, **settings: str) -> str:
    root = str(shop.lab.dir / "bundle.pem")
    argv = [each for statement in statements for each in ("-c", statement)]
    return shop.lab.in_guest("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", settings_of(**settings), *argv,
                                 PGPASSWORD=PLACEHOLDER, PGSSLROOTCERT=root)  # fmt: skip


def refused(shop: Shop, **settings: str) -> str:
    with pytest.raises(AssertionError) as caught:
        psql(shop, "select 1", **settings)
    return str(caught.value)


def test_psql(shop: Shop) -> None:
    """A session over TLS on both sides, verified in the guest; the server has seen SCRAM of the role."""
    said = psql(shop, "select current_user, inet_server_addr() is not null",
                "create table t (x text); insert into t select repeat('x', 1000) from generate_series(1, 3000)",
                "select count(*), sum(length(x)) from t",
                "select ssl, version from pg_stat_ssl where pid = pg_backend_pid()")  # fmt: skip
    assert said.split() == ["app|t", "3000|3000000", "t|TLSv1.3"]
    assert len(psql(shop, "copy t to stdout")) == 3000 * 1001
    assert "app" in psql(shop, "\\conninfo")


def test_bulk_copy(shop: Shop) -> None:
    """5 MB each way."""
    bulk = shop.lab.dir / "bulk"
    bulk.write_text(("y" * 999 + "\n") * 5_000)
    psql(shop, "create table b (x text)", f"\\copy b from '{bulk}'")
    back = shop.lab.dir / "back"
    psql(shop, f"\\copy b to '{back}'")
    assert back.read_bytes() == bulk.read_bytes()


@pytest.mark.parametrize("binding", ["disable", "prefer", "require"])
def test_channel_binding(shop: Shop, binding: str) -> None:
    assert psql(shop, "select 1", channel_binding=binding) == "1\n"


def test_refusals_of_psql(shop: Shop) -> None:
    """What a user reads: without TLS, as another role, with another password or database. Another host is none of the
    rule's; here it does not answer."""
    assert "(tls_required)" in refused(shop, sslmode="disable")
    assert "(role_denied)" in refused(shop, user="postgres")
    assert "(connect_failed)" in refused(shop, host="other.test")
    assert "(placeholder_expected)" in refused(shop, password="mine")
    told = refused(shop, dbname="nowhere")
    assert 'database "nowhere" does not exist' in told and "hypeman" not in told


def test_cancel_by_psql(shop: Shop) -> None:
    """Ctrl-C: libpq before 17 asks in clear, on another connection."""
    script = "\\! (sleep 1; kill -INT $PPID) &\nselect pg_sleep(300);\n"
    path = shop.lab.dir / "cancel.sql"
    path.write_text(script)
    with pytest.raises(AssertionError, match="canceling statement due to user request"):
        psql_file(shop, path)


def psql_file(shop: Shop, path: Path) -> str:
    root = str(shop.lab.dir / "bundle.pem")
    return shop.lab.in_guest("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", settings_of(), "-f", str(path),
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
def test_psycopg(shop: Shop, settings: dict[str, str]) -> None:
    """Of a newer libpq: its demands on authentication, TLS at once, protocol 3.2; cancellation over TLS."""
    said = shop.lab.in_guest(sys.executable, "-c", PSYCOPG, settings_of(**settings), PGPASSWORD=PLACEHOLDER,
                                 PGSSLROOTCERT=str(shop.lab.dir / "bundle.pem"))  # fmt: skip
    assert said.split()[1:] == ["app1000", "20000", "49", "cancelled"] and int(said.split()[0]) >= 17


def test_the_password_is_nowhere_else(shop: Shop) -> None:
    """The engine has it in the rules of this lab that have it as it is; the server's log never."""
    for _ in range(3):
        psql(shop, "select 1")
    memory = b"".join(readable(shop.lab.proxy))
    assert memory.count(PLACEHOLDER.encode()), "else this looks at nothing"
    assert memory.count(SECRET.encode()) == RULES_WITH_SECRET
    assert SECRET not in (shop.database.data / "log").read_text()
    psql(shop, "alter role app password 'of-its-own'")  # what its role may do, a guest may do: see the README
    assert "password authentication failed" in refused(shop)
