"""The queue of builds: order, limits, cancellation, restarts; with a worker that is a fake."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from hypeman.builds import journal, receiving
from hypeman.builds.records import BUILDS
from hypeman.builds.service import Builds
from hypeman.builds.types import BuilderStatus, BuildStatus, CreateBuilderRequest
from hypeman.builds.work import BuildFailed
from hypeman.errors import Conflict, InsufficientResources, InvalidRequest, NotFound
from tests.builds.conftest import CONTEXT, DIGEST, Bench, ended, form, lines, read_all, statuses

STEP = "sha256:" + "a" * 64


async def test_a_build_becomes_an_image(bench: Bench) -> None:
    async with bench.serving() as builds:
        made = await builds.create(form(image_name="team/app:v1", tags={"team": "a"}, build_args={"A": "1"}))
        assert (made.status, made.tags) == (BuildStatus.QUEUED, {"team": "a"})
        await bench.worker.wait_begun(made.id)
        job = bench.worker.jobs[made.id]
        assert (job.images, job.spec.build_args) == (("docker.io/team/app:v1",), {"A": "1"})
        assert job.source.read_bytes() == CONTEXT
        running = await builds.get(made.id)
        assert (running.status, running.builder_instance_id) == (BuildStatus.BUILDING, f"vm-{made.id}")
        bench.worker.finish(made.id)
        done = await ended(builds, made)
        assert (done.status, done.image_digest, done.error) == (BuildStatus.READY, DIGEST, None)
        assert done.completed_at is not None and done.duration_ms is not None
        await until_clean(bench, builds, made.id)
        assert not job.source.exists(), "the context is no longer needed"
        assert [one.id for one in await builds.list(tags={"team": "a"})] == [made.id]
        assert await builds.list(tags={"team": "b"}) == []


async def until_clean(bench: Bench, builds: Builds, build_id: str) -> None:
    with trio.fail_after(10):
        while build_id in bench.worker.left or builds.statistics()["active"]:
            await trio.sleep(0.005)


async def test_builds_of_a_builder_run_one_after_the_other_in_order(bench: Bench) -> None:
    bench.settings = msgspec.structs.replace(bench.settings, at_once=3)
    async with bench.serving() as builds:
        await builds.create_builder(CreateBuilderRequest(id="b"))
        first, second, third = [await builds.create(form(builder_id="b")) for _ in range(3)]
        other = await builds.create(form())
        await bench.worker.wait_begun(first.id)
        await bench.worker.wait_begun(other.id)
        builder = await builds.get_builder("b")
        assert (builder.active_build_id, builder.queued_builds) == (first.id, (second.id, third.id))
        assert [(await builds.get(one.id)).queue_position for one in (first, second, third)] == [None, 1, 2]
        for refused in (builds.delete_builder("b"), builds.prune_builder("b")):
            with pytest.raises(Conflict):
                await refused
        for build in (first, second, third):
            await bench.worker.wait_begun(build.id)
            bench.worker.finish(build.id)
            await ended(builds, build)
        mine = [name for name in bench.worker.begun if name != other.id]
        assert mine == [first.id, second.id, third.id]
        assert (await builds.get_builder("b")).last_used_at is not None


async def test_the_number_of_builds_at_once_is_bounded(bench: Bench) -> None:
    async with bench.serving() as builds:
        made = [await builds.create(form()) for _ in range(4)]
        await bench.worker.wait_begun(made[1].id)
        assert builds.statistics() == {"active": 2, "queued": 2}
        bench.worker.finish(made[0].id)
        await bench.worker.wait_begun(made[2].id)
        assert bench.worker.begun == [one.id for one in made[:3]]


async def test_cancelled_at_any_time(bench: Bench) -> None:
    bench.settings = msgspec.structs.replace(bench.settings, at_once=1)
    async with bench.serving() as builds:
        running, queued = await builds.create(form()), await builds.create(form())
        await bench.worker.wait_begun(running.id)
        await builds.cancel(queued.id)
        await builds.cancel(running.id)
        for build in (queued, running):
            assert (await builds.get(build.id)).status is BuildStatus.CANCELLED
            assert statuses(await read_all(builds, build))[-1] is BuildStatus.CANCELLED
            with pytest.raises(Conflict):
                await builds.cancel(build.id)
        await until_clean(bench, builds, running.id)
        assert bench.worker.begun == [running.id]
        following = await builds.create(form())
        await bench.worker.wait_begun(following.id)
        bench.worker.finish(following.id)
        await ended(builds, following)
        with pytest.raises(Conflict):
            await builds.cancel(following.id)
        with pytest.raises(NotFound):
            await builds.cancel("none")


async def test_an_image_that_appears_is_not_cancelled(bench: Bench) -> None:
    async with bench.serving() as builds:
        made = await builds.create(form())
        await bench.worker.wait_begun(made.id)
        bench.worker.reports[made.id].publishing()
        with pytest.raises(Conflict):
            await builds.cancel(made.id)
        bench.worker.finish(made.id)
        assert (await ended(builds, made)).status is BuildStatus.READY


async def test_a_time_limit_ends_a_build(bench: Bench, autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = 0.2
    async with bench.serving() as builds:
        made = await builds.create(form(timeout_seconds="30"))
        done = await ended_slowly(builds, made.id)
        assert done.status is BuildStatus.FAILED and "30 s" in (done.error or "")
        assert bench.worker.left == set()


async def ended_slowly(builds: Builds, build_id: str) -> Any:
    while not (found := await builds.get(build_id)).status.is_final:
        await trio.sleep(20)
    return found


@pytest.mark.parametrize("failure", [BuildFailed("step 3: exit code 1"), Conflict("the host is full"), ValueError("?")])
async def test_a_failure_is_recorded_and_the_queue_continues(bench: Bench, failure: Exception) -> None:
    async with bench.serving() as builds:
        await builds.create_builder(CreateBuilderRequest(id="b"))
        made, following = await builds.create(form(builder_id="b")), await builds.create(form(builder_id="b"))
        await bench.worker.wait_begun(made.id)
        bench.worker.finish(made.id, failure)
        done = await ended(builds, made)
        assert done.status is BuildStatus.FAILED
        wanted = "internal error" if isinstance(failure, ValueError) else str(failure)
        assert wanted in (done.error or "") and done.image_ref is None
        assert any(wanted in line for line in lines(await read_all(builds, made)))
        await bench.worker.wait_begun(following.id)


async def test_a_full_disk_costs_lines_but_not_the_build(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(fd: int, data: bytes) -> None:
        os.write(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with bench.serving() as builds:
        made, following = await builds.create(form()), await builds.create(form())
        await bench.worker.wait_begun(made.id)
        bench.worker.reports[made.id].log("before")
        with monkeypatch.context() as full:
            full.setattr(journal, "write_all", write_half)
            bench.worker.reports[made.id].log("not kept")
        bench.worker.reports[made.id].log("after")
        with monkeypatch.context() as full:
            full.setattr(journal, "write_all", write_half)
            bench.worker.finish(made.id, BuildFailed("step 3: exit code 1"))
            assert lines(await read_all(builds, made)) == ["before", "after"]
        bench.worker.finish(following.id)
        assert (await ended(builds, following)).status is BuildStatus.READY
        await until_clean(bench, builds, following.id)


async def test_a_killed_server_is_continued_by_the_next(bench: Bench) -> None:
    """What ran begins again before what waited; a build whose secrets are gone says so; nothing is left of VMs."""
    bench.settings = msgspec.structs.replace(bench.settings, at_once=1)
    async with bench.serving() as builds:
        await builds.create_builder(CreateBuilderRequest(id="b"))
        running = await builds.create(form(builder_id="b"))
        secret = await builds.create(form(secrets=[{"id": "s", "value": "very secret"}]))
        queued = await builds.create(form())
        await bench.worker.wait_begun(running.id)
        bench.worker.reports[running.id].log("line of the first attempt")
    assert bench.worker.left == {running.id}
    (bench.paths.builds / "left").mkdir()
    with (bench.paths.build(running.id) / "events.jsonl").open("ab") as file:
        file.write(b'{"at": "torn')
    bench.restarted()
    async with bench.serving() as builds:
        await bench.worker.wait_begun(running.id)
        assert bench.worker.left == {running.id}, "the old VM was removed first"
        lost = await builds.get(secret.id)
        assert lost.status is BuildStatus.FAILED and "secrets were not kept" in (lost.error or "")
        bench.worker.finish(running.id)
        bench.worker.finish(queued.id)
        assert (await ended(builds, running)).status is BuildStatus.READY
        assert (await ended(builds, queued)).status is BuildStatus.READY
        said = lines(await read_all(builds, running))
        assert "line of the first attempt" in said and any("begins again" in line for line in said)
        assert {path.name for path in bench.paths.builds.iterdir()} == {running.id, secret.id, queued.id}
    assert b"very secret" not in b"".join(
        path.read_bytes() for path in bench.paths.data_dir.rglob("*") if path.is_file()
    )


async def test_a_build_that_kills_the_server_is_given_up(bench: Bench) -> None:
    async with bench.serving() as builds:
        made = await builds.create(form())
        await bench.worker.wait_begun(made.id)
    for _ in range(2):
        bench.restarted()
        async with bench.serving():
            await bench.worker.wait_begun(made.id)
    bench.restarted()
    async with bench.serving() as builds:
        found = await builds.get(made.id)
        assert found.status is BuildStatus.FAILED and "3 times" in (found.error or "")
        assert statuses(await read_all(builds, made))[-1] is BuildStatus.FAILED


async def test_late_followers_see_everything(bench: Bench) -> None:
    async with bench.serving() as builds:
        made = await builds.create(form())
        early: list[Any] = []

        async def follow() -> None:
            early.extend(await read_all(builds, made))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            await bench.worker.wait_begun(made.id)
            report = bench.worker.reports[made.id]
            begun, done = "2026-01-01T00:00:00Z", "2026-01-01T00:00:02Z"
            vertex = {"digest": STEP, "name": "[1/1] RUN x", "started": begun}
            report.progress(msgspec.json.encode({"vertexes": [vertex]}))
            output = {"vertex": STEP, "stream": 1, "data": b"hello\nwor", "timestamp": "2026-01-01T00:00:01Z"}
            report.progress(msgspec.json.encode({"logs": [output]}))
            report.progress(msgspec.json.encode({"vertexes": [{**vertex, "completed": done}]}))
            bench.worker.finish(made.id)
            await ended(builds, made)
        late = await read_all(builds, made)
        assert early == late
        assert lines(late) == ["#1 [1/1] RUN x", "#1 1.000 hello", "#1 wor", "#1 DONE 2.0s"]
        wanted = [BuildStatus.QUEUED, BuildStatus.BUILDING, BuildStatus.PUSHING, BuildStatus.READY]
        assert statuses(late) == wanted
        assert statuses(await read_all(builds, made, follow=False)) == []
        raw = [event.progress for event in await read_all(builds, made, progress=True)]
        assert sum(isinstance(one, msgspec.Raw) for one in raw) == 3
    async with bench.serving() as builds:
        assert await read_all(builds, made) == late, "a restart changes nothing"


async def test_refusals(bench: Bench, tmp_path: Path) -> None:
    async with bench.serving() as builds:
        refused_fields: list[tuple[dict[str, Any], str]] = [
            ({"source": b""}, "invalid_source"),
            ({"source": b"not compressed"}, "invalid_source"),
            ({"image_name": "UPPER CASE"}, "invalid_name"),
            ({"secrets": "[{"}, "invalid_request"),
            ({"secrets": [{"id": "a/b", "value": "x"}]}, "invalid_request"),
            ({"secrets": [{"id": "absent"}]}, "invalid_request"),
            ({"dockerfile_path": "../Dockerfile"}, "invalid_request"),
            ({"build_args": {"a=b": "c"}}, "invalid_request"),
            ({"cache_to": ["type=local,dest=/"]}, "invalid_request"),
            ({"cache_scope": "global/x"}, "invalid_request"),
            ({"ssh": [{"id": "default"}]}, "invalid_request"),
            ({"cpus": "100"}, "invalid_request"),
            ({"timeout_seconds": "999999999"}, "invalid_request"),
            ({"dockerfile": b"x" * (1 << 20) + b"x"}, "invalid_request"),
        ]
        for wrong, code in refused_fields:
            with pytest.raises(InvalidRequest) as refused:
                await builds.create(form(**wrong))
            assert refused.value.code == code, wrong
        with pytest.raises(NotFound):
            await builds.create(form(builder_id="none"))
        assert await builds.list(tags={}) == []
        assert not bench.paths.builds.exists() or not list(bench.paths.builds.iterdir())
        made = await builds.create(form(timeout_seconds="soon", memory_mb=""))
        assert bench.store.read(lambda txn: txn.get(BUILDS, made.id)).spec.timeout == 0  # type: ignore[union-attr]


async def test_contexts_of_all_builds_are_bounded_together(bench: Bench) -> None:
    """Also those that a server before this one received; what is over no longer counts."""
    bench.settings = msgspec.structs.replace(bench.settings, max_source=2000, max_sources=3000, at_once=1)
    large = {"source": CONTEXT + bytes(1200)}

    async def refused(builds: Builds, source: bytes) -> None:
        async with aclosing(form(source=source)) as parts:
            await builds.create(parts)

    async with bench.serving() as builds:
        with pytest.raises(InvalidRequest, match="larger than"):
            await refused(builds, CONTEXT + bytes(2000))
        first, second = await builds.create(form(**large)), await builds.create(form(**large))
        with pytest.raises(InsufficientResources, match="max_sources_size") as full:
            await refused(builds, large["source"])
        assert (full.value.status, full.value.code, full.value.retryable) == (409, "insufficient_resources", True)
        assert {path.name for path in bench.paths.builds.iterdir()} == {first.id, second.id}
        assert not list(bench.paths.tmp.iterdir()), "nothing of what was refused is left"
        await builds.create(form())
    bench.restarted()
    async with bench.serving() as builds:
        with pytest.raises(InsufficientResources):
            await refused(builds, large["source"])
        await builds.cancel(second.id)
        assert (await builds.create(form(**large))).status is BuildStatus.QUEUED


async def test_a_context_that_would_fill_the_disk_is_refused(bench: Bench) -> None:
    async with bench.serving() as builds:
        bench.room = 6
        with pytest.raises(InsufficientResources, match="server's disk") as full:
            async with aclosing(form()) as parts:
                await builds.create(parts)
        assert (full.value.status, full.value.code) == (409, "insufficient_resources")
        assert not list(bench.paths.tmp.iterdir()) and await builds.list(tags={}) == []
        bench.room = 7
        assert (await builds.create(form())).status is BuildStatus.QUEUED


@pytest.mark.parametrize("end", ["ready", "failed", "cancelled", "cancelled in the queue"])
async def test_what_a_build_was_lent_is_forgotten_with_it(bench: Bench, end: str) -> None:
    bench.settings = msgspec.structs.replace(bench.settings, at_once=1)
    lent: dict[str, Any] = {
        "secrets": [{"id": "s", "value": "lent"}],
        "ssh": [{"id": "default", "value": "a key"}],
        "registry_auth": {"auths": {}},
    }
    async with bench.serving() as builds:
        first = await builds.create(form())
        made = await builds.create(form(**lent))
        assert set(builds._borrowed[made.id].secrets) == {"s"} and builds._borrowed[made.id].registry_auth
        if end != "cancelled in the queue":
            bench.worker.finish(first.id)
            await bench.worker.wait_begun(made.id)
        if end.startswith("cancelled"):
            await builds.cancel(made.id)
        else:
            bench.worker.finish(made.id, None if end == "ready" else BuildFailed("a step failed"))
        assert (await ended(builds, made)).status is BuildStatus(end.split()[0])
        await read_all(builds, made)  # its last event comes after its record
        assert made.id not in builds._borrowed


async def test_a_secret_of_the_server(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "npm").write_bytes(b"token")
    bench.settings = msgspec.structs.replace(bench.settings, secrets_dir=str(tmp_path))
    async with bench.serving() as builds:
        made = await builds.create(form(secrets=[{"id": "npm", "env_var": "NPM"}]))
        await bench.worker.wait_begun(made.id)
        assert bench.worker.jobs[made.id].secrets == {"npm": b"token"}
        assert "token" not in repr(bench.worker.jobs[made.id])


async def test_builders(bench: Bench) -> None:
    async with bench.serving() as builds:
        made = await builds.create_builder(CreateBuilderRequest(id="b", name="mine", disk_size_gb=3, tags={"a": "b"}))
        assert (made.disk_size_gb, made.status, made.max_concurrency) == (3, BuilderStatus.READY, 1)
        with pytest.raises(Conflict) as taken:
            await builds.create_builder(CreateBuilderRequest(id="b"))
        assert taken.value.code == "already_exists"
        with pytest.raises(InvalidRequest):
            await builds.create_builder(CreateBuilderRequest(id="a/b"))
        bench.worker.full = InsufficientResources("no room")
        with pytest.raises(Conflict) as full:
            await builds.create_builder(CreateBuilderRequest(id="c"))
        assert full.value.code == "quota_exceeded"
        assert [builder.id for builder in await builds.list_builders(tags={"a": "b"})] == ["b"]
        assert await builds.list_builders(tags={"a": "c"}) == []
        bench.worker.full = None
        await builds.delete_builder("b")
        with pytest.raises(NotFound):
            await builds.get_builder("b")


async def test_a_prune_is_finished_by_the_next_server_and_builds_wait_for_it(bench: Bench) -> None:
    bench.worker.holds = trio.Event()
    async with bench.serving() as builds:
        await builds.create_builder(CreateBuilderRequest(id="b"))
        assert (await builds.prune_builder("b")).status is BuilderStatus.PRUNING
        made = await builds.create(form(builder_id="b"))
        with pytest.raises(Conflict):
            await builds.delete_builder("b")
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert bench.worker.begun == []
    bench.restarted()
    async with bench.serving() as builds:
        await bench.worker.wait_begun(made.id)
        assert (await builds.get_builder("b")).status is BuilderStatus.READY
        assert bench.worker.caches == {"b": 2}


async def test_idle_builders_are_removed(store: Any, paths: Any) -> None:
    bench = Bench(store, paths)
    bench.settings = msgspec.structs.replace(bench.settings, builder_idle=3600.0)
    async with bench.serving() as builds:
        await builds.create_builder(CreateBuilderRequest(id="idle"))
        await builds.create_builder(CreateBuilderRequest(id="used"))
        await builds.create(form(builder_id="used"))
        builds.builders._now = lambda: datetime.now(UTC) + timedelta(hours=2)
        await builds.builders.reap()
        assert [builder.id for builder in await builds.list_builders(tags={})] == ["used"]


async def test_forms_that_are_not_sent_on_take_little_memory_and_time(
    bench: Bench, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a valid token and no more than 64 fields of 1 MB, none of which ends."""
    monkeypatch.setattr(receiving, "MAX_FORMS", 20 << 20)
    outcomes: list[str] = []
    sent = 0

    async def stalled() -> AsyncGenerator[tuple[str, bytes]]:
        nonlocal sent
        for number in range(6):
            yield f"f{number}", bytes(1 << 20)
            sent += 1
        await trio.sleep_forever()

    async def greedy() -> AsyncGenerator[tuple[str, bytes]]:
        for number in range(60):
            yield f"f{number}", bytes(1 << 20)

    async with bench.serving() as builds:
        with pytest.raises(InvalidRequest, match="a form"):
            async with aclosing(greedy()) as parts:
                await builds.create(parts)

        async def ask() -> None:
            try:
                async with aclosing(stalled()) as parts:
                    await builds.create(parts)
            except (Conflict, InvalidRequest) as error:
                outcomes.append(error.message)

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask)
        assert len(outcomes) == 10 and sent <= 10 * 6 - 20
        assert sum("arrived for" in outcome for outcome in outcomes) >= 1
        assert sum("try again" in outcome for outcome in outcomes) >= 5
        assert (await builds.create(form())).status is BuildStatus.QUEUED
        assert not list(bench.paths.tmp.glob("build-*"))
