"""What ingresses hear of instances, and where they find them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from hypeman.egress.front import Place
from hypeman.ingress.targets import Targets
from hypeman.instances.board import Board
from hypeman.instances.model.types import InstanceState
from hypeman.store import Store
from tests.instances.test_board import a_record, render


def test_only_what_has_ended_is_reported_as_ended(tmp_path: Path) -> None:
    """In standby and while it is being deleted, connections are kept; under an old name it runs on."""
    heard: list[tuple[set[str], bool]] = []
    store, board = Store.open(tmp_path), Board(render)
    targets = Targets(board, store, lambda names, ended: heard.append((set(names), ended)))
    running: Any = a_record("web", InstanceState.RUNNING, "", 0)
    for record, ended in [
        (running, False),
        (replace(running, state=InstanceState.PAUSED), False),
        (replace(running, state=InstanceState.STANDBY), False),
        (replace(running, deleting=True), False),
        (replace(running, state=InstanceState.SHUTDOWN), True),
        (replace(running, state=InstanceState.STOPPED), True),
        (replace(running, state=InstanceState.INITIALIZING), False),
    ]:
        board.post(record)
        assert heard.pop() == ({"id-web", "web"}, ended), record.state
    board.post(replace(running, name="new"))
    assert heard.pop() == ({"id-web", "web", "new"}, False)
    board.remove(running)
    assert heard.pop() == ({"id-web", "new"}, True)
    assert targets.place_of("new") == Place("", exists=False)
    store.close()
