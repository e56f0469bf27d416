"""What the engine does not do twice, and what it does not load: the part of its speed that needs no clock."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from benchmarks.trivial import chain_and_fan, finish
from graftwork.pipeline.execution import report as reporting
from graftwork.pipeline.execution.report import RecordWriter, RunReport
from graftwork.pipeline.execution.run import Run
from graftwork.pipeline.execution.view import SilentView
from graftwork.pipeline.planning import contents
from graftwork.pipeline.planning.plan import Plan, make_plan
from graftwork.pipeline.runs import record
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.job import JobSpec
from graftwork.specs.reading.load import load
from tests.conftest import TINY

if TYPE_CHECKING:
    from graftwork.pipeline.tracking.tracker import Tracker

SCIONS = "[{target: mha, operator: {kind: swa}, layers: {kind: all}, scions: %s}]"


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    return load(TINY, [f"store={tmp_path / 'store'}"])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often local stores are read and listed from now on."""
    from graftwork.pipeline.store.local import LocalFiles

    found = Counter[str]()
    for name in ("read", "names"):
        original = getattr(LocalFiles, name)

        def counted(files: LocalFiles, place: str, name: str = name, original: Any = original) -> Any:
            found[name] += 1
            return original(files, place)

        monkeypatch.setattr(LocalFiles, name, counted)
    return found


def loaded(code: str, *watched: str) -> set[str]:
    """Which of the modules are loaded when the code has run in a process of its own."""
    check = f"{code}\nprint(*[name for name in {watched!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_help_loads_nothing_that_a_command_works_with() -> None:
    code = "import sys; from graftwork.pipeline.cli.app import app; app(['--help'], standalone_mode=False)"
    assert (
        loaded(
            code,
            "pydantic",
            "yaml",
            "fsspec",
            "rich",
            "graftwork.pipeline.store.artifacts",
            "graftwork.specs.job",
            "ray",
        )
        == set()
    )


def test_a_run_that_finds_all_done_in_a_folder_loads_no_file_systems(job: JobSpec) -> None:
    finish(make_plan(job))
    code = f"import sys, graftwork; assert graftwork.run({str(TINY)!r}, ['store={job.store}']).status == 'finished'"
    assert loaded(code, "fsspec", "rich", "requests", "aiohttp", "ray", "torch", "mlflow") == set()


def test_every_call_for_python_is_there() -> None:
    import graftwork

    assert all(callable(getattr(graftwork, name)) for name in graftwork.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = graftwork.nonsense


def test_a_plan_asks_the_store_for_each_step_once_and_lists_once(job: JobSpec, asked: Counter[str]) -> None:
    plan = make_plan(job)
    for state in ("pending", "cached"):
        asked.clear()
        assert set(plan.states(Store(job.store)).values()) == {state}
        assert asked == {"read": len(plan.steps), "names": 1}
        finish(plan)


def test_over_a_network_many_steps_are_asked_for_at_once(job: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, together = make_plan(job), threading.Barrier(4)

    def slow(*_: object) -> None:
        together.wait(20)  # until four are here

    store = Store(job.store)
    monkeypatch.setattr(store, "manifest", slow)
    monkeypatch.setattr(store, "local", False)
    assert store.known([step.key for step in plan.steps[:12]]) == {}


def test_a_run_that_finds_all_done_reads_each_manifest_once(job: JobSpec, asked: Counter[str]) -> None:
    plan = make_plan(job)
    finish(plan)
    asked.clear()
    Run(plan, SilentView()).go()
    few = 8  # the record, the outbox, and twice the table with its manifest
    assert asked["read"] <= len(plan.steps) + few


def test_a_checkpoint_that_lends_many_scions_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = Counter[str]()
    original = contents._hashed

    def counted(path: str) -> tuple[bytes, bytes]:
        hashed[Path(path).name] += 1
        return original(path)

    monkeypatch.setattr(contents, "_hashed", counted)
    (tmp_path / "graft.pt").write_bytes(b"scions")
    plan = make_plan(load(TINY, [f"graft={SCIONS % (tmp_path / 'graft.pt')}"]))
    lent = [step for step in plan.steps if "scions" in step.identity["outside"]]
    assert len(lent) == 4 and hashed["graft.pt"] == 1


def test_what_needs_a_step_by_very_many_paths_is_found(job: JobSpec) -> None:
    plan = chain_and_fan(job, each=40, warm=2, number=0)
    layers = [plan.steps[start : start + 2] for start in range(0, 80, 2)]
    woven = tuple(
        step.__class__(**{**step.__dict__, "needs": {one.name: one.name for one in above}})
        for above, layer in zip([(), *layers], layers, strict=False)
        for step in layer
    )  # each needs both of the layer above: 2 ** 40 paths
    following = Plan(job=job, steps=woven).following(woven[0].name)
    assert following == {step.name for step in woven[2:]}


class Told(SilentView):
    """Stands for the tracker, which is told the same and has nothing to say."""

    def started(self, step: object) -> None: ...
    def ended(self, *_: object) -> None: ...
    def points(self, points: object) -> None: ...


def test_the_record_is_kept_now_and_then_and_has_all_in_the_end(job: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftwork.cluster.board import News
    from graftwork.pipeline.execution.task import StepResult

    plan = chain_and_fan(job, each=50, warm=0, number=0)
    run = Run(plan, SilentView())
    writer = RecordWriter(run.store, run.record, run.view.say)
    report = RunReport(plan, run.store, run.view, writer, cast("Tracker", Told()), run.stop)
    saves: list[float] = []
    original = record.save

    def counted(store: Store, one: record.RunRecord) -> None:
        saves.append(1)
        original(store, one)

    monkeypatch.setattr(record, "save", counted)
    monkeypatch.setattr(reporting, "SAVE_SECONDS", 3600.0)
    writer.saved = float("-inf")
    for step in plan.steps:
        report.ended(step.name, StepResult(step.name, step.key, "done", seconds=1.0))
    assert len(saves) == 1
    monkeypatch.setattr(reporting, "SAVE_SECONDS", 0.0)
    report.news(News())
    report.news(News())
    assert len(saves) == 2
    assert {step.state for step in record.load(run.store, run.record.run).steps} == {"done"}
