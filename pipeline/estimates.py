"""Estimates: what is left of a job should take, before it runs. No Ray, no torch.

The FLOPs of a step are known by formula. How fast they are done is taken from the artifact of the same stage, on the
same kind of device, whose FLOPs are nearest: what earlier runs in this store really took. Where there is none, a
speed is assumed, and said to be. The wall time is that of the job's steps played through, each when what it needs is
there and its share of the machine is free. An estimate is kept in the run's record, to be held against what the run
took.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from graftwork.cluster.machine import num_cpus
from graftwork.pipeline import record
from graftwork.pipeline.packing import Item, duration, pack
from graftwork.pipeline.planning import Plan, Step
from graftwork.pipeline.record import Expected, RunRecord
from graftwork.pipeline.store import Manifest, Store
from graftwork.specs import steps as params
from graftwork.specs.costs import Cost, block_cost, embedding_cost, graft_cost, rootstock_cost, scion_cost
from graftwork.specs.fields import Spec
from graftwork.specs.graft import Parallel
from graftwork.specs.job import StepResources
from graftwork.specs.model import DitModel, PretrainWeights
from graftwork.specs.operators import Place
from graftwork.specs.problems import SpecError
from graftwork.specs.training import Precision

TRAINING = 3  # passes that a training step comes to: backward is two of forward
TOLERANCE = 1e-9  # of shares that make up a GPU
START_SECONDS = 6.0  # that Ray takes to start
LOAD_SECONDS = 7.0  # of a step, that its process takes to load torch
WORTH_A_TASK = 256  # samples to learn from, in the pass of the rootstock
UNHEARD_OF = 1e30  # FLOPs and seconds of an artifact that nobody made
LATEST = 20  # artifacts of a kind that say how fast it is done
RECENT = 10  # runs that are asked for their last estimate

# Dense peak by the vendor's data sheets, FLOP/s by precision, by Ray's names of accelerators; half is assumed.
PEAKS: dict[str, dict[Precision, float]] = {
    "A100": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "H100": {"bf16": 989e12, "tf32": 495e12, "fp32": 67e12},
    "H200": {"bf16": 989e12, "tf32": 495e12, "fp32": 67e12},
}
USUAL_GPU = "H100"
CORE = 25e9  # FLOP/s of a CPU's core: half of what sampling the digits reaches on one


T = TypeVar("T", bound=Spec)

SPREADING = (params.SampleParams, params.FeaturesParams)  # steps that take whatever of the machine is free

# -- FLOPs


@dataclass(frozen=True)
class Work:
    """FLOPs of a step."""

    own: float
    shared: float = 0.0  # of the rootstock's pass, which steps of its kind can share

    @property
    def total(self) -> float:
        return self.own + self.shared


@dataclass(frozen=True)
class Known:
    """A step of a plan, or one that was done: what its work is found from."""

    params: Spec
    needs: Mapping[str, str]  # role -> key
    outside: Mapping[str, Any]

    @property
    def workers(self) -> int:
        """That share its work."""
        match self.params:
            case params.BaseParams(weights=PretrainWeights(workers=workers)):
                return workers
            case params.FinetuneParams(recipe=recipe) | params.SearchParams(recipe=recipe):
                return recipe.workers
        return 1

    @property
    def precision(self) -> Precision:
        """Of its products."""
        match self.params:
            case params.BaseParams(weights=PretrainWeights(precision=precision)):
                return precision
            case params.ProfileParams(precision=precision) | params.SampleParams(precision=precision):
                return precision
            case (
                params.DistillParams(recipe=recipe)
                | params.FinetuneParams(recipe=recipe)
                | params.SearchParams(recipe=recipe)
            ):
                return recipe.precision
        return "fp32"

    @property
    def spreads(self) -> bool:
        """Whether it spreads its work over whatever is free."""
        return isinstance(self.params, SPREADING)


@dataclass(frozen=True)
class Rootstock:
    """A rootstock's shape."""

    model: DitModel
    place: Place
    channels: int

    @property
    def cost(self) -> Cost:
        """But for its classes, which matter to parameters only."""
        return rootstock_cost(self.model, self.place, self.channels, num_classes=1)

    @property
    def flops(self) -> int:
        """Of a pass of one sample."""
        return self.cost.flops

    def up_to(self, block: int) -> int:
        """Of a pass of one sample that ends with that block."""
        embedding = embedding_cost(self.model, self.place, self.channels, num_classes=1)
        return embedding.flops + (block + 1) * block_cost(self.place).flops


class Formulas:
    """The work of steps, by their keys; None where there is no formula, or a step before it is not known."""

    def __init__(self, known: Callable[[str], Known]) -> None:
        """known: the step with that key; raises KeyError."""
        self.known = known
        self._forward = cache(self._forward_of)

    def work(self, key: str) -> Work | None:
        try:
            return self._work(self.known(key))
        # What it needs is gone from the store; or an artifact of a stranger's has numbers or needs that make no sense.
        except (KeyError, ArithmeticError, RecursionError):
            return None

    def _work(self, step: Known) -> Work | None:
        told, flops = step.params, None
        match told:
            case params.BaseParams(weights=PretrainWeights() as recipe):
                flops = TRAINING * self._rootstock(step.needs["features"], told).flops * recipe.steps * recipe.batch
            case params.ProfileParams(samples=samples):
                flops = self._of(step).flops * samples
            case params.SearchParams(recipe=recipe, candidates=candidates):
                rootstock = self._of(step)
                both = rootstock.flops + sum(scion_cost(edit, rootstock.place).flops for edit in candidates)
                flops = TRAINING * both * recipe.steps * recipe.batch
            case params.FinetuneParams(recipe=recipe):
                flops = TRAINING * self._trained(step) * recipe.steps * recipe.batch
            case params.SampleParams(sampler=sampler, samples=samples):
                passes = sampler.steps * (1 if sampler.guidance == 1 else 2)
                flops = self._trained(step) * passes * samples
            case params.DistillParams():
                return self._distillation(step, told)
        return None if flops is None else Work(float(flops))

    def _distillation(self, step: Known, told: params.DistillParams) -> Work:
        """Section 4 of the method: the pass up to the site's block, then epochs over what it left."""
        rootstock, recipe = self._of(step), told.recipe
        shown, heldout = recipe.samples * recipe.draws, recipe.heldout or recipe.samples
        scion = scion_cost(told.edit, rootstock.place).flops
        last = told.edit.site.block
        if isinstance(told.edit.operator, Parallel):  # both blocks learn, and a projection that merges them
            scion += 2 * block_cost(rootstock.place).flops
            last += 1
        taken = "scions" in step.outside  # from another graft: it is only measured
        own = scion * (heldout if taken else recipe.epochs * (TRAINING * shown + heldout))
        return Work(float(own), float(rootstock.up_to(last) * (shown + heldout)))

    def activations(self, step: Known) -> int:
        """Bytes of what an operator sees and puts out for all samples of a distillation."""
        assert isinstance(step.params, params.DistillParams)
        recipe, place = step.params.recipe, self._of(step).place
        samples = recipe.samples * recipe.draws + (recipe.heldout or recipe.samples)
        return 2 * samples * place.num_tokens * place.width * (2 if recipe.precision == "bf16" else 4)

    def _trained(self, step: Known) -> int:
        """FLOPs of a pass of one sample through the model that the step trains or samples from."""
        for role, needed in step.needs.items():
            if role.startswith("finetuned/"):
                return self._trained(self.known(needed))
        if "select" not in step.needs:
            return self._of(step).flops
        return self._forward(step.needs["features"], step.needs["base"], step.needs["select"])

    def _forward_of(self, features: str, base: str, select: str) -> int:
        """FLOPs of a pass of one sample through the graft; edits that a checkpoint carries are not counted."""
        rootstock = self._rootstock(features, self._told(base, params.BaseParams))
        chosen = self._told(select, params.SelectParams)
        if chosen.depth != rootstock.model.depth:
            raise KeyError(select)
        # Where evidence chooses, any of the candidates will do: blocks are all of one shape.
        numbers = [None if rule.layers is None else rule.layers.number(chosen.depth) for rule in chosen.rules]
        made = [edit for rule, number in zip(chosen.rules, numbers, strict=True) for edit in rule.edits[:number]]
        return graft_cost(rootstock.cost, made, rootstock.place).graft.flops

    def _of(self, step: Known) -> Rootstock:
        return self._rootstock(step.needs["features"], self._told(step.needs["base"], params.BaseParams))

    def _rootstock(self, features: str, base: params.BaseParams) -> Rootstock:
        told = self._told(features, params.FeaturesParams)
        side = told.data.image_size // told.codec.factor // base.model.patch
        place = Place(width=base.model.width, heads=base.model.heads, num_tokens=side**2)
        return Rootstock(base.model, place, told.codec.latent_channels(told.data))

    def _told(self, key: str, kind: type[T]) -> T:
        """The parameters of another step; raises KeyError where it is not of that kind."""
        found = self.known(key).params
        if not isinstance(found, kind):
            raise KeyError(key)
        return found


def known_steps(plan: Plan) -> dict[str, Known]:
    """A plan's steps, by their keys."""
    keys = {step.name: step.key for step in plan.steps}
    return {
        step.key: Known(step.params, {role: keys[name] for role, name in step.needs.items()}, step.identity["outside"])
        for step in plan.steps
    }


PARAMS: dict[str, tuple[type[Spec], ...]] = {
    "features": (params.FeaturesParams,),
    "base": (params.BaseParams,),
    "classifier": (params.ClassifierParams,),
    "profile": (params.ProfileParams,),
    "distill": (params.DistillParams,),
    "search": (params.SearchParams,),
    "select": (params.SelectParams,),
    "finetune": (params.FinetuneParams,),
    "reference": (params.TrainingStatisticsParams, params.FidStatisticsParams, params.HeldoutParams),
    "evaluate": (params.SampleParams, params.EvaluateParams),
}


# What an identity leaves out, since it cannot change a result, but a spec requires.
ELSEWHERE = {"reference": "elsewhere"}
LEFT_OUT = {"data": {"path": "elsewhere"}, "weights": {"path": "elsewhere"}, "recipe": ELSEWHERE}


def known_artifact(manifest: Manifest) -> Known | None:
    """The step that made an artifact; None where its identity is of another time, or makes no sense."""
    identity = manifest.identity
    try:
        told = {name: _as_given(part) for name, part in identity["params"].items()}
        needs = {role: str(key) for role, key in identity["needs"].items()}
        outside = dict(identity["outside"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    filled = {name: LEFT_OUT.get(name, {}) | part if isinstance(part, dict) else part for name, part in told.items()}
    for kind in PARAMS.get(str(identity.get("stage")), ()):
        for given in (told, filled, ELSEWHERE | filled):
            with suppress(ValidationError):
                return Known(kind.model_validate(given), needs, outside)
    return None


def _as_given(part: Any) -> Any:
    """An identity has every field; a spec refuses some beside others, whatever is in them."""
    if isinstance(part, list):
        return [_as_given(one) for one in part]
    if isinstance(part, dict) and part.get("kind") == "learned":
        shares = ("ratio", "count", "budget")
        beside = {"keep"} if any(part.get(name) is not None for name in shares) else set()
        beside |= {"groups"} if part.get("budget") is not None else set()
        return {name: one for name, one in part.items() if name not in beside}
    return {name: _as_given(one) for name, one in part.items()} if isinstance(part, dict) else part


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


def width(step: Known, resources: StepResources) -> float:
    """Devices that the step has at once, where it does not take whatever is free."""
    return step.workers * (resources.gpu or 1.0)


def assumed_speed(step: Known, resources: StepResources) -> float:
    """FLOP/s of a worker, where nothing like it was done: half of the peak of what it takes."""
    if not resources.gpu:
        return CORE
    return PEAKS[gpu_kind(resources)][step.precision] / 2 * resources.gpu


def _assumption(resources: Iterable[StepResources]) -> str:
    """The same for people."""
    told = (f"half the peak of {gpu_kind(one)}" if one.gpu else f"{CORE / 1e9:g} GFLOP/s a core" for one in resources)
    return " or ".join(dict.fromkeys(told))


def gpu_kind(resources: StepResources) -> str:
    """By the accelerator that the spec asks for, as Ray names it."""
    asked = [name.removeprefix("accelerator_type:") for name in resources.custom]
    return next((name for name in asked if name in PEAKS), USUAL_GPU)


# -- the machine, and the job played through


@dataclass(frozen=True)
class Machine:
    """What all steps share."""

    cpus: float
    gpus: float

    def takes(self, step: Known, resources: StepResources) -> tuple[str, float]:
        """What a step takes of it while it runs: GPUs where it has any, else CPUs; a share of a GPU is never made up of
        what is left of two."""
        if not resources.gpu:
            return "cpu", self.cpus if step.spreads else min(self.cpus, step.workers * resources.cpu)
        each = resources.gpu if resources.gpu >= 1 else 1 / int(1 / resources.gpu)
        return "gpu", self.gpus if step.spreads else min(self.gpus, step.workers * each)


def machine_for(plan: Plan, gpus: int | None) -> Machine:
    """This machine's CPUs, and the GPUs given or, by default, as many as the plan's widest step takes at once.

    Raises SpecError where a step wants more.
    """
    known = known_steps(plan)
    widest = max(plan.steps, key=lambda step: known[step.key].workers * step.resources.gpu)
    wanted = math.ceil(known[widest.key].workers * widest.resources.gpu)
    if gpus is not None and gpus < wanted:
        raise SpecError([f"--gpus: got {gpus}; accepted: at least {wanted}, which {widest.name} takes at once"])
    cpus = max(known[step.key].workers * step.resources.cpu for step in plan.steps)
    return Machine(max(float(num_cpus()), cpus), float(wanted if gpus is None else gpus if wanted else 0))


@dataclass(frozen=True)
class StepTime:
    """What a step should take."""

    own: float  # seconds
    shared: float = 0.0  # seconds of the pass that it can share
    basis: Literal["done", "assumed", "none"] = "none"


def estimate(plan: Plan, undone: Iterable[str], history: History, machine: Machine) -> Expected:
    """What the steps that are not done should take; those without any basis count as nothing, and are named."""
    known, names = known_steps(plan), set(undone)
    formulas = Formulas(known.__getitem__)
    steps = {step.name: step for step in plan.steps if step.name in names}
    times = {
        step.name: _step_time(known[step.key], formulas.work(step.key), step.resources, history, machine)
        for step in steps.values()
    }
    seconds, gpu_seconds, by_stage = _play(steps, times, known, machine)
    whole = sum(by_stage.values())
    return Expected(
        seconds=seconds + (START_SECONDS if steps else 0.0),
        gpu_hours=gpu_seconds / 3600,
        cpus=machine.cpus,
        gpus=machine.gpus,
        shares={stage: part / whole for stage, part in by_stage.items()} if whole else {},
        assumption=_assumption([step.resources for name, step in steps.items() if times[name].basis == "assumed"]),
        assumed=[name for name, time in times.items() if time.basis == "assumed"],
        unknown=[name for name, time in times.items() if time.basis == "none"],
    )


def _step_time(
    step: Known, work: Work | None, resources: StepResources, history: History, machine: Machine
) -> StepTime:
    seconds = history.nearest(step, work, resources)
    if work is None:
        return StepTime(0.0) if seconds is None else StepTime(seconds, basis="done")
    basis: Literal["done", "assumed"] = "done"
    if seconds is None:
        basis = "assumed"
        _, devices = machine.takes(step, resources)
        side_by_side = devices / (resources.gpu or 1.0) if step.spreads else step.workers
        seconds = LOAD_SECONDS + work.total / (assumed_speed(step, resources) * side_by_side)
    return StepTime(seconds * work.own / work.total, seconds * work.shared / work.total, basis)


@dataclass(frozen=True)
class _Task:
    """Steps that run in one task, and what it takes."""

    steps: tuple[str, ...]
    seconds: float
    pool: str
    amount: float


def _play(
    steps: Mapping[str, Step], times: Mapping[str, StepTime], known: Mapping[str, Known], machine: Machine
) -> tuple[float, float, dict[str, float]]:
    """Run the steps in thought, each when what it needs is there and its share of the machine is free.

    Returns seconds to the end of the last, GPU seconds, and by stage the seconds for which its steps would have all
    GPUs, or all CPUs.
    """
    missing = {name: set(step.needs.values()) & steps.keys() for name, step in steps.items()}
    followers: dict[str, list[str]] = {}
    for name, needs in missing.items():
        for needed in needs:
            followers.setdefault(needed, []).append(name)
    free = {"cpu": machine.cpus, "gpu": machine.gpus}
    waiting = _tasks([steps[name] for name, needs in missing.items() if not needs], times, known, machine)
    running: list[tuple[float, int, _Task]] = []
    now, gpu_seconds, number = 0.0, 0.0, 0
    by_stage: dict[str, float] = {}
    sizes = {"cpu": machine.cpus, "gpu": machine.gpus}
    while waiting or running:
        still_waiting = []
        for task in waiting:
            if task.amount > free[task.pool] + TOLERANCE:
                still_waiting.append(task)
                continue
            free[task.pool] -= task.amount
            number += 1
            heapq.heappush(running, (now + task.seconds, number, task))
        waiting = still_waiting
        now, _, task = heapq.heappop(running)
        free[task.pool] += task.amount
        gpu_seconds += task.seconds * task.amount * (task.pool == "gpu")
        stage = steps[task.steps[0]].stage
        share = task.amount / sizes[task.pool] if task.amount else 0.0
        by_stage[stage] = by_stage.get(stage, 0.0) + task.seconds * share
        ready = []
        for name in task.steps:
            for follower in followers.get(name, ()):
                missing[follower].remove(name)
                ready += [steps[follower]] * (not missing[follower])
        waiting += _tasks(ready, times, known, machine)
    return now, gpu_seconds, by_stage


def _tasks(
    ready: Sequence[Step], times: Mapping[str, StepTime], known: Mapping[str, Known], machine: Machine
) -> list[_Task]:
    """One a step, but for sites, which are packed."""
    sites = [step for step in ready if step.stage == "distill"]
    tasks = [
        _Task(
            (step.name,),
            times[step.name].own + times[step.name].shared,
            *machine.takes(known[step.key], step.resources),
        )
        for step in ready
        if step.stage != "distill"
    ]
    if sites:
        pool, amount = machine.takes(known[sites[0].key], sites[0].resources)
        slots = int((machine.gpus if pool == "gpu" else machine.cpus) / amount + TOLERANCE) if amount else 0
        items = [Item(step.name, times[step.name].own, depth=_block(step)) for step in sites]
        shared = max(times[step.name].shared for step in sites)
        parts = parts_of_pass(sites, slots)
        before, within = (shared / parts, 0.0) if parts else (0.0, shared)
        for number, one in enumerate(pack(items, slots, within)):
            waited = before if number < slots else 0.0  # by those that begin first
            tasks.append(_Task(tuple(item.name for item in one), waited + duration(one, within), pool, amount))
    return tasks


def site_items(plan: Plan, names: Iterable[str]) -> tuple[list[Item], float]:
    """Sites as items to pack, and the pass that they can share, both in FLOPs; with the bytes that a site's inputs and
    outputs take on its device."""
    known, keys = known_steps(plan), {step.name: step.key for step in plan.steps}
    formulas = Formulas(known.__getitem__)
    items, shared = [], 0.0
    for name in names:
        work = formulas.work(keys[name])
        assert work is not None, name
        items.append(Item(name, work.own, formulas.activations(known[keys[name]]), _block(plan[name])))
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


def _block(step: Step) -> int:
    """Up to which the rootstock runs for a site."""
    assert isinstance(step.params, params.DistillParams)
    return step.params.edit.site.block
