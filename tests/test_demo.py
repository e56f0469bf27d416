"""The demo's promises, on the demo itself, and jobs of other kinds than its own. Slow: `make test-slow`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from graftwork.models import checkpoints
from graftwork.models.dit import DiT, DiTConfig, initialise
from graftwork.models.streams import generator, initialising
from graftwork.models.surgery import graft as graft_into
from graftwork.specs.graft import Edit, Site
from graftwork.specs.operators import HyenaY
from tests.conftest import ROOT, Graft, states

pytestmark = pytest.mark.slow


@pytest.mark.timeout(2700)
def test_the_demo_reaches_the_quality_that_it_promises(graft: Graft) -> None:
    done = graft("run", str(ROOT / "examples" / "digits.yaml"), "--json", timeout=2400)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert results["rootstock"]["agreement"] >= 0.95
    assert results["stage2"]["distance"] <= 1.3 * results["rootstock"]["distance"]
    assert results["stage2"]["distance"] < results["random_init"]["distance"]
    assert results["heldout"]["distance"] < results["rootstock"]["distance"]


def test_a_published_graft_and_an_image_folder_are_grafted_further_at_two_targets(
    graft: Graft, tmp_path: Path, weights: Path
) -> None:
    """A graft's `.pt` in the published layout, RGB images, edits at both targets, ZeRO 3 in bf16, FID; exported."""
    pixels = generator(0, "pixels")
    for label in range(3):
        (tmp_path / "photos" / f"class-{label}").mkdir(parents=True)
        for number in range(12):
            image = torch.randint(0, 256, (20, 24, 3), generator=pixels).to(torch.uint8).numpy().astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "photos" / f"class-{label}" / f"{number}.png")
    with initialising(0, "rootstock"):
        rootstock = DiT(DiTConfig(input_size=16, in_channels=3, patch=4, depth=3, width=24, heads=2, num_classes=3))
        initialise(rootstock)
        graft_into(rootstock, [Edit(site=Site(block=1, target="mha"), operator=HyenaY(kernel=3))], seed=0)
    published = {"ema": rootstock.state_dict(), "opt": {}, "args": argparse.Namespace(model="DiT")}
    torch.save(published, tmp_path / "rootstock.pt")
    (tmp_path / "job.yaml").write_text(
        """
name: photos
data: {kind: image_folder, path: photos, image_size: 16, heldout: 0.25}
model: {kind: dit, depth: 3, width: 24, heads: 2, patch: 4}
weights: {kind: checkpoint, path: rootstock.pt}
graft:
  - {target: mha, operator: {kind: swa, window: 2}, layers: {kind: explicit, blocks: [0, 2]}}
  - {target: mlp, operator: {kind: mlp, ratio: 1.5}, layers: {kind: all}}
distill: {samples: 27, epochs: 2, batch: 9, milestones: []}
finetune:
  {fraction: 1.0, steps: 4, batch: 4, warmup: 0, precision: bf16, workers: 2, deepspeed: {zero: 3}, control: false}
evaluate:
  samples: 12
  batch: 6
  metrics: [fid]
  reference: photos/class-0
  inception: INCEPTION
  sampler: {kind: ancestral, steps: 4, guidance: 1.5}
""".replace("INCEPTION", str(weights))
    )
    done = graft("run", "job.yaml", "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert [name for name in states(outcome) if name.startswith("distill/")] == [
        *("distill/00.mha", "distill/00.mlp", "distill/01.mlp", "distill/02.mha", "distill/02.mlp")
    ]
    results = outcome["results"]
    assert list(results) == ["heldout", "rootstock", "stage1", "stage2"]
    assert results["stage2"]["params"] < results["rootstock"]["params"]
    assert all(columns["fid"] > 0 and "distance" not in columns for columns in results.values())
    done = graft("export", outcome["run"], "exported", "--as", "published")
    assert done.returncode == 0, done.stderr
    _, edits = checkpoints.read(tmp_path / "exported", heads=2)
    kinds = {str(edit.site): edit.operator.kind for edit in edits}
    mlps = {f"0{block}.mlp": "mlp" for block in range(3)}
    assert kinds == {"00.mha": "swa", "01.mha": "hyena_y", "02.mha": "swa", **mlps}
    assert outcome["run"] in (tmp_path / "exported" / "README.md").read_text()


def test_a_checkpoint_of_another_model_is_one_line(graft: Graft, tmp_path: Path) -> None:
    other = DiT(DiTConfig(input_size=16, in_channels=1, patch=2, depth=2, width=16, heads=2, num_classes=10))
    torch.save(other.state_dict(), tmp_path / "other.pt")
    tiny = str(ROOT / "examples" / "digits-tiny.yaml")
    done = graft("run", tiny, "--set", "weights={kind: checkpoint, path: other.pt}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("graft: weights.path: ") and "other.pt" in line and "; accepted: " in line
