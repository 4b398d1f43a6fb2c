"""Challenges and docker's configuration file."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.images.auth import NOBODY, Keychain, Login, parse_docker_config
from hypeman.images.registry import retry_after
from hypeman.images.types import PushCredentials
from hypeman.logins import Challenge, parse_challenges


@pytest.mark.parametrize(
    ("headers", "challenges"),
    [
        ([], []),
        (['Basic realm="here"'], [Challenge("basic", {"realm": "here"})]),
        (
            ['Bearer realm="https://a/t",service="s, t",scope="x"'],
            [Challenge("bearer", {"realm": "https://a/t", "service": "s, t", "scope": "x"})],
        ),
        (
            ['BEARER Realm=x, Basic realm="a \\"b\\""'],
            [Challenge("bearer", {"realm": "x"}), Challenge("basic", {"realm": 'a "b"'})],
        ),
        (["Negotiate", 'Basic realm=""'], [Challenge("negotiate", {}), Challenge("basic", {"realm": ""})]),
    ],
)  # fmt: skip
def test_challenges(headers: list[str], challenges: list[Challenge]) -> None:
    assert parse_challenges(headers) == challenges


@given(st.text(alphabet='ab="\\, \t(', max_size=30))
def test_any_challenge(header: str) -> None:
    parse_challenges([header])


def test_docker_config() -> None:
    document = {
        "auths": {
            "https://index.docker.io/v1/": {"auth": base64.b64encode(b"u:p:q").decode()},
            "ghcr.io": {"username": "u", "password": "p"},
            "broken": {"auth": "%%%"},
            "empty": {},
            "odd": 5,
        },
        "credsStore": "desktop",
    }
    assert parse_docker_config(json.dumps(document).encode()) == {
        "docker.io": Login("u", "p:q"),
        "ghcr.io": Login("u", "p"),
    }


def test_keychain_notices_changes(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    keychain = Keychain(file)
    assert keychain.login("x") is NOBODY
    file.write_text(json.dumps({"auths": {"x": {"username": "one", "password": "1"}}}))
    assert keychain.login("x").username == "one"
    file.write_text(json.dumps({"auths": {"x": {"username": "two", "password": "22"}}}))
    os.utime(file, ns=(1, 1))
    assert keychain.login("x").username == "two"
    file.write_text("{")
    assert keychain.login("x") is NOBODY


def test_secrets_do_not_show() -> None:
    assert "hunter2" not in repr(Login("u", "hunter2")) + repr(PushCredentials("u", "hunter2"))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        ("Thu, 01 Jan 1970 00:01:00 GMT", 50.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, now=lambda: 10.0) == seconds
