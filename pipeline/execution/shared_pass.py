"""Recording: the rootstock's pass that all sites need, done once by tasks before theirs, each for some of the samples.

What is recorded stays in Ray's object store, from which the tasks of the sites fetch theirs. It is the way of CPUs,
where a pass takes long beside what is learned from it, so that one in each task would be much of the work. On GPUs it
takes seconds, and what it leaves would have to go through the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from graftwork.cluster.board import Reporter
from graftwork.cluster.session import runtime
from graftwork.pipeline.estimates.packing import Item
from graftwork.pipeline.planning.plan import Step
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.resources import StepResources
from graftwork.stages import contract
from graftwork.stages.registry import STAGES

SHARE = 0.5  # of the cluster's object store, and of a task's memory
RETRIES = 3  # of a task whose worker is lost
Recordings = Sequence[Any]  # refs, one a share


def fits(items: Sequence[Item], num_shares: int, resources: StepResources) -> bool:
    """Whether the object store has room for what all of them need, and a task for its share, if that is limited."""
    needed = sum(item.memory for item in items)
    in_task = needed / num_shares <= SHARE * resources.memory if resources.memory else True
    return in_task and needed <= SHARE * ray.cluster_resources().get("object_store_memory", 0.0)


@dataclass(frozen=True)
class Pass:
    """What is recorded."""

    sites: Sequence[Step]
    keys: Mapping[str, str]  # role -> key of what the sites need
    store: Store
    stopping: Callable[[], bool]

    def start(self, num_shares: int, reports: Sequence[Reporter]) -> tuple[list[Any], dict[str, Recordings]]:
        """Start the tasks that record the sites' activations, one a share.

        reports: of the steps that begin with their share, at most one a share.
        Return a ref for each share, to wait for, and the refs of each site's recordings.
        """
        waited, recordings = [], dict[str, list[Any]]({site.name: [] for site in self.sites})
        for share in range(num_shares):
            task = _record.options(
                name=f"activations, part {share + 1} of {num_shares}",
                num_returns=1 + len(self.sites),
                max_retries=RETRIES,
                **runtime.options(self.sites[0].resources),
            )
            ready, *refs = task.remote(self, share, num_shares, *reports[share : share + 1])
            waited.append(ready)
            for site, ref in zip(self.sites, refs, strict=True):
                recordings[site.name].append(ref)
        return waited, dict(recordings)


@ray.remote
def _record(work: Pass, share: int, num_shares: int, report: Reporter | None = None) -> list[Any]:
    """Nothing for each site where there is an error: its own step comes to it too, and tells."""
    if report is not None:
        report(0, 0)
    portion = contract.Portion(
        steps=[site.params for site in work.sites],
        inputs={role: work.store.artifact(key) for role, key in work.keys.items()},
        device=runtime.settle(),
        share=share,
        num_shares=num_shares,
        stopping=work.stopping,
    )
    try:
        recorded = STAGES[work.sites[0].stage].record(portion)
    except Exception:
        recorded = [None] * len(work.sites)
    return [[], *recorded]


def fetch(refs: Recordings) -> list[Any]:
    """The shares of one site; none where some are lost for good."""
    try:
        return list(ray.get(list(refs)))
    except ray.exceptions.RayError:
        return []
