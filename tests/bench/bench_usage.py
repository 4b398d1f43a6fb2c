"""What the ledger of usage costs with 1,000 running instances: a sample, the first sample of an hour and a report, in
CPU time of the server; bytes in the store."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from hypeman.metering.rows import ENTRIES, OPEN
from hypeman.metering.service import HOUR
from hypeman.metering.types import Query
from hypeman.store import Store
from tests.bench.harness import Result
from tests.metering.test_metering import BEGIN, Host

_INSTANCES = 1000
_SAMPLES = 10
_HOURS = 24


def run() -> list[Result]:
    return trio.run(_measure)


async def _measure() -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(Path(folder) / "store")
        async with store.serving():
            host = Host(store)
            for number in range(_INSTANCES):
                made = await host.add(f"instance-{number}", {"team": "core", "env": "production"})
                await host.launch(made.id)
            metering = host.metering()
            await metering.sample()
            plain, hourly = 0.0, 0.0
            for hour in range(1, _HOURS + 1):
                host.time = BEGIN + hour * HOUR
                hourly += await _cpu_of(metering.sample) / _HOURS
            for _ in range(_SAMPLES):
                host.time += 1
                plain += await _cpu_of(metering.sample) / _SAMPLES
            report = await _cpu_of(lambda: metering.report(Query()))
            entries = store.read(lambda txn: [len(ENTRIES.encode(entry)) for _, entry in txn.scan(ENTRIES)])
            rows = store.read(lambda txn: [len(OPEN.encode(row)) for _, row in txn.scan(OPEN)])
        store.close()
    return [
        Result("usage, a sample of 1,000", plain * 1000, "ms"),
        Result("usage, first sample of an hour", hourly * 1000, "ms"),
        Result("usage, report per 1,000 entries", report * 1000 / _HOURS, "ms"),
        Result("usage, an entry", sum(entries) / len(entries), "bytes"),
        Result("usage, an open row", sum(rows) / len(rows), "bytes"),
    ]


async def _cpu_of(work: Callable[[], Awaitable[object]]) -> float:
    begin = time.process_time()
    await work()
    return time.process_time() - begin
