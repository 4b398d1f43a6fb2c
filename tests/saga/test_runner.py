"""All or nothing, newest first, past failures; forward only where it must end."""

from __future__ import annotations

import pytest
import trio

from hypeman.errors import InternalError
from hypeman.saga import UndoFailed, carry_forward, carry_out, take_back


class Boom(Exception):
    pass


class Note:
    """A step that writes down what was done to it; ``fail`` names where it fails, ``hang`` where it waits."""

    def __init__(self, name: str, *, fail: str = "", hang: bool = False, times: int = 1) -> None:
        self.name, self.fail, self.hang, self.times = name, fail, hang, times


class Notebook(list[str]):
    async def do(self, step: Note) -> None:
        self.append(f"do {step.name}")
        if step.hang:
            await trio.sleep_forever()
        if step.fail == "do" and step.times:
            step.times -= 1
            raise Boom(step.name)

    async def undo(self, step: Note) -> None:
        await trio.lowlevel.checkpoint()
        self.append(f"undo {step.name}")
        if step.fail == "undo":
            raise Boom(step.name)


async def test_in_order() -> None:
    notebook = Notebook()
    await carry_out([Note("a"), Note("b")], notebook)
    assert notebook == ["do a", "do b"]


@pytest.mark.parametrize("where", [0, 1, 2])
async def test_a_failure_undoes_the_begun_ones_newest_first(where: int) -> None:
    """The failing step too: it may have half happened."""
    notebook = Notebook()
    steps = [Note(name, fail="do" if number == where else "") for number, name in enumerate("abc")]
    with pytest.raises(Boom):
        await carry_out(steps, notebook)
    done = "abc"[: where + 1]
    assert notebook == [f"do {name}" for name in done] + [f"undo {name}" for name in reversed(done)]


@pytest.mark.parametrize("where", [0, 1, 2])
async def test_a_cancellation_undoes_as_well(where: int, autojump_clock: trio.testing.MockClock) -> None:
    notebook = Notebook()
    steps = [Note(name, hang=number == where) for number, name in enumerate("abc")]
    with trio.move_on_after(1):
        await carry_out(steps, notebook)
    assert [entry for entry in notebook if entry.startswith("undo")] == [
        f"undo {n}" for n in reversed("abc"[: where + 1])
    ]


async def test_undoing_continues_after_a_failing_undo() -> None:
    notebook = Notebook()
    with pytest.raises(UndoFailed, match="Note") as caught:
        await carry_out([Note("a"), Note("b", fail="undo"), Note("c", fail="do")], notebook)
    assert notebook[-3:] == ["undo c", "undo b", "undo a"]
    assert isinstance(caught.value.__cause__, Boom)


async def test_take_back_twice_is_content() -> None:
    notebook = Notebook()
    await take_back([Note("a"), Note("b")], notebook)
    await take_back([Note("a"), Note("b")], notebook)
    assert notebook == ["undo b", "undo a"] * 2


async def test_forward_tries_again(autojump_clock: trio.testing.MockClock) -> None:
    notebook = Notebook()
    await carry_forward([Note("a", fail="do", times=2), Note("b")], notebook)
    assert notebook == ["do a", "do a", "do a", "do b"]


async def test_forward_gives_up_in_the_end(autojump_clock: trio.testing.MockClock) -> None:
    notebook = Notebook()
    begun = trio.current_time()
    with pytest.raises(Boom):
        await carry_forward([Note("a", fail="do", times=9), Note("b")], notebook)
    assert notebook == ["do a"] * 3, "three tries, and nothing after the step that failed"
    assert trio.current_time() - begun == pytest.approx(0.2 + 0.4), "the pauses between them grow"
    assert issubclass(UndoFailed, InternalError)
