"""Effects on disks: the writable layers of an instance, as files in its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from hypeman.instances.machine.context import Context
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.steps import CopyDisks, CopyDisksAway, MakeDisks, StageDisks, SwapDisks, TakeDisks
from hypeman.units import parse_size

_DISKS = "*.raw"
"""Pattern for disks in an instance's, capture's or snapshot's directory."""


class TemplateNeeds(Protocol):
    async def make(self, path: Path, size: int, *, uid: int) -> None:
        """Create a formatted empty disk at ``path``."""
        ...


class Disks:
    def __init__(self, context: Context, templates: TemplateNeeds) -> None:
        self._context = context
        self._files = context.files
        self._paths = context.paths
        self._templates = templates

    async def make(self, step: MakeDisks) -> None:
        record = self._context.record(step.instance)
        uid = self._context.uid(record)
        await self._make_dirs(record)
        mine = self._paths.instance(step.instance)
        await self._templates.make(mine.overlay, record.spec.overlay_bytes, uid=uid)
        for volume in record.spec.volumes:
            if volume.overlay:
                size = parse_size(volume.overlay_size or "0")
                await self._templates.make(mine.volume_overlay(volume.volume_id), size, uid=uid)

    async def copy(self, step: CopyDisks) -> None:
        """The source must not be written to meanwhile."""
        record = self._context.record(step.instance)
        uid = self._context.uid(record)
        await self._make_dirs(record)
        root = self._paths.instance(step.instance).root
        await self._files.copy_all(Path(step.source), root, _DISKS, uid=uid, gid=uid)

    async def remove(self, step: MakeDisks | CopyDisks | TakeDisks) -> None:
        await self._files.remove(self._paths.instance(step.instance).root)

    async def take(self, step: TakeDisks) -> None:
        record = self._context.record(step.instance)
        uid = self._context.uid(record)
        await self._make_dirs(record)
        root = self._paths.instance(step.instance).root
        await self._files.move_all(Path(step.source), root, _DISKS, uid=uid, gid=uid)
        await self._files.remove(Path(step.source))

    async def remove_with_source(self, step: TakeDisks) -> None:
        await self.remove(step)
        await self._files.remove(Path(step.source))

    async def copy_away(self, step: CopyDisksAway) -> None:
        await self._files.make_dir(Path(step.target))
        await self._files.copy_all(self._paths.instance(step.instance).root, Path(step.target), _DISKS)

    async def remove_copy(self, step: CopyDisksAway) -> None:
        await self._files.remove(Path(step.target))

    async def stage(self, step: StageDisks) -> None:
        uid = self._context.uid(self._context.record(step.instance))
        staged = self._paths.instance(step.instance).staged
        await self._files.remove(staged)
        await self._files.make_dir(staged)
        await self._files.copy_all(Path(step.source), staged, _DISKS, uid=uid, gid=uid)

    async def unstage(self, step: StageDisks) -> None:
        await self._files.remove(self._paths.instance(step.instance).staged)

    async def swap(self, step: SwapDisks) -> None:
        """Replace each disk by one rename; after a crash, those already renamed are no longer staged."""
        mine = self._paths.instance(step.instance)
        await self._files.move_all(mine.staged, mine.root, _DISKS)
        await self._files.remove(mine.staged)

    async def _make_dirs(self, record: InstanceRecord) -> None:
        """Owned by root: a VMM gets descriptors of the files in them and cannot replace the files."""
        mine = self._paths.instance(record.id)
        await self._files.make_dir(mine.root, mode=0o711)
        await self._files.make_dir(mine.logs, mode=0o711)
