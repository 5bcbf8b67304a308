"""Random numbers that can be replayed: every step of every task has a seed of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_MASK = (1 << 64) - 1


def mixed(seed: int, *path: int) -> int:
    """A 64-bit seed for a place under ``seed``; SplitMix64's finaliser (Steele, Lea, Flood 2014) after each number."""
    state = seed & _MASK
    for number in path:
        state = (state + 0x9E3779B97F4A7C15 * (number + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def drawn_seed() -> int:
    """A seed from torch's global generator, for work that has no address: ``torch.manual_seed`` governs it."""
    return int(torch.randint(2**62, (), device="cpu"))


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's default generators of the CPU and, if it is another one, of ``device``."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


@contextlib.contextmanager
def replayed_random_state(device: torch.device, used: bool = True) -> Iterator[None]:
    """Leave torch's default generators as they were, whatever is seeded and drawn inside."""
    if not used:
        yield
        return
    cpu = torch.default_generator.get_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.default_generator.set_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
