"""A teacher in stage 2: its loss by the formulas, and trainings that go on, are cut up, and learn by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from graftwork.models.condition import Condition
from graftwork.models.objectives import objective_of
from graftwork.models.objectives.gaussian import Diffusion
from graftwork.models.rootstocks.dit import DiT
from graftwork.models.surgery import graft, observe
from graftwork.pipeline.planning import preflight
from graftwork.pipeline.planning.plan import make_plan
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.costs import rootstock_cost
from graftwork.specs.edits import Edit, Parallel, Site
from graftwork.specs.operators import HyenaY, Mlp
from graftwork.specs.reading.load import load
from graftwork.specs.training import FinetuneSpec, TeacherSpec
from graftwork.stages.catalog.finetune import teacher_flops
from graftwork.stages.training.batches import Batch, TrainingSet
from graftwork.stages.training.teacher import TeacherLoss
from tests.conftest import TINY as TINY_JOB
from tests.tiny_training import (
    CPU,
    RECIPE,
    TINY,
    Killed,
    Reports,
    assert_same_bits,
    lively,
    run_training,
    state_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

EDITS = (Edit(site=Site(block=1, target="mha"), operator=HyenaY()),)
PAIR = (Edit(site=Site(block=0, target="pair"), operator=Parallel()),)


def batch_of(data: TrainingSet, size: int = 5) -> Batch:
    draws = torch.Generator().manual_seed(4)
    t = data.objective.draw_t(size, draws)
    noise = torch.randn(size, 1, 8, 8, generator=draws)
    return Batch(data.latents[torch.arange(size)], t, data.condition[:size], noise)


def lesson(student: DiT, teacher: DiT, **changes: Any) -> TeacherLoss:
    return TeacherLoss(TINY.objective, TeacherSpec(**changes), teacher, student, "fp32", CPU)


def streams_of(model: DiT, x: Tensor, batch: Batch) -> list[Tensor]:
    """What leaves each block, computed block by block."""
    stream = model.start(x, batch.t, batch.condition)
    found = []
    for block in model.blocks:
        tokens = block(stream.tokens, *stream.conditioning)
        stream = type(stream)(tokens, stream.conditioning)
        found.append(tokens)
    return found


@pytest.mark.parametrize("edits", [EDITS, PAIR], ids=["operator", "pair"])
@pytest.mark.parametrize("outliers", [2.0, None])
def test_the_loss_is_the_weighted_sum_of_its_three_parts(
    data: TrainingSet, edits: tuple[Edit, ...], outliers: float | None
) -> None:
    teacher, student = lively(DiT(TINY)), graft(lively(DiT(TINY), 1), edits, 0)
    loss_of = lesson(student, teacher, task=0.3, output=0.7, features=0.5, outliers=outliers)
    batch = batch_of(data)
    found = loss_of(student, batch, 0.25)

    x = TINY.objective.noised(batch.x, batch.t, batch.noise)
    task = TINY.objective.loss(student, batch.x, batch.t, batch.condition, batch.noise)
    output, wanted = student(x, batch.t, batch.condition), teacher(x, batch.t, batch.condition)
    mimicry = TINY.objective.mimicry(x, batch.t, output, wanted)
    blocks = [1] if edits is PAIR else [0, 1]  # a pair leaves its tokens behind its second block
    seen, told = streams_of(student, x, batch), streams_of(teacher, x, batch)
    for sample in range(len(batch.t)):
        errors = []
        for index in blocks:
            sides = []
            for tokens in (seen[index][sample], told[index][sample]):
                far = (tokens - tokens.mean()).abs() >= (outliers or math.inf) * tokens.std()
                assert (far.any() and not far.all()) or outliers is None
                sides.append(torch.where(far, torch.zeros(()), tokens))
            errors.append((sides[0] - sides[1]).pow(2).mean())
        features = sum(errors) / len(errors)
        whole = 0.3 * task[sample] + 0.7 * mimicry[sample] + 0.5 * 0.75 * features
        torch.testing.assert_close(found[sample], whole, rtol=1e-5, atol=1e-6)


def posterior(kept: Tensor, step: int, x: Tensor, output: Tensor) -> Normal:
    """p(x[t-1] | x[t]) of a network's output (2C,H,W), in float64; kept: alpha bar."""
    before = kept[step - 1] if step else torch.ones((), dtype=torch.float64)
    beta = 1 - kept[step] / before
    at_second = (1 - kept[1] / kept[0]) * (1 - kept[0]) / (1 - kept[1])
    low = (beta * (1 - before) / (1 - kept[step]) if step else at_second).log()
    noise, raw = output.double().chunk(2)
    x0 = (x.double() - (1 - kept[step]).sqrt() * noise) / kept[step].sqrt()
    mean = beta * before.sqrt() / (1 - kept[step]) * x0
    mean = mean + (1 - before) * (1 - beta).sqrt() / (1 - kept[step]) * x.double()
    log_var = (raw + 1) / 2 * beta.log() + (1 - raw) / 2 * low
    return Normal(mean, (log_var / 2).exp())


def test_what_a_diffusion_mimics_is_the_noise_and_the_posterior_of_the_teacher() -> None:
    chain, draws = Diffusion(), torch.Generator().manual_seed(0)
    x, output, wanted = (torch.randn(4, size, 3, 3, generator=draws) for size in (2, 4, 4))
    t = torch.tensor([0, 1, 500, 999])
    output.requires_grad_()
    found = chain.mimicry(x, t, output, wanted)

    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    for sample, step in enumerate(t.tolist()):
        theirs, ours = (posterior(kept, step, x[sample], values[sample].detach()) for values in (wanted, output))
        kl = kl_divergence(theirs, ours).mean() / math.log(2)
        mse = (output[sample, :2] - wanted[sample, :2]).double().pow(2).mean()
        torch.testing.assert_close(found[sample].double(), mse + kl, rtol=1e-3, atol=1e-6)

    found.sum().backward()
    gradient = output.grad
    assert gradient is not None
    # The KL trains the variance alone: the noise learns by the squared error.
    by_hand = 2 * (output.detach()[:, :2] - wanted[:, :2]) / (2 * 9)
    torch.testing.assert_close(gradient[:, :2], by_hand)
    assert gradient[:, 2:].abs().min() > 0
    assert chain.mimicry(x, t, wanted, wanted).abs().max() < 1e-6


def test_what_a_flow_mimics_is_the_velocity() -> None:
    x, output, wanted = (torch.randn(3, size, 4, 4) for size in (2, 4, 4))
    found = objective_of("velocity").mimicry(x, torch.rand(3), output, wanted)
    torch.testing.assert_close(found, (output - wanted)[:, :2].pow(2).mean((1, 2, 3)))


def test_the_weight_of_the_features_falls_to_nothing_or_stays(data: TrainingSet) -> None:
    teacher, student = lively(DiT(TINY)), lively(DiT(TINY), 1)
    falling = lesson(student, teacher, features=0.2)
    assert [falling.features_weight(along) for along in (0.0, 0.5, 1.0)] == [0.2, 0.1, 0.0]
    assert lesson(student, teacher, features=0.2, features_decay="none").features_weight(0.9) == 0.2


def test_a_teacher_learns_nothing_and_only_says_what_it_would_put_out(data: TrainingSet) -> None:
    teacher, student = lively(DiT(TINY)), lively(DiT(TINY), 1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    loss_of = lesson(student, teacher, task=0.0)
    loss_of(student, batch_of(data), 0.0).mean().backward()
    assert_same_bits(teacher.state_dict(), before)
    assert all(value.grad is None for value in teacher.parameters())
    assert all(value.grad is not None for value in student.blocks.parameters())
    assert loss_of.student_outputs.tokens == loss_of.teacher_outputs.tokens == {}
    alike = lively(DiT(TINY))
    assert lesson(alike, teacher, task=0.0)(alike, batch_of(data), 0.0).abs().max() < 1e-6


def teach(**changes: Any) -> Callable[[DiT], TeacherLoss]:
    """Learn from the same rootstock, whatever weights the student begins with."""
    return lambda student: lesson(student, lively(DiT(TINY), 5), features=0.5, **changes)


def test_a_training_with_a_teacher_that_was_killed_goes_on_in_the_same_bits(store: Store, data: TrainingSet) -> None:
    run_training(store.partial("straight"), data, teach=teach())
    with pytest.raises(Killed):
        run_training(store.partial("killed"), data, report=Reports(dies_at=7), teach=teach())
    run_training(store.partial("killed"), data, weights=99, teach=teach())
    straight = state_of(store.partial("straight"))
    assert_same_bits(state_of(store.partial("killed")), straight)
    run_training(store.partial("alone"), data)
    assert not torch.equal(straight["curve"], state_of(store.partial("alone"))["curve"])


@pytest.mark.parametrize("changes", [{"micro_batch": 3}, {"checkpointing": True}], ids=str)
def test_parts_of_a_batch_and_activations_that_are_not_kept_change_nothing_but_rounding(
    store: Store, data: TrainingSet, changes: dict[str, Any]
) -> None:
    losses: list[TeacherLoss] = []

    def made(student: DiT) -> TeacherLoss:
        student.checkpointing = changes.get("checkpointing", False)
        losses.append(teach()(student))
        return losses[-1]

    run_training(store.partial("whole"), data, teach=teach())
    run_training(store.partial("changed"), data, RECIPE.model_copy(update=changes), teach=made)
    whole, changed = (state_of(store.partial(key)) for key in ("whole", "changed"))
    torch.testing.assert_close(changed["curve"], whole["curve"], rtol=1e-4, atol=0)
    assert losses[0].student_outputs.tokens == {}  # blocks that a backward pass runs again leave nothing


def test_blocks_learn_from_features_where_the_output_tells_them_nothing(data: TrainingSet) -> None:
    """A planted student whose last layer is shut: no gradient comes through it."""
    teacher = lively(DiT(TINY))
    batch = batch_of(data, 8)
    x = TINY.objective.noised(batch.x, batch.t, batch.noise)
    site = Site(block=1, target="mlp")
    errors = {}
    for weight in (0.0, 1.0):
        student = graft(lively(DiT(TINY)), [Edit(site=site, operator=Mlp(ratio=4))], 3)
        student.final_layer.requires_grad_(False)
        torch.nn.init.zeros_(student.final_layer.linear.weight)
        loss_of = lesson(student, teacher, features=weight, features_decay="none", outliers=None)
        optimizer = torch.optim.Adam(student.blocks.parameters(), lr=1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            loss_of(student, batch, 0.0).mean().backward()
            optimizer.step()
        seen, told = (observe(model, [site], x, batch.t, Condition.of(batch.condition)) for model in (student, teacher))
        errors[weight] = (seen[site].output - told[site].output).pow(2).mean().item()
    assert errors[1.0] < 0.5 * errors[0.0]


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"output": 0, "features": 0}, "output"),
        ({"outliers": 0}, "outliers"),
        ({"features_decay": "cosine"}, "features_decay"),
        ({"task": -1}, "task"),
    ],
    ids=str,
)
def test_a_teacher_that_teaches_nothing_is_refused_by_field(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        FinetuneSpec(teacher=spec)
    assert [error["loc"] for error in refused.value.errors()] == [("teacher", field)]


def test_a_plan_counts_the_teachers_passes_and_says_what_they_add() -> None:
    plain, taught = (load(TINY_JOB, [*asked]) for asked in ([], ["finetune.teacher={}"]))
    flops = [make_plan(job)["finetune"].work for job in (plain, taught)]
    assert flops[0] is not None and flops[1] is not None
    passes = taught.finetune.steps * taught.finetune.batch
    cost = rootstock_cost(taught.model, taught.place(), taught.codec.latent_channels(taught.data), num_classes=1)
    assert teacher_flops(taught) == cost.flops * passes
    assert flops[1].own - flops[0].own == teacher_flops(taught)
    (line,) = [line for line in preflight.notes(taught) if line.startswith("finetune.teacher: adds 3")]
    assert "% to the" in line and not [one for one in preflight.notes(plain) if "teacher" in one]
    changed = {step.name for step in make_plan(taught).steps} & {"finetune", "finetune/random_init"}
    keys = [{step.name: step.key for step in make_plan(job).steps} for job in (plain, taught)]
    differing = {name for name in keys[0] if keys[0][name] != keys[1][name]}
    assert changed <= differing and not {"features", "base", "select", "evaluate/rootstock"} & differing
