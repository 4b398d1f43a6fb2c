"""``hypeman node``: this host as a node of a Kubernetes cluster, and what the cluster needs for it. Runs on the host,
without its server (but for the node itself).
"""

from __future__ import annotations

import os
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import msgspec

from hypeman.cli.host import config_option, failure_messages
from hypeman.cli.session import fail

_TOKEN_LIFE = timedelta(hours=24)


@click.group(invoke_without_command=True)
@config_option
@click.pass_context
def node(context: click.Context, config_file: Path | None) -> None:
    """Make this host a node of a Kubernetes cluster, next to its server.

    Without a command: run the node. See docs/kubernetes.md.
    """
    context.obj = config_file
    if context.invoked_subcommand is not None:
        return
    from hypeman.config import load_config
    from hypeman.errors import HypemanError

    messages: list[str] = []
    try:
        config = load_config(config_file)
        from hypeman.kube.node import main

        main(config)
    except* HypemanError as failures:
        messages = failure_messages(failures)
    if messages:
        fail("; ".join(messages))


@node.command()
def manifest() -> None:
    """Print what a cluster needs once, for `kubectl apply -f -`."""
    from hypeman.kube import manifest as objects

    click.echo(objects.render(objects.of_cluster()), nl=False)


@node.command()
@click.option("--server", required=True, metavar="URL", help="Of the cluster's API server.")
@click.option(
    "--ca-file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The cluster's CA certificates, PEM.",
)
@click.pass_obj
def join(config_file: Path | None, server: str, ca_file: Path) -> None:
    """Prepare this host to join a cluster.

    Writes the bootstrap kubeconfig of the configuration, with a new token that is valid for a day, and prints what the
    cluster needs for it, for `kubectl apply -f -`.
    """
    from hypeman.config import load_config
    from hypeman.errors import HypemanError
    from hypeman.kube import manifest as objects
    from hypeman.kube.site import node_name

    try:
        settings = load_config(config_file).node
    except HypemanError as error:
        fail(error.message)
    if not settings.bootstrap_kubeconfig:
        fail("node.bootstrap_kubeconfig is empty in the configuration")
    if Path(settings.kubeconfig).exists():
        fail(f"{settings.kubeconfig} exists and would be used; remove it to join by a token")
    token_id, secret = _token_part(6), _token_part(16)
    kubeconfig = objects.bootstrap_kubeconfig(server, ca_file.read_bytes(), f"{token_id}.{secret}")
    descriptor = os.open(settings.bootstrap_kubeconfig, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)
        file.write(msgspec.json.format(msgspec.json.encode(kubeconfig)).decode() + "\n")
    expires = datetime.now(UTC) + _TOKEN_LIFE
    found = [
        *objects.of_cluster(),
        *objects.of_node(node_name(settings)),
        *objects.of_token(token_id, secret, expires),
    ]
    click.echo(objects.render(found), nl=False)


def _token_part(length: int) -> str:
    """Lower-case letters and digits; never a number to kubectl's YAML parser, to which ``1e2345`` is one."""
    return "t" + secrets.token_hex(length // 2)[1:]
