"""What a block costs, by models of N and of 2N blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from graftwork.models.measures import marginal as measuring
from graftwork.models.measures.marginal import Marginal, Passes, least_ms, marginal
from graftwork.models.rootstocks import Rootstock, new_rootstock
from graftwork.models.surgery import graft
from graftwork.specs.edits import Edit, Parallel, Site
from graftwork.specs.operators import Mlp
from tests.small import TINY

PASSES = Passes(batch=2, precision="fp32", device=torch.device("cpu"), warm_ups=1, runs=2)
SMALL_MLP = Edit(site=Site(block=0, target="mlp"), operator=Mlp(ratio=1))
PAIR = Edit(site=Site(block=0, target="pair"), operator=Parallel())


def block_parameters(edits: list[Edit], depth: int) -> int:
    """Of what is in the blocks of a model of that depth, with the edits of its first block."""
    model = graft(new_rootstock(replace(TINY, depth=depth)), edits, 0)
    return sum(value.numel() for value in model.blocks.parameters())


@pytest.mark.parametrize(("edits", "depth"), [([], 1), ([SMALL_MLP], 1), ([PAIR], 2)], ids=["as it is", "mlp", "pair"])
def test_the_memory_of_a_block_is_that_of_its_weights(edits: list[Edit], depth: int) -> None:
    found = marginal(TINY, edits, PASSES)
    assert found.memory == 4 * block_parameters(edits, depth)
    assert found.latency_ms > 0


def timed(monkeypatch: pytest.MonkeyPatch, *by_try: tuple[float, float]) -> list[Rootstock]:
    """Have the models of N and 2N blocks take these ms, measurement by measurement; return the models measured."""
    tries, models = iter(by_try), list[Rootstock]()

    def latency_ms(both: list[Rootstock], passes: Passes) -> list[float]:
        models.extend(both)
        return [*next(tries)]

    monkeypatch.setattr(measuring, "latency_ms", latency_ms)
    return models


def test_latency_is_told_apart_by_what_is_in_blocks_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    models = timed(monkeypatch, (10.0, 18.0))
    found = marginal(TINY, [], PASSES)
    assert (found.latency_ms, found.fixed_latency_ms) == (2.0, 2.0)  # (18 - 10) / 4, and 2 * 10 - 18
    assert [len(model.blocks) for model in models] == [4, 8]


def test_a_block_that_seems_to_cost_nothing_is_measured_again_and_then_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, (10.0, 9.0), (10.0, 10.0), (10.0, 14.0))
    assert marginal(TINY, [], PASSES).latency_ms == 1.0
    timed(monkeypatch, (10.0, 9.0), (10.0, 10.0), (10.0, 8.0))
    with pytest.raises(ValueError, match=r"mlp for mlp: 4 blocks take 10 ms .* 8 take 8 ms .*evaluate\.batch"):
        marginal(TINY, [SMALL_MLP], PASSES)


def test_of_unsteady_measurements_the_most_plausible_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, (10.0, 40.0), (10.0, 30.0), (10.0, 50.0))  # fixed: -20, -10, -30
    assert marginal(TINY, [], PASSES).fixed_latency_ms == -10.0
    assert not Marginal(1.0, 1.0, -0.2).is_steady and Marginal(1.0, 1.0, -0.05).is_steady


def test_things_are_timed_in_turns_and_the_least_counts() -> None:
    times, order = {0: iter([9.0, 3.0, 2.0, 4.0]), 1: iter([1.0, 6.0, 5.0, 7.0])}, list[int]()

    def seconds(number: int) -> float:
        order.append(number)
        return next(times[number])

    assert least_ms(seconds, 2, warm_ups=1, runs=3) == [2000.0, 5000.0]  # what a warm-up took counts for nothing
    assert order == [0, 1] * 4


def test_what_takes_long_is_timed_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 50))
    monkeypatch.setattr(measuring, "monotonic", lambda: next(clock))
    calls = list[int]()

    def seconds(number: int) -> float:
        calls.append(number)
        return 1.0

    least_ms(seconds, 1)
    assert len(calls) == measuring.MIN_ROUNDS + 1
