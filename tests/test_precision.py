"""Precision: what a GPU computes products in, step by step, seen on a CPU by the switches and types at each product."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graftwork.cluster.session import runtime
from graftwork.models.condition import Condition
from graftwork.models.numerics.precision import TRITON_PRECISION, allow_tf32, computing, products
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.models.sampling.guidance import guided
from graftwork.specs.sampler import AncestralSampler
from graftwork.specs.training import Precision
from tests.products import Products
from tests.small import lively

CPU = torch.device("cpu")
TINY = DiTConfig(input_size=8, in_channels=4, patch=2, depth=2, width=16, heads=2, num_classes=3)


@pytest.fixture(autouse=True)
def _as_pytorch_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    allow_tf32(matrices=False, convolutions=True)
    monkeypatch.delenv(TRITON_PRECISION, raising=False)
    yield
    allow_tf32(matrices=False, convolutions=True)


def switches() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@triton.jit
def product(a, b, c, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """c = a b, of square matrices, as a kernel that says nothing of precision has it."""
    rows, columns = tl.arange(0, size)[:, None] * size, tl.arange(0, size)[None, :]
    tl.store(c + rows + columns, tl.dot(tl.load(a + rows + columns), tl.load(b + rows + columns)))


@pytest.mark.filterwarnings("ignore")  # of what changes in Triton's next version
@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_triton_compiles_products_of_the_precision_for_an_h100(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: Precision, tf32: bool
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    source = ASTSource(product, dict.fromkeys("abc", "*fp32") | {"size": "constexpr"}, {(3,): 32})
    with computing(precision, CPU):
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert (".tf32" in code) == tf32
    assert ("fma.rn.f32" in code) != tf32


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.tensor([0, 3])


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_a_precision_holds_for_matrices_and_convolutions_and_is_restored(precision: Precision, tf32: bool) -> None:
    with products(precision):
        assert switches() == (tf32, tf32)
        with computing("fp32", CPU):
            assert switches() == (False, False)
        assert switches() == (tf32, tf32)
    assert switches() == (False, True)
    assert TRITON_PRECISION not in os.environ
    with pytest.raises(ZeroDivisionError), computing(precision, CPU):
        assert switches() == (tf32, tf32)
        raise ZeroDivisionError
    assert switches() == (False, True)


def test_a_task_computes_in_fp32_until_its_step_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_gpu_ids", list)
    for name in ("end_with_parent", "keep_freed"):
        monkeypatch.setattr(runtime, name, lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    allow_tf32(matrices=True, convolutions=True)
    assert runtime.settle() == CPU
    assert switches() == (False, False)


def test_on_a_cpu_tf32_is_fp32_to_the_bit() -> None:
    model, batch = lively(DiT(TINY)), inputs()
    with torch.no_grad(), computing("tf32", CPU):
        found = model(*batch)
    assert torch.equal(found, model(*batch))


def stream_dtypes(model: DiT, precision: Precision) -> tuple[set[torch.dtype], Products]:
    """Of what goes into each block and the final layer; and the products."""
    seen: set[torch.dtype] = set()
    for module in (*model.blocks, model.final_layer):
        module.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    x, t, y = inputs()
    with torch.no_grad(), computing(precision, CPU), Products() as counted:
        model(x.to(model.x_embedder.proj.weight.dtype), t, y)
    return seen, counted


def test_in_bf16_products_are_bf16_and_the_stream_is_fp32() -> None:
    dtypes, counted = stream_dtypes(lively(DiT(TINY)), "bf16")
    assert dtypes == {torch.float32}
    assert set(counted.matrices) == set(counted.convolutions) == {"bf16"}


def test_a_model_whose_weights_an_engine_made_bf16_is_bf16_throughout() -> None:
    model = lively(DiT(TINY)).bfloat16()
    model.pos_embed = model.pos_embed.float()  # as an engine may leave it
    dtypes, counted = stream_dtypes(model, "fp32")
    assert dtypes == {torch.bfloat16}
    assert set(counted.matrices) == set(counted.convolutions) == {"bf16"}


@pytest.mark.parametrize("channels", ["first_three", "all"])
def test_guidance_is_taken_in_fp32_of_what_a_network_puts_out_in_bf16(channels: str) -> None:
    x, t, y = inputs()
    output = torch.randn(4, 8, 8, 8).bfloat16()
    sampler = AncestralSampler(guidance=1.5, guided_channels=channels)
    condition = Condition(labels=y)
    found = guided(lambda *_: output, condition, TINY.conditioner, sampler)(x, t, condition)
    with_label, without = output.double().chunk(2)
    count = 4 if channels == "all" else 3
    expected = without + 1.5 * (with_label - without)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, :count].double(), expected[:, :count], rtol=1e-6, atol=1e-6)
    assert torch.equal(found[:, count:].double(), with_label[:, count:])
