"""Images that a Dockerfile starts from, and what is made of a request: pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest

from hypeman.builds.command import LocalImage, build_command, render_config
from hypeman.builds.dockerfile import familiar_name, find_images
from hypeman.builds.progress import (
    LineSplitter,
    PlainText,
    SolveStatus,
    Vertex,
    VertexLog,
    VertexStatus,
    parse_status,
)
from hypeman.builds.request import BuildSpec
from hypeman.images.reference import parse_reference

NOW = datetime(2026, 5, 1, tzinfo=UTC)

DOCKERFILE = r"""
# syntax=docker/dockerfile:1
ARG BASE=alpine
ARG TAG="3.20"
FROM --platform=$BUILDPLATFORM ${BASE}:$TAG AS build
RUN echo FROM nothing
FROM \
  quay.io/team/tool:v1
FROM build
FROM scratch
ARG TAG=ignored
COPY --link --from=build /a /b
COPY --from=team/assets /c /d
COPY --from=0 /e /f
FROM team/pinned@sha256:{digest}
""".replace("{digest}", "0" * 64)


def test_images_of_a_dockerfile() -> None:
    found = [str(image) for image in find_images(DOCKERFILE, {})]
    assert found == ["docker.io/library/alpine:3.20", "quay.io/team/tool:v1", "docker.io/team/assets:latest"]
    assert str(find_images(DOCKERFILE, {"BASE": "team/base", "TAG": "v2"})[0]) == "docker.io/team/base:v2"
    assert find_images("FROM ${NONE}\nFROM UPPER CASE\nFROM " + "x" * 5000, {}) == []


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("alpine", "alpine"), ("team/app:v1", "team/app:v1"), ("quay.io/library/a:latest", "quay.io/library/a")],
)
def test_names_as_buildkit_looks_for_them(name: str, wanted: str) -> None:
    assert familiar_name(parse_reference(name)) == wanted


def test_the_command_has_everything_that_was_requested() -> None:
    spec = BuildSpec(
        dockerfile_path="docker/app.Dockerfile", build_args={"A": "1 2"}, labels={"l": "v"}, target="t",
        platform="linux/amd64", no_cache=True, pull=True, secrets=(("npm", "NPM_TOKEN"),), ssh=("default",),
        cache_from=("type=registry,ref=r/c",), cache_to=("type=inline",), provenance="mode=max", sbom="true",
    )  # fmt: skip
    image = LocalImage("base", "/hypeman/images/0", "sha256:0")
    argv = build_command(spec, cache_in=("/in",), cache_out=("/out",), images=(image,))
    text = " ".join(argv)
    for part in (
        "--local dockerfile=/hypeman/context/docker --opt filename=app.Dockerfile --opt target=t",
        "--opt platform=linux/amd64 --opt build-arg:A=1 2 --opt label:l=v --no-cache --opt image-resolve-mode=pull",
        "--opt attest:provenance=mode=max --opt attest:sbom= ",
        "--secret id=npm,src=/run/hypeman-build/secrets/npm --secret id=NPM_TOKEN,src=/run/hypeman-build/secrets/npm",
        "--ssh default=/run/hypeman-build/ssh/default --import-cache type=registry,ref=r/c --export-cache type=inline",
        "--oci-layout image0=/hypeman/images/0 --opt context:base=oci-layout://image0@sha256:0",
        "--import-cache type=local,src=/in --export-cache type=local,dest=/out,mode=max",
    ):
        assert part in text, part
    assert "local dockerfile=/hypeman/dockerfile" in " ".join(build_command(BuildSpec(dockerfile=True)))


def test_the_registries_are_those_of_the_server() -> None:
    config = render_config(("r:5000",), {"docker.io": ("m:5000",)}, 1 << 30)
    assert "[history]\n  maxEntries = 0\n" in config, "the output of steps does not stay in the cache"
    assert '[registry."r:5000"]\n  http = true' in config
    assert '[registry."docker.io"]\n  mirrors = ["m:5000"]' in config


def test_progress_as_lines() -> None:
    """What a guest sends is read strictly, and never grows without bound."""
    assert parse_status(b"Dockerfile:3") is None
    assert parse_status(b'{"vertexes": 1}') is None
    assert parse_status(b"{" + b" " * (2 << 20) + b"}") is None
    text = PlainText()
    lines: list[str] = []
    for line in (
        b'{"vertexes":[{"digest":"a","name":"one"}]}',
        b'{"vertexes":[{"digest":"a","name":"one","started":"2026-01-01T00:00:00Z","completed":"2026-01-01T00:00:00Z",'
        b'"cached":true}]}',
        b'{"vertexes":[{"digest":"b","name":"two","started":"2026-01-01T00:00:00Z"}]}',
        b'{"logs":[{"vertex":"b","data":"YQ=="},{"vertex":"b","data":"Ygo="},{"vertex":"none","data":"Ygo="}]}',
        b'{"vertexes":[{"digest":"b","name":"two","started":"2026-01-01T00:00:00Z","completed":"2026-01-01T00:00:01Z",'
        b'"error":"exit code: 1"}],"warnings":[{"short":"b2xk"}]}',
    ):
        status = parse_status(line)
        assert status is not None
        lines += text.feed(status)
    failed = ["#2 ERROR: exit code: 1", "------", " > two:", "ab", "------"]
    assert lines == ["#1 one", "#1 CACHED", "#2 two", "#2 ab", *failed, "WARNING: old"]
    splitter = LineSplitter(limit=10)
    pieces = [b"one\ntw", b"o\n" + b"x" * 30, b"x\nthree\n", b"rest"]
    assert [line for piece in pieces for line in splitter.feed(piece)] == [b"one", b"two", b"three"]
    assert splitter.flush() == b"rest"


def test_a_step_that_begins_again_is_done_once() -> None:
    """Unless it took time. Of a line that a program writes over, the last state is shown."""
    text = PlainText()
    lines: list[str] = []
    for end in (0, 0, 0, 12):
        completed = NOW + timedelta(seconds=end)
        for vertex in (Vertex(digest="a", name="FROM x", started=NOW), Vertex("a", "FROM x", NOW, completed)):
            lines += text.feed(SolveStatus(vertexes=(vertex,)))
    assert lines == ["#1 FROM x", "#1 DONE 0.0s", "#1 DONE 12.0s"]
    output = VertexLog(vertex="a", data=b"5%\r50%\r100%\r\n", timestamp=NOW)
    assert text.feed(SolveStatus(logs=(output,))) == ["#1 0.000 100%"]


def test_a_step_that_fails_shows_what_it_printed_last() -> None:
    """In the same words as docker build; not one that another's failure has ended."""
    text = PlainText()
    for name in "ab":
        text.feed(SolveStatus(vertexes=(Vertex(digest=name, name=f"RUN {name}", started=NOW),)))
    for number in range(30):
        logs = tuple(VertexLog(vertex=name, data=f"{name} {number}\n".encode(), timestamp=NOW) for name in "ab")
        text.feed(SolveStatus(logs=logs))
    ended = [
        Vertex(digest="a", name="RUN a", started=NOW, completed=NOW, error="exit code: 1"),
        Vertex(digest="b", name="RUN b", started=NOW, completed=NOW, error="process ended: context canceled"),
    ]
    lines = text.feed(SolveStatus(vertexes=tuple(ended)))
    last = [f"0.000 a {number}" for number in range(10, 30)]
    assert lines == [
        "#1 ERROR: exit code: 1", "------", " > RUN a:", *last, "------", "#2 ERROR: process ended: context canceled",
    ]  # fmt: skip
    long = SolveStatus(logs=tuple(VertexLog(vertex="b", data=b"x" * 60_000 + b"\n") for _ in range(1000)))
    text.feed(long)
    assert sum(len(line) for _, line in text._latest) <= 400_000


def test_an_update_of_very_many_lines_or_transfers_is_cut() -> None:
    """A guest could keep the server busy for seconds with one update, and each reader in memory with many."""
    step = Vertex(digest="a", name="x", started=NOW)
    text = PlainText()
    lines = text.feed(SolveStatus(vertexes=(step,), logs=(VertexLog(vertex="a", data=b"\n" * 700_000),)))
    assert len(lines) < 50_000 and re.fullmatch(r"#1 \[6\d{5} more lines at once: not shown\]", lines[-1])
    assert text.feed(SolveStatus(logs=(VertexLog(vertex="a", data=b"more\n"),))) == ["#1 more"]
    for number in range(30):
        name = f"step {number}"
        text.feed(SolveStatus(vertexes=(Vertex(digest=name, started=NOW),)))
        text.feed(SolveStatus(statuses=tuple(VertexStatus(id=str(n), vertex=name) for n in range(1000))))
    assert sum(len(step.transfers) for step in text.steps.values()) == 10_000
