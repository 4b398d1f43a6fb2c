"""The table of transitions: complete, drawn in the README as it is, and known to admission."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hypeman.instances.model import admission
from hypeman.instances.model.admission import ALLOWED, Command
from hypeman.instances.model.states import NO_VMM, TRANSITIONS, is_possible, render_diagram
from hypeman.instances.model.types import InstanceState as S

README = Path(__file__).parents[2] / "hypeman" / "instances" / "README.md"
BEGIN, END = "```mermaid\n", "\n```"


def with_diagram(text: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, "the README has a diagram"
    return before + BEGIN + render_diagram() + END + after


def test_the_diagram_in_the_readme_is_the_table() -> None:
    """Write it anew with ``python -m tests.instances.test_states``."""
    assert README.read_text() == with_diagram(README.read_text())


def test_no_transition_is_listed_twice() -> None:
    pairs = [(before, after) for before, after, _ in TRANSITIONS]
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("state", sorted(set(S) - {S.PAUSED}))
def test_every_state_is_reached_and_left(state: S) -> None:
    reached, waiting = set[S](), [after for before, after, _ in TRANSITIONS if before is None]
    while waiting:
        if (now := waiting.pop()) is not None and now not in reached:
            reached.add(now)
            waiting += [after for before, after, _ in TRANSITIONS if before is now]
    assert state in reached
    assert is_possible(state, None), "every instance can be deleted"


COLUMNS: dict[str, tuple[Command, ...]] = {
    "start": (Command.START,),
    "stop": (Command.STOP,),
    "standby": (Command.STANDBY,),
    "restore": (Command.RESTORE,),
    "fork": (Command.FORK,),
    "capture": (Command.SNAPSHOT,),
    "exec/cp/stat": (Command.USE,),
    "attach/detach": (Command.ATTACH, Command.DETACH),
    "delete": (Command.DELETE,),
}


def test_the_table_in_the_header_of_admission_is_what_is_admitted() -> None:
    """Written for readers, and a second time for the program."""
    lines = str(admission.__doc__).splitlines()
    begin = next(number for number, line in enumerate(lines) if line.split()[:1] == ["state"])
    names = lines[begin].split()[1:]
    ends = [lines[begin].index(f" {name}") + 1 for name in names]
    reported: dict[str, set[S]] = {name: set() for name in names}
    for line in lines[begin + 1 : begin + 1 + len(S)]:
        for mark in re.finditer(r"x", line):
            reported[names[sum(end <= mark.start() for end in ends) - 1]].add(S(line.split()[0]))
    assert reported.keys() == COLUMNS.keys()
    for name, commands in COLUMNS.items():
        assert all(ALLOWED[command] == reported[name] for command in commands), name
    assert ALLOWED[Command.RESTORE_SNAPSHOT] == NO_VMM == {S.STOPPED, S.STANDBY}
    assert ALLOWED.keys() == {command for commands in COLUMNS.values() for command in commands} | {
        Command.RESTORE_SNAPSHOT
    }


def test_what_is_legal_is_possible() -> None:
    """A command that is legal in a state leads somewhere from it."""
    targets = {"start": S.INITIALIZING, "standby": S.STANDBY, "restore": S.RUNNING}
    for command, target in targets.items():
        assert all(is_possible(state, target) for state in next(v for k, v in ALLOWED.items() if k.value == command))
    assert {before for before, after, _ in TRANSITIONS if after is S.INITIALIZING} & NO_VMM == {S.STOPPED}


if __name__ == "__main__":
    README.write_text(with_diagram(README.read_text()))
