"""Text that guests, images and servers chose is shown, never obeyed: no control character gets through."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest

from hypeman.cli.client import ApiError
from hypeman.cli.run import boot_line
from hypeman.cli.session import Session, complain, warn
from hypeman.instances.machine.context import Context
from hypeman.instances.machine.logs import Logs
from hypeman.paths import Paths
from hypeman.text import lines, lines_with_colours, one_line

EVIL = "a\x1b]0;owned\x07\x9b2Jb\nroot: forged\r\x7f\x85\u2028\u202e\ud800c"


def is_harmless(text: str, allowed: str = "") -> bool:
    return all(
        character in allowed or unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") for character in text
    ) and not set(text) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def test_every_control_character_becomes_an_escape() -> None:
    for number in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, 0x202E, 0x2066, 0xD800, 0xDFFF):
        assert is_harmless(one_line(chr(number))), hex(number)
        assert is_harmless(lines(chr(number)), "\n\t"), hex(number)
    assert one_line("a\nb\x1bc\x9bd\u2028") == "a\\nb\\x1bc\\x9bd\\u2028"
    assert lines("a\n\tb\x1b") == "a\n\tb\\x1b"
    assert one_line("Grüße, 世界 🙂") == "Grüße, 世界 🙂"


def test_our_own_colours_are_kept() -> None:
    assert lines_with_colours("\x1b[31mred\x1b[0m\x1b[2J\x07") == "\x1b[31mred\x1b[0m\\x1b[2J\\x07"


def test_errors_and_warnings_are_one_harmless_line(capsys: pytest.CaptureFixture[str]) -> None:
    complain(EVIL, EVIL)
    warn(EVIL)
    body = b'{"code":"x\\u001b","message":"m\\u001b[2J\\nforged"}'
    Session().report(ApiError("GET", "/x", 400, body))
    reported = capsys.readouterr().err.splitlines()
    assert len(reported) == 5
    assert all(is_harmless(line) for line in reported), reported


@pytest.mark.parametrize("form", ["auto", "raw", "yaml", "json", "jsonl", "pretty"])
def test_what_is_shown_on_a_terminal(form: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    evil = EVIL.replace("\ud800", "")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    Session(form=form).show(evil, lambda: evil)
    assert is_harmless(capsys.readouterr().out, "\n\t")


def test_a_pipe_gets_what_was_sent(capsys: pytest.CaptureFixture[str]) -> None:
    Session(form="raw").show("a\x1bb")
    assert capsys.readouterr().out == "a\x1bb\n"


def test_the_line_about_a_boot_is_harmless() -> None:
    assert is_harmless(boot_line({"name": "web", "state": "Stopped", "exit_message": EVIL}))


def test_an_entry_point_cannot_forge_a_line_of_the_journal(tmp_path: Path) -> None:
    paths = Paths(tmp_path, tmp_path)
    log = paths.instance("abc").log("hypeman")
    log.parent.mkdir(parents=True)
    context = Context.__new__(Context)
    context.paths = paths
    Logs(context).journal("abc", "2026-01-01T00:00:00Z guest: " + EVIL.replace("\ud800", ""))
    [line] = log.read_text().splitlines()
    assert is_harmless(line)
    assert line.endswith("c")
