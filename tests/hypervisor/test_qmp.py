"""The QMP codec: every cut of the stream gives the same messages, and nonsense is refused."""

from __future__ import annotations

import contextlib
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.hypervisor.qmp import Greeting, Happened, Message, QmpCodec, QmpError, Refused, Returned, command

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, '
    b'"capabilities": ["oob"]}}\r\n'
)
DIALOGUE = (
    GREETING
    + b'{"return": {}, "id": 1}\r\n'
    + b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true}}\r\n'
    + b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESUME"}\r\n'
    + b'{"id": 2, "error": {"class": "GenericError", "desc": "no \xe2\x80\x9cdisk\xe2\x80\x9d"}}\r\n'
    + b'{"return": [{"status": "running"}], "id": 3}\r\n'
    + b'{"error": {"class": "GenericError", "desc": "not for a command of ours"}}\r\n'
)
MESSAGES: list[Message] = [
    Greeting("7.2.22"),
    Returned(1, {}),
    Happened("SHUTDOWN", {"guest": True}),
    Happened("RESUME", {}),
    Refused(2, "GenericError", "no “disk”"),
    Returned(3, [{"status": "running"}]),
    Refused(None, "GenericError", "not for a command of ours"),
]


def test_cut_at_every_byte() -> None:
    for cut in range(len(DIALOGUE) + 1):
        codec = QmpCodec()
        assert codec.receive_data(DIALOGUE[:cut]) + codec.receive_data(DIALOGUE[cut:]) == MESSAGES


@given(st.lists(st.integers(0, len(DIALOGUE))))
def test_cut_into_any_pieces(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(DIALOGUE)]
    codec = QmpCodec()
    got = [message for a, b in itertools.pairwise(edges) for message in codec.receive_data(DIALOGUE[a:b])]
    assert got == MESSAGES


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"hello",
        b"[]",
        b"{}",
        b"null",
        b'{"return": 1, "error": {"class": "x", "desc": "y"}}',
        b'{"event": 7}',
        b'{"return": {}, "id": "1"}',
        b'{"error": {"class": "x"}}',
        b'{"return": "\xff"}',
        b"[" * 100_000,
        GREETING.strip(),
    ],
)
def test_malformed_data_after_the_greeting_is_refused_for_good(line: bytes) -> None:
    codec = QmpCodec()
    codec.receive_data(GREETING)
    with pytest.raises(QmpError):
        codec.receive_data(line + b"\n")
    with pytest.raises(QmpError):
        codec.receive_data(b'{"return": {}, "id": 1}\n')


def test_the_greeting_comes_first() -> None:
    with pytest.raises(QmpError, match="no greeting"):
        QmpCodec().receive_data(b'{"return": {}, "id": 1}\n')


def test_a_line_has_a_longest_length_also_unfinished() -> None:
    codec = QmpCodec(max_line=1000)
    codec.receive_data(GREETING)
    codec.receive_data(b"x" * 1000)
    with pytest.raises(QmpError, match="1000 bytes"):
        codec.receive_data(b"x")


@given(st.binary())
def test_bytes_never_do_worse_than_a_qmp_error(data: bytes) -> None:
    codec = QmpCodec()
    codec.receive_data(GREETING)
    with contextlib.suppress(QmpError):
        codec.receive_data(data + b"\n")


def test_a_command_is_one_line() -> None:
    sent = command("qom-set", {"path": "/a\n", "value": 1}, number=7)
    assert sent.count(b"\n") == 1 and sent.endswith(b"\n")
    assert json.loads(sent) == {"execute": "qom-set", "arguments": {"path": "/a\n", "value": 1}, "id": 7}
    assert json.loads(command("stop", number=8)) == {"execute": "stop", "id": 8}
