"""What people write and what it means; output always reads back as the same value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.errors import InvalidRequest
from hypeman.units import (
    format_duration,
    format_rate,
    format_size,
    parse_disk_rate,
    parse_duration,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("17", 17),
        ("1B", 1),
        ("2k", 2048),
        ("2 KB", 2048),
        ("512MB", 512 << 20),
        ("1gb", 1 << 30),
        ("1T", 1 << 40),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "-1", "1.5GB", "GB", "1KiB", "1 G B", "9999999999EB", "1e3", "٣MB"])
def test_what_is_no_size_is_refused_with_its_code(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_size(text, code="invalid_size")
    assert caught.value.code == "invalid_size"


@pytest.mark.parametrize(
    ("text", "value"),
    [("8bps", 1), ("100mbps", 12_500_000), ("1Gbps", 125_000_000), ("125MB/s", 125 << 20), ("10k", 10 << 10)],
)
def test_rates_count_decimal_bits_or_binary_bytes(text: str, value: int) -> None:
    assert parse_rate(text) == value


def test_disk_rates() -> None:
    assert parse_disk_rate("100MB/s") == parse_disk_rate("100MBps") == parse_disk_rate("100MB") == 100 << 20


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("0s", 0),
        ("90s", 90),
        ("1h30m", 5400),
        ("250ms", 0.25),
        ("1.5h", 5400),
        ("10us", 1e-5),
        ("1m0.5s", 60.5),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "1", "1d", "-1s", "s", "1s1", "1 s", "99999999999h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (300, "5m0s"), (604800, "168h0m0s"), (0.25, "250ms"), (1, "1s"), (60.5, "1m0.5s"), (1e-6, "1µs")],
)
def test_durations_are_written_as_go_does(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(0, 2**63 - 1))
def test_a_size_reads_back(value: int) -> None:
    assert parse_size(format_size(value)) == value
    assert parse_rate(format_rate(value)) == value


@given(st.integers(0, 10**15))
def test_a_duration_reads_back(microseconds: int) -> None:
    seconds = microseconds / 10**6
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, abs=1e-9, rel=1e-12)


@given(st.text(max_size=20))
def test_any_text_is_a_value_or_a_clear_refusal(text: str) -> None:
    for parse in (parse_size, parse_rate, parse_disk_rate, parse_duration):
        try:
            assert parse(text) >= 0
        except InvalidRequest as error:
            assert error.status == 400
