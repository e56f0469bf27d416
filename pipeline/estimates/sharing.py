"""Which distillation sites share the rootstock's pass, and in how many tasks that pass is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from graftwork.pipeline.estimates.packing import Item
from graftwork.pipeline.planning.plan import Plan, Step
from graftwork.specs import params

WORTH_A_TASK = 256  # samples to learn from, in the pass of the rootstock


def site_items(plan: Plan, names: Iterable[str]) -> tuple[list[Item], float]:
    """Sites as items to pack, and the pass that they can share, both in FLOPs; with the bytes that a site's inputs and
    outputs take on its device."""
    items, shared = [], 0.0
    for name in names:
        work = plan[name].work
        assert work is not None, name
        items.append(Item(name, work.own, work.activations, block_of(plan[name])))
        shared = max(shared, work.shared)
    return items, shared


def parts_of_pass(sites: Sequence[Step], slots: int) -> int:
    """In how many tasks of their own the pass of these sites is recorded before theirs; 0 where each task of theirs
    has a pass: on GPUs, where it is short, with a budget for activations, and where it is little or all in one task."""
    first = sites[0].params
    assert isinstance(first, params.DistillParams)
    if sites[0].resources.gpu or first.recipe.activations is not None or len(sites) < 2:
        return 0
    parts = min(slots, first.recipe.samples * first.recipe.draws // WORTH_A_TASK)
    return parts if parts > 1 else 0


def block_of(step: Step) -> int:
    """Up to which the rootstock runs for a site."""
    assert isinstance(step.params, params.DistillParams)
    return step.params.edit.site.block
