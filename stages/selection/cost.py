"""`cost`: what each operator adds to the latency and the peak memory of the model, on the step's device.

Each is measured by models of N and of 2N blocks (models.measures.marginal). Leaves `cost.json`.
"""

from __future__ import annotations

import platform
from functools import partial
from pathlib import Path

import torch

from graftwork.models.measures.marginal import COPIES, Passes, latency_ms, marginal, peak_memory
from graftwork.models.rootstocks import new_rootstock
from graftwork.specs.edits import Edit
from graftwork.stages.artifacts.evidence import MeasuredCosts, OperatorCosts, write_costs
from graftwork.stages.artifacts.latents import read_meta
from graftwork.stages.artifacts.texts import told
from graftwork.stages.catalog.cost import CostParams
from graftwork.stages.contract import Context

TOLERANCE = 0.2  # of the whole model's latency, by which that of its blocks may miss it


def run(context: Context) -> None:
    params: CostParams = context.params
    config = read_meta(context.input("features")).rootstock_config(params.model)
    prepared = partial(told, inputs=context.inputs)
    passes = Passes(params.batch, params.precision, context.device, prepared)
    total = 2 + len(params.operators)
    whole = prepared(new_rootstock(config)).to(context.device).eval()
    (latency,), memory = latency_ms([whole], passes), peak_memory(whole, passes)
    del whole
    context.report(1, total)
    block = marginal(config, (), passes)
    context.report(2, total)
    operators = []
    for number, edit in enumerate(params.operators, start=3):
        context.stop_if_asked()
        cost, blocks = marginal(config, [edit], passes), 2 if edit.site.target == "pair" else 1
        operators.append(
            OperatorCosts(
                target=edit.site.target,
                operator=edit.operator.model_dump(mode="json"),
                latency_ms=cost.latency_ms - blocks * block.latency_ms,
                peak_memory=cost.memory - blocks * block.memory,
            )
        )
        context.report(number, total, {_named(edit): operators[-1].latency_ms})
    by_blocks = block.fixed_latency_ms + config.depth * block.latency_ms
    if abs(by_blocks - latency) > TOLERANCE * latency:
        context.note(
            f"latencies are not steady on this device: {config.depth} blocks take {latency:.4g} ms, and by what "
            f"{COPIES} and {2 * COPIES} of them take it would be {by_blocks:.4g} ms; accepted for a limit on latency: "
            "a device that does nothing else"
        )
    write_costs(
        context.out,
        MeasuredCosts(
            device=device_name(context.device),
            batch=params.batch,
            latency_ms=latency,
            peak_memory=memory,
            block_latency_ms=block.latency_ms,
            fixed_latency_ms=block.fixed_latency_ms,
            operators=tuple(operators),
        ),
    )


def _named(edit: Edit) -> str:
    return f"{edit.site.target} {edit.operator.kind} ms"


def device_name(device: torch.device) -> str:
    """Return the model of a GPU, or of the machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
