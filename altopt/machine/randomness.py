"""Randomness as a function of what it is for, never of what ran before.

Every draw comes from a generator seeded by a key such as (seed, stage, iteration, image id). A resumed run, a run
with another number of workers and an uninterrupted run therefore draw the same numbers.
"""

import hashlib

import torch


def seed_of(*key: object) -> int:
    """Return 63 bits that depend on every part of the key and on its order."""
    digest = hashlib.sha256("\0".join(str(part) for part in key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*key: object) -> torch.Generator:
    """Return a CPU generator for the key; draw on the CPU and move, so that devices agree."""
    return torch.Generator().manual_seed(seed_of(*key))
