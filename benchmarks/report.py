"""What the benchmarks have in common: rounds in turn, the machine's own limits, weights, a table and JSON."""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from graftwork.cluster.machine import num_cpus

if TYPE_CHECKING:
    from graftwork.specs.training import Precision

K = TypeVar("K")  # names of what is measured
M = TypeVar("M", bound=nn.Module)
Row = Mapping[str, Any]
Mark = Any  # seconds on a CPU, an event on a GPU


# By the kind of device, what saturates it: the side of a square matrix, the bytes of a copy.
LARGE = {"cuda": (8192, 2**30), "cpu": (2048, 2**27)}


@dataclass(frozen=True)
class Limits:
    """What a device can do at most, as measured just now."""

    flops: float  # of a large matrix product, FLOP/s
    bandwidth: float  # of a copy, bytes read and written a second

    def floor_seconds(self, flops: float = 0.0, moved: float = 0.0) -> float:
        """The time below which work of so many FLOPs that moves so many bytes cannot come."""
        return max(flops / self.flops, moved / self.bandwidth)


def limits(device: torch.device, precision: Precision = "fp32") -> Limits:
    """With as many threads as torch has now; fp32 and tf32 are multiplied as torch is set to."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side, length = LARGE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = best(lambda: torch.mm(a, b), device)
    copy = best(lambda: target.copy_(source), device)
    return Limits(2 * side**3 / product, 2 * length / copy)


def fastest_device() -> torch.device:
    """Return the GPU, or the CPU of a machine without one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def random_weights(model: M) -> M:
    """Nothing is zero, as the published initialisation has it, and what comes out keeps to the size of noise."""
    for value in model.parameters():
        value.normal_(std=0.02 if value.dim() > 1 else 0.1)
    return model


def best(work: Callable[[], object], device: torch.device, runs: int = 5) -> float:
    """The least of several times, in seconds, after a run to warm up."""
    work()
    return min(timed(work, device) for _ in range(runs))


def timed(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds until the work is done, on the device too."""
    wait = torch.cuda.synchronize if device is not None and device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def mark(device: torch.device) -> Mark:
    """A moment on the device, in the order of what it is given to do; nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(marks: Sequence[Mark]) -> list[float]:
    """Seconds from each moment to the next one."""
    if isinstance(marks[-1], torch.cuda.Event):
        marks[-1].synchronize()
    return [
        end - start if isinstance(end, float) else start.elapsed_time(end) / 1e3
        for start, end in itertools.pairwise(marks)
    ]


def median_seconds(work: Callable[[], object], device: torch.device, runs: int, warmup: int = 3) -> float:
    """The median time of a run, on the device."""
    for _ in range(warmup):
        work()
    marks = [mark(device)]
    for _ in range(runs):
        work()
        marks.append(mark(device))
    return statistics.median(seconds_between(marks))


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """A function that says how many GB tensors took at most since the context began; None on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None


def in_turn(works: Mapping[K, Callable[[], float]], rounds: int) -> dict[K, list[float]]:
    """Each work's seconds, round by round, so that a machine whose speed drifts does not decide the outcome."""
    found: dict[K, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(work())
    return found


def ratio(baseline: Sequence[float], ours: Sequence[float]) -> float:
    """How many times faster ours is: the median over rounds."""
    return statistics.median(old / new for old, new in zip(baseline, ours, strict=True))


def show(title: str, rows: Sequence[Row], facts: Mapping[str, Any], path: Path | None) -> None:
    """Print rows as a Markdown table and, below, facts that hold for all; write both as JSON."""
    facts = {**machine(), **facts}
    show_table(title, rows, facts)
    if path is not None:
        path.write_text(json.dumps({"title": title, "rows": [dict(row) for row in rows], **facts}, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What every measurement depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"torch": torch.__version__, "device": device, "cores": num_cpus()}


def show_table(title: str, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n{title}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(_cell(row.get(name, '')) for name in names)} |")
    print("\n" + "\n".join(f"{name}: {_cell(value)}" for name, value in facts.items()), flush=True)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
