"""Which distillation sites share the rootstock's pass, and in how many tasks that pass is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from graftwork.pipeline.estimates.packing import Item
from graftwork.pipeline.planning.plan import Plan, Step
from graftwork.specs import params

MIN_RECORDING_SAMPLES = 256  # of a site's pass, for a task of its own that records activations


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


def num_recording_tasks(sites: Sequence[Step], slots: int) -> int:
    """Return the number of tasks that record activations before distillation starts.

    0 if every distillation task runs the rootstock itself: on GPUs, with `distill.activations` set, for one site, for
    too few samples, or if all sites are in one task.
    """
    first = sites[0].params
    assert isinstance(first, params.DistillParams)
    if sites[0].resources.gpu or first.recipe.activations is not None or len(sites) < 2:
        return 0
    parts = min(slots, first.recipe.samples * first.recipe.draws // MIN_RECORDING_SAMPLES)
    return parts if parts > 1 else 0


def block_of(step: Step) -> int:
    """Up to which the rootstock runs for a site."""
    assert isinstance(step.params, params.DistillParams)
    return step.params.edit.site.block
