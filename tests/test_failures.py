"""What is said of a failure: its cause in one line, and what to do where that is known."""

from __future__ import annotations

import errno

import pytest
import ray
import torch
import torch.distributed as dist

from graftwork.pipeline.execution.task import is_out_of_memory
from graftwork.pipeline.store.artifacts import Store
from graftwork.stages.registry import STAGES


def allocation() -> RuntimeError:
    """What torch says when the system has no more for it."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        allocation(),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        ray.exceptions.OutOfMemoryError("node"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        dist.DistBackendError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:30]}",
)
def test_every_kind_of_missing_memory_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        *(RuntimeError("shapes differ"), ValueError("out of range"), OSError("gone")),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
    ],
)
def test_other_errors_are_not_taken_for_missing_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_every_setting_that_is_to_be_lowered_exists() -> None:
    from graftwork.specs.reading.load import job_schema

    fields = {field for part in job_schema()["$defs"].values() for field in part.get("properties", {})}
    for stage, known in STAGES.items():
        for setting in known.memory.replace(", or raise", " or").replace(",", " or").split(" or "):
            assert not setting.strip() or setting.strip().split(".")[-1] in fields, f"{stage}: {setting}"


def test_a_full_disk_is_told_in_the_stores_words(tmp_path: object) -> None:
    told = Store(str(tmp_path)).explain(OSError(errno.ENOSPC, "No space left on device"))
    assert told is not None and str(tmp_path) in str(told) and "resume" in str(told)
