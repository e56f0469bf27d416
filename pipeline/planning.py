"""The plan: a job as a list of steps, each with a key that says what its result depends on. No Ray, no torch.

    key = SHA-256 of canonical JSON over: stage, stage version, parameters that matter to the result, fingerprints of
          outside inputs, and the keys of what the step needs

Two steps with the same key have the same result, so a step whose key is in the store is not run again. A change
reaches exactly the steps behind it: another learning rate for the finetune changes the keys of `finetune` and
`evaluate`; another kernel changes those of the `distill` steps and what follows from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from graftwork.pipeline.steps import drafts
from graftwork.pipeline.store import Manifest, State, Store, canonical
from graftwork.specs.costs import GraftCost, graft_cost, rootstock_cost
from graftwork.specs.fields import Spec, keyed
from graftwork.specs.graft import Edit
from graftwork.specs.hub import is_hub_id, local_snapshot
from graftwork.specs.job import JobSpec, StepResources
from graftwork.specs.load import SpecError
from graftwork.specs.model import CheckpointWeights
from graftwork.stages import STAGES


@dataclass(frozen=True)
class Step:
    """One unit of work: computed once, named by its key."""

    name: str
    stage: str
    params: Spec
    needs: Mapping[str, str]  # role -> the step that fills it
    resources: StepResources
    identity: Mapping[str, Any]
    key: str


@dataclass(frozen=True)
class Plan:
    """A job's steps, each after those that it needs."""

    job: JobSpec
    steps: tuple[Step, ...]

    def __getitem__(self, name: str) -> Step:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Step]:
        return {step.name: step for step in self.steps}

    def following(self, name: str) -> set[str]:
        """The steps that need this one, however far."""
        found: set[str] = set()
        for step in self.steps:
            if any(needed == name or needed in found for needed in step.needs.values()):
                found.add(step.name)
        return found

    def states(self, store: Store) -> dict[str, State]:
        states = store.states([step.key for step in self.steps])
        return {step.name: states[step.key] for step in self.steps}

    def key(self) -> str:
        """What the job as a whole comes to: a hash of its steps' keys."""
        return hashlib.sha256(canonical([step.key for step in self.steps]).encode()).hexdigest()


def make_plan(job: JobSpec) -> Plan:
    """The steps of a job, in an order in which they can run."""
    steps: dict[str, Step] = {}
    for draft in drafts(job):
        identity = {
            "stage": draft.stage,
            "version": STAGES[draft.stage].version,
            "params": keyed(draft.params),
            "outside": draft.outside,
            "needs": {role: steps[needed].key for role, needed in draft.needs.items()},
        }
        steps[draft.name] = Step(
            name=draft.name,
            stage=draft.stage,
            params=draft.params,
            needs=draft.needs,
            resources=getattr(job.resources, draft.stage),
            identity=identity,
            key=hashlib.sha256(canonical(identity).encode()).hexdigest(),
        )
    return Plan(job=job, steps=tuple(steps.values()))


def costs(job: JobSpec, num_classes: int) -> GraftCost:
    """What the job's graft costs beside its rootstock, by formula; edits that a checkpoint carries are in both."""
    channels = job.codec.latent_channels(job.data)
    rootstock = rootstock_cost(job.model, job.place(), channels, num_classes)
    # Where evidence chooses, any of the candidates will do: blocks are all of one shape.
    made = [edit for spec in job.graft for edit in spec.edits(job.model.depth)[: spec.number(job.model.depth)]]
    return graft_cost(rootstock, made, job.place(), carried_edits(job))


def carried_edits(job: JobSpec) -> tuple[Edit, ...]:
    """The edits that a model folder of ours says it carries; other files tell only when their tensors are read."""
    if not isinstance(job.weights, CheckpointWeights):
        return ()
    snapshot = local_snapshot(job.weights.path) if is_hub_id(job.weights.path) else Path(job.weights.path)
    config = snapshot / "config.json" if snapshot is not None else None
    if config is None or not config.is_file():
        return ()
    try:
        return tuple(Edit.model_validate(edit) for edit in json.loads(config.read_text()).get("edits", ()))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        problem = f"got {job.weights.path!r}, whose config.json cannot be read; accepted: the folder of a model"
        raise SpecError([f"weights.path: {problem}"]) from None


def difference(step: Step, manifests: list[Manifest]) -> str | None:
    """What sets the step apart from the nearest cached one of its name; None where there is none."""
    nearest: list[str] | None = None
    for manifest in manifests:
        if manifest.origin.step == step.name:
            differing = sorted(_differing(dict(step.identity), manifest.identity))
            if nearest is None or len(differing) < len(nearest):
                nearest = differing
    return ", ".join(nearest) if nearest else None


def _differing(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """`path: theirs -> ours` for each leaf that differs; a need that differs is named by its role alone."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in ours.keys() | theirs.keys():
            yield from _differing(ours.get(name), theirs.get(name), f"{path}.{name}" if path else name)
    elif ours != theirs:
        if path.startswith("needs."):
            yield f"another {path.removeprefix('needs.')}"
        else:
            yield f"{path.removeprefix('params.')}: {theirs} -> {ours}"
