"""Shell completion of names that only the server knows. A completion never prints, fails or waits for long."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import click

from hypeman.cli.client import Client

Complete = Callable[[click.Context, Any, str], list[str]]
_SECONDS = 1.0


def completes(path: str, *fields: str) -> Complete:
    """Completes with the ``fields`` of every row of a list."""

    def complete(context: click.Context, _parameter: Any, typed: str) -> list[str]:
        with contextlib.suppress(Exception):
            with contextlib.closing(_client(context)) as client:
                rows = client.call("GET", path, timeout=_SECONDS)
            found = {str(row[field]) for row in rows for field in fields if row.get(field)}
            return sorted(name for name in found if name.startswith(typed))
        return []

    return complete


complete_instance = completes("/instances", "name")
complete_image = completes("/images", "name")
complete_volume = completes("/volumes", "name", "id")
complete_snapshot = completes("/snapshots", "name", "id")
complete_ingress = completes("/ingresses", "name", "id")
complete_device = completes("/devices", "name", "id")


def complete_guest_path(context: click.Context, parameter: Any, typed: str) -> list[Any]:
    """``INSTANCE:/PATH`` and local paths, for ``cp``. Listing a guest's directory needs ``ls`` in the guest."""
    instance, colon, path = typed.partition(":")
    if not colon:
        names = [f"{name}:" for name in complete_instance(context, parameter, typed)]
        from click.shell_completion import CompletionItem

        return names or [CompletionItem(typed, type="file")]
    if not path.startswith("/"):
        return [f"{instance}:/"]
    directory = path.rpartition("/")[0] + "/"
    found: list[str] = []
    with contextlib.suppress(Exception), contextlib.closing(_client(context)) as client:
        found = _list(client, instance, directory)
    return [f"{instance}:{directory}{name}" for name in found if f"{directory}{name}".startswith(path)]


def _list(client: Client, instance: str, directory: str) -> list[str]:
    import msgspec

    from hypeman.cli.websocket import WebSocket
    from hypeman.urls import segment

    stream = WebSocket(client, f"/instances/{segment(instance)}/exec")
    try:
        stream.socket.settimeout(_SECONDS)
        stream.send(msgspec.json.encode({"command": ["ls", "-1Ap", directory], "timeout": 2}).decode())
        output = b""
        while not isinstance(message := stream.receive(), str | None):
            output += message
    finally:
        stream.close()
    return [name for name in output.decode(errors="replace").splitlines() if name]


def _client(context: click.Context) -> Client:
    from hypeman.cli.settings import load_settings

    return Client(load_settings(context.find_root().params.get("base_url")))
