"""Seeds, and the generators that a net or a loader may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*parts: int) -> int:
    """A seed for each list of numbers, 0 to 2**63 - 1."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def seed_all(*parts: int) -> None:
    """Seed the global generators of torch, Python and NumPy."""
    seed = seed_of(*parts)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Whatever is seeded inside, the caller's generators go on as if nothing had been drawn."""
    python, numpy_ = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)
