"""Housekeeping that a service repeats for as long as the server runs."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from hypeman.errors import HypemanError

log = logging.getLogger(__name__)


async def repeat(work: Callable[[], Awaitable[object]], *, interval: float, what: str) -> None:
    """Call ``work`` at once and then every ``interval`` seconds, until cancelled.

    HypemanError and OSError are logged with ``what`` and not raised: a service raises into the nursery of the server,
    which would end, and a full disk is no reason for that. Everything else is a fault of the program, and is raised.
    """
    while True:
        try:
            await work()
        except (HypemanError, OSError) as error:
            log.error("%s failed, tried again in %g s: %s", what, interval, error)
        await trio.sleep(interval)
