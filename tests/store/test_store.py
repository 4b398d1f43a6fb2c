"""One function is one transaction; what was answered is on disk; what failed changed nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import trio

from hypeman.errors import NameConflict, StoreError
from hypeman.store import Store, Table, Txn
from hypeman.store.schema import SCHEMA


class Row(msgspec.Struct, frozen=True):
    value: int
    text: str = ""


def put(key: str, value: int, text: str = "") -> Callable[[Txn], None]:
    return lambda txn: txn.put(ROWS, key, Row(value, text))


ROWS: Table[Row] = Table("rows", Row)
OTHERS: Table[Row] = Table("rows2", Row)


async def test_a_write_is_seen_by_the_next_read(store: Store) -> None:
    await store.write(lambda txn: txn.put(ROWS, "a", Row(1)))
    assert store.read(lambda txn: txn.get(ROWS, "a")) == Row(1)
    assert store.read(lambda txn: txn.get(ROWS, "b")) is None


async def test_scan_stays_in_its_table_and_prefix(store: Store) -> None:
    def fill(txn: Txn) -> None:
        for key in ("a1", "a2", "b1"):
            txn.put(ROWS, key, Row(1))
        txn.put(OTHERS, "a3", Row(2))

    await store.write(fill)
    assert store.read(lambda txn: [key for key, _ in txn.scan(ROWS, "a")]) == ["a1", "a2"]
    assert store.read(lambda txn: list(txn.keys(ROWS))) == ["a1", "a2", "b1"]


async def test_insert_keeps_what_is_there(store: Store) -> None:
    assert await store.write(lambda txn: txn.insert(ROWS, "a", Row(1)))
    assert not await store.write(lambda txn: txn.insert(ROWS, "a", Row(2)))
    assert store.read(lambda txn: txn.get(ROWS, "a")) == Row(1)
    assert await store.write(lambda txn: txn.delete(ROWS, "a"))
    assert not await store.write(lambda txn: txn.delete(ROWS, "a"))


async def test_a_failing_function_changes_nothing_and_spoils_no_other(store: Store) -> None:
    """Writers that share a commit do not share their failures."""

    def fail(txn: Txn) -> None:
        txn.put(ROWS, "bad", Row(0))
        raise NameConflict("taken")

    failures: list[BaseException] = []

    async def failing() -> None:
        try:
            await store.write(fail)
        except NameConflict as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(store.write, lambda txn, n=number: txn.put(ROWS, f"good{n:02}", Row(n)))
            nursery.start_soon(failing)
    assert len(failures) == 20
    assert store.read(lambda txn: len(list(txn.keys(ROWS)))) == 20


async def test_writers_share_commits(store: Store) -> None:
    before = store.statistics()["commits"]
    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(store.write, put(str(number), number))
    assert store.statistics()["commits"] - before < 10


async def test_order_is_the_order_of_the_calls(store: Store) -> None:
    for number in range(50):
        store.write_soon(put("last", number))
    await store.write(lambda txn: None)
    assert store.read(lambda txn: txn.get(ROWS, "last")) == Row(49)


async def test_a_cancelled_writer_still_gets_its_answer(store: Store) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await store.write(lambda txn: txn.put(ROWS, "a", Row(1)))
    assert store.read(lambda txn: txn.get(ROWS, "a")) == Row(1)


async def test_who_is_cancelled_can_write_to_the_end(tmp_path: Path) -> None:
    """As the undo of an operation does when the server shuts down in the middle of it."""
    store = Store.open(tmp_path / "store")
    with trio.fail_after(5), trio.CancelScope() as outer:
        async with store.serving():
            try:
                outer.cancel()
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.05)  # undoing takes its time
                    await store.write(lambda txn: txn.put(ROWS, "undone", Row(1)))
    assert store.read(lambda txn: txn.exists(ROWS, "undone"))
    store.close()


async def test_the_map_grows(store: Store) -> None:
    """More data than the first map holds; nothing is lost on the way."""
    text = "x" * 1_000_000
    before = store.statistics()["map_bytes"]
    for number in range(90):
        await store.write(put(f"{number:03}", number, text))
    assert store.statistics()["map_bytes"] > before
    assert store.read(lambda txn: sum(row.value for _, row in txn.scan(ROWS))) == sum(range(90))


def test_a_second_server_is_refused(tmp_path: Path) -> None:
    first = Store.open(tmp_path)
    with pytest.raises(StoreError, match="in use by another"):
        Store.open(tmp_path)
    first.close()
    Store.open(tmp_path).close()


def test_a_newer_store_is_refused_and_untouched(tmp_path: Path) -> None:
    Store.open(tmp_path, version=3, migrations={}).close()
    before = (tmp_path / "data.mdb").read_bytes()
    with pytest.raises(StoreError, match="schema version 3"):
        Store.open(tmp_path, version=2, migrations={})
    assert (tmp_path / "data.mdb").read_bytes() == before


def test_migrations_run_in_order_and_once(tmp_path: Path) -> None:
    Store.open(tmp_path, version=1, migrations={}).close()

    def to_two(txn: Txn) -> None:
        txn.put(ROWS, "steps", Row(2))

    def to_three(txn: Txn) -> None:
        row = txn.get(ROWS, "steps")
        assert row is not None
        txn.put(ROWS, "steps", Row(row.value * 10 + 3))

    for _ in range(2):
        store = Store.open(tmp_path, version=3, migrations={1: to_two, 2: to_three})
        assert store.read(lambda txn: txn.get(ROWS, "steps")) == Row(23)
        store.close()


def test_a_failing_migration_leaves_the_old_version(tmp_path: Path) -> None:
    Store.open(tmp_path, version=1, migrations={}).close()

    def broken(txn: Txn) -> None:
        txn.put(ROWS, "half", Row(1))
        raise StoreError("migration failed")

    with pytest.raises(StoreError, match="migration failed"):
        Store.open(tmp_path, version=2, migrations={1: broken})
    store = Store.open(tmp_path, version=1, migrations={})
    assert store.read(lambda txn: txn.get(SCHEMA, "schema")).version == 1  # type: ignore[union-attr]
    assert store.read(lambda txn: txn.get(ROWS, "half")) is None
    store.close()


def test_an_unusable_directory_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(StoreError, match="cannot be used"):
        Store.open(tmp_path / "file")


def test_keys_have_a_limit() -> None:
    with pytest.raises(StoreError, match="longer than"):
        ROWS.key("k" * 600)


async def test_closed_store_refuses(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        await store.write(lambda txn: None)


def test_answered_writes_survive_sigkill(tmp_path: Path) -> None:
    """A process writes numbers and prints each one when it is answered; killed, none printed is lost."""
    program = textwrap.dedent(
        """
        import sys, trio
        from pathlib import Path
        from hypeman.store import Store
        from tests.store.test_store import ROWS, Row

        async def main():
            store = Store.open(Path(sys.argv[1]))
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                for n in range(100000):
                    await store.write(lambda txn: txn.put(ROWS, f"{n:06}", Row(n)))
                    print(n, flush=True)

        trio.run(main)
        """
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as process:
        assert process.stdout is not None
        seen = [process.stdout.readline() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        seen += process.stdout.readlines()
    complete = [int(line) for line in seen if line.endswith(b"\n")]
    store = Store.open(tmp_path)
    found = store.read(lambda txn: [row.value for _, row in txn.scan(ROWS)])
    store.close()
    assert found[: len(complete)] == complete
