"""Values of JSON fields: forms that can mean one thing only are taken for it, all others are refused.

The functions raise ``ValueError`` with what the value must be.
"""

import math
from typing import Any

_FLAGS = {"0": 0, "false": 0, "1": 1, "true": 1}
MAX_PIXELS = 2**31  # of a coordinate
MAX_AREA = 1e10  # in square pixels; COCO's evaluation ignores what is larger
_EXACT = 2**53  # whole floats up to here are certain to be what was written


def as_id(value: Any) -> int:
    """A whole number of 64 bits: ``7``, ``7.0`` or ``"7"``."""
    number = _whole(value)
    if number is None or not -(2**63) <= number < 2**63:
        raise ValueError("must be a whole number of 64 bits")
    return number


def as_size(value: Any) -> int | None:
    """A number of pixels, as :func:`as_id`, or ``None`` for ``null``: left out."""
    if value is None:
        return None
    number = _whole(value)
    if number is None or not 0 < number < MAX_PIXELS:
        raise ValueError("must be a whole number of pixels")
    return number


def as_flag(value: Any) -> int:
    """0 or 1: also ``false``, ``"0"``, ``"false"``, ``0.0``, and ``null`` for 0."""
    if isinstance(value, str):
        value = _FLAGS.get(value.strip().lower())
    elif value is None:
        value = 0
    if value not in (0, 1):
        raise ValueError("must be 0 or 1")
    return int(value)


def as_area(value: Any) -> float | None:
    """A number of square pixels: ``600`` or ``"600"``, or ``None`` for ``null``: left out."""
    if value is None:
        return None
    number = _finite(value)
    if number is None or not 0 <= number <= MAX_AREA:
        raise ValueError(f"must be a finite number of at least 0 and at most {MAX_AREA:g}")
    return number


def as_box(value: Any) -> tuple[float, float, float, float]:
    """Four finite numbers, none beyond ``MAX_PIXELS``."""
    numbers = [None if isinstance(x, str) else _finite(x) for x in value] if isinstance(value, list) else []
    if len(numbers) != 4 or not all(number is not None and abs(number) <= MAX_PIXELS for number in numbers):
        raise ValueError("must be four finite numbers of pixels [x, y, width, height]")
    return tuple(numbers)  # type: ignore[return-value]


def as_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a text that is not empty")
    return value


def _whole(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = value.strip()
        if text.removeprefix("-").isdecimal() and len(text) < 30:
            return int(text)
    number = _finite(value)
    return int(number) if number is not None and number.is_integer() and abs(number) <= _EXACT else None


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and "_" in value:  # which Python would take for a separator of digits
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
