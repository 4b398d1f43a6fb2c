"""The kubeconfig: what is read from it, and what is refused by name."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml

from hypeman.kube.credentials import KubeconfigError, load_kubeconfig


def write(path: Path, *, user: dict[str, Any], cluster: dict[str, Any] | None = None) -> Path:
    tree = {
        "current-context": "c",
        "contexts": [
            {"name": "other", "context": {"cluster": "none", "user": "none"}},
            {"name": "c", "context": {"cluster": "k", "user": "u"}},
        ],
        "clusters": [
            {"name": "k", "cluster": {"server": "https://k:6443/", "certificate-authority": "ca", **(cluster or {})}}
        ],
        "users": [{"name": "u", "user": user}],
    }
    file = path / "kubeconfig"
    file.write_text(yaml.safe_dump(tree))
    return file


def test_the_current_context_counts(tmp_path: Path) -> None:
    ca = base64.b64encode(b"-----BEGIN").decode()
    file = write(tmp_path, user={"token": "t", "client-key": "node.key"}, cluster={"certificate-authority-data": ca})
    access = load_kubeconfig(file)
    assert (access.server, access.token, access.ca_data) == ("https://k:6443", "t", b"-----BEGIN")
    assert access.key_file == str(tmp_path / "node.key"), "relative to the kubeconfig"
    assert load_kubeconfig(file, server="https://other/").server == "https://other"
    assert "t" not in repr(access).split("server=")[0]


def test_a_token_file_is_read_again(tmp_path: Path) -> None:
    access = load_kubeconfig(write(tmp_path, user={"tokenFile": "token"}))
    (tmp_path / "token").write_text("one\n")
    assert access.bearer() == "one"
    (tmp_path / "token").write_text("two\n")
    assert access.bearer() == "two"


@pytest.mark.parametrize(
    ("user", "cluster", "named"),
    [
        ({"exec": {"command": "x"}}, {}, "exec"),
        ({"username": "x"}, {}, "username"),
        ({}, {"insecure-skip-tls-verify": True}, "insecure-skip-tls-verify"),
        ({}, {"tls-server-name": "x"}, "tls-server-name"),
        ({}, {"certificate-authority": ""}, "certificate-authority is needed"),
        ({"client-key-data": "§"}, {}, "base64"),
    ],
)
def test_what_is_refused(tmp_path: Path, user: dict[str, Any], cluster: dict[str, Any], named: str) -> None:
    with pytest.raises(KubeconfigError, match=named):
        load_kubeconfig(write(tmp_path, user=user, cluster=cluster))


@pytest.mark.parametrize("text", ["", "[]", "a: b", "{", "contexts: [{name: c}]\ncurrent-context: c"])
def test_what_is_no_kubeconfig(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(KubeconfigError, match="file"):
        load_kubeconfig(tmp_path / "file")
