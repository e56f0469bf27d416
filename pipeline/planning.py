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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.fingerprints import data_fingerprint, reference_fingerprint, weights_fingerprint
from pipeline.store import Manifest, State, Store, canonical
from specs import steps as params
from specs.costs import GraftCost, graft_cost, rootstock_cost
from specs.data import VaeCodec
from specs.evaluate import inception_file
from specs.fields import Spec, keyed
from specs.graft import Edit
from specs.hub import is_hub_id, local_snapshot
from specs.job import JobSpec, StepResources
from specs.model import CheckpointWeights
from stages import STAGES
from stages.sources import vae_folder

PROFILE_SAMPLES = 256


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
        return next(step for step in self.steps if step.name == name)

    def states(self, store: Store) -> dict[str, State]:
        return {step.name: store.state(step.key) for step in self.steps}

    def key(self) -> str:
        """What the job as a whole comes to: a hash of its steps' keys."""
        return hashlib.sha256(canonical([step.key for step in self.steps]).encode()).hexdigest()


def make_plan(job: JobSpec) -> Plan:
    """The steps of a job, in an order in which they can run."""
    steps: dict[str, Step] = {}
    for name, stage, parameters, needs, outside in _steps(job):
        identity = {
            "stage": stage,
            "version": STAGES[stage].version,
            "params": keyed(parameters),
            "outside": outside,
            "needs": {role: steps[needed].key for role, needed in needs.items()},
        }
        steps[name] = Step(
            name=name,
            stage=stage,
            params=parameters,
            needs=needs,
            resources=getattr(job.resources, stage),
            identity=identity,
            key=hashlib.sha256(canonical(identity).encode()).hexdigest(),
        )
    return Plan(job=job, steps=tuple(steps.values()))


def _steps(job: JobSpec) -> Iterator[tuple[str, str, Spec, dict[str, str], dict[str, str]]]:
    """Name, stage, parameters, needs and outside inputs of each step."""
    seed, edits = job.seed, job.edits()
    rootstock = {"features": "features", "base": "base"}
    scions = {f"scions/{edit.site}": f"distill/{edit.site}" for edit in edits}
    hybrid = {**rootstock, "select": "select", **scions}

    outside = data_fingerprint(job.data)
    if isinstance(job.codec, VaeCodec):
        outside |= weights_fingerprint("codec", str(vae_folder(Path(job.codec.path))))
    yield "features", "features", params.FeaturesParams(data=job.data, codec=job.codec), {}, outside

    outside = weights_fingerprint("checkpoint", job.weights.path) if isinstance(job.weights, CheckpointWeights) else {}
    base = params.BaseParams(seed=seed, model=job.model, weights=job.weights)
    yield "base", "base", base, {"features": "features"}, outside

    judged = "classifier" in job.evaluate.metrics
    if judged:
        yield "classifier", "classifier", params.ClassifierParams(seed=seed), {"features": "features"}, {}

    yield "profile", "profile", params.ProfileParams(seed=seed, samples=PROFILE_SAMPLES), rootstock, {}

    for edit in edits:
        within = _within(edit, edits)
        yield (
            f"distill/{edit.site}",
            "distill",
            params.DistillParams(seed=seed, edit=edit, within=within, recipe=job.distill),
            {**rootstock, **{f"scions/{inner.site}": f"distill/{inner.site}" for inner in within}},
            weights_fingerprint("scions", edit.scions) if edit.scions else {},
        )

    chosen = [
        params.Choice(edit=edit, reason=spec.reason()) for spec in job.graft for edit in spec.edits(job.model.depth)
    ]
    choices = tuple(sorted(chosen, key=lambda choice: choice.edit.sort_key()))
    yield "select", "select", params.SelectParams(choices=choices), scions, {}

    finetune = params.FinetuneParams(seed=seed, scions="distilled", recipe=job.finetune)
    yield "finetune", "finetune", finetune, hybrid, {}
    rows: dict[params.Row, dict[str, str]] = {
        "rootstock": rootstock,
        "stage1": hybrid,
        "stage2": {"features": "features", "finetuned/stage2": "finetune"},
    }
    if job.finetune.control:
        control = finetune.model_copy(update={"scions": "random"})
        yield "finetune/random_init", "finetune", control, {**rootstock, "select": "select"}, {}
        rows["random_init"] = {"features": "features", "finetuned/random_init": "finetune/random_init"}

    for row, needs in rows.items():
        sampling = params.SampleParams(
            seed=seed,
            row=row,
            codec=job.codec,
            samples=job.evaluate.samples,
            batch=job.evaluate.batch,
            sampler=job.evaluate.sampler,
        )
        yield f"evaluate/{row}", "evaluate", sampling, needs, {}

    outside = {}
    if "fid" in job.evaluate.metrics:
        assert job.evaluate.reference is not None
        outside = reference_fingerprint(job.evaluate.reference)
        outside |= weights_fingerprint("inception", str(inception_file(job.evaluate.inception)))
    needs = {role: step for models in rows.values() for role, step in models.items()}
    needs |= {f"rows/{row}": f"evaluate/{row}" for row in rows}
    if judged:
        needs |= {"classifier": "classifier"}
    yield "evaluate", "evaluate", params.EvaluateParams(seed=seed, codec=job.codec, recipe=job.evaluate), needs, outside


def costs(job: JobSpec, num_classes: int) -> GraftCost:
    """What the job's graft costs beside its rootstock, by formula; edits that a checkpoint carries are in both."""
    channels = job.codec.latent_channels(job.data)
    rootstock = rootstock_cost(job.model, job.place(), channels, num_classes)
    return graft_cost(rootstock, job.edits(), job.place(), carried_edits(job))


def carried_edits(job: JobSpec) -> tuple[Edit, ...]:
    """The edits that a model folder of ours says it carries; other files tell only when their tensors are read."""
    if not isinstance(job.weights, CheckpointWeights):
        return ()
    snapshot = local_snapshot(job.weights.path) if is_hub_id(job.weights.path) else Path(job.weights.path)
    config = snapshot / "config.json" if snapshot is not None else None
    if config is None or not config.is_file():
        return ()
    return tuple(Edit.model_validate(edit) for edit in json.loads(config.read_text()).get("edits", ()))


def _within(edit: Edit, edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """The edits of the blocks that a parallel block takes in."""
    if edit.site.target != "pair":
        return ()
    blocks = (edit.site.block, edit.site.block + 1)
    return tuple(other for other in edits if other.site.target != "pair" and other.site.block in blocks)


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
