"""Look-ups for the data plane: what one instance asks for costs another nothing."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from hypeman.egress import resolver
from hypeman.egress.resolver import MAX_WAITING, SHARE, Resolver


class Names:
    """A resolver of the host whose answers come when the test says so."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.silent = trio.Event()
        """Set: names that begin with ``silent`` are answered, with nothing."""

    async def resolve(self, name: str) -> list[str]:
        self.asked.append(name)
        if name.startswith("silent"):
            await self.silent.wait()
            return []
        await trio.lowlevel.checkpoint()
        return ["192.0.2.1"] if name != "nobody" else []


async def test_names_that_never_resolve_cost_another_instance_nothing(autojump_clock: trio.testing.MockClock) -> None:
    names = Names()
    shared = Resolver(names.resolve)
    answered: list[str] = []

    async def ask(instance: str, name: str) -> None:
        assert await shared.addresses(instance, name) == []
        answered.append(name)

    async with trio.open_nursery() as nursery:
        for number in range(400):
            nursery.start_soon(ask, "hostile", f"silent{number}")
        await trio.testing.wait_all_tasks_blocked()
        assert len(names.asked) == SHARE, "the rest waits for its own"
        assert len(answered) == 400 - SHARE - MAX_WAITING, "what is too much is answered at once"
        assert await shared.addresses("other", "api.example.com") == ["192.0.2.1"]
        names.silent.set()
    assert len(answered) == 400
    assert not shared._shares and not shared._running


async def test_a_name_is_looked_up_once_for_all_who_ask(autojump_clock: trio.testing.MockClock) -> None:
    """Also for an instance whose share another name has used up, and the one who asked first does not hold it up."""
    names = Names()
    shared = Resolver(names.resolve)
    results: list[list[str]] = []

    async def ask(instance: str, name: str) -> None:
        results.append(await shared.addresses(instance, name))

    async with trio.open_nursery() as nursery:
        for number in range(SHARE):
            nursery.start_soon(ask, "hostile", f"silent{number}")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(ask, "hostile", "api.example.com")  # waits for its own share
        await trio.testing.wait_all_tasks_blocked()
        for instance in ("a", "b", "c"):
            nursery.start_soon(ask, instance, "api.example.com")
        await trio.testing.wait_all_tasks_blocked()
        assert results == [["192.0.2.1"]] * 3
        names.silent.set()
    assert names.asked.count("api.example.com") == 1, "the one who waited found the answer"


async def test_answers_are_kept_for_a_while(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names()
    shared = Resolver(names.resolve)
    for name, kept in (("api.example.com", resolver.KEPT), ("nobody", resolver.KEPT_EMPTY)):
        await shared.addresses("a", name)
        await trio.sleep(kept - 0.5)
        await shared.addresses("b", name)
        assert names.asked.count(name) == 1
        await trio.sleep(1)
        await shared.addresses("b", name)
        assert names.asked.count(name) == 2
    monkeypatch.setattr(resolver, "MAX_KEPT", 3)
    for name in ("one", "two", "three", "four"):
        await shared.addresses("a", name)
    assert list(shared._kept) == ["two", "three", "four"], "the oldest goes first"


async def test_a_look_up_that_is_cancelled_leaves_nothing_behind(autojump_clock: trio.testing.MockClock) -> None:
    names = Names()
    shared = Resolver(names.resolve)
    with trio.move_on_after(1):
        await shared.addresses("a", "silent")
    assert not shared._shares and not shared._running
    names.silent.set()
    assert await shared.addresses("a", "silent") == []


async def test_the_systems_resolver() -> None:
    assert "127.0.0.1" in await resolver.resolve_by_system("localhost")
    assert await resolver.resolve_by_system("no-such-name.invalid") == []
    assert await resolver.resolve_by_system("x" * 300) == []


async def test_connections_go_where_the_guest_was_told(autojump_clock: trio.testing.MockClock) -> None:
    """For its own look-up, as long as it is valid; another instance's connections go elsewhere."""
    names = Names()
    shared = Resolver(names.resolve)
    shared.pin("a", "api.example.com", ["192.0.2.9"], 60)
    assert await shared.addresses("a", "api.example.com") == ["192.0.2.9"]
    assert await shared.addresses("b", "api.example.com") == ["192.0.2.1"]
    await trio.sleep(61)
    assert await shared.addresses("a", "api.example.com") == ["192.0.2.1"]
    for number in range(resolver.MAX_PINNED + 10):
        shared.pin("a", f"n{number}", ["192.0.2.9"], 60)
    assert len(shared._pinned) == resolver.MAX_PINNED
