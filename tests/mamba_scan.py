"""mamba-ssm's own scan inside our Mamba-2, without a GPU. Each way wants a process of its own and prints JSON.

    TRITON_INTERPRET=1 python -m tests.mamba_scan interpreted TOKENS DTYPE
    python -m tests.mamba_scan compiled

`interpreted` runs the Triton kernels on this CPU, and plain PyTorch beside them: how far the output and each gradient
are apart, over the size of what plain PyTorch gives. The interpreter computes no bfloat16. `compiled` compiles what a
forward and a backward pass of DiT-XL/2 launch, for an H100: the bytes of shared memory that each kernel takes. Nothing
is launched.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ["MAMBA_DETERMINISTIC"] = "1"  # one configuration of each kernel, so that none is timed

import torch
from torch import Tensor, nn

from graftwork.models.numerics.precision import computing
from graftwork.models.operators import build_operator, kernels
from graftwork.specs.operators import Mamba2, Place

XL2 = Place(width=1152, heads=16, num_tokens=256)
STATE, HEAD = 16, 16  # the least that the kernels' matrix products take
NUM_SM = {"interpreted": 4, "compiled": 132}  # an H100 has 132


def interpreted(num_tokens: int, dtype: torch.dtype) -> dict[str, float]:
    torch.manual_seed(0)
    place = Place(16, 2, num_tokens)
    settings = {"d_state": STATE, "headdim": HEAD}
    plain = build_operator(Mamba2(backend="torch", **settings), place).to(dtype)
    fused = build_operator(Mamba2(backend="auto", **settings), place).to(dtype)
    fused.load_state_dict(plain.state_dict())
    x, gradient = torch.randn(2, 1, num_tokens, place.width).to(dtype)
    expected, result = (outputs_and_gradients(operator, x, gradient) for operator in (plain, fused))
    return {name: distance(result[name], value) for name, value in expected.items()}


def outputs_and_gradients(operator: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """gradient: of the output."""
    x = x.clone().requires_grad_()
    y = operator(x)
    y.backward(gradient)
    gradients = {name: value.grad for name, value in operator.named_parameters()}
    return {"output": y.detach(), "input": x.grad, **gradients}


def distance(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def compiled() -> dict[str, int]:
    from triton.runtime.jit import JITFunction

    launch, shared_memory = JITFunction.run, {}

    def only_compile(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **named: Any) -> Any:
        result = launch(kernel, *args, grid=grid, warmup=True, **named)
        shared_memory[kernel.fn.__name__] = result.metadata.shared
        return result

    JITFunction.run = only_compile
    pretend_h100()
    operator = build_operator(Mamba2(), XL2)
    with computing("bf16", torch.device("cpu")):
        y = operator(torch.randn(1, XL2.num_tokens, XL2.width))
    forward = len(shared_memory)
    y.float().sum().backward()
    assert len(shared_memory) > forward > 0
    return shared_memory


def pretend_h100() -> None:
    """Have Triton compile for sm_90, whatever this machine has."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    triton.runtime.driver.set_active(Driver())


def offer_scan(way: str) -> None:
    """Have our Mamba-2 call mamba-ssm's scan, and nothing else, although its tensors are on the CPU."""
    properties = SimpleNamespace(multi_processor_count=NUM_SM[way])
    patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()).start()
    patch.object(torch.cuda, "get_device_properties", lambda device: properties).start()
    patch.object(kernels, "on_gpu", lambda x: x.dim() == 4).start()  # its x is (B,N,H,P); a convolution's is (B,C,N)
    patch.object(kernels, "generation", lambda device: (9, 0)).start()
    failure = kernels.import_failure(kernels.STATE_SPACE_SCAN)
    assert failure is None, failure


def main() -> None:
    way, *settings = sys.argv[1:]
    torch.set_num_threads(1)
    offer_scan(way)
    if way == "interpreted":
        result: dict[str, Any] = interpreted(int(settings[0]), getattr(torch, settings[1]))
    else:
        result = compiled()
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
