"""A story ends with its first failure: what comes after would only fail for the same reason."""

from __future__ import annotations

from collections.abc import Generator

import pytest

_ended = pytest.StashKey[str]()
STORIES = ("metal.py",)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.path.name in STORIES and report.failed and item.parent is not None:
        item.parent.stash.setdefault(_ended, item.name)
        appliance = getattr(item, "funcargs", {}).get("appliance")
        if appliance is not None:
            report.sections.append(("the host", _diagnosis(appliance)))
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.parent is not None and (failed := item.parent.stash.get(_ended, "")):
        pytest.skip(f"the story ended at {failed}")


def _diagnosis(appliance: object) -> str:
    try:
        return str(appliance.diagnosis())  # type: ignore[attr-defined]
    except Exception as error:  # the host itself may be what failed
        return f"the host does not report it: {error}"
