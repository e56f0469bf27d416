"""A whole job that chooses by measurement: scores, costs, a greedy solver, a trial of its plans, finalists. Slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, Graft

pytestmark = pytest.mark.slow

ASKED = (
    "weights.workers=1",
    "graft=[{target: mha, operator: {kind: hyena_x}, layers: {kind: solved}}, "
    "{target: mha, operator: {kind: none}, layers: {kind: solved}}, "
    "{target: mlp, operator: {kind: mlp, ratio: 2}, layers: {kind: solved, blocks: [1, 2]}}, "
    "{kind: parallel, pairs: [[2, 3]], layers: {kind: solved}}]",
    "solve={limits: {flops: 85%, latency_ms: {max: 10000}}, given: greedy, plans: 2, finalists: {steps: 4}}",
    "score={samples: 32}",
    "distill.epochs=4",
    "distill.milestones=[2]",
    "finetune.steps=8",
    "finetune.workers=1",
    "finetune.control=false",
)


@pytest.mark.timeout(900)
def test_a_job_scores_solves_tries_and_finetunes_its_plans(graft: Graft, tmp_path: Path) -> None:
    settings = [word for one in ASKED for word in ("--set", one)]
    done = graft("run", str(ROOT / "examples" / "digits-tiny.yaml"), *settings, "--json", timeout=800)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [*results] == ["heldout", "rootstock", "finalist1", "finalist2", "stage1", "stage2"]
    for row in ("finalist1", "finalist2", "stage1", "stage2"):
        assert 0 < results[row]["flops"] <= 0.85 * results["rootstock"]["flops"]
    assert results["stage1"]["flops"] == results["stage2"]["flops"]
    stage1 = results["stage1"]
    assert stage1["predicted_peak_memory"] > 0 and stage1["measured_latency_ms"] > 0
    (trial,) = (json.loads(path.read_text()) for path in tmp_path.glob(".graftwork/artifacts/*/trial.json"))
    first, second, *others = trial["plans"]
    assert (first["scoring"], second["scoring"]) == ("greedy", "none")
    assert first["error"] == pytest.approx(first["predicted_error"], rel=1e-3)  # of the same samples, greedily: exact
    assert {one["name"] for one in others} <= {"first", "last", "interleaved", "random 1", "random 2", "random 3"}
    assert all(one["predicted"]["flops"] == first["predicted"]["flops"] for one in others)
    measured = {one["name"]: one["measured"] for one in (first, second)}
    assert all(set(one) == {"latency_ms", "peak_memory"} for one in measured.values())
    (decided,) = (json.loads(path.read_text()) for path in tmp_path.glob(".graftwork/artifacts/*/finalists.json"))
    best = min(decided["figures"], key=decided["figures"].get)
    assert best == f"finalist{decided['plan'] + 1}" and decided["by"] == "distance"
    again = graft("run", str(ROOT / "examples" / "digits-tiny.yaml"), *settings, "--json", timeout=100)
    assert again.returncode == 0 and json.loads(again.stdout)["results"] == results
