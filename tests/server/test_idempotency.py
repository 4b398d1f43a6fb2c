"""``Idempotency-Key``: a repeated POST is carried out once, also across restarts and kills of the server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from hypeman import events
from hypeman.actor import current_actor
from hypeman.errors import InsufficientResources, InternalError
from hypeman.events.types import Kind
from hypeman.instances.model.types import CreateInstanceRequest, Instance, StartInstanceRequest, StopInstanceRequest
from hypeman.server import idempotency
from hypeman.server.app import build_app
from hypeman.server.exchange import ServerSettings
from hypeman.server.idempotency import CALLS, ORDER, Calls
from hypeman.store import Store
from hypeman.tokens import mint
from tests.fakes.services import FakeWorld

SECRET = "a secret that is long enough for HS256"
WEB = {"name": "web", "image": "alpine"}
Ask = Callable[..., Any]


@asynccontextmanager
async def serving(directory: Path, world: FakeWorld, *, timeout: float = 60.0) -> AsyncIterator[tuple[Ask, Store]]:
    """``ask(path, key, json, subject)`` → (status, body, headers); each block is one life of the server."""
    store = Store.open(directory / "store")
    async with store.serving(), trio.open_nursery() as nursery:
        calls = Calls(store, world.services)
        await nursery.start(calls.run)
        app = build_app(world.services, ServerSettings(SECRET, timeout), calls)

        async def ask(path: str, key: str | None, json: Any = None, subject: str = "tester") -> tuple[int, Any, Any]:
            headers = {"Authorization": f"Bearer {mint(SECRET, subject=subject)}"}
            if key is not None:
                headers["Idempotency-Key"] = key
            options = {} if json is None else {"json": json}
            with trio.fail_after(10):
                response = await app.test_client().open(path, method="POST", headers=headers, **options)
            return response.status_code, await response.get_json(), response.headers

        yield ask, store
        nursery.cancel_scope.cancel()
    store.close()


async def test_a_repeated_call_returns_the_first_ones_object(tmp_path: Path, world: FakeWorld) -> None:
    async with serving(tmp_path, world) as (ask, _):
        status, first, headers = await ask("/instances", "k1", WEB)
        assert (status, "Idempotency-Replayed" in headers) == (201, False)
        status, second, headers = await ask("/instances", "k1", WEB)
        assert (status, second, headers["Idempotency-Replayed"]) == (201, first, "true")
    async with serving(tmp_path, world) as (ask, _):
        assert (await ask("/instances", "k1", WEB))[:2] == (201, first), "nor is it forgotten by a restart"
        assert (await ask("/instances", None, WEB))[0] == 409
    assert len(world.instances.instances) == 1


@pytest.mark.parametrize(
    ("path", "json"), [("/instances", {**WEB, "vcpus": 1}), ("/instances/web/stop", None), ("/instances?x=1", WEB)]
)
async def test_the_key_of_another_request_is_422(tmp_path: Path, world: FakeWorld, path: str, json: Any) -> None:
    async with serving(tmp_path, world) as (ask, _):
        assert (await ask("/instances", "k1", WEB))[0] == 201
        status, body, headers = await ask(path, "k1", json)
        assert (status, body["code"], headers["X-Should-Retry"]) == (422, "idempotency_key_reused", "false")


async def test_keys_belong_to_their_subject(tmp_path: Path, world: FakeWorld) -> None:
    async with serving(tmp_path, world) as (ask, _):
        assert (await ask("/instances", "k1", WEB, "alice"))[0] == 201
        assert (await ask("/instances", "k1", {**WEB, "name": "other"}, "bob"))[0] == 201


@pytest.mark.parametrize("key", ["", "a b", "x" * 256])
async def test_bad_keys(tmp_path: Path, world: FakeWorld, key: str) -> None:
    async with serving(tmp_path, world) as (ask, _):
        status, body, _ = await ask("/instances", key, WEB)
        assert (status, body["code"]) == (400, "invalid_idempotency_key")


async def test_a_failure_may_be_tried_again(tmp_path: Path, world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(request: object) -> Instance:
        raise failures.pop()

    failures: list[Exception] = [InternalError("a disk"), InsufficientResources("full"), ValueError("a bug")]
    async with serving(tmp_path, world) as (ask, store):
        with monkeypatch.context() as patch:
            patch.setattr(world.instances, "create", refuse)
            assert [(await ask("/instances", "k1", WEB))[0] for _ in range(3)] == [500, 409, 500]
        assert store.read(lambda txn: list(txn.keys(CALLS))) == []
        assert (await ask("/instances", "k1", WEB))[0] == 201


async def test_duplicates_in_flight_wait_for_the_first(
    tmp_path: Path, world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, go, begun = world.instances.create, trio.Event(), []

    async def slow(request: CreateInstanceRequest) -> Instance:
        begun.append(request)
        await go.wait()
        return await real(request)

    monkeypatch.setattr(world.instances, "create", slow)
    found = []

    async def one(ask: Ask) -> None:
        found.append(await ask("/instances", "k1", WEB))

    async with serving(tmp_path, world) as (ask, _), trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one, ask)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert (await ask("/instances", "k1", {**WEB, "name": "b"}))[0] == 422
        go.set()
    assert len(begun) == 1
    assert {status for status, _, _ in found} == {201}
    assert len({body["id"] for _, body, _ in found}) == 1


async def test_the_work_outlives_the_time_limit(
    tmp_path: Path, world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, go = world.instances.create, trio.Event()

    async def slow(request: CreateInstanceRequest) -> Instance:
        await go.wait()
        return await real(request)

    monkeypatch.setattr(world.instances, "create", slow)
    async with serving(tmp_path, world, timeout=0.1) as (ask, _):
        assert (await ask("/instances", "k1", WEB))[0] == 504
        go.set()
        status, body, _ = await ask("/instances", "k1", WEB)
        assert (status, body["name"]) == (201, "web")


class Killed(BaseException):
    """The server dies."""


async def begin_and_die(directory: Path, world: FakeWorld, *, rolled_back: bool = False, made: bool = True) -> str:
    """A server that is killed after it has made an instance, before it has stored its response; the instance's id."""
    store = Store.open(directory / "store")
    real = world.instances.create
    ids = []

    async def create(request: CreateInstanceRequest) -> Instance:
        if made:
            instance = await real(request)
            ids.append(instance.id)
            await store.write(partial(events.record, kind=Kind.INSTANCE, action="created", id=instance.id))
            assert (actor := current_actor()) is not None and actor.call
            if rolled_back:
                await world.instances.delete(instance.id)
        raise Killed

    world.instances.create = create  # type: ignore[method-assign]
    with pytest.raises(BaseExceptionGroup):
        async with store.serving(), trio.open_nursery() as nursery:
            calls = Calls(store, world.services)
            await nursery.start(calls.run)
            app = build_app(world.services, ServerSettings(SECRET), calls)
            headers = {"Authorization": f"Bearer {mint(SECRET, subject='tester')}", "Idempotency-Key": "k1"}
            await app.test_client().post("/instances", json=WEB, headers=headers)
    world.instances.create = real  # type: ignore[method-assign]
    store.close()
    if rolled_back:  # as the next server does, on its own
        store = Store.open(directory / "store")
        async with store.serving():
            await store.write(partial(events.record, kind=Kind.INSTANCE, action="deleted", id=ids[0]))
        store.close()
    return ids[0] if ids else ""


async def test_an_object_that_a_killed_server_made_is_found(tmp_path: Path, world: FakeWorld) -> None:
    made = await begin_and_die(tmp_path, world)
    async with serving(tmp_path, world) as (ask, _):
        for _ in range(2):
            status, body, _ = await ask("/instances", "k1", WEB)
            assert (status, body["id"]) == (201, made)
    assert len(world.instances.instances) == 1


@pytest.mark.parametrize("how", [{"rolled_back": True}, {"made": False}])
async def test_what_a_killed_server_did_not_make_is_made_now(
    tmp_path: Path, world: FakeWorld, how: dict[str, bool]
) -> None:
    before = await begin_and_die(tmp_path, world, **how)
    async with serving(tmp_path, world) as (ask, _):
        status, body, _ = await ask("/instances", "k1", WEB)
        assert status == 201 and body["id"] != before


@pytest.mark.parametrize("taken_back", [False, True])
async def test_a_stop_that_a_killed_server_did_is_not_done_again(
    tmp_path: Path, world: FakeWorld, monkeypatch: pytest.MonkeyPatch, taken_back: bool
) -> None:
    """Neither if the instance was started since; a stop that was taken back is done."""
    web, real = world.instances.add("web"), world.instances.stop
    store = Store.open(tmp_path / "store")
    stops = []

    async def note(before: str, after: str) -> None:
        data = {"from": before, "to": after}
        await store.write(
            lambda txn: events.record(txn, kind=Kind.INSTANCE, action="state_changed", id=web.id, data=data)
        )

    async def stop(ref: str, request: StopInstanceRequest) -> Instance:
        stops.append(ref)
        await real(ref, request)
        await note("Running", "Stopped")
        if taken_back:
            await note("Stopped", "Running")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(BaseExceptionGroup):
        patch.setattr(world.instances, "stop", stop)
        async with store.serving(), trio.open_nursery() as nursery:
            calls = Calls(store, world.services)
            await nursery.start(calls.run)
            app = build_app(world.services, ServerSettings(SECRET), calls)
            headers = {"Authorization": f"Bearer {mint(SECRET, subject='tester')}", "Idempotency-Key": "k1"}
            await app.test_client().post("/instances/web/stop", headers=headers)
    store.close()
    await world.instances.start("web", StartInstanceRequest())
    async with serving(tmp_path, world) as (ask, _):
        status, body, _ = await ask("/instances/web/stop", "k1")
        assert (status, body["state"]) == (200, "Stopped" if taken_back else "Running")
    assert len(stops) == 1


async def test_the_rows_are_bounded(tmp_path: Path, world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "MAX_ROWS", 3)
    async with serving(tmp_path, world) as (ask, store):
        for number in range(6):
            assert (await ask("/instances", f"k{number}", {**WEB, "name": f"web{number}"}))[0] == 201
        assert len(store.read(lambda txn: list(txn.keys(CALLS)))) == 3
        assert len(store.read(lambda txn: list(txn.keys(ORDER)))) == 3
        assert (await ask("/instances", "k5", {**WEB, "name": "web5"}))[0] == 201
        assert (await ask("/instances", "k0", {**WEB, "name": "web0"}))[0] == 409


async def test_old_rows_are_dropped(tmp_path: Path, world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, world) as (ask, store):
        assert (await ask("/instances", "k1", WEB))[0] == 201
        monkeypatch.setattr(idempotency, "MAX_AGE", idempotency.MAX_AGE * 0)
        assert (await ask("/instances", "k2", {**WEB, "name": "b"}))[0] == 201
        assert len(store.read(lambda txn: list(txn.keys(CALLS)))) == 1
