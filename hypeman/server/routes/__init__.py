"""All operations of the API, one module per capability."""

from __future__ import annotations

from hypeman.server.api import Operation
from hypeman.server.routes import devices, docs, egress, host, images, instances, later, snapshots, volumes

OPERATIONS: tuple[Operation, ...] = tuple(
    operation
    for module in (host, images, instances, egress, snapshots, volumes, devices, later, docs)
    for operation in module.routes.operations
)
