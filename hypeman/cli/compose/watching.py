"""What ``compose watch`` does when files change: the rules of ``develop.watch`` of the Compose specification. Pure, but
for ``scan``, which reads directories.

    before ──scan──► after        changed(before, after)  = files that are new, other or gone
                                  plan(rules, changes)    = one Job for each service: rebuild, or sync, exec and restart
"""

from __future__ import annotations

import enum
import os
import posixpath
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from hypeman.cli.context import Ignore, entries

ALWAYS_IGNORED = ".git\n**/.git\n**/.*.sw?\n**/*~\n**/.#*\n**/4913\n"
"""What is never watched: the history, and what editors write for a moment."""

Signature = tuple[int, int, int]
"""By which a change is noticed: time (ns), size, mode."""
Scan = Mapping[str, Signature]
"""Files by their path below the rule's; ``.`` is the path itself if it is a file."""


class Action(enum.StrEnum):
    REBUILD = "rebuild"
    RESTART = "restart"
    SYNC = "sync"
    SYNC_RESTART = "sync+restart"
    SYNC_EXEC = "sync+exec"

    @property
    def syncs(self) -> bool:
        return self in (Action.SYNC, Action.SYNC_RESTART, Action.SYNC_EXEC)


class Rule(Struct, frozen=True):
    service: str
    action: Action
    path: Path
    target: str = ""
    """In the guest; with an action that syncs."""
    ignore: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    """Patterns as in ``.dockerignore``; none: everything."""
    command: tuple[str, ...] = ()
    """Of ``sync+exec``."""
    initial_sync: bool = False

    def target_of(self, name: str) -> str:
        return self.target if name == "." else posixpath.join(self.target, name)


class Job(Struct, frozen=True):
    """What one service needs. A rebuild makes everything else needless: the new instance has the new files."""

    service: str
    rebuild: bool = False
    written: tuple[tuple[Path, str], ...] = ()
    """File here, path in the guest."""
    removed: tuple[str, ...] = ()
    """Paths in the guest."""
    commands: tuple[tuple[str, ...], ...] = ()
    restart: bool = False


def scan(rule: Rule, ignored: str = "") -> Scan:
    """The files of a rule now; none if its path does not exist. ``ignored``: text of the context's ignore file."""
    if not rule.path.is_dir():
        return _signature(rule.path, ".")
    leave_out = Ignore(ALWAYS_IGNORED + ignored + "\n".join(rule.ignore))
    wanted = Ignore("\n".join(rule.include)) if rule.include else None
    found: dict[str, Signature] = {}
    for name in entries(rule.path, leave_out):
        if wanted is None or wanted.ignores(name):
            found.update(_signature(rule.path / name, name))
    return found


def _signature(path: Path, name: str) -> dict[str, Signature]:
    try:
        about = os.lstat(path)
    except OSError:  # it has gone meanwhile
        return {}
    if stat.S_ISDIR(about.st_mode):
        return {}
    return {name: (about.st_mtime_ns, about.st_size, about.st_mode)}


def changed(before: Scan, after: Scan) -> tuple[list[str], list[str]]:
    """Names that are new or other, and names that are gone."""
    written = sorted(name for name, signature in after.items() if before.get(name) != signature)
    return written, sorted(before.keys() - after.keys())


def plan(changes: Sequence[tuple[Rule, Sequence[str], Sequence[str]]]) -> list[Job]:
    """One job for each service of which files changed: (rule, written, removed)."""
    jobs: dict[str, Job] = {}
    for rule, written, removed in changes:
        if not written and not removed:
            continue
        job = jobs.get(rule.service, Job(rule.service))
        commands = (rule.command,) if rule.action is Action.SYNC_EXEC else ()
        jobs[rule.service] = Job(
            rule.service,
            rebuild=job.rebuild or rule.action is Action.REBUILD,
            written=(*job.written, *(_pair(rule, name) for name in written if rule.action.syncs)),
            removed=(*job.removed, *(rule.target_of(name) for name in removed if rule.action.syncs)),
            commands=(*job.commands, *commands),
            restart=job.restart or rule.action in (Action.RESTART, Action.SYNC_RESTART),
        )
    return [Job(job.service, rebuild=True) if job.rebuild else job for job in jobs.values()]


def _pair(rule: Rule, name: str) -> tuple[Path, str]:
    return (rule.path if name == "." else rule.path / name), rule.target_of(name)
