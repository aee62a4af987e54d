"""Chance as a function: every draw follows from the seed of the run, a purpose, and a position such as epoch and step.

No generator's state is carried from one draw to the next. So a run that was stopped goes on as it would have, the
number of loader processes changes nothing, and two seeds share no stream.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """Returns a hash of all arguments, in [0, 2**63).

    Example:
        >>> derive_seed(0, "order", 1) == derive_seed(1, "order", 0)
        False
    """
    digest = hashlib.blake2b(repr((seed, purpose, *position)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """Returns a new CPU generator that stands at the start of the stream of these arguments."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *position))


def seed_all(seed: int, purpose: str, *position: int) -> None:
    """Puts torch's default generators, of the CPU and of every GPU, at the start of the stream of these arguments."""
    torch.manual_seed(derive_seed(seed, purpose, *position))


@contextmanager
def seeded(seed: int, purpose: str, *position: int) -> Iterator[None]:
    """Draws from the CPU's default generator come from the stream of these arguments inside, and go on as before after.

    The generators of GPUs are left alone: a data set in the main process must not disturb what a model draws there.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(derive_seed(seed, purpose, *position))
    try:
        yield
    finally:
        torch.set_rng_state(state)
