"""One's own classes on a checkpoint of others: `weights.classes`, from the spec to the rootstock of a job."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.artifacts import Folder
from graftwork.models import checkpoints
from graftwork.models.checkpoints import Labels, UnfitCheckpoint
from graftwork.models.rootstocks.dit import LABELS as TABLE
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.models.surgery import graft
from graftwork.pipeline import api
from graftwork.pipeline.planning.plan import make_plan
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.edits import Edit, Site
from graftwork.specs.job import JobSpec
from graftwork.specs.operators import HyenaY
from graftwork.specs.reading.load import SpecError, load
from graftwork.specs.resources import StepResources
from graftwork.specs.rootstock import CheckpointWeights, DitModel
from graftwork.stages.artifacts.latents import LatentsMeta, write_meta
from graftwork.stages.catalog.base import BaseParams
from graftwork.stages.contract import Context
from graftwork.stages.training import base
from tests.conftest import TINY
from tests.small import lively
from tests.stores import commit
from tests.tiny_training import CPU, Reports

IMAGENET = DiTConfig(input_size=8, in_channels=1, patch=2, depth=2, width=16, heads=2, num_classes=20)
CLASSES = ("cat", "dog", "fox")


@pytest.fixture
def theirs(tmp_path: Path) -> DiT:
    """A rootstock of 20 classes, in `theirs.pt`."""
    model: DiT = lively(DiT(IMAGENET))
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    return model


def based(
    tmp_path: Path, classes: Any, names: tuple[str, ...] = CLASSES, seed: int = 0, file: str = "theirs.pt"
) -> DiT:
    """The rootstock that the `base` step makes of the checkpoint for a job with such classes."""
    features, out = tmp_path / "features", tmp_path / "out"
    features.mkdir(exist_ok=True)
    out.mkdir(exist_ok=True)
    write_meta(features, LatentsMeta(codec="pixel", shape=(1, 8, 8), classes=names, num_training=3, num_heldout=3))
    weights = CheckpointWeights(path=str(tmp_path / file), classes=classes)
    context = Context(
        step="base",
        params=BaseParams(seed=seed, model=DitModel(depth=2, width=16, heads=2, patch=2), weights=weights),
        inputs={"features": Folder("f", features)},
        out=out,
        partial=Store(str(tmp_path / "store")).partial("a"),
        report=Reports(),
        resources=StepResources(),
        device=CPU,
    )
    base.run(context)
    model, _ = checkpoints.load(out)
    assert isinstance(model, DiT)
    return model


def table(model: DiT) -> Tensor:
    return model.y_embedder.embedding_table.weight.detach()


def test_each_class_begins_with_the_row_that_the_job_names(theirs: DiT, tmp_path: Path) -> None:
    made = based(tmp_path, {"fox": 2, "cat": 19, "dog": 19})
    assert torch.equal(table(made), table(theirs)[[19, 19, 2, 20]])  # and the null class with its own
    assert made.config == replace(IMAGENET, num_classes=3)


def test_all_other_tensors_are_the_checkpoints(theirs: DiT, tmp_path: Path) -> None:
    ours, others = based(tmp_path, "fresh").state_dict(), theirs.state_dict()
    assert ours.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in ours.items() if name != TABLE)


def test_a_class_that_is_not_named_begins_with_a_fresh_row(theirs: DiT, tmp_path: Path) -> None:
    fresh, mixed = table(based(tmp_path, "fresh")), table(based(tmp_path, {"dog": 7}))
    assert torch.equal(mixed[1], table(theirs)[7]) and torch.equal(mixed[[0, 2, 3]], fresh[[0, 2, 3]])
    assert torch.equal(fresh[3], table(theirs)[20])
    assert 0.005 < fresh[:3].std() < 0.05  # as DiT's are at the start


def test_a_fresh_row_is_drawn_from_the_jobs_seed_and_the_classes_name(theirs: DiT, tmp_path: Path) -> None:
    fresh, more = table(based(tmp_path, "fresh")), table(based(tmp_path, "fresh", ("ant", *CLASSES)))
    assert torch.equal(more[1:], fresh)  # another class moves none
    assert len({tuple(row.tolist()) for row in more}) == 5
    assert not torch.equal(table(based(tmp_path, "fresh", seed=1))[0], fresh[0])


def test_a_graft_of_other_classes_keeps_its_operators(tmp_path: Path) -> None:
    edit = Edit(site=Site(block=1, target="mha"), operator=HyenaY(kernel=3))
    torch.save({"ema": lively(graft(DiT(IMAGENET), [edit], seed=0)).state_dict()}, tmp_path / "graft.pt")
    based(tmp_path, "fresh", file="graft.pt")
    assert checkpoints.load(tmp_path / "out")[1] == (edit,)


def test_without_the_setting_other_classes_are_refused_with_it_named(theirs: DiT, tmp_path: Path) -> None:
    with pytest.raises(UnfitCheckpoint) as caught:
        based(tmp_path, None)
    assert f"{TABLE}: (21, 16), expected (4, 16); accepted: " in str(caught.value)
    assert "weights.classes: fresh or {class: row}" in str(caught.value)


def labels(*rows: int | None) -> Labels:
    return Labels(CLASSES[: len(rows)], rows, seed=0)


def test_a_row_that_the_checkpoint_does_not_have_is_refused_before_any_tensor_is_read(
    theirs: DiT, tmp_path: Path
) -> None:
    config = replace(IMAGENET, num_classes=2)
    checkpoints.check(tmp_path / "theirs.pt", config, labels=labels(19, None))
    with pytest.raises(UnfitCheckpoint, match=r"has 20 classes, so no row 20 for the class 'dog'; .* 0 to 19"):
        checkpoints.check(tmp_path / "theirs.pt", config, labels=labels(None, 20))


def test_a_checkpoint_without_a_null_class_has_none_to_carry_over(theirs: DiT, tmp_path: Path) -> None:
    torch.save({"ema": theirs.state_dict(), "args": {"num_classes": 21}}, tmp_path / "no_null.pt")
    with pytest.raises(UnfitCheckpoint, match="a row for each of its 21 classes, and none for the null class"):
        checkpoints.check(tmp_path / "no_null.pt", replace(IMAGENET, num_classes=1), labels=labels(None))


def test_scions_may_come_from_a_graft_of_other_classes(theirs: DiT, tmp_path: Path) -> None:
    config = replace(IMAGENET, num_classes=3)
    model, _ = checkpoints.read(tmp_path / "theirs.pt", config=config, any_classes=True)
    assert model.config.num_classes == 20
    with pytest.raises(UnfitCheckpoint):
        checkpoints.read(tmp_path / "theirs.pt", config=replace(config, depth=3), any_classes=True)


# -- in a job


def job(classes: str = "", path: str = "theirs.pt") -> JobSpec:
    return load(TINY, [f"weights={{kind: checkpoint, path: {path}{classes and f', classes: {classes}'}}}"])


def test_the_setting_is_in_the_key_only_where_it_is_set() -> None:
    plain, fresh, mapped = (make_plan(job(classes)) for classes in ("", "fresh", "{0: 3}"))
    assert "classes" not in plain["base"].identity["params"]["weights"]
    assert fresh["base"].identity["params"]["weights"]["classes"] == "fresh"
    assert len({plan["base"].key for plan in (plain, fresh, mapped)}) == 3
    assert len({plan["features"].key for plan in (plain, fresh, mapped)}) == 1


@pytest.mark.parametrize("classes", ["[1]", "cat", "{}", "{cat: -1}", "{cat: '3'}", "{cat: true}", "{cat: 1.5}"])
def test_what_is_no_row_of_a_table_is_one_line(classes: str) -> None:
    with pytest.raises(SpecError) as caught:
        job(classes)
    (line,) = caught.value.lines
    field = "classes.cat" if "cat:" in classes else "classes"
    assert line.startswith(f"weights.{field}: got ") and "; accepted: " in line


def test_a_class_that_the_job_does_not_have_is_named_with_those_that_it_has() -> None:
    with pytest.raises(SpecError) as caught:
        api.plan(job("{0: 3, seven: 4}"))
    assert caught.value.lines == [
        "weights.classes: got 'seven'; accepted: the job's classes, '0', '1', '2', '3', '4' and 5 more"
    ]


def test_a_plan_says_which_classes_begin_fresh(tmp_path: Path) -> None:
    wide = DiTConfig(input_size=16, in_channels=1, patch=2, depth=4, width=32, heads=2, num_classes=20)
    torch.save(DiT(wide).state_dict(), tmp_path / "theirs.pt")
    path = str(tmp_path / "theirs.pt")
    assert api.plan(job("{0: 3, 7: 19}", path)).notes == (
        "weights.path: 2 of 10 classes begin with rows of its label table, 8 with fresh ones, and the null class with "
        "its own",
    )
    with pytest.raises(SpecError, match="has 20 classes, so no row 20 for the class '7'"):
        api.plan(job("{7: 20}", path))


# -- what a plan loads


def loaded_by_a_plan(tmp_path: Path, *overrides: str) -> set[str]:
    """Those of the heavy libraries that a plan loads, in a process of its own."""
    code = (
        "import sys; from graftwork.pipeline import api; "
        f"api.plan({str(TINY)!r}, {[f'store={tmp_path}/store', *overrides]!r}, read=True); "
        "print(*{'torch', 'ray', 'mlflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_plan_loads_torch_only_for_a_checkpoint_that_a_step_will_read(tmp_path: Path) -> None:
    path = tmp_path / "theirs.pt"
    shape = DiTConfig(input_size=16, in_channels=1, patch=2, depth=4, width=32, heads=2, num_classes=10)
    torch.save(DiT(shape).state_dict(), path)
    wish = f"weights={{kind: checkpoint, path: {path}}}"
    assert loaded_by_a_plan(tmp_path, wish) == {"torch"}
    made = api.plan(load(TINY, [f"store={tmp_path}/store", wish]), read=True)
    commit(Store(str(tmp_path / "store")), made["base"].key)
    assert loaded_by_a_plan(tmp_path, wish) == set()
