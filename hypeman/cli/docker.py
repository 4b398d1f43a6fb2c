"""Commands that people know from Docker: short forms of what other commands do.

Each asks the same API as the rest of the command line; nothing here is a second way of doing something on the server.
"""

from __future__ import annotations

from typing import Any

import click

from hypeman import __version__
from hypeman.cli.complete import complete_instance
from hypeman.cli.images import delete_image, tag_image
from hypeman.cli.instances import instance_argument, path_of, restart_instance, show_instance
from hypeman.cli.output import render_table, size, use_colour
from hypeman.cli.prune import delete_after_question, stopped_instances, unattached_volumes, unused_images
from hypeman.cli.session import (
    Session,
    another_name,
    complain,
    fail,
    format_option,
    interrupted,
    present,
    reports,
    templated,
    write_log,
)

_BY_SIGNAL = 128


@click.command()
@click.argument("instances", nargs=-1, required=True, shell_complete=complete_instance)
@click.option("-t", "--time", "grace", type=click.IntRange(0), help="Seconds until it is killed. Default: 10.")
@reports
def restart(session: Session, instances: tuple[str, ...], grace: int | None) -> None:
    """Shut instances down and boot them again."""

    def one(name: str) -> None:
        show_instance(session, restart_instance(session.client, name, grace))

    session.each(instances, one)


@click.command()
@click.argument("instances", nargs=-1, required=True, shell_complete=complete_instance)
@click.option("-s", "--signal", default="KILL", show_default=True, help="As in HUP, SIGTERM or 15.")
@reports
def kill(session: Session, instances: tuple[str, ...], signal: str) -> None:
    """Send a signal to the programs of instances, through the shell of their images; KILL to all processes."""
    from hypeman.cli.execute import capture

    name = signal.upper().removeprefix("SIG")
    if not name.isalnum():
        raise click.BadParameter(f"{signal!r} is not a signal", param_hint="--signal")

    def one(instance: str) -> None:
        # In a guest, what is sent to process 1 is passed on to the program; it cannot be killed.
        target = "-1" if name in ("KILL", "9") else "1"
        code, output = capture(session, instance, ("sh", "-c", f"kill -{name} {target}"))
        if code and code < _BY_SIGNAL:  # the shell itself may be killed as the VM ends
            fail(f"{instance}: {output.strip() or f'kill ended with {code}'}", f"hypeman stop {instance} shuts it down")
        click.echo(instance)

    session.each(instances, one)


@click.command(context_settings={"ignore_unknown_options": True})
@instance_argument
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@reports
def top(session: Session, instance: str, arguments: tuple[str, ...]) -> None:
    """Show the processes of an instance, as its own `ps` lists them."""
    from hypeman.cli.execute import run_program

    code = run_program(session, instance, ("ps", *(arguments or ("-ef",))), tty=False, stdin=False)
    if code == 127:
        complain(f"the image of {instance} has no ps", f"hypeman stats {instance} shows what the VM uses")
    raise SystemExit(code)


@click.command()
@instance_argument
@click.option("--no-stdin", is_flag=True, hidden=True)
@click.option("--sig-proxy", hidden=True)
@reports
def attach(session: Session, instance: str, no_stdin: bool, sig_proxy: str | None) -> None:
    """Come back to the program of `run -it` or `run -i`, or follow the output of another instance's program.

    Ctrl-P Ctrl-Q leaves it running. For a terminal in an instance use `exec -it`.
    """
    from hypeman.cli.execute import Left, attach_to_main, leave_keys

    with interrupted(f"{instance} continues"):
        try:
            code = None if no_stdin else attach_to_main(session, instance)
            if code is not None:
                raise SystemExit(code)
            with leave_keys():
                for line, ends in session.client.followed_lines(f"{path_of(instance)}/logs", tail=0, source="app"):
                    write_log(line, ends)
        except Left:
            click.echo(f"\r\n{instance} continues", err=True)


@click.command()
@instance_argument
@click.argument("name", required=False)
@click.option("-a", "--author", hidden=True)
@click.option("-m", "--message", hidden=True)
@click.option("-p", "--pause", hidden=True, is_flag=True)
@reports
def commit(
    session: Session, instance: str, name: str | None, author: str | None, message: str | None, pause: bool
) -> None:
    """Take a snapshot of an instance, with its memory if it runs; fork or restore it with `hypeman snapshot`."""
    state = session.client.get(path_of(instance))["state"]
    body = present(kind="Stopped" if state == "Stopped" else "Standby", name=name)
    made = session.client.post(f"{path_of(instance)}/snapshots", body)
    session.show(made, lambda: str(made["id"]))


@click.command()
@format_option
@reports
@templated("info")
def info(session: Session) -> None:
    """Show the server, its host and how many of everything it has."""
    client = session.client
    lists = {kind: client.get(f"/{kind}") for kind in ("instances", "images", "volumes", "snapshots")}
    found: dict[str, Any] = {
        "capabilities": client.get("/capabilities"),
        "resources": client.get("/resources"),
        "counts": {kind: len(rows) for kind, rows in lists.items()},
        "server": client.settings.base_url,
    }
    if session.template is not None:
        found["instances"] = lists["instances"]
    session.show(found, lambda: _info_text(found))


def _info_text(found: dict[str, Any]) -> str:
    resources = found["resources"]
    rows = [
        ("server", found["server"]),
        *((kind, str(count)) for kind, count in found["counts"].items()),
        ("CPUs", str(resources["cpu"]["capacity"])),
        ("memory", f"{size(resources['memory']['allocated'])} of {size(resources['memory']['capacity'])} allocated"),
        ("disk", f"{size(resources['disk']['allocated'])} of {size(resources['disk']['capacity'])} allocated"),
    ]
    return render_table(rows, [("", lambda row: row[0]), ("", lambda row: row[1])]).lstrip("\n- ")


@click.group()
def system() -> None:
    """Disk usage, and removal of what is not in use."""


@system.command()
@reports
def df(session: Session) -> None:
    """Show what takes disk space."""
    found = session.client.get("/resources").get("disk_breakdown") or {}
    names = {
        "images": "images_bytes",
        "cache": "oci_cache_bytes",
        "volumes": "volumes_bytes",
        "disks": "overlays_bytes",
    }
    rows = [(name, found[key]) for name, key in names.items() if key in found]
    columns = [("TYPE", lambda row: row[0]), ("SIZE", lambda row: size(row[1]))]
    session.show(found, lambda: render_table(rows, columns, colour=use_colour()))


@system.command()
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option("-a", "--all", "everything", is_flag=True, help="Also images that no instance uses.")
@click.option("--volumes", is_flag=True, help="Also volumes that are not attached.")
@reports
def prune(session: Session, force: bool, everything: bool, volumes: bool) -> None:
    """Delete stopped instances, and on request unused images and volumes. Instances in standby are kept."""
    instances = session.client.get("/instances")
    targets = stopped_instances(instances)
    if everything:
        targets += unused_images(session.client, [row for row in instances if row["state"] != "Stopped"])
    if volumes:
        targets += unattached_volumes(session.client)
    raise SystemExit(delete_after_question(session, targets, force=force))


@click.command(hidden=True)
@format_option
@reports
@templated("versions")
def version(session: Session) -> None:
    """Show the version, as --version does."""
    if session.template is not None:
        session.show(lambda: session.client.get("/capabilities"))
    else:
        click.echo(f"hypeman, version {__version__}")


@click.command("help", hidden=True)
@click.argument("names", nargs=-1, metavar="[COMMAND]...")
@click.pass_context
def show_help(context: click.Context, names: tuple[str, ...]) -> None:
    """Show the help of a command, as COMMAND --help does."""
    context.find_root().command.main([*names, "--help"], prog_name="hypeman")


rmi = another_name(delete_image, "rmi")
tag = another_name(tag_image, "tag")
