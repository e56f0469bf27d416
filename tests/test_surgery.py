"""Surgery on a transformer: operators and pairs of blocks are observed and replaced, and what that costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork.models import checkpoints
from graftwork.models.measures.costs import forward_flops, forward_inputs, forward_memory, num_parameters
from graftwork.models.rootstocks.dit import Block, DiT, DiTConfig, modulations
from graftwork.models.rootstocks.parallel import Absorbed, ParallelBlock
from graftwork.models.surgery import all_edits, answer, graft, new_scion, observe, replace, scion_at
from graftwork.specs.costs import graft_cost, rootstock_cost
from graftwork.specs.edits import Edit, Parallel, Site
from graftwork.specs.operators import HyenaSE, HyenaX, HyenaY, Mamba2, Mlp, MlpHyenaX, Swa
from graftwork.specs.rootstock import DitModel
from tests.small import TINY, Batch, block_of, lively

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


MHA_SITE, MLP_SITE = Site(block=1, target="mha"), Site(block=2, target="mlp")


def started(model: DiT, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the tokens before the first block, and what modulates the blocks."""
    stream = model.start(*batch)
    return stream.tokens, stream.conditioning[0]


@pytest.mark.parametrize("site", [MHA_SITE, MLP_SITE, Site(block=0, target="mlp")], ids=str)
def test_what_is_observed_is_what_a_forward_by_hand_sees(model: DiT, batch: Batch, site: Site) -> None:
    tokens, c = started(model, batch)
    for block in model.blocks[: site.block]:
        tokens = block(tokens, c)
    block = block_of(model, site.block)
    m = [part[:, None] for part in modulations(block, c)]
    seen = block.norm1(tokens) * (1 + m[1]) + m[0]
    made, gate = block.attn(seen), m[2]
    if site.target == "mlp":
        tokens = tokens + gate * made
        seen = block.norm2(tokens) * (1 + m[4]) + m[3]
        made, gate = block.mlp(seen), m[5]
    found = observe(model, [site], *batch)[site]
    torch.testing.assert_close((*found.inputs, found.output, found.gate), (seen, made, gate[:, 0]))


def test_several_sites_are_observed_in_one_pass(model: DiT, batch: Batch) -> None:
    together = observe(model, [MLP_SITE, MHA_SITE], *batch)
    for site in (MLP_SITE, MHA_SITE):
        assert torch.equal(together[site].output, observe(model, [site], *batch)[site].output)


def test_observing_leaves_no_trace(model: DiT, batch: Batch) -> None:
    observe(model, [MHA_SITE], *batch)
    assert not scion_at(model, MHA_SITE)._forward_hooks


def test_blocks_behind_the_last_site_are_not_run(model: DiT, batch: Batch) -> None:
    model.blocks[2] = nn.Identity()  # would fail: it takes two arguments
    assert observe(model, [MHA_SITE], *batch)


@pytest.mark.parametrize("site", [MHA_SITE, MLP_SITE], ids=str)
def test_replacing_an_operator_by_its_copy_changes_nothing(model: DiT, batch: Batch, site: Site) -> None:
    before = model(*batch)
    replace(model, site, copy.deepcopy(scion_at(model, site)))
    assert torch.equal(model(*batch), before)


def test_a_graft_leaves_every_other_tensor_alone(model: DiT) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graft(model, [Edit(site=MHA_SITE, operator=Swa())], seed=0)
    after = model.state_dict()
    changed = {name for name in before.keys() | after.keys() if name not in after or name not in before}
    assert all(name.startswith("blocks.1.attn.") for name in changed)
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())


def test_a_scion_starts_the_same_wherever_it_is_made(model: DiT) -> None:
    torch.manual_seed(1)
    first = new_scion(model, Edit(site=MHA_SITE, operator=HyenaX()), seed=4).state_dict()
    torch.manual_seed(2)
    second = new_scion(model, Edit(site=MHA_SITE, operator=HyenaX()), seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_scions_of_two_sites_start_differently(model: DiT) -> None:
    edits = (Edit(site=Site(block=block, target="mha"), operator=HyenaX()) for block in (0, 1))
    first, second = (new_scion(model, edit, seed=4).get_parameter("in_proj.weight") for edit in edits)
    assert not torch.equal(first, second)


# -- pairs


PAIR = Edit(site=Site(block=2, target="pair"), operator=Parallel())
WITHIN = Edit(site=Site(block=3, target="mha"), operator=HyenaY())


def test_a_fresh_pair_adds_what_each_of_its_blocks_adds_to_the_same_input(model: DiT, batch: Batch) -> None:
    x, c = started(model, batch)
    first, second = model.blocks[2], model.blocks[3]
    expected = x + (first(x, c) - x) + (second(x, c) - x)
    graft(model, [PAIR], seed=0)
    torch.testing.assert_close(model.blocks[3](model.blocks[2](x, c), c), expected)


def test_a_pair_is_asked_for_what_its_blocks_add_one_after_the_other(model: DiT, batch: Batch) -> None:
    tokens, c = started(model, batch)
    before = model.blocks[1](model.blocks[0](tokens, c), c)
    after = model.blocks[3](model.blocks[2](before, c), c)
    found = observe(model, [PAIR.site], *batch)[PAIR.site]
    torch.testing.assert_close((*found.inputs, found.output), (before, c, after - before))
    assert found.gate is None


def test_a_pair_answers_with_what_it_adds(model: DiT, batch: Batch) -> None:
    x, c = started(model, batch)
    pair = lively(new_scion(model, PAIR, seed=0))
    torch.testing.assert_close(answer(pair)(x, c), pair(x, c) - x)


@pytest.mark.parametrize("edits", [(PAIR, WITHIN), (WITHIN, PAIR)], ids=["pair first", "pair last"])
def test_a_pair_takes_in_operators_that_were_replaced(model: DiT, edits: tuple[Edit, ...]) -> None:
    graft(model, edits, seed=0)
    pair = model.blocks[2]
    assert isinstance(pair, ParallelBlock) and isinstance(model.blocks[3], Absorbed)
    assert pair.second.attn is scion_at(model, WITHIN.site)
    assert hasattr(pair.second.attn, "inner_filter") and not hasattr(pair.first.attn, "inner_filter")


def second_of_pair(model: DiT) -> Block:
    pair = model.blocks[PAIR.site.block]
    assert isinstance(pair, ParallelBlock) and isinstance(pair.second, Block)
    return pair.second


def test_an_operator_within_a_pair_can_be_observed_and_replaced(model: DiT, batch: Batch) -> None:
    graft(model, [PAIR], seed=0)
    x, c = started(model, batch)
    for block in model.blocks[:2]:
        x = block(x, c)
    second = second_of_pair(model)
    m = [part[:, None] for part in modulations(second, c)]
    seen = second.norm1(x) * (1 + m[1]) + m[0]
    found = observe(model, [WITHIN.site], *batch)[WITHIN.site]
    torch.testing.assert_close((*found.inputs, found.output), (seen, second.attn(seen)))
    graft(model, [WITHIN], seed=0)
    assert hasattr(second_of_pair(model).attn, "inner_filter")


def test_a_model_with_pairs_and_operators_comes_back_from_its_folder(model: DiT, batch: Batch, tmp_path: Any) -> None:
    edits = all_edits([PAIR], [WITHIN])
    lively(graft(model, edits, seed=0), seed=1)
    checkpoints.save(model, edits, tmp_path)
    loaded, found = checkpoints.load(tmp_path)
    assert found == edits
    assert torch.equal(loaded(*batch), model(*batch))


def test_the_last_edit_of_a_site_is_the_one_that_counts() -> None:
    again = Edit(site=WITHIN.site, operator=Swa())
    assert all_edits([WITHIN, PAIR], [again]) == (again, PAIR)


# -- costs

TWO = Edit(site=Site(block=0, target="mha"), operator=Mamba2(d_state=8, headdim=4))
EDITS = {
    "none": (),
    "one": (WITHIN,),
    "two targets": (Edit(site=MLP_SITE, operator=MlpHyenaX()), WITHIN, TWO),
    "pair": (PAIR,),
    "pair with an operator": (WITHIN, PAIR, Edit(site=MHA_SITE, operator=HyenaSE(kernel=2))),
    "wide": (Edit(site=MLP_SITE, operator=Mlp(ratio=1.5)), Edit(site=MHA_SITE, operator=Swa(window=2))),
}


@pytest.mark.parametrize("sigma", [True, False])
@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS.keys())
def test_the_formulas_of_a_plan_are_what_torch_counts(edits: tuple[Edit, ...], sigma: bool) -> None:
    config = DiTConfig(**{**vars(TINY), "learn_sigma": sigma})
    spec = DitModel(depth=4, width=16, heads=2, patch=2, learn_sigma=sigma)
    rootstock = rootstock_cost(spec, config.place, channels=3, num_classes=5)
    model = graft(DiT(config), edits, seed=0)
    found = graft_cost(rootstock, edits, config.place).graft
    assert (found.params, found.flops) == (num_parameters(model), forward_flops(model))


def test_what_the_weights_carry_already_counts_as_the_rootstocks() -> None:
    spec = DitModel(depth=4, width=16, heads=2, patch=2)
    plain = rootstock_cost(spec, TINY.place, channels=3, num_classes=5)
    over = Edit(site=WITHIN.site, operator=Swa())
    carried = graft_cost(plain, [WITHIN], TINY.place).graft
    found = graft_cost(plain, [over], TINY.place, carried=[WITHIN])
    assert found.rootstock == carried
    assert found.graft == graft_cost(plain, [over], TINY.place).graft
    assert found.replaced == graft_cost(plain, [WITHIN], TINY.place).scions


def test_the_memory_of_a_pass_grows_with_the_batch_from_what_the_model_holds(model: DiT) -> None:
    held = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    small, large = (forward_memory(model, forward_inputs(model, size, CPU)) - held for size in (8, 16))
    assert small > 8 * TINY.num_tokens * TINY.width * 4
    assert large == pytest.approx(2 * small, rel=0.05)


def test_an_operator_that_holds_more_is_seen_to(model: DiT) -> None:
    before = forward_memory(model, forward_inputs(model, 8, CPU))
    graft(model, [Edit(site=MLP_SITE, operator=Mlp(ratio=16))], seed=0)
    more = 8 * TINY.num_tokens * TINY.width * 4 * (16 - 4)
    assert forward_memory(model, forward_inputs(model, 8, CPU)) > before + more
