"""Debian's mariadb, PyMySQL and Go's driver in a redirected guest's place, in front of a real server of MariaDB."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.egress.conftest import SECRET
from tests.egress.lab import MYSQL_HOST, ORIGINS, RULES_WITH_SECRET, Lab, a_lab
from tests.egress.mariadb_server import MariaDb, a_mariadb
from tests.egress.test_mtls import readable

pytestmark = pytest.mark.real

PLACEHOLDER = "mock-MYSQL_PWD"


class Shop(msgspec.Struct):
    lab: Lab
    database: MariaDb


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with (
        a_lab(tmp_path_factory.mktemp("mysql")) as lab,
        a_mariadb(lab.world, ORIGINS[MYSQL_HOST], lab.dir / "leaf.pem", SECRET) as database,
    ):
        yield Shop(lab, database)


def mariadb(shop: Shop, statement: str, *options: str, host: str = MYSQL_HOST, password: str = PLACEHOLDER) -> str:
    return shop.lab.in_guest("mariadb", "--no-defaults", f"-h{host}", "-uapp", "-N", "-B", *options, "-e", statement,
                             MYSQL_PWD=password)  # fmt: skip


def refused(shop: Shop, *options: str, host: str = MYSQL_HOST, password: str = PLACEHOLDER) -> str:
    with pytest.raises(AssertionError) as caught:
        mariadb(shop, "select 1", *options, host=host, password=password)
    return str(caught.value)


VERIFIED = "--ssl-verify-server-cert"


@pytest.mark.parametrize("encrypted", [False, True])
def test_mariadb(shop: Shop, encrypted: bool) -> None:
    """A session over TLS to the server, and to the guest where it asks for it."""
    options = ["shop"]
    if encrypted:
        options += ["--ssl", f"--ssl-ca={shop.lab.dir / 'bundle.pem'}", VERIFIED]
    said = mariadb(shop, "drop table if exists t; create table t (x longtext); "
                   "insert into t select repeat('x', 1000) from seq_1_to_3000; "
                   "select count(*), sum(length(x)) from t; select user(), database(); "
                   "show status like 'Ssl_version'", *options)  # fmt: skip
    lines = said.splitlines()
    assert lines[0] == "3000\t3000000"
    assert lines[1].startswith("app@93.184.216.1\tshop") and lines[2] == "Ssl_version\tTLSv1.3"
    assert len(mariadb(shop, "select x from t", *options)) == 3000 * 1001


def test_refusals_of_mariadb(shop: Shop) -> None:
    """What a user reads: as another user, with another password or database."""
    assert "ERROR 1045 (28000)" in refused(shop, "-uroot") and "(role_denied)" in refused(shop, "-uroot")
    assert "(placeholder_expected)" in refused(shop, password="mine")
    told = refused(shop, "nowhere")
    assert "ERROR 1044 (42000): Access denied for user" in told and "hypeman" not in told


def test_bulk(shop: Shop) -> None:
    """5 MB each way: a file that the server asks the guest for, and back."""
    bulk = shop.lab.dir / "bulk"
    bulk.write_text(("y" * 999 + "\n") * 5_000)
    mariadb(shop, f"create table b (x text); load data local infile '{bulk}' into table b", "--local-infile", "shop")
    assert mariadb(shop, "select x from b", "shop") == bulk.read_text()


def test_end_of_a_query(shop: Shop) -> None:
    """Ctrl-C names the session by the number in the server's greeting, on another connection."""
    script = shop.lab.dir / "cancel.sh"
    script.write_text(
        f"exec 3>&1; mariadb --no-defaults -h{MYSQL_HOST} -uapp -e 'select sleep(300)' >&3 2>&3 & "
        "sleep 3; kill -INT $!; wait $! || true"
    )
    said = shop.lab.in_guest("bash", "-m", str(script), MYSQL_PWD=PLACEHOLDER)
    assert "Query execution was interrupted" in said or "sleep(300)\n1" in said, said
    assert "sleep" not in shop.database.direct("select coalesce(group_concat(info), '') from "
                                               "information_schema.processlist where user = 'app'")  # fmt: skip


PYMYSQL = """
import sys, pymysql
more = {} if sys.argv[2] == "plain" else {"ssl": {"ca": sys.argv[3]}}
c = pymysql.connect(host=sys.argv[1], user="app", password="mock-MYSQL_PWD", database="shop", **more)
with c.cursor() as cursor:
    cursor.execute("select current_user(), connection_id() = %s", (c.thread_id(),))
    print(*cursor.fetchone(), c.get_server_info().split("-")[-1][:3] and "MariaDB" in c.get_server_info())
    cursor.execute("select seq from seq_1_to_20000")
    print(sum(row[0] for row in cursor))
    cursor.executemany("insert into p values (%s)", [(n,) for n in range(100)])
    c.commit()
    cursor.execute("select count(*) from p")
    print(cursor.fetchone()[0])
"""


@pytest.mark.parametrize("encryption", ["plain", "tls"])
def test_pymysql(shop: Shop, encryption: str) -> None:
    """It verifies our certificate; number and version of the session are the server's."""
    mariadb(shop, "create or replace table p (n int)", "shop")
    said = shop.lab.in_guest(sys.executable, "-c", PYMYSQL, MYSQL_HOST, encryption, str(shop.lab.dir / "bundle.pem"))
    assert said.split() == ["app@%", "1", "True", "200010000", "100"]


GO_DRIVER = "v1.9.3"
GO_CLIENT = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hypeman-build" / f"mysql-{GO_DRIVER}"


@pytest.fixture(scope="module")
def go_client() -> Path:
    """Built once, by a toolchain and the driver from the proxy of modules."""
    if not (GO_CLIENT / "client").exists():
        if shutil.which("go") is None:
            pytest.skip("go is not installed")
        GO_CLIENT.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(__file__).with_name("mysql_client.go"), GO_CLIENT / "main.go")
        (GO_CLIENT / "go.mod").write_text("module client\n")
        for command in (["get", f"github.com/go-sql-driver/mysql@{GO_DRIVER}"], ["build", "-o", "client", "."]):
            subprocess.run(["go", *command], cwd=GO_CLIENT, check=True, env=os.environ | {"CGO_ENABLED": "0"})
    return GO_CLIENT / "client"


@pytest.mark.parametrize("encrypted", [False, True])
def test_go_driver(shop: Shop, go_client: Path, encrypted: bool) -> None:
    """It sends the server name; a prepared statement too."""
    roots = str(shop.lab.dir / "bundle.pem") if encrypted else ""
    assert shop.lab.in_guest(str(go_client), MYSQL_HOST, roots).split() == ["app@%", "500445"]


def test_the_password_is_nowhere_else(shop: Shop) -> None:
    """The engine has it in the rules of this lab that have it as it is; the server's logs never."""
    for _ in range(3):
        mariadb(shop, "select 1")
    memory = b"".join(readable(shop.lab.proxy))
    assert memory.count(PLACEHOLDER.encode()), "else this looks at nothing"
    assert memory.count(SECRET.encode()) == RULES_WITH_SECRET
    assert SECRET not in shop.database.log.read_text()
