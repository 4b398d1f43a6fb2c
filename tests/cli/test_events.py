"""``hypeman events``: what it asks and prints."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from hypeman.actor import Actor
from hypeman.events.types import CursorGone, Kind


@pytest.fixture
def logged(server: Any) -> None:
    events = server.world.events
    events.add(Kind.INSTANCE, "created", "web", tags={"team": "a"}, actor=Actor("alice"), data={"image": "alpine"})
    events.add(Kind.IMAGE, "ready", "alpine")
    events.add(Kind.VOLUME, "attached", "data", instance_id="web")


@pytest.mark.usefixtures("logged")
def test_list(cli: Any) -> None:
    created, ready, attached = cli("events", "--no-follow").stdout.splitlines()
    assert created.split()[1:] == ["instance.created", "web", "image=alpine", "by=alice", "#1"]
    assert ready.split()[1:] == ["image.ready", "alpine", "#2"]
    assert attached.split()[1:] == ["volume.attached", "data", "instance=web", "#3"]


@pytest.mark.usefixtures("logged")
@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--since", "1"], [2, 3]),
        (["--filter", "type=image"], [2]),
        (["--filter", "type=image", "--filter", "type=volume.attached"], [2, 3]),
        (["--filter", "instance=web"], [1, 3]),
        (["--filter", "tag=team=a"], [1]),
    ],
)
def test_filters(cli: Any, arguments: list[str], wanted: list[int]) -> None:
    found = cli("events", "--no-follow", "-o", "json", *arguments)
    assert [event["cursor"] for event in json.loads(found.stdout)] == wanted


@pytest.mark.parametrize("text", ["colour=red", "tag=team", "type=", "instance"])
def test_a_bad_filter_is_refused_before_anything_is_asked(cli: Any, text: str) -> None:
    found = cli("events", "--filter", text)
    assert (found.exit_code, "tag=KEY=VALUE" in found.stderr) == (2, True)


@pytest.mark.usefixtures("logged")
def test_follow(server: Any) -> None:
    command = [sys.executable, "-m", "hypeman", "--base-url", server.url, "events", "--since", "0", "-o", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert [json.loads(process.stdout.readline())["cursor"] for _ in range(3)] == [1, 2, 3]
        finally:
            process.terminate()


def test_what_was_lost_is_said(server: Any, cli: Any) -> None:
    server.world.events.failure = CursorGone("events after cursor 7 are no longer retained")
    found = cli("events", "--since", "7")
    assert (found.exit_code, "no longer retained" in found.stderr) == (1, True)
