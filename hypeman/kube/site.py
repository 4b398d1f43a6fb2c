"""The node, whom it talks to, and what its parts know of its pods."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Protocol

import msgspec

from hypeman.config import NodeConfig
from hypeman.instances.model.types import Instance
from hypeman.kube.api import ApiClient
from hypeman.kube.local import LocalServer
from hypeman.kube.types import Pod


class Served(msgspec.Struct, frozen=True):
    """A pod of this node, and its instance if there is one."""

    pod: Pod
    instance: Instance | None


class PodTable(Protocol):
    """What the kubelet's API needs to know about pods. Both answer from memory."""

    def find(self, namespace: str, name: str) -> Served | None: ...

    def all(self) -> tuple[Served, ...]: ...


class Site(msgspec.Struct, frozen=True):
    """The node, and whom it talks to."""

    name: str
    address: str
    """At which the cluster reaches this host; also ``hostIP`` of its pods."""
    port: int
    """Of the kubelet's API."""
    state_dir: Path
    api: ApiClient
    local: LocalServer


def node_name(settings: NodeConfig) -> str:
    return settings.name or socket.gethostname().lower()
