"""The smallest training there is, which tests kill, stop and compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from graftwork.models.condition import Condition
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.partial import Partial
from graftwork.specs.training import TrainingSpec
from graftwork.stages.contract import never
from graftwork.stages.training import loop as training
from graftwork.stages.training.batches import Batch, TrainingSet
from graftwork.stages.training.engine import PlainEngine
from graftwork.stages.training.loop import train
from graftwork.stages.training.microbatches import Loss
from tests import small

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


def lively(module: small.M, seed: int = 0) -> small.M:
    """Small enough for training to go well."""
    return small.lively(module, seed, scale=0.2)


def make_data() -> TrainingSet:
    draws = torch.Generator().manual_seed(1)
    latents, condition = torch.randn(30, 1, 8, 8, generator=draws), Condition(labels=torch.arange(30) % 3)
    return TrainingSet(latents, condition, TINY.conditioner, TINY.objective, CPU)


def latents_of(data: TrainingSet) -> Tensor:
    """The latents of such data, which lie in memory."""
    assert isinstance(data.latents, Tensor)
    return data.latents


def run_training(
    partial: Partial,
    data: TrainingSet,
    recipe: TrainingSpec = RECIPE,
    report: Reports | None = None,
    seed: int = 0,
    weights: int = 0,
    stopping: Callable[[], bool] = never,
    teach: Callable[[DiT], Loss] | None = None,
) -> None:
    """Train from the weights of that number, or from the checkpoint. teach: makes the loss of a model."""
    model = lively(DiT(TINY), weights)

    def make_engine(state: Mapping[str, Tensor] | None) -> PlainEngine:
        return PlainEngine(
            model, betas=recipe.betas, clip=recipe.clip, ema=recipe.ema, precision=recipe.precision, state=state
        )

    train(
        make_engine,
        data,
        recipe,
        seed=seed,
        stream="base",
        partial=partial,
        report=report or Reports(),
        stopping=stopping,
        loss_of=None if teach is None else teach(model),
    )


def run_until_done(store: Store, key: str, data: TrainingSet, deaths: tuple[int, ...]) -> None:
    """Start again after each death, from other weights than at first: all must come from the checkpoint."""
    for death in (*deaths, None):
        weights = 99 if store.state(key) == "partial" else 0
        try:
            run_training(store.partial(key), data, report=Reports(dies_at=death), weights=weights)
        except Killed:
            assert death is not None


def tensors_of(batch: Batch) -> list[Tensor]:
    """All that a batch is made of."""
    return [batch.x, batch.t, batch.noise, *batch.condition.tensors().values()]


def state_of(partial: Partial, name: str = training.CHECKPOINT) -> dict[str, Tensor]:
    path = partial.load(name)
    assert path is not None
    return load_file(path)


def assert_same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
