"""A job of texts, whole: captions, an encoder, a graft of a PixArt, samples judged by GenEval's rules. Slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graftwork.stages.evaluation.geneval.results import read_results, score
from tests.conftest import Graft, keys, states
from tests.scenes import write_shapes_job

pytestmark = pytest.mark.slow


def test_a_pixart_goes_through_the_whole_job_from_captions_to_geneval(graft: Graft, tmp_path: Path) -> None:
    job = write_shapes_job(tmp_path)
    done = graft("run", str(job), "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    artifacts = tmp_path / ".graftwork" / "artifacts"
    for row in ("rootstock", "stage2"):
        folder, figures = artifacts / keys(outcome)[f"evaluate/{row}"], outcome["results"][row]
        results = read_results(folder / "geneval.jsonl")
        assert [result.place for result in results] == [(number, sample) for sample in (0, 1) for number in range(6)]
        assert figures["geneval:shapes"] == pytest.approx(score(results).overall)
        assert 0 <= figures["counting:shapes"] <= 1 and ("gain:geneval" in figures) == (row != "rootstock")
    assert "geneval:shapes" not in outcome["results"]["heldout"]
    planned = graft("plan", str(job), "--json", "--set", "evaluate.samples=6")
    pending = {step for step, state in states(json.loads(planned.stdout)).items() if state != "cached"}
    assert pending == {"reference/heldout", "evaluate/rootstock", "evaluate/stage2", "evaluate"}
