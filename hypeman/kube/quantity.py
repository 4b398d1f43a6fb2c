"""Quantities of Kubernetes, such as ``500m``, ``1Gi`` and ``1e3``: text ↔ numbers. Pure."""

from __future__ import annotations

import math
import re
from decimal import Decimal

_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([eE][+-]?\d+)|(Ki|Mi|Gi|Ti|Pi|Ei|n|u|m|k|M|G|T|P|E)?)")
_FACTORS = {
    **{f"{letter}i": Decimal(1 << (10 * power)) for power, letter in enumerate("KMGTPE", 1)},
    **{letter: Decimal(10) ** (3 * power) for power, letter in enumerate("kMGTPE", 1)},
    "n": Decimal(10) ** -9,
    "u": Decimal(10) ** -6,
    "m": Decimal(10) ** -3,
    "": Decimal(1),
}


class BadQuantity(ValueError):
    """The text is not a quantity."""


def parse_quantity(text: str | int) -> Decimal:
    """Raises BadQuantity."""
    found = _QUANTITY.fullmatch(str(text))
    if found is None or len(str(text)) > 64:
        raise BadQuantity(f"{text!r} is not a quantity")
    number, exponent, suffix = found.groups()
    if exponent:
        power = int(exponent[1:])
        if abs(power) > 30:
            raise BadQuantity(f"{text!r} is out of range")
        return Decimal(number) * Decimal(10) ** power
    return Decimal(number) * _FACTORS[suffix or ""]


def whole(text: str | int) -> int:
    """The quantity rounded up to a whole number."""
    return math.ceil(parse_quantity(text))
