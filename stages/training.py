"""The training loop of `base`, `search` and `finetune`: the diffusion loss over shuffled latents, an EMA, checkpoints.

It knows nothing of Ray or DeepSpeed: an `Engine` does the step, be it `PlainEngine` below or a sharded one. Every
random draw belongs to a step number (stages.batches). Training that goes on from a checkpoint therefore ends in the
same bits as training that never stopped. The host asks a device for a number only at points of the loss curve and at
checkpoints, so that between them the device never waits for the host.

A worker passes its share of a batch in parts of `micro_batch` samples (stages.microbatches). Checkpoints are gathered
from all workers between two steps, and written by the first one while training goes on.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graftwork.models.diffusion import Diffusion
from graftwork.models.dit import DiT
from graftwork.models.outlines import outline
from graftwork.models.precision import computing, products
from graftwork.specs.training import Precision, TrainingSpec
from graftwork.stages import Partial, Report, Stopped, microbatches, never
from graftwork.stages.batches import Batch, DrawnAhead, TrainingSet, draw_batch
from graftwork.stages.checkpoint_writer import CheckpointWriter
from graftwork.stages.microbatches import Part, Trainable, parts

CHECKPOINT = "training.safetensors"
POINTS = 200  # of the loss curve
LAG = 2  # steps, from where all workers are known to be, to where the fastest may be


class Engine(Trainable, Protocol):
    """A network in training, and all that changes in it."""

    def accumulate(self, loss: Tensor) -> None:
        """Backward, of a pass that another one of the same step follows."""
        ...

    def step(self, loss: Tensor, lr: float) -> bool | None:
        """Backward of a step's last pass, clip, one optimizer step at `lr`, then the EMA; False: it was skipped."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return, on the first worker, copies of all that is needed to go on: `weights/*`, `ema/*`, the optimizer's.

        Every worker must call it; the others get {} and keep nothing.
        """
        ...


def is_first_worker() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


class PlainEngine:
    """AdamW and an EMA on each worker, with gradients averaged over the workers: for models that fit one device.

    Only what requires a gradient is trained, averaged and kept.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float,
        ema: float = 0.0,
        rates: Mapping[str, float] | None = None,
        precision: Precision = "fp32",
        state: Mapping[str, Tensor] | None,
    ) -> None:
        """rates: factors on the learning rate, by name of the weight; 1 for all others. precision: of passes."""
        self.model, self.clip, self.decay, self.precision = model, clip, ema, precision
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.names, self.weights = list(trained), list[Tensor](trained.values())
        self.ema = [value.detach().clone() for value in self.weights]
        groups: dict[float, list[Tensor]] = {}
        for name, value in trained.items():
            groups.setdefault((rates or {}).get(name, 1.0), []).append(value)
        self.adam = torch.optim.AdamW(
            [{"params": values, "rate": rate} for rate, values in groups.items()],
            betas=betas,
            weight_decay=0.0,
            fused=True,
        )
        self.accumulated: Tensor | None = None  # loss of the passes of a step that has more of them
        self.reserve: list[Tensor] = []
        if state is not None:
            self._resume(state)

    def __call__(self, *args: Tensor) -> Tensor:
        with computing(self.precision, args[0].device):
            output: Tensor = self.model(*args)
        return output

    def stand_in(self) -> Self:
        copied = copy.copy(self)
        copied.model = outline(self.model, self.weights[0].device)
        if not self.adam.state:  # the moments that the first step makes
            copied.reserve = [torch.zeros_like(value) for value in self.weights for _ in range(2)]
        return copied

    def accumulate(self, loss: Tensor) -> None:
        loss.backward()
        self.accumulated = loss.detach() + (0.0 if self.accumulated is None else self.accumulated)

    def step(self, loss: Tensor, lr: float) -> bool:
        loss.backward()
        self._average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.clip)
        whole = loss.detach() if self.accumulated is None else loss.detach() + self.accumulated
        self.accumulated = None
        taken = self.takes(whole, norm)
        if taken:
            for group in self.adam.param_groups:
                group["lr"] = lr * group["rate"]
            self.adam.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, self.weights, 1 - self.decay)
        self.adam.zero_grad()
        return taken

    def takes(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether to make a step of this worker's loss of all passes and the gradient's norm over all workers."""
        return True

    def state(self) -> dict[str, Tensor]:
        if not is_first_worker():
            return {}
        kinds: dict[str, list[Tensor]] = {"weights": self.weights, "ema": self.ema}
        steps: dict[str, Tensor] = {}
        if self.adam.state:  # empty as long as all steps were skipped
            moments = ("exp_avg", "exp_avg_sq")
            kinds |= {kind: [self.adam.state[value][kind] for value in self.weights] for kind in moments}
            steps["adam_steps"] = self.adam.state[self.weights[0]]["step"].detach().to("cpu", copy=True)
        state = {
            f"{kind}/{name}": value.detach().to("cpu", copy=True)
            for kind, values in kinds.items()
            for name, value in zip(self.names, values, strict=True)
        }
        return state | steps

    @torch.no_grad()
    def _resume(self, state: Mapping[str, Tensor]) -> None:
        for name, value, ema in zip(self.names, self.weights, self.ema, strict=True):
            value.copy_(state[f"weights/{name}"])
            ema.copy_(state[f"ema/{name}"])
            if "adam_steps" not in state:
                continue
            self.adam.state[value] = {
                "step": state["adam_steps"].to(value.device, copy=True),
                "exp_avg": state[f"exp_avg/{name}"].to(value.device),
                "exp_avg_sq": state[f"exp_avg_sq/{name}"].to(value.device),
            }

    def _average_gradients(self) -> None:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        gradients = [value.grad for value in self.weights if value.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


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
) -> None:
    """Train to the last step, from the last checkpoint if there is one; leaves the final state in `partial`.

    Where it is asked to stop, it saves a checkpoint and raises Stopped.

    make_engine: builds the engine, from a checkpoint's state or (None) from the start.
    stream: names the random draws; two trainings with one name see the same batches, noise and timesteps.
    """
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    progress, state = _last_checkpoint(partial)
    engine = make_engine(state)
    del state
    diffusion = Diffusion().on(data.device)
    every = max(1, recipe.steps // POINTS)
    loss_sum = torch.tensor(progress.loss_sum(rank, workers), device=data.device)
    report(progress.step, recipe.steps)
    passes = _passes(engine, data, recipe, workers, lambda figures: report(progress.step, recipe.steps, figures))

    def draw(step: int) -> Batch:
        batch = draw_batch(data, recipe, seed, stream, step, rank, workers)
        return batch.pinned() if data.device.type == "cuda" else batch

    with (
        products(recipe.precision),
        CheckpointWriter(recipe.checkpoint_minutes) as writer,
        DrawnAhead(draw, range(progress.step, recipe.steps)) as batches,
    ):
        together = ActTogether(stopping, writer.due, data.device)

        def save(done: int) -> None:
            progress.step, progress.loss_sums = done, _of_all_workers(loss_sum)
            _finite(sum(progress.loss_sums), done)
            writer.wait()
            _save_checkpoint(writer, partial, progress, engine.state())

        for step, batch in batches:
            action = together.before(step)
            if action is not None and progress.step != step:
                save(step)
            if action == "stop":
                writer.wait()
                if dist.is_initialized():
                    dist.barrier()  # whoever leaves first takes the others along
                raise Stopped(f"before step {step + 1}")

            share = batch.to(data.device)
            loss = _step(engine, diffusion, share, passes, recipe.batch / workers, learning_rate(recipe, step))
            if loss is not None:
                loss_sum += loss
                progress.losses += 1

            # Report and save.
            done = step + 1
            if (done % every == 0 or done == recipe.steps) and progress.losses:
                mean = _finite(_mean_over_workers(loss_sum).item(), done) / progress.losses
                progress.curve.append((done, mean))
                loss_sum.zero_()
                progress.losses = 0
                if rank == 0:
                    lr = learning_rate(recipe, step)
                    report(done, recipe.steps, {"loss": mean, "lr": lr, "data_wait": batches.share_waited()})
            if done == recipe.steps or (recipe.checkpoint_every and done % recipe.checkpoint_every == 0):
                save(done)
        writer.wait()
        together.forget()
    if dist.is_initialized():
        dist.barrier()


def _step(engine: Engine, diffusion: Diffusion, share: Batch, passes: int, usual: float, lr: float) -> Tensor | None:
    """Make a step of a worker's share of a batch; return the share's loss, or None if the step was skipped.

    usual: samples of a batch by workers. A part counts by its samples over that; the mean over the workers, which
    gradients and losses come to, is then the batch's.
    """

    def loss_of(part: Part) -> Tensor:
        x, t, y, noise = part.batch
        loss = diffusion.loss(engine, x, t, y, noise).mean()
        scale = part.samples / usual  # exactly 1 for an even share
        return loss if scale == 1 else loss * scale

    *others, last = parts(share, passes)
    losses = []
    for part in others:
        loss = loss_of(part)
        engine.accumulate(loss)
        losses.append(loss.detach())
    loss = loss_of(last)
    if engine.step(loss, lr) is False:
        return None
    return sum(losses, loss.detach())


def _passes(
    engine: Engine, data: TrainingSet, recipe: TrainingSpec, workers: int, tell: Callable[[Mapping[str, float]], None]
) -> int:
    """Return how many passes each worker makes a step; what was found by trial is told once."""
    share = -(-recipe.batch // workers)  # the largest
    samples = recipe.micro_batch or share
    if recipe.micro_batch is None and data.device.type in microbatches.TRIED_ON:
        with products(recipe.precision):
            samples = microbatches.try_out(engine, data, share)
        if is_first_worker():
            tell({"micro_batch": samples})
    return -(-share // samples)


def set_up_blocks(model: DiT, recipe: TrainingSpec) -> None:
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


Action = Literal["stop", "save"]


class ActTogether:
    """Has all workers of a training stop, or save a checkpoint, before the same step.

    The first worker announces a step LAG after its next one, before it takes part in that. The others find the
    announcement in time: none begins a step before its device has ended the one LAG earlier, which it cannot without
    the first worker. With a GPU that is a wait, but one that leaves it work to do.
    """

    KEY = "graftwork/action"  # and its number: one at a time is announced, and taken by all before the next

    def __init__(self, stopping: Callable[[], bool], saving: Callable[[], bool], device: torch.device) -> None:
        """stopping, saving: whether it is time for that; asked of the first worker."""
        self.stopping, self.saving, self.device = stopping, saving, device
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        self.store = None if alone else dist.distributed_c10d._get_default_store()
        self.taken = 0
        self.announced: tuple[Action, int] | None = None  # and before which step it is due
        self.queued: deque[torch.cuda.Event] = deque()  # the ends of steps that a GPU may not have reached

    def before(self, step: int) -> Action | None:
        """Return what all workers do before this step."""
        if self.store is None:
            return self._wanted()
        self._keep_pace()
        if self.announced is None:
            self.announced = self._announce(step + LAG) if dist.get_rank() == 0 else self._hear()
        if self.announced is None or self.announced[1] != step:
            return None
        action, self.announced = self.announced[0], None
        self.taken += 1
        return action

    def forget(self) -> None:
        """Leave no announcement to another training of the same group; every worker must be past the last step."""
        if self.store is not None and dist.get_rank() == 0:
            for number in range(self.taken + 1):
                self.store.delete_key(f"{self.KEY}/{number}")

    def _wanted(self) -> Action | None:
        return "stop" if self.stopping() else "save" if self.saving() else None

    def _announce(self, step: int) -> tuple[Action, int] | None:
        assert self.store is not None
        action = self._wanted()
        if action is None:
            return None
        key = f"{self.KEY}/{self.taken}"
        self.store.set(key, f"{action} {step}")
        self.store.get(key)  # only its answer says that the others can see it
        return action, step

    def _hear(self) -> tuple[Action, int] | None:
        assert self.store is not None
        key = f"{self.KEY}/{self.taken}"
        if not self.store.check([key]):
            return None
        action, step = self.store.get(key).decode().split()
        return ("stop" if action == "stop" else "save"), int(step)

    def _keep_pace(self) -> None:
        """Wait until the step before the last one is over. On a CPU it is: its collectives wait by themselves."""
        if self.device.type == "cpu":
            return
        event = torch.cuda.Event()
        event.record()
        self.queued.append(event)
        if len(self.queued) == LAG:
            self.queued.popleft().synchronize()


def _of_all_workers(value: Tensor) -> list[float]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value.item()]
    values = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value)
    return [one.item() for one in values]


def _mean_over_workers(value: Tensor) -> Tensor:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


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
