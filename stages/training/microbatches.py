"""Gradient accumulation: how many samples a worker passes at once, and how its share of a batch is cut up for that.

All workers make equally many passes, since sharded weights and gradients are exchanged at each. Parts of a batch may
differ in size by one; each counts by its number of samples.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from graftwork.cluster import memory
from graftwork.models.condition import Condition
from graftwork.models.numerics.streams import generator
from graftwork.models.objectives import Network
from graftwork.stages.training.batches import Batch, TrainingSet

# Devices on which the size is tried out when it is left out. On a CPU it is the whole share: how sums are cut up
# changes their last bits, and those must not depend on the memory of a machine.
TRIED_ON = ("cuda",)
TRIAL_PASSES = 2  # the second has the gradients of the first beside it, as in training


class Trainable(Protocol):
    """What passes are made with."""

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, /) -> Tensor: ...

    def stand_in(self) -> Self:
        """Return an engine for passes alone, without exchange: a network as large, that shares no state with this."""
        ...


class Loss(Protocol):
    """What a training makes small."""

    def __call__(self, network: Network, batch: Batch, along: float, /) -> Tensor:
        """Return the loss of each sample, (B,). along: the share of the training that is done, 0 .. 1."""
        ...


def loss_of_objective(data: TrainingSet) -> Loss:
    """Return the loss of what the model of this data predicts, whatever is done."""
    objective = data.objective.on(data.device)

    def loss(network: Network, batch: Batch, along: float) -> Tensor:
        return objective.loss(network, batch.x, batch.t, batch.condition, batch.noise)

    return loss


class TooLarge(Exception):
    """Not even one sample of a training fits the device."""


class Part(NamedTuple):
    """What a worker passes at once."""

    batch: Batch
    samples: int  # that count: 0 in a pass that is made for the other workers' sake


def parts(share: Batch, passes: int) -> Iterator[Part]:
    """Yield a worker's share of a batch in so many parts, the larger ones first."""
    size, begin = len(share.t), 0
    for number in range(passes):
        samples = size // passes + (number < size % passes)
        if samples:
            yield Part(share.cut(slice(begin, begin + samples)), samples)
        else:
            yield Part(share.cut(slice(-1, None)), 0)
        begin += samples


def largest_that_fits(fits: Callable[[int], bool], share: int) -> int:
    """Return `share` if so many samples fit, else the largest power of two that does, else 0."""
    powers = [2**exponent for exponent in range(share.bit_length()) if 2**exponent < share]
    return next((samples for samples in (share, *reversed(powers)) if fits(samples)), 0)


def try_out(engine: Trainable, data: TrainingSet, share: int, loss_of: Loss) -> int:
    """Return how many samples all workers can pass at once; raises TooLarge. Every worker must call it.

    Nothing is exchanged while sizes are tried, so that a worker which has less room lets no other wait in vain.
    """
    largest = torch.tensor(largest_that_fits(lambda size: _fits(engine, loss_of, data, size), share))
    if dist.is_initialized() and dist.get_world_size() > 1:
        largest = largest.to(data.device)
        dist.all_reduce(largest, dist.ReduceOp.MIN)
    if not largest.item():
        raise TooLarge(_advice(data.device))
    return int(largest.item())


def _fits(engine: Trainable, loss_of: Loss, data: TrainingSet, samples: int) -> bool:
    fits = True
    try:
        _rehearse(engine.stand_in(), loss_of, data, samples)
    except Exception as error:
        if not memory.is_short(error):
            raise
        fits = False
    # Only here: the error's frames held on to the tensors.
    gc.collect()
    if data.device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def _rehearse(engine: Trainable, loss_of: Loss, data: TrainingSet, samples: int) -> None:
    """Make the passes of a training step, on latents that are zeros."""
    x = torch.zeros(samples, *data.latents.shape[1:], device=data.device)
    t = data.objective.draw_t(samples, generator(0, "example")).to(data.device)
    batch = Batch(x, t, data.conditioner.example(samples, data.device), x)
    for _ in range(TRIAL_PASSES):
        loss_of(engine, batch, 0.0).mean().backward()
    if data.device.type == "cuda":
        torch.cuda.synchronize()


def _advice(device: torch.device) -> str:
    line = "not even one sample fits"
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info()
        line += f" the GPU's {whole / 2**30:.1f} GiB, of which weights, optimizer and others leave {free / 2**30:.1f}"
    return f"{line}; set checkpointing: true, raise workers or deepspeed.zero, or ask for a larger GPU"
