"""``hypeman ui``: a link that opens the web UI once."""

from __future__ import annotations

import click

from hypeman.cli.session import Session, fail, reports


@click.command()
@click.option("--open", "launch", is_flag=True, help="Open it in the browser of this machine.")
@reports
def ui(session: Session, launch: bool) -> None:
    """Print a link that logs in to the web UI, once, within two minutes.

    Over the server's socket no token is needed. From another machine, forward the port first, as in
    `ssh -L 8080:localhost:8080 HOST`, and open the link there.
    """
    settings = session.client.settings
    made = session.client.post("/ui/links")
    # Over TCP, use the address that works from here; over the socket, the one that the server reports.
    url = made["url"] if settings.base_url.startswith("unix:") else settings.base_url + made["path"]
    if not url:
        fail("the server does not listen on TCP (port: 0), so a browser cannot reach it")
    session.show({"url": url, "expires_at": made["expires_at"]}, lambda: url)
    if launch:
        click.launch(url)
