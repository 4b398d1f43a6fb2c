"""What has to be done so that the server has what the file says. Pure."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from hypeman.cli.compose.model import COPY, HASH_TAG, RESOURCE_TAG, ComposeError, Stack, Volume, fingerprint
from hypeman.ids import SERVICE_TAG


class Act(enum.StrEnum):
    CREATE = "create"
    REPLACE = "replace"
    START = "start"
    KEEP = "keep"
    DELETE = "delete"


class Action(Struct, frozen=True):
    act: Act
    kind: str
    """``volume``, ``instance`` or ``ingress``."""
    name: str
    key: str = ""
    """Of the service or volume in the file."""
    why: str = ""

    def __str__(self) -> str:
        return f"{self.act:<8} {self.kind:<9} {self.name}" + (f"  ({self.why})" if self.why else "")


class Found(Struct, frozen=True):
    """What the server has of the stack, by its tags."""

    instances: Sequence[dict[str, Any]] = ()
    volumes: Sequence[dict[str, Any]] = ()
    ingresses: Sequence[dict[str, Any]] = ()


def plan_up(stack: Stack, found: Found, *, replace: bool = False, remove_orphans: bool = False) -> list[Action]:
    """In the order in which they are carried out. Raises ComposeError where something would have to be replaced that
    may not be."""
    actions = [_volume(volume, found) for volume in stack.volumes if not volume.external]
    instances = {row["name"]: row for row in found.instances}
    ingresses = {row["name"]: row for row in found.ingresses}
    gone = [
        row
        for row in found.ingresses
        if row["name"] not in {ingress.name for s in stack.services for ingress in s.ingresses}
    ]
    orphans = [row for row in found.instances if row["name"] not in {service.name for service in stack.services}]
    if remove_orphans or replace:
        actions += [Action(Act.DELETE, "ingress", row["name"], why="not in the file") for row in gone]
        actions += [Action(Act.DELETE, "instance", row["name"], why="not in the file") for row in orphans]
    else:
        actions += [
            Action(Act.KEEP, "instance", row["name"], why="not in the file: --remove-orphans") for row in orphans
        ]
    for service in stack.ordered():
        wanted = fingerprint(service.content)
        actions.append(_instance(service.key, service.name, wanted, instances.get(service.name), replace))
    for service in stack.services:
        for ingress in service.ingresses:
            row = ingresses.get(ingress.name)
            same = row is not None and (row.get("tags") or {}).get(HASH_TAG) == fingerprint(ingress.body)
            act = Act.CREATE if row is None else Act.KEEP if same else Act.REPLACE
            actions.append(Action(act, "ingress", ingress.name, service.key))
    return actions + (_old_copies(stack, found) if replace else [])


def _volume(volume: Volume, found: Found) -> Action:
    row = next((row for row in found.volumes if row["name"] == volume.name), None)
    if row is None:
        why = f"a copy of {volume.copied}" if volume.copied else f"{volume.size_gb}GB"
        return Action(Act.CREATE, "volume", volume.name, volume.key, why)
    if row["size_gb"] != volume.size_gb and not volume.copied:
        raise ComposeError(
            f"volumes.{volume.key}: {volume.name} has {row['size_gb']}GB; the size of a volume does not change"
        )
    return Action(Act.KEEP, "volume", volume.name, volume.key)


def _old_copies(stack: Stack, found: Found) -> list[Action]:
    """Read-only copies of directories whose content was another one."""
    wanted = {volume.name for volume in stack.volumes}
    return [
        Action(Act.DELETE, "volume", row["name"], why="an older copy")
        for row in found.volumes
        if (row.get("tags") or {}).get(RESOURCE_TAG) == COPY and row["name"] not in wanted
    ]


def _instance(key: str, name: str, wanted: str, row: dict[str, Any] | None, replace: bool) -> Action:
    if row is None:
        return Action(Act.CREATE, "instance", name, key)
    if (row.get("tags") or {}).get(HASH_TAG) != wanted:
        if not replace:
            raise ComposeError(f"services.{key} has changed; --replace deletes {name} and creates it again")
        return Action(Act.REPLACE, "instance", name, key, "changed")
    if row["state"] in ("Stopped", "Standby"):
        return Action(Act.START, "instance", name, key, f"is {row['state']}")
    return Action(Act.KEEP, "instance", name, key)


def plan_down(found: Found, *, volumes: bool = False) -> list[Action]:
    """Everything of the stack; volumes only on request."""
    actions = [Action(Act.DELETE, "ingress", row["name"]) for row in found.ingresses]
    actions += [
        Action(Act.DELETE, "instance", row["name"], (row.get("tags") or {}).get(SERVICE_TAG, ""))
        for row in reversed(found.instances)
    ]
    if volumes:
        actions += [Action(Act.DELETE, "volume", row["name"]) for row in found.volumes]
    return actions
