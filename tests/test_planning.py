"""The plan: what changes which keys. And what is known to be wrong before anything starts."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graftwork.pipeline.planning import preflight
from graftwork.pipeline.planning.plan import Plan, costs, difference, differences, make_plan
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.manifest import FileEntry, Manifest, Origin, canonical
from graftwork.specs import resources
from graftwork.specs.data import DigitsData, ImageFolderData
from graftwork.specs.edits import OperatorEdits
from graftwork.specs.fields import keyed
from graftwork.specs.job import JobSpec
from graftwork.specs.reading.load import SpecError, load
from graftwork.stages.data.sources import DIGITS_PER_CLASS, Item, class_sizes, interleave, items, split, split_sizes
from graftwork.stages.registry import STAGES
from tests.scenes import write_shapes_job

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits-tiny.yaml"
REFERENCES = {"reference/classifier", "reference/heldout"}
SITES = "graft.0.layers={kind: explicit, blocks: [%s]}"


def job(*overrides: str) -> JobSpec:
    return load(EXAMPLE, [SITES % "1, 3", *overrides])


def planned(*overrides: str) -> Plan:
    return make_plan(job(*overrides))


def keys(plan: Plan) -> dict[str, str]:
    return {step.name: step.key for step in plan.steps}


def changed(before: Plan, after: Plan) -> set[str]:
    """Names of the steps that both plans have, under different keys."""
    first, second = keys(before), keys(after)
    return {name for name in first.keys() & second.keys() if first[name] != second[name]}


def following(plan: Plan, *names: str) -> set[str]:
    """The named steps and all that needs them, however far."""
    reached = set(names)
    for step in plan.steps:
        if reached & set(step.needs.values()):
            reached.add(step.name)
    return reached


# -- the steps


def test_the_steps_of_the_example_are_these() -> None:
    assert list(keys(planned())) == [
        "features",
        "base",
        "classifier",
        "profile",
        "distill/01.mha",
        "distill/03.mha",
        "select",
        "finetune",
        "finetune/random_init",
        "reference/classifier",
        "reference/heldout",
        "evaluate/rootstock",
        "evaluate/stage1",
        "evaluate/stage2",
        "evaluate/random_init",
        "evaluate",
    ]


def test_each_step_comes_after_those_it_needs() -> None:
    done: set[str] = set()
    for step in planned().steps:
        assert set(step.needs.values()) <= done, step.name
        done.add(step.name)


def test_no_two_steps_share_a_key() -> None:
    found = keys(planned())
    assert len(set(found.values())) == len(found)


def test_two_targets_of_one_block_are_two_steps() -> None:
    plan = planned(
        "graft=[{target: mha, operator: {kind: swa}, layers: {kind: explicit, blocks: [2]}},"
        " {target: mlp, operator: {kind: mlp}, layers: {kind: explicit, blocks: [2]}}]"
    )
    assert {"distill/02.mha", "distill/02.mlp"} == {name for name in keys(plan) if name.startswith("distill")}


def test_without_the_control_no_control_is_trained_or_sampled() -> None:
    assert not [name for name in keys(planned("finetune.control=false")) if "random_init" in name]


def test_without_the_classifier_metric_no_classifier_is_trained(tmp_path: Path) -> None:
    (tmp_path / "ref.npz").write_bytes(b"statistics")
    files = [f"evaluate.{name}={tmp_path / 'ref.npz'}" for name in ("reference", "inception")]
    plan = planned("evaluate.metrics=[fid]", *files)
    assert "classifier" not in keys(plan)


# -- rows of the table


def test_a_choice_of_rows_leaves_the_others_out_and_its_own_as_they_were() -> None:
    everything, some = planned(), planned("evaluate.rows=[stage2, rootstock]")
    left = set(keys(everything)) - {"evaluate/stage1", "evaluate/random_init"}
    assert set(keys(some)) == left
    assert changed(everything, some) & left == {"evaluate"}
    assert {role for role in some["evaluate"].needs if role.startswith("rows/")} == {
        f"rows/{row}" for row in ("heldout", "rootstock", "stage2")
    }


def test_rows_that_are_named_and_all_there_are_the_job_that_names_none() -> None:
    named = planned("evaluate.rows=[random_init, stage2, stage1, rootstock]")
    assert keys(named) == keys(planned())
    without = planned("finetune.control=false", "evaluate.rows=[rootstock, stage1, stage2]")
    assert keys(without) == keys(planned("finetune.control=false"))


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ("[]", "evaluate.rows: got []; accepted: at least one"),
        ("[stage1, stage2, stage1]", "evaluate.rows.2: got 'stage1'; accepted: each row once"),
        ("[stage1, stage3]", "evaluate.rows.1: got 'stage3'; accepted: 'rootstock', 'finalist1', "),
        ("[heldout]", "evaluate.rows.0: got 'heldout'; accepted: 'rootstock', "),
        ("stage1", "evaluate.rows: got 'stage1'; accepted: a list"),
        (
            "[stage2, random_init]",
            "evaluate.rows.1: got 'random_init'; accepted: rootstock, stage1 or stage2; random_init needs "
            "finetune.control: true",
        ),
    ],
)
def test_rows_that_a_job_cannot_have_are_refused(rows: str, line: str) -> None:
    with pytest.raises(SpecError) as caught:
        job(f"evaluate.rows={rows}", "finetune.control=false")
    assert [one.startswith(line) for one in caught.value.lines] == [True], caught.value.lines


def test_a_control_that_no_row_measures_is_told_of() -> None:
    told_of = "finetune.control: true, and random_init is not among evaluate.rows: trained, and not measured"
    assert told_of in preflight.notes(job("evaluate.rows=[stage2]"))
    for fine in ("evaluate.rows=[random_init]", "finetune.control=false", "seed=1"):
        assert told_of not in preflight.notes(job(fine))


DROPPED = "graft=[{target: mha, operator: {kind: none}, layers: {kind: all}}]"


def test_scions_alone_are_not_trained_where_no_operator_has_parameters() -> None:
    line = "finetune.train: got 'scions', and no operator of graft has parameters; accepted: all, lora"
    with pytest.raises(SpecError) as caught:
        preflight.check(job(DROPPED, "finetune.train=scions"))
    assert caught.value.lines == [line]
    pairs = DROPPED.removesuffix("]") + ", {kind: parallel}]"
    for fine in ((DROPPED,), (DROPPED, "finetune.train=lora"), (pairs, "finetune.train=scions")):
        preflight.check(job(*fine))


def test_a_control_without_scions_to_draw_is_told_of() -> None:
    told_of = "finetune.control: true, and no scion has parameters: random_init is stage2 once more"
    assert told_of in preflight.notes(job(DROPPED))
    for fine in ("finetune.control=false", "graft.0.operator.kind=swa"):
        assert told_of not in preflight.notes(job(DROPPED, fine))
    search = "graft.0.layers={kind: learned, groups: 2, keep: 1, finetune_from: search}"
    assert told_of not in preflight.notes(job(DROPPED, search))  # the control has not what the search trained


# -- precision


PRECISIONS = ["weights.precision", "profile.precision", "distill.precision", "finetune.precision", "evaluate.precision"]


def test_what_always_computed_in_fp32_has_no_precision_in_its_key_and_another_one_is() -> None:
    assert keyed(planned()["profile"].params) == {"seed": 0, "samples": 256}
    assert "precision" not in keyed(planned()["base"].params)["weights"]
    for field in PRECISIONS:
        assert keys(planned(f"{field}=fp32")) == keys(planned())
        assert changed(planned(), planned(f"{field}=tf32"))
        assert changed(planned(f"{field}=tf32"), planned(f"{field}=bf16"))


def test_a_search_in_fp32_has_no_precision_in_its_key() -> None:
    learned = "graft.0.layers={kind: learned, groups: 2, ratio: 0.5, pinned: [], search: {precision: %s}}"
    assert "precision" not in keyed(planned(learned % "fp32")["search/0"].params)["recipe"]
    assert {"search/0", "select"} <= changed(planned(learned % "fp32"), planned(learned % "tf32"))


def test_steps_whose_stream_was_bf16_once_are_made_anew() -> None:
    def streams(*overrides: str) -> set[str]:
        return {
            step.name.partition("/")[0] for step in planned(*overrides).steps if "stream" in step.identity["outside"]
        }

    assert streams() == streams(*(f"{field}=tf32" for field in PRECISIONS)) == set()
    assert streams("distill.precision=bf16") == {"distill"}
    assert streams("evaluate.precision=bf16") == {"evaluate"}
    assert streams("finetune.precision=bf16") == set()  # DeepSpeed's is bf16, as it was


GPUS = [f"resources.{stage}.gpu=1" for stage in ("base", "profile", "distill", "search", "finetune", "evaluate")]


def test_fp32_on_gpus_is_told_of_in_one_line_that_names_each_field() -> None:
    def lines(*overrides: str) -> list[str]:
        return [line for line in preflight.notes(job(*overrides)) if "tensor cores" in line]

    assert lines() == []
    (line,) = lines(*GPUS)
    assert line.split(": ")[1] == f"{', '.join(PRECISIONS)}; accepted there"
    learned = "graft.0.layers={kind: learned, groups: 2, ratio: 0.5, pinned: []}"
    (line,) = lines(*GPUS, learned, "profile.precision=tf32", "evaluate.precision=bf16", "resources.base.gpu=0")
    fields = "distill.precision, graft.0.layers.search.precision, finetune.precision"
    assert line.split(": ")[1] == f"{fields}; accepted there"
    assert lines(*GPUS, *(f"{field}=tf32" for field in PRECISIONS)) == []
    (line,) = lines(
        "codec={kind: vae}", "data.image_size=16", "evaluate.metrics=[fid]", "evaluate.reference=a.npz", GPUS[-1]
    )
    assert line.split(": ")[1] == "codec.precision, evaluate.precision; accepted there"


# -- what changes which keys


@pytest.mark.parametrize("override", ["finetune.lr=0.002", "finetune.steps=13", "finetune.deepspeed.zero=1"])
def test_the_finetune_recipe_reaches_finetune_and_evaluate_only(override: str) -> None:
    assert changed(planned(), planned(override)) == {
        "finetune",
        "finetune/random_init",
        "evaluate/stage2",
        "evaluate/random_init",
        "evaluate",
    }


@pytest.mark.parametrize("override", ["graft.0.operator.kernel=3", "graft.0.operator.kind=swa"])
def test_the_operator_reaches_distill_and_what_follows(override: str) -> None:
    kept = set(keys(planned())) - changed(planned(), planned(override))
    assert kept == {"features", "base", "classifier", "profile", *REFERENCES, "evaluate/rootstock"}


def test_the_distillation_recipe_reaches_distill_and_what_needs_it() -> None:
    before = planned()
    assert changed(before, planned("distill.epochs=7")) == following(before, "distill/01.mha", "distill/03.mha")


def test_the_rootstock_recipe_reaches_all_but_the_data_and_the_judge() -> None:
    kept = set(keys(planned())) - changed(planned(), planned("weights.steps=21"))
    assert kept == {"features", "classifier", *REFERENCES}


@pytest.mark.parametrize("override", ["evaluate.batch=10", "evaluate.sampler.guidance=2.0"])
def test_the_sampler_reaches_evaluate_only(override: str) -> None:
    assert {name.partition("/")[0] for name in changed(planned(), planned(override))} == {"evaluate"}


def test_the_number_of_samples_reaches_every_row_but_not_the_reference() -> None:
    reached = changed(planned(), planned("evaluate.samples=41"))
    rows = {name for name in keys(planned()) if name.startswith("evaluate")}
    assert reached == rows | {"reference/heldout"}


def test_samples_that_are_kept_are_drawn_anew_and_the_real_images_are_not() -> None:
    reached = changed(planned(), planned("evaluate.keep_samples=true"))
    assert reached == {name for name in keys(planned()) if name.startswith("evaluate")}


def test_each_metric_has_a_reference_of_its_own_that_does_not_depend_on_the_graft(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").touch()
    (tmp_path / "weights.pth").write_bytes(b"weights")
    both = f"evaluate={{metrics: [fid, classifier], reference: {tmp_path}/photos, inception: {tmp_path}/weights.pth}}"
    plan = planned(both)
    references = [name for name in keys(plan) if name.startswith("reference")]
    assert references == ["reference/classifier", "reference/fid", "reference/heldout"]
    assert not changed(plan, planned(both, "graft.0.operator.kind=swa", "weights.steps=21")) & set(references)
    (tmp_path / "weights.pth").write_bytes(b"others")
    assert {"reference/fid", "reference/heldout"} == changed(plan, planned(both)) & set(references)


def test_metrics_that_keep_the_same_features_share_a_reference_and_leave_that_of_fid_alone(files: Path) -> None:
    np.savez(files / "images.npz", np.zeros((4, 2, 2, 3), np.uint8))
    given = f"reference: {files}/images.npz, inception: {files}/inception.pth"
    alone = planned(f"evaluate={{metrics: [fid], {given}}}")
    every = planned(f"evaluate={{samples: 40, metrics: [fid, sfid, is, precision_recall, kid], {given}}}")
    references = {name: key for name, key in keys(every).items() if name.startswith("reference/")}
    assert list(references) == ["reference/fid", "reference/pool3", "reference/sfid", "reference/heldout"]
    assert references["reference/fid"] == keys(alone)["reference/fid"]
    (table,) = (step for step in every.steps if step.name == "evaluate")
    assert {table.needs[f"reference/{one}"] for one in ("kid", "precision_recall")} == {"reference/pool3"}
    (note,) = (line for line in preflight.notes(every.job) if "kid" in line)
    assert note == "evaluate.samples: 40: kid's subsets have as many at most, not 1,000"
    (files / "inception.pth").write_bytes(b"others")  # which images are looked at with
    anew = planned(f"evaluate={{samples: 40, metrics: [fid, sfid, is, precision_recall, kid], {given}}}")
    assert changed(every, anew) >= set(references)


def test_the_order_of_the_metrics_draws_nothing_anew(files: Path) -> None:
    named = [f"evaluate.{name}={files / 'reference.npz'}" for name in ("reference", "inception")]
    one, other = (planned(f"evaluate.metrics={given}", *named) for given in ("[fid, classifier]", "[classifier, fid]"))
    assert changed(one, other) <= {"evaluate"}


def test_the_data_reach_every_step() -> None:
    assert changed(planned(), planned("data.image_size=8")) == set(keys(planned()))


def test_the_seed_reaches_all_but_the_features() -> None:
    assert changed(planned(), planned("seed=1")) == set(keys(planned())) - {"features"}


@pytest.mark.parametrize(
    "override",
    [
        "name=another",
        "tracking.uri=http://elsewhere:5000",
        "tracking.experiment=other",
        "resources.distill.gpu=0.5",
        "resources.finetune.cpu=4",
        "store=/elsewhere",
        "weights.checkpoint_every=7",
        "distill.checkpoint_every=7",
        "finetune.checkpoint_every=7",
        "weights.compile=true",
        "finetune.compile=true",
        "weights.checkpointing=true",
        "finetune.checkpointing=true",
        "distill.compile=true",
        "distill.activations=1GiB",
        "evaluate.compile=true",
    ],
)
def test_what_cannot_change_a_result_changes_no_key(override: str) -> None:
    assert keys(planned(override)) == keys(planned())


def test_another_site_adds_one_distillation_and_keeps_the_others() -> None:
    def distilled(plan: Plan) -> dict[str, str]:
        return {name: key for name, key in keys(plan).items() if name.startswith("distill")}

    before, after = distilled(planned()), distilled(planned(SITES % "0, 1, 3"))
    assert after.keys() - before.keys() == {"distill/00.mha"}
    assert before.items() <= after.items()


def test_a_site_has_the_same_key_whatever_chose_it() -> None:
    interleaved = planned("graft.0.layers={kind: interleaved, ratio: 0.5}")
    assert not {name for name in changed(planned(), interleaved) if name.startswith("distill")}


def test_all_parts_of_a_checkpoint_are_in_the_key(tmp_path: Path) -> None:
    index, parts = tmp_path / "model.safetensors.index.json", []
    for number in (1, 2):
        parts.append(tmp_path / f"model-{number:05d}-of-00002.safetensors")
        parts[-1].write_bytes(b"x")
    index.write_text(json.dumps({"weight_map": {"a": parts[0].name, "b": parts[1].name}}))
    wishes = [f"weights={{kind: checkpoint, path: {path}}}" for path in (index, parts[0])]
    before = [keys(planned(wish))["base"] for wish in wishes]
    parts[1].write_bytes(b"y")
    after = [keys(planned(wish))["base"] for wish in wishes]
    assert all(first != second for first, second in zip(before, after, strict=True))


@pytest.mark.parametrize("stage", resources.STAGES)
def test_a_new_version_of_a_stage_reaches_its_steps_and_what_needs_them(
    stage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = job("graft.0.layers={kind: learned}")  # has a step of every stage but those for texts and solvers
    if stage in ("score", "cost", "trial"):
        asked = job("graft.0.layers={kind: solved}", "solve={limits: {flops: 95%}}")
    if stage in ("text", "synthesis"):
        data = f"{{kind: synthetic, prompts: {tmp_path}/prompts.jsonl, samples: 64, image_size: 16, heldout: 0.25}}"
        weights = f"weights={{kind: checkpoint, path: {tmp_path}}}"
        asked = load(write_shapes_job(tmp_path), [f"data={data}", weights])
    before = make_plan(asked)
    monkeypatch.setitem(STAGES, stage, replace(STAGES[stage], version=STAGES[stage].version + 1))
    mine = [step.name for step in before.steps if step.stage == stage]
    assert mine and changed(before, make_plan(asked)) == following(before, *mine)


def test_the_digits_file_is_in_the_key_of_the_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = planned()
    (tmp_path / "digits.csv.gz").write_bytes(b"others")
    monkeypatch.setattr("graftwork.pipeline.planning.fingerprints.digits_file", lambda: tmp_path / "digits.csv.gz")
    assert "features" in changed(before, planned())


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Outside inputs: a checkpoint, a reference, Inception weights, a folder of images."""
    for name in ("base.pt", "reference.npz", "inception.pth"):
        (tmp_path / name).write_bytes(name.encode())
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(40):
            (tmp_path / "images" / name / f"{index}.png").touch()
    return tmp_path


ROWS = [f"evaluate/{row}" for row in ("rootstock", "stage1", "stage2", "random_init")]
OUTSIDE = {
    "base.pt": (("base",), "weights={{kind: checkpoint, path: {}}}"),
    "reference.npz": (("reference/fid",), "evaluate={{metrics: [fid], inception: x.pth, reference: {}}}"),
    "inception.pth": (("reference/heldout", *ROWS), "evaluate={{metrics: [fid], reference: x.npz, inception: {}}}"),
}


@pytest.mark.parametrize("name", OUTSIDE)
class TestOutsideFiles:
    @pytest.fixture(autouse=True)
    def _beside(self, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(files)
        for name in ("x.npz", "x.pth"):
            Path(name).write_bytes(b"the other one")

    def test_other_content_reaches_its_step_and_what_follows(self, files: Path, name: str) -> None:
        steps, override = OUTSIDE[name]
        before = planned(override.format(files / name))
        (files / name).write_bytes(b"another")
        assert changed(before, planned(override.format(files / name))) == following(before, *steps)

    def test_the_same_content_in_another_place_changes_no_key(self, files: Path, name: str) -> None:
        _, override = OUTSIDE[name]
        before = planned(override.format(files / name))
        (files / "elsewhere").mkdir()
        (files / name).rename(files / "elsewhere" / name)
        assert changed(before, planned(override.format(files / "elsewhere" / name))) == set()


@pytest.mark.parametrize("change", ["another image", "another size", "other contents", "renamed class"])
def test_a_changed_image_folder_reaches_every_step(files: Path, change: str) -> None:
    images, override = files / "images", f"data={{kind: image_folder, path: {files / 'images'}}}"
    (images / "cat" / "3.png").write_bytes(b"1")
    before = planned(override)
    match change:
        case "another image":
            (images / "cat" / "new.png").touch()
        case "another size":
            (images / "cat" / "3.png").write_bytes(b"12")
        case "other contents":
            (images / "cat" / "3.png").write_bytes(b"2")
        case "renamed class":
            (images / "cat").rename(images / "bird")
    assert changed(before, planned(override)) == set(keys(before))


def test_references_take_what_rows_take_unless_told_otherwise() -> None:
    found = {step.name: step.resources.gpu for step in planned("resources.evaluate.gpu=0.5").steps}
    assert found["reference/heldout"] == found["evaluate"] == 0.5 and found["classifier"] == 0
    told = planned("resources={evaluate: {gpu: 0.5}, reference: {gpu: 0.25}}")
    assert told["reference/heldout"].resources.gpu == 0.25


# -- keys as such


def test_a_key_is_the_sha256_of_canonical_json() -> None:
    document = {
        "stage": "distill",
        "version": 1,
        "params": {"lr": 0.0005, "blocks": [1, 3]},
        "outside": {},
        "needs": {},
    }
    assert hashlib.sha256(canonical(document).encode()).hexdigest() == (
        "8b20f3c10b356e0615d02eac4924a8ebe534b8f421149229ebdd5666f8a39fd8"
    )


def test_a_step_is_keyed_by_its_identity() -> None:
    for step in planned().steps:
        assert step.key == hashlib.sha256(canonical(dict(step.identity)).encode()).hexdigest()


def test_planning_twice_gives_the_same_keys() -> None:
    assert keys(planned()) == keys(planned())


def test_the_job_as_a_whole_has_a_key_of_its_steps() -> None:
    assert planned().key() == planned("name=another").key() != planned("seed=1").key()


def test_a_step_that_is_not_cached_says_what_differs_from_the_nearest_one() -> None:
    def cached(*overrides: str) -> Manifest:
        step = planned(*overrides)["finetune"]
        origin = Origin(step=step.name, run="r", seconds=1, made="now")
        return Manifest(
            key=step.key, identity=dict(step.identity), files={"x": FileEntry(size=0, sha256="")}, origin=origin
        )

    manifests = [cached("finetune.lr=0.002"), cached("finetune.lr=0.003", "finetune.steps=3")]
    assert difference(planned("finetune.lr=0.004")["finetune"], manifests) == "recipe.lr: 0.002 -> 0.004"


def test_a_step_that_was_never_made_differs_from_nothing() -> None:
    assert difference(planned()["finetune"], []) is None


def cached(store: Store, *overrides: str, plan: Plan | None = None) -> None:
    """Have every step of a job in a store, as far as a plan looks at it."""
    for step in (plan or planned(*overrides)).steps:
        origin = Origin(step=step.name, run="r", seconds=1, made="now")
        store.commit(step.key, store.workplace(step.key), dict(step.identity), origin)


def told(store: Store, *overrides: str) -> dict[str, str]:
    plan = planned(*overrides)
    return differences(plan, plan.states(store), list(store.manifests()), store)


def test_a_plan_names_at_most_five_differences_a_step_and_counts_the_rest(store: Store) -> None:
    cached(store)
    names = ("lr=0.004", "steps=13", "label_dropout=0.2", "warmup=3", "clip=0.5", "ema=0.5")
    found = told(store, *(f"finetune.{name}" for name in names))["finetune"]
    assert found.count(" -> ") == 5 and found.endswith(" and 1 more")


def test_many_steps_of_one_kind_that_are_others_are_counted(store: Store) -> None:
    every = "graft.0.layers={kind: all}"
    cached(store, every)
    found = told(store, every, "distill.epochs=7")
    assert found["distill/00.mha"].startswith("recipe.epochs: ") and "other" not in found["distill/00.mha"]
    assert found["select"] == "4 other scions"
    assert found["finetune"] == "4 other scions, another select"


def test_a_long_value_that_differs_is_cut(store: Store) -> None:
    cached(store)
    found = told(store, "graft.0.layers={kind: explicit, blocks: [0, 1, 3]}")
    assert max(map(len, found.values())) < 300 and all(len(part) < 120 for part in found["select"].split(", "))


def test_beside_another_jobs_store_a_plan_compares_with_nothing(store: Store, files: Path) -> None:
    cached(store)
    assert told(store, f"data={{kind: image_folder, path: {files / 'images'}, image_size: 16}}") == {}
    assert told(store, "model={kind: dit, size: XL/2}", "graft.0.layers={kind: interleaved, ratio: 0.5}") == {}


def test_a_plan_says_causes_and_never_shows_hashes(store: Store, files: Path) -> None:
    checkpoint = f"weights={{kind: checkpoint, path: {files / 'base.pt'}}}"
    images = f"data={{kind: image_folder, path: {files / 'images'}, image_size: 16}}"
    cached(store, checkpoint, images)
    (files / "base.pt").write_bytes(b"others")
    assert told(store, checkpoint, images)["base"] == "other contents of the checkpoint"
    (files / "images" / "cat" / "0.png").write_bytes(b"another")
    found = told(store, checkpoint, images)
    assert found["features"] == "other images"  # an artifact that does not tell which it is of
    assert not re.search("[0-9a-f]{12}", " ".join(found.values()))


def test_another_version_of_a_stage_is_said_in_words(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(store)
    monkeypatch.setitem(STAGES, "finetune", replace(STAGES["finetune"], version=99))
    assert told(store)["finetune"] == "another version of finetune"


# -- strategies, and what they wait for

SOME = "graft.0.layers={kind: %s}"


@pytest.mark.parametrize(
    ("layers", "distilled"),
    [
        ("first, count: 1", "0"),
        ("last, ratio: 0.5", "23"),
        ("middle", "12"),
        ("interleaved, count: 3", "123"),
        ("most_local", "0123"),
        ("least_local, count: 1", "0123"),
        ("lowest_error", "0123"),
        ("learned", "123"),
        ("learned, groups: 2, keep: 1", "13"),
        ("learned, pinned: []", "0123"),
        ("learned, groups: [[0, 1], [2, 3]], keep: [2, 0]", "23"),
    ],
)
def test_only_the_sites_that_a_strategy_may_choose_are_distilled(layers: str, distilled: str) -> None:
    steps = [name for name in keys(planned(SOME % layers)) if name.startswith("distill/")]
    assert steps == [f"distill/0{block}.mha" for block in distilled]


@pytest.mark.parametrize("kind", ["most_local", "least_local", "lowest_error", "learned, groups: 4, keep: 2"])
def test_the_costs_are_known_before_the_evidence_is(kind: str) -> None:
    assert costs(planned(SOME % kind).job, 10) == costs(planned(SOME % "interleaved").job, 10)


def test_a_selection_waits_for_its_evidence_and_no_other() -> None:
    waits = {
        kind: set(planned(SOME % kind)["select"].needs.values()) - {f"distill/0{block}.mha" for block in range(4)}
        for kind in ("interleaved", "lowest_error", "most_local", "learned")
    }
    assert waits == {"interleaved": set(), "lowest_error": set(), "most_local": {"profile"}, "learned": {"search/0"}}


def test_finetuning_starts_from_the_search_if_asked() -> None:
    assert "searched" not in planned(SOME % "learned")["finetune"].needs
    plan = planned(SOME % "learned, finetune_from: search")
    assert plan["finetune"].needs["searched"] == "search/0"
    assert "searched" not in plan["evaluate/stage1"].needs


def test_another_strategy_distils_nothing_anew() -> None:
    local, learned = planned(SOME % "most_local"), planned(SOME % "learned")
    assert not {name for name in changed(local, learned) if name.startswith("distill")}


def test_a_loss_that_is_set_needs_no_profile() -> None:
    assert "profile" in planned()["distill/01.mha"].needs.values()
    assert "profile" not in planned("distill.loss=l2")["distill/01.mha"].needs.values()


def test_a_pair_waits_for_the_scions_of_its_blocks() -> None:
    plan = planned(
        "graft=[{target: mha, operator: {kind: swa}, layers: {kind: explicit, blocks: [1, 2]}}, {kind: parallel}]"
    )
    assert set(plan["distill/00.pair"].needs.values()) >= {"distill/01.mha"}
    assert "distill/02.mha" not in plan["distill/00.pair"].needs.values()


# -- the published grafts

IMAGENET = EXAMPLE.parent / "imagenet"
TAUGHT = {path.stem: path for path in sorted(IMAGENET.glob("*-taught.yaml"))}
PUBLISHED = {
    path.stem: path for path in sorted(IMAGENET.glob("*.yaml")) if path.stem != "dit-xl-2" and path.stem not in TAUGHT
}


def test_every_published_graft_has_its_spec() -> None:
    rows: dict[str, tuple[int | str, ...]] = {"mlp_r4": (100,), "mha": (100,)}
    rows |= dict.fromkeys(("mlp_r3", "mlp_r6", "mlp_hyena_x", "mamba2"), (50, 75))
    rows |= dict.fromkeys(("hyena_se", "hyena_x", "hyena_y", "swa"), (50, "50-ablation", 75))
    names = {f"{operator}-{share}" for operator, shares in rows.items() for share in shares}
    assert len(names) == 22 and set(PUBLISHED) == names | {"depth-to-width"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_graft_can_be_planned_and_edits_its_share_of_the_blocks(name: str) -> None:
    made = make_plan(load(PUBLISHED[name]))
    sites = [step for step in keys(made) if step.startswith("distill/")]
    shares = {"50": range(1, 28, 2), "75": [block for block in range(28) if block % 4], "100": range(28)}
    if name == "depth-to-width":
        assert sites == [f"distill/{block:02d}.pair" for block in range(0, 28, 2)]
    else:
        operator, share = name.removesuffix("-ablation").split("-")
        target = "mlp" if operator.startswith("mlp") else "mha"
        assert sites == [f"distill/{block:02d}.{target}" for block in shares[share]]
        (edit,) = made.job.graft
        assert isinstance(edit, OperatorEdits)
        assert operator.startswith(edit.operator.kind)
    found = costs(made.job, 1000)
    assert found.rootstock.params == 675_129_632 - 256 * 1152  # the published count has the position embedding in it


def test_a_published_graft_with_a_teacher_differs_by_its_finetune_alone() -> None:
    assert len(TAUGHT) == 3
    for name, path in TAUGHT.items():
        taught, row = (make_plan(load(one)) for one in (path, PUBLISHED[name.removesuffix("-taught")]))
        assert changed(row, taught) == {"finetune", "evaluate/stage2", "evaluate"}


def test_a_published_graft_is_planned_without_the_heavy_libraries(tmp_path: Path) -> None:
    asked = f"graftwork.plan({str(PUBLISHED['hyena_y-50'])!r})"
    code = f"import sys, graftwork; {asked}; assert not {{'torch', 'ray', 'mlflow', 'diffusers'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- preflight


def problem(job: JobSpec) -> str:
    with pytest.raises(SpecError) as caught:
        preflight.check(job)
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


def test_the_example_passes() -> None:
    preflight.check(job())


@pytest.mark.parametrize(("field", "most"), [("samples", 899), ("heldout", 898)])
def test_more_samples_than_there_are_images_are_refused(field: str, most: int) -> None:
    preflight.check(job(f"distill.{field}={most}"))
    line = problem(job(f"distill.{field}={most + 1}"))
    assert line.startswith(f"distill.{field}: got {most + 1}; accepted: at most {most}")


def test_the_published_number_of_samples_is_refused_where_there_are_fewer() -> None:
    line = problem(job("distill={}"))
    assert line.startswith("distill.samples: got 8000; accepted: at most 899")


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_an_image_folder_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "images"
    if kind == "a file":
        path.touch()
    line = problem(job(f"data={{kind: image_folder, path: {path}}}"))
    assert line.startswith(f"data.path: got '{path}', no such folder; accepted: ")


@pytest.mark.parametrize("kind", ["empty", "empty classes", "no images", "no classes"])
def test_an_image_folder_without_images_in_class_folders_is_refused(tmp_path: Path, kind: str) -> None:
    if kind != "empty":
        (tmp_path / "cat").mkdir()
    if kind == "no images":
        (tmp_path / "cat" / "notes.txt").touch()
    if kind == "no classes":
        (tmp_path / "cat.png").touch()
    line = problem(job(f"data={{kind: image_folder, path: {tmp_path}}}"))
    other = {
        "no images": "no images in class folders, but 1 .txt",
        "no classes": "no images in class folders, but 1 .png",
    }
    assert line.startswith(f"data.path: got '{tmp_path}', {other.get(kind, 'no images in it')}; accepted: ")


def test_more_samples_than_an_image_folder_has_are_refused(files: Path) -> None:
    line = problem(job(f"data={{kind: image_folder, path: {files / 'images'}}}", "distill={samples: 73}"))
    assert line.startswith("distill.samples: got 73; accepted: at most 72")


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.pt"
    line = problem(job(f"weights={{kind: checkpoint, path: {path}}}"))
    assert line.startswith(f"weights.path: got '{path}', no such file; accepted: ")


@pytest.mark.parametrize("missing", ["reference", "inception"])
def test_a_reference_or_inception_file_that_is_missing_is_refused(files: Path, missing: str) -> None:
    there = {"reference": files / "reference.npz", "inception": files / "inception.pth"} | {missing: files / "none"}
    overrides = [f"evaluate.{name}={path}" for name, path in there.items()]
    line = problem(job("evaluate.metrics=[fid]", *overrides))
    assert line.startswith(f"evaluate.{missing}: got '{files / 'none'}', which does not exist; accepted: ")


def test_fid_without_inception_weights_says_where_to_put_them(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(files))
    line = problem(job("evaluate.metrics=[fid]", f"evaluate.reference={files / 'reference.npz'}"))
    assert line.startswith("evaluate.inception: got nothing; accepted: ")
    assert str(files / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth") in line


def test_every_missing_file_gets_a_line_of_its_own(files: Path) -> None:
    asked = job(
        f"data={{kind: image_folder, path: {files / 'none'}}}",
        f"weights={{kind: checkpoint, path: {files / 'none'}}}",
        f"evaluate.reference={files / 'none'}",
    )
    with pytest.raises(SpecError) as caught:
        preflight.check(asked)
    assert [line.partition(":")[0] for line in caught.value.lines] == [
        "data.path",
        "weights.path",
        "evaluate.reference",
    ]


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "store"
    with pytest.raises(SpecError) as caught:
        preflight.check_places(Store(str(path)))
    (line,) = caught.value.lines
    assert line.startswith(f"store: got '{path}', which cannot be written: ") and "accepted: " in line


# -- the split


def test_the_digits_a_class_are_those_of_the_file() -> None:
    from sklearn.datasets import load_digits

    assert tuple(np.bincount(load_digits().target)) == DIGITS_PER_CLASS


def test_every_digit_is_in_exactly_one_part() -> None:
    training, heldout = split(DigitsData())
    assert sorted([*training, *heldout], key=lambda item: int(item.name)) == items(DigitsData())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_each_class_gives_its_share(share: float) -> None:
    training, heldout = split(DigitsData(heldout=share))
    held, all_of = Counter(item.label for item in heldout), dict(enumerate(DIGITS_PER_CLASS))
    assert all(abs(held[label] - share * size) <= 0.5 for label, size in all_of.items())
    assert len(training) == split_sizes(DigitsData(heldout=share))[0]


@pytest.mark.parametrize("part", [0, 1], ids=["training", "heldout"])
def test_every_prefix_holds_each_class_in_proportion_within_one(part: int) -> None:
    whole = split(DigitsData())[part]
    sizes, seen = Counter(item.label for item in whole), Counter[int]()
    for count, item in enumerate(whole, start=1):
        seen[item.label] += 1
        assert all(abs(seen[label] - size * count / len(whole)) <= 1 for label, size in sizes.items()), count


def test_the_split_is_the_same_on_every_machine() -> None:
    training, heldout = split(DigitsData())
    names = " ".join(item.name for item in [*training, *heldout])
    assert hashlib.sha256(names.encode()).hexdigest() == (
        "d629f82bb567285dd4748347e4d3e15289123af4233c795f89e0cac110c4c539"
    )


def test_an_image_folder_is_split_the_same_whatever_its_order_on_disk(tmp_path: Path) -> None:
    for folder, order in (("one", 1), ("two", -1)):
        for name in ["dog", "cat"][::order]:
            (tmp_path / folder / name).mkdir(parents=True)
            for index in range(20)[::order]:
                (tmp_path / folder / name / f"{index}.JPEG").touch()
    first, second = (split(ImageFolderData(path=str(tmp_path / folder))) for folder in ("one", "two"))
    assert first == second
    assert class_sizes(ImageFolderData(path=str(tmp_path / "one"))) == (20, 20)


def test_classes_are_numbered_in_the_order_of_their_names(files: Path) -> None:
    found = items(ImageFolderData(path=str(files / "images")))
    assert {(item.name.partition("/")[0], item.label) for item in found} == {("cat", 0), ("dog", 1)}


@pytest.mark.parametrize(("size", "training"), [(1, 1), (2, 1), (3, 2)])
def test_of_the_smallest_classes_an_image_stays_on_each_side(tmp_path: Path, size: int, training: int) -> None:
    (tmp_path / "cat").mkdir()
    for index in range(size):
        (tmp_path / "cat" / f"{index}.png").touch()
    data = ImageFolderData(path=str(tmp_path))
    assert [len(part) for part in split(data)] == [training, size - training]


def test_classes_of_any_size_take_turns() -> None:
    big, small = [Item(f"b{i}", 0) for i in range(6)], [Item(f"s{i}", 1) for i in range(2)]
    assert [item.name for item in interleave([big, small])] == ["b0", "b1", "s0", "b2", "b3", "b4", "s1", "b5"]


def test_a_plan_says_which_classes_have_no_sample() -> None:
    assert preflight.notes(job("evaluate.samples=4")) == [
        "evaluate.samples: 4 for 10 classes, spread over them: 6 have none"
    ]
    assert preflight.notes(job("evaluate.samples=10")) == []


def test_the_choice_of_classes_is_in_the_keys_that_it_concerns_and_in_no_other() -> None:
    def outside(plan: Plan) -> dict[str, set[str]]:
        return {step.name: {"last_turn", "few_samples"} & set(step.identity["outside"]) for step in plan.steps}

    assert not any(outside(planned("evaluate.samples=20", "distill.samples=10")).values())
    assert {name for name, marks in outside(planned("evaluate.samples=25")).items() if marks} == {
        *ROWS,
        "reference/heldout",
    }
    shares = outside(planned("evaluate.samples=20", "finetune.fraction=0.01"))
    assert {name for name, marks in shares.items() if marks} == {"finetune", "finetune/random_init"}
    few = outside(planned("evaluate.samples=20", "distill.samples=9"))
    assert {name for name, marks in few.items() if marks} == {name for name in few if name.startswith("distill/")}
