"""What the queue needs of the machine in which builds run: a Protocol, and the data that goes there and back. ``vm.py``
implements it; the tests of the queue have a fake."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import msgspec

from hypeman.builds.request import Borrowed, BuildSpec
from hypeman.builds.types import Builder, BuildProvenance


class BuildFailed(Exception):
    """The build did not succeed; the message is for its caller."""


class Job(msgspec.Struct, frozen=True):
    """One attempt of a build."""

    build_id: str
    spec: BuildSpec
    images: tuple[str, ...]
    """Normalised names, at least one."""
    directory: Path
    """With the context and, if it was sent, the Dockerfile."""
    borrowed: Borrowed
    secrets: dict[str, bytes]
    """By id: the caller's and the server's own."""
    builder: Builder | None
    """Whose cache it uses."""
    source_hash: str

    @property
    def source(self) -> Path:
        return self.directory / SOURCE

    @property
    def dockerfile(self) -> Path:
        return self.directory / DOCKERFILE

    def __repr__(self) -> str:
        return f"Job({self.build_id})"  # the secrets stay out of logs


SOURCE = "source.tar.gz"
DOCKERFILE = "Dockerfile"
JOURNAL = "events.jsonl"


class Result(msgspec.Struct, frozen=True):
    """An image that is ready."""

    digest: str
    ref: str
    """Normalised name."""
    provenance: BuildProvenance


class Report(Protocol):
    """Where an attempt reports what happens."""

    def log(self, text: str) -> None: ...
    def progress(self, line: bytes) -> None:
        """A status update of BuildKit, as JSON."""
        ...

    async def vm(self, instance_id: str) -> None:
        """The VM exists."""
        ...

    async def pushing(self) -> None:
        """The steps are done, the result is being stored."""
        ...

    def publishing(self) -> None:
        """From here on the image appears: the build can no longer be cancelled."""
        ...


class Worker(Protocol):
    async def build(self, job: Job, report: Report) -> Result:
        """Build and store the image. Cancelled at a time limit or by its caller. Raises BuildFailed, HypemanError."""
        ...

    async def clean(self, build_id: str) -> None:
        """Remove what the attempt left, except the builder's cache. Idempotent."""
        ...

    async def clean_all(self, builders: Collection[str]) -> None:
        """Remove what attempts of an earlier server left, and caches of builders that are not among ``builders``."""
        ...

    async def make_cache(self, builder: Builder) -> None:
        """An empty cache, unless there is one. Raises InsufficientResources."""
        ...

    async def remove_cache(self, builder_id: str) -> None:
        """Idempotent. Raises Conflict while a VM uses it."""
        ...
