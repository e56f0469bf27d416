"""Which steps share a task: every step once, within the limits, and near the least makespan."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import COSTS, lower_bound, simulate
from graftwork.pipeline.estimates.packing import MOST, Item, duration, makespan, pack

GIB = 2.0**30


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Item], int, float, float | None]:
    """Items, slots, the seconds of a shared pass, the memory of a task."""
    costs = draw(st.lists(st.tuples(st.just(0.0) | st.floats(0.01, 100), st.floats(0.1, 1.2)), max_size=40))
    items = [Item(str(number), seconds, share * GIB) for number, (seconds, share) in enumerate(costs)]
    return items, draw(st.integers(0, 20)), draw(st.floats(0, 30)), draw(st.sampled_from([None, GIB, 3 * GIB]))


@settings(deadline=None)
@given(cases())
def test_every_item_is_in_exactly_one_pack(case: tuple[list[Item], int, float, float | None]) -> None:
    items, slots, shared, memory = case
    packed = [item for one in pack(items, slots, shared, memory) for item in one]
    assert sorted(packed, key=lambda item: int(item.name)) == items


@settings(deadline=None)
@given(cases(), st.integers(1, 6))
def test_packs_are_neither_empty_nor_too_large(case: tuple[list[Item], int, float, float | None], most: int) -> None:
    items, slots, shared, memory = case
    assert all(1 <= len(one) <= most for one in pack(items, slots, shared, memory, most))


@settings(deadline=None)
@given(cases())
def test_the_items_of_a_pack_fit_the_memory_together(case: tuple[list[Item], int, float, float | None]) -> None:
    items, slots, shared, memory = case
    for one in pack(items, slots, shared, memory):
        assert len(one) == 1 or memory is None or sum(item.memory for item in one) <= memory * (1 + 1e-9)


def test_what_alone_does_not_fit_has_a_pack_of_its_own() -> None:
    items = [Item("large", 1.0, 2 * GIB), *(Item(str(number), 1.0, 0.1 * GIB) for number in range(5))]
    packs = pack(items, slots=1, shared_seconds=1.0, memory=GIB)
    assert [items[0]] in packs and len(packs) == 3


@pytest.mark.parametrize("slots", [3, 5, 0])
def test_where_there_are_slots_enough_each_item_is_alone_and_the_longest_first(slots: int) -> None:
    """No slots at all are an autoscaler's before its first node: it is shown every task."""
    items = [Item("short", 1.0), Item("long", 3.0), Item("middle", 2.0)]
    packs = pack(items, slots, shared_seconds=10.0)
    assert [[item.name for item in one] for one in packs] == [["long"], ["middle"], ["short"]]


def test_sites_share_a_pass_where_slots_are_few() -> None:
    packs = pack([Item(str(number), 1.0) for number in range(8)], slots=2, shared_seconds=0.2)
    assert [len(one) for one in packs] == [MOST, MOST]


def test_no_slot_is_left_idle_for_the_sake_of_full_packs() -> None:
    packs = pack([Item(str(number), 1.0) for number in range(9)], slots=4)
    assert sorted(len(one) for one in packs) == [2, 2, 2, 3]


def test_sites_that_take_as_long_are_put_with_their_neighbours() -> None:
    blocks = [7, 1, 5, 11, 3, 9]
    packs = pack([Item(str(block), 1.0, depth=block) for block in blocks], slots=2, shared_seconds=0.2)
    assert [sorted(item.depth for item in one) for one in packs] == [[1, 3, 5], [7, 9, 11]]


def test_of_the_packs_the_longest_start_first() -> None:
    draws = random.Random(0)
    items = [Item(str(number), draws.lognormvariate(0, 1)) for number in range(50)]
    first_wave = [duration(one) for one in pack(items, slots=4, shared_seconds=0.1)[:4]]
    assert first_wave == sorted(first_wave, reverse=True)


def test_the_same_steps_are_packed_the_same_way() -> None:
    items = [Item(str(number), 1.0 + number % 3) for number in range(20)]
    assert pack(items, 3, 0.5) == pack(list(items), 3, 0.5)


def test_the_makespan_is_that_of_slots_which_take_the_next_pack_when_they_fall_free() -> None:
    packs = [[Item("a", 3.0)], [Item("b", 1.0), Item("c", 1.0)], [Item("d", 2.0)], [Item("e", 0.5)]]
    # Slot 1: a, 0 .. 4; e, 4 .. 5.5. Slot 2: b and c, 0 .. 3; d, 3 .. 6.
    assert math.isclose(makespan(packs, slots=2, shared_seconds=1.0), 6.0)


# -- how near to the least


@pytest.mark.parametrize("memory", ["DiT-XL/2", "mixed"])
@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize(("gpus", "share", "sites"), [(1, 1.0, 28), (8, 0.5, 56), (13, 1.0, 56), (32, 0.25, 300)])
def test_the_makespan_is_within_a_tenth_of_the_lower_bound(
    costs: str, memory: str, gpus: int, share: float, sites: int
) -> None:
    assert simulate(costs, memory, gpus, share, sites).ratio <= 1.1


def passes(items: list[Item], memory: float) -> int:
    """The least number of passes that serve the items, by trying all."""
    for count in range(1, len(items) + 1):
        for served_by in product(range(count), repeat=len(items)):
            groups = [[item for item, one in zip(items, served_by, strict=True) if one == p] for p in range(count)]
            if all(sum(item.memory for item in group) <= memory for group in groups):
                return count
    return 0


def least_makespan(items: list[Item], slots: int, shared: float, memory: float) -> float:
    """By trying every schedule."""

    def ends() -> Iterator[float]:
        for places in product(range(slots), repeat=len(items)):
            loads = [[item for item, place in zip(items, places, strict=True) if place == s] for s in range(slots)]
            yield max(sum(item.seconds for item in load) + shared * passes(load, memory) for load in loads)

    return min(ends())


@pytest.mark.parametrize("seed", range(12))
def test_no_schedule_at_all_ends_before_the_lower_bound(seed: int) -> None:
    """What the benchmark holds packing against."""
    draws = random.Random(seed)
    items = [Item(str(i), draws.choice((1.0, 2.0, 3.5)), draws.choice((0.2, 0.4, 0.6))) for i in range(5)]
    shared, slots = draws.choice((0.3, 1.0)), draws.choice((2, 3))
    least = least_makespan(items, slots, shared, 1.0)
    packed = makespan(pack(items, slots, shared, 1.0), slots, shared)
    assert lower_bound(items, slots, shared, 1.0, packed) <= least * (1 + 1e-9)
    assert least <= packed * (1 + 1e-9)
