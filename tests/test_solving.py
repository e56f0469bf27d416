"""Solving: plans within limits, chosen by scores alone or one after another; plans of the same cost beside them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.artifacts import Folder
from graftwork.models import checkpoints
from graftwork.models.condition import Condition
from graftwork.models.measures.costs import forward_flops, num_parameters
from graftwork.models.rootstocks import Rootstock, Slot, Stream, new_rootstock
from graftwork.models.rootstocks.dit import DiTConfig
from graftwork.models.surgery import graft
from graftwork.specs.edits import Edit, OperatorEdits, Parallel, ParallelEdits, Site, numbered
from graftwork.specs.layers.solved import SolvedLayers
from graftwork.specs.operators import HyenaX, Mlp, Swa
from graftwork.specs.solve import ScoreSpec, SolveSpec
from graftwork.stages.artifacts.evidence import (
    Distilled,
    MeasuredCosts,
    OperatorCosts,
    write_costs,
    write_distilled,
    write_scored,
)
from graftwork.stages.artifacts.latents import Latents
from graftwork.stages.artifacts.plan import read_plan, read_solutions
from graftwork.stages.catalog.select import Rule, SelectParams, Solving
from graftwork.stages.contract import NOTES, Context
from graftwork.stages.selection import select
from graftwork.stages.selection.baselines import baselines, laid_out
from graftwork.stages.selection.replacement import Replacements, drawn
from graftwork.stages.selection.solving import Choice, CostModel, choices
from tests.small import TINY, a_score
from tests.tiny_training import Reports

CPU = torch.device("cpu")
ALL = {"kind": "solved"}
RULES = numbered(
    spec.edits(TINY.depth)
    for spec in (
        OperatorEdits(target="mha", operator=HyenaX(), layers=ALL),
        OperatorEdits(target="mha", operator=Swa(window=2), layers=ALL),
        OperatorEdits(target="mlp", operator=Mlp(ratio=1), layers=ALL),
        ParallelEdits(pairs="any", layers=SolvedLayers()),
    )
)
CANDIDATES = [edit for rule in RULES for edit in rule]
COSTS = CostModel(TINY, ())


def spec(limits: dict[str, Any], **others: Any) -> SolveSpec:
    return SolveSpec.model_validate({"limits": limits, **others})


def chosen(limits: dict[str, Any], scores: Mapping[Edit, float], **others: Any) -> list[Choice]:
    return choices(spec(limits, **others), scores, (), COSTS)


def fits(edits: Collection[Edit]) -> bool:
    """Whether no two of the edits fill one place."""
    places = Counter(place for edit in edits for place in edit.places)
    return all(count == 1 for count in places.values())


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=len(CANDIDATES), max_size=len(CANDIDATES)),
    st.floats(0.6, 1.1),
    st.floats(0.6, 1.1),
)
def test_the_model_that_is_built_never_exceeds_a_limit(values: list[float], flops: float, params: float) -> None:
    root = new_rootstock(TINY)
    most = {"flops": flops * forward_flops(root), "params": params * num_parameters(root)}
    limits = {name: {"max": value} for name, value in most.items()}
    try:
        (choice,) = chosen(limits, dict(zip(CANDIDATES, values, strict=True)), plans=1)
    except ValueError as error:
        assert "no choice meets" in str(error)
        return
    built = graft(root, choice.edits, 0)
    assert fits(choice.edits)
    assert forward_flops(built) <= most["flops"] and num_parameters(built) <= most["params"]
    assert choice.solution.costs == {"flops": forward_flops(built), "params": num_parameters(built)}


def test_plans_are_the_best_first_and_apart() -> None:
    scores = {edit: 0.1 + 0.01 * number for number, edit in enumerate(CANDIDATES)}
    plans = chosen({"flops": "85%"}, scores, plans=4, apart=2)
    assert len(plans) == 4
    assert [plan.solution.score for plan in plans] == sorted(plan.solution.score for plan in plans)
    for number, plan in enumerate(plans):
        for other in plans[:number]:
            held, before = ({place: edit for edit in one.edits for place in edit.places} for one in (plan, other))
            assert sum(held.get(place) != before.get(place) for place in {*held, *before}) >= 2


def test_limits_that_nothing_meets_are_told_with_what_can_be_reached() -> None:
    scores = dict.fromkeys(CANDIDATES, 0.1)
    with pytest.raises(
        ValueError, match=r"solve\.limits: got flops at most 1%, which no choice meets; accepted: .*FLOP"
    ):
        chosen({"flops": "1%"}, scores)
    with pytest.raises(ValueError, match="without the other limits"):
        chosen({"flops": "95%", "params": {"min": "300%"}}, scores)


def test_what_is_made_in_any_case_counts_against_the_limits() -> None:
    mlps = [edit for edit in CANDIDATES if edit.site.target == "mlp"]
    made, left = mlps[:2], mlps[2:]
    limit = {"flops": COSTS.of(mlps[:3])["flops"]}
    (choice,) = choices(spec(limit, plans=1), dict.fromkeys(left, 0.1), made, COSTS)
    assert len(choice.edits) == 1


# -- a planted model: sites that are harmless alone, and ruinous together


class Flag(nn.Module):
    """An operator that adds a value to its channel of each token, its scion none."""

    def __init__(self, channel: int, value: float) -> None:
        super().__init__()
        self.channel, self.value = channel, value

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(self.channel), x.shape[-1]) * self.value * torch.ones_like(x)


class Planted(Rootstock):
    """Blocks 0 and 1 say the same, which the output wants at least once; block 2 matters a little, and always."""

    config: DiTConfig
    VALUES: ClassVar = (1.0, 1.0, 0.1, 0.0)

    def __init__(self) -> None:
        super().__init__()
        self.config = TINY
        self.blocks = nn.ModuleList()
        for index, value in enumerate(self.VALUES):
            block = nn.Module()
            block.attn = Flag(index, value)
            block.forward = lambda x, block=block: x + block.attn(x)
            self.blocks.append(block)

    def initialise(self, label_std: float) -> None: ...

    def start(self, x: Tensor, t: Tensor, condition: Condition | Tensor) -> Stream:
        return Stream(torch.zeros(len(x), TINY.place.num_tokens, TINY.width), ())

    def finish(self, stream: Stream) -> Tensor:
        first, second, third, *_ = stream.tokens.mean(1).unbind(1)
        value = torch.clamp(first + second, max=1) + third
        return value[:, None, None, None].expand(-1, 6, *TINY.latent_shape[1:])

    def slots_of(self, block: nn.Module) -> Mapping[str, Slot]:
        return {"mha": Slot(block, "attn")}


@pytest.fixture(scope="module")
def planted() -> tuple[Replacements, dict[Edit, nn.Module]]:
    latents = Latents(torch.randn(8, *TINY.latent_shape), Condition(labels=torch.zeros(8, dtype=torch.long)))
    replacements = Replacements(Planted(), drawn(latents, TINY.objective, 1, 0), ScoreSpec(), CPU)
    return replacements, {edit: Flag(edit.site.block, 0.0) for edit in RULES[0][:3]}


def test_greedy_choosing_sees_what_sites_do_to_each_other(
    planted: tuple[Replacements, dict[Edit, nn.Module]],
) -> None:
    replacements, scions = planted
    scores = {edit: replacements.score({edit: scion}).output for edit, scion in scions.items()}
    assert [score > 1e-3 for score in scores.values()] == [False, False, True]
    limit = {"flops": COSTS.of([*scions][:2])["flops"]}  # two of the three have to go
    rounds = list[int]()

    def rescore(chosen: Collection[Edit], candidates: Sequence[Edit]) -> Mapping[Edit, float]:
        rounds.append(len(chosen))
        standing = {edit: scions[edit] for edit in chosen}
        before = replacements.score(standing).output
        return {edit: replacements.score(standing | {edit: scions[edit]}).output - before for edit in candidates}

    (alone,) = choices(spec(limit, plans=1), scores, (), COSTS)
    greedy, other = choices(spec(limit, plans=2, given="greedy"), scores, (), COSTS, rescore)
    found = {
        name: replacements.score({edit: scions[edit] for edit in one.edits}).output
        for name, one in (("alone", alone), ("greedy", greedy))
    }
    assert [edit.site.block for edit in alone.edits] == [0, 1] and found["alone"] > 0.5
    assert sorted(edit.site.block for edit in greedy.edits) in ([0, 2], [1, 2]) and found["greedy"] < 0.02
    assert greedy.solution.score == pytest.approx(found["greedy"])  # which the sum of scores alone misses by far
    assert alone.solution.score < 0.1 * found["alone"]
    assert greedy.scoring == "greedy" and other.scoring == "none" and {*other.edits} == {*alone.edits}
    assert rounds == [1, 2]


# -- plans of the same cost


def test_baselines_have_the_plans_operators_as_often_and_cost_the_same() -> None:
    plan = [RULES[0][0], RULES[1][3], RULES[2][1], RULES[2][2]]
    found = dict(baselines(plan, CANDIDATES, seed=0))
    assert [*found] == ["first", "last", "interleaved", "random 1", "random 2", "random 3"]
    for edits in found.values():
        assert edits is not None and fits(edits) and COSTS.of(edits) == COSTS.of(plan)
        assert Counter(edit.operator for edit in edits) == Counter(edit.operator for edit in plan)
    blocks = {name: sorted(str(edit.site) for edit in edits or ()) for name, edits in found.items()}
    assert blocks["first"] == ["00.mha", "00.mlp", "01.mha", "01.mlp"]
    assert blocks["last"] == ["02.mha", "02.mlp", "03.mha", "03.mlp"]
    assert blocks["interleaved"] == ["01.mha", "01.mlp", "03.mha", "03.mlp"]
    assert dict(baselines(plan, CANDIDATES, seed=0)) == found != dict(baselines(plan, CANDIDATES, seed=1))


def test_baselines_lay_pairs_apart_and_leave_their_blocks_to_them() -> None:
    plan = [RULES[3][0], RULES[2][2]]  # the pair of blocks 0 and 1, and the MLP of block 2
    for name, edits in baselines(plan, CANDIDATES, seed=0):
        assert edits is not None and fits(edits) and len(edits) == 2, name


def test_a_baseline_that_candidates_do_not_allow_is_none() -> None:
    few = [edit for edit in CANDIDATES if edit.site.block < 2]
    assert laid_out([RULES[0][0], RULES[0][1], RULES[0][2]], few, lambda blocks, count: [*blocks[:count]]) is None
    other = Edit(site=Site(block=0, target="mha"), operator=Swa(window=7))
    assert laid_out([other], CANDIDATES, lambda blocks, count: [*blocks[:count]]) is None


# -- the step


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Folder]:
    """Artifacts of the steps before a selection of CANDIDATES, whose scores rise in their order."""
    folders = {"base": Folder("base", tmp_path / "base"), "cost": Folder("cost", tmp_path / "cost")}
    for made in folders.values():
        made.path().mkdir()
    checkpoints.save(new_rootstock(TINY), (), folders["base"].path())
    operators = [
        OperatorCosts(
            target=edit.site.target,
            operator=edit.operator.model_dump(mode="json"),
            latency_ms=5.0 if isinstance(edit.operator, Parallel) else -1.0,
            peak_memory=0.0,
        )
        for edit in dict.fromkeys(rule[0] for rule in RULES)
    ]
    measured = MeasuredCosts(
        device="a device",
        batch=2,
        latency_ms=10.0,
        peak_memory=1e6,
        block_latency_ms=2.0,
        fixed_latency_ms=2.0,
        operators=tuple(operators),
    )
    write_costs(folders["cost"].path(), measured)
    for number, edit in enumerate(CANDIDATES):
        for role in ("scions", "scores"):
            folders[f"{role}/{edit.name}"] = Folder(edit.name, tmp_path / f"{role}-{edit.name}")
            (tmp_path / f"{role}-{edit.name}").mkdir()
        distilled = Distilled(loss="l1", loss_because="", heldout_error=0.2, relative_error=0.1, best_epoch=1)
        write_distilled(tmp_path / f"scions-{edit.name}", distilled)
        write_scored(tmp_path / f"scores-{edit.name}", a_score(0.01 * (number + 1), 1 - 0.01 * (number + 1)))
    return folders


def selected(inputs: Mapping[str, Folder], out: Path, solve: SolveSpec, *rules: Rule) -> list[str]:
    """The names of the edits that a selection of all CANDIDATES chooses."""
    layers = SolvedLayers()
    params = SelectParams(
        depth=TINY.depth,
        rules=(*rules, *(Rule(edits=rule, layers=layers) for rule in RULES)),
        solving=Solving(solve=solve),
    )
    nothing: Any = None
    out.mkdir(exist_ok=True)
    select.run(Context("select", params, inputs, out, nothing, Reports(), nothing, CPU))
    return [edit.name for edit in read_plan(out)]


def test_a_limit_on_latency_is_kept_by_what_was_measured(inputs: dict[str, Folder], tmp_path: Path) -> None:
    names = selected(inputs, tmp_path / "out", spec({"latency_ms": 7.0}, plans=2))
    assert names == ["00.mha", "01.mha", "02.mha"]  # each saves 1 ms, and these have the least scores
    first, second = read_solutions(tmp_path / "out")
    assert first.costs["latency_ms"] == 7.0 and first.solved == tuple(names) and first.error == pytest.approx(0.06)
    assert second.error > first.error
    shares = selected(inputs, tmp_path / "shares", spec({"latency_ms": "70%"}, plans=1))
    assert shares == names


def test_the_error_may_be_the_change_of_the_loss(inputs: dict[str, Folder], tmp_path: Path) -> None:
    by_output = selected(inputs, tmp_path / "output", spec({"latency_ms": 9.0}, plans=1))
    by_loss = selected(inputs, tmp_path / "loss", spec({"latency_ms": 9.0}, plans=1, error="loss"))
    assert by_output == ["00.mha"] and by_loss == ["03.mlp"]  # scores rise, changes of the loss fall
    plan = json.loads((tmp_path / "loss" / "plan.json").read_text())
    assert plan[0]["score_is"] == "change of the diffusion loss" and plan[0]["reason"].startswith("solved")


def test_what_other_strategies_choose_is_in_every_plan(inputs: dict[str, Folder], tmp_path: Path) -> None:
    edit = Edit(site=Site(block=0, target="mha"), operator=HyenaX(kernel=2))
    inputs["scions/00.mha.9"] = inputs["scions/00.mha"]
    cost = json.loads((inputs["cost"].path() / "cost.json").read_text())
    cost["operators"].append(cost["operators"][0] | {"operator": edit.operator.model_dump(mode="json")})
    (inputs["cost"].path() / "cost.json").write_text(json.dumps(cost))
    fixed = Rule(edits=(edit.model_copy(update={"option": 9}),), layers=None)
    names = selected(inputs, tmp_path / "out", spec({"latency_ms": 8.0}, plans=2), fixed)
    assert "00.mha.9" in names and len(names) == 2  # 2 ms are to be saved, of which it saves one
    assert all("00.mha.9" in [one.edit.name for one in plan.edits] for plan in read_solutions(tmp_path / "out"))


def test_a_limit_that_the_rootstock_keeps_replaces_nothing_and_says_so(
    inputs: dict[str, Folder], tmp_path: Path
) -> None:
    assert selected(inputs, tmp_path / "out", spec({"latency_ms": 10.0}, plans=1)) == []
    assert "the rootstock itself is within the limits" in (tmp_path / "out" / NOTES).read_text()


def test_fewer_plans_than_finalists_are_refused_in_a_line(inputs: dict[str, Folder], tmp_path: Path) -> None:
    solve = spec({"latency_ms": 9.0}, plans=8, apart=8, finalists={"steps": 5})
    with pytest.raises(
        ValueError, match=r"solve\.plans: got 8, to be finetuned each; accepted: at most [1-7]: no more"
    ):
        selected(inputs, tmp_path / "out", solve)
