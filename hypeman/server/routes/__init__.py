"""All operations of the API, one module per capability."""

from __future__ import annotations

from hypeman.server.api import Operation
from hypeman.server.routes import (
    builds,
    devices,
    egress,
    events,
    host,
    images,
    ingresses,
    instances,
    policies,
    pushes,
    snapshots,
    traces,
    usage,
    volumes,
)
from hypeman.server.routes.docs import docs_routes

_DESCRIBED: tuple[Operation, ...] = tuple(
    operation
    for module in (
        host,
        images,
        instances,
        egress,
        snapshots,
        policies,
        volumes,
        devices,
        ingresses,
        events,
        traces,
        usage,
        pushes,
        builds,
    )
    for operation in module.routes.operations
)

OPERATIONS: tuple[Operation, ...] = (*_DESCRIBED, *docs_routes(_DESCRIBED).operations)
