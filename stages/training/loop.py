"""The training loop of `base`, `search` and `finetune`: the objective's loss on shuffled latents, an EMA, checkpoints.

It knows nothing of Ray or DeepSpeed: an `Engine` does the step, be it `engine.PlainEngine` or a sharded one. Every
random draw belongs to a step number (stages.training.batches). Training that goes on from a checkpoint therefore
ends in the same bits as training that never stopped. The host asks a device for a number only at points of the loss
curve and at checkpoints, so that between them the device never waits for the host.

A worker passes its share of a batch in parts of `micro_batch` samples (stages.training.microbatches). Checkpoints are
gathered from all workers between two steps, and written by the first one while training goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial as partial_function

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftwork.models.numerics.precision import products
from graftwork.models.rootstocks import Rootstock
from graftwork.specs.training import TrainingSpec
from graftwork.stages.contract import Partial, Report, Stopped, never
from graftwork.stages.training import microbatches
from graftwork.stages.training.agreement import Agreement
from graftwork.stages.training.batches import Batch, DrawnAhead, TrainingSet, draw_batch
from graftwork.stages.training.checkpoint_writer import CheckpointWriter
from graftwork.stages.training.engine import Engine, is_first_worker, sum_over_workers
from graftwork.stages.training.microbatches import Loss, Part, loss_of_objective, parts

CHECKPOINT = "training.safetensors"
POINTS = 200  # of the loss curve


@dataclass
class Progress:
    """How far training is; saved with every checkpoint."""

    step: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)  # (step, mean loss since the last point)
    loss_sums: list[float] = field(default_factory=lambda: [0.0])  # of each worker, since the last point
    losses: int = 0  # in each sum; skipped steps have none

    def loss_sum(self, rank: int, workers: int) -> float:
        """A worker's own; where there were other workers, its share of all."""
        return self.loss_sums[rank] if len(self.loss_sums) == workers else sum(self.loss_sums) / len(self.loss_sums)


def train(
    make_engine: Callable[[Mapping[str, Tensor] | None], Engine],
    data: TrainingSet,
    recipe: TrainingSpec,
    *,
    seed: int,
    stream: str,
    partial: Partial,
    report: Report,
    stopping: Callable[[], bool] = never,
    loss_of: Loss | None = None,
) -> None:
    """Train to the last step, from the last checkpoint if there is one; leaves the final state in `partial`.

    Where it is asked to stop, it saves a checkpoint and raises Stopped.

    make_engine: builds the engine, from a checkpoint's state or (None) from the start.
    stream: names the random draws; two trainings with one name see the same batches, noise and timesteps.
    loss_of: what is learned; by default the objective's loss.
    """
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    progress, state = _last_checkpoint(partial)
    engine = make_engine(state)
    del state
    loss_of = loss_of or loss_of_objective(data)
    every = max(1, recipe.steps // POINTS)
    loss_sum = torch.tensor(progress.loss_sum(rank, workers), device=data.device)
    report(progress.step, recipe.steps)
    tell = partial_function(report, progress.step, recipe.steps)
    passes = _passes(engine, data, recipe, workers, loss_of, tell)

    def draw(step: int) -> Batch:
        batch = draw_batch(data, recipe, seed, stream, step, rank, workers)
        return batch.pinned() if data.device.type == "cuda" else batch

    with (
        products(recipe.precision),
        CheckpointWriter(recipe.checkpoint_minutes) as writer,
        DrawnAhead(draw, range(progress.step, recipe.steps)) as batches,
    ):
        agreement = Agreement(stopping, writer.due, data.device)

        def save(done: int) -> None:
            progress.step, progress.loss_sums = done, _of_all_workers(loss_sum)
            _finite(sum(progress.loss_sums), done)
            writer.wait()
            _save_checkpoint(writer, partial, progress, engine.state())

        for step, batch in batches:
            action = agreement.before(step)
            if action is not None and progress.step != step:
                save(step)
            if action == "stop":
                writer.wait()
                if dist.is_initialized():
                    dist.barrier()  # whoever leaves first takes the others along
                raise Stopped(f"before step {step + 1}")

            share = batch.to(data.device)
            along, lr = step / recipe.steps, learning_rate(recipe, step)
            loss = _step(engine, loss_of, share, passes, recipe.batch / workers, along, lr)
            if loss is not None:
                loss_sum += loss
                progress.losses += 1

            # Report and save.
            done = step + 1
            if (done % every == 0 or done == recipe.steps) and progress.losses:
                mean = _finite((sum_over_workers(loss_sum) / workers).item(), done) / progress.losses
                progress.curve.append((done, mean))
                loss_sum.zero_()
                progress.losses = 0
                if rank == 0:
                    report(done, recipe.steps, {"loss": mean, "lr": lr, "data_wait": batches.share_waited()})
            if done == recipe.steps or (recipe.checkpoint_every and done % recipe.checkpoint_every == 0):
                save(done)
        writer.wait()
        agreement.forget()
    if dist.is_initialized():
        dist.barrier()


def _step(
    engine: Engine, loss_of: Loss, share: Batch, passes: int, usual: float, along: float, lr: float
) -> Tensor | None:
    """Make a step of a worker's share of a batch; return the share's loss, or None if the step was skipped.

    along: share of the training that is done.
    usual: samples of a batch by workers. A part counts by its samples over that; the mean over the workers, which
    gradients and losses come to, is then the batch's.
    """

    def part_loss(part: Part) -> Tensor:
        loss = loss_of(engine, part.batch, along).mean()
        scale = part.samples / usual  # exactly 1 for an even share
        return loss if scale == 1 else loss * scale

    *others, last = parts(share, passes)
    losses = []
    for part in others:
        loss = part_loss(part)
        engine.accumulate(loss)
        losses.append(loss.detach())
    loss = part_loss(last)
    if engine.step(loss, lr) is False:
        return None
    return sum(losses, loss.detach())


def _passes(
    engine: Engine,
    data: TrainingSet,
    recipe: TrainingSpec,
    workers: int,
    loss_of: Loss,
    tell: Callable[[Mapping[str, float]], None],
) -> int:
    """Return how many passes each worker makes a step; what was found by trial is told once."""
    share = -(-recipe.batch // workers)  # the largest
    samples = recipe.micro_batch or share
    if recipe.micro_batch is None and data.device.type in microbatches.TRIED_ON:
        with products(recipe.precision):
            samples = microbatches.try_out(engine, data, share, loss_of)
        if is_first_worker():
            tell({"micro_batch": samples})
    return -(-share // samples)


def set_up_blocks(model: Rootstock, recipe: TrainingSpec) -> None:
    """Have the blocks compiled, or their activations not kept, where the recipe says so."""
    model.checkpointing = recipe.checkpointing
    if recipe.compile:
        for block in model.blocks:  # in place: the weights keep their names; blocks of one kind share the code
            block.compile()


def learning_rate(recipe: TrainingSpec, step: int) -> float:
    """Linear warm-up, then constant or a cosine to 0."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.lr
    along = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * along))


def final_weights(partial: Partial) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    """EMA weights and loss curve of a training that has ended."""
    state, curve = final_state(partial)
    return {name.removeprefix("ema/"): value for name, value in state.items() if name.startswith("ema/")}, curve


def final_state(partial: Partial) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    """All that the engine of a training that has ended gave, and the loss curve."""
    progress, state = _last_checkpoint(partial)
    assert state is not None
    return state, progress.curve


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {step}; a lower lr or clip may help")
    return loss


def _of_all_workers(value: Tensor) -> list[float]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value.item()]
    values = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value)
    return [one.item() for one in values]


def save_tensors(partial: Partial, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Publish tensors as one checkpoint file."""
    whole = {key: value.contiguous() for key, value in tensors.items()}
    partial.save(name, lambda path: save_file(whole, path))


def _save_checkpoint(writer: CheckpointWriter, partial: Partial, progress: Progress, state: dict[str, Tensor]) -> None:
    if not is_first_worker():
        return
    state["progress"] = torch.tensor([progress.step, progress.losses, *progress.loss_sums], dtype=torch.float64)
    state["curve"] = torch.tensor(progress.curve, dtype=torch.float64).reshape(-1, 2)
    writer.save(lambda: save_tensors(partial, CHECKPOINT, state))


def _last_checkpoint(partial: Partial) -> tuple[Progress, dict[str, Tensor] | None]:
    path = partial.load(CHECKPOINT)
    if path is None:
        return Progress(), None
    state = load_file(path)
    step, losses, *loss_sums = state.pop("progress").tolist()
    curve = [(float(at), float(loss)) for at, loss in state.pop("curve").tolist()]
    return Progress(int(step), curve, loss_sums, int(losses)), state
