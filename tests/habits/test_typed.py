"""The table of what is typed, at a server whose guests are fake."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cli.conftest import alone, cli, server
from tests.habits.typed import TYPED, Typed

__all__ = ["alone", "cli", "server"]  # fixtures


@pytest.mark.parametrize("row", TYPED, ids=[row.command for row in TYPED])
def test_what_is_typed(cli: Any, server: Any, row: Typed) -> None:
    cli("volume", "create", "data")
    for name in ("web", "old"):
        cli("run", "-d", "--name", name, "nginx:1")
    cli("stop", "old")
    done = cli(*row.words)
    assert (done.exit_code, row.shows in done.stdout + done.stderr) == (row.code, True), done.stdout + done.stderr
    assert not row.prints_nothing or done.stdout == ""
    assert len(done.stderr) < 600, "a message is short"
