"""Randomness: explicit generators derived from a seed and a path of names.

Every random draw of a run comes from a generator made by `generator(seed, role, ..., round)`.
Nothing seeds a global generator, so the same seed gives the same numbers on every engine, in
every process and in any order of execution.
"""

import hashlib

import torch


def derive(seed: int, *path: str | int) -> int:
    """Return a 63-bit seed for `path`, a hash of `seed` and the names and numbers of the path."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *path: str | int) -> torch.Generator:
    """Return a CPU generator for `path`, for example ``generator(1, "client", 7, "round", 3)``."""
    return torch.Generator().manual_seed(derive(seed, *path))
