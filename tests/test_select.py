"""`select`: each strategy's choice, by the evidence that the steps before it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from benchmarks.artifacts import Folder
from graftwork.specs.edits import Edit, OperatorEdits, ParallelEdits
from graftwork.specs.layers.union import Layers
from graftwork.specs.operators import HyenaY
from graftwork.stages.artifacts import plan
from graftwork.stages.artifacts.evidence import (
    Distilled,
    LocalityCurves,
    Outputs,
    Profile,
    QuarterCurves,
    write_distilled,
    write_profile,
    write_scored,
)
from graftwork.stages.catalog.select import Rule, SelectParams
from graftwork.stages.contract import Context
from graftwork.stages.selection import select
from tests.small import a_score
from tests.tiny_training import Reports

DEPTH = 4
MASS = (0.5, 0.9, 0.1, 0.9)  # of each block's attention, within a band of 1 token; patches see it the other way round
ERRORS = (0.3, 0.1, 0.4, 0.2)
SCORES = ((0.05, 0.1), (0.3, -0.3), (0.02, 0.2), (0.4, 0.0))  # the output's error, and the change of the loss


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Folder]:
    folders = {}
    for block, error in enumerate(ERRORS):
        folders[f"scions/0{block}.mha"] = Folder(f"s{block}", tmp_path / f"scion{block}")
        (tmp_path / f"scion{block}").mkdir()
        found = Distilled(loss="l1", loss_because="", heldout_error=2 * error, relative_error=error, best_epoch=1)
        write_distilled(tmp_path / f"scion{block}", found)
        folders[f"scores/0{block}.mha"] = Folder(f"score{block}", tmp_path / f"score{block}")
        (tmp_path / f"score{block}").mkdir()
        write_scored(tmp_path / f"score{block}", a_score(*SCORES[block]))
    (tmp_path / "profile").mkdir()
    tokens = {f"0{block}.mha": (0.0, mass, 1.0) for block, mass in enumerate(MASS)}
    patches = {f"0{block}.mha": (0.0, 1 - mass) for block, mass in enumerate(MASS)}
    curves = LocalityCurves(tokens=tokens, patches=patches, by_quarter=QuarterCurves(tokens={}, patches={}))
    nothing: dict[str, Outputs] = {}
    write_profile(tmp_path / "profile", Profile(outputs=nothing, locality=curves))
    (tmp_path / "search").mkdir()
    groups = [{"blocks": [0, 1], "confidence": 0.8}, {"blocks": [2, 3], "confidence": 0.6}]
    (tmp_path / "search" / "search.json").write_text(json.dumps({"chosen": [1, 2], "groups": groups}))
    for role in ("profile", "search/0"):
        folders[role] = Folder(role, tmp_path / role.split("/")[0])
    return folders


def chosen(inputs: dict[str, Folder], out: Path, *edits: Any) -> list[dict[str, Any]]:
    """The plan that a job with these edits comes to."""
    rules = tuple(Rule(edits=edit.edits(DEPTH), layers=getattr(edit, "layers", None)) for edit in edits)
    nothing: Any = None
    params = SelectParams(depth=DEPTH, rules=rules)
    cpu = torch.device("cpu")
    select.run(Context("select", params, inputs, out, nothing, Reports(), nothing, cpu))
    plan: list[dict[str, Any]] = json.loads((out / "plan.json").read_text())
    return plan


def edits(**layers: Any) -> OperatorEdits:
    return OperatorEdits(target="mha", operator=HyenaY(), layers=layers)


CASES: list[tuple[dict[str, Any], tuple[int, ...], tuple[float, ...], str]] = [
    ({"kind": "most_local", "band": 1}, (1, 3), (0.9, 0.9), "mass within 1 tokens"),
    ({"kind": "most_local", "band": 1, "count": 3}, (0, 1, 3), (0.5, 0.9, 0.9), "mass within 1 tokens"),
    ({"kind": "most_local", "band": 1, "distance": "patches", "count": 1}, (2,), (0.9,), "mass within 1 patches"),
    ({"kind": "most_local", "band": 9, "count": 2}, (0, 1), (1.0, 1.0), "mass within 9 tokens"),
    ({"kind": "least_local", "band": 1}, (0, 2), (0.5, 0.1), "mass within 1 tokens"),
    ({"kind": "lowest_error"}, (1, 3), (0.1, 0.2), "relative error"),
    ({"kind": "lowest_error", "ratio": 0.75}, (0, 1, 3), (0.3, 0.1, 0.2), "relative error"),
    (
        {"kind": "learned", "groups": 2, "keep": 1, "pinned": []},
        (1, 2),
        (0.8, 0.6),
        "probability that the gates give to the choice",
    ),
    ({"kind": "lowest_score"}, (0, 2), (0.05, 0.02), "error at the model's output"),
    ({"kind": "lowest_score", "error": "loss", "count": 1}, (1,), (-0.3,), "change of the diffusion loss"),
    ({"kind": "last", "count": 1}, (3,), (0.2,), "relative error"),
]


@pytest.mark.parametrize(("layers", "blocks", "scores", "score_is"), CASES, ids=lambda value: str(value)[:40])
def test_a_strategy_chooses_by_its_evidence(
    inputs: dict[str, Folder],
    tmp_path: Path,
    layers: dict[str, Any],
    blocks: tuple[int, ...],
    scores: tuple[float, ...],
    score_is: str,
) -> None:
    plan = chosen(inputs, tmp_path, edits(**layers))
    assert tuple(edit["edit"]["site"]["block"] for edit in plan) == blocks
    assert tuple(edit["score"] for edit in plan) == pytest.approx(scores)
    assert {edit["score_is"] for edit in plan} == {score_is}
    assert all(edit["reason"] and edit["relative_error"] == ERRORS[edit["edit"]["site"]["block"]] for edit in plan)


def test_the_plan_of_several_edits_is_in_the_order_in_which_they_are_made(
    inputs: dict[str, Folder], tmp_path: Path
) -> None:
    first, last = edits(kind="explicit", blocks=[0]), edits(kind="explicit", blocks=[3])
    inputs["scions/01.pair"] = inputs["scions/01.mha"]
    chosen(inputs, tmp_path, ParallelEdits(pairs=((1, 2),)), last, first)
    chosen_edits: tuple[Edit, ...] = plan.read_plan(tmp_path)
    assert [str(edit.site) for edit in chosen_edits] == ["00.mha", "03.mha", "01.pair"]


def test_every_strategy_of_the_spec_is_tested_here() -> None:
    kinds = {member.model_fields["kind"].default for member in get_args(get_args(Layers)[0])}
    static = {"all", "explicit", "interleaved", "first", "middle"}
    static.add("solved")  # by the job's limits: in test_solving.py
    assert {case[0]["kind"] for case in CASES} >= kinds - static
