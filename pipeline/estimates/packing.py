"""Packing: which steps share a task. Sites of one job that are distilled in one task share one pass of the rootstock.

A pack's task runs the rootstock once, keeps what each of its sites needs on the device, and trains them one after
another. So a pack takes `shared_seconds` and the seconds of each of its items, and its items must fit the device's
memory together; one that alone does not fit has a pack to itself, and its stage recomputes in pieces.

    few slots    packs that fill every slot to nearly the same end, since each pass that is saved is time saved
    many slots   one item a pack: nothing ends sooner than the longest

Ray gives each slot that falls free the next pack (Graham's list scheduling), so the order of packs is a schedule.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

MOST = 4  # items in a pack: an autoscaler still sees enough tasks, and a lost worker loses little
HALVINGS = 12  # of the interval in which the makespan is sought


@dataclass(frozen=True)
class Item:
    """A step that is ready to run."""

    name: str
    seconds: float  # of its own work, without the shared pass; only ratios matter; 0 of what is only measured
    memory: float = 0.0  # bytes of the device that it holds from the shared pass to its end
    depth: int = 0  # how far the shared pass has to go for it; only the order matters


Pack = list[Item]


def pack(
    items: Sequence[Item],
    slots: int,
    shared_seconds: float = 0.0,
    memory: float | None = None,
    most: int = MOST,
) -> list[Pack]:
    """Packs in the order in which they are to be started, for a makespan near the least.

    slots: how many such tasks the cluster can hold at once; 0, where an autoscaler has no node yet, is without limit.
    shared_seconds: of the pass that a pack's items share. memory: bytes that a task has; None is enough for any pack.
    """
    if slots <= 0 or len(items) <= slots:
        return [[item] for item in _longest_first(items)]
    room = math.inf if memory is None else memory
    schedules = [schedule(items, slots, shared_seconds, room, most) for schedule in (_spread, _fill)]
    orders = [_in_order(schedule, shared_seconds) for schedule in schedules]
    return _side_by_side(min(orders, key=lambda order: makespan(order, slots, shared_seconds)))


def makespan(packs: Iterable[Pack], slots: int, shared_seconds: float = 0.0) -> float:
    """Seconds until the last pack ends, when each slot that falls free takes the next."""
    ends = [0.0] * slots
    for one in packs:
        heapq.heapreplace(ends, ends[0] + duration(one, shared_seconds))
    return max(ends)


def duration(one: Pack, shared_seconds: float = 0.0) -> float:
    """What a pack takes."""
    return shared_seconds + sum(item.seconds for item in one)


Schedule = list[list[Pack]]  # the packs of each slot


def _spread(items: Sequence[Item], slots: int, shared: float, memory: float, most: int) -> Schedule:
    """The longest item first, each to the slot that is free first (Graham's LPT): even, and near the least with many
    items a slot."""
    schedule: Schedule = [[] for _ in range(slots)]
    ends = [(0.0, slot) for slot in range(slots)]
    for item in _longest_first(items):
        end, slot = ends[0]
        if schedule[slot] and _takes(schedule[slot][-1], item, memory, most):
            schedule[slot][-1].append(item)
        else:
            schedule[slot].append([item])
            end += shared
        heapq.heapreplace(ends, (end + item.seconds, slot))
    return schedule


def _fill(items: Sequence[Item], slots: int, shared: float, memory: float, most: int) -> Schedule:
    """Return the schedule of least makespan that first-fit decreasing finds, by bisection.

    This is MULTIFIT (Coffman, Garey and Johnson 1978), nearer to the optimum if there are few items a slot.
    """
    total, longest = sum(item.seconds for item in items), max(item.seconds for item in items) + shared
    low = max(total / slots, longest)
    high = (total + len(items) * shared) / slots + longest  # within that any order finds room
    best = _filled(items, slots, high, shared, memory, most)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        schedule = _filled(items, slots, middle, shared, memory, most)
        if schedule is None:
            low = middle
        else:
            best, high = schedule, middle
    assert best is not None
    return best


def _filled(
    items: Sequence[Item], slots: int, within: float, shared: float, memory: float, most: int
) -> Schedule | None:
    """Slot after slot, each with the longest items that still fit; None where some are left over."""
    left = _longest_first(items)[::-1]
    smallest = min(item.memory for item in items)
    schedule: Schedule = []
    for _ in range(slots):
        packs: list[Pack] = []
        time = within
        while left and left[0].seconds + shared <= time:
            one = [left.pop(bisect_right(left, time - shared, key=attrgetter("seconds")) - 1)]
            time -= shared + one[0].seconds
            room = memory - one[0].memory
            while len(one) < most and room >= smallest and (place := _longest(left, time, room)) is not None:
                one.append(left.pop(place))
                time -= one[-1].seconds
                room -= one[-1].memory
            packs.append(one)
        schedule.append(packs)
    return None if left else schedule


def _longest(left: Sequence[Item], seconds: float, memory: float) -> int | None:
    """The place of the longest item that fits, of some with the shortest first."""
    last = bisect_right(left, seconds, key=attrgetter("seconds"))
    return next((place for place in range(last - 1, -1, -1) if left[place].memory <= memory), None)


def _takes(one: Pack, item: Item, memory: float, most: int) -> bool:
    return len(one) < most and sum(other.memory for other in one) + item.memory <= memory


def _in_order(schedule: Schedule, shared: float) -> list[Pack]:
    """By the time at which each pack starts: list scheduling then ends no later than the schedule."""
    starts: list[tuple[float, float, Pack]] = []
    for packs in schedule:
        start = 0.0
        for one in sorted(packs, key=duration, reverse=True):
            starts.append((start, -duration(one), one))
            start += duration(one, shared)
    return [one for _, _, one in sorted(starts, key=lambda entry: entry[:2])]


def _side_by_side(order: Sequence[Pack]) -> list[Pack]:
    """The same packs, with items that take as much exchanged so that a pack has those of one depth: its pass ends with
    the deepest of them."""
    alike: dict[tuple[float, float], list[Item]] = {}
    for item in sorted((item for one in order for item in one), key=attrgetter("depth"), reverse=True):
        alike.setdefault((item.seconds, item.memory), []).append(item)
    return [[alike[item.seconds, item.memory].pop() for item in one] for one in order]


def _longest_first(items: Iterable[Item]) -> list[Item]:
    """Of those that take as long, the one that needs the most memory first."""
    return sorted(items, key=attrgetter("seconds", "memory"), reverse=True)
