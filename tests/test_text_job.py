"""A job of texts, whole: captions, an encoder, a graft of a PixArt, samples judged by GenEval's rules. Slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from graftwork.models import checkpoints
from graftwork.models.checkpoints.layouts.pixart_transformer import GraftPixArtTransformer2DModel
from graftwork.models.condition import Condition
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
    run = outcome["run"]
    done = graft("export", run, "adapted", "--as", "diffusers", "--adapters", "beside")
    assert done.returncode == 0, done.stderr
    transformer = GraftPixArtTransformer2DModel.from_pretrained(tmp_path / "adapted")
    PeftModel.from_pretrained(transformer, tmp_path / "adapted" / "adapters")
    merged = checkpoints.load(artifacts / keys(outcome)["finetune"])[0].eval()
    condition = Condition(text=torch.randn(2, 5, 32), mask=torch.ones(2, 5))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 900])
    with torch.no_grad():
        adapted = transformer(x, condition.text, t, encoder_attention_mask=condition.mask).sample
        torch.testing.assert_close(adapted, merged(x, t, condition), rtol=1e-5, atol=1e-5)
    refused = graft("export", run, "alone", "--as", "diffusers", "--adapters", "alone")
    assert refused.returncode == 2 and "scions were trained with them (01.mha, 03.mha)" in refused.stderr
    planned = graft("plan", str(job), "--json", "--set", "evaluate.samples=6")
    pending = {step for step, state in states(json.loads(planned.stdout)).items() if state != "cached"}
    assert pending == {"reference/heldout", "evaluate/rootstock", "evaluate/stage2", "evaluate"}
