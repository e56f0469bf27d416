"""A job of texts, whole: captions, an encoder, a grafted PixArt, samples judged by GenEval's rules and CLIP. Slow."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image

from graftwork.models import checkpoints
from graftwork.models.checkpoints.layouts.pixart_transformer import GraftPixArtTransformer2DModel
from graftwork.models.condition import Condition
from graftwork.stages.evaluation.clip import Clip
from graftwork.stages.evaluation.geneval.results import read_results, score
from tests.clips import write_clip
from tests.conftest import Graft, keys, states
from tests.scenes import write_shapes_job

pytestmark = pytest.mark.slow


def test_a_pixart_goes_through_the_whole_job_from_captions_to_geneval(graft: Graft, tmp_path: Path) -> None:
    job, clip = write_shapes_job(tmp_path), write_clip(tmp_path / "clip")
    asked = ["evaluate.keep_samples=true", "evaluate.metrics=[geneval, clip_score, likeness]"]
    asked += [f"evaluate.clip={{kind: clip, path: {clip}}}", f"evaluate.likeness.clip={{kind: clip, path: {clip}}}"]
    overrides = [word for one in asked for word in ("--set", one)]
    done = graft("run", str(job), "--json", *overrides)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    artifacts = tmp_path / ".graftwork" / "artifacts"
    for row in ("rootstock", "stage2"):
        folder, figures = artifacts / keys(outcome)[f"evaluate/{row}"], outcome["results"][row]
        results = read_results(folder / "geneval.jsonl")
        assert [result.place for result in results] == [(number, sample) for sample in (0, 1) for number in range(6)]
        assert figures["geneval:shapes"] == pytest.approx(score(results).overall)
        assert 0 <= figures["counting:shapes"] <= 1 and ("gain:geneval" in figures) == (row != "rootstock")
        records = [json.loads(line) for line in (folder / "clip_score.jsonl").read_text().splitlines()]
        assert len(records) == 12
        assert figures["clip_score:clip"] == pytest.approx(fmean(record["clip_score"] for record in records))
        assert ("gain:clip_score" in figures) == (row != "rootstock")
        assert ("likeness:psnr" in figures) == ("likeness_low:clip:clip" in figures) == (row != "rootstock")
        handed = graft("images", f"{outcome['run']}/{row}", row)
        assert handed.stdout == f"{row}\n", handed.stderr
        require_same_scores(tmp_path / row, Clip(str(clip), torch.device("cpu")), records)
    assert not {"geneval:shapes", "clip_score:clip"} & outcome["results"]["heldout"].keys()
    files = [str(artifacts / keys(outcome)[f"evaluate/{row}"] / "geneval.jsonl") for row in ("stage2", "rootstock")]
    read = json.loads(graft("geneval", files[0], "--beside", files[1], "--detector", "shapes", "--json").stdout)
    assert len(read["results"]) == 11 and read["results"].pop("images") == 12
    assert read["results"].items() <= outcome["results"]["stage2"].items()  # to the bit
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
    assert refused.returncode == 2 and "they belong with scions (01.mha, 03.mha)" in refused.stderr
    planned = graft("plan", str(job), "--json", *overrides, "--set", "evaluate.samples=6")
    pending = {step for step, state in states(json.loads(planned.stdout)).items() if state != "cached"}
    assert pending == {"reference/heldout", "evaluate/rootstock", "evaluate/stage2", "evaluate"}


def require_same_scores(images: Path, clip: Clip, records: list[dict[str, Any]]) -> None:
    """Assert that each image, with the prompt that lies beside it, has the score that the job gave it."""
    for record in records:
        file = images / record["filename"]
        prompt = json.loads((file.parents[1] / "metadata.jsonl").read_text())["prompt"]
        with Image.open(file) as image:
            cosine = (clip.image_vectors([image]) * clip.text_vectors([prompt])).sum()
        assert record["prompt"] == prompt
        assert record["clip_score"] == pytest.approx(100 * max(float(cosine), 0), abs=1e-3)
