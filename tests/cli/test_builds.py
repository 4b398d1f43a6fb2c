"""``build`` and ``builder``: what is sent, and what is shown."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from hypeman.cli.context import Ignore
from tests.cli.conftest import Running


def context_of(server: Running) -> dict[str, bytes]:
    """The files of the context that was sent last."""
    with tarfile.open(fileobj=io.BytesIO(server.world.builds.fields["source"]), mode="r:gz") as tar:
        return {
            entry.name: file.read() if (file := tar.extractfile(entry)) else b"" for entry in tar if not entry.issym()
        }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for name, text in {
        "Dockerfile": "FROM scratch\n",
        ".dockerignore": "*.log\nnode_modules\n!keep.log\nDockerfile\nsecret\n",
        "app.py": "print()",
        "a.log": "no",
        "keep.log": "yes",
        "node_modules/x/y.js": "no",
        "src/deep/b.log": "sub",
        "secret/key": "no",
        "docker/other.Dockerfile": "FROM scratch AS other\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "link").symlink_to("app.py")
    return root


def test_a_build_sends_its_context_and_shows_its_progress(server: Running, cli: Any, project: Path) -> None:
    (project / "token").write_text("secret of the file")
    os.environ["A_VARIABLE"] = "from here"
    try:
        result = cli(
            "build", "-t", "team/app:v1", "-t", "team/app:latest", "-t", "owner=me", "--build-arg", "A=1",
            "--build-arg", "A_VARIABLE", "--label", "l=v", "--target", "final", "--platform", "linux/amd64",
            "--secret", f"id=npm,src={project}/token", "--no-cache", "--pull", "--builder", "b", "--timeout", "60",
            "-m", "1GB", "--cache-from", "r/c", "--network", "none", str(project),
        )  # fmt: skip
    finally:
        del os.environ["A_VARIABLE"]
    sent = {name: value.decode() for name, value in server.world.builds.fields.items() if name != "source"}
    assert json.loads(sent.pop("secrets")) == [{"id": "npm", "value_base64": "c2VjcmV0IG9mIHRoZSBmaWxl"}]
    assert json.loads(sent.pop("build_args")) == {"A": "1", "A_VARIABLE": "from here"}
    assert sent == {
        "image_name": "team/app:v1", "image_names": '["team/app:latest"]', "tags": '{"owner":"me"}',
        "labels": '{"l":"v"}', "target": "final", "platform": "linux/amd64", "no_cache": "true", "pull": "true",
        "builder_id": "b", "timeout_seconds": "60", "memory_mb": "1024", "cache_from": '["type=registry,ref=r/c"]',
        "network": "isolated", "dockerfile_path": "Dockerfile",
    }  # fmt: skip
    files = context_of(server)
    assert files.keys() - {"docker", "src", "src/deep"} == {
        "Dockerfile", ".dockerignore", "app.py", "keep.log", "src/deep/b.log", "docker/other.Dockerfile", "token",
    }  # fmt: skip
    assert "#1 FROM scratch" in result.stderr
    assert result.exit_code == 1 and "queued" in result.stderr, "the fake's build never ends"


def test_the_builder_of_the_environment(
    server: Running, cli: Any, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPEMAN_BUILDER", "mine")
    cli("build", str(project))
    assert server.world.builds.fields["builder_id"] == b"mine"
    cli("build", "--builder", "other", str(project))
    assert server.world.builds.fields["builder_id"] == b"other"


def test_a_ready_build_prints_its_image(server: Running, cli: Any, project: Path) -> None:
    server.world.builds.outcome = {"image_ref": "docker.io/team/app:v1", "image_digest": "sha256:abc"}
    assert cli("build", str(project)).stdout == "docker.io/team/app:v1\n"
    assert cli("build", "-q", str(project)).stdout == "sha256:abc\n"
    made = json.loads(cli("-o", "json", "build", "-q", str(project)).stdout)
    assert made["status"] == "ready"
    detached = cli("build", "-d", str(project)).stdout.strip()
    assert detached in server.world.builds.builds
    for progress in ("tty", "plain", "rawjson"):
        assert cli("build", "--progress", progress, str(project)).exit_code == 0


def test_dockerfiles_from_elsewhere(server: Running, cli: Any, project: Path, tmp_path: Path) -> None:
    (tmp_path / "else").write_text("FROM scratch AS elsewhere\n")
    cli("build", "-f", str(tmp_path / "else"), str(project))
    assert server.world.builds.fields["dockerfile"] == b"FROM scratch AS elsewhere\n"
    cli("build", "-f", str(project / "docker/other.Dockerfile"), str(project))
    assert server.world.builds.fields["dockerfile_path"] == b"docker/other.Dockerfile"
    cli("build", "-", input="FROM scratch AS piped\n")
    assert server.world.builds.fields["dockerfile"] == b"FROM scratch AS piped\n" and context_of(server) == {}
    cli("build", "-f", "-", str(project), input="FROM scratch AS beside\n")
    assert server.world.builds.fields["dockerfile"] == b"FROM scratch AS beside\n" and "app.py" in context_of(server)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(project / "app.py", "whole.py")
    for data in (gzip.compress(archive.getvalue()), archive.getvalue()):
        server.world.builds.fields.clear()
        cli("build", "-", input=data)
        assert context_of(server) == {"whole.py": b"print()"} and "dockerfile" not in server.world.builds.fields


def test_logins_of_the_registries_that_a_build_asks_are_sent(
    server: Running, cli: Any, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docker build does; those of other registries stay here."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    hub = "https://index.docker.io/v1/"
    names = [hub, "quay.io", "ghcr.io", "caches.example.com", "front.example.com", "other.example.com"]
    kept = {name: {"auth": base64.b64encode(f"me:{name}".encode()).decode()} for name in names}
    (tmp_path / "config.json").write_text(json.dumps({"auths": kept}))

    def sent(*arguments: str) -> set[str]:
        cli("build", *arguments, str(project))
        auths = json.loads(server.world.builds.fields.get("registry_auth", b'{"auths": {}}'))["auths"]
        assert all(kept[name] == entry for name, entry in auths.items())
        return set(auths)

    assert sent() == set(), "FROM scratch"
    text = (
        "# syntax=front.example.com/docker/frontend:1\nARG FROM=ghcr.io\nFROM $FROM/a/b\nCOPY --from=quay.io/a/b / /\n"
    )
    (project / "Dockerfile").write_text(text)
    assert sent() == {"front.example.com", "ghcr.io", "quay.io"}
    assert sent("--build-arg", "FROM=caches.example.com") == {"front.example.com", "caches.example.com", "quay.io"}
    (project / "Dockerfile").write_text("FROM alpine\n")
    assert sent("--cache-from", "caches.example.com/a", "--cache-to", "type=registry,mode=max,ref=ghcr.io/a") == {
        hub, "caches.example.com", "ghcr.io",
    }  # fmt: skip
    (tmp_path / "own.json").write_text('{"auths": {}}')
    assert sent("--registry-auth", str(tmp_path / "own.json")) == set()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "not a directory"),
        (["--secret", "src=x", "."], "must be id=ID"),
        (["--secret", "id=absent-secret", "."], "cannot be read"),
        (["--ssh", "default", "."], "agent cannot be forwarded"),
        (["--file", "absent", "."], "no Dockerfile"),
        (["--memory", "much", "."], "--memory"),
    ],
)
def test_refusals(server: Running, cli: Any, arguments: list[str], said: str) -> None:
    result = cli("build", *arguments)
    assert result.exit_code != 0 and said in result.stderr


def test_looking_at_builds_and_builders(server: Running, cli: Any, project: Path) -> None:
    assert cli("builder", "create", "--id", "b", "--disk-size", "3GB", "--name", "mine").stdout == "b\n"
    assert server.world.builds.builders["b"].disk_size_gb == 3
    assert "b" in cli("builder", "ls").stdout and cli("builders", "list", "-q").stdout == "b\n"
    assert json.loads(cli("-o", "json", "builder", "get", "b").stdout)["disk_size_gb"] == 3
    assert cli("builder", "prune", "b").stdout == "b\n"
    build = cli("build", "-d", str(project)).stdout.strip()
    assert build in cli("build", "ls").stdout
    assert cli("build", "logs", build).stdout == "#1 FROM scratch\n"
    assert cli("build", "cancel", build).stdout == f"{build}\n"
    assert server.world.builds.builds[build].status == "cancelled"
    assert cli("builder", "rm", "b").stdout == "b\n"
    assert cli("builder", "rm", "b").exit_code == 1


@pytest.mark.parametrize(
    ("pattern", "ignored", "kept"),
    [
        ("*.log", ["a.log"], ["d/a.log", "a.log.txt"]),
        ("**/*.log", ["a.log", "d/e/a.log"], ["a.txt"]),
        ("d", ["d", "d/x", "d/e/x"], ["e/d"]),
        ("/d/", ["d/x"], ["e/d/x"]),
        ("d/**", ["d/x", "d/e/x"], ["d"]),
        ("d/**/x", ["d/x", "d/a/b/x"], ["x"]),
        ("a?c", ["abc"], ["ac", "a/c"]),
        ("[a-c].txt", ["b.txt"], ["d.txt"]),
        (r"\*", ["*"], ["a"]),
        ("# no\n\nd", ["d"], ["# no"]),
        ("*\n!d\n!e/f", ["x", "e/g"], ["d", "d/x", "e/f"]),
    ],
)
def test_patterns(pattern: str, ignored: list[str], kept: list[str]) -> None:
    ignore = Ignore(pattern)
    assert [path for path in ignored if not ignore.ignores(path)] == []
    assert [path for path in kept if ignore.ignores(path)] == []
