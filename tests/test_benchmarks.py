"""The benchmarks that no other test runs, at toy sizes: they come to an end, and what they hold together agrees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import operators, pixart, report, solver, text_to_image
from graftwork.stages.evaluation import samples
from graftwork.stages.synthesis import synthesis
from graftwork.stages.text import encode
from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(report.LARGE, "cpu", (64, 2**10))


@pytest.mark.parametrize("more", [[], ["--forward"]], ids=["forward and back", "forward"])
def test_operators_stand_beside_attention_as_diffusers_runs_it(more: list[str]) -> None:
    sizes = "--precision fp32 --width 16 --heads 2 --batch 2 --rounds 1 --operators hyena_x mlp"
    options = operators.arguments().parse_args([*sizes.split(), *more])
    rows = operators.measured(16, options, CPU, peak=1e9)
    assert [row["operator"] for row in rows] == ["attention", "mha", "hyena_x", "mlp"]
    assert [operators.FASTER in row for row in rows] == [True, True, True, False]
    assert all(row["results apart"] < 1e-5 for row in rows[1:3])


TINY = "--pixels 32 --layers 2 --width 32 --heads 2 --caption-channels 16 --text-tokens 8 --steps 2 --rounds 1"


def test_pixart_is_held_to_what_diffusers_computes() -> None:
    options = pixart.arguments().parse_args([*TINY.split(), "--precision", "fp32"])
    rows, facts = pixart.measured(options, CPU)
    measured = [row["way"] for row in rows if "pass, ms" in row]
    assert measured == ["diffusers", pixart.ROOTSTOCK, pixart.GRAFT]
    published = [row["published, times faster"] for row in rows[len(measured) :]]
    assert published == [1.43, 1.79] and not pixart.disagreements(facts)
    assert facts["an image"] == "2 steps of dpmsolver++, guidance 4.5, and the VAE"
    assert pixart.disagreements({"outputs of a pass apart": float("nan"), "rounds": 1}) == [
        "outputs of a pass apart: nan"
    ]


def test_the_graft_of_pixart_is_the_published_one_and_half_of_another_depth() -> None:
    parse = pixart.arguments().parse_args
    blocks = [edit.site.block for edit in pixart.edits_of(pixart.job_of(parse([])))]
    assert blocks == [8, 10, 12, 14, 16, 18, *range(20, 28)]
    assert [edit.site.block for edit in pixart.edits_of(pixart.job_of(parse(["--layers", "4"])))] == [1, 3]


def in_this_process(work: Any, shared: Any, items: Sequence[Any], _: object) -> Iterator[Any]:
    return (work(shared, item, CPU) for item in items)


SMALL_JOB = """
extends: {example}
data: {{batch: 4, sampler: {sampler}}}
evaluate: {{batch: 4, sampler: {sampler}}}
"""


def test_steps_of_text_to_image_are_held_to_their_bare_loops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sampler = "{kind: scheduler, name: dpmsolver++, steps: 2, guidance: 1.5, guided_channels: all}"
    (tmp_path / "job.yaml").write_text(SMALL_JOB.format(example=text_to_image.JOB, sampler=sampler))
    monkeypatch.setattr(text_to_image, "JOB", tmp_path / "job.yaml")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(encode, "WORTH_A_STREAM", 9)
    for module in (synthesis, samples):
        monkeypatch.setattr(module, "fan_out", in_this_process)
    shape = dict.fromkeys(text_to_image.ENCODER, 8)
    shape["num_layers"] = 1
    text = text_to_image.text_of(tmp_path / "texts", 1, shape, CPU)
    steps = [text, *text_to_image.samples_of(tmp_path / "samples", 2, CPU)]
    assert [step.name for step in steps] == ["text", "synthesis", "evaluate/rootstock"]
    assert [step.units for step in steps] == [256, 8, 8]
    for step in steps:
        row = step.row(1)
        assert row["share of the bare loop"] > 0 and row["apart, of what may be"] <= 1
    one, *others = steps[1].bare()
    assert steps[1].apart([one + 0.1, *others]) > 1


def test_the_solver_is_held_to_the_usual_program() -> None:
    rows = [*solver.measured([solver.Size(2, 2, 3, pairs=True)], [*solver.CASES], [0], plans=2, plain_seconds=9.0)]
    assert [row["case"] for row in rows] == [*solver.CASES]
    assert all(row["gap"] == row["plain, gap"] == 0 for row in rows)
