"""``backup create`` and ``backup restore``: run on the host itself, with or without a running server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from hypeman.cli.host import config_option
from hypeman.cli.session import Session, fail


@click.group("backup")
def backup() -> None:
    """Everything the host keeps, in one file: images, volumes, snapshots, instances without a VM."""


@backup.command("create")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@config_option
@click.pass_obj
def create_backup(session: Session, file: Path, config_file: Path | None) -> None:
    """Write a new FILE (.tar.zst). The server may run; instances with a VM are left out and listed.

    FILE holds the key that seals credentials and is as secret as they are. Settings are not in it: keep
    /etc/hypeman/config.yaml as well.
    """
    about = _run(config_file, lambda module, paths: module.create(paths, file.absolute()))
    if about["left_out"]:
        click.echo(f"left out, since they have a VM: {', '.join(about['left_out'])}", err=True)
        click.echo("  their snapshots are contained; put them into standby to have them too", err=True)
    session.show(about, lambda: f"{file}: {counted(about)}")


@backup.command("restore")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@config_option
@click.pass_obj
def restore_backup(session: Session, file: Path, config_file: Path | None) -> None:
    """Fill the empty data directory from FILE, before the server starts."""
    about = _run(config_file, lambda module, paths: module.restore(paths, file.absolute()))
    session.show(about, lambda: f"restored from {about['created_at']}: {counted(about)}")


def counted(about: dict[str, Any]) -> str:
    counts = {"instance": len(about["instances"])} | {
        kind: about[f"{kind}s"] for kind in ("image", "volume", "snapshot")
    }
    *first, last = [f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items()]
    return f"{', '.join(first)} and {last}"


def _run(config_file: Path | None, action: Callable[[Any, Any], Any]) -> dict[str, Any]:
    from hypeman.config import load_config
    from hypeman.errors import HypemanError

    try:
        config = load_config(config_file)
        from hypeman import backup as module

        return dict(msgspec.to_builtins(action(module, config.paths)))
    except HypemanError as error:
        fail(error.message)
