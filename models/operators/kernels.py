"""Fused GPU kernels from packages that may not be installed, and the one decision whether a call goes to one.

Each computes what the operator's definition in plain PyTorch does. Nothing is imported until a tensor on a GPU asks.
The process keeps which decisions fell, so that a step can leave them beside its result.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from graftwork.models.numerics.torch_internals import constant_when_compiled
from graftwork.specs.operators import Accelerated

Fused = Callable[..., Tensor]


class KernelUnavailable(RuntimeError):
    """An operator's `backend: kernel` cannot be had; one line says which operator, which package, and why."""


@dataclass(eq=False)
class Kernel:
    """A package's function, and what it takes. It is imported when first wanted, once a process."""

    package: str  # its name for pip
    module: str
    function: str
    dtypes: tuple[torch.dtype, ...]
    generation: tuple[int, int] = (0, 0)  # least compute capability of the GPU
    wrong: tuple[tuple[int, int], ...] = ()  # compute capabilities on which its numbers are known to be wrong
    sizes: tuple[int, int] | None = None  # least and greatest of `size_name`
    size_name: str = ""
    bare: bool = False  # whether the module needs nothing that its package's own `__init__` does
    fused: Fused | None = field(default=None, init=False)  # the function, once it is imported
    failure: str | None = field(default=None, init=False)  # why it could not be

    def obstacle(self, x: Tensor, size: int | None) -> str | None:
        """Why it cannot be called on x; None where it can."""
        if not on_gpu(x):
            return f"the tensors are on the {x.device.type}, not on a CUDA GPU"
        if x.dtype not in self.dtypes:
            return f"it takes {' and '.join(map(str, self.dtypes))}, not {x.dtype}"
        if self.sizes and size is not None and not self.sizes[0] <= size <= self.sizes[1]:
            return f"it takes {self.sizes[0]} to {self.sizes[1]} {self.size_name}, not {size}"
        if generation(x.device) < self.generation:
            return f"it needs a GPU of compute capability {self.generation}, this one has {generation(x.device)}"
        if generation(x.device) in self.wrong:
            return f"it is known to compute wrong numbers on GPUs of compute capability {generation(x.device)}"
        return import_failure(self)


FLASH_ATTENTION = Kernel(
    "flash-attn",
    "flash_attn",
    "flash_attn_func",
    (torch.float16, torch.bfloat16),
    generation=(8, 0),
    sizes=(1, 256),
    size_name="channels a head",
)
CAUSAL_CONVOLUTION = Kernel(
    "causal-conv1d",
    "causal_conv1d",
    "causal_conv1d_fn",
    (torch.float32, torch.float16, torch.bfloat16),
    wrong=((10, 3),),  # as nvcc 13 compiles it: https://github.com/Dao-AILab/causal-conv1d/issues/105
    sizes=(2, 4),
    size_name="taps",
)
STATE_SPACE_SCAN = Kernel(
    "mamba-ssm",
    "mamba_ssm.ops.triton.ssd_combined",
    "mamba_chunk_scan_combined",
    (torch.float32, torch.float16, torch.bfloat16),
    bare=True,  # the scan is Triton's; the package's `__init__` imports a CUDA extension, which only nvcc makes
)
KERNELS = {kernel.package: kernel for kernel in (FLASH_ATTENTION, CAUSAL_CONVOLUTION, STATE_SPACE_SCAN)}


class Decision(NamedTuple):
    """Whether an operator's calls on a GPU went to a kernel, and if not, why."""

    operator: str
    kernel: str
    obstacle: str | None  # None: they did


DECISIONS: set[Decision] = set()  # of this process, since they were last cleared


def choose(kernel: Kernel, spec: Accelerated, x: Tensor, size: int | None = None) -> Fused | None:
    """The kernel's function for a call on x, or None for plain PyTorch. `size` is what kernel.sizes bounds.

    On the meta device nothing is computed, so there the definition stands for every backend.
    """
    if spec.backend == "torch" or x.is_meta or (spec.backend == "auto" and not on_gpu(x)):
        return None
    obstacle = kernel.obstacle(x, size)
    remember(spec.kind, kernel.package, obstacle)
    if obstacle is None:
        return kernel.fused
    if spec.backend == "kernel":
        raise KernelUnavailable(f"{spec.kind}: `backend: kernel` needs {kernel.package}, but {obstacle}")
    return None


def on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def generation(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability."""
    return torch.cuda.get_device_capability(device)


@constant_when_compiled
def remember(operator: str, kernel: str, obstacle: str | None) -> None:
    """Add to this process's decisions."""
    DECISIONS.add(Decision(operator, kernel, obstacle))


def import_failure(kernel: Kernel) -> str | None:
    """Import the function; return why that fails, None if it does not."""
    return _import_failure(kernel.package)


@constant_when_compiled
def _import_failure(package: str) -> str | None:
    kernel = KERNELS[package]
    if kernel.fused is None and kernel.failure is None:
        try:
            kernel.fused = _imported(kernel)
        except ModuleNotFoundError as error:
            kernel.failure = f"there is no module {error.name} here"
        except Exception as error:  # built for another torch, another version, or an error of what it brings along
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            kernel.failure = f"its import fails: {line}"
    return kernel.failure


def _imported(kernel: Kernel) -> Fused:
    with _without_init(kernel.module.partition(".")[0] if kernel.bare else None):
        fused: Fused = getattr(importlib.import_module(kernel.module), kernel.function)
    return fused


@contextmanager
def _without_init(package: str | None) -> Iterator[None]:
    """Within this context the package's modules are imported without its `__init__`, unless that has run before."""
    spec = None if package is None or package in sys.modules else importlib.util.find_spec(package)
    if spec is None:
        yield
        return
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # has its `__path__`, and nothing else
    try:
        yield
    finally:
        del sys.modules[spec.name]  # others that import the package get the whole of it
