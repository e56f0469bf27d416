"""Replacement scores: what scions do to the whole model's output, held to a direct computation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from graftwork.models.condition import Condition
from graftwork.models.rootstocks import Rootstock, new_rootstock
from graftwork.models.rootstocks.parallel import ParallelBlock
from graftwork.models.surgery import graft, new_scion, scion_at
from graftwork.specs.edits import Edit, Parallel, Site
from graftwork.specs.operators import HyenaY, Mha, Mlp
from graftwork.specs.solve import ScoreSpec
from graftwork.stages.artifacts.latents import Latents
from graftwork.stages.selection.replacement import Examples, Replacements, drawn, read_scion
from tests.small import TINY, block_of, lively

CPU = torch.device("cpu")
RECIPE = ScoreSpec(batch=5)  # 12 samples are 3 batches, the last smaller
HYENA = Edit(site=Site(block=1, target="mha"), operator=HyenaY())
SMALL_MLP = Edit(site=Site(block=2, target="mlp"), operator=Mlp(ratio=1))
PAIR = Edit(site=Site(block=1, target="pair"), operator=Parallel())
ROOM = 2**30


@pytest.fixture(scope="module")
def root() -> Rootstock:
    return lively(new_rootstock(TINY)).eval()


@pytest.fixture(scope="module")
def examples() -> Examples:
    source = torch.Generator().manual_seed(3)
    x = torch.randn(12, *TINY.latent_shape, generator=source)
    return drawn(Latents(x, Condition(labels=torch.arange(12) % 5)), TINY.objective, 1, seed=0)


def scion(model: Rootstock, edit: Edit, seed: int = 7) -> nn.Module:
    if edit.site.target == "pair":
        first, second = (copy.deepcopy(block_of(model, index)) for index in (1, 2))
        return lively(ParallelBlock(first, second, TINY.width), seed, 0.2)
    return lively(new_scion(model, edit, 0), seed)


def replacements(root: Rootstock, examples: Examples, room: int = ROOM) -> Replacements:
    return Replacements(copy.deepcopy(root), examples, RECIPE, CPU, range(TINY.depth), room)


def direct(root: Rootstock, examples: Examples, scions: dict[Edit, nn.Module]) -> tuple[Tensor, Tensor]:
    """The relative error of each sample's noise, and the change of its loss, of a graft that is built and run whole."""
    built = graft(copy.deepcopy(root), scions, 0)
    for edit, one in scions.items():
        scion_at(built, edit.site).load_state_dict(one.state_dict())
    objective, condition = TINY.objective, examples.condition
    z = objective.noised(examples.x0, examples.t, examples.noise)
    with torch.no_grad():
        wanted, found = (model(z, examples.t, condition)[:, :3] for model in (root, built))
        losses = [objective.loss(m, examples.x0, examples.t, condition, examples.noise) for m in (root, built)]
    error = (found - wanted).flatten(1).square().sum(1) / wanted.flatten(1).square().sum(1)
    return error, losses[1] - losses[0]


@pytest.mark.parametrize("edits", [(HYENA,), (SMALL_MLP,), (PAIR,), (HYENA, SMALL_MLP), ()], ids=str)
@pytest.mark.parametrize("room", [ROOM, 0], ids=["streams kept", "recomputed"])
def test_a_score_is_what_the_built_graft_comes_to(
    root: Rootstock, examples: Examples, edits: tuple[Edit, ...], room: int
) -> None:
    scions = {edit: scion(root, edit) for edit in edits}
    scored = replacements(root, examples, room).score(scions)
    error, change = direct(root, examples, scions)
    assert scored.output == pytest.approx(error.mean().item(), rel=1e-4, abs=1e-12)
    assert scored.loss == pytest.approx(change.mean().item(), rel=1e-3, abs=1e-6)
    assert (scored.output > 0) == bool(edits) and scored.samples == 12
    quarters = TINY.objective.quarter(examples.t)
    for number, value in enumerate(scored.output_by_quarter):
        part = error[quarters == number]
        assert value == (pytest.approx(part.mean().item(), rel=1e-4, abs=1e-12) if len(part) else None)
    assert scored.output_standard_error == pytest.approx(error.std().item() / 12**0.5, rel=1e-4, abs=1e-12)


def test_scores_do_not_depend_on_what_was_scored_before_and_leave_the_rootstock_as_it_was(
    root: Rootstock, examples: Examples
) -> None:
    scions = {edit: scion(root, edit) for edit in (HYENA, SMALL_MLP, PAIR)}
    alone = {edit: replacements(root, examples).score({edit: one}) for edit, one in scions.items()}
    shared = replacements(root, examples)
    before = copy.deepcopy(shared.model.state_dict())
    for edit in (PAIR, SMALL_MLP, HYENA, PAIR):
        assert shared.score({edit: scions[edit]}) == alone[edit]
    after = shared.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_streams_are_kept_as_far_as_there_is_room_and_change_no_bit(root: Rootstock, examples: Examples) -> None:
    stream_bytes = 4 * TINY.place.num_tokens * TINY.width * len(examples)
    some = replacements(root, examples, 2 * stream_bytes)
    assert some.kept == (0, 1) and replacements(root, examples, 0).kept == ()
    scions = {SMALL_MLP: scion(root, SMALL_MLP)}
    assert (
        some.score(scions)
        == replacements(root, examples, 0).score(scions)
        == replacements(root, examples).score(scions)
    )


def test_a_candidate_passes_the_blocks_behind_it_only(root: Rootstock, examples: Examples) -> None:
    one = replacements(root, examples)
    one.score({})  # the rootstock's pass
    passed: list[int] = []
    one.model.on_block = lambda index, tokens: passed.append(index)
    one.score({SMALL_MLP: scion(root, SMALL_MLP)})
    assert passed == [2, 3] * 3


def test_a_site_in_the_second_block_of_a_pair_that_the_rootstock_has_is_scored_from_the_pair_on(
    examples: Examples,
) -> None:
    paired = lively(graft(new_rootstock(TINY), [PAIR], 0)).eval()
    edit = Edit(site=Site(block=2, target="mlp"), operator=Mlp(ratio=1))
    built = copy.deepcopy(paired)
    one = lively(new_scion(built, edit, 0), 7)
    scored = replacements(paired, examples).score({edit: one})
    built.slot(edit.site).fill(one)
    z = TINY.objective.noised(examples.x0, examples.t, examples.noise)
    with torch.no_grad():
        wanted, found = (model(z, examples.t, examples.condition)[:, :3] for model in (paired, built))
    error = (found - wanted).flatten(1).square().sum(1) / wanted.flatten(1).square().sum(1)
    assert scored.output == pytest.approx(error.mean().item(), rel=1e-4) and scored.output > 0


def test_a_perfect_copy_changes_nothing(root: Rootstock, examples: Examples, tmp_path: Path) -> None:
    edit = Edit(site=Site(block=3, target="mha"), operator=Mha())
    save_file(scion_at(root, edit.site).state_dict(), tmp_path / "scion.safetensors")
    one = replacements(root, examples)
    scored = one.score({edit: read_scion(one.model, edit, tmp_path, 0, CPU)})
    assert scored.output == pytest.approx(0, abs=1e-10) and scored.loss == pytest.approx(0, abs=1e-5)


def test_reading_a_pair_leaves_the_rootstocks_blocks_alone(root: Rootstock, tmp_path: Path) -> None:
    other = scion(root, PAIR, seed=11)
    save_file(other.state_dict(), tmp_path / "scion.safetensors")
    model = copy.deepcopy(root)
    before = copy.deepcopy(model.state_dict())
    read_scion(model, PAIR, tmp_path, 0, CPU)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_latents_draws_depend_on_its_place_and_the_seed_alone() -> None:
    latents = Latents(torch.zeros(4, *TINY.latent_shape), Condition(labels=torch.zeros(4, dtype=torch.long)))
    whole, half = (drawn(latents.first(count), TINY.objective, 2, seed=5) for count in (4, 2))
    assert torch.equal(whole.t[:4], half.t) and torch.equal(whole.noise[:4], half.noise)
    assert not torch.equal(whole.noise, drawn(latents, TINY.objective, 2, seed=6).noise)
    assert len({*map(float, whole.noise[:, 0, 0, 0])}) == 8  # draws of one latent differ, too


def test_a_pair_that_is_made_in_any_case_has_the_scions_of_its_blocks(root: Rootstock, tmp_path: Path) -> None:
    built = lively(graft(copy.deepcopy(root), [HYENA, PAIR], 0), seed=5)
    save_file(scion_at(built, PAIR.site).state_dict(), tmp_path / "scion.safetensors")
    elsewhere = SMALL_MLP.model_copy(update={"site": Site(block=3, target="mlp")})
    one = read_scion(copy.deepcopy(root), PAIR, tmp_path, 0, CPU, [HYENA, elsewhere])
    wanted = scion_at(built, PAIR.site).state_dict()
    assert all(torch.equal(wanted[name], value) for name, value in one.state_dict().items())
