"""The ledger of usage: what is counted, that nothing is counted twice or lost, and that a change of it is noticed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from hypeman.errors import InvalidRequest
from hypeman.hypervisor.interface import VmmHandle
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.types import InstanceState
from hypeman.metering import rows
from hypeman.metering.chain import Block, Entry, Usage, hash_entries, hash_of, merge_entries
from hypeman.metering.rows import BLOCKS, ENTRIES, HEAD, OPEN
from hypeman.metering.service import DAY, HOUR, Metering
from hypeman.metering.types import Query, UsageBy, UsageReport
from hypeman.resources.accounting import HOLDINGS, Holding
from hypeman.store import Store
from tests.instances.test_board import a_record

GB = 2**30
BEGIN = 20_000 * DAY


class Host:
    """Instances and their counters; time is set by hand."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.time = float(BEGIN)
        self.records: dict[str, InstanceRecord] = {}
        self.cpu: dict[str, float] = {}
        self.traffic: dict[str, tuple[int, int]] = {}
        self.pid = 100

    def of_all(self) -> Mapping[str, tuple[int, int]]:
        return self.traffic

    def of_instance(self, instance_id: str) -> tuple[int, int]:
        return self.traffic.get(instance_id, (0, 0))

    def metering(self, **settings: Any) -> Metering:
        return Metering(
            self.store,
            lambda: list(self.records.values()),
            self,
            lambda record: self.cpu.get(record.id, 0.0),
            now=lambda: self.time,
            **{"interval": 60, "hourly_days": 2, "max_days": 10, **settings},
        )

    async def add(self, name: str, tags: dict[str, str] | None = None) -> InstanceRecord:
        made = a_record(name, InstanceState.STOPPED, "", 0)
        spec = msgspec.structs.replace(made.spec, tags=tags or {})
        made = msgspec.structs.replace(made, spec=spec, created_at=datetime.fromtimestamp(self.time, UTC))
        self.records[made.id] = made
        await self.hold(made, memory=0)
        return made

    async def hold(self, record: InstanceRecord, *, memory: int) -> None:
        await self.store.write(lambda txn: txn.put(HOLDINGS, record.id, Holding(memory=memory, disk=10 * GB)))

    async def launch(self, instance_id: str) -> None:
        self.pid += 1
        handle: Any = VmmHandle(HypervisorKind.QEMU, self.pid, 1, "b", "", None)  # type: ignore[arg-type]
        started = datetime.fromtimestamp(self.time, UTC)
        self.records[instance_id] = msgspec.structs.replace(
            self.records[instance_id], handle=handle, started_at=started
        )
        self.cpu[instance_id], self.traffic[instance_id] = 0.0, (0, 0)
        await self.hold(self.records[instance_id], memory=2 * GB)

    async def end(self, metering: Metering, instance_id: str) -> None:
        """As the machine does it: the counters are read, then they are gone."""
        metering.count(self.records[instance_id])
        metering.count(self.records[instance_id])
        self.records[instance_id] = msgspec.structs.replace(self.records[instance_id], handle=None)
        self.cpu.pop(instance_id)
        self.traffic.pop(instance_id)
        await self.hold(self.records[instance_id], memory=0)


@asynccontextmanager
async def running(metering: Metering) -> AsyncIterator[Metering]:
    """Started, without samples of its own."""
    metering._open = dict(metering._store.read(lambda txn: list(txn.scan(OPEN))))
    metering._sampled = metering._store.read(rows.head).sampled
    yield metering


def sums(report: UsageReport) -> tuple[float, float, float, int, int]:
    row = report.total
    return row.cpu_seconds, row.memory_gb_hours, row.disk_gb_hours, row.network_rx_bytes, row.network_tx_bytes


@pytest.fixture
def host(store: Store) -> Host:
    return Host(store)


async def test_an_instance_from_its_creation_to_its_end(host: Host) -> None:
    async with running(host.metering()) as metering:
        await metering.sample()
        host.time += 30
        web = await host.add("web", {"team": "a"})
        host.time += 30
        await host.launch(web.id)
        host.time += 40  # 10 s of it have no sample at the begin, and 20 s none at the end
        host.cpu[web.id], host.traffic[web.id] = 5.0, (100, 10)
        await metering.sample()
        host.time += 20
        host.cpu[web.id], host.traffic[web.id] = 7.5, (150, 15)
        await host.end(metering, web.id)
        host.time += 120
        await metering.sample()
        del host.records[web.id]
        await metering.sample()
        report = await metering.report(Query())
        cpu, memory, disk, received, sent = sums(report)
        assert (cpu, received, sent) == (7.5, 150, 15)
        assert memory == pytest.approx(2 * 60 / HOUR, abs=1e-6)
        assert disk == pytest.approx(10 * 210 / HOUR, abs=1e-6)
        assert [(row.instance_id, row.instance_name) for row in report.rows] == [(web.id, "web")]


async def test_a_vmm_that_ends_during_a_sample_is_counted_once(host: Host) -> None:
    web = await host.add("web")
    await host.launch(web.id)
    async with running(host.metering()) as metering:
        await metering.sample()
        host.cpu[web.id], host.traffic[web.id] = 5.0, (100, 10)
        read = metering._cpu_seconds

        def read_while_it_ends(record: InstanceRecord) -> float:
            metering._cpu_seconds = read
            found = read(record)
            host.cpu[web.id], host.traffic[web.id] = 6.0, (120, 12)
            trio.from_thread.run(host.end, metering, web.id)
            return found

        metering._cpu_seconds = read_while_it_ends
        await metering.sample()
        await metering.sample()
        cpu, _, _, received, sent = sums(await metering.report(Query()))
    assert (cpu, received, sent) == (6.0, 120, 12)


async def test_an_hour_that_ends_during_a_report_is_in_it(host: Host) -> None:
    web = await host.add("web")
    await host.launch(web.id)
    async with running(host.metering()) as metering, trio.open_nursery() as nursery:
        for seconds in (HOUR, HOUR, 60, HOUR):
            await metering.sample()
            host.time += seconds
            host.cpu[web.id] += 5.0
        blocks = metering._blocks

        async def meanwhile(row: rows.HeadRow) -> AsyncIterator[Block]:
            async for block in blocks(row):
                yield block
            nursery.start_soon(metering.sample)
            with trio.move_on_after(0.2):
                while metering._store.read(rows.head).last == row.last:
                    await trio.sleep(0.001)

        metering._blocks = meanwhile  # type: ignore[method-assign]
        cpu, *_ = sums(await metering.report(Query()))
        assert cpu == 15.0, "two hours, and what had been sampled of the third"
        assert (await metering.verify()).valid


async def test_a_restarted_server_and_a_restarted_vm_count_on(host: Host) -> None:
    web = await host.add("web")
    await host.launch(web.id)
    async with running(host.metering()) as metering:
        await metering.sample()
        host.time, host.cpu[web.id] = host.time + 60, 5.0
        await metering.sample()
    host.time, host.cpu[web.id] = host.time + 600, 11.0  # the VM goes on without a server
    async with running(host.metering()) as metering:
        await metering.sample()
        await host.end(metering, web.id)
        await host.launch(web.id)
        host.time, host.cpu[web.id], host.traffic[web.id] = host.time + 60, 30.0, (7, 0)
        await metering.sample()
        cpu, memory, *_, received, _ = sums(await metering.report(Query()))
    assert (cpu, received) == (41.0, 7)
    assert memory == pytest.approx(2 * 720 / HOUR, abs=1e-6)


async def test_hours_become_blocks_and_days_then_old_ones_go(host: Host) -> None:
    web, job = await host.add("web", {"team": "a"}), await host.add("job")
    await host.launch(web.id)
    async with running(host.metering()) as metering:
        for hour in range(4 * 24):
            host.time = BEGIN + hour * HOUR + 1
            host.cpu[web.id] = float(hour)
            await metering.sample()
            if hour == 10:
                del host.records[job.id]
        head = host.store.read(rows.head)
        kinds = host.store.read(lambda txn: [block.kind for _, block in txn.scan(BLOCKS)])
        assert (kinds.count("hour"), kinds.count("day")) == (95, 1)
        entries = host.store.read(lambda txn: len(list(txn.keys(ENTRIES))))
        assert entries == 2 + 71  # a day of both, and web's other hours
        cpu, memory, *_ = sums(await metering.report(Query()))
        assert cpu == 95.0
        assert memory == pytest.approx(2 * 95, abs=0.01)
        checked = await metering.verify()
        assert (checked.valid, checked.last, checked.entries, checked.hash) == (True, head.last, entries, head.hash)

        by_tag = await metering.report(Query(by=UsageBy.TAG, tag="team"))
        assert [(row.value, row.cpu_seconds) for row in by_tag.rows] == [("", 0.0), ("a", 95.0)]
        by_day = await metering.report(Query(by=UsageBy.DAY, instance="web"))
        assert [row.day for row in by_day.rows] == ["2024-10-04", "2024-10-05", "2024-10-06", "2024-10-07"]
        only = await metering.report(Query(tags={"team": "a"}, since=BEGIN + 2 * DAY))
        assert only.total.cpu_seconds == pytest.approx(47, abs=1)
        with pytest.raises(InvalidRequest):
            await metering.report(Query(by=UsageBy.TAG))

        host.time = BEGIN + 12 * DAY + 1
        await metering.sample()
        assert host.store.read(rows.head).first > head.first
        assert (await metering.verify()).valid


async def filled(host: Host) -> Metering:
    """Three blocks with two entries each."""
    for name in ("web", "job"):
        await host.launch((await host.add(name)).id)
    metering = host.metering()
    for hour in range(4):
        host.time = BEGIN + hour * HOUR + 1
        for instance_id in host.records:
            host.cpu[instance_id] = 10.0 * hour
        await metering.sample()
    return metering


def change_entry(entry: Entry) -> Entry:
    return msgspec.structs.replace(entry, usage=Usage(cpu_us=1))


@pytest.mark.parametrize("what", ["entry changed", "entry removed", "block changed", "block removed", "last removed"])
async def test_what_was_changed_is_found(host: Host, what: str) -> None:
    metering = await filled(host)
    assert (await metering.verify()).valid
    blocks = host.store.read(lambda txn: list(txn.scan(BLOCKS)))
    entries = host.store.read(lambda txn: list(txn.scan(ENTRIES)))
    assert (len(blocks), len(entries)) == (3, 6)

    def tamper(txn: Any) -> None:
        match what:
            case "entry changed":
                txn.put(ENTRIES, entries[2][0], change_entry(entries[2][1]))
            case "entry removed":
                txn.delete(ENTRIES, entries[2][0])
            case "block changed":
                txn.put(BLOCKS, blocks[1][0], msgspec.structs.replace(blocks[1][1], total=Usage()))
            case "block removed":
                txn.delete(BLOCKS, blocks[1][0])
            case "last removed":
                txn.delete(BLOCKS, blocks[2][0])

    await host.store.write(tamper)
    found = await metering.verify()
    assert not found.valid and found.fault
    assert found.block in ((3,) if what in ("block changed", "last removed") else (2, 3))


async def test_a_ledger_that_was_written_anew_is_not_the_one_that_was_noted(host: Host) -> None:
    metering = await filled(host)
    noted = await metering.verify()
    assert (await metering.verify(noted.last, noted.hash)).valid
    entries = host.store.read(lambda txn: rows.entries_of(txn, 3))

    def forge(txn: Any) -> None:
        txn.delete(BLOCKS, f"{3:012}")
        rows.drop_entries(txn, 3)
        before = rows.block(txn, 3 - 1)
        assert before is not None
        rows.put_head(txn, msgspec.structs.replace(rows.head(txn), last=2, hash=hash_of(before)))
        rows.append(txn, "hour", [change_entry(entry) for entry in entries])

    await host.store.write(forge)
    assert (await metering.verify()).valid  # a chain by itself
    assert (await metering.verify(noted.last, noted.hash)).fault == "it is not the block that was noted"
    assert (await metering.verify(99, noted.hash)).fault == "it is not kept"


async def test_a_vm_that_ends_while_its_hour_is_closed_is_counted_once(host: Host) -> None:
    web = await host.add("web")
    await host.launch(web.id)
    async with running(host.metering()) as metering:
        await metering.sample()
        host.time, host.cpu[web.id] = BEGIN + HOUR + 1.0, 5.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(metering.sample)
            await wait_closing(metering)
            host.cpu[web.id] = 6.0
            await host.end(metering, web.id)
        assert (await metering.report(Query())).total.cpu_seconds == 6.0
        await metering.sample()
    assert [entry.usage.cpu_us for _, entry in host.store.read(lambda txn: list(txn.scan(ENTRIES)))] == [5_000_000]
    assert host.store.read(lambda txn: txn.get(OPEN, web.id)).entry.usage.cpu_us == 1_000_000  # type: ignore[union-attr]


async def wait_closing(metering: Metering) -> None:
    with trio.fail_after(5):
        while not metering._closing:
            await trio.lowlevel.checkpoint()


USAGES = st.builds(Usage, *[st.integers(0, 2**60)] * 5)


@given(st.lists(st.builds(Entry, st.sampled_from("ab"), st.just("n"), st.just(1), st.just(2), USAGES)))
def test_merged_entries_have_the_same_sum(entries: list[Entry]) -> None:
    merged = merge_entries(entries)
    assert sum((entry.usage for entry in merged), Usage()) == sum((entry.usage for entry in entries), Usage())
    assert len({entry.instance for entry in merged}) == len(merged)
    assert hash_entries(merged) == hash_entries(list(merged))


def test_the_tables_are_the_ledgers() -> None:
    assert [table.name for table in (OPEN, BLOCKS, ENTRIES, HEAD)] == [
        "usage-open", "usage-blocks", "usage-entries", "usage-head",
    ]  # fmt: skip
