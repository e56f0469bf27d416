"""Random streams named by what they are for, so that no result depends on which worker drew it, or when.

A stream is (job seed, purpose, item): `generator(0, "distill/03.mha", epoch)`. Two names never share a stream, and
asking again for one starts it again, which is what makes a resumed run continue with the same numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def seed_of(seed: int, *name: str | int) -> int:
    """63 bits of SHA-256 over the stream's name."""
    text = json.dumps(["stream", seed, *name])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *name: str | int) -> torch.Generator:
    """A CPU generator at the start of the stream: draws are the same on every device."""
    return torch.Generator().manual_seed(seed_of(seed, *name))


@contextmanager
def initialising(seed: int, *name: str | int) -> Iterator[None]:
    """Module initialisation inside draws from the named stream; the global state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, *name))
        yield


class SampleNoise:
    """Gaussian noise for a batch of samples, each with a stream of its own: any split into batches draws the same."""

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device) -> None:
        self.generators = [generator(seed, "sample", index) for index in indices]
        self.shape = shape
        self.device = device

    def __call__(self) -> Tensor:
        """The next draw, (B, *shape). Going to a GPU it does not wait for what is under way there."""
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
        return noise.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else noise
