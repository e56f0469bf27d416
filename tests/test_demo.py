"""The demo's promises, on the demo itself. Slow: `make test-slow`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from graftwork.models.rootstocks.dit import DiT, DiTConfig
from tests.conftest import ROOT, Graft

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


def test_a_checkpoint_of_another_model_is_one_line(graft: Graft, tmp_path: Path) -> None:
    other = DiT(DiTConfig(input_size=16, in_channels=1, patch=2, depth=2, width=16, heads=2, num_classes=10))
    torch.save(other.state_dict(), tmp_path / "other.pt")
    tiny = str(ROOT / "examples" / "digits-tiny.yaml")
    done = graft("run", tiny, "--set", "weights={kind: checkpoint, path: other.pt}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("graft: weights.path: ") and "other.pt" in line and "; accepted: " in line
