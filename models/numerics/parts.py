"""What a CPU's cache holds: elementwise work on much goes part by part, so that not all of it waits for memory."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

PART = 2**19  # elements: some of a cache of 1 MiB and more a core, with those of two or three tensors in it


def in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, some of their first dimension at a time; whole where that is little, or on a GPU."""
    first = tensors[0]
    whole = first.device.type != "cpu" or first.numel() <= PART
    size = len(first) if whole else max(1, PART * len(first) // first.numel())
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)
