"""What a network is told (models.condition), and what a model predicts (models.objectives): the contracts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from graftwork.models import sampling
from graftwork.models.condition import ClassConditioner, Condition, Conditioner
from graftwork.models.measures.locality import Locality, by_displacement
from graftwork.models.objectives import QUARTERS, Network, objective_of, over
from graftwork.models.objectives.gaussian import STEPS, Diffusion
from graftwork.models.operators.attention import Attention
from graftwork.specs.operators import Mha, Place
from graftwork.specs.sampler import AncestralSampler, DdimSampler
from graftwork.specs.training import TrainingSpec
from graftwork.stages.artifacts.latents import Latents, LatentsMeta, noised, read_meta, write_meta
from graftwork.stages.pictures.pictures import attention_to_all_alike
from graftwork.stages.training.batches import TrainingSet, draw_batch
from graftwork.stages.training.microbatches import parts
from tests.tiny_training import TINY

CPU = torch.device("cpu")


def labelled(*labels: int) -> Condition:
    return Condition(labels=torch.tensor(labels))


def texts(count: int, start: float = 0.0) -> Condition:
    """Texts of 3 tokens of 2 channels, the last of which fills up, and a pooled vector of 4."""
    text = start + torch.arange(count * 6).reshape(count, 3, 2).float()
    mask = torch.tensor([[True, True, False]]).repeat(count, 1)
    return Condition(text=text, mask=mask, pooled=-text.flatten(1)[:, :4])


class TextConditioner(Conditioner):
    """Texts, of which the null one is a text of its own."""

    def null(self, like: Condition) -> Condition:
        mask = torch.zeros_like(like.require("mask"))
        return Condition(text=torch.full_like(like.require("text"), -7.0), mask=mask, pooled=like.require("pooled") * 0)

    def example(self, count: int, device: torch.device) -> Condition:
        return texts(count).to(device)


def same(one: Condition, other: Condition) -> bool:
    first, second = one.tensors(), other.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


BOTH = pytest.mark.parametrize(
    ("condition", "conditioner"), [(labelled(2, 0, 1), ClassConditioner(3)), (texts(3), TextConditioner())],
    ids=["labels", "text"],
)  # fmt: skip


@BOTH
def test_a_condition_is_cut_and_joined_in_all_its_fields(condition: Condition, conditioner: Conditioner) -> None:
    assert len(condition) == 3
    assert same(condition[:1].join(condition[1:]), condition)
    assert same(condition[torch.tensor([2, 0])], condition[2:].join(condition[:1]))
    assert same(condition[torch.tensor([False, True, True])], condition[1:])


@BOTH
def test_dropped_samples_are_told_what_null_is_and_the_others_what_they_were(
    condition: Condition, conditioner: Conditioner
) -> None:
    null = conditioner.null(condition)
    found = conditioner.drop(condition, torch.tensor([False, True, False]))
    assert same(found, condition[:1].join(null[1:2]).join(condition[2:]))
    assert not same(found, condition)
    assert len(conditioner.example(5, CPU)) == 5


def test_the_null_class_is_the_one_behind_the_last() -> None:
    assert ClassConditioner(3).null(labelled(0, 1)).require("labels").tolist() == [3, 3]


def test_only_what_is_floating_point_takes_another_type() -> None:
    found = texts(2).to(torch.device("meta"), torch.bfloat16).tensors()
    assert {name: value.dtype for name, value in found.items()} == {
        "text": torch.bfloat16, "mask": torch.bool, "pooled": torch.bfloat16,
    }  # fmt: skip
    assert {value.device.type for value in found.values()} == {"meta"}
    assert labelled(1).to(dtype=torch.bfloat16).require("labels").dtype == torch.int64


def test_labels_alone_will_do_for_a_condition() -> None:
    assert same(Condition.of(torch.tensor([1, 2])), labelled(1, 2))
    condition = texts(1)
    assert Condition.of(condition) is condition


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (lambda: labelled(1).join(texts(1)), "condition: got text, mask, pooled beside labels"),
        (lambda: texts(1).require("labels"), "condition: got text, mask, pooled; accepted: labels"),
        (lambda: len(Condition()), "condition: got none; accepted: at least one of labels, text, mask, pooled"),
    ],
)
def test_a_condition_of_the_wrong_kind_is_one_line(wrong: Any, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}$"):
        wrong()


# -- an objective, and conditions, that nothing else knows


@dataclass(frozen=True)
class Halves:
    """Predicts the clean latents; at t, a half or a whole, so much of them is noise."""

    kind: ClassVar[Any] = "halves"

    def on(self, device: torch.device) -> Halves:
        return self

    def draw_t(self, count: int, source: torch.Generator) -> Tensor:
        return torch.randint(1, 3, (count,), generator=source) / 2

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return (1 - over(t, x0)) * x0 + over(t, x0) * noise

    def loss(self, network: Network, x0: Tensor, t: Tensor, condition: Condition, noise: Tensor) -> Tensor:
        return (network(self.noised(x0, t, noise), t, condition) - x0).square().flatten(1).mean(1)

    def mimicry(self, x: Tensor, t: Tensor, output: Tensor, wanted: Tensor) -> Tensor:
        return (output - wanted).square().flatten(1).mean(1)

    def x0(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        return output

    def quarter(self, t: Tensor) -> Tensor:
        return (t * QUARTERS).long() - 1


FILMS = torch.arange(4 * 2 * 3 * 1 * 2).reshape(4, 2, 3, 1, 2).float()  # latents of 2 channels, 3 frames, 1 x 2
DATA = TrainingSet(FILMS, texts(4), TextConditioner(), Halves(), CPU)


def test_any_objective_latents_and_conditions_make_batches() -> None:
    recipe = TrainingSpec(batch=16, label_dropout=0.5, steps=1)
    x, t, condition, noise = draw_batch(DATA, recipe, 0, "toy", 0, 0, 1)
    assert x.shape == noise.shape == (16, 2, 3, 1, 2) and set(t.tolist()) == {0.5, 1.0}
    dropped = (condition.require("text") == -7).flatten(1).all(1)
    assert 0 < dropped.sum() < 16
    for latent, text in zip(x[~dropped], condition.require("text")[~dropped], strict=True):
        (place,) = (latent == FILMS).flatten(1).all(1).nonzero().flatten().tolist()
        assert torch.equal(text, texts(4).require("text")[place])
    whole = draw_batch(DATA, recipe, 0, "toy", 0, 0, 1)
    first, *others = (part.batch.condition for part in parts(whole, 3))
    for other in others:
        first = first.join(other)
    assert same(first, whole.condition)


def test_any_objective_noises_latents_for_distillation() -> None:
    found = noised(Latents(FILMS, texts(4)), Halves(), 3, 0, "toy")
    assert set(found.t.tolist()) == {0.5, 1.0} and same(found.condition[::3], texts(4))
    assert len(found[2:5]) == 3 and found.z.shape == (12, 2, 3, 1, 2)


def test_of_latents_without_classes_some_are_the_first() -> None:
    latents = Latents(FILMS, texts(4))
    for some in (latents.spread(3), latents.stratified(3), latents.share(0.75)):
        assert torch.equal(some.tensor(), FILMS[:3]) and same(some.condition, texts(3))
    with pytest.raises(ValueError, match=r"^condition: got text, mask, pooled; accepted: labels$"):
        _ = latents.labels


def test_a_sampler_that_does_not_serve_what_a_model_predicts_is_one_line() -> None:
    settings: dict[str, Any] = {"conditioner": TINY.conditioner, "objective": Halves(), "bounded": False}
    line = "^sampler.kind: got ddim; accepted: a sampler for models that predict halves, as this one does$"
    with pytest.raises(ValueError, match=line):
        sampling.sample(lambda x, *_: x, labelled(0), lambda: FILMS[:1], sampler=DdimSampler(), **settings)


@pytest.mark.parametrize("sampler", [DdimSampler(steps=3), AncestralSampler(steps=3)], ids=["ddim", "ancestral"])
def test_films_are_sampled_and_guided_by_texts(sampler: Any) -> None:
    told: list[Condition] = []

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        told.append(condition)
        return torch.cat([x, 0 * x], dim=1)

    drawn = sampling.sample(
        network,
        texts(4),
        lambda: FILMS,
        sampler=sampler,
        conditioner=TextConditioner(),
        objective=Diffusion(),
        bounded=True,
    )
    assert drawn.shape == FILMS.shape and len(told) == 3
    assert same(told[0], texts(4).join(TextConditioner().null(texts(4))))


# -- the noise of DiT, behind the contract


def test_the_noise_objective_draws_its_steps_and_knows_their_quarters() -> None:
    objective = objective_of("epsilon")
    t = objective.draw_t(2000, torch.Generator().manual_seed(0))
    assert torch.equal(t, torch.randint(STEPS, (2000,), generator=torch.Generator().manual_seed(0)))
    assert objective.quarter(torch.tensor([0, 249, 250, 499, 500, 749, 750, 999])).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_clean_latents_are_read_off_an_output_with_or_without_a_variance() -> None:
    objective, noise, t = objective_of("epsilon"), torch.randn(4, 2, 3, 1, 2), torch.tensor([0, 9, 300, 600])
    x = objective.noised(FILMS, t, noise)
    for output in (noise, torch.cat([noise, noise], dim=1)):
        torch.testing.assert_close(objective.x0(x, t, output), FILMS, atol=1e-3, rtol=1e-3)


def test_an_objective_that_there_is_not_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^objective: got 'score'; accepted: .*epsilon"):
        objective_of("score")  # type: ignore[arg-type]


# -- latents of any shape


def test_the_latents_shape_is_kept_and_what_earlier_versions_wrote_is_read(tmp_path: Path) -> None:
    rest: dict[str, Any] = {"codec": "vae", "classes": ("a",), "num_training": 1, "num_heldout": 1}
    meta = LatentsMeta(shape=(2, 3, 1, 2), **rest)
    write_meta(tmp_path, meta)
    assert read_meta(tmp_path) == meta and meta.channels == 2
    with pytest.raises(ValueError, match=r"^latents: got the shape \(2, 3, 1, 2\); accepted: \(channels, side, side\)"):
        _ = meta.side
    before = '{"codec": "vae", "channels": 4, "side": 8, "classes": ["a"], "num_training": 1, "num_heldout": 1}'
    (tmp_path / "meta.json").write_text(before)
    found = read_meta(tmp_path)
    assert found == LatentsMeta(shape=(4, 8, 8), **rest) and found.side == 8


@pytest.mark.parametrize("chunk_bytes", [2**20, 1])
def test_attention_over_tokens_that_are_no_square_is_told_by_rows_and_columns(chunk_bytes: int) -> None:
    height, width = 2, 4
    attention = Attention(Mha(), Place(width=8, heads=1, num_tokens=8))
    torch.nn.init.zeros_(attention.qkv.weight)
    torch.nn.init.zeros_(attention.qkv.bias)
    locality = Locality((height, width), CPU, chunk_bytes)
    locality.add(attention, torch.randn(3, 8, 8), torch.tensor([0, 1, 3]))
    rows, columns = np.divmod(np.arange(8), width)
    apart = np.maximum(abs(rows[:, None] - rows), abs(columns[:, None] - columns))
    alike = [(apart <= k).mean() for k in range(width)]
    assert locality.overall().patches.tolist() == pytest.approx(alike)
    assert attention_to_all_alike(8, width, "patches").tolist() == pytest.approx(alike)
    tokens = abs(np.arange(8)[:, None] - np.arange(8))
    assert locality.overall().tokens.tolist() == pytest.approx([(tokens <= k).mean() for k in range(8)])
    assert [quarter is None for quarter in locality.by_quarter()] == [False, False, True, False]
    assert by_displacement(torch.ones(8, 8), width).shape == (2 * height - 1, 2 * width - 1)
