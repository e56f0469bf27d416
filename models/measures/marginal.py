"""What an operator in each block adds to a model's latency and peak memory, by models of N and of 2N blocks.

    marginal cost of a block   (T(2N) - T(N)) / N
    fixed cost                 2 T(N) - T(2N): embedding and head

The two models pass in turns, so that a device that slows down slows both (the scheme is that of arXiv 2411.19146).
A marginal that is not positive says that the noise is larger than the block: it is measured again, and then an error.
So is a fixed cost that is less than nothing by much, which a device that does other work has; that is no error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic

import torch

from graftwork.models.measures.costs import forward_inputs, forward_memory, forward_seconds
from graftwork.models.numerics.precision import computing
from graftwork.models.rootstocks import Rootstock, RootstockConfig, new_rootstock
from graftwork.models.surgery import graft
from graftwork.specs.edits import Edit, Site
from graftwork.specs.training import Precision

COPIES = 4  # N
WARM_UPS, RUNS = 10, 30
TRIES = 3
MAX_SECONDS, MIN_ROUNDS = 10.0, 3  # of timing


@dataclass(frozen=True)
class Passes:
    """How passes are made: samples at once, precision and device, and what a model of a config needs before it runs."""

    batch: int
    precision: Precision
    device: torch.device
    prepared: Callable[[Rootstock], Rootstock] = lambda model: model
    warm_ups: int = WARM_UPS
    runs: int = RUNS


@dataclass(frozen=True)
class Marginal:
    """What one block costs, or one pair, and what is in no block."""

    latency_ms: float
    memory: float  # bytes
    fixed_latency_ms: float

    @property
    def is_positive(self) -> bool:
        return self.latency_ms > 0 and self.memory > 0

    @property
    def is_steady(self) -> bool:
        """Whether what is in no block takes time, or less than nothing by a tenth of a block at most."""
        return self.is_positive and self.fixed_latency_ms > -0.1 * self.latency_ms


def marginal(config: RootstockConfig, edits: Sequence[Edit], passes: Passes, copies: int = COPIES) -> Marginal:
    """Return what a block with these edits of the first block costs; with a pair among them, the two blocks of it.

    Raise ValueError if the latency or the memory of it is not positive in several measurements.
    """
    models = [_of_copies(config, edits, count, passes) for count in (copies, 2 * copies)]
    tries = list[Marginal]()
    for _ in range(TRIES):
        latencies = latency_ms(models, passes)
        memories = [peak_memory(model, passes) for model in models]
        measured = Marginal(
            latency_ms=(latencies[1] - latencies[0]) / copies,
            memory=(memories[1] - memories[0]) / copies,
            fixed_latency_ms=2 * latencies[0] - latencies[1],
        )
        if measured.is_steady:
            return measured
        tries.append(measured)
    positive = [measured for measured in tries if measured.is_positive]
    if positive:
        return max(positive, key=lambda measured: measured.fixed_latency_ms)
    raise ValueError(
        f"{_named(edits)}: {copies} blocks take {latencies[0]:.4g} ms and {memories[0]:.4g} bytes, {2 * copies} take "
        f"{latencies[1]:.4g} ms and {memories[1]:.4g} bytes, after {TRIES} measurements: by that a block costs "
        "nothing; accepted: a device that does nothing else, or a larger evaluate.batch"
    )


def latency_ms(models: Sequence[Rootstock], passes: Passes) -> list[float]:
    """Return the time of a forward pass of each model; they pass in turns."""
    inputs = [forward_inputs(model, passes.batch, passes.device) for model in models]

    def seconds(number: int) -> float:
        return forward_seconds(models[number], inputs[number])

    with computing(passes.precision, passes.device):
        return least_ms(seconds, len(models), passes.warm_ups, passes.runs)


def least_ms(seconds: Callable[[int], float], count: int, warm_ups: int = WARM_UPS, runs: int = RUNS) -> list[float]:
    """Return the least of several times of each of `count` things, in ms. They are timed in turns.

    The least, since whatever else a machine does only adds to a time. What takes long is timed less often.
    """
    times: list[list[float]] = [[] for _ in range(count)]
    began = monotonic()
    for round_ in range(warm_ups + runs):
        for number in range(count):
            times[number].append(seconds(number))
        if monotonic() - began > MAX_SECONDS and round_ >= MIN_ROUNDS:
            break
    counted = min(warm_ups, len(times[0]) // 2)
    return [1000 * min(one[counted:]) for one in times]


def peak_memory(model: Rootstock, passes: Passes) -> int:
    """Return the bytes at the peak of a forward pass, the model's own among them."""
    with computing(passes.precision, passes.device):
        return forward_memory(model, forward_inputs(model, passes.batch, passes.device))


def _of_copies(config: RootstockConfig, edits: Sequence[Edit], copies: int, passes: Passes) -> Rootstock:
    """Return a model of so many blocks, or pairs, each with the edits of the first one."""
    stride = 2 if any(edit.site.target == "pair" for edit in edits) else 1
    model = passes.prepared(new_rootstock(replace(config, depth=stride * copies)))
    each = [
        edit.model_copy(update={"site": Site(block=stride * number, target=edit.site.target)})
        for number in range(copies)
        for edit in edits
    ]
    return graft(model, each, seed=0).to(passes.device).eval()


def _named(edits: Sequence[Edit]) -> str:
    return ", ".join(f"{edit.operator.kind} for {edit.site.target}" for edit in edits) or "the block as it is"
