"""The dashboard and the alert rules of the package ask for metrics and labels that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import yaml
from prometheus_client import Histogram, ProcessCollector

from hypeman.builds import metrics as builds
from hypeman.egress import metrics as egress
from hypeman.images import metrics as images
from hypeman.ingress import metrics as ingress
from hypeman.instances import metrics as instances
from hypeman.instances.model.types import InstanceUsage, UsageOfAll
from hypeman.network import metrics as network
from hypeman.policies import metrics as policies
from hypeman.resources import metrics as resources
from hypeman.telemetry import metrics
from hypeman.volumes import metrics as volumes

FOLDER = Path(__file__).parents[2] / "packaging" / "monitoring"
OF_PROMETHEUS = {"instance", "job"}
"""Labels that every series gets when it is scraped."""
_NAME = re.compile(r"\b(hypeman_\w+|process_\w+)\b(?:\{([^}]*)\})?")
_BY = re.compile(r"\bby \(([^)]*)\)")


def dashboard_queries() -> list[str]:
    board = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    variables = [one["definition"] for one in board["templating"]["list"] if "definition" in one]
    return variables + [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


def rules() -> list[dict[str, str]]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


QUERIES = [*dashboard_queries(), *(rule["expr"] for rule in rules())]


@pytest.fixture(scope="module")
def known() -> Iterator[dict[str, set[str]]]:
    """The labels of each series that a server has."""
    before, refreshers = dict(metrics._asked.questions), dict(metrics._refreshers)
    for module in (builds, egress, images, ingress, network, policies, resources, volumes):
        module.register(MagicMock())
    instances.register(MagicMock(), 10)
    found = {name: set(labels) for name, (_, _, labels, _) in metrics._asked.questions.items()}
    for name, collector in metrics.REGISTRY._names_to_collectors.items():
        labels = set(getattr(collector, "_labelnames", ()))
        found[name] = labels | {"le"} if isinstance(collector, Histogram) and name.endswith("_bucket") else labels
    found |= {sample.name: set() for family in ProcessCollector(registry=None).collect() for sample in family.samples}
    yield found
    metrics._asked.questions, metrics._refreshers = before, refreshers


def series_of(query: str) -> Iterator[tuple[str, set[str]]]:
    """Each series in ``query`` and the labels by which it is chosen."""
    for name, chosen in _NAME.findall(query):
        yield name, {part.split("=")[0].rstrip("!~ ") for part in re.split(r",(?=\w+[=!])", chosen) if part}


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_finds_what_it_asks_for(known: dict[str, set[str]], query: str) -> None:
    asked = list(series_of(query)) or [("", set[str]())]
    labels = {label for name, _ in asked for label in known.get(name, ())} | OF_PROMETHEUS
    for name, chosen in asked:
        if name:
            assert name in known
            assert chosen <= known[name] | OF_PROMETHEUS
    for grouped in _BY.findall(query):
        assert set(grouped.replace(" ", "").split(",")) <= labels


def test_the_dashboard_is_one_that_grafana_draws_as_it_is() -> None:
    """Its schema is of a Grafana that knows rows as panels; every query names its source and has a letter of its own;
    panels have places of their own."""
    board = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    assert 36 <= board["schemaVersion"] <= 41, "uids of data sources (9.1) and panels (not yet the elements of 12)"
    assert "id" not in board, "the number of a dashboard belongs to the Grafana that it came from"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    variables = {one["name"] for one in board["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)\}?", json.dumps(board))) - {"__all"} <= variables
    cells: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for cell in ((x, y) for x in range(place["w"]) for y in range(place["h"])):
            at = (place["x"] + cell[0], place["y"] + cell[1])
            assert cells.setdefault(at, panel["title"]) == panel["title"]
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            names = [target["refId"] for target in panel["targets"]]
            assert names and len(set(names)) == len(names), panel["title"]


def test_texts_name_labels_that_the_alert_has(known: dict[str, set[str]]) -> None:
    for rule in rules():
        names = [name for name, _ in series_of(rule["expr"])]
        labels = set().union(*(known[name] for name in names)) | OF_PROMETHEUS
        assert set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"]))) <= labels, rule["alert"]


def test_the_numbers_of_series_that_instances_cause_are_bounded(known: dict[str, set[str]]) -> None:
    """By metrics.per_instance, those of credentials by egress.usage.MAX_CREDENTIALS, and one series for each bound."""
    per_instance = {name for name, labels in known.items() if {"instance_id", "instance_name", "instance"} & labels}
    of_credentials = {f"hypeman_egress_credential_{name}_total" for name in ("requests", "bytes")}
    of_bounds = {"hypeman_egress_largest_in_use"}
    assert per_instance == {f"hypeman_instance_{name}" for name, _, _ in instances._EACH} | of_credentials | of_bounds


async def test_the_oldest_running_instances_have_series(known: dict[str, set[str]]) -> None:
    records = [SimpleNamespace(id=f"i{number}", name=f"n{number}", created_at=9 - number) for number in range(5)]
    used = tuple(
        InstanceUsage(
            instance_id=f"i{number}",
            instance_name=f"n{number}",
            cpu_seconds=1.5,
            memory_rss_bytes=20,
            memory_vms_bytes=25,
            network_rx_bytes=30,
            network_tx_bytes=40,
            allocated_vcpus=1,
            allocated_memory_bytes=50,
        )
        for number in range(4)
    )

    async def usage() -> UsageOfAll:
        return UsageOfAll(time=datetime(2026, 1, 1, tzinfo=UTC), instances=used)

    board = SimpleNamespace(records=lambda: records)
    each = instances._Each(SimpleNamespace(board=board, usage=usage), 2)  # type: ignore[arg-type]
    await each.refresh()
    assert each.values(lambda found: found.cpu_seconds) == {("i3", "n3"): 1.5, ("i2", "n2"): 1.5}
    assert each.left_out() == {(): 2.0}
