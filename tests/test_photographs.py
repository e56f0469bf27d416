"""A job on photographs: a published graft, grafted further in a VAE's latents at two targets, and exported."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from graftwork.models import checkpoints
from graftwork.models.numerics.streams import initialising
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.models.surgery import graft as graft_into
from graftwork.specs.edits import Edit, Site
from graftwork.specs.operators import HyenaY
from tests.conftest import Graft, states
from tests.vaes import SIDE, make_vae

JOB = """
name: photos
data: {kind: image_folder, path: photos, image_size: SIDE, heldout: 0.25, classes: 3}
codec: {kind: vae, path: vae, factor: 2}
model: {kind: dit, depth: 3, width: 24, heads: 2, patch: 2}
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
  rows: [stage2]
  keep_samples: true
  reference: photos/class-0
  inception: INCEPTION
  sampler: {kind: ancestral, steps: 4, guidance: 1.5}
"""


@pytest.mark.slow
def test_a_published_graft_is_grafted_further_at_two_targets_in_a_vaes_latents(
    graft: Graft, tmp_path: Path, weights: Path
) -> None:
    """A graft's `.pt` in the published layout, RGB images, a VAE, edits at both targets, ZeRO 3 in bf16, FID."""
    pixels = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / "photos" / f"class-{label}").mkdir(parents=True)
        for number in range(12):
            image = pixels.integers(0, 256, (SIDE + 4, SIDE + 8, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "photos" / f"class-{label}" / f"{number}.png")
    make_vae(tmp_path / "vae")
    config = DiTConfig(input_size=SIDE // 2, in_channels=4, patch=2, depth=3, width=24, heads=2, num_classes=3)
    with initialising(0, "rootstock"):
        rootstock = DiT(config)
        rootstock.initialise()
        graft_into(rootstock, [Edit(site=Site(block=1, target="mha"), operator=HyenaY(kernel=3))], seed=0)
    published = {"ema": rootstock.state_dict(), "opt": {}, "args": argparse.Namespace(model="DiT")}
    torch.save(published, tmp_path / "rootstock.pt")
    (tmp_path / "job.yaml").write_text(JOB.replace("SIDE", str(SIDE)).replace("INCEPTION", str(weights)))

    done = graft("run", "job.yaml", "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert [name for name in states(outcome) if name.startswith("distill/")] == [
        *("distill/00.mha", "distill/00.mlp", "distill/01.mlp", "distill/02.mha", "distill/02.mlp")
    ]
    results = outcome["results"]
    assert list(results) == ["heldout", "stage2"]
    assert results["stage2"]["params"] < sum(value.numel() for value in rootstock.parameters())
    assert all(columns["fid"] > 0 and "distance" not in columns for columns in results.values())
    samples = [np.load(path) for path in (tmp_path / ".graftwork" / "artifacts").glob("*/samples.npy")]
    assert len(samples) == 1 and all(part.shape == (12, 3, SIDE, SIDE) and part.dtype == np.uint8 for part in samples)

    done = graft("export", outcome["run"], "exported", "--as", "published")
    assert done.returncode == 0, done.stderr
    _, edits = checkpoints.read(tmp_path / "exported", heads=2)
    kinds = {str(edit.site): edit.operator.kind for edit in edits}
    mlps = {f"0{block}.mlp": "mlp" for block in range(3)}
    assert kinds == {"00.mha": "swa", "01.mha": "hyena_y", "02.mha": "swa", **mlps}
    assert outcome["run"] in (tmp_path / "exported" / "README.md").read_text()
