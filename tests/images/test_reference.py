"""References and platforms: Docker's rules, there and back."""

from __future__ import annotations

import re
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.errors import InvalidRequest
from hypeman.fields import ImageName
from hypeman.images.reference import Platform, parse_platform, parse_reference

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.20", "docker.io/library/alpine:3.20"),
        ("acme/tool", "docker.io/acme/tool:latest"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("index.docker.io/alpine", "docker.io/library/alpine:latest"),
        ("ghcr.io/acme/tool:1.2", "ghcr.io/acme/tool:1.2"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("x:5000/y", "x:5000/y:latest"),
        ("[::1]:5000/y", "[::1]:5000/y:latest"),
        ("a/b/c/d", "docker.io/a/b/c/d:latest"),
        ("a__b/c--d.e", "docker.io/a__b/c--d.e:latest"),
        (f"alpine@{DIGEST}", f"docker.io/library/alpine@{DIGEST}"),
        (f"alpine:3@{DIGEST}", f"docker.io/library/alpine@{DIGEST}"),
        ("Registry/x", "Registry/x:latest"),
    ],
)
def test_normalised(text: str, normal: str) -> None:
    assert str(parse_reference(text)) == normal
    assert str(parse_reference(normal)) == normal


@pytest.mark.parametrize(
    "text",
    ["", "UPPER", "a//b", "/a", "a/", "a:", "a@", "a@sha256:12", "a@md5:" + "0" * 32, "a b", "a:" + "t" * 129,
     "-a", "a-", "a..b", "a/" * 130 + "a", "http://x/y", "a@" + DIGEST + "0", "é", "a\n", "x" * 5000],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_reference(text)
    assert caught.value.code == "invalid_name"


@given(st.text(alphabet="abzAZ019._-/:@[]é \n", max_size=40) | st.text(max_size=20))
def test_any_text(text: str) -> None:
    """Whatever is accepted is a fixed point: it parses to itself."""
    try:
        parsed = parse_reference(text)
    except InvalidRequest:
        return
    assert parse_reference(str(parsed)) == parsed
    assert bool(parsed.tag) != bool(parsed.digest)


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux/amd64", Platform("linux", "amd64")),
        ("linux/arm64", Platform("linux", "arm64")),
        ("linux/arm64/v8", Platform("linux", "arm64", "v8")),
    ],
)
def test_platform(text: str, platform: Platform) -> None:
    assert parse_platform(text) == platform
    assert str(platform) == text


@pytest.mark.parametrize(
    "text", ["", "linux", "windows/amd64", "linux/riscv64", "linux/amd64/", "Linux/amd64", "linux/amd64\n"]
)
def test_platform_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_platform(text)
    assert caught.value.code == "invalid_platform"


SCHEMA = typing.get_args(ImageName)[1].extra_json_schema
DOCUMENTED = re.compile(SCHEMA["pattern"])


PARTS = (
    "a",
    "B",
    "0",
    ".",
    "-",
    "_",
    "__",
    "/",
    ":",
    "[::1]",
    "localhost",
    "@sha256:" + "a" * 64,
    "@sha256:0",
    " ",
    "ä",
)


@given(st.lists(st.sampled_from(PARTS), max_size=8).map("".join))
def test_the_documented_pattern_is_what_is_accepted(text: str) -> None:
    try:
        parse_reference(text)
    except InvalidRequest as error:
        assert not DOCUMENTED.fullmatch(text) or "longer than" in error.message
    else:
        assert DOCUMENTED.fullmatch(text)
