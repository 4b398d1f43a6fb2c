"""One line an event, and no secret in it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterator
from typing import TextIO

import pytest

from hypeman.telemetry.findings import Finding, Verdict, worst
from hypeman.telemetry.logs import setup_logs
from hypeman.telemetry.metrics import REGISTRY


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def logged(style: str = "json", level: str = "info") -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    setup_logs(level, style, stream)
    return logging.getLogger("hypeman.test"), stream


def text_of(stream: io.StringIO) -> str:
    """What was written, once the writing thread is idle."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    return stream.getvalue()


def test_json_lines() -> None:
    log, stream = logged()
    log.info("made %s", "web", extra={"instance": "abc", "ms": 1.5})
    log.debug("not this one")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("failed")
    first, second = (json.loads(line) for line in text_of(stream).splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {"level": "info", "logger": "hypeman.test", "message": "made web", "instance": "abc", "ms": 1.5}
    assert "ValueError: two\nlines" in second["traceback"]


def test_text_lines() -> None:
    log, stream = logged("text")
    log.warning("two\nlines", extra={"route": "/a b", "status": 200})
    [line] = text_of(stream).splitlines()
    assert line.endswith('warning hypeman.test: two\\nlines route="/a b" status=200')


@pytest.mark.parametrize("style", ["json", "text"])
def test_foreign_text_is_one_harmless_line(style: str) -> None:
    log, stream = logged(style)
    evil = "a\x1b[2J\x9b2Jb\nforged\r\x7f\x85\u2028\u202e\ud800"
    log.info("guest said %s", evil, extra={"path_name": evil, evil: 1})
    [line] = text_of(stream).split("\n")[:-1]
    assert all(unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp", "Cf") for character in line), line
    if style == "json":
        assert json.loads(line)["path_name"] == evil, "in JSON nothing is lost"


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        yield reading, stream
        with contextlib.suppress(OSError):
            os.close(reading)


def test_a_log_without_a_reader_blocks_nothing(pipe: tuple[int, TextIO]) -> None:
    """Sixteen times more than pipe and queue hold. What is dropped is counted, and logged once there is a reader."""
    reading, stream = pipe
    setup_logs(stream=stream)
    [handler] = logging.getLogger().handlers
    handler._limit = 2**18  # type: ignore[attr-defined]
    before = REGISTRY.get_sample_value("hypeman_log_lines_dropped_total") or 0
    sent = 5000
    done = threading.Event()

    def log_much() -> None:
        for number in range(sent):
            logging.getLogger("hypeman.test").info("%d %s", number, "x" * 1000)
        done.set()

    threading.Thread(target=log_much, daemon=True).start()
    assert done.wait(60), "logging waits for the reader"
    received: list[int] = []
    dropped = 0
    with os.fdopen(reading, "rb") as log:
        while len(received) + dropped < sent:
            line = json.loads(log.readline())
            if "dropped" in line:
                assert line["level"] == "warning"
                dropped += line["dropped"]
            else:
                received.append(int(line["message"].split()[0]))
    assert dropped > 0
    assert len(received) + dropped == sent
    assert REGISTRY.get_sample_value("hypeman_log_lines_dropped_total") == before + dropped
    # The writer frees room as it fills the pipe, so lines may be missing in between; their order stays.
    assert received == sorted(set(received))


def test_a_log_whose_reader_has_gone(pipe: tuple[int, TextIO]) -> None:
    reading, stream = pipe
    setup_logs(stream=stream)
    os.close(reading)
    before = REGISTRY.get_sample_value("hypeman_log_lines_dropped_total") or 0
    for _ in range(3):
        logging.getLogger("hypeman.test").info("x")
        logging.getLogger().handlers[0].flush()
    assert REGISTRY.get_sample_value("hypeman_log_lines_dropped_total") == before + 3


def test_exit_waits_for_the_log_but_not_forever() -> None:
    program = (
        "import logging, sys; from hypeman.telemetry.logs import setup_logs; setup_logs(); "
        "[logging.getLogger('a').info('x' * 1000) for _ in range(int(sys.argv[1]))]"
    )
    result = subprocess.run([sys.executable, "-c", program, "50"], capture_output=True, timeout=60)
    assert len(result.stderr.splitlines()) == 50
    reading, writing = os.pipe()
    try:
        assert subprocess.run([sys.executable, "-c", program, "500"], stderr=writing, timeout=60).returncode == 0
    finally:
        os.close(reading)
        os.close(writing)


TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"


@pytest.mark.parametrize("style", ["json", "text"])
def test_secrets_are_blanked(style: str) -> None:
    log, stream = logged(style)
    log.info(f"Authorization: Bearer {TOKEN}", extra={"jwt_secret": "hunter2", "env": {"A": "hunter2"}})
    log.info("a token %s in the middle", TOKEN, extra={"headers": {"Authorization": "hunter2"}, "list": [TOKEN]})
    log.info("login", extra={"registry_token": "hunter2", "Password": "hunter2", "note": "Basic aHVudGVyMg=="})
    assert "hunter2" not in text_of(stream)
    assert TOKEN not in text_of(stream)
    assert "aHVudGVyMg" not in text_of(stream)
    assert "in the middle" in text_of(stream)


def test_the_worst_finding_counts() -> None:
    ok, warn = (Finding(name="a", verdict=verdict, message="") for verdict in (Verdict.OK, Verdict.WARN))
    assert worst(()) is Verdict.OK
    assert worst((ok, warn, ok)) is Verdict.WARN
    assert worst((warn, Finding(name="b", verdict=Verdict.FAIL, message=""))) is Verdict.FAIL
