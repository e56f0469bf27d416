"""What steps took before, read from the artifacts in a store."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice

from graftwork.pipeline.estimates.known import PARAMS, known_artifact
from graftwork.pipeline.runs import record
from graftwork.pipeline.runs.record import RunRecord
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.manifest import Manifest
from graftwork.specs.fields import Spec
from graftwork.specs.problems import SpecError
from graftwork.specs.resources import StepResources
from graftwork.specs.training import Precision
from graftwork.stages.work import Formulas, Known, Work, width

LOAD_SECONDS = 7.0  # of a step, that its process takes to load torch
UNHEARD_OF = 1e30  # FLOPs and seconds of an artifact that nobody made
LATEST = 20  # artifacts of a kind that say how fast it is done
RECENT = 10  # runs that are asked for their last estimate


# -- speed


@dataclass(frozen=True)
class Done:
    """What an earlier step took."""

    run: str
    work: Work | None
    seconds: float
    on_gpu: bool | None  # None where the run's record is gone
    width: float  # workers, and on GPUs the share of one that each had
    precision: Precision

    def is_like(self, step: Known, on_gpu: bool) -> bool:
        """Whether it was done on such a device and, on a GPU, in the step's precision."""
        return self.on_gpu in (None, on_gpu) and (not on_gpu or self.precision == step.precision)

    @property
    def flops(self) -> float:
        return self.work.total if self.work is not None else math.nan

    @property
    def seconds_a_flop(self) -> float:
        return self.seconds / self.flops


class History:
    """What the steps in a store took."""

    def __init__(self, store: Store, manifests: Iterable[Manifest]) -> None:
        self.store = store
        self.manifests = {one.key: one for one in sorted(manifests, key=lambda one: one.origin.made, reverse=True)}
        self.record = cache(self._record)
        self.artifact = cache(lambda key: known_artifact(self.manifests[key]))
        self.of_kind = cache(self._of_kind)
        self.formulas = Formulas(self.known)

    def nearest(self, step: Known, work: Work | None, resources: StepResources) -> float | None:
        """Seconds that the step would take as fast as the one of its kind, on such a device, that was most like it."""
        done = [
            one
            for one in self.of_kind(type(step.params))
            if (one.work is None) == (work is None) and one.is_like(step, resources.gpu > 0)
        ]
        if not done:
            return None
        if work is None:
            return done[0].seconds
        unlike = {one: _unlike(one.work, work) for one in done}
        alike = [one for one in done if unlike[one] == min(unlike.values())]
        # Those that start workers may have waited for them, while others of their run had the machine.
        undisturbed = min((one for one in alike if one.run == alike[0].run), key=lambda one: one.seconds_a_flop)
        ratio = work.total * undisturbed.width / width(step, resources)
        loading = min(LOAD_SECONDS, undisturbed.seconds / 2)
        return loading + (undisturbed.seconds_a_flop - loading / undisturbed.flops) * ratio

    def _of_kind(self, kind: type[Spec]) -> list[Done]:
        """Steps of a kind, the latest first."""
        stage = next((stage for stage, kinds in PARAMS.items() if kind in kinds), None)
        of_stage = (one for one in self.manifests.values() if one.identity.get("stage") == stage)
        return list(islice((done for one in of_stage if (done := self._done(one, kind)) is not None), LATEST))

    def _done(self, manifest: Manifest, kind: type[Spec]) -> Done | None:
        """None where the step is not of that kind, or its figures are none."""
        with suppress(KeyError):
            step, work = self.known(manifest.key), self.formulas.work(manifest.key)
            origin = manifest.origin
            sizes = [origin.seconds, 1.0 if work is None else work.total]
            if isinstance(step.params, kind) and all(0 < size < UNHEARD_OF for size in sizes):
                resources = self._resources(manifest)
                on_gpu = None if resources is None else resources.gpu > 0
                had = width(step, resources or StepResources())
                return Done(origin.run, work, origin.seconds, on_gpu, had, step.precision)
        return None

    def known(self, key: str) -> Known:
        """The step that made an artifact; raises KeyError where it is not known."""
        found = self.artifact(key)
        if found is None:
            raise KeyError(key)
        return found

    def _resources(self, manifest: Manifest) -> StepResources | None:
        """What the step's tasks took."""
        run = self.record(manifest.origin.run)
        try:
            found = None if run is None else run.job["resources"][manifest.identity["stage"]]
            return None if found is None else StepResources.model_validate(found)
        except (KeyError, TypeError, ValueError):
            return None

    def _record(self, run: str) -> RunRecord | None:
        try:
            return record.load_or_none(self.store, run)
        except SpecError:
            return None

    def last(self) -> RunRecord | None:
        """The latest run that kept what was expected of it, and has finished."""
        latest = dict.fromkeys(manifest.origin.run for manifest in self.manifests.values())
        found = (self.record(run) for run in list(latest)[:RECENT])
        return next((one for one in found if one is not None and one.estimated()), None)


def _unlike(one: Work | None, other: Work) -> float:
    """How much more work the larger is, on a logarithmic scale, to a tenth."""
    assert one is not None
    return round(abs(math.log(one.total / other.total)), 1)
