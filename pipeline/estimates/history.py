"""What steps took before, read from the artifacts in a store."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import islice

from graftwork.pipeline.planning.plan import Step
from graftwork.pipeline.runs import record
from graftwork.pipeline.runs.record import RunRecord
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.manifest import CPU, Manifest, WorkDone
from graftwork.specs.problems import SpecError

LOAD_SECONDS = 7.0  # of a step, that its process takes to load torch
IMPLAUSIBLE = 1e30  # ignore artifacts that claim more seconds or FLOPs than this
LATEST = 20  # artifacts of a kind that say how fast it is done
RECENT = 10  # runs that are asked for their last estimate


# -- speed


@dataclass(frozen=True)
class Done:
    """What an earlier step took."""

    step: str
    run: str
    work: WorkDone
    seconds: float

    @classmethod
    def read(cls, manifest: Manifest) -> Done | None:
        """Return what a manifest says; None if it is of an earlier version, or its figures make no sense."""
        origin, work = manifest.origin, manifest.origin.work
        if work is None:
            return None
        done = cls(origin.step, origin.run, work, origin.seconds)
        sizes = [done.seconds, work.devices, *([] if work.flops is None else [done.flops])]
        return done if all(0 < size < IMPLAUSIBLE for size in sizes) else None

    def is_like(self, step: Step) -> bool:
        """Whether it was done on such a device and, on a GPU, in the step's precision; one without a formula is like
        those of its own name only."""
        if (self.work.flops is None) != (step.work is None) or (step.work is None and self.step != step.name):
            return False
        on_gpu = step.resources.gpu > 0
        return (self.work.device != CPU) == on_gpu and (not on_gpu or self.work.precision == step.precision)

    @property
    def flops(self) -> float:
        return math.nan if self.work.flops is None else self.work.flops + self.work.shared_flops

    @property
    def seconds_a_flop(self) -> float:
        return self.seconds / self.flops


class History:
    """What the steps in a store took."""

    def __init__(self, store: Store, manifests: Iterable[Manifest]) -> None:
        self.store = store
        self.manifests = sorted(manifests, key=lambda one: one.origin.made, reverse=True)
        self.record = cache(self._record)
        self.of_stage = cache(self._of_stage)

    def nearest(self, step: Step) -> float | None:
        """Return the seconds that the step would take as fast as the one like it whose FLOPs are nearest; None if
        nothing like it was done."""
        done = list(islice((one for one in self.of_stage(step.stage) if one.is_like(step)), LATEST))
        if not done:
            return None
        if step.work is None:
            return done[0].seconds
        flops = step.work.total
        unlike = {one: _unlike(one.flops, flops) for one in done}
        alike = [one for one in done if unlike[one] == min(unlike.values())]
        # Those that start workers may have waited for them, while others of their run had the machine.
        undisturbed = min((one for one in alike if one.run == alike[0].run), key=lambda one: one.seconds_a_flop)
        ratio = flops * undisturbed.work.devices / step.devices
        loading = min(LOAD_SECONDS, undisturbed.seconds / 2)
        return loading + (undisturbed.seconds_a_flop - loading / undisturbed.flops) * ratio

    def _of_stage(self, stage: str) -> list[Done]:
        """Return what steps of a stage took, the latest first."""
        of_stage = (one for one in self.manifests if one.identity.get("stage") == stage)
        return [done for one in of_stage if (done := Done.read(one)) is not None]

    def _record(self, run: str) -> RunRecord | None:
        try:
            return record.load_or_none(self.store, run)
        except SpecError:
            return None

    def last(self) -> RunRecord | None:
        """The latest run that kept what was expected of it, and has finished."""
        latest = dict.fromkeys(manifest.origin.run for manifest in self.manifests)
        found = (self.record(run) for run in list(latest)[:RECENT])
        return next((one for one in found if one is not None and one.estimated()), None)


def _unlike(one: float, other: float) -> float:
    """Return how many times more FLOPs the larger has, on a logarithmic scale, to a tenth."""
    return round(abs(math.log(one / other)), 1)
