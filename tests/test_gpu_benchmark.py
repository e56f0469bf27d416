"""`make gpu`: on this machine the very same code at toy sizes, and one line where there is no GPU."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, report
from graftwork.models.operators import kernels
from graftwork.stages.training import microbatches
from tests.conftest import ROOT
from tests.test_operators import KERNELS

BARE = ["torch", "pydantic"]
WHOLE = [*BARE, "numpy", "safetensors", "PyYAML", "psutil"]

# A process in which nothing is installed but some packages, and what those require.
ONLY = """
import runpy, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

ABSENT = set(sys.argv.pop(1).split(","))
sys.meta_path[:] = map(Without, sys.meta_path)
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


def required(packages: list[str]) -> set[str]:
    """The distributions that these packages need, with them, by normal name."""
    known: set[str] = set()
    open_ = list(packages)
    while open_:
        name = re.sub(r"[-_.]+", "-", open_.pop()).lower()
        if name in known:
            continue
        known.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # one for another platform
            continue
        open_ += [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]
    return known


def absent(packages: list[str]) -> set[str]:
    """The modules of all other packages that are installed here, but for the project's own."""
    needed = required(packages) | {"graftwork"}
    modules = importlib.metadata.packages_distributions()
    return {
        module
        for module, owners in modules.items()
        if not needed & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
    }


def small_run(packages: list[str], tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """Where only these are installed: what is printed, and each part by its title."""
    line = ["--device", "cpu", "--small", "--json", str(tmp_path / "gpu.json")]
    command = [sys.executable, "-c", ONLY, ",".join(absent(packages)), *line]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, {part["title"]: part for part in json.loads((tmp_path / "gpu.json").read_text())["parts"]}


def test_without_ray_deepspeed_mlflow_and_diffusers_every_part_is_measured(tmp_path: Path) -> None:
    assert {"ray", "deepspeed", "mlflow", "diffusers", "einops", "matplotlib", "scipy"} <= absent(WHOLE)
    printed, parts = small_run(WHOLE, tmp_path)
    assert list(parts) == list(gpu.PARTS)
    assert not [part["skipped"] for part in parts.values() if "skipped" in part]
    operators = parts["Operators, forward and back"]["rows"]
    assert len(operators) == 8 and {row["agrees"] for row in operators} == {"yes"}
    firsts = {"A training step of DiT": "plain", "Distillation of a site": "public", "Sampling": "public",
              "A pass and an image of PixArt": "PyTorch's attention"}  # fmt: skip
    for title, word in firsts.items():
        public, *ours = parts[title]["rows"]
        assert f"\n{title}\n" in printed and word in str(public) and ours


def test_with_torch_and_pydantic_alone_the_rest_is_skipped_and_said_to_be(tmp_path: Path) -> None:
    printed, parts = small_run(BARE, tmp_path)
    skipped = {title: part["skipped"] for title, part in parts.items() if "skipped" in part}
    absent = {
        "A training step of DiT": "numpy",
        "Distillation of a site": "numpy",
        "A pass and an image of PixArt": "yaml",
    }
    assert skipped == {title: f"{package} is not installed" for title, package in absent.items()}
    for title, reason in skipped.items():
        assert f"{title}: skipped: {reason}" in printed


def looks_only_at_the_present(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> Tensor:
    return x * weight[:, -1:] + bias[:, None]


def test_a_kernel_that_computes_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    monkeypatch.setattr(kernels, "generation", lambda device: (9, 0))
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "fused", None)
        monkeypatch.setattr(kernel, "failure", "not in this test")
    monkeypatch.setattr(kernels.CAUSAL_CONVOLUTION, "failure", None)
    monkeypatch.setattr(kernels.CAUSAL_CONVOLUTION, "fused", looks_only_at_the_present)
    session = gpu.Session(torch.device("cpu"), small=True, peaks={"fp32": 1e9})
    part = gpu.measure_operators(session)
    rows = {row["operator"]: row for row in part["rows"]}
    wrong = {kind for kind, row in rows.items() if row["agrees"] == "NO"}
    assert wrong == {kind for kind, row in rows.items() if row["computed by"] == "causal-conv1d"}
    assert wrong == {"hyena_se", "hyena_x", "hyena_y", "mamba2", "mlp_hyena_x"}
    assert part["facts"]["mha, why not flash-attn"].startswith("it takes torch.float16")
    assert len(session.differing) == 5 and session.differing[0].startswith("hyena_se: ")


def test_what_differs_ends_the_command_with_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differing(session: gpu.Session) -> dict[str, Any]:
        session.require("swa: output is 1 apart", False)
        return {"rows": [], "facts": {}}

    monkeypatch.setattr(gpu, "PARTS", {"Operators": differing})
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--small"])
    with pytest.raises(SystemExit) as caught:
        gpu.main()
    assert caught.value.code == 1 and "DIFFERS: swa: output is 1 apart" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_line() -> None:
    done = subprocess.run(
        ["make", "--silent", "gpu", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    line, *rest = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout and all(line.startswith("make") for line in rest)
    assert line.startswith(f"no GPU here, or one that torch {torch.__version__}") and "NVIDIA driver: " in line
    assert line.endswith("; or --device cpu --small")


def test_a_training_whose_passes_are_tried_out_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbatches, "TRIED_ON", ("cpu",))  # as on a GPU
    monkeypatch.setitem(report.LARGE, "cpu", (64, 2**10))
    session = gpu.Session(torch.device("cpu"), small=True, peaks={"fp32": 1e9})
    plain, ours = gpu.measure_training(session)["rows"]
    assert plain["loop"] == "plain loop" and ours["apart"] < 1e-4


@pytest.mark.parametrize(("gigabytes", "batch"), [(80, 32), (48, 16), (24, 4), (12, 1)])
def test_a_training_step_takes_as_many_samples_as_the_card_holds(
    gigabytes: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert gpu.fitting(gpu.Session(torch.device("cuda"), small=False), 32) == batch


def test_full_sizes_are_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu"])
    with pytest.raises(SystemExit) as caught:
        gpu.main()
    assert caught.value.code == 2 and "accepted only with --small" in capsys.readouterr().err
