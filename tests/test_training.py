"""Training: a run that was killed and resumed ends in the same bits, on one worker as on several."""

from __future__ import annotations

import itertools
import math
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.artifacts import Folder
from graftwork.models.condition import Condition
from graftwork.models.numerics.streams import generator
from graftwork.models.objectives.gaussian import STEPS, Diffusion
from graftwork.models.rootstocks.dit import Block, DiT
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.resources import StepResources
from graftwork.specs.rootstock import DitModel, PretrainWeights
from graftwork.specs.training import Precision, TrainingSpec
from graftwork.stages.artifacts.latents import LatentsMeta, write_meta
from graftwork.stages.catalog.base import BaseParams
from graftwork.stages.contract import Context, Stopped, never
from graftwork.stages.training import base, batches, microbatches
from graftwork.stages.training import loop as training
from graftwork.stages.training.batches import DrawnAhead, TrainingSet, draw_batch, shuffled
from graftwork.stages.training.checkpoint_writer import CheckpointWriter
from graftwork.stages.training.engine import PlainEngine
from graftwork.stages.training.loop import final_weights, learning_rate, train
from tests import small
from tests.products import Products
from tests.small import noting
from tests.tiny_training import (
    RECIPE,
    TINY,
    Killed,
    Reports,
    assert_same_bits,
    latents_of,
    lively,
    make_data,
    run_training,
    run_until_done,
    state_of,
    tensors_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# -- training


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
    latents_of(data)[spoilt] = math.nan
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


UNEVEN = RECIPE.model_copy(update={"batch": 7, "micro_batch": 2})  # 3 samples and 4, in two passes each


def one_of_two(rank: int, folder: str) -> None:
    """Train straight through; then once more, asked to stop on the way, and go on in a new group; then unevenly."""
    torch.set_num_threads(1)
    store = Store(f"{folder}/store")
    for start, key in enumerate(("two", "stopped", "stopped")):
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet{start}", rank=rank, world_size=2)
        report = Reports()
        asked = start == 1 and rank == 0  # the other worker never hears of it
        if start == 1:
            with patch.object(CheckpointWriter, "due", lambda writer: rank == 0):
                run_training(store.partial("uneven"), make_data(), UNEVEN)
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
    run_training(store.partial("whole"), data, UNEVEN.model_copy(update={"micro_batch": None}))
    assert_near(state_of(store.partial("uneven")), state_of(store.partial("whole")))


# -- batches in parts


@pytest.mark.parametrize("samples", [1, 3, 8, 20])
def test_a_batch_in_parts_ends_where_the_whole_does_up_to_rounding(
    store: Store, data: TrainingSet, samples: int
) -> None:
    run_training(store.partial("whole"), data)
    run_training(store.partial("parts"), data, RECIPE.model_copy(update={"micro_batch": samples}))
    parts, whole = (state_of(store.partial(key)) for key in ("parts", "whole"))
    if samples >= RECIPE.batch:
        assert_same_bits(parts, whole)
    assert_near(parts, whole)


@pytest.mark.parametrize(("size", "passes", "samples"), [(8, 3, [3, 3, 2]), (3, 4, [1, 1, 1, 0]), (5, 1, [5])])
def test_parts_are_nearly_equal_and_together_the_whole(size: int, passes: int, samples: list[int]) -> None:
    numbers = torch.arange(size)
    share = batches.Batch(numbers, numbers, Condition(labels=numbers), numbers)
    found = list(microbatches.parts(share, passes))
    assert [part.samples for part in found] == samples
    assert torch.equal(torch.cat([part.batch.t for part in found if part.samples]), share.t)
    assert all(len(part.batch.t) >= 1 for part in found)


class Small:
    """Has room for so many samples in a pass of an engine."""

    def __init__(self, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried: list[int] = []
        forward = DiT.forward

        def limited(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            self.tried += [len(x)] * (len(x) not in self.tried)
            if len(x) > samples:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(model, x, t, y)

        monkeypatch.setattr(DiT, "forward", limited)
        monkeypatch.setattr(microbatches, "TRIED_ON", ("cpu",))


@pytest.mark.parametrize(("room", "chosen", "tried"), [(100, 8, [8]), (7, 4, [8, 4]), (1, 1, [8, 4, 2, 1])])
def test_what_fits_is_tried_from_the_largest_on_told_once_and_leaves_no_trace(
    store: Store, data: TrainingSet, monkeypatch: pytest.MonkeyPatch, room: int, chosen: int, tried: list[int]
) -> None:
    run_training(store.partial("set"), data, RECIPE.model_copy(update={"micro_batch": chosen}))
    small, report = Small(room, monkeypatch), Reports()
    run_training(store.partial("found"), data, report=report)
    assert small.tried == tried
    assert [metrics["micro_batch"] for _, _, metrics in report.seen if "micro_batch" in metrics] == [chosen]
    assert_same_bits(state_of(store.partial("found")), state_of(store.partial("set")))


def test_a_device_without_room_for_one_sample_is_one_clear_error(
    store: Store, data: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    Small(0, monkeypatch)
    with pytest.raises(microbatches.TooLarge, match="not even one sample fits; set checkpointing: true"):
        run_training(store.partial("a"), data)


def test_another_error_of_a_trial_is_no_lack_of_room(
    store: Store, data: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(microbatches, "TRIED_ON", ("cpu",))
    monkeypatch.setattr(DiT, "forward", lambda *_: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match"):
        run_training(store.partial("a"), data)


# -- checkpoints beside the training


def test_checkpoints_are_saved_by_time_too_and_change_no_bit(
    store: Store, data: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[float] = []

    def note(*args: Any) -> None:
        saved.append(args[2]["progress"][0].item())

    monkeypatch.setattr(training, "save_tensors", noting(note, training.save_tensors))
    seldom = RECIPE.model_copy(update={"checkpoint_every": None})
    run_training(store.partial("seldom"), data, seldom)
    assert saved == [RECIPE.steps]
    monkeypatch.setattr(CheckpointWriter, "due", lambda writer: True)
    run_training(store.partial("often"), data, seldom)
    assert saved[1:] == list(range(1, RECIPE.steps + 1))
    assert_same_bits(state_of(store.partial("often")), state_of(store.partial("seldom")))


def test_a_save_is_due_when_its_time_has_come_and_the_last_one_is_written() -> None:
    go_on = threading.Event()
    with CheckpointWriter(minutes=1e-9) as writer, CheckpointWriter(minutes=60) as patient:
        assert writer.due() and not patient.due()
        writer.save(go_on.wait)  # type: ignore[arg-type]
        assert not writer.due()
        go_on.set()
        writer.wait()
        assert writer.due()


def test_training_goes_on_while_a_checkpoint_is_written(
    store: Store, data: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, save = Reports(), training.save_tensors

    def slow(*args: Any) -> None:
        if args[2]["progress"][0] == 4:
            assert wait_until(lambda: any(done == 7 for done, _, _ in report.seen))
        save(*args)

    monkeypatch.setattr(training, "save_tensors", slow)
    run_training(store.partial("slow"), data, report=report)
    monkeypatch.undo()
    run_training(store.partial("straight"), data)
    assert_same_bits(state_of(store.partial("slow")), state_of(store.partial("straight")))


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize(("fails_at", "kept"), [(8, 4), (12, 8)])
def test_what_a_write_raises_is_raised_at_the_next_save_or_the_end_and_the_save_before_stays(
    store: Store, data: TrainingSet, monkeypatch: pytest.MonkeyPatch, fails_at: int, kept: int
) -> None:
    save = training.save_tensors

    def failing(partial: Any, name: str, tensors: Mapping[str, Tensor]) -> None:
        if tensors["progress"][0] == fails_at:
            raise OSError("no space left on device")
        save(partial, name, tensors)

    monkeypatch.setattr(training, "save_tensors", failing)
    with pytest.raises(OSError, match="no space left"):
        run_training(store.partial("a"), data)
    assert state_of(store.partial("a"))["progress"][0] == kept
    assert threads_of("checkpoint") == []


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


# -- precision


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_every_product_of_a_training_forward_and_back_has_its_precision(
    store: Store, data: TrainingSet, precision: str
) -> None:
    with Products() as counted:
        run_training(store.partial("a"), data, RECIPE.model_copy(update={"precision": precision}))
    assert set(counted.matrices) == set(counted.convolutions) == {precision}


def test_in_bf16_passes_are_bf16_and_weights_and_optimizer_fp32(store: Store, data: TrainingSet) -> None:
    with Products() as counted:
        run_training(store.partial("a"), data, RECIPE.model_copy(update={"precision": "bf16"}))
    assert set(counted.matrices) == set(counted.convolutions) == {"bf16"}
    run_training(store.partial("b"), data)
    rounded, exact = state_of(store.partial("a")), state_of(store.partial("b"))
    assert {name: value.dtype for name, value in rounded.items()} == {n: value.dtype for n, value in exact.items()}
    start = {f"weights/{name}": value for name, value in lively(DiT(TINY)).named_parameters()}
    apart = sum((rounded[name] - exact[name]).square().sum().item() for name in start)
    moved = sum((exact[name] - value).square().sum().item() for name, value in start.items())
    assert 0 < apart < 0.01 * moved


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_pretraining_has_the_precision_of_its_recipe(
    store: Store, data: TrainingSet, tmp_path: Path, precision: Precision
) -> None:
    np.save(tmp_path / "training_latents.npy", latents_of(data).numpy())
    np.save(tmp_path / "training_labels.npy", data.condition.require("labels").numpy())
    meta = LatentsMeta(codec="pixel", shape=(1, 8, 8), classes=("a", "b", "c"), num_training=30, num_heldout=0)
    write_meta(tmp_path, meta)
    recipe = PretrainWeights(steps=2, batch=4, precision=precision)
    params = BaseParams(seed=0, model=DitModel(depth=1, width=16, heads=2, patch=2), weights=recipe)
    inputs = {"features": Folder("features", tmp_path)}
    partial, report = store.partial("base"), Reports()
    context = Context("base", params, inputs, tmp_path, partial, report, StepResources(), torch.device("cpu"))
    with Products() as counted:
        base.pretrain(context, context.device)
    assert set(counted.matrices) == set(counted.convolutions) == {precision}


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
    monkeypatch.setattr(Block, "forward", noting(lambda self, x, c: passes.append("block"), Block.forward))
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
    together = map(torch.cat, zip(*map(tensors_of, slices), strict=True))
    assert all(map(torch.equal, together, tensors_of(whole)))


def test_a_latent_keeps_its_label(data: TrainingSet) -> None:
    recipe = RECIPE.model_copy(update={"label_dropout": 0.0})
    x, _, condition, _ = draw_batch(data, recipe, 0, "base", 2, rank=0, workers=1)
    for latent, label in zip(x, condition.require("labels"), strict=True):
        (index,) = (data.latents == latent).flatten(1).all(1).nonzero().flatten().tolist()
        assert data.condition.require("labels")[index] == label


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_dropped_labels_becomes_the_null_class(data: TrainingSet, share: float) -> None:
    recipe = RECIPE.model_copy(update={"label_dropout": share, "batch": 4000})
    condition = draw_batch(data, recipe, 0, "base", 2, rank=0, workers=1).condition
    assert (condition.require("labels") == TINY.num_classes).float().mean().item() == pytest.approx(share, abs=0.03)


def test_timesteps_are_uniform_over_the_chain(data: TrainingSet) -> None:
    _, t, _, _ = draw_batch(data, RECIPE.model_copy(update={"batch": 20_000}), 0, "base", 0, rank=0, workers=1)
    assert (t.min().item(), t.max().item()) == (0, STEPS - 1)
    assert t.float().mean().item() == pytest.approx((STEPS - 1) / 2, rel=0.03)


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_a_worker_draws_its_own_noise_only(data: TrainingSet, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    places: list[Any] = []
    monkeypatch.setattr(batches, "generator", noting(lambda *name: places.append(name), generator))
    draw_batch(data, RECIPE, 0, "base", 5, workers - 1, workers)
    share = RECIPE.batch // workers
    assert [name[-1] for name in places if "noise" in name] == list(range(RECIPE.batch - share, RECIPE.batch))


def test_noise_is_unit_gaussian_and_no_two_samples_share_it(data: TrainingSet) -> None:
    recipe = RECIPE.model_copy(update={"batch": 400})
    noise = torch.cat([draw_batch(data, recipe, 0, "base", step, rank=0, workers=1).noise for step in (0, 1)])
    assert noise.mean().item() == pytest.approx(0, abs=0.02) and noise.std().item() == pytest.approx(1, abs=0.02)
    assert len(noise.flatten(1).unique(dim=0)) == 800


def threads_of(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(name)]


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
    assert threads_of("batches") == []


def test_what_a_draw_raises_is_raised_at_its_step_and_leaves_no_thread() -> None:
    def draw(step: int) -> Any:
        if step == 4:
            raise OSError("no such file")

    done = []
    with pytest.raises(OSError, match="no such file"), DrawnAhead(draw, range(9)) as ahead:
        for step, _ in ahead:
            done.append(step)
    assert done == [0, 1, 2, 3]
    assert threads_of("batches") == []


@pytest.mark.parametrize("end", [Killed, Stopped], ids=["an error", "a stop"])
def test_training_leaves_no_thread_behind(store: Store, data: TrainingSet, end: type[BaseException]) -> None:
    report = Reports(dies_at=5 if end is Killed else None)
    with pytest.raises(end):
        run_training(store.partial("a"), data, report=report, stopping=report.past(5))
    assert threads_of("batches") == threads_of("checkpoint") == []


def test_the_share_of_the_time_that_was_waited_for_data_is_reported(store: Store, data: TrainingSet) -> None:
    report = Reports()
    run_training(store.partial("a"), data, report=report)
    shares = [metrics["data_wait"] for _, _, metrics in report.seen if metrics]
    assert len(shares) == RECIPE.steps and all(0 <= share <= 1 for share in shares)
    with DrawnAhead(lambda step: time.sleep(0.05), range(4)) as slow:
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


if __name__ == "__main__":
    start_processes(one_of_two, args=(sys.argv[1],), nprocs=2, start_method="fork")
