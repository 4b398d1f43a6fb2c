"""What Debian's buildah makes of a Dockerfile, to compare a build's image with: its files and its configuration.

Differences by design, which are left out (the README of hypeman/builds has them): times of files; the mode of the root
directory; mount points that buildah's RUN leaves; its label; a working directory that is not set. Debian's buildah is
older than heredocs and `COPY --link`; a case that uses them says the same in older words.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tests.images.conftest import need
from tests.images.trees import Described, describe, difference

Files = Mapping[str, bytes | str | Path]
COMPARED = ("Env", "Cmd", "Entrypoint", "User", "Healthcheck", "OnBuild", "ExposedPorts", "Volumes", "WorkingDir",
            "Labels", "StopSignal")  # fmt: skip
MOUNT_POINTS = (b"etc/hostname", b"etc/hosts", b"etc/resolv.conf", b"etc", b"run")
LABEL = "io.buildah.version"


class Buildah:
    """Images in ``directory``."""

    def __init__(self, directory: Path) -> None:
        need("buildah")
        self._directory = directory

    def _run(self, *arguments: str) -> str:
        storage = (
            "--storage-driver",
            "vfs",
            "--root",
            f"{self._directory}/root",
            "--runroot",
            f"{self._directory}/run",
        )
        result = subprocess.run(["buildah", *storage, *arguments], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def build(self, name: str, files: Files, fields: Mapping[str, Any]) -> None:
        """Make the image ``name`` of a context and the fields of a build request."""
        context = self._directory / "contexts" / name
        for path, content in files.items():
            target = context / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.encode() if isinstance(content, str) else _bytes_of(content))
            target.chmod(content.stat().st_mode & 0o7777 if isinstance(content, Path) else 0o644)
        options = [f"--build-arg={key}={value}" for key, value in fields.get("build_args", {}).items()]
        options += [f"--label={key}={value}" for key, value in fields.get("labels", {}).items()]
        options += [f"--target={fields['target']}"] if "target" in fields else []
        self._run(
            "bud", "--isolation=chroot", "--format=docker", "--pull-never", *options, f"--tag={name}", str(context)
        )

    def tree(self, name: str) -> Described:
        container = self._run("from", "--pull-never", name)
        tree = describe(Path(self._run("mount", container)))
        self._run("rm", container)
        return tree

    def config(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._run("inspect", "--type=image", name))["Docker"]["config"]
        return found


def compare(
    ours: tuple[Described, Mapping[str, Any]],
    theirs: tuple[Described, Mapping[str, Any]],
    differs: Collection[bytes] = (),
) -> list[str]:
    """What differs, as lines for a person; ``differs``: paths that are expected to."""
    mine, its = dict(ours[0]), dict(theirs[0])
    for path in (b"", *differs):
        mine.pop(path, None)
        its.pop(path, None)
    for path in MOUNT_POINTS:
        if path not in mine:
            its.pop(path, None)
    lines = difference(_without_times(mine), _without_times(its))
    have, want = _compared(ours[1]), _compared(theirs[1])
    return lines + [f"{key}: {have[key]} instead of {want[key]}" for key in COMPARED if have[key] != want[key]]


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: config.get(key) or None for key in COMPARED}
    found["WorkingDir"] = found["WorkingDir"] or "/"
    found["Labels"] = {key: value for key, value in (found["Labels"] or {}).items() if key != LABEL}
    return found


def _without_times(tree: Described) -> Described:
    return {path: (*fields[:3], *fields[4:]) for path, fields in tree.items()}


def _bytes_of(content: bytes | Path) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content
