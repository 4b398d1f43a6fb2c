"""One line an event, and no secret in it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from hypeman.telemetry.findings import Finding, Verdict, worst
from hypeman.telemetry.logs import setup_logs


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


def test_json_lines() -> None:
    log, stream = logged()
    log.info("made %s", "web", extra={"instance": "abc", "ms": 1.5})
    log.debug("not this one")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("failed")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {"level": "info", "logger": "hypeman.test", "message": "made web", "instance": "abc", "ms": 1.5}
    assert "ValueError: two\nlines" in second["traceback"]


def test_text_lines() -> None:
    log, stream = logged("text")
    log.warning("two\nlines", extra={"route": "/a b", "status": 200})
    [line] = stream.getvalue().splitlines()
    assert line.endswith('warning hypeman.test: two\\nlines route="/a b" status=200')


TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"


@pytest.mark.parametrize("style", ["json", "text"])
def test_secrets_are_blanked(style: str) -> None:
    log, stream = logged(style)
    log.info(f"Authorization: Bearer {TOKEN}", extra={"jwt_secret": "hunter2", "env": {"A": "hunter2"}})
    log.info("a token %s in the middle", TOKEN, extra={"headers": {"Authorization": "hunter2"}, "list": [TOKEN]})
    log.info("login", extra={"registry_token": "hunter2", "Password": "hunter2", "note": "Basic aHVudGVyMg=="})
    assert "hunter2" not in stream.getvalue()
    assert TOKEN not in stream.getvalue()
    assert "aHVudGVyMg" not in stream.getvalue()
    assert "in the middle" in stream.getvalue()


def test_the_worst_finding_counts() -> None:
    ok, warn = (Finding(name="a", verdict=verdict, message="") for verdict in (Verdict.OK, Verdict.WARN))
    assert worst(()) is Verdict.OK
    assert worst((ok, warn, ok)) is Verdict.WARN
    assert worst((warn, Finding(name="b", verdict=Verdict.FAIL, message=""))) is Verdict.FAIL
