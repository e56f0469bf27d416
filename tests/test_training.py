"""Training and distilling: a run that was killed and resumed ends in the same bits, on one worker as on several."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickletools
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import checkpoints
from models.diffusion import STEPS, Diffusion
from models.dit import Block, DiT, DiTConfig
from models.precision import computing
from models.streams import generator
from models.surgery import GATE, graft, modulations, new_scion, observe, scion_at
from pipeline.store import Partial, Store
from specs.graft import Edit, Parallel, Site
from specs.job import StepResources
from specs.operators import HyenaY, Mha, Mlp
from specs.steps import DistillParams
from specs.training import DistillSpec, TrainingSpec
from stages import Context, Stopped, Together, activations, batches, distill, hybrid, never, training
from stages.activations import Kept, Pairs, Rootstock
from stages.batches import DrawnAhead, TrainingSet, draw_batch, shuffled
from stages.evidence import LocalityCurves, Outputs, Profile, QuarterCurves, write_profile
from stages.latents import Latents, LatentsMeta, Noised, noised, read, read_meta, write_meta
from stages.training import PlainEngine, final_weights, learning_rate, train
from tests import small
from tests.small import Folder

TINY = DiTConfig(input_size=8, in_channels=1, patch=2, depth=2, width=16, heads=2, num_classes=3)
CPU = torch.device("cpu")
# Of the gradients, some are longer than `clip` and some are not.
RECIPE = TrainingSpec(steps=12, batch=8, lr=3e-3, warmup=3, clip=3.0, ema=0.7, schedule="cosine", checkpoint_every=4)


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


@dataclass
class Reports:
    """A report that notes all it is told, and dies at `dies_at`."""

    dies_at: int | None = None

    def __post_init__(self) -> None:
        self.seen: list[tuple[int, int, Mapping[str, float]]] = []

    def __call__(self, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        self.seen.append((done, total, metrics or {}))
        if done == self.dies_at:
            raise Killed

    def past(self, step: int) -> Callable[[], bool]:
        """Asks to stop from that step on."""
        return lambda: any(done >= step for done, _, _ in self.seen)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


def lively(module: nn.Module, seed: int = 0) -> Any:
    """Small enough for training to go well."""
    return small.lively(module, seed, scale=0.2)


def make_data() -> TrainingSet:
    draws = torch.Generator().manual_seed(1)
    return TrainingSet(torch.randn(30, 1, 8, 8, generator=draws), torch.arange(30) % 3, num_classes=3, device=CPU)


@pytest.fixture
def data() -> TrainingSet:
    return make_data()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def run_training(
    partial: Partial,
    data: TrainingSet,
    recipe: TrainingSpec = RECIPE,
    report: Reports | None = None,
    seed: int = 0,
    weights: int = 0,
    stopping: Callable[[], bool] = never,
) -> None:
    """Train from the weights of that number, or from the checkpoint."""

    def make_engine(state: Mapping[str, Tensor] | None) -> PlainEngine:
        model = lively(DiT(TINY), weights)
        return PlainEngine(model, betas=recipe.betas, clip=recipe.clip, ema=recipe.ema, state=state)

    train(
        make_engine,
        data,
        recipe,
        seed=seed,
        stream="base",
        partial=partial,
        report=report or Reports(),
        stopping=stopping,
    )


def state_of(partial: Partial, name: str = training.CHECKPOINT) -> dict[str, Tensor]:
    path = partial.load(name)
    assert path is not None
    return load_file(path)


def assert_same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# -- training


def run_until_done(store: Store, key: str, data: TrainingSet, deaths: tuple[int, ...]) -> None:
    """Start again after each death, from other weights than at first: all must come from the checkpoint."""
    for death in (*deaths, None):
        weights = 99 if store.state(key) == "partial" else 0
        try:
            run_training(store.partial(key), data, report=Reports(dies_at=death), weights=weights)
        except Killed:
            assert death is not None


@pytest.mark.parametrize("deaths", [(3,), (6,), (9,), (12,), (6, 9, 12)], ids=str)
def test_training_that_was_killed_and_resumed_ends_in_the_same_bits(
    store: Store, data: TrainingSet, monkeypatch: pytest.MonkeyPatch, deaths: tuple[int, ...]
) -> None:
    monkeypatch.setattr(training, "POINTS", 4)  # points of the curve at 3, 6, 9, 12; checkpoints at 4, 8, 12
    run_until_done(store, "straight", data, ())
    run_until_done(store, "killed", data, deaths)
    assert_same_bits(state_of(store.partial("killed")), state_of(store.partial("straight")))


def test_a_kill_costs_no_more_than_the_work_since_the_last_checkpoint(store: Store, data: TrainingSet) -> None:
    with pytest.raises(Killed):
        run_training(store.partial("a"), data, report=Reports(dies_at=11))
    report = Reports()
    run_training(store.partial("a"), data, report=report)
    assert [done for done, _, _ in report.seen] == [8, 9, 10, 11, 12]


def test_how_often_checkpoints_are_saved_changes_no_bit(store: Store, data: TrainingSet) -> None:
    for key, every in (("seldom", 12), ("often", 1)):
        run_training(store.partial(key), data, RECIPE.model_copy(update={"checkpoint_every": every}))
    assert_same_bits(state_of(store.partial("seldom")), state_of(store.partial("often")))


@pytest.mark.parametrize("asked", [3, 5, 8])
def test_training_that_is_asked_to_stop_saves_and_goes_on_in_the_same_bits(
    store: Store, data: TrainingSet, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    monkeypatch.setattr(training, "POINTS", 4)  # points of the curve at 3, 6, 9, 12; checkpoints at 4, 8, 12
    steps = itertools.count()
    with pytest.raises(Stopped, match=f"before step {asked + 1}"):
        run_training(store.partial("stopped"), data, stopping=lambda: next(steps) >= asked)
    assert state_of(store.partial("stopped"))["progress"][0] == asked
    run_training(store.partial("stopped"), data, weights=99)
    run_training(store.partial("straight"), data)
    assert_same_bits(state_of(store.partial("stopped")), state_of(store.partial("straight")))


def test_another_seed_ends_elsewhere(store: Store, data: TrainingSet) -> None:
    for seed in (0, 1):
        run_training(store.partial(str(seed)), data, seed=seed)
    first, second = (final_weights(store.partial(key))[0] for key in ("0", "1"))
    assert not torch.equal(first["x_embedder.proj.weight"], second["x_embedder.proj.weight"])


def test_the_curve_ends_at_the_last_step_with_the_losses_that_were_reported(store: Store, data: TrainingSet) -> None:
    report = Reports()
    run_training(store.partial("a"), data, report=report)
    _, curve = final_weights(store.partial("a"))
    assert curve == [(done, metrics["loss"]) for done, _, metrics in report.seen if metrics]
    assert curve[-1][0] == RECIPE.steps


def test_a_point_of_the_curve_is_the_mean_loss_since_the_one_before(
    store: Store, data: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(store.partial("fine"), data)
    monkeypatch.setattr(training, "POINTS", 2)  # a point every 6 steps
    run_training(store.partial("coarse"), data)
    fine, coarse = ([loss for _, loss in final_weights(store.partial(key))[1]] for key in ("fine", "coarse"))
    assert coarse == pytest.approx([np.mean(fine[:6]), np.mean(fine[6:])], rel=1e-5)


def test_training_lowers_the_loss(store: Store, data: TrainingSet) -> None:
    run_training(store.partial("a"), data, RECIPE.model_copy(update={"steps": 80, "warmup": 5, "checkpoint_every": 80}))
    _, curve = final_weights(store.partial("a"))
    first, last = (np.mean([loss for _, loss in part]) for part in (curve[:10], curve[-10:]))
    assert last < 0.8 * first


def test_a_loss_that_is_no_number_stops_the_training_and_names_the_step(store: Store, data: TrainingSet) -> None:
    spoilt = 17
    order = torch.cat([torch.randperm(30, generator=generator(0, "base", "epoch", e)) for e in range(4)])
    first_seen = order.tolist().index(spoilt) // RECIPE.batch + 1
    data.latents[spoilt] = math.nan
    with pytest.raises(FloatingPointError, match=rf"nan at step {first_seen};"):
        run_training(store.partial("a"), data)


def plain_training(data: TrainingSet, recipe: TrainingSpec) -> tuple[DiT, list[dict[str, Tensor]]]:
    """The same training in its simplest form; returns the model and its weights after each step."""
    model, steps = lively(DiT(TINY)), []
    adam = torch.optim.AdamW(model.parameters(), betas=recipe.betas, weight_decay=0.0, fused=True)
    for step in range(recipe.steps):
        x, t, y, noise = draw_batch(data, recipe, 0, "base", step, rank=0, workers=1)
        adam.zero_grad()
        Diffusion().loss(model, x, t, y, noise).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        adam.param_groups[0]["lr"] = learning_rate(recipe, step)
        adam.step()
        steps.append({name: value.detach().clone() for name, value in model.named_parameters()})
    return model, steps


def test_a_step_is_clipped_adamw_without_decay(store: Store, data: TrainingSet) -> None:
    run_training(store.partial("a"), data)
    found = state_of(store.partial("a"))
    _, steps = plain_training(data, RECIPE)
    torch.testing.assert_close({name: found[f"weights/{name}"] for name in steps[-1]}, steps[-1], rtol=0, atol=1e-6)


def test_the_average_moves_by_its_share_towards_the_weights_at_each_step(store: Store, data: TrainingSet) -> None:
    run_training(store.partial("a"), data)
    average = {name: value.detach().clone() for name, value in lively(DiT(TINY)).named_parameters()}
    for weights in plain_training(data, RECIPE)[1]:
        average = {name: 0.7 * value + 0.3 * weights[name] for name, value in average.items()}
    torch.testing.assert_close(final_weights(store.partial("a"))[0], average, rtol=0, atol=1e-6)


def one_of_two(rank: int, folder: str) -> None:
    """Train straight through; then once more, asked to stop on the way, and go on in a new group."""
    torch.set_num_threads(1)
    store = Store(f"{folder}/store")
    for start, key in enumerate(("two", "stopped", "stopped")):
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet{start}", rank=rank, world_size=2)
        report = Reports()
        asked = start == 1 and rank == 0  # the other worker never hears of it
        try:
            run_training(store.partial(key), make_data(), report=report, stopping=report.past(5) if asked else never)
            assert start != 1
        except Stopped:
            assert start == 1
        dist.destroy_process_group()


def test_two_workers_end_where_one_does_up_to_rounding(tmp_path: Path, data: TrainingSet) -> None:
    workers = subprocess.Popen([sys.executable, "-m", __name__, str(tmp_path)], cwd=Path(__file__).parents[1])
    store = Store(str(tmp_path / "store"))
    run_training(store.partial("one"), data)
    assert workers.wait(timeout=300) == 0
    one, two, stopped = (state_of(store.partial(key)) for key in ("one", "two", "stopped"))
    assert_same_bits(stopped, two)
    assert_near(two, one)


class Asked(TorchDispatchMode):
    """Notes after which reported step the host asked for a tensor's value, or moved a constant of the diffusion."""

    def __init__(self, report: Reports) -> None:
        super().__init__()
        self.report, self.steps = report, list[int]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asks = operation is torch.ops.aten._local_scalar_dense.default
        moves = operation is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64
        if self.report.seen and (asks or moves):
            self.steps.append(self.report.seen[-1][0])
        return operation(*args, **(kwargs or {}))


def test_the_host_asks_for_no_value_and_moves_no_constant_but_at_points_and_checkpoints(
    store: Store, data: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "POINTS", 2)  # points of the curve at 6 and 12
    report = Reports()
    with Asked(report) as asked:
        run_training(store.partial("a"), data, RECIPE.model_copy(update={"checkpoint_every": 12}), report)
    assert asked.steps == [0, 6, 12]  # for the point at 6; for that at 12, and the checkpoint


# -- what may be set without another result


@pytest.fixture
def ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code is traced and differentiated as ever, but runs operation by operation: no C++ is compiled."""
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: whole(module, backend="aot_eager"))


def run_set_up(store: Store, key: str, data: TrainingSet, **settings: bool) -> dict[str, Tensor]:
    recipe = RECIPE.model_copy(update=settings)

    def make_engine(state: Mapping[str, Tensor] | None) -> PlainEngine:
        model = lively(DiT(TINY))
        training.set_up_blocks(model, recipe)
        return PlainEngine(model, betas=recipe.betas, clip=recipe.clip, ema=recipe.ema, state=state)

    train(make_engine, data, recipe, seed=0, stream="base", partial=store.partial(key), report=Reports())
    return state_of(store.partial(key))


def test_blocks_that_keep_no_activations_end_in_the_same_bits(
    store: Store, data: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, c: (passes.append("block"), forward(self, x, c))[1])
    kept = run_set_up(store, "kept", data)
    assert len(passes) == TINY.depth * RECIPE.steps
    again = run_set_up(store, "again", data, checkpointing=True)
    assert len(passes) == 3 * TINY.depth * RECIPE.steps  # each block's pass once more
    assert_same_bits(again, kept)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_compiled_blocks_end_where_the_others_do_up_to_rounding(
    store: Store, data: TrainingSet, ahead_of_time: None, checkpointing: bool
) -> None:
    assert_near(
        run_set_up(store, "compiled", data, compile=True, checkpointing=checkpointing), run_set_up(store, "plain", data)
    )


@pytest.mark.slow
def test_blocks_compiled_to_machine_code_end_where_the_others_do_up_to_rounding(
    store: Store, data: TrainingSet
) -> None:
    assert_near(run_set_up(store, "compiled", data, compile=True), run_set_up(store, "plain", data))


def assert_near(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Of states of one training, up to rounding."""
    for state in (first, second):
        state["progress"] = small.progress(state["progress"])
        for name, value in state.items():
            if name.endswith("attn.qkv.bias"):
                # A key's bias cancels in the softmax: its gradient is rounding alone, which Adam scales up.
                value[TINY.width : 2 * TINY.width] = 0
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


# -- batches and learning rates


@pytest.mark.parametrize("size", [1, 5, 30])
def test_every_item_comes_once_an_epoch(size: int) -> None:
    order = shuffled(size, 0, 4 * size, 0, "base").reshape(4, size)
    assert all(sorted(epoch.tolist()) == list(range(size)) for epoch in order)


def test_epochs_come_in_different_orders() -> None:
    assert len({tuple(epoch.tolist()) for epoch in shuffled(30, 0, 120, 0, "base").reshape(4, 30)}) == 4


@pytest.mark.parametrize("count", [1, 7, 8, 30, 64])
def test_any_slicing_gives_the_same_sequence(count: int) -> None:
    pieces = [shuffled(30, start, count, 0, "base") for start in range(0, 128, count)]
    assert torch.equal(torch.cat(pieces)[:128], shuffled(30, 0, 128, 0, "base"))


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_the_workers_slices_are_the_whole_batch(data: TrainingSet, workers: int) -> None:
    whole = draw_batch(data, RECIPE, 0, "base", 5, rank=0, workers=1)
    slices = [draw_batch(data, RECIPE, 0, "base", 5, rank, workers) for rank in range(workers)]
    assert all(
        torch.equal(torch.cat(parts), part) for parts, part in zip(zip(*slices, strict=True), whole, strict=True)
    )


def test_a_latent_keeps_its_label(data: TrainingSet) -> None:
    recipe = RECIPE.model_copy(update={"label_dropout": 0.0})
    x, _, y, _ = draw_batch(data, recipe, 0, "base", 2, rank=0, workers=1)
    for latent, label in zip(x, y, strict=True):
        (index,) = (data.latents == latent).flatten(1).all(1).nonzero().flatten().tolist()
        assert data.labels[index] == label


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_dropped_labels_becomes_the_null_class(data: TrainingSet, share: float) -> None:
    recipe = RECIPE.model_copy(update={"label_dropout": share, "batch": 4000})
    _, _, y, _ = draw_batch(data, recipe, 0, "base", 2, rank=0, workers=1)
    assert (y == data.num_classes).float().mean().item() == pytest.approx(share, abs=0.03)


def test_timesteps_are_uniform_over_the_chain(data: TrainingSet) -> None:
    _, t, _, _ = draw_batch(data, RECIPE.model_copy(update={"batch": 20_000}), 0, "base", 0, rank=0, workers=1)
    assert (t.min().item(), t.max().item()) == (0, STEPS - 1)
    assert t.float().mean().item() == pytest.approx((STEPS - 1) / 2, rel=0.03)


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_a_worker_draws_its_own_noise_only(data: TrainingSet, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    places: list[Any] = []
    named = batches.generator
    monkeypatch.setattr(batches, "generator", lambda *name: (places.append(name), named(*name))[1])
    draw_batch(data, RECIPE, 0, "base", 5, workers - 1, workers)
    share = RECIPE.batch // workers
    assert [name[-1] for name in places if "noise" in name] == list(range(RECIPE.batch - share, RECIPE.batch))


def test_noise_is_unit_gaussian_and_no_two_samples_share_it(data: TrainingSet) -> None:
    recipe = RECIPE.model_copy(update={"batch": 400})
    noise = torch.cat([draw_batch(data, recipe, 0, "base", step, rank=0, workers=1).noise for step in (0, 1)])
    assert noise.mean().item() == pytest.approx(0, abs=0.02) and noise.std().item() == pytest.approx(1, abs=0.02)
    assert len(noise.flatten(1).unique(dim=0)) == 800


def threads_of_batches() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_batches_are_drawn_while_a_step_runs_and_come_in_order() -> None:
    drawn: queue.SimpleQueue[int] = queue.SimpleQueue()

    def draw(step: int) -> Any:
        drawn.put(step)
        return f"batch {step}"

    with DrawnAhead(draw, range(3, 9)) as ahead:
        for step, batch in ahead:
            assert batch == f"batch {step}"
            if step == 3:  # while this step runs, the next ones are drawn, and no more
                assert [drawn.get(timeout=30) for _ in range(1 + batches.DEPTH)] == [3, 4, 5]
                assert drawn.empty()
        assert step == 8
    assert threads_of_batches() == []


def test_what_a_draw_raises_is_raised_at_its_step_and_leaves_no_thread() -> None:
    def draw(step: int) -> Any:
        if step == 4:
            raise OSError("no such file")

    done = []
    with pytest.raises(OSError, match="no such file"), DrawnAhead(draw, range(9)) as ahead:
        for step, _ in ahead:
            done.append(step)
    assert done == [0, 1, 2, 3]
    assert threads_of_batches() == []


@pytest.mark.parametrize("end", [Killed, Stopped], ids=["an error", "a stop"])
def test_training_leaves_no_thread_behind(store: Store, data: TrainingSet, end: type[BaseException]) -> None:
    report = Reports(dies_at=5 if end is Killed else None)
    with pytest.raises(end):
        run_training(store.partial("a"), data, report=report, stopping=report.past(5))
    assert threads_of_batches() == []


def test_the_share_of_the_time_that_was_waited_for_data_is_reported(store: Store, data: TrainingSet) -> None:
    report = Reports()
    run_training(store.partial("a"), data, report=report)
    shares = [metrics["data_wait"] for _, _, metrics in report.seen if metrics]
    assert len(shares) == RECIPE.steps and all(0 <= share <= 1 for share in shares)
    with DrawnAhead(lambda step: time.sleep(0.05), range(4)) as slow:  # type: ignore[arg-type,return-value]
        list(slow)
        assert slow.share_waited() > 0.5


def rates(**recipe: Any) -> list[float]:
    spec = TrainingSpec(steps=20, batch=1, lr=0.1, **recipe)
    return [learning_rate(spec, step) for step in range(20)]


def test_the_warm_up_rises_in_equal_steps_to_the_full_rate() -> None:
    assert rates(warmup=4)[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])


def test_a_constant_rate_stays() -> None:
    assert rates(warmup=4)[4:] == [0.1] * 16 and rates() == [0.1] * 20


def test_a_cosine_falls_from_the_full_rate_through_its_half_towards_zero() -> None:
    found = rates(schedule="cosine", warmup=4)
    assert found[4] == 0.1 and found[12] == pytest.approx(0.05)
    assert found[4:] == sorted(found[4:], reverse=True) and 0 < found[-1] < 0.002


def test_a_warm_up_longer_than_the_training_only_rises() -> None:
    assert rates(schedule="cosine", warmup=40) == pytest.approx([0.1 * (step + 1) / 40 for step in range(20)])


# -- latents as distillation sees them


def test_a_samples_noise_depends_on_its_place_alone(data: TrainingSet) -> None:
    latents = Latents(data.latents, data.labels)
    few, many = (noised(latents.first(count), 2, 0, "distill") for count in (4, 9))
    assert (
        torch.equal(few.z, many.z[:8]) and torch.equal(few.t, many.t[:8]) and torch.equal(few.labels, many.labels[:8])
    )


def test_each_draw_of_a_sample_has_a_timestep_and_noise_of_its_own(data: TrainingSet) -> None:
    shown = noised(Latents(data.latents[:1], data.labels[:1]), 3, 0, "distill")
    assert len(set(shown.t.tolist())) == 3
    assert shown.labels.tolist() == [0, 0, 0]


# -- distillation


MHA_SITE, MLP_SITE = Site(block=1, target="mha"), Site(block=0, target="mlp")
MHA_EDIT = Edit(site=MHA_SITE, operator=HyenaY())


def make_context(store: Store, key: str, out: Path, report: Reports | None = None, **changes: Any) -> Context:
    edit, within = changes.pop("edit", MHA_EDIT), changes.pop("within", ())
    recipe = {"samples": 24, "epochs": 7, "batch": 10, "lr": 0.01, "milestones": (3,), "checkpoint_every": 2}
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


@pytest.fixture
def rootstock() -> DiT:
    return lively(DiT(TINY))


@pytest.fixture
def shown(data: TrainingSet) -> Noised:
    return noised(Latents(data.latents[:24], data.labels[:24]), 1, 0, "distill")


@pytest.fixture
def source(rootstock: DiT, shown: Noised) -> Kept:
    return recorded(rootstock, MHA_SITE, shown)


@pytest.fixture
def unseen(rootstock: DiT, data: TrainingSet) -> Kept:
    kept = Latents(data.latents[24:], data.labels[24:])
    return recorded(rootstock, MHA_SITE, noised(kept, 1, 0, "distill/heldout"))


def recorded(rootstock: DiT, site: Site, shown: Noised, gate_weighted: bool = False) -> Kept:
    whole = Rootstock(rootstock, (), shown, shown, DistillSpec(gate_weighted=gate_weighted), CPU)
    return Kept(whole.record([site], shown, CPU)[site], CPU)


@pytest.mark.parametrize("deaths", [(1,), (3,), (4,), (7,), (3, 5, 6)], ids=str)
def test_distilling_that_was_killed_and_resumed_ends_in_the_same_bits(
    rootstock: DiT, source: Kept, unseen: Kept, store: Store, tmp_path: Path, deaths: tuple[int, ...]
) -> None:
    def distilled(key: str, deaths: tuple[int, ...]) -> tuple[dict[str, Tensor], list[tuple[float, float, float]]]:
        for death in deaths:
            scion = new_scion(rootstock, MHA_EDIT, 99 if store.state(key) == "partial" else 0)
            with pytest.raises(Killed):
                distill.fit(scion, source, unseen, "l1", make_context(store, key, tmp_path, Reports(dies_at=death)))
        scion = new_scion(rootstock, MHA_EDIT, 99 if store.state(key) == "partial" else 0)
        history = distill.fit(scion, source, unseen, "l1", make_context(store, key, tmp_path))
        return scion.state_dict(), history

    straight, killed = distilled("straight", ()), distilled("killed", deaths)
    assert killed[1] == straight[1]
    assert_same_bits(killed[0], straight[0])


def test_distilling_that_is_asked_to_stop_saves_and_goes_on_in_the_same_bits(
    rootstock: DiT, source: Kept, unseen: Kept, store: Store, tmp_path: Path
) -> None:
    ends = []
    for key, asked in (("straight", False), ("stopped", True)):
        report = Reports()
        context = replace(make_context(store, key, tmp_path, report), stopping=report.past(3))
        if asked:
            with pytest.raises(Stopped, match="after epoch 3"):
                distill.fit(new_scion(rootstock, MHA_EDIT, 0), source, unseen, "l1", context)
        scion = new_scion(rootstock, MHA_EDIT, 99 if asked else 0)
        history = distill.fit(scion, source, unseen, "l1", make_context(store, key, tmp_path))
        ends.append((scion.state_dict(), history))
    assert ends[0][1] == ends[1][1]
    assert_same_bits(ends[0][0], ends[1][0])


def test_distilling_brings_the_scion_nearer(
    rootstock: DiT, source: Kept, unseen: Kept, store: Store, tmp_path: Path
) -> None:
    scion = new_scion(rootstock, MHA_EDIT, 0)
    before = distill.relative_error(scion, unseen)
    distill.fit(scion, source, unseen, "l1", make_context(store, "a", tmp_path, epochs=30))
    assert distill.relative_error(scion, unseen) < 0.7 * before


def test_the_weights_of_the_best_epoch_are_kept(rootstock: DiT, source: Kept, store: Store, tmp_path: Path) -> None:
    scion = new_scion(rootstock, MHA_EDIT, 0)
    with torch.no_grad():  # held out is what the scion puts out at first, so that each epoch leads away from it
        contrary = Kept(Pairs(source.pairs.inputs, scion(*source.pairs.inputs), None), CPU)
    history = distill.fit(scion, source, contrary, "l1", make_context(store, "a", tmp_path))
    errors = [heldout for _, _, heldout in history]
    assert errors.index(min(errors)) == 0
    assert distill.error_on(scion, contrary, distill.LOSSES["l1"]) == errors[0]


def test_the_rate_halves_at_each_milestone(
    rootstock: DiT, source: Kept, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = PlainEngine.step
    monkeypatch.setattr(PlainEngine, "step", lambda self, loss, lr: (rates.append(lr), step(self, loss, lr)))
    scion = new_scion(rootstock, MHA_EDIT, 0)
    context = make_context(store, "a", tmp_path, epochs=5, batch=24, lr=0.08, milestones=(1, 3))
    distill.fit(scion, source, source, "l1", context)
    assert rates == [0.08, 0.04, 0.04, 0.02, 0.02]


def test_a_heldout_error_that_is_no_number_stops_the_distilling_and_names_the_epoch(
    rootstock: DiT, source: Kept, store: Store, tmp_path: Path
) -> None:
    broken = Kept(Pairs(source.pairs.inputs, source.pairs.outputs * math.nan, None), CPU)
    with pytest.raises(FloatingPointError, match="epoch 1"):
        distill.fit(new_scion(rootstock, MHA_EDIT, 0), source, broken, "l1", make_context(store, "a", tmp_path))


@pytest.mark.parametrize(
    ("site", "loss", "kind", "because"),
    [
        (MHA_SITE, "auto", "l1", "the outputs' excess kurtosis is 30, above 12"),
        (MLP_SITE, "auto", "l2", "the outputs' excess kurtosis is 12, at most 12"),
        (MHA_SITE, "l2", "l2", "set in the spec"),
        (MLP_SITE, "huber", "huber", "set in the spec"),
        (Site(block=0, target="pair"), "auto", "l1", "a pair adds what its attention puts out"),
    ],
    ids=str,
)
def test_auto_goes_by_the_tails_of_what_the_operator_puts_out(
    tmp_path: Path, site: Site, loss: Any, kind: str, because: str
) -> None:
    keep_profile(tmp_path, {MHA_SITE: 30.0, MLP_SITE: 12.0})
    context = make_bare({"profile": Folder("p", tmp_path)})
    assert distill.loss_for(DistillSpec(loss=loss), site, context) == (kind, because)


def keep_profile(folder: Path, kurtosis: dict[Site, float]) -> None:
    """A profile in which only the outputs' kurtosis says something."""
    rest: dict[str, Any] = {"mean": 0, "std": 1, "largest": 5, "largest_magnitudes": (5,), "quantiles": {}}
    outputs = {str(site): Outputs(excess_kurtosis=value, **rest) for site, value in kurtosis.items()}
    nothing: dict[str, Any] = {"tokens": {}, "patches": {}}
    curves = LocalityCurves(**nothing, by_quarter=QuarterCurves(**nothing))
    write_profile(folder, Profile(outputs=outputs, locality=curves))


ERRORS: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": torch.abs,
    "l2": torch.square,
    "huber": lambda e: torch.where(e.abs() < 1, 0.5 * e.square(), e.abs() - 0.5),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "gate weighted"])
@pytest.mark.parametrize("kind", ERRORS)
def test_the_error_is_the_mean_loss_each_entry_by_its_weight(kind: str, weighted: bool) -> None:
    draws = torch.Generator().manual_seed(0)
    inputs, outputs = 2 * torch.randn(2, 5, 4, 3, generator=draws)
    weights = torch.rand(5, 1, 3, generator=draws)
    pairs = Pairs((inputs[1:4],), outputs[1:4], weights[1:4] if weighted else None)
    expected = ERRORS[kind](inputs[1:4] - outputs[1:4]) * (weights[1:4] if weighted else 1)
    found = distill.error(nn.Identity(), pairs, distill.LOSSES[kind])
    torch.testing.assert_close(found, expected.mean())


@pytest.mark.parametrize("site", [MHA_SITE, MLP_SITE], ids=str)
def test_the_weight_of_an_error_is_the_size_of_the_sites_gate(rootstock: DiT, shown: Noised, site: Site) -> None:
    pairs = recorded(rootstock, site, shown, gate_weighted=True).pairs
    _, c = rootstock.embed(shown.z, shown.t, shown.labels)
    gate = modulations(rootstock.blocks[site.block], c)[GATE[site.target]]
    assert pairs.weights is not None
    torch.testing.assert_close(pairs.weights, gate.abs()[:, None])


def test_unweighted_pairs_have_no_weights(source: Kept) -> None:
    assert source.pairs.weights is None


def test_pairs_are_what_the_operator_saw_and_put_out_whatever_the_batches(
    rootstock: DiT, shown: Noised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "BATCH", 7)
    pairs = recorded(rootstock, MHA_SITE, shown).pairs
    seen = observe(rootstock, [MHA_SITE], shown.z, shown.t, shown.labels)[MHA_SITE]
    torch.testing.assert_close((pairs.inputs, pairs.outputs), (seen.inputs, seen.output))


def test_the_heldout_error_is_the_mean_over_all_pairs_whatever_the_batches(
    source: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (source.pairs.inputs[0] - source.pairs.outputs).abs().mean().item()
    monkeypatch.setattr(distill, "BATCH", 7)
    assert distill.error_on(nn.Identity(), source, distill.LOSSES["l1"]) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(("site", "operator"), [(MHA_SITE, Mha()), (MLP_SITE, Mlp(ratio=4))], ids=str)
def test_a_copy_of_the_operator_has_no_error(rootstock: DiT, shown: Noised, site: Site, operator: Any) -> None:
    scion = new_scion(rootstock, Edit(site=site, operator=operator), seed=0)
    scion.load_state_dict(scion_at(rootstock, site).state_dict())
    same = recorded(rootstock, site, shown)
    assert distill.error_on(scion, same, distill.LOSSES["l1"]) == 0
    assert distill.relative_error(scion, same) == 0


def test_a_mimic_that_puts_out_the_mean_has_a_relative_error_of_one(source: Kept) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return source.pairs.outputs.mean((0, 1)).expand_as(x)

    assert distill.relative_error(Mean(), source) == pytest.approx(1, rel=1e-5)


# -- the whole step, and what it leaves


@pytest.fixture
def inputs(tmp_path: Path, rootstock: DiT, data: TrainingSet) -> dict[str, Folder]:
    features, base = tmp_path / "features", tmp_path / "base"
    features.mkdir()
    base.mkdir()
    for name, part in (("training", slice(0, 24)), ("heldout", slice(24, 30))):
        np.save(features / f"{name}_latents.npy", data.latents[part].numpy())
        np.save(features / f"{name}_labels.npy", data.labels[part].numpy())
    meta = LatentsMeta(codec="pixel", channels=1, side=8, classes=("a", "b", "c"), num_training=24, num_heldout=6)
    write_meta(features, meta)
    checkpoints.save(rootstock, (), base)
    (tmp_path / "profile").mkdir()
    keep_profile(tmp_path / "profile", {MHA_SITE: 30.0, MLP_SITE: 12.0})
    return {
        "features": Folder("f", features),
        "base": Folder("b", base),
        "profile": Folder("p", tmp_path / "profile"),
    }


def run_distill(
    store: Store, key: str, inputs: dict[str, Folder], out: Path, report: Reports | None = None, **changes: Any
) -> None:
    out.mkdir(exist_ok=True)
    together = changes.pop("together", Together())
    distill.run(replace(make_context(store, key, out, report, **changes), inputs=inputs, together=together))


def test_a_distill_step_leaves_the_best_scion_and_its_figures(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, rootstock: DiT, unseen: Kept
) -> None:
    report = Reports()
    run_distill(store, "a", inputs, tmp_path / "out", report)
    summary = json.loads((tmp_path / "out" / "distill.json").read_text())
    best_done, _, best = min((seen for seen in report.seen if seen[2]), key=lambda seen: seen[2]["heldout_error"])
    scion = new_scion(rootstock, MHA_EDIT, 0)
    scion.load_state_dict(load_file(tmp_path / "out" / "scion.safetensors"))
    assert summary == {
        "loss": "l1",
        "loss_because": "the outputs' excess kurtosis is 30, above 12",
        "heldout_error": best["heldout_error"],
        "best_epoch": best_done,
        "relative_error": pytest.approx(distill.relative_error(scion, unseen)),
    }


def test_a_distill_step_that_was_killed_and_resumed_leaves_the_same_files(
    store: Store, inputs: dict[str, Folder], tmp_path: Path
) -> None:
    run_distill(store, "straight", inputs, tmp_path / "straight")
    with pytest.raises(Killed):
        run_distill(store, "killed", inputs, tmp_path / "killed", Reports(dies_at=5))
    run_distill(store, "killed", inputs, tmp_path / "killed")
    for name in ("scion.safetensors", "distill.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


PAIR = Edit(site=Site(block=0, target="pair"), operator=Parallel())


def test_a_pair_is_distilled_with_the_scions_of_its_blocks_against_the_rootstocks_pair(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, rootstock: DiT
) -> None:
    run_distill(store, "scion", inputs, tmp_path / "scion")
    inputs |= {f"scions/{MHA_SITE}": Folder("s", tmp_path / "scion")}
    run_distill(store, "pair", inputs, tmp_path / "pair", edit=PAIR, within=(MHA_EDIT,), epochs=20, lr=3e-3)
    pair = load_file(tmp_path / "pair" / "scion.safetensors")
    assert "second.attn.inner_filter.weight" in pair and "first.attn.qkv.weight" in pair and "merge.weight" in pair
    # What it started from: the rootstock's blocks, the distilled scion, and the sum of both.
    model = hybrid.with_scions(rootstock, (MHA_EDIT,), make_bare(inputs), 0)
    start = new_scion(model, PAIR, 0)
    latents = read(inputs["features"].place, "heldout").first(24)
    unseen = recorded(lively(DiT(TINY)), PAIR.site, noised(latents, 1, 0, "distill/heldout"))
    summary = json.loads((tmp_path / "pair" / "distill.json").read_text())
    assert summary["relative_error"] < 0.9 * distill.relative_error(start, unseen)
    start.load_state_dict(pair)
    assert summary["relative_error"] == pytest.approx(distill.relative_error(start, unseen), rel=1e-5)


# -- sites that share a task


MLP_EDIT = Edit(site=MLP_SITE, operator=Mlp(ratio=2))
A_SITE = (24 + 6) * 2 * 16 * 16 * 4  # bytes: samples, what goes in and out, tokens, width, fp32


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Site, ...]]:
    """The sites that each batch of the rootstock's pass looked at."""
    found: list[tuple[Site, ...]] = []

    def counted(model: DiT, sites: Any, *args: Tensor) -> Any:
        found.append(tuple(sites))
        return observe(model, sites, *args)

    monkeypatch.setattr(activations, "observe", counted)
    return found


def distilled_together(store: Store, inputs: dict[str, Folder], folder: Path, **changes: Any) -> dict[str, bytes]:
    """Two sites in one task: the files that they leave."""
    kept: dict[str, Any] = {}
    for name, edit, ahead in (("mha", MHA_EDIT, [MLP_EDIT]), ("mlp", MLP_EDIT, [])):
        following = [make_context(store, "", folder, edit=other, **changes).params for other in ahead]
        together = Together(next=following, kept=kept)
        folder.mkdir(exist_ok=True)
        run_distill(store, f"{folder}/{name}", inputs, folder / name, edit=edit, together=together, **changes)
    return {
        f"{name}/{file}": (folder / name / file).read_bytes()
        for name in ("mha", "mlp")
        for file in ("scion.safetensors", "distill.json")
    }


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (2 * A_SITE, [(MHA_SITE, MLP_SITE)] * 2),  # the training samples, then the held-out ones
        (2 * A_SITE - 1, [(MHA_SITE,)] * 2 + [(MLP_SITE,)] * 2),
    ],
    ids=["room for both", "room for one"],
)
def test_sites_of_one_task_share_passes_as_far_as_memory_goes_and_end_in_the_bits_of_sites_alone(
    store: Store,
    inputs: dict[str, Folder],
    tmp_path: Path,
    passes: list[tuple[Site, ...]],
    room: int,
    expected: list[tuple[Site, ...]],
) -> None:
    found = distilled_together(store, inputs, tmp_path / "together", activations=room)
    assert passes == expected
    for name, edit in (("mha", MHA_EDIT), ("mlp", MLP_EDIT)):
        run_distill(store, f"alone/{name}", inputs, tmp_path / f"alone-{name}", edit=edit)
        for file in ("scion.safetensors", "distill.json"):
            assert found[f"{name}/{file}"] == (tmp_path / f"alone-{name}" / file).read_bytes()


def test_a_site_that_does_not_fit_is_computed_anew_in_chunks_with_the_same_result(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    record = Rootstock.record
    monkeypatch.setattr(
        Rootstock,
        "record",
        lambda self, sites, shown, place: (sizes.append(len(shown.t)), record(self, sites, shown, place))[1],
    )
    run_distill(store, "fits", inputs, tmp_path / "fits")
    assert sizes == [24, 6]
    sizes.clear()
    room = 12 * A_SITE // 30  # 12 samples of 24, of which whole batches of 10 are taken
    run_distill(store, "streamed", inputs, tmp_path / "streamed", activations=room)
    assert sizes[:4] == [10, 10, 4, 6] and len(sizes) == 4 * 7 + 1
    scions = [load_file(tmp_path / name / "scion.safetensors") for name in ("fits", "streamed")]
    for name, value in scions[0].items():
        torch.testing.assert_close(scions[1][name], value, rtol=1e-4, atol=1e-6)


def test_in_bf16_an_operators_pairs_are_kept_in_bf16_and_its_error_is_the_same(rootstock: DiT, shown: Noised) -> None:
    recipe = DistillSpec(precision="bf16")
    found = Rootstock(rootstock, (), shown, shown, recipe, CPU).record([MHA_SITE, PAIR.site], shown, CPU)
    assert {value.dtype for value in found[MHA_SITE].tensors()} == {torch.bfloat16}
    assert {value.dtype for value in found[PAIR.site].tensors()} == {torch.float32}
    scion = new_scion(rootstock, MHA_EDIT, 0)
    with computing("bf16", CPU), torch.no_grad():
        seen = observe(rootstock, [MHA_SITE], shown.z, shown.t, shown.labels)[MHA_SITE]
        exact = distill.error(scion, Pairs(seen.inputs, seen.output, None), distill.LOSSES["l1"])
        assert distill.error(scion, found[MHA_SITE], distill.LOSSES["l1"]) == exact


def test_in_bf16_a_scion_learns_as_it_does_in_fp32(
    rootstock: DiT, source: Kept, unseen: Kept, store: Store, tmp_path: Path
) -> None:
    histories = {}
    for precision in ("fp32", "bf16"):
        context = make_context(store, precision, tmp_path, precision=precision)
        histories[precision] = distill.fit(new_scion(rootstock, MHA_EDIT, 0), source, unseen, "l1", context)
    assert histories["fp32"][-1][2] < 0.9 * histories["fp32"][0][2]
    assert histories["bf16"] == [pytest.approx(point, rel=0.02) for point in histories["fp32"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_scion_learns_the_same(store: Store, inputs: dict[str, Folder], tmp_path: Path) -> None:
    for name, compiled in (("eager", False), ("compiled", True)):
        run_distill(store, name, inputs, tmp_path / name, compile=compiled, epochs=2)
    scions = [load_file(tmp_path / name / "scion.safetensors") for name in ("eager", "compiled")]
    for name, value in scions[0].items():
        torch.testing.assert_close(scions[1][name], value, rtol=1e-3, atol=1e-5)


def make_bare(inputs: dict[str, Folder]) -> Context:
    """A context of which only the inputs are read."""
    nothing: Any = None
    return Context("", nothing, inputs, nothing, nothing, nothing, nothing, CPU)


def test_scions_of_another_graft_are_taken_as_they_are(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, rootstock: DiT
) -> None:
    donor = lively(graft(DiT(TINY), [MHA_EDIT], 0), seed=5)
    (tmp_path / "donor").mkdir()
    checkpoints.save(donor, (MHA_EDIT,), tmp_path / "donor")
    edit = MHA_EDIT.model_copy(update={"scions": str(tmp_path / "donor")})
    run_distill(store, "a", inputs, tmp_path / "out", edit=edit)
    assert_same_bits(load_file(tmp_path / "out" / "scion.safetensors"), scion_at(donor, MHA_SITE).state_dict())
    summary = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert summary["best_epoch"] == 0 and summary["heldout_error"] > 0
    other = Edit(site=MHA_SITE, operator=HyenaY(kernel=2), scions=edit.scions)
    with pytest.raises(checkpoints.UnfitCheckpoint, match=r"donor: 01.mha: got .*'kernel': 4.*accepted: .*'kernel': 2"):
        run_distill(store, "b", inputs, tmp_path / "out", edit=other)


def is_pickle(path: Path) -> bool:
    content = path.read_bytes()
    if content.startswith(b"PK"):
        return True  # torch.save's archive
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r").dtype.hasobject
    try:
        return len(list(pickletools.genops(content))) > 1
    except Exception:
        return False


def test_nothing_that_a_step_leaves_or_keeps_is_a_pickle(
    store: Store, data: TrainingSet, inputs: dict[str, Folder], tmp_path: Path
) -> None:
    run_training(store.partial("base"), data)
    run_distill(store, "distill", inputs, tmp_path / "out")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".npy", ".json"}
    assert [path.name for path in files if is_pickle(path)] == []


def test_latents_of_a_spec_become_the_models_shape(inputs: dict[str, Folder]) -> None:
    from specs.model import DitModel

    model = DitModel(depth=2, width=16, heads=2, patch=2)
    assert read_meta(inputs["features"].path()).dit_config(model) == copy.deepcopy(TINY)


if __name__ == "__main__":
    torch.multiprocessing.start_processes(one_of_two, args=(sys.argv[1],), nprocs=2, start_method="fork")
