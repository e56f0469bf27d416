"""Streaming: sites learn beside each other while the rootstock runs, and nothing of its pass is kept.

It is for models whose activations fit nowhere: at 16,384 tokens those of one site take 75 MB a sample. A batch passes
the rootstock once. As it leaves the block of a site, the site's scion learns from what went in and came out, and both
go. The memory is that of the rootstock, of the scions with their optimizers, and of one site's part of a batch,
however many sites and samples there are.

The sites of one task share the passes. Each keeps a checkpoint of its own, and sees the same samples with the same
noise in the same order whoever learns beside it: its bits do not depend on that. A site whose checkpoint is further
than others' joins when they have come as far.

Several workers share a pass: each runs the rootstock on its part of every batch, and all make the same steps by the
mean of their gradients. A pass costs a worker less the more of them there are, whereas in tasks of one worker each
each of them makes passes of its own for fewer sites.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from graftwork.models.numerics.streams import generator
from graftwork.specs.edits import Site, overlapping
from graftwork.stages.artifacts.latents import Noised, NoisedAnew
from graftwork.stages.catalog.distill import COPIES, DistillParams
from graftwork.stages.contract import Context, Partial, Stopped
from graftwork.stages.distillation.activations import PASS_BATCH, Pairs, Teacher
from graftwork.stages.distillation.loss import LOSSES, Mimic, RelativeError, error
from graftwork.stages.distillation.sources import TaskState, memory_budget
from graftwork.stages.training.agreement import Agreement
from graftwork.stages.training.batches import DrawnAhead, share_of
from graftwork.stages.training.engine import PlainEngine, is_first_worker, sum_over_workers
from graftwork.stages.training.loop import save_tensors

CHECKPOINT = "streamed.safetensors"
CHECKPOINT_SECONDS = 600.0
POINTS = 100  # at which a step says how far it is
PROBLEMS = "streaming problems"  # the name under which a task keeps what became of sites that learned beside others


@dataclass(frozen=True)
class PassErrors:
    """The mean errors of one pass: to train on, held-out, and held-out over the outputs' variance."""

    training: float
    heldout: float
    relative: float


@dataclass
class Learner:
    """A scion in training, and all that changes in it."""

    params: DistillParams
    partial: Partial
    scion: nn.Module
    mimic: Mimic
    engine: PlainEngine
    loss: str
    done: int = 0  # batches
    total: Tensor = field(default_factory=lambda: torch.zeros(()))  # error of this worker's samples of this pass so far
    history: list[PassErrors] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    problem: str | None = None

    @property
    def best_pass(self) -> int:
        """The pass, from 1, that left the weights with the least held-out error."""
        return 1 + min(range(len(self.history)), key=lambda number: self.history[number].heldout)

    def learn(self, pairs: Pairs, share: float, lr: float | None) -> None:
        """Take in a part of a worker's part of a batch; lr: of the step, which the last part makes.

        share: its samples over those of the batch, by how many workers the mean of the gradients is taken; 0 for
        samples that another worker counts.
        """
        mean = error(self.mimic, pairs, LOSSES[self.loss])
        if lr is None:
            self.engine.accumulate(mean * share)
        else:
            self.engine.step(mean * share, lr)
        if share:
            self.total += mean.detach() * len(pairs)

    def total_of_all(self) -> Tensor:
        """Return the error of all workers' samples of this pass so far; all of them must call it."""
        return sum_over_workers(self.total)

    def end_pass(self, samples: int, heldout: float, relative: float) -> None:
        """Note what a pass came to; the weights stay if they are the best so far."""
        self.history.append(PassErrors(self.total_of_all().item() / samples, heldout, relative))
        self.total.zero_()
        if not math.isfinite(heldout):
            where = f"in pass {len(self.history)}"
            self.problem = f"the held-out error is {heldout} {where}; a lower lr may help"
        elif self.best_pass == len(self.history):
            self.best = {name: value.detach().clone() for name, value in self.scion.state_dict().items()}

    def save(self) -> None:
        """Publish a checkpoint; all workers must call it, and the first one writes."""
        total = self.total_of_all()
        if not is_first_worker():
            return
        rows = [(one.training, one.heldout, one.relative) for one in self.history]
        progress = {f"best/{name}": value.cpu() for name, value in self.best.items()}
        progress["history"] = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
        progress["done"], progress["total"] = torch.tensor(self.done), total.cpu()
        save_tensors(self.partial, CHECKPOINT, self.engine.state() | progress)


Maker = Callable[[DistillParams], tuple[nn.Module, Mimic, str]]  # a fresh scion on its device, called how, and its loss


def new_learner(params: DistillParams, partial: Partial, make: Maker, device: torch.device) -> Learner:
    """Return a learner as its last checkpoint has it, if there is one."""
    scion, mimic, loss = make(params)
    path: Path | None = partial.load(CHECKPOINT)
    state = None if path is None else load_file(path)
    engine = PlainEngine(scion, clip=params.recipe.clip, state=state)
    learner = Learner(params, partial, scion, mimic, engine, loss, total=torch.zeros((), device=device))
    if state is not None:
        learner.done = int(state["done"])
        learner.total.copy_(state["total"] if is_first_worker() else torch.zeros(()))
        learner.history = [PassErrors(*row) for row in state["history"].tolist()]
        kept = {name.removeprefix("best/"): value for name, value in state.items() if name.startswith("best/")}
        learner.best = {name: value.to(device) for name, value in kept.items()}
    return learner


def is_through(task: TaskState, context: Context) -> bool:
    """Return whether the step's checkpoint is of the end of the last pass."""
    path = context.partial.load(CHECKPOINT)
    if path is None:
        return False
    with safe_open(path, "pt") as state:
        return int(state.get_tensor("done")) == _num_batches(task.teacher)


def stream(task: TaskState, context: Context, make: Maker) -> Learner:
    """Train the step's scion to the last pass, and beside it those of the steps that follow in its task.

    Return the step's own, with the best weights in its scion. What the others came to is in their checkpoints. Raise
    Stopped, and FloatingPointError for an error that is no finite number. Each worker of a group calls it.
    """
    params: DistillParams = context.params
    problems: dict[str, str] = context.task_scope.state.setdefault(PROBLEMS, {})
    if (name := params.edit.name) in problems:
        raise FloatingPointError(problems[name])
    own = new_learner(params, context.partial, make, context.device)
    together = Together(task, context, own)
    if own.done < together.num_batches:
        together.learners += [
            new_learner(other, partial, make, context.device)
            for other, partial in zip(context.task_scope.next, context.task_scope.partials, strict=False)
            if _streams_beside(task, params, other) and other.edit.name not in problems
        ]
    together.run()
    problems |= {one.params.edit.name: one.problem for one in together.learners if one.problem}
    if own.problem:
        raise FloatingPointError(own.problem)
    own.scion.load_state_dict(own.best)
    return own


def _streams_beside(task: TaskState, params: DistillParams, other: DistillParams) -> bool:
    """Whether another site of the task sees the same samples, and needs nothing but the rootstock to begin."""
    alike = (other.seed, other.recipe) == (params.seed, params.recipe)
    free = not overlapping(task.teacher.carried, [other.edit])
    return alike and free and task.teacher.trains(other.edit) and other.edit.site.target != "pair"


def _batches_a_pass(teacher: Teacher) -> int:
    return math.ceil(len(teacher.train) / teacher.recipe.batch)


def _num_batches(teacher: Teacher) -> int:
    return _batches_a_pass(teacher) * (teacher.recipe.passes or 1)


@dataclass(frozen=True)
class Share:
    """A worker's part of a batch."""

    noisy: Noised  # at least one sample, be it one that another worker counts
    weight: float  # of its mean error: its samples over those of the batch, times the number of workers


def _by_site(learners: Iterable[Learner]) -> dict[Site, list[Learner]]:
    """Return the learners of each site, of which several may be for one."""
    by_site: dict[Site, list[Learner]] = {}
    for one in learners:
        by_site.setdefault(one.params.edit.site, []).append(one)
    return by_site


class Together:
    """The learners of one task, and the passes that they share."""

    def __init__(self, task: TaskState, context: Context, own: Learner) -> None:
        self.teacher, self.context, self.own, self.learners = task.teacher, context, own, [own]
        self.recipe, self.seed = own.params.recipe, own.params.seed
        self.size = len(task.teacher.train)
        self.a_pass, self.num_batches = _batches_a_pass(task.teacher), _num_batches(task.teacher)
        self.rank, self.workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.at_once = self._micro_batch()
        self.last_save = time.monotonic()

    def run(self) -> None:
        """Make all passes that are left for any, or until the step's own site fails. Raise Stopped where that is asked
        for; all is saved then."""
        begin = min(one.done for one in self.learners)
        self._report(self.own.done)
        agreement = Agreement(self.context.stopping, self._is_due, self.teacher.device)
        with DrawnAhead(self._drawn, range(begin, self.num_batches)) as batches:
            for number, share in batches:
                action = agreement.before(number)
                if action is not None and number > begin:
                    self._save()
                if action == "stop":
                    _meet()
                    raise Stopped(f"after batch {number}")

                self._batch(number, share)
                if (number + 1) % self.a_pass == 0:
                    self._end_pass()
                    self._save()
                if self.own.problem is not None:
                    break
        agreement.forget()
        _meet()

    def active(self, number: int) -> list[Learner]:
        """Return those that have not taken in the batch of that number, and all before it."""
        return [one for one in self.learners if one.done == number and one.problem is None]

    def _batch(self, number: int, share: Share) -> None:
        learners = _by_site(self.active(number))
        if not learners:
            return
        parts = torch.arange(len(share.noisy)).split(self.at_once)
        lr = self._lr(number)
        for place, part in enumerate(parts):
            weight, is_last = share.weight * len(part) / len(share.noisy), place + 1 == len(parts)
            for site, pairs in self.teacher.streamed(list(learners), share.noisy[part]):
                for one in learners[site]:
                    one.learn(pairs, weight, lr if is_last else None)
        for one in chain.from_iterable(learners.values()):
            one.done += 1
        if self.own.done == number + 1 and (number + 1) % max(1, self.num_batches // POINTS) == 0:
            samples = (number % self.a_pass + 1) * self.recipe.batch
            mean = self.own.total_of_all().item() / min(samples, self.size)
            self._report(number + 1, {"training_error": mean, "lr": lr})

    @torch.no_grad()
    def _end_pass(self) -> None:
        """Measure, in one pass of the held-out samples, all that have come to the end of a pass."""
        passed = [one for one in self.learners if self._has_passed(one)]
        learners, names = _by_site(passed), [one.params.edit.name for one in passed]
        sums = {name: torch.zeros((), dtype=torch.float64, device=self.teacher.device) for name in names}
        relative = {name: RelativeError() for name in names}
        heldout = self.teacher.heldout
        own = torch.tensor(share_of(len(heldout), self.rank, self.workers), dtype=torch.long)
        for part in own.split(min(self.at_once, PASS_BATCH)) if learners and len(own) else ():
            for site, pairs in self.teacher.streamed(list(learners), heldout[part]):
                for one in learners[site]:
                    name = one.params.edit.name
                    sums[name] += error(one.mimic, pairs, LOSSES[one.loss]).double() * len(pairs)
                    relative[name].add(one.mimic(*pairs.inputs), pairs.outputs)
        for name, one in zip(names, passed, strict=True):
            relative[name].gather()
            one.end_pass(self.size, sum_over_workers(sums[name]).item() / len(heldout), relative[name].item())
        if self.own in passed:
            last = self.own.history[-1]
            self._report(self.own.done, {"training_error": last.training, "heldout_error": last.heldout})

    def _report(self, done: int, figures: Mapping[str, float] | None = None) -> None:
        if self.rank == 0:
            self.context.report(done, self.num_batches, figures)

    def _has_passed(self, one: Learner) -> bool:
        """Whether a learner is at the end of a pass that was not measured yet."""
        return one.problem is None and one.done == self.a_pass * (len(one.history) + 1)

    def _drawn(self, number: int) -> Share:
        """Return a worker's part of the batch of that number, of a pass over the samples in an order of its own."""
        which, place = divmod(number, self.a_pass)
        order = torch.randperm(self.size, generator=generator(self.seed, "distill/passes", "order", which))
        train = self.teacher.train
        assert isinstance(train, NoisedAnew)
        batch = order[place * self.recipe.batch : (place + 1) * self.recipe.batch]
        places = share_of(len(batch), self.rank, self.workers)
        own = batch[places.start : places.stop] if len(places) else batch[:1]
        return Share(train.again(which)[own], len(places) * self.workers / len(batch))

    def _lr(self, number: int) -> float:
        """The learning rate halves where it would among the recipe's epochs."""
        along = number / self.num_batches * self.recipe.epochs
        return self.recipe.lr * 0.5 ** sum(along >= milestone for milestone in self.recipe.milestones)

    def _micro_batch(self) -> int:
        recipe, device = self.recipe, self.teacher.device
        part = math.ceil(recipe.batch / self.workers)
        if recipe.micro_batch is not None or device.type == "cpu":
            return min(recipe.micro_batch or part, part)
        room = memory_budget(self.context, device) // (COPIES * self.teacher.bytes_a_sample(self.own.params.edit.site))
        return max(1, min(room, part))

    def _is_due(self) -> bool:
        return time.monotonic() - self.last_save >= CHECKPOINT_SECONDS

    def _save(self) -> None:
        for one in self.learners:
            if one.problem is None:
                one.save()
        self.last_save = time.monotonic()


def _meet() -> None:
    """Wait for the other workers: whoever leaves first takes the others along."""
    if dist.is_initialized():
        dist.barrier()
