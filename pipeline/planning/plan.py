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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from graftwork.pipeline.planning.contents import Contents
from graftwork.pipeline.planning.fingerprints import ABSENT, UNREAD, data_fingerprint, fingerprint, require_same
from graftwork.pipeline.store.artifacts import State, Store
from graftwork.pipeline.store.manifest import Manifest, RottenArtifact, canonical
from graftwork.specs.costs import GraftCost, rootstock_cost
from graftwork.specs.edits import Edit
from graftwork.specs.fields import Spec, keyed
from graftwork.specs.hub import is_hub_id, local_snapshot
from graftwork.specs.job import JobSpec
from graftwork.specs.problems import first_few
from graftwork.specs.reading.load import SpecError
from graftwork.specs.resources import StepResources
from graftwork.specs.rootstock import CheckpointWeights
from graftwork.specs.training import Precision
from graftwork.stages.catalog.flops import cost_of_graft
from graftwork.stages.catalog.inputs import RULES
from graftwork.stages.data.hashes import IMAGES, ImageHashes, escaped, read_hashes
from graftwork.stages.registry import STAGES
from graftwork.stages.stage import External, StepDraft, Work

MAX_DIFFERENCES = 5  # of a step, that a plan shows
OTHER_DATA = "other data"
UNKNOWN = {ABSENT: "which are not here", UNREAD: "which were never read"}  # fingerprints that are none
MAX_VALUE = 32  # characters of a value that differs


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
    external: tuple[External, ...] = ()  # what it reads from outside of the store
    images: ImageHashes | None = None  # that it reads, and what each holds
    work: Work | None = None  # None where there is no formula, or nothing that it counts
    workers: int = 1  # that share the work
    precision: Precision = "fp32"  # of its products
    spreads: bool = False  # whether it spreads its work over whatever of the machine is free

    @property
    def devices(self) -> float:
        """How many GPUs, or cores, it has at once; if it spreads, how many each of its tasks has."""
        return self.workers * (self.resources.gpu or 1.0)

    def require_same_files(self) -> None:
        """Raise ChangedFiles if what it read from outside of the store is not what its key says."""
        for one in self.external:
            require_same(one, self.identity["outside"][one.role])


@dataclass(frozen=True)
class Plan:
    """A job's steps, each after those that it needs."""

    job: JobSpec
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()  # on the files that it will read

    def __getitem__(self, name: str) -> Step:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Step]:
        return {step.name: step for step in self.steps}

    def following(self, name: str) -> set[str]:
        """Return the names of the steps that need this one, directly or through others."""
        names: set[str] = set()
        for step in self.steps:
            if any(needed == name or needed in names for needed in step.needs.values()):
                names.add(step.name)
        return names

    def states(self, store: Store) -> dict[str, State]:
        states = store.states([step.key for step in self.steps])
        return {step.name: states[step.key] for step in self.steps}

    def key(self) -> str:
        """What the job as a whole comes to: a hash of its steps' keys."""
        return hashlib.sha256(canonical([step.key for step in self.steps]).encode()).hexdigest()


def make_plan(job: JobSpec, contents: Contents | None = None) -> Plan:
    """Return the steps of a job, in an order in which they can run.

    contents: of the files that it brings along; without it, each is read. If one may not be, no run has these keys.
    """
    steps: dict[str, Step] = {}
    contents = contents or Contents()
    read = cache(lambda external: fingerprint(external, contents))  # many steps read the same
    for stage, draft in _drafts(job):
        outside, images = data_fingerprint(draft.data, contents) if draft.data else ({}, None)
        identity: dict[str, Any] = {
            "stage": stage,
            "version": STAGES[stage].version,
            "params": keyed(draft.params),
            "outside": {**outside, **draft.outside, **{one.role: read(one) for one in draft.external}},
            "needs": {role: steps[needed].key for role, needed in draft.needs.items()},
        }
        steps[draft.name] = Step(
            name=draft.name,
            stage=stage,
            params=draft.params,
            needs=draft.needs,
            resources=job.resources.of(stage),
            identity=identity,
            key=hashlib.sha256(canonical(identity).encode()).hexdigest(),
            external=draft.external,
            images=images,
            work=draft.work if draft.work is not None and draft.work.total else None,
            workers=draft.workers,
            precision=draft.precision,
            spreads=draft.spreads,
        )
    return Plan(job=job, steps=tuple(steps.values()))


def _drafts(job: JobSpec) -> Iterator[tuple[str, StepDraft]]:
    """Yield the steps of all stages, each after those that it needs, and else in the order of the stages."""
    drafts = dict[str, tuple[str, StepDraft]]()
    for stage, declared in STAGES.items():
        for draft in declared.steps(job):
            assert draft.name not in drafts, f"{draft.name} is a step already"
            drafts[draft.name] = stage, draft
    before = dict[str, None]()

    def ordered(name: str, behind: tuple[str, ...]) -> Iterator[tuple[str, StepDraft]]:
        assert name in drafts and name not in behind, f"{behind[-1]} needs {name}, which is no step, or needs it too"
        stage, draft = drafts[name]
        for needed in draft.needs.values():
            if needed not in before:
                yield from ordered(needed, (*behind, name))
        before[name] = None
        yield stage, draft

    for name in drafts:
        if name not in before:
            yield from ordered(name, ())


def costs(job: JobSpec, num_classes: int) -> GraftCost:
    """What the job's graft costs beside its rootstock, by formula; edits that a checkpoint carries are in both."""
    channels = job.codec.latent_channels(job.data)
    rootstock = rootstock_cost(job.model, job.place(), channels, num_classes)
    return cost_of_graft(job, rootstock, carried_edits(job))


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


def differences(plan: Plan, states: Mapping[str, State], manifests: Iterable[Manifest], store: Store) -> dict[str, str]:
    """Return, for each step that is not cached, how it differs from the nearest cached step of its name.

    A step on another rootstock, or on other data, than any in the store is compared with nothing: that is another job.
    """
    like: dict[str, list[Manifest]] = {}
    for manifest in manifests:
        like.setdefault(manifest.origin.step, []).append(manifest)
    lines: dict[str, str] = {}
    foreign: set[str] = set()
    for step in plan.steps:
        if states[step.name] == "cached" or step.name in foreign:
            continue
        if line := difference(step, like.get(step.name, []), store):
            lines[step.name] = line
        elif STAGES[step.stage].foundation:
            foreign |= plan.following(step.name)
    return lines


def difference(step: Step, manifests: Sequence[Manifest], store: Store | None = None) -> str | None:
    """Return what sets the step apart from the nearest one of these that is like it; None if none is."""
    nearest: tuple[int, Manifest] | None = None
    for manifest in manifests:
        differing = _leaves_apart(step.identity, manifest.identity)
        if differing is not None and (nearest is None or differing < nearest[0]):
            nearest = differing, manifest
    if nearest is None:
        return None
    manifest = nearest[1]
    images = _images_apart(step, manifest, store)
    if images == OTHER_DATA:
        return None
    parts = [*_params_apart(step.identity, manifest.identity), *([images] if images else [])]
    parts += _outside_apart(step.identity["outside"], manifest.identity["outside"])
    parts += _needs_apart(step.identity["needs"], manifest.identity["needs"])
    return first_few(parts, MAX_DIFFERENCES) if parts else None


def _leaves_apart(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> int | None:
    """Return how many parameters differ; None if that is most of them, or most of those of the data or the model."""
    mine, other = (dict(_leaves(identity["params"])) for identity in (ours, theirs))
    names = mine.keys() | other.keys()
    differing = {name for name in names if mine.get(name) != other.get(name)}
    for section in ("", "data.", "model."):
        within = [name for name in names if name.startswith(section)]
        if 2 * len(differing.intersection(within)) > len(within) or f"{section}kind" in differing:
            return None
    return len(differing)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name in sorted(value):
            yield from _leaves(value[name], f"{path}.{name}" if path else name)
    else:
        yield path, value


def _params_apart(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Yield `name: theirs -> ours` for each parameter that differs; values are short."""
    if ours["version"] != theirs["version"]:
        yield f"another version of {ours['stage']}"
    mine, other = (dict(_leaves(identity["params"])) for identity in (ours, theirs))
    for name in sorted(mine.keys() | other.keys()):
        if mine.get(name) != other.get(name):
            yield f"{name}: {_short(other.get(name))} -> {_short(mine.get(name))}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}.."


def _outside_apart(ours: Mapping[str, str], theirs: Mapping[str, str]) -> Iterator[str]:
    """Yield what is another in the files that the job brings along, but for its images, in words."""
    for role in sorted((ours.keys() | theirs.keys()) - {"images"}):
        if ours.get(role) in UNKNOWN:
            yield f"the {role}, {UNKNOWN[ours[role]]}"
        elif ours.get(role) != theirs.get(role):
            contents, rule = f"other contents of the {role}", f"{role}: {theirs.get(role)} -> {ours.get(role)}"
            yield rule if role in RULES else contents


def _images_apart(step: Step, manifest: Manifest, store: Store | None) -> str | None:
    """Return how the images differ, in words; OTHER_DATA if the step has none of those of the manifest's."""
    ours, theirs = (identity["outside"].get("images") for identity in (step.identity, manifest.identity))
    if ours == theirs:
        return None
    if ours in UNKNOWN:
        return f"the images, {UNKNOWN[ours]}"
    if step.images is None or store is None or IMAGES not in manifest.files:
        return "other images"
    try:
        before = read_hashes(store.artifact(manifest.key).read(IMAGES))
    except RottenArtifact:
        return "other images"
    after = {escaped(name): digest.hex() for name, digest in step.images.by_name.items()}
    both = before.keys() & after.keys()
    counts = {
        "with other contents": sum(before[name] != after[name] for name in both),
        "more": len(after.keys() - both),
        "gone": len(before.keys() - both),
    }
    if not both:
        known = set(before.values())
        counts = {"under other names": sum(digest in known for digest in after.values())}
    parts = [f"{count:,} {'image' if count == 1 else 'images'} {what}" for what, count in counts.items() if count]
    return ", ".join(parts) or ("another order of the classes" if both else OTHER_DATA)


def _needs_apart(ours: Mapping[str, str], theirs: Mapping[str, str]) -> Iterator[str]:
    """Yield the roles of the steps that are others; many of one kind are counted."""
    kinds: dict[str, list[str]] = {}
    for role in sorted(ours.keys() | theirs.keys()):
        if ours.get(role) != theirs.get(role):
            kinds.setdefault(role.partition("/")[0], []).append(role)
    for kind, roles in kinds.items():
        one = f"{'other' if roles[0].endswith('s') else 'another'} {roles[0]}"
        yield one if len(roles) == 1 else f"{len(roles)} other {kind}"
