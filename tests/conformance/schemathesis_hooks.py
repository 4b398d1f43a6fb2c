"""Hooks of Schemathesis, which loads them by SCHEMATHESIS_HOOKS: nothing happens to the instance LIVE_INSTANCE.

Its id is in answers, from which Schemathesis takes values, and any text may be the beginning of an id, which names an
instance, too. ``schemathesis.toml`` has no word for either in all phases.
"""

from __future__ import annotations

import os
from typing import Any

import schemathesis

_NAMES = ("live", os.environ["LIVE_INSTANCE"])


@schemathesis.hook  # type: ignore[untyped-decorator]
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    named = (case.path_parameters or {}).get("id")
    if case.method not in ("GET", "HEAD") and named and any(name.startswith(str(named)) for name in _NAMES):
        case.path_parameters["id"] = "nobody-here"
