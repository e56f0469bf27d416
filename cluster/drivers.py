"""NVIDIA's driver: what there is of it and of GPUs, and whether torch can compute on one. Knows nothing of Ray."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

PROC = Path("/proc/driver/nvidia")  # the kernel module's; a container without GPUs has it, too
DEV = Path("/dev")  # of the container, with what it was given


def gpu_problem() -> str | None:
    """Return what keeps torch from computing on this process's GPU, to follow "a GPU that"; None if nothing does.

    Raise torch.cuda.OutOfMemoryError if others have all of its memory.
    """
    import torch

    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # AssertionError: of a torch without CUDA
        return (
            f"torch {torch.__version__}, built for {built_for()}, cannot use "
            f"({str(error).splitlines()[0]}); NVIDIA driver: {driver_version() or 'none'}; accepted: a driver that "
            "supports that CUDA, or a torch built for the driver's (https://pytorch.org/get-started)"
        )
    return None


def built_for() -> str:
    """Return what torch was built for, as `CUDA 13.2`."""
    import torch

    cuda, rocm = torch.version.cuda, torch.version.hip
    return f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPUs only"


def driver_version() -> str | None:
    """Return the version of the loaded NVIDIA kernel module; None if there is none."""
    try:
        text = (PROC / "version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found and found[0]


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA that the driver supports; None if there is no driver in reach."""
    try:
        library, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def num_gpus_of_machine() -> int:
    """Return how many GPUs the kernel module drives, whoever may use them."""
    try:
        return len(list((PROC / "gpus").iterdir()))
    except OSError:
        return 0


def num_gpus_here() -> int:
    """Return how many GPUs this container was given, as device files."""
    return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in DEV.glob("nvidia*"))
