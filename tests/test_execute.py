"""A task that does several steps: each has its own lease, artifact and end."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from benchmarks.watching import Unwatched
from graftwork.cluster.board import Reporter, StopSignal
from graftwork.cluster.session import runtime
from graftwork.models.operators import kernels
from graftwork.pipeline.estimates.packing import Item
from graftwork.pipeline.execution import progress, task
from graftwork.pipeline.execution import scheduler as execute
from graftwork.pipeline.execution import shared_pass as recording
from graftwork.pipeline.execution.scheduler import Execution
from graftwork.pipeline.execution.task import StepResult, Work
from graftwork.pipeline.planning.contents import Contents
from graftwork.pipeline.planning.fingerprints import fingerprint, require_same
from graftwork.pipeline.planning.plan import Plan, Step, make_plan
from graftwork.pipeline.store import leases
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.leases import Lease, LeaseOwner
from graftwork.pipeline.store.manifest import Origin
from graftwork.specs.reading.load import load
from graftwork.specs.resources import StepResources
from graftwork.stages.catalog import distill
from graftwork.stages.catalog.classifier import ClassifierParams
from graftwork.stages.contract import Context, Stopped
from graftwork.stages.registry import STAGES
from graftwork.stages.stage import External
from tests.conftest import ROOT, TINY, Finished, keys


@dataclass
class Pen(Reporter):
    """What a task would write on the board."""

    ended_with: list[StepResult] = field(default_factory=list)

    def __call__(self, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None: ...

    def ended(self, result: StepResult) -> None:
        self.ended_with.append(result)


@dataclass
class Signal(StopSignal):
    """Whether the work is to stop."""

    on: bool = False

    def __call__(self) -> bool:
        return self.on

    now = __call__


@dataclass(frozen=True)
class Doing:
    """A stage whose work is this."""

    run: Callable[[Context], None]
    memory: str = ""


@pytest.fixture
def doing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Context], None]], None]:
    """Have every step do this."""
    monkeypatch.setattr(runtime, "settle", lambda: torch.device("cpu"))
    return lambda work: monkeypatch.setitem(STAGES, "classifier", Doing(work))


def works(store: Store, *names: str, pen: Pen | None = None, stop: Signal | None = None, **changes: Any) -> list[Work]:
    def work(number: int, name: str) -> Work:
        key = hashlib.sha256(name.encode()).hexdigest()
        told = ClassifierParams(seed=number)
        step = Step(name, "classifier", told, {}, StepResources(), {"name": name, "params": {}, "outside": {}}, key)
        origin = Origin(step=name, run="run", seconds=0, made="", git_commit=None)
        given: dict[str, Any] = {"keys": {}, "awaited": (), "over": None, "task": f"task/{name}", **changes}
        return Work(step=step, store=store, origin=origin, report=pen or Pen(), stopping=stop or Signal(), **given)

    return [work(number, name) for number, name in enumerate(names)]


def run(made: list[Work], *before: list[StepResult]) -> list[StepResult]:
    return task._run_steps._function(made, *before)


def leave_a_file(context: Context) -> None:
    (context.out / "figures.json").write_text(context.step)


def test_steps_of_one_task_see_who_comes_after_them_and_what_was_left_for_them(store: Store, doing: Any) -> None:
    seen = []

    def work(context: Context) -> None:
        seen.append(([params.seed for params in context.task_scope.next], dict(context.task_scope.state)))
        context.task_scope.state[context.step] = context.params.seed
        leave_a_file(context)

    doing(work)
    results = run(works(store, "a", "b", "c"))
    assert [result.state for result in results] == ["done"] * 3
    assert seen == [([1, 2], {}), ([2], {"a": 0}), ([], {"a": 0, "b": 1})]
    for result in results:
        assert store.artifact(result.key).read("figures.json") == result.step.encode()


@pytest.mark.parametrize("gpu", [0, 0.5])
def test_a_step_on_a_gpu_leaves_which_kernels_its_operators_ran(gpu: float, store: Store, doing: Any) -> None:
    def work(context: Context) -> None:
        kernels.remember("mha", "flash-attn", "there is no module flash_attn here")
        kernels.remember("mha", "flash-attn", "there is no module flash_attn here")
        if context.step == "a":
            kernels.remember("hyena_x", "causal-conv1d", None)
        leave_a_file(context)

    doing(work)
    made = [replace(work, step=replace(work.step, resources=StepResources(gpu=gpu))) for work in works(store, "a", "b")]
    files = []
    for result in run(made):
        manifest = store.manifest(result.key)
        assert manifest is not None and ("kernels.json" in manifest.files) == bool(gpu)
        files.append(store.artifact(result.key).read("kernels.json") if gpu else b"[]")
    if gpu:
        flash = {"operator": "mha", "kernel": "flash-attn", "obstacle": "there is no module flash_attn here"}
        convolution = {"operator": "hyena_x", "kernel": "causal-conv1d", "obstacle": None}
        assert [json.loads(file) for file in files] == [[convolution, flash], [flash]]


def test_an_error_in_one_step_leaves_the_others_of_its_task_done(store: Store, doing: Any) -> None:
    def work(context: Context) -> None:
        if context.step == "b":
            raise FloatingPointError("the held-out error is nan in epoch 3")
        leave_a_file(context)

    doing(work)
    pen = Pen()
    results = run(works(store, "a", "b", "c", pen=pen))
    assert [result.state for result in results] == ["done", "failed", "done"]
    assert pen.ended_with == results  # each as soon as it had ended
    failure = results[1].failure
    assert failure is not None
    assert str(failure) == "step b failed: FloatingPointError: the held-out error is nan in epoch 3"
    assert "in work" in failure.details
    assert store.manifest(results[1].key) is None
    assert store.names("leases") == []


@pytest.mark.parametrize(
    ("path", "role", "changed"),
    [
        ("model.pt", "checkpoint", "model.pt"),
        ("folder", "codec", "folder/below/weights"),
        ("images", "reference", "images/new.png"),
    ],
)
def test_a_step_whose_files_changed_since_the_plan_commits_nothing(
    store: Store, doing: Any, tmp_path: Path, path: str, role: str, changed: str
) -> None:
    for name in ("model.pt", "folder/below/weights", "images/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"as the plan read it")
    external = External(role, str(tmp_path / path), "some.field")
    outside = {role: fingerprint(external, Contents())}
    works_of = [
        replace(one, step=replace(one.step, external=(external,), identity={**one.step.identity, "outside": outside}))
        for one in works(store, "a", "b")
    ]

    def work(context: Context) -> None:
        leave_a_file(context)
        if context.step == "b":
            (tmp_path / changed).write_bytes(b"as another wrote it")

    doing(work)
    done, failed = run(works_of)
    assert done.state == "done" and failed.state == "failed" and store.manifest(failed.key) is None
    problem = f"some.field: got {tmp_path / path}, which is not as the plan found it; accepted: files that stay"
    assert problem in str(failed.failure)


def test_files_that_only_another_machine_has_are_taken_as_they_are(tmp_path: Path) -> None:
    require_same(External("checkpoint", str(tmp_path / "elsewhere.pt"), "weights.path"), "0" * 64)


def test_a_step_that_another_driver_is_at_is_left_to_it_and_the_rest_is_done(store: Store, doing: Any) -> None:
    doing(leave_a_file)
    made = works(store, "a", "b", "c")
    lease = leases.take(store, made[1].step.key, LeaseOwner.me("another", "task"))
    assert isinstance(lease, Lease)
    with leases.releasing(lease):
        results = run(made)
    assert [result.state for result in results] == ["done", "leased", "done"]
    assert results[1].lease is not None and results[1].lease.holder.run == "another"


def test_the_time_to_stop_in_follows_the_size_of_a_training_s_checkpoint() -> None:
    tiny, imagenet = load(TINY), load(ROOT / "examples/imagenet/hyena_y-50.yaml")
    assert execute.stop_seconds(imagenet, ["distill", "evaluate"]) == execute.STOP_SECONDS
    assert execute.stop_seconds(tiny, ["base"]) == pytest.approx(execute.STOP_SECONDS, abs=1)
    # Weights, average and moments of DiT-XL/2's 675 million parameters: 10.8 GB, at 100 MB/s.
    for stage in ("base", "search", "finetune"):
        assert execute.stop_seconds(imagenet, ["distill", stage]) == pytest.approx(138, abs=1)


def test_asked_to_stop_a_task_begins_no_other_step(store: Store, doing: Any) -> None:
    stop = Signal()

    def work(context: Context) -> None:
        if context.step == "b":
            stop.on = True
            raise Stopped("b")
        leave_a_file(context)

    doing(work)
    results = run(works(store, "a", "b", "c", stop=stop))
    assert [result.state for result in results] == ["done", "stopped", "stopped"]


@pytest.mark.parametrize(("state", "expected"), [("done", "done"), ("failed", "blocked"), ("leased", "blocked")])
def test_a_step_is_done_only_after_what_it_needs(store: Store, doing: Any, state: Any, expected: str) -> None:
    doing(leave_a_file)
    before = [StepResult("base", "0" * 64, state)]
    assert [result.state for result in run(works(store, "a", awaited=("base",)), before)] == [expected]


# -- tasks that are lost


@dataclass
class Told(Unwatched):
    """A watcher that keeps what it is told."""

    lines: list[str] = field(default_factory=list)

    def failed(self, step: str, problem: str) -> None:
        self.lines.append(f"{step} failed: {problem}")

    def skipped(self, step: str, because_of: str) -> None:
        self.lines.append(f"{step} skipped: {because_of}")


SITES = ("distill/01.mha", "distill/03.mha")


@pytest.fixture
def losing(store: Store, monkeypatch: pytest.MonkeyPatch) -> Execution:
    """All before the sites is done; whatever task ends now was lost."""
    nothing = SimpleNamespace(remote=lambda: None)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: nothing)

    def lost(ref: str) -> None:
        raise ray.exceptions.WorkerCrashedError

    monkeypatch.setattr(ray, "get", lost)
    monkeypatch.setattr(runtime, "free_group_of", lambda ref: None)
    plan = make_plan(load(TINY, (f"store={store.root}",)))
    found = Execution(plan, store, "run", None, Told())
    for name in ("features", "base", "classifier", "profile"):
        found.steps[name].state = "done"
    return found


def lose(execution: Execution, *names: str, fed_by_recording: bool = False) -> None:
    execution.tasks = {"ref": progress.Task(names, fed_by_recording)}
    for name in names:
        execution.steps[name].task = "ref"
    execution._end("ref")
    assert not execution.tasks and not any(execution.steps[name].task for name in names)


def waiting(execution: Execution, *names: str) -> bool:
    return all(execution.steps[name].state == "waiting" for name in names)


def test_steps_that_are_lost_together_are_tried_one_by_one_and_only_the_culprit_fails(losing: Execution) -> None:
    lose(losing, *SITES)
    assert {name for name, one in losing.steps.items() if one.alone} == set(SITES)
    assert waiting(losing, *SITES) and losing.failures == []
    lose(losing, SITES[0])
    assert [failure.step for failure in losing.failures] == [SITES[0]]
    assert waiting(losing, SITES[1])
    assert isinstance(losing.watcher, Told)
    told = losing.watcher.lines
    assert told[0].startswith(f"{SITES[0]} failed: its worker was lost 4 times: ")
    assert f"select skipped: {SITES[0]}" in told and "evaluate skipped: distill/01.mha" in told


def test_a_step_is_not_blamed_for_what_it_waited_for(losing: Execution) -> None:
    for name in SITES:
        losing.steps[name].task = "other"
    lose(losing, "select")
    assert waiting(losing, "select") and losing.failures == []


def test_a_step_that_was_lost_with_what_others_recorded_for_it_is_tried_by_itself(losing: Execution) -> None:
    lose(losing, SITES[0], fed_by_recording=True)
    assert losing.steps[SITES[0]].alone and losing.failures == []
    lose(losing, SITES[0])
    assert [failure.step for failure in losing.failures] == [SITES[0]]


# -- sites whose pass is made before


@pytest.mark.parametrize(
    ("each", "memory", "expected"), [(50, None, True), (51, None, False), (50, 100, True), (50, 99, False)]
)
def test_a_pass_is_made_before_where_ray_has_room_for_it(
    monkeypatch: pytest.MonkeyPatch, each: int, memory: int | None, expected: bool
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"object_store_memory": 200.0})
    items = [Item(name, 1.0, memory=float(each)) for name in ("a", "b")]
    assert recording.fits(items, 2, StepResources(memory=memory)) == expected


def test_sites_end_in_the_same_bits_where_tasks_before_theirs_made_the_pass(
    tiny: Finished, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, plan = keys(tiny.outcome), make_plan(load(TINY, (f"store={store.root}",)))
    for step in ("features", "base", "profile"):
        shutil.copytree(tiny.store / "artifacts" / found[step], Path(store.root) / "artifacts" / found[step])
    monkeypatch.setattr(distill, "MIN_RECORDING_SAMPLES", 32)
    fetched: list[Any] = []
    start = recording.Pass.start

    def started(asked: recording.Pass, parts: int, reports: Any) -> Any:
        waited, recorded = start(asked, parts, reports)
        fetched.extend(recording.fetch(refs) for refs in recorded.values())
        return waited, recorded

    monkeypatch.setattr(recording.Pass, "start", started)
    sites = Plan(plan.job, tuple(plan[name] for name in ("features", "base", "profile", *SITES)))
    with execute.session(sites):
        assert Execution(sites, store, "run", None, Unwatched()).go() == []
    assert [len(parts) for parts in fetched] == [2, 2] and all(part for parts in fetched for part in parts)
    for site in SITES:
        path = Path("artifacts") / found[site] / "scion.safetensors"
        assert (Path(store.root) / path).read_bytes() == (tiny.store / path).read_bytes()
