"""Scions that begin with the weights of the operator that they replace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.artifacts import Folder
from graftwork.models.rootstocks.dit import DiT
from graftwork.models.surgery import inheritance, new_scion, scion_at
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.edits import Edit, Site
from graftwork.specs.operators import HyenaSE, HyenaX, HyenaY, Mamba2, Mha, Mlp, MlpHyenaX, OperatorSpec, Swa
from graftwork.specs.training import DistillSpec
from graftwork.stages.training.batches import TrainingSet
from tests.tiny_distillation import MHA_SITE, run_distill, write_inputs
from tests.tiny_training import TINY, lively

pytestmark = pytest.mark.usefixtures("one_thread", "painted_alone")

ATTENTION = {"in_proj": "qkv", "out_proj": "proj"}


@pytest.mark.parametrize(
    ("target", "operator", "layers"),
    [
        ("mha", Mha(), {"qkv": "qkv", "proj": "proj"}),
        ("mha", Swa(window=2), {"Wqkv": "qkv", "out_proj": "proj"}),
        ("mha", HyenaSE(), ATTENTION),
        ("mha", HyenaX(), ATTENTION),
        ("mha", HyenaY(), ATTENTION),
        ("mha", Mamba2(d_state=8, headdim=8), {}),  # twice as wide within
        ("mlp", Mlp(ratio=4), {"fc1": "fc1", "fc2": "fc2"}),
        ("mlp", Mlp(ratio=3), {}),
        ("mlp", MlpHyenaX(ratio=4), {"out_proj": "fc2"}),
        ("mlp", MlpHyenaX(ratio=2), {}),
    ],
    ids=str,
)
def test_layers_of_one_shape_are_taken_whole_and_all_else_is_drawn(
    target: Any, operator: OperatorSpec, layers: dict[str, str]
) -> None:
    model, edit = lively(DiT(TINY)), Edit(site=Site(block=1, target=target), operator=operator)
    fresh, scion, original = new_scion(model, edit, 0), new_scion(model, edit, 0), scion_at(model, edit.site)
    weights = inheritance(scion, edit, original)
    scion.load_state_dict(weights, strict=False)
    theirs, expected = original.state_dict(), fresh.state_dict()
    for own, source in layers.items():
        expected |= {f"{own}.{kind}": theirs[f"{source}.{kind}"] for kind in ("weight", "bias")}
    assert set(weights) == {f"{own}.{kind}" for own in layers for kind in ("weight", "bias")}
    assert all(torch.equal(value, expected[name]) for name, value in scion.state_dict().items())


def test_a_window_over_all_tokens_begins_as_the_attention_that_it_replaces() -> None:
    model, edit = lively(DiT(TINY)), Edit(site=MHA_SITE, operator=Swa(window=TINY.place.num_tokens))
    scion, original = new_scion(model, edit, 0), scion_at(model, MHA_SITE)
    scion.load_state_dict(inheritance(scion, edit, original))
    x = torch.randn(2, TINY.place.num_tokens, TINY.width)
    torch.testing.assert_close(scion(x), original(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [{"epochs": 1}, {"passes": 1}], ids=str)
def test_a_step_begins_with_what_it_inherits_and_tells(
    store: Store, data: TrainingSet, tmp_path: Path, budget: dict[str, Any]
) -> None:
    inputs: dict[str, Folder] = write_inputs(tmp_path, lively(DiT(TINY)), data)
    errors = {}
    for start in ("fresh", "inherited"):
        out = tmp_path / start
        # A rate at which nothing is learned: what is measured is the beginning.
        run_distill(
            store,
            start,
            inputs,
            out,
            edit=Edit(site=MHA_SITE, operator=Swa(window=16)),
            lr=1e-12,
            start=start,
            **budget,
        )
        told = json.loads((out / "distill.json").read_text())
        errors[start] = told["relative_error"]
        assert told.get("inherited") == (
            None if start == "fresh" else ["Wqkv.weight", "Wqkv.bias", "out_proj.weight", "out_proj.bias"]
        )
    assert errors["inherited"] < 1e-6 and errors["fresh"] > 0.1


def test_what_has_nothing_to_inherit_says_so(store: Store, data: TrainingSet, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, lively(DiT(TINY)), data)
    edit = Edit(site=MHA_SITE, operator=Mamba2(d_state=8, headdim=8))
    run_distill(store, "a", inputs, tmp_path / "out", edit=edit, epochs=1, start="inherited")
    (line,) = json.loads((tmp_path / "out" / "notes.json").read_text())
    assert line == "01.mha: mamba2 has no layer of the shape of the rootstock's there; it began fresh"
    assert DistillSpec().start == "fresh"
