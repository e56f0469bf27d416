"""How steps that share a pass of the rootstock are packed, and in how many tasks that pass is done before theirs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from graftwork.pipeline.estimates.packing import MOST, Item
from graftwork.pipeline.planning.plan import Plan, Step
from graftwork.stages.registry import STAGES


def site_items(plan: Plan, names: Iterable[str]) -> tuple[list[Item], float]:
    """Sites as items to pack, and the pass that they can share, both in FLOPs; with the bytes that a site's inputs and
    outputs take on its device."""
    items, shared = [], 0.0
    for name in names:
        work = plan[name].work
        assert work is not None, name
        items.append(Item(name, work.own, work.activations, work.block))
        shared = max(shared, work.shared)
    return items, shared


def most_in_a_pack(sites: Sequence[Step]) -> int:
    """Return how many of these steps one task may do: where nothing of the pass is kept, as many as there are."""
    return len(sites) if all(site.work is not None and not site.work.activations for site in sites) else MOST


def slots_of(site: Step, room: int) -> int:
    """Return how many groups of a site's workers run side by side where there is room for so many workers.

    0, where no node is there yet, is without limit. A group for which there is too little room waits for more.
    """
    return max(1, room // site.workers) if room else 0


def num_recording_tasks(sites: Sequence[Step], slots: int) -> int:
    """Return the number of tasks that do what these steps of one stage have in common before theirs; 0 if theirs do."""
    shares = STAGES[sites[0].stage].shares
    assert shares is not None, sites[0].stage
    return shares([site.params for site in sites], sites[0].resources, slots)
