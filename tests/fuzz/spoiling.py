"""Bytes and values that are almost what was written."""

import math
from collections import OrderedDict
from collections.abc import Callable
from random import Random
from typing import Any


def spoil_bytes(data: bytes, random: Random, start: int = 0, stop: int | None = None) -> bytes:
    """Changes, adds, takes away or moves some bytes between two places."""
    stop = len(data) if stop is None else stop
    at = random.randrange(start, max(stop, start + 1))
    length = random.choice((1, 1, 1, 2, 4, 8, random.randrange(1, 300)))
    piece = data[at : min(at + length, stop)]
    other = random.choice(
        (
            lambda: bytes([piece[0] ^ 1 << random.randrange(8)]) + piece[1:] if piece else b"",
            lambda: random.randbytes(len(piece)),
            lambda: bytes(len(piece)),
            lambda: b"\xff" * len(piece),
            lambda: b"",
            lambda: piece + random.randbytes(length),
            lambda: piece * random.randrange(2, 5),
            lambda: data[(elsewhere := random.randrange(len(data) or 1)) : elsewhere + len(piece)],
        )
    )()
    return data[:at] + other + data[at + len(piece) :]


def flip(data: bytes, random: Random, start: int = 0, stop: int | None = None) -> bytes:
    """Flips a bit."""
    at = random.randrange(start, len(data) if stop is None else stop)
    return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]


def cut(data: bytes, random: Random) -> bytes:
    """Leaves the beginning."""
    return data[: random.choice((0, 1, len(data) - 1, random.randrange(len(data)), len(data) - random.randrange(300)))]


def nested(random: Random) -> list:
    value: list = []
    for _ in range(random.choice((10, 100, 400))):
        value = [value]
    return value


PLAIN: list[Callable[[Random], Any]] = [
    lambda _: None,
    lambda r: r.random() < 0.5,
    lambda r: r.choice((0, 1, -1, 2, 7, 255, 2**31, -(2**31), 2**63 - 1, 2**63, 10**30)),
    lambda r: r.randrange(-20, 20),
    lambda _: 10**5000,
    lambda r: r.choice((0.0, -0.0, 0.5, -1.5, 1e308, 5e-324, 1e-30, 2.0**53)),
    lambda r: r.choice((math.nan, math.inf, -math.inf)),
    lambda r: r.choice(("", "x", "7", "none", "a\nb", "\x1b[2J", "../../x", "/dev/zero", "a\0b", "\ud800", "ä" * 99)),
    lambda r: "long" * r.choice((10, 100_000)),
    lambda r: [] if r.random() < 0.5 else [1, "x", None],
    lambda r: {} if r.random() < 0.5 else {"x": 1},
    nested,
]


def replace_value(content: Any, random: Random, values: list[Callable[[Random], Any]]) -> tuple[Any, str]:
    """Puts something else in the place of a value, or takes it away, or adds one. What is not changed is not copied.

    Returns:
        The content, and in words what was changed.
    """
    if isinstance(content, dict) and content and random.random() < 0.9:
        key = random.choice(list(content))
        chance = random.random()
        if chance < 0.04:
            return _like(content, [item for item in content.items() if item[0] != key]), f".{key} left out"
        if chance < 0.07:
            new = random.choice(("x", 0, 1, -1, None, "epoch", "lr", 1.5))
            return _like(content, [*content.items(), (new, random.choice(values)(random))]), f".{new!r} added"
        if chance < 0.09:
            renamed = str(key) if not isinstance(key, str) else 3
            return _like(content, [(renamed if k == key else k, v) for k, v in content.items()]), f".{key} renamed"
        changed, what = replace_value(content[key], random, values)
        return _like(content, [(k, changed if k == key else v) for k, v in content.items()]), f".{key}{what}"
    if type(content) in (list, tuple) and content and random.random() < 0.9:
        at = random.randrange(len(content))
        if random.random() < 0.1:
            return type(content)([*content[:at], *content[at + 1 :]]), f"[{at}] left out"
        if random.random() < 0.1:
            return type(content)([*content, content[at]]), f"[{at}] twice"
        changed, what = replace_value(content[at], random, values)
        return type(content)([*content[:at], changed, *content[at + 1 :]]), f"[{at}]{what}"
    new = random.choice(values)(random)
    return new, f" = {type(new).__name__}"


def _like(content: dict, items: list) -> dict:
    return OrderedDict(items) if isinstance(content, OrderedDict) else dict(items)
