"""Streaming: sites that learn side by side from passes of which nothing is kept end in the bits of sites alone."""

from __future__ import annotations

import gc
import itertools
import json
import math
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from benchmarks.artifacts import Folder
from graftwork.cluster.training import launcher
from graftwork.models.rootstocks import config_of, new_rootstock
from graftwork.models.rootstocks.dit import DiT
from graftwork.models.surgery import new_scion, observe, observing
from graftwork.pipeline.estimates.sharing import slots_of
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.edits import Edit, Parallel, Site
from graftwork.specs.reading.load import load
from graftwork.specs.resources import StepResources
from graftwork.specs.training import DistillSpec
from graftwork.stages.artifacts.evidence import Distilled, read_distilled, write_distilled
from graftwork.stages.artifacts.latents import Noised, NoisedAnew, read
from graftwork.stages.artifacts.plan import ChosenEdit
from graftwork.stages.catalog.distill import COPIES, DistillParams, recording_tasks
from graftwork.stages.catalog.flops import RootstockFlops
from graftwork.stages.contract import Context, Stopped, TaskScope
from graftwork.stages.distillation import distill, streaming
from graftwork.stages.distillation.activations import Pairs, Teacher
from graftwork.stages.distillation.loss import RelativeError
from graftwork.stages.distillation.streaming import Learner
from graftwork.stages.training.batches import TrainingSet
from graftwork.stages.training.engine import PlainEngine
from tests.conftest import TINY as TINY_JOB
from tests.small import noting
from tests.tiny_distillation import (
    DROPPED,
    MHA_EDIT,
    MHA_SITE,
    MLP_EDIT,
    MLP_SITE,
    SEVERAL,
    make_context,
    run_distill,
    write_inputs,
)
from tests.tiny_training import CPU, TINY, Killed, Reports, assert_same_bits, lively, make_data, state_of

pytestmark = pytest.mark.usefixtures("one_thread", "painted_alone")

# 24 samples in batches of 10 are three batches a pass, nine in all.
RECIPE: dict[str, Any] = {"passes": 3, "checkpoint_every": 1}
FILES = ("scion.safetensors", "distill.json")
PAIR = Edit(site=Site(block=0, target="pair"), operator=Parallel())


@pytest.fixture
def rootstock() -> DiT:
    return lively(DiT(TINY))


@pytest.fixture
def inputs(tmp_path: Path, rootstock: DiT, data: TrainingSet) -> dict[str, Folder]:
    return write_inputs(tmp_path, rootstock, data)


@pytest.fixture(autouse=True)
def save_after_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Site, ...]]:
    """The sites that each part of a pass of the rootstock fed."""
    found: list[tuple[Site, ...]] = []

    def note(teacher: Teacher, sites: Sequence[Site], noisy: Noised) -> None:
        found.append(tuple(sites))

    monkeypatch.setattr(Teacher, "streamed", noting(note, Teacher.streamed))
    return found


def streamed(store: Store, inputs: dict[str, Folder], out: Path, *edits: Edit, **changes: Any) -> None:
    """Do the steps of these sites in one task; the artifact of each is in a folder named by its site."""
    report, kept = changes.pop("report", None), dict[str, Any]()
    out.mkdir(exist_ok=True)
    for number, edit in enumerate(edits):
        ahead = edits[number + 1 :]
        scope = TaskScope(
            next=[_params(store, other, changes) for other in ahead],
            partials=[store.partial(f"{out.name}/{other.name}") for other in ahead],
            state=kept,
        )
        name = edit.name
        options = {**_recipe(changes), "edit": edit, "task_scope": scope}
        run_distill(store, f"{out.name}/{name}", inputs, out / name, report, **options)


def _recipe(changes: dict[str, Any]) -> dict[str, Any]:
    return {**RECIPE, **changes}


def _params(store: Store, edit: Edit, changes: dict[str, Any]) -> DistillParams:
    params: DistillParams = make_context(store, "", Path(), edit=edit, **_recipe(changes)).params
    return params


def assert_same_files(one: Path, other: Path, *edits: Edit) -> None:
    for edit in edits:
        for file in FILES:
            assert (one / edit.name / file).read_bytes() == (other / edit.name / file).read_bytes()


def test_sites_side_by_side_share_each_pass_and_end_in_the_bits_of_sites_alone(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, passes: list[tuple[Site, ...]]
) -> None:
    streamed(store, inputs, tmp_path / "together", MHA_EDIT, MLP_EDIT)
    assert passes == [(MHA_SITE, MLP_SITE)] * (9 + 3)  # the batches, and the held-out samples after each pass
    for edit in (MHA_EDIT, MLP_EDIT):
        streamed(store, inputs, tmp_path / "alone", edit)
    assert_same_files(tmp_path / "together", tmp_path / "alone", MHA_EDIT, MLP_EDIT)


def test_several_scions_for_one_site_learn_beside_each_other_as_they_do_alone(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, passes: list[tuple[Site, ...]]
) -> None:
    streamed(store, inputs, tmp_path / "together", *SEVERAL)
    assert passes == [(MHA_SITE, MLP_SITE)] * (9 + 3)
    for edit in SEVERAL:
        streamed(store, inputs, tmp_path / "alone", edit)
    assert_same_files(tmp_path / "together", tmp_path / "alone", *SEVERAL)


def test_a_site_without_an_operator_takes_no_part_in_the_passes_of_its_task(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, passes: list[tuple[Site, ...]]
) -> None:
    streamed(store, inputs, tmp_path / "together", DROPPED, MHA_EDIT, DROPPED)
    assert passes == [(MHA_SITE,)] * (9 + 3)
    streamed(store, inputs, tmp_path / "alone", MHA_EDIT)
    assert_same_files(tmp_path / "together", tmp_path / "alone", MHA_EDIT)


@pytest.mark.parametrize("dies_at", [2, 3, 5])
def test_sites_that_were_killed_together_go_on_in_the_same_bits(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, passes: list[tuple[Site, ...]], dies_at: int
) -> None:
    streamed(store, inputs, tmp_path / "straight", MHA_EDIT, MLP_EDIT)
    with pytest.raises(Killed):
        streamed(store, inputs, tmp_path / "killed", MHA_EDIT, MLP_EDIT, report=Reports(dies_at=dies_at))
    passes.clear()
    streamed(store, inputs, tmp_path / "killed", MHA_EDIT, MLP_EDIT)
    assert len(passes) < 9 + 3  # a checkpoint was there
    assert_same_files(tmp_path / "killed", tmp_path / "straight", MHA_EDIT, MLP_EDIT)


def test_a_site_that_is_further_joins_where_it_stands(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, passes: list[tuple[Site, ...]]
) -> None:
    for edit in (MHA_EDIT, MLP_EDIT):
        streamed(store, inputs, tmp_path / "alone", edit)
    with pytest.raises(Killed):
        streamed(store, inputs, tmp_path / "joined", MLP_EDIT, report=Reports(dies_at=5))
    passes.clear()
    streamed(store, inputs, tmp_path / "joined", MHA_EDIT, MLP_EDIT)
    # MLP's checkpoint has four batches, or five; one pass and its held-out samples are behind it.
    alone = passes.index((MHA_SITE, MLP_SITE))
    assert alone in (5, 6) and passes[:alone] == [(MHA_SITE,)] * alone
    assert passes[alone:] == [(MHA_SITE, MLP_SITE)] * (12 - alone)
    assert_same_files(tmp_path / "joined", tmp_path / "alone", MHA_EDIT, MLP_EDIT)


def test_what_is_asked_to_stop_saves_all_sites(store: Store, inputs: dict[str, Folder], tmp_path: Path) -> None:
    report = Reports()
    context = _stopping(make_context(store, "s", tmp_path, report, **_recipe({})), report.past(4), inputs, store)
    (tmp_path / "s").mkdir()
    with pytest.raises(Stopped, match="after batch 4"):
        distill.run(context)
    for key in ("s", "beside"):
        path = store.partial(key).load(streaming.CHECKPOINT)
        assert path is not None and int(load_file(path)["done"]) == 4


def _stopping(context: Context, stopping: Any, inputs: dict[str, Folder], store: Store) -> Context:
    scope = TaskScope(next=[_params(store, MLP_EDIT, {})], partials=[store.partial("beside")])
    return replace(context, stopping=stopping, inputs=inputs, task_scope=scope)


def test_the_errors_are_those_of_the_weights_that_are_left(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, rootstock: DiT
) -> None:
    streamed(store, inputs, tmp_path / "out", MHA_EDIT, passes=4, heldout=6, lr=0.03)
    summary = json.loads((tmp_path / "out" / str(MHA_SITE) / "distill.json").read_text())
    scion = new_scion(rootstock, MHA_EDIT, 0)
    scion.load_state_dict(load_file(tmp_path / "out" / str(MHA_SITE) / "scion.safetensors"))
    heldout = read(inputs["features"].place, "heldout")
    noisy = NoisedAnew(heldout, TINY.objective, 0, ("distill/heldout",))[:]
    seen = observe(rootstock, [MHA_SITE], noisy.z, noisy.t, noisy.condition)[MHA_SITE]
    with torch.no_grad():
        wrong = scion(*seen.inputs) - seen.output
    variance = (seen.output - seen.output.mean((0, 1))).square().sum()
    assert summary["loss"] == "l1" and 1 <= summary["best_epoch"] <= 4
    assert summary["heldout_error"] == pytest.approx(wrong.abs().mean().item(), rel=1e-5)
    assert summary["relative_error"] == pytest.approx((wrong.square().sum() / variance).item(), rel=1e-5)


@pytest.mark.parametrize(("answer", "error"), [(2.0, 0.0), (2.5, math.inf)])
def test_an_operator_whose_output_never_changes_has_an_error_that_can_be_read_back(
    answer: float, error: float, tmp_path: Path
) -> None:
    sums = RelativeError()
    sums.add(torch.full((2, 3, 4), answer), torch.full((2, 3, 4), 2.0))
    assert sums.item() == error
    told = Distilled(loss="l1", loss_because="", heldout_error=0.5, relative_error=sums.item(), best_epoch=1)
    write_distilled(tmp_path, told)
    assert read_distilled(tmp_path) == told
    edit = ChosenEdit(edit=MHA_EDIT, reason="", score=error, score_is="", heldout_error=0.5, relative_error=sums.item())
    assert ChosenEdit.model_validate_json(edit.model_dump_json()) == edit


def test_more_passes_bring_the_scion_nearer(store: Store, inputs: dict[str, Folder], tmp_path: Path) -> None:
    errors = []
    for passes in (1, 20):
        streamed(store, inputs, tmp_path / str(passes), MHA_EDIT, passes=passes, milestones=())
        summary = json.loads((tmp_path / str(passes) / str(MHA_SITE) / "distill.json").read_text())
        errors.append(summary["relative_error"])
    assert errors[1] < 0.8 * errors[0]


def test_parts_of_a_batch_make_the_step_of_the_whole_batch(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, passes: list[tuple[Site, ...]]
) -> None:
    streamed(store, inputs, tmp_path / "whole", MHA_EDIT)
    passes.clear()
    streamed(store, inputs, tmp_path / "parts", MHA_EDIT, micro_batch=4)
    assert len(passes) == 3 * (3 + 3 + 1) + 3  # of 10, 10 and 4 samples; and 3 held-out samples
    whole, parts = (load_file(tmp_path / name / str(MHA_SITE) / "scion.safetensors") for name in ("whole", "parts"))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_the_training_error_is_the_mean_over_the_samples_of_the_pass(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, rootstock: DiT, micro_batch: int | None
) -> None:
    report = Reports()
    changes = {"passes": 1, "lr": 1e-12, "micro_batch": micro_batch, "report": report}
    streamed(store, inputs, tmp_path / "out", MHA_EDIT, **changes)
    training = read(inputs["features"].place, "training")
    noisy = NoisedAnew(training, TINY.objective, 0, ("distill/passes",)).again(0)[:]
    seen = observe(rootstock, [MHA_SITE], noisy.z, noisy.t, noisy.condition)[MHA_SITE]
    with torch.no_grad():
        wrong = new_scion(rootstock, MHA_EDIT, 0)(*seen.inputs) - seen.output
    (told,) = [metrics["training_error"] for _, _, metrics in report.seen if "heldout_error" in metrics]
    assert told == pytest.approx(wrong.abs().mean().item(), rel=1e-4)


def test_a_pair_streams_by_itself_with_other_sites_behind_it(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, passes: list[tuple[Site, ...]]
) -> None:
    streamed(store, inputs, tmp_path / "out", MLP_EDIT, PAIR)
    assert passes == [(MLP_SITE,)] * 12 + [(PAIR.site,)] * 12


def test_a_site_whose_error_is_no_number_fails_by_itself(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed(store, inputs, tmp_path / "alone", MHA_EDIT)

    def spoil(learner: Learner, pairs: Pairs, share: float, lr: float | None) -> None:
        if learner.params.edit == MLP_EDIT:
            with torch.no_grad():
                next(learner.scion.parameters()).fill_(torch.nan)

    monkeypatch.setattr(Learner, "learn", noting(spoil, Learner.learn))
    with pytest.raises(FloatingPointError, match="the held-out error is nan in pass 1"):
        streamed(store, inputs, tmp_path / "together", MHA_EDIT, MLP_EDIT)
    assert_same_files(tmp_path / "together", tmp_path / "alone", MHA_EDIT)


def test_a_site_that_fails_ends_its_step_at_once_and_the_next_one_goes_on_where_it_stood(
    store: Store,
    inputs: dict[str, Folder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    passes: list[tuple[Site, ...]],
) -> None:
    def spoil(learner: Learner, pairs: Pairs, share: float, lr: float | None) -> None:
        if learner.params.edit == MLP_EDIT:
            with torch.no_grad():
                next(learner.scion.parameters()).fill_(torch.nan)

    streamed(store, inputs, tmp_path / "alone", MHA_EDIT)
    monkeypatch.setattr(Learner, "learn", noting(spoil, Learner.learn))
    passes.clear()
    with pytest.raises(FloatingPointError, match="in pass 1"):
        streamed(store, inputs, tmp_path / "after", MLP_EDIT, MHA_EDIT)
    assert passes == [(MLP_SITE, MHA_SITE)] * (3 + 1)  # one pass of three
    streamed(store, inputs, tmp_path / "after", MHA_EDIT)
    assert len(passes) == 4 + 2 * (3 + 1)
    assert_same_files(tmp_path / "after", tmp_path / "alone", MHA_EDIT)


# -- several workers

# The last batch of a pass is of one sample: the first worker has none of it.
SHARED: dict[str, Any] = {**RECIPE, "passes": 4, "batch": 23, "workers": 2}


def write_rest(folder: Path) -> dict[str, Folder]:
    folder.mkdir()
    return write_inputs(folder, lively(DiT(TINY)), make_data())


def one_of_two(rank: int, place: str) -> None:
    """Learn at two sites, at once and stopped in between; and at one without its neighbour."""
    torch.set_num_threads(1)
    streaming.CHECKPOINT_SECONDS = 0.0
    folder = Path(place)
    store, inputs, numbers = Store(f"{folder}/store"), write_rest(folder / f"inputs{rank}"), itertools.count()

    def run(name: str, edit: Edit, beside: Sequence[Edit], stopping: Any = None, report: Any = None) -> None:
        scope = TaskScope(
            next=[_params(store, other, SHARED) for other in beside],
            partials=[store.partial(f"{name}/{other.site}") for other in beside],
        )
        context = make_context(store, f"{name}/{edit.site}", folder / name, report, edit=edit, **SHARED)
        number = next(numbers)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet{number}", rank=rank, world_size=2)
        changed = replace(context, inputs=inputs, task_scope=scope, stopping=stopping or context.stopping)
        try:
            distill._stream_as_worker(changed, CPU)
        finally:
            dist.destroy_process_group()

    run("straight", MHA_EDIT, [MLP_EDIT])
    report = Reports()
    with pytest.raises(Stopped):
        run("stopped", MHA_EDIT, [MLP_EDIT], report.past(1), report)
    for name in ("stopped", "alone"):
        run(name, MHA_EDIT, [MLP_EDIT] if name == "stopped" else [])


def test_two_workers_share_each_pass_and_end_where_one_does_up_to_rounding(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = subprocess.Popen([sys.executable, "-m", __name__, str(tmp_path)], cwd=Path(__file__).parents[1])
    streamed(store, inputs, tmp_path / "one", MHA_EDIT, MLP_EDIT, **{**SHARED, "workers": 1})
    assert workers.wait(timeout=300) == 0
    shared = Store(str(tmp_path / "store"))
    monkeypatch.setattr(launcher, "launch", lambda *_: pytest.fail("what is through needs no workers"))
    for name in ("straight", "stopped", "alone"):
        edits = [MHA_EDIT] if name == "alone" else [MHA_EDIT, MLP_EDIT]
        streamed(shared, inputs, tmp_path / name, *edits, **SHARED)
        assert_same_files(tmp_path / name, tmp_path / "straight", *edits)
        for edit in edits:  # errors of a pass in which it stopped, too
            of_name, of_straight = (
                state_of(shared.partial(f"{one}/{edit.site}"), streaming.CHECKPOINT)["history"]
                for one in (name, "straight")
            )
            torch.testing.assert_close(of_name, of_straight, rtol=1e-6, atol=0)
    for edit in (MHA_EDIT, MLP_EDIT):
        one, two = (tmp_path / name / str(edit.site) for name in ("one", "straight"))
        torch.testing.assert_close(*(load_file(where / FILES[0]) for where in (two, one)), rtol=0, atol=1e-4)
        of_one, of_two = (json.loads((where / FILES[1]).read_text()) for where in (one, two))
        for figure in ("heldout_error", "relative_error"):
            assert of_two[figure] == pytest.approx(of_one[figure], rel=1e-4)


def test_sites_whose_workers_share_passes_have_a_task_for_each_group_that_finds_room() -> None:
    step: Any = SimpleNamespace(workers=4)
    assert [slots_of(step, room) for room in (0, 2, 4, 9)] == [0, 1, 1, 2]


def test_of_a_pass_one_sites_activations_live_at_a_time(rootstock: DiT, data: TrainingSet) -> None:
    latents = torch.randn(4, 1, 8, 8)
    sites = [Site(block=block, target=target) for block in range(TINY.depth) for target in ("mha", "mlp")]
    alive: list[weakref.ref[Tensor]] = []
    for _, seen in observing(rootstock, sites, latents, torch.arange(4), torch.tensor([0, 1, 2, 0])):
        alive.append(weakref.ref(seen.inputs[0]))
        del seen
        gc.collect()
        assert sum(one() is not None for one in alive) <= 2  # the block's two, of which one is still to come


def test_observing_yields_what_observe_returns(rootstock: DiT) -> None:
    sites = [MHA_SITE, PAIR.site, MLP_SITE]
    asked = (rootstock, sites, torch.randn(4, 1, 8, 8), torch.arange(4), torch.tensor([0, 1, 2, 0]))
    whole = observe(*asked)
    assert list(whole) == sites
    order = []
    for site, seen in observing(*asked):
        order.append(site)
        assert_same_bits(_tensors(seen), _tensors(whole[site]))
    assert order.index(MLP_SITE) < order.index(MHA_SITE)  # by block


def _tensors(seen: Any) -> dict[str, Tensor]:
    named: Iterator[tuple[str, Any]] = iter({"output": seen.output, "gate": seen.gate}.items())
    values = {name: value for name, value in named if value is not None}
    return values | {f"input {number}": value for number, value in enumerate(seen.inputs)}


def test_a_sample_has_noise_of_its_own_in_each_pass_whatever_is_drawn_with_it(data: TrainingSet) -> None:
    from graftwork.stages.artifacts.latents import Latents

    latents = NoisedAnew(Latents(data.latents, data.condition), TINY.objective, 0, ("distill/passes",))
    first, again = latents.again(0), latents.again(1)
    alone, among = first[torch.tensor([7])], first[torch.tensor([3, 7, 1])]
    assert torch.equal(alone.z[0], among.z[1]) and alone.t[0] == among.t[1]
    assert not torch.equal(first[:4].z, again[:4].z)
    assert torch.equal(first[2:5].z, first[torch.arange(2, 5)].z)


def test_the_rate_halves_at_the_epochs_shares_of_the_steps(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(PlainEngine, "step", noting(lambda self, loss, lr: rates.append(lr), PlainEngine.step))
    streamed(store, inputs, tmp_path / "out", MHA_EDIT, passes=4, batch=12, lr=0.08, milestones=(50, 100, 150))
    assert rates == [0.08, 0.08, 0.04, 0.04, 0.02, 0.02, 0.01, 0.01]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"passes": 2, "epochs": 10}, "epochs"),
        ({"passes": 2, "draws": 2}, "draws"),
        ({"micro_batch": 2}, "micro_batch"),
        ({"passes": 0}, "passes"),
        ({"workers": 2}, "workers"),
        ({"passes": 2, "workers": 65}, "workers"),
    ],
    ids=str,
)
def test_a_recipe_has_one_budget(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError) as refused:
        DistillSpec(**changes)
    assert [error["loc"] for error in refused.value.errors()] == [(line,)]


def test_passes_keep_nothing_that_a_pack_or_another_task_would_hold() -> None:
    from graftwork.stages.catalog.distill import _work

    class Flops:
        place = TINY.place

        def up_to(self, block: int) -> int:
            return 1000 * (block + 1)

    flops: Any = Flops()
    kept = _work(DistillSpec(samples=1000, epochs=2), MHA_EDIT, flops)
    passed = _work(DistillSpec(samples=1000, heldout=1000, passes=2), MHA_EDIT, flops)
    assert kept.activations > 0 and passed.activations == 0
    assert passed.shared == 2 * kept.shared and passed.own == kept.own
    params = [DistillParams(seed=0, edit=edit, recipe=DistillSpec(passes=2)) for edit in (MHA_EDIT, MLP_EDIT)]
    assert recording_tasks(params, StepResources(), 2) == 0
    assert DistillSpec(samples=80, passes=1).num_heldout == 10


def test_a_step_that_trains_nothing_has_no_workers_and_two_passes_of_the_heldout_samples() -> None:
    from graftwork.stages.catalog.distill import steps, streaming_memory

    graft = "graft=[{target: mha, operator: {kind: none}, layers: {kind: explicit, blocks: [0]}}, {kind: parallel}]"
    job = load(TINY_JOB, [graft, "distill={passes: 3, samples: 64, heldout: 16, workers: 2}"])
    dropped, *pairs = steps(job)
    assert dropped.workers == 1 and {pair.workers for pair in pairs} == {2}
    upper = job.model_copy(update={"graft": job.graft[1:]})
    assert streaming_memory(job) == streaming_memory(upper)
    (pair, _) = steps(upper)
    assert dropped.work is not None and pair.work is not None and dropped.work.own == 0
    # One block instead of the pair's two, and 32 samples instead of three times 80.
    embedded = RootstockFlops.of(job).up_to(-1)
    assert dropped.work.shared / 32 - embedded == pytest.approx((pair.work.shared / 240 - embedded) / 2)


def test_a_plan_tells_the_memory_of_passes_which_no_number_of_samples_changes(tmp_path: Path) -> None:
    from graftwork.pipeline.planning import preflight
    from graftwork.stages.catalog.distill import SCION_COPIES, streaming_memory

    def told(samples: int) -> tuple[int, int, int] | None:
        return streaming_memory(load(TINY_JOB, ["distill={passes: 2, samples: " + str(samples) + "}"]))

    few = told(64)
    assert few is not None and few == told(800) and streaming_memory(load(TINY_JOB, [])) is None
    job = load(TINY_JOB, ["distill={passes: 2, samples: 64}"])
    shape = (job.codec.latent_channels(job.data), job.latent_side(), job.latent_side())
    model = new_rootstock(config_of(job.model, shape, 10))
    parameters = sum(value.numel() for name, value in model.named_parameters() if "y_embedder" not in name)
    assert few[0] == pytest.approx(4 * parameters, rel=0.01)
    scions = [new_scion(model, edit, 0) for edit in job.edits()]
    assert few[1] == 4 * SCION_COPIES * sum(value.numel() for scion in scions for value in scion.parameters())
    (line,) = [line for line in preflight.notes(job) if line.startswith("distill.passes: a task of all 2 sites holds")]
    assert line.endswith("a sample that passes at once")


def test_with_a_memory_of_a_gpu_a_batch_is_cut_to_what_fits(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, rootstock: DiT
) -> None:
    bytes_a_sample = 2 * 16 * 16 * 4
    context = make_context(store, "a", tmp_path, **_recipe({"activations": 3 * COPIES * bytes_a_sample}))
    latents = NoisedAnew(read(inputs["features"].place, "training"), TINY.objective, 0, ("a",))
    teacher = Teacher(rootstock, (), latents, latents, context.params.recipe, torch.device("meta"))
    task: Any = type("Task", (), {"teacher": teacher})()
    own: Any = type("Own", (), {"params": context.params})()
    assert streaming.Together(task, context, own).at_once == 3
    assert CPU.type == "cpu"


if __name__ == "__main__":
    start_processes(one_of_two, args=(sys.argv[1],), nprocs=2, start_method="fork")
