"""Distillation steps small enough for a test: their inputs, and what runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.artifacts import Folder
from graftwork.models import checkpoints
from graftwork.models.rootstocks.dit import DiT
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.edits import Edit, Site
from graftwork.specs.operators import HyenaX, HyenaY, Mlp, NoOperator
from graftwork.specs.resources import StepResources
from graftwork.specs.training import DistillSpec
from graftwork.stages.artifacts.evidence import LocalityCurves, Outputs, Profile, QuarterCurves, write_profile
from graftwork.stages.artifacts.latents import LatentsMeta, write_meta
from graftwork.stages.catalog.distill import DistillParams
from graftwork.stages.contract import Context, TaskScope
from graftwork.stages.distillation import distill
from graftwork.stages.training.batches import TrainingSet
from tests.tiny_training import CPU, Reports, latents_of

MHA_SITE, MLP_SITE = Site(block=1, target="mha"), Site(block=0, target="mlp")
MHA_EDIT = Edit(site=MHA_SITE, operator=HyenaY())
MLP_EDIT = Edit(site=MLP_SITE, operator=Mlp(ratio=2))
# Three scions for one site, and one for another.
SEVERAL = (MHA_EDIT, *(Edit(site=MHA_SITE, operator=HyenaX(kernel=one), option=one) for one in (1, 2)), MLP_EDIT)
DROPPED = Edit(site=Site(block=1, target="mlp"), operator=NoOperator())


def make_context(store: Store, key: str, out: Path, report: Reports | None = None, **changes: Any) -> Context:
    edit, within = changes.pop("edit", MHA_EDIT), changes.pop("within", ())
    recipe = {"samples": 24, "batch": 10, "lr": 0.01, "milestones": (3,), "checkpoint_every": 2}
    recipe |= {"epochs": 7} if "passes" not in changes else {}
    return Context(
        step=f"distill/{edit.site}",
        params=DistillParams(seed=0, edit=edit, within=within, recipe=DistillSpec(**{**recipe, **changes})),
        inputs={},
        out=out,
        partial=store.partial(key),
        report=report or Reports(),
        resources=StepResources(),
        device=CPU,
    )


def keep_profile(folder: Path, kurtosis: dict[Site, float]) -> None:
    """A profile in which only the outputs' kurtosis says something."""
    rest: dict[str, Any] = {"mean": 0, "std": 1, "largest": 5, "largest_magnitudes": (5,), "quantiles": {}}
    outputs = {str(site): Outputs(excess_kurtosis=value, **rest) for site, value in kurtosis.items()}
    nothing: dict[str, Any] = {"tokens": {}, "patches": {}}
    curves = LocalityCurves(**nothing, by_quarter=QuarterCurves(**nothing))
    write_profile(folder, Profile(outputs=outputs, locality=curves))


def write_inputs(tmp_path: Path, rootstock: DiT, data: TrainingSet, edits: Sequence[Edit] = ()) -> dict[str, Folder]:
    """Write 24 latents to train on, 6 held-out ones, the rootstock with the edits that it carries, and a profile."""
    features, base = tmp_path / "features", tmp_path / "base"
    features.mkdir()
    base.mkdir()
    for name, part in (("training", slice(0, 24)), ("heldout", slice(24, 30))):
        np.save(features / f"{name}_latents.npy", latents_of(data)[part].numpy())
        np.save(features / f"{name}_labels.npy", data.condition.require("labels")[part].numpy())
    meta = LatentsMeta(codec="pixel", shape=(1, 8, 8), classes=("a", "b", "c"), num_training=24, num_heldout=6)
    write_meta(features, meta)
    checkpoints.save(rootstock, edits, base)
    (tmp_path / "profile").mkdir()
    keep_profile(tmp_path / "profile", {MHA_SITE: 30.0, MLP_SITE: 12.0, DROPPED.site: 0.0})
    return {
        "features": Folder("f", features),
        "base": Folder("b", base),
        "profile": Folder("p", tmp_path / "profile"),
    }


def run_distill(
    store: Store, key: str, inputs: dict[str, Folder], out: Path, report: Reports | None = None, **changes: Any
) -> None:
    out.mkdir(exist_ok=True)
    task_scope = changes.pop("task_scope", TaskScope())
    distill.run(replace(make_context(store, key, out, report, **changes), inputs=inputs, task_scope=task_scope))
