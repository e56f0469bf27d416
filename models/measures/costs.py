"""What a model costs, measured: parameters, FLOPs by torch's counter, the time and memory of a forward pass.

`specs/costs.py` has the first two by formula.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from graftwork.models.condition import Condition
from graftwork.models.numerics.streams import generator
from graftwork.models.numerics.torch_internals import memory_events
from graftwork.models.objectives import Network
from graftwork.models.rootstocks import Rootstock


def num_parameters(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def forward_flops(model: Rootstock) -> int:
    """FLOPs of one forward pass of one sample; a multiply-add counts as two. Counted on meta tensors: nothing runs."""
    model = copy.deepcopy(model).to("meta")
    inputs = forward_inputs(model, 1, torch.device("meta"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


Inputs = tuple[Tensor, Tensor, Condition]  # x, t and the condition of a batch


def forward_inputs(model: Rootstock, batch: int, device: torch.device) -> Inputs:
    """Return something of the right shape to run the model on."""
    config = model.config
    t = config.objective.draw_t(batch, generator(0, "example")).to(device)
    return torch.zeros(batch, *config.latent_shape, device=device), t, model.conditioner.example(batch, device)


@torch.no_grad()
def forward_seconds(network: Network, inputs: Inputs) -> float:
    """Wall time of one forward pass, until its result is there."""
    start = time.perf_counter()
    network(*inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def forward_memory(model: Rootstock, inputs: Inputs, network: Network | None = None) -> int:
    """Return the peak memory of a forward pass, in bytes: the model's own and what the pass allocates.

    network: called instead of the model, such as its compiled code.
    """
    network = model if network is None else network
    model_bytes = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    if inputs[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        network(*inputs)
        return model_bytes + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        network(*inputs)
    # Each of the allocator's events adds or, with a negative size, frees.
    now = peak = 0
    for _, size in memory_events(profiler):
        now += size
        peak = max(peak, now)
    return model_bytes + peak
