"""Life-cycle changes of all objects, as they happen."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

import click

from hypeman.cli.output import FORMATS, plain, render
from hypeman.cli.session import Session, fail, present, reports

_FILTERS = ("type", "instance", "tag")


@click.command()
@click.option("--since", help="A cursor (0: everything retained), a duration such as 10m, or an RFC 3339 time.")
@click.option(
    "--filter", "filters", multiple=True, metavar="KEY=VALUE",
    help="type=instance or type=image.failed, instance=NAME, tag=KEY=VALUE; all must match.",
)  # fmt: skip
@click.option("--follow/--no-follow", default=True, help="Continue with new events, or print the list and end.")
@click.option("-o", "--output", "form", type=click.Choice(FORMATS), help="As --format: json, jsonl, yaml, …")
@reports
def events(session: Session, since: str | None, filters: tuple[str, ...], follow: bool, form: str | None) -> None:
    """Show what changes: instances, images, volumes, snapshots, devices.

    Every line ends with a cursor; --since continues after it.
    """
    session.form = form or session.form
    query = _query(filters) | present(since=since)
    if not follow:
        found = session.client.get("/events", follow=False, limit=10_000, **query)
        session.show(found, lambda: "\n".join(_line(event) for event in found))
        return
    for event in session.client.events("/events", follow=True, **query):
        if "cursor" not in event:
            fail(event["message"])
        sys.stdout.write((_line(event) if session.form == "auto" else render(event, _streamed(session.form))) + "\n")
        sys.stdout.flush()


def _query(filters: tuple[str, ...]) -> dict[str, Any]:
    """Query fields for ``KEY=VALUE`` filters; several types are alternatives."""
    types: list[str] = []
    tags: dict[str, str] = {}
    query: dict[str, Any] = {}
    for text in filters:
        key, _, value = text.partition("=")
        name, tag_equals, tag_value = value.partition("=")
        if key not in _FILTERS or not value or (key == "tag" and not tag_equals):
            raise click.BadParameter(f"{text!r}: write type=…, instance=… or tag=KEY=VALUE", param_hint="--filter")
        if key == "type":
            types.append(value)
        elif key == "tag":
            tags[name] = tag_value
        else:
            query[key] = value
    return query | present(type=",".join(types), tags=tags)


def _streamed(form: str) -> str:
    """One object a line in every JSON form, since the stream has no end."""
    return "jsonl" if form in ("json", "pretty", "explore") else form


def _line(event: dict[str, Any]) -> str:
    """Time, type, object, details, actor, cursor."""
    time = datetime.fromisoformat(event["time"]).astimezone().strftime("%Y-%m-%dT%H:%M:%S")
    about = event["object"]
    named = about.get("name")
    parts = [time, event["type"], about["id"] if named in (None, about["id"]) else f"{named} ({about['id']})"]
    details = {key: value for key, value in event.get("data", {}).items() if key != "digest"}
    if "instance_id" in event:
        details["instance"] = event["instance_id"]
    if "actor" in event:
        details["by"] = event["actor"]["subject"]
    parts += [f"{key}={value}" for key, value in details.items()]
    return plain(" ".join([*parts, f"#{event['cursor']}"]))
