"""The counters sweep, compiled and in Python: one suite, same answers, also for nonsense."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman._native import tapstats_py
from tests.native import optional
from tests.network.lab import in_namespace, plug_in, sh

_tapstats_c = optional("_tapstats_c")

Row = tuple[int, int, int]
needs_build = pytest.mark.skipif(_tapstats_c is None, reason="not compiled")


@pytest.fixture(params=[pytest.param(_tapstats_c, id="c", marks=needs_build), pytest.param(tapstats_py, id="py")])
def native(request: pytest.FixtureRequest) -> Any:
    return request.param


def message(kind: int, body: bytes) -> bytes:
    data = struct.pack("=IHHII", 16 + len(body), kind, 2, 0, 0) + body
    return data + b"\0" * (-len(data) % 4)


def link(index: int, received: int, sent: int, *, extra: bytes = b"") -> bytes:
    counters = struct.pack("=4Q", 1, 2, received, sent) + bytes(8 * 20)
    body = struct.pack("=BxxxII", 0, index, 1) + extra + struct.pack("=HH", 4 + len(counters), 1) + counters
    return message(92, body)


DONE = message(3, bytes(4))


def test_links_are_read_until_the_dump_ends(native: Any) -> None:
    found: list[Row] = []
    assert native.parse_stats(link(7, 100, 2**63) + link(9, 3, 4), found) is False
    assert native.parse_stats(link(11, 5, 6) + DONE + link(99, 1, 1), found) is True
    assert found == [(7, 100, 2**63), (9, 3, 4), (11, 5, 6)]


def test_other_attributes_are_passed_over(native: Any) -> None:
    found: list[Row] = []
    native.parse_stats(link(7, 1, 2, extra=struct.pack("=HHI", 7, 5, 0)), found)
    assert found == [(7, 1, 2)]


def test_an_error_is_raised(native: Any) -> None:
    for kind in (2, 3):  # an error message, and a dump that ends with an error
        with pytest.raises(PermissionError):
            native.parse_stats(link(7, 1, 2) + message(kind, struct.pack("=i", -1)), [])


@needs_build
@given(
    st.lists(
        st.one_of(
            st.builds(link, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
            st.builds(message, st.integers(0, 100), st.binary(max_size=60)),
            st.just(DONE),
        ),
        max_size=5,
    ),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=5),
    st.integers(0, 2000),
)
def test_both_read_torn_and_false_datagrams_alike(
    messages: list[bytes], changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(b"".join(messages))
    for at, value in changes:
        if at < len(data):
            data[at] = value
    data = data[: len(data) - min(cut % 50, len(data))]
    answers = []
    for parse in (_tapstats_c.parse_stats, tapstats_py.parse_stats):
        found: list[Row] = []
        try:
            answers.append((parse(bytes(data), found), found))
        except OSError as error:
            answers.append((error.errno, found))
    assert answers[0] == answers[1]


@in_namespace
async def test_counters_are_those_of_sysfs() -> None:
    wires = [plug_in(f"tap{number}") for number in range(40)]
    for number, wire in enumerate(wires):
        sh(f"ip link set tap{number} up")
        wire.send_frame(bytes(60 + number))
    expected = {
        tuple(int(sh(f"cat /sys/class/net/{name}/{file}")) for file in
              ("ifindex", "statistics/rx_bytes", "statistics/tx_bytes"))
        for name in sh("ls /sys/class/net").split()
    }  # fmt: skip
    for module in (_tapstats_c, tapstats_py):
        if module is not None:
            stats = module.TapStats()
            for _ in range(2):
                assert {row for row in stats.sweep() if row[0] in {each[0] for each in expected}} == expected
            stats.close()
    for wire in wires:
        wire.close()
