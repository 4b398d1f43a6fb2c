"""Fixtures for made-up trees."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypeman.devices.service import Devices
from hypeman.store import Store
from tests.devices.machine import Machine
from tests.devices.trees import Tree


@pytest.fixture
def tree_root() -> Iterator[Path]:
    """In memory where there is some: a tree has thousands of files, and pytest keeps its own for three runs."""
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as root:
        yield Path(root)


@pytest.fixture
def tree(tree_root: Path) -> Tree:
    return Tree(tree_root)


@pytest.fixture
def machine(tree_root: Path) -> Machine:
    return Machine(tree_root)


@pytest.fixture
async def devices(machine: Machine, store: Store) -> Devices:
    """The service on the made-up machine, having looked at it once."""
    service = machine.service(store)
    await service.prepare()
    return service
