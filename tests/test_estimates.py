"""What a job should take: FLOPs by formula, speed from what earlier steps took, time by playing the job through."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graftwork.pipeline import api
from graftwork.pipeline.cli.tables import lasting, show_expected
from graftwork.pipeline.estimates.estimate import START_SECONDS, estimate
from graftwork.pipeline.estimates.history import LOAD_SECONDS, History
from graftwork.pipeline.estimates.sharing import num_recording_tasks, site_items
from graftwork.pipeline.estimates.simulate import Machine, machine_for
from graftwork.pipeline.estimates.speeds import CORE, assumed_speed
from graftwork.pipeline.execution.task import work_done
from graftwork.pipeline.planning.plan import Plan, make_plan
from graftwork.pipeline.runs import record
from graftwork.pipeline.runs.record import Expected, RunRecord
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.manifest import Manifest, Origin
from graftwork.specs.reading.load import SpecError, load
from graftwork.specs.resources import StepResources
from tests.conftest import TINY, Finished, Graft

N, D, DEPTH = 64, 32, 4  # of the tiny job: tokens, width, blocks
MHA, MLP, MODULATION = 8 * N * D**2 + 4 * N**2 * D, 16 * N * D**2, 12 * D**2
EMBEDDING = 2 * N * 4 * D + 2 * (256 + D) * D
FINAL = 2 * N * D * 8 + 4 * D**2
HYENA_Y = 8 * N * D**2 + 2 * N * D * 4
BLOCK = MHA + MLP + MODULATION
ROOTSTOCK = EMBEDDING + DEPTH * BLOCK + FINAL
GRAFT = ROOTSTOCK + 2 * (HYENA_Y - MHA)
IMAGENET = TINY.parent / "imagenet" / "hyena_y-50.yaml"
MACHINE = Machine(cpus=2, gpus=0)


def planned(*overrides: str) -> Plan:
    return make_plan(load(TINY, overrides))


def work(plan: Plan, step: str) -> tuple[float, float]:
    found = plan[step].work
    assert found is not None
    return found.own, found.shared


# -- FLOPs


def test_a_distillation_trains_on_all_samples_and_measures_the_heldout_ones_every_epoch() -> None:
    own, shared = work(planned(), "distill/01.mha")
    assert own == 60 * (3 * 64 + 64) * HYENA_Y
    assert shared == (64 + 64) * (EMBEDDING + 2 * BLOCK)


def test_a_distillation_shows_each_sample_as_often_as_it_is_drawn() -> None:
    own, shared = work(planned("distill.draws=3"), "distill/03.mha")
    assert own == 60 * (3 * 3 * 64 + 64) * HYENA_Y
    assert shared == (3 * 64 + 64) * (EMBEDDING + 4 * BLOCK)


def test_a_pair_trains_both_of_its_blocks_and_what_merges_them() -> None:
    own, shared = work(planned("graft=[{kind: parallel, pairs: [[1, 2]]}]"), "distill/01.pair")
    assert own == 60 * (3 * 64 + 64) * (2 * BLOCK + 4 * N * D**2)
    assert shared == (64 + 64) * (EMBEDDING + 3 * BLOCK)


@pytest.mark.parametrize(
    ("step", "flops"),
    [
        ("base", 3 * ROOTSTOCK * 20 * 16),
        ("profile", ROOTSTOCK * 256),
        ("finetune", 3 * GRAFT * 40 * 16),
        ("finetune/random_init", 3 * GRAFT * 40 * 16),
        ("evaluate/rootstock", ROOTSTOCK * 2 * 4 * 40),  # guided: two passes a step
        ("evaluate/stage1", GRAFT * 2 * 4 * 40),
        ("evaluate/stage2", GRAFT * 2 * 4 * 40),
    ],
)
def test_other_steps_cost_their_passes(step: str, flops: int) -> None:
    assert work(planned(), step) == (flops, 0)


def test_without_guidance_sampling_takes_one_pass_a_step() -> None:
    assert work(planned("evaluate.sampler.guidance=1"), "evaluate/rootstock") == (ROOTSTOCK * 4 * 40, 0)


def test_a_search_passes_through_originals_and_scions() -> None:
    search = "{kind: learned, groups: 2, ratio: 0.5, pinned: [], search: {steps: 10, batch: 4, warmup: 1}}"
    assert work(planned(f"graft.0.layers={search}"), "search/0") == (3 * (ROOTSTOCK + 4 * HYENA_Y) * 10 * 4, 0)


def test_sites_are_packed_by_their_flops_and_by_the_bytes_that_they_keep() -> None:
    plan = planned("distill.precision=bf16")
    sites, shared = site_items(plan, ["distill/01.mha", "distill/03.mha"])
    assert [site.seconds for site in sites] == [60 * (3 * 64 + 64) * HYENA_Y] * 2
    assert shared == (64 + 64) * (EMBEDDING + 4 * BLOCK)  # to the last of the blocks
    assert sites[0].memory == 2 * (64 + 64) * N * D * 2


@pytest.mark.parametrize(
    ("overrides", "slots", "parts"),
    [
        ((), 4, 0),  # 64 samples: not worth it
        (("distill.samples=800",), 4, 3),
        (("distill.samples=800",), 2, 2),
        (("distill.samples=800",), 1, 0),
        (("distill.samples=800",), 0, 0),
        (("distill.draws=8",), 4, 2),
        (("distill.samples=800", "distill.activations=1GiB"), 4, 0),
        (("distill.samples=800", "resources.distill.gpu=0.25"), 4, 0),
    ],
    ids=str,
)
def test_the_pass_of_sites_on_cpus_is_made_by_tasks_of_its_own_where_that_pays(
    overrides: tuple[str, ...], slots: int, parts: int
) -> None:
    plan = planned(*overrides)
    sites = [plan["distill/01.mha"], plan["distill/03.mha"]]
    assert num_recording_tasks(sites, slots) == parts
    assert num_recording_tasks(sites[:1], slots) == 0


# -- speed


def stored(store: Store, plan: Plan, seconds: float) -> None:
    """Artifacts as a run leaves them, each step having taken so long, one after another."""
    for number, step in enumerate(plan.steps):
        made = f"2026-01-01T00:{number:02}:00+00:00"
        done = work_done(step, torch.device("cpu"))
        origin = Origin(step=step.name, run="earlier", seconds=seconds, made=made, work=done)
        store.commit(step.key, store.workplace(step.key), dict(step.identity), origin)
    job = plan.job.model_dump(mode="json")
    record.save(
        store,
        RunRecord(
            run="earlier",
            name="earlier",
            status="finished",
            started="",
            job=job,
            steps=[],
            expected=Expected(seconds=100, gpu_hours=0, cpus=2, gpus=0),
            took=108,
        ),
    )


def expected(store: Store, plan: Plan, *undone: str, machine: Machine = MACHINE) -> Expected:
    return estimate(plan, undone, History(store, store.manifests()), machine)


def seconds(store: Store, plan: Plan, *undone: str, machine: Machine = MACHINE) -> float:
    return expected(store, plan, *undone, machine=machine).seconds - START_SECONDS


def test_a_step_should_take_as_long_as_the_like_one_did_in_proportion_to_its_flops(store: Store) -> None:
    stored(store, planned(), 107.0)
    assert math.isclose(seconds(store, planned("finetune.steps=100"), "finetune"), LOAD_SECONDS + 250.0)


def test_twice_the_workers_should_be_twice_as_fast(store: Store) -> None:
    stored(store, planned(), 107.0)
    assert math.isclose(
        seconds(store, planned("finetune.workers=4"), "finetune", machine=Machine(4, 0)), LOAD_SECONDS + 50.0
    )


def test_what_was_most_alike_counts(store: Store) -> None:
    stored(store, planned(), 10.0)
    stored(store, planned("finetune.steps=4000"), 107.0)
    assert math.isclose(seconds(store, planned("finetune.steps=2000"), "finetune"), LOAD_SECONDS + 50.0)
    assert math.isclose(seconds(store, planned("finetune.steps=80"), "finetune"), 5.0 + 2 * 5.0)


def test_of_steps_that_waited_for_one_another_the_least_disturbed_counts(store: Store) -> None:
    stored(store, planned(), 107.0)
    (waited,) = (one for one in store.manifests() if one.key == planned()["finetune"].key)
    slow = waited.model_copy(update={"origin": waited.origin.model_copy(update={"seconds": 500.0})})
    history = History(store, [one if one.key != slow.key else slow for one in store.manifests()])
    assert math.isclose(estimate(planned("seed=1"), ["finetune"], history, MACHINE).seconds - START_SECONDS, 107.0)


def test_a_step_without_a_formula_should_take_as_long_as_the_last_of_its_kind(store: Store) -> None:
    stored(store, planned(), 10.0)
    assert math.isclose(seconds(store, planned("seed=1"), "classifier"), 10.0)


def test_what_a_cpu_did_says_nothing_of_a_gpu(store: Store) -> None:
    stored(store, planned(), 10.0)
    plan = planned("resources.finetune.gpu=1")
    found = expected(store, plan, "finetune", machine=Machine(2, 2))
    assert found.assumed == ["finetune"] and found.assumption == "half the peak of H100"


def test_what_a_gpu_did_in_one_precision_says_nothing_of_another(store: Store) -> None:
    on_gpu = Machine(2, 2)
    stored(store, planned("resources.finetune.gpu=1"), 10.0)
    assert expected(store, planned("resources.finetune.gpu=1", "seed=1"), "finetune", machine=on_gpu).assumed == []
    for precision in ("tf32", "bf16"):
        plan = planned("resources.finetune.gpu=1", f"finetune.precision={precision}")
        assert expected(store, plan, "finetune", machine=on_gpu).assumed == ["finetune"]
    on_cpu = planned("finetune.precision=tf32")
    stored(store, planned("seed=2"), 10.0)
    assert expected(store, on_cpu, "finetune").assumed == []


RECIPES = {"base": "weights", "profile": "profile", "distill/01.mha": "distill", "finetune": "finetune"}


@pytest.mark.parametrize("step", ["base", "profile", "distill/01.mha", "search/0", "finetune", "evaluate/stage2"])
@pytest.mark.parametrize(("precision", "peak"), [("fp32", 67e12), ("tf32", 495e12), ("bf16", 989e12)])
def test_every_step_is_assumed_to_reach_half_the_peak_of_its_precision(step: str, precision: str, peak: float) -> None:
    search = f"{{kind: learned, groups: 2, ratio: 0.5, pinned: [], search: {{precision: {precision}}}}}"
    section = RECIPES.get(step, "evaluate")
    plan = planned(f"graft.0.layers={search}" if step == "search/0" else f"{section}.precision={precision}")
    assert assumed_speed(replace(plan[step], resources=StepResources(gpu=1))) == peak / 2


def test_a_published_graft_should_take_3_hours_at_most_on_8_h100(store: Store) -> None:
    plan = make_plan(load(IMAGENET))
    found = expected(store, plan, *(step.name for step in plan.steps), machine=machine_for(plan, 8))
    assert 3600 < found.seconds < 3 * 3600
    assert [step.name for step in plan.steps if step.stage == "evaluate"] == [
        "evaluate/rootstock",
        "evaluate/stage2",
        "evaluate",
    ]


def test_the_time_is_shared_out_to_the_stages_by_what_they_take_of_the_machine(store: Store) -> None:
    plan = planned("resources.profile.gpu=1")
    stored(store, planned(), 10.0)
    names = ["base", "classifier", "finetune", "evaluate/stage1", "evaluate/stage2"]
    found = expected(store, plan, *names)
    whole = sum(found.shares.values())
    assert math.isclose(whole, 1.0)
    # base and finetune have both CPUs, as rows have; the classifier one of two.
    assert found.shares == pytest.approx(
        {"base": 10 / 45, "classifier": 5 / 45, "finetune": 10 / 45, "evaluate": 20 / 45}
    )
    assert expected(store, plan).shares == {}


def test_a_plan_prints_the_share_of_each_stage_the_largest_first(capsys: pytest.CaptureFixture[str]) -> None:
    shares = {"distill": 0.004, "evaluate": 0.556, "select": 0.0, "finetune": 0.44}
    show_expected(Expected(seconds=5400, gpu_hours=12, cpus=2, gpus=8, shares=shares), 4, None)
    assert capsys.readouterr().out.splitlines()[:2] == [
        "expected, by estimate: 1h30m on 8 GPUs, 12 GPU hours",
        "  by stage: evaluate 56%, finetune 44%, distill under 1%",
    ]


def test_without_history_a_speed_is_assumed_and_what_has_no_formula_is_named(store: Store) -> None:
    found = expected(store, planned(), "base", "classifier")
    assert found.assumed == ["base"] and found.unknown == ["classifier"]
    assert math.isclose(found.seconds - START_SECONDS - LOAD_SECONDS, 3 * ROOTSTOCK * 20 * 16 / (2 * CORE))


def changed(store: Store, stage: str, **changes: object) -> list[Manifest]:
    """The manifests of a store, those of a stage's steps, or of one step, having another origin."""
    return [
        one.model_copy(update={"origin": one.origin.model_copy(update=changes)})
        if stage in (one.identity["stage"], one.origin.step)
        else one
        for one in store.manifests()
    ]


def test_artifacts_of_earlier_versions_serve_but_say_nothing_of_speed(store: Store) -> None:
    plan = planned()
    stored(store, plan, 10.0)
    for step in ("finetune", "finetune/random_init", "classifier"):
        path = Path(store.url) / "artifacts" / plan[step].key / "manifest.json"
        told = json.loads(path.read_text())
        del told["seal"], told["origin"]["work"]
        path.write_text(json.dumps(told))
    assert set(plan.states(store).values()) == {"cached"}
    found = expected(store, planned("seed=1"), "finetune", "classifier", "profile")
    assert found.assumed == ["finetune"] and found.unknown == ["classifier"]


def test_steps_without_a_formula_are_held_against_those_of_their_name(store: Store) -> None:
    stored(store, planned(), 10.0)
    history = History(store, changed(store, "reference/heldout", seconds=30.0))
    heldout, judge = (planned("seed=1")[name] for name in ("reference/heldout", "reference/classifier"))
    assert (history.nearest(heldout), history.nearest(judge)) == (30.0, 10.0)


def test_a_checkpoint_is_not_held_against_a_training(store: Store) -> None:
    plan = planned()
    stored(store, plan, 10.0)
    assert History(store, store.manifests()).nearest(replace(plan["base"], work=None)) is None


@pytest.mark.parametrize("broken", [{}, {"stage": "finetune"}, {"stage": ["finetune"]}])
def test_artifacts_that_make_no_sense_are_passed_over(store: Store, broken: dict[str, object]) -> None:
    plan = planned()
    stored(store, plan, 10.0)
    done = work_done(plan["finetune"], torch.device("cpu"))
    origin = Origin(step="finetune", run="../elsewhere", seconds=math.nan, made="never", work=done)
    odd = Manifest(key="0" * 64, identity=broken, files={}, origin=origin)
    history = History(store, [odd, *store.manifests()])
    assert math.isclose(estimate(plan, ["finetune"], history, MACHINE).seconds - START_SECONDS, 10.0)


@pytest.mark.parametrize(
    "odd", [{"flops": 1e300}, {"flops": math.nan}, {"flops": -1.0}, {"shared_flops": -1e20}, {"devices": 0.0}], ids=str
)
def test_numbers_that_nobody_means_are_passed_over(store: Store, odd: dict[str, float]) -> None:
    plan = planned()
    stored(store, plan, 10.0)
    done = work_done(plan["finetune"], torch.device("cpu")).model_copy(update=odd)
    history = History(store, changed(store, "finetune", work=done))
    assert estimate(plan, ["finetune"], history, MACHINE).assumed == ["finetune"]


# -- the job played through


def test_steps_that_do_not_need_each_other_run_side_by_side(store: Store) -> None:
    stored(store, planned(), 10.0)
    sites = ("distill/01.mha", "distill/03.mha")
    apart = seconds(store, planned(), *sites)
    assert 9 < apart < 11
    one_core = seconds(store, planned(), *sites, machine=Machine(1, 0))
    assert 1.5 * apart < one_core < 2 * apart  # they share a pass


def test_a_pass_of_all_sites_takes_its_share_of_each_core(store: Store) -> None:
    plan = planned("distill.samples=800", "distill.epochs=1")
    stored(store, plan, 100.0)
    (own, shallow), (_, deep) = (work(plan, site) for site in ("distill/01.mha", "distill/03.mha"))
    took = seconds(store, plan, "distill/01.mha", "distill/03.mha", machine=Machine(2, 0))
    longest = 100.0 * own / (own + shallow)  # each took as long, of which the shallow one learned the longer
    assert math.isclose(took, longest + 100.0 * deep / (own + deep) / 2, rel_tol=0.01)


def test_steps_that_need_each_other_run_one_after_another(store: Store) -> None:
    stored(store, planned(), 10.0)
    assert math.isclose(seconds(store, planned(), "finetune", "evaluate", machine=Machine(8, 0)), 20.0)


@pytest.mark.parametrize(("share", "gpus"), [(0.5, 1), (1.0, 2)])
def test_sites_on_shares_of_a_gpu_or_on_several_run_side_by_side(store: Store, share: float, gpus: int) -> None:
    plan = planned(f"resources.distill.gpu={share}")
    stored(store, plan, 107.0)
    sites = ("distill/01.mha", "distill/03.mha")
    assert math.isclose(seconds(store, plan, *sites, machine=Machine(2, gpus)), 107.0, rel_tol=0.1)
    hours = expected(store, plan, *sites, machine=Machine(2, gpus)).gpu_hours
    assert math.isclose(hours, 2 * share * 107 / 3600, rel_tol=0.1)


def test_gpu_hours_count_shares_for_as_long_as_they_are_taken(store: Store) -> None:
    plan = planned("resources.distill.gpu=0.5", "resources.finetune.gpu=1")
    stored(store, plan, 3600.0)
    found = expected(store, plan, "finetune", machine=machine_for(plan, None))
    assert found.gpus == 2 and math.isclose(found.gpu_hours, 2.0)  # two workers


def test_two_shares_of_two_thirds_do_not_fit_a_gpu() -> None:
    plan = planned("resources.distill.gpu=0.6")
    step = plan["distill/01.mha"]
    assert Machine(2, 2).takes(step) == ("gpu", 1.0)


def test_fewer_gpus_than_a_step_takes_at_once_are_refused() -> None:
    with pytest.raises(SpecError, match=r"--gpus: got 1; accepted: at least 2, which finetune"):
        machine_for(planned("resources.finetune.gpu=1"), 1)


def test_the_last_estimate_is_that_of_the_run_which_made_the_latest_artifacts(store: Store) -> None:
    plan = planned()
    stored(store, plan, 10.0)
    changed = planned("finetune.steps=100", f"store={store.url}")
    _, last = api.estimate(changed, store, changed.states(store), list(store.manifests()))
    assert last is not None and (last.run, last.took) == ("earlier", 108)


@pytest.mark.parametrize(("given", "told"), [(3.2, "3s"), (70, "1m10s"), (7325, "2h02m"), (90000, "1d01h")])
def test_times_are_told_in_two_units(given: float, told: str) -> None:
    assert lasting(given) == told


# -- a real run


def test_after_a_run_the_plan_of_a_changed_job_shows_what_it_should_take(
    tiny: Finished, graft: Graft, tmp_path: Path
) -> None:
    shutil.copytree(tiny.store, tmp_path / ".graftwork", ignore=shutil.ignore_patterns("mlflow*"))
    done = {one.origin.step: one.origin.work for one in Store(str(tiny.store)).manifests()}
    for step in planned().steps:
        one = done[step.name]
        assert one is not None and (one.device, one.devices, one.workers) == ("cpu", step.workers, step.workers)
        assert (one.flops, one.shared_flops) == (work(planned(), step.name) if step.work else (None, 0.0))
    told = json.loads(graft("plan", str(TINY), "--set", "finetune.steps=80", "--json").stdout)
    assert told["expected"]["unknown"] == [] and told["expected"]["assumed"] == []
    assert told["expected"]["gpu_hours"] == 0
    took = {step["name"]: step["seconds"] for step in tiny.outcome["steps"]}
    assert told["expected"]["seconds"] > took["finetune"]
    assert told["last_estimate"]["run"] == tiny.run
    last = told["last_estimate"]
    assert last["took"] > 0 and last["expected"] > 0
    assert math.isclose(last["off"], last["took"] / last["expected"] - 1)
    lines = graft("plan", str(TINY), "--set", "finetune.steps=80").stdout
    assert "as fast as the most similar ones in this store were" in lines
    assert f"last estimate: {tiny.run}: expected " in lines
    nothing_left = graft("plan", str(TINY)).stdout
    assert "by estimate" not in nothing_left and f"last estimate: {tiny.run}: expected " in nothing_left
