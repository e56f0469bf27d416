"""What stands in MLflow after a job: in the default SQLite file, and on a real server, whatever happens to it."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from graftwork.cluster.board import Point
from graftwork.pipeline import api
from graftwork.pipeline.execution.view import SilentView
from graftwork.pipeline.planning.plan import Plan, Step, make_plan
from graftwork.pipeline.runs import record
from graftwork.pipeline.runs.record import RunRecord, StepRecord
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.manifest import Origin
from graftwork.pipeline.tracking import entries, outbox
from graftwork.pipeline.tracking import tracker as track
from graftwork.pipeline.tracking.destination import Destination
from graftwork.pipeline.tracking.held_back import waiting
from graftwork.pipeline.tracking.tracker import Tracker
from graftwork.specs.reading.load import load
from tests.conftest import GRAFT, TINY, Finished, Graft, keys
from tests.servers import MlflowServer, WebServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One for the tests of this file; each has an experiment of its own."""
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


class Line:
    """A TCP line to the server, which can be cut, or lose the answer to a request."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.is_cut = False
        self.lose: bytes | None = None  # the answer to the next request in which this stands
        self.lost = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self.listener.accept()
            except OSError:
                return
            if self.is_cut:
                caller.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.target))
            doomed = threading.Event()
            threading.Thread(target=self._carry, args=(caller, server, doomed, True), daemon=True).start()
            threading.Thread(target=self._carry, args=(server, caller, doomed, False), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, doomed: threading.Event, forth: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if self.is_cut or (doomed.is_set() and not forth):
                    self.lost += doomed.is_set()
                    break
                if forth and self.lose is not None and self.lose in data:
                    self.lose = None
                    doomed.set()
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()


@pytest.fixture
def line(server: MlflowServer) -> Iterator[Line]:
    line = Line(server.port)
    yield line
    line.close()


class Job:
    """The tiny job as the tracker sees it, without its work."""

    def __init__(self, store: Path, uri: str, experiment: str) -> None:
        self.store, self.uri, self.experiment = Store(str(store)), uri, experiment
        self.plan: Plan = make_plan(load(TINY))
        steps = [StepRecord(name=step.name, key=step.key, state="pending") for step in self.plan.steps]
        job = self.plan.job.model_dump(mode="json")
        self.record = RunRecord(
            run=record.run_name(self.plan), name="tiny", status="running", started="2025", job=job, steps=steps
        )
        self.said: list[str] = []

    def tracker(self) -> Tracker:
        there = Destination(self.uri, self.uri, self.experiment)
        return Tracker(there, self.record, self.plan, self.store, self.said.append)

    def opened(self) -> Tracker:
        tracker = self.tracker()
        tracker.opened(self.record)
        return tracker

    def step(self, name: str) -> Step:
        return self.plan[name]

    def commit(self, name: str) -> None:
        """An artifact of the step, with a picture and a tensor."""
        key = self.step(name).key
        folder = self.store.workplace(key)
        (folder / "loss.png").write_bytes(b"picture")
        (folder / "scion.safetensors").write_bytes(b"tensors")
        self.store.commit(key, folder, {}, Origin(step=name, run=self.record.run, seconds=1.0, made=""))

    def end_without_driver(self, name: str) -> None:
        """Begin a step, and let its task commit it after the driver died."""
        first = self.opened()
        first.started(self.step(name))
        first.close()
        self.commit(name)
        step = self.record.step(name)
        step.state, step.made_by, step.seconds = "cached", self.record.run, 1.0

    def end(self, tracker: Tracker, name: str) -> None:
        self.commit(name)
        tracker.ended(self.step(name), 1.0, self.store.artifact(self.step(name).key))

    def finish(self, tracker: Tracker) -> None:
        self.record.status, self.record.results = "finished", {"stage2": {"distance": 2.5}}
        tracker.finished(self.record)

    def waiting(self) -> list[str]:
        return waiting(self.store, self.record.run).entries

    def said_of(self, words: str) -> int:
        return sum(words in line for line in self.said)


@pytest.fixture
def job(tmp_path: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Job:
    """Its tracker writes more often than a real one, so that little time passes."""
    monkeypatch.setattr(track, "FLUSH_SECONDS", 0.05)
    monkeypatch.setattr(outbox, "KEEP_SECONDS", 0.2)
    monkeypatch.setattr(outbox, "LAST_RETRY_SECONDS", 1.0)
    return Job(tmp_path / "store", server.address, request.node.name)


def curve(steps: range, loss: Callable[[int], float] = float, step: str = "distill/01.mha") -> list[Point]:
    return [Point(step, done, {"loss": loss(done), "lr": 1.0}) for done in steps]


def until(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def points(client: MlflowClient, run: Run, metric: str = "loss") -> list[int]:
    return [point.step for point in client.get_metric_history(run.info.run_id, metric)]


def all_runs(client: MlflowClient, name: str = "graftwork") -> dict[str, Run]:
    """By name, each of which only one has."""
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {run.info.run_name: run for run in runs}


def test_the_database_holds_a_child_a_step_nested_by_site(tiny: Finished) -> None:
    runs = all_runs(MlflowClient(f"sqlite:///{tiny.store}/mlflow.db"))
    assert set(runs) == {tiny.run, "distill", "reference", *keys(tiny.outcome)}
    parent_of = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    assert parent_of["finetune"] == parent_of["distill"] == runs[tiny.run].info.run_id
    assert parent_of["distill/01.mha"] == runs["distill"].info.run_id
    assert all(run.info.status == "FINISHED" for run in runs.values())


def test_parameters_keys_and_commit_stand_with_the_job(tiny: Finished) -> None:
    runs = all_runs(MlflowClient(f"sqlite:///{tiny.store}/mlflow.db"))
    job = runs[tiny.run].data
    assert job.params["finetune.lr"] == "0.0005"
    assert job.params["graft.0.operator.kind"] == "hyena_y"
    assert job.tags["graftwork.key.finetune"] == keys(tiny.outcome)["finetune"]
    assert "mlflow.source.git.commit" in job.tags
    assert runs["distill/01.mha"].data.tags["graftwork.key"] == keys(tiny.outcome)["distill/01.mha"]


def test_loss_curves_and_pictures_stand_with_the_steps(tiny: Finished) -> None:
    client = MlflowClient(f"sqlite:///{tiny.store}/mlflow.db")
    runs = all_runs(client)
    finetune = runs["finetune"].info.run_id
    curve = client.get_metric_history(finetune, "loss")
    assert [point.step for point in curve] == list(range(1, 41))
    assert {file.path for file in client.list_artifacts(finetune)} >= {"loss.png", "loss.csv"}
    assert "grid.png" in {file.path for file in client.list_artifacts(runs["evaluate/stage2"].info.run_id)}
    assert len(client.get_metric_history(runs["distill/03.mha"].info.run_id, "heldout_error")) == 60


def test_compare_shows_the_numbers_that_mlflow_holds(tiny: Finished, graft: Graft) -> None:
    held = all_runs(MlflowClient(f"sqlite:///{tiny.store}/mlflow.db"))[tiny.run].data.metrics
    (row,) = json.loads(graft("compare", tiny.run, "--json", "--store", str(tiny.store)).stdout)
    assert {name: value for name, value in row.items() if "." in name} == held


@pytest.mark.slow
def test_a_server_gets_the_same_as_the_database(tiny_copy: Finished, server: MlflowServer, graft: Graft) -> None:
    place = f"tracking.uri={server.address}"
    done = graft("run", str(TINY), "--json", "--set", place, "--set", "evaluate.sampler.guidance=1.25")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    client = MlflowClient(server.address)
    runs = all_runs(client)
    sampled = {"evaluate", *(f"evaluate/{row}" for row in ("rootstock", "stage1", "stage2", "random_init"))}
    assert set(runs) == {outcome["run"], *sampled}
    job = runs[outcome["run"]]
    assert job.data.metrics["stage2.distance"] == outcome["results"]["stage2"]["distance"]
    assert job.data.tags["graftwork.made_by.finetune"] == tiny_copy.run  # a cached step points to the run that made it
    assert "quality-cost.png" in {file.path for file in client.list_artifacts(runs["evaluate"].info.run_id)}


def test_a_server_killed_in_the_midst_of_a_curve_has_each_point_once_when_it_is_back(
    job: Job, server: MlflowServer
) -> None:
    tracker = job.opened()
    tracker.started(job.step("distill/01.mha"))
    for done in range(1, 301):
        tracker.points(curve(range(done, done + 1)))
        time.sleep(0.01)
        if done == 100:
            server.kill()
    job.end(tracker, "distill/01.mha")
    tracker.started(job.step("finetune"))
    until(lambda: len(job.waiting()) > 4)
    assert job.said_of("does not answer") == 1

    server.start()
    until(lambda: not job.waiting())
    job.finish(tracker)
    client = MlflowClient(server.address)
    runs = all_runs(client, job.experiment)
    assert set(runs) == {job.record.run, "distill", "distill/01.mha", "finetune"}
    assert points(client, runs["distill/01.mha"]) == points(client, runs["distill/01.mha"], "lr") == list(range(1, 301))
    assert points(client, runs["distill/01.mha"], "seconds") == [0]
    assert [file.path for file in client.list_artifacts(runs["distill/01.mha"].info.run_id)] == ["loss.png"]
    assert runs["distill/01.mha"].data.params["recipe.lr"] == "0.001"
    assert runs[job.record.run].data.metrics == {"stage2.distance": 2.5}
    assert job.record.step("finetune").mlflow_run == runs["finetune"].info.run_id
    assert (job.said_of("does not answer"), job.said_of("has all"), len(job.said)) == (1, 1, 2)


def test_a_server_that_hangs_holds_up_nobody_and_gets_everything_once(
    job: Job, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    tracker = job.opened()
    tracker.started(job.step("distill/01.mha"))
    tracker.points(curve(range(1, 51)))
    server.signal(signal.SIGSTOP)
    try:
        slowest = 0.0
        for done in range(51, 151):
            began = time.monotonic()
            if done == 100:
                tracker.started(job.step("finetune"))
            tracker.points(curve(range(done, done + 1)))
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(0.02)
        until(lambda: job.said_of("does not answer"))
        time.sleep(3)  # another request or two hang
    finally:
        server.signal(signal.SIGCONT)
    job.end(tracker, "distill/01.mha")
    until(lambda: not tracker.outbox.entries)
    job.finish(tracker)
    assert slowest < 3  # seconds, after which a request that hangs is given up
    client = MlflowClient(server.address)
    runs = all_runs(client, job.experiment)
    assert set(runs) == {job.record.run, "distill", "distill/01.mha", "finetune"}
    assert points(client, runs["distill/01.mha"]) == list(range(1, 151))
    assert job.said_of("does not answer") == 1 and not job.waiting()


@pytest.mark.parametrize("name", ["digits-tiny-", 'distill"', 'distill/01.mha"'])
def test_a_run_whose_creation_was_not_answered_is_made_once(job: Job, line: Line, name: str) -> None:
    job.uri = line.address
    line.lose = f'"run_name": "{name}'.encode()
    tracker = job.opened()
    tracker.started(job.step("distill/01.mha"))
    job.finish(tracker)
    assert line.lost == 1
    assert set(all_runs(MlflowClient(line.address), job.experiment)) == {job.record.run, "distill", "distill/01.mha"}
    assert not job.waiting() and not job.said_of("does not answer")


def test_points_whose_answer_was_lost_are_there_once(job: Job, line: Line) -> None:
    job.uri = line.address
    tracker = job.opened()
    tracker.started(job.step("finetune"))
    until(lambda: not tracker.outbox.entries)
    line.lose = b"runs/log-batch"
    tracker.points(curve(range(1, 21), step="finetune"))
    job.finish(tracker)
    assert line.lost == 1
    client = MlflowClient(line.address)
    assert points(client, all_runs(client, job.experiment)["finetune"]) == list(range(1, 21))


def test_what_a_run_came_to_before_mlflow_heard_of_it_comes_with_its_beginning_and_stands_once(
    job: Job, line: Line
) -> None:
    job.uri = line.address
    tracker = job.opened()
    until(lambda: not tracker.outbox.entries)
    line.is_cut = True
    for name in ("base", "finetune"):
        tracker.started(job.step(name))
        job.end(tracker, name)
    assert sum(isinstance(entry, entries.Values) for entry in tracker.outbox.entries) == 1  # the first is under way
    line.lose, line.is_cut = b'"seconds"', False
    job.finish(tracker)
    assert line.lost == 1
    client = MlflowClient(line.address)
    runs = all_runs(client, job.experiment)
    for name in ("base", "finetune"):
        assert runs[name].info.status == "FINISHED" and points(client, runs[name], "seconds") == [0]
    assert runs["finetune"].data.params["recipe.lr"] == "0.0005"


DRIVER = """
import sys, time
from pathlib import Path
from graftwork.pipeline.tracking import outbox, tracker as track
from tests.test_tracking import Job, curve
outbox.KEEP_SECONDS = track.FLUSH_SECONDS = 0.1
job = Job(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
tracker = job.opened()
tracker.started(job.step("finetune"))
for done in range(1, 51):
    tracker.points(curve(range(done, done + 1), step="finetune"))
    time.sleep(0.05)
time.sleep(600)  # until it is killed, however late
"""


def test_what_a_killed_process_held_back_is_delivered_by_the_next(job: Job, line: Line) -> None:
    job.uri, line.is_cut = line.address, True
    store = job.store.root
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(store), job.uri, job.experiment])
    try:
        until(lambda: any('"done":40' in entry for entry in job.waiting()), 60)
    finally:
        driver.kill()
        driver.wait()

    tracker = job.opened()  # MLflow is away still
    tracker.started(job.step("finetune"))
    tracker.points(curve(range(26, 51), step="finetune"))  # again from a checkpoint, as it was before the kill
    until(lambda: job.said_of("does not answer"))
    line.is_cut = False
    until(lambda: not job.waiting())
    tracker.points(curve(range(51, 61), step="finetune"))
    job.finish(tracker)
    client = MlflowClient(line.address)
    runs = all_runs(client, job.experiment)
    assert set(runs) == {job.record.run, "finetune"}
    assert points(client, runs["finetune"])[:40] == list(range(1, 41))
    assert sorted(set(points(client, runs["finetune"]))) == points(client, runs["finetune"])
    assert points(client, runs["finetune"])[-10:] == list(range(51, 61))


def test_a_step_that_goes_on_from_a_checkpoint_logs_no_point_again(job: Job, line: Line) -> None:
    first = job.opened()
    first.started(job.step("finetune"))
    first.points(curve(range(1, 31), step="finetune"))
    first.close()

    again = Job(Path(job.store.root), job.uri, job.experiment)  # which does not know the ids: the driver was killed
    tracker = again.opened()
    tracker.started(again.step("finetune"))
    tracker.points(curve(range(21, 41), step="finetune"))
    again.finish(tracker)
    client = MlflowClient(job.uri)
    runs = all_runs(client, job.experiment)
    assert set(runs) == {job.record.run, "finetune"}
    assert points(client, runs["finetune"]) == list(range(1, 41))


def test_a_step_that_ended_while_its_driver_was_dead_does_not_stand_as_running(job: Job) -> None:
    job.end_without_driver("finetune")
    job.finish(job.opened())
    client = MlflowClient(job.uri)
    run = all_runs(client, job.experiment)["finetune"]
    assert run.info.status == "FINISHED" and run.data.metrics == {"seconds": 1.0}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["loss.png"]


def test_a_job_that_is_stopped_leaves_nothing_that_stands_as_running(job: Job) -> None:
    tracker = job.opened()
    tracker.started(job.step("features"))
    job.end(tracker, "features")
    tracker.started(job.step("distill/01.mha"))
    job.record.status = "stopped"
    tracker.finished(job.record)
    status = {name: run.info.status for name, run in all_runs(MlflowClient(job.uri), job.experiment).items()}
    assert (status["features"], status["distill/01.mha"], status[job.record.run]) == ("FINISHED", "KILLED", "KILLED")
    assert "RUNNING" not in status.values()


def test_a_run_that_fails_while_ray_starts_does_not_stand_as_running(
    tmp_path: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    def fail(_: Plan) -> None:
        raise ConnectionError("no Ray")

    monkeypatch.setattr("graftwork.pipeline.execution.scheduler.session", fail)
    experiment = request.node.name
    changes = [f"store={tmp_path}", f"tracking.uri={server.address}", f"tracking.experiment={experiment}"]
    with pytest.raises(ConnectionError, match="no Ray"):
        api.run(str(TINY), changes)
    (run,) = all_runs(MlflowClient(server.address), experiment).values()
    assert run.info.status == "FAILED"


def test_what_mlflow_refuses_is_told_once_and_holds_up_nothing(job: Job) -> None:
    tracker = job.opened()
    tracker.started(job.step("finetune"))
    for done in (1, 2):
        tracker.outbox.put(entries.Tags(run="finetune", tags={"k" * 300: "too long a name"}))
        tracker.points(curve(range(done, done + 1), step="finetune"))
    job.finish(tracker)
    client = MlflowClient(job.uri)
    runs = all_runs(client, job.experiment)
    assert points(client, runs["finetune"]) == [1, 2]
    assert runs[job.record.run].info.status == "FINISHED"
    assert all("refuses an entry" in line and "length" in line for line in job.said)
    assert f"2 entries are kept in the store; try again: graft resume {job.record.run}" in job.said[-1]
    refused = job.store.read(f"outbox/{job.record.run}.refused.jsonl")
    assert refused is not None and refused.count("too long a name") == 2


def test_a_place_for_files_that_cannot_be_written_holds_up_no_figures_and_gets_the_files_once_it_can(
    job: Job, tmp_path: Path
) -> None:
    client, place = MlflowClient(job.uri), tmp_path / "of the server"
    place.write_text("not a folder")
    client.create_experiment(job.experiment, artifact_location=(place / "files").as_uri())
    tracker = job.opened()
    tracker.started(job.step("finetune"))
    tracker.points(curve(range(1, 31), step="finetune"))
    job.end(tracker, "finetune")
    until(lambda: job.said_of("takes no file"))
    job.finish(tracker)
    runs = all_runs(client, job.experiment)
    assert points(client, runs["finetune"]) == list(range(1, 31))
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs[job.record.run].data.metrics == {"stage2.distance": 2.5}
    assert job.said_of("such entries are kept for a later try, others go on") == 1
    assert "3 entries are kept in the store; try again: graft resume" in job.said[-1]
    assert job.said_of("does not answer") == 0

    job.tracker().close()  # as a resume does, in vain
    assert "3 entries are kept" in job.said[-1]
    place.unlink()
    job.tracker().close()
    assert "has all 3 entries" in job.said[-1] and not waiting(job.store, job.record.run)
    assert {file.path for file in client.list_artifacts(runs["finetune"].info.run_id)} == {"loss.png"}
    names = {file.path for file in client.list_artifacts(runs[job.record.run].info.run_id)}
    assert names == {"job.json", "results.json"}


def test_a_picture_that_is_gone_from_the_store_is_named_and_holds_up_nothing(job: Job) -> None:
    tracker = job.opened()
    tracker.started(job.step("finetune"))
    until(lambda: not tracker.outbox.entries)
    tracker.outbox.put(entries.File(run="finetune", key=job.step("finetune").key, name="loss.png"))
    job.finish(tracker)
    (told,) = job.said
    assert "does not get loss.png of finetune, which is not in the store any more" in told
    assert all_runs(MlflowClient(job.uri), job.experiment)["finetune"].info.status == "KILLED"


def test_an_entry_that_breaks_the_server_is_set_aside_after_some_tries(
    job: Job, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "FIRST_RETRY_SECONDS", 0.01)
    web = WebServer(500, "oops")
    web.forward_to, web.fail_on, job.uri = server.address, b'"loss"', web.address
    try:
        tracker = job.opened()
        tracker.started(job.step("finetune"))
        tracker.points(curve(range(1, 6), step="finetune"))
        time.sleep(0.1)
        job.end(tracker, "finetune")
        until(lambda: job.said_of("such entries are kept"))
        web.fail_on = None
        job.finish(tracker)  # which tries again
    finally:
        web.close()
    client = MlflowClient(server.address)
    runs = all_runs(client, job.experiment)
    assert points(client, runs["finetune"]) == list(range(1, 6)) and runs["finetune"].info.status == "FINISHED"
    assert not waiting(job.store, job.record.run)


def test_an_experiment_that_is_deleted_on_the_way_gets_all_when_it_is_restored(job: Job) -> None:
    client = MlflowClient(job.uri)
    tracker = job.opened()
    tracker.started(job.step("finetune"))
    until(lambda: not tracker.outbox.entries)
    experiment = client.get_experiment_by_name(job.experiment)
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    tracker.points(curve(range(1, 31), step="finetune"))
    time.sleep(0.1)
    tracker.points(curve(range(31, 41), step="finetune"))
    until(lambda: job.said_of("as deleted; accepted: another tracking.experiment, or the same after: MLFLOW_TRACKING"))
    client.restore_experiment(experiment.experiment_id)
    job.finish(tracker)
    runs = all_runs(client, job.experiment)
    assert points(client, runs["finetune"]) == list(range(1, 41))
    assert not waiting(job.store, job.record.run)


def test_figures_go_through_a_proxy(job: Job, server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = WebServer()
    proxy.forward_to, job.uri = server.address, "http://mlflow.invalid:5000"
    monkeypatch.setenv("http_proxy", proxy.address)
    try:
        job.finish(job.opened())
    finally:
        proxy.close()
    monkeypatch.delenv("http_proxy")
    assert all_runs(MlflowClient(server.address), job.experiment)[job.record.run].info.status == "FINISHED"
    assert all(path.startswith("http://mlflow.invalid:5000/") for path in proxy.asked)


def test_a_name_that_mlflow_takes_for_no_parameter_costs_no_figures(job: Job) -> None:
    job.record.job["resources"]["distill"]["custom"] = {"US$5_^x/y": 1.0, "n" * 400: 1.0, "猫": 2.0}
    job.finish(job.opened())
    params = all_runs(MlflowClient(job.uri), job.experiment)[job.record.run].data.params
    assert params["resources.distill.custom.US_5__x_y"] == "1.0" and params["resources.distill.custom.猫"] == "2.0"
    assert params["finetune.lr"] == "0.0005" and not waiting(job.store, job.record.run)


def test_points_are_delivered_before_the_step_s_end_whatever_mlflow_s_own_settings(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    tracker = job.opened()
    tracker.started(job.step("finetune"))
    tracker.points(curve(range(1, 6), step="finetune"))
    job.finish(tracker)
    client = MlflowClient(job.uri)
    assert points(client, all_runs(client, job.experiment)["finetune"]) == list(range(1, 6))


def test_a_server_behind_a_login_is_reached_and_the_login_written_nowhere(
    job: Job, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_LOGIN", "hunter2hunter2")
    job.uri, line.is_cut = line.address.replace("//", "//graft:${MLFLOW_LOGIN}@"), True
    job.finish(job.opened())
    kept = "".join(job.waiting())
    line.is_cut = False
    again = job.tracker()
    until(lambda: job.said_of("has all"))
    again.close()
    assert set(all_runs(MlflowClient(line.address), job.experiment)) == {job.record.run}
    assert job.record.mlflow_uri == job.uri
    assert kept and "hunter2" not in kept + "".join(job.said)


def test_a_loss_that_is_no_number_waits_as_any_other(job: Job, line: Line) -> None:
    job.uri, line.is_cut = line.address, True
    tracker = job.opened()
    tracker.started(job.step("finetune"))
    tracker.points(curve(range(1, 3), lambda done: math.nan if done == 2 else math.inf, step="finetune"))
    job.record.status = "failed"
    tracker.finished(job.record)
    assert '"loss":NaN' in "".join(job.waiting())
    line.is_cut = False
    job.tracker().close()
    client = MlflowClient(line.address)
    run = all_runs(client, job.experiment)["finetune"]
    history = client.get_metric_history(run.info.run_id, "loss")
    assert history[0].value > 1e300 and math.isnan(history[1].value)


@pytest.mark.timeout(240, func_only=True)  # MLflow itself tries each request again for minutes
def test_a_job_that_ends_while_mlflow_is_away_is_finished_and_resume_delivers(
    tiny_copy: Finished, line: Line, request: pytest.FixtureRequest
) -> None:
    class Cutting(Saying):
        def open(self, *_: object) -> None:
            line.is_cut = True  # it takes connections, as a proxy would, and closes them

    experiment, said = request.node.name, Cutting()
    changes = [f"tracking.uri={line.address}", f"tracking.experiment={experiment}", f"store={tiny_copy.store}"]
    done = api.run(str(TINY), changes, view=said)
    assert done.status == "finished"
    store = Store(str(tiny_copy.store))
    assert waiting(store, done.run)
    assert f"deliver them: graft resume {done.run}" in said.lines[-1]

    still = api.resume(done.run, str(tiny_copy.store), view=said)
    assert still.status == "finished" and waiting(store, done.run)

    line.is_cut = False
    back = api.resume(done.run, str(tiny_copy.store), view=said)
    assert not waiting(store, done.run) and "has all" in said.lines[-1]
    (job,) = all_runs(MlflowClient(line.address), experiment).values()
    assert job.info.status == "FINISHED"
    assert job.data.metrics["stage2.distance"] == done.results["stage2"]["distance"]
    assert job.data.tags["graftwork.made_by.finetune"] == tiny_copy.run
    assert back.mlflow_run == record.find(store, done.run).mlflow_run == job.info.run_id


class Saying(SilentView):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.slow
def test_a_job_goes_on_without_its_mlflow_server_and_resume_delivers(
    tiny_copy: Finished, server: MlflowServer, graft: Graft, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    experiment = request.node.name
    changes = [f"tracking.uri={server.address}", f"tracking.experiment={experiment}", "evaluate.sampler.guidance=1.75"]
    driver = subprocess.Popen(
        [GRAFT, "run", str(TINY), *(word for change in changes for word in ("--set", change))],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stderr is not None
    lines = []
    for line in driver.stderr:
        lines.append(line)
        if "evaluate/rootstock: running" in line:
            server.kill()
    try:
        assert driver.wait() == 0, "".join(lines)
    finally:
        server.start()
    assert sum("; the job goes on, " in line for line in lines) <= 1
    assert sum("deliver them: graft resume" in line for line in lines) == 1
    (run,) = [line.split("graft resume ")[1].strip() for line in lines if "graft resume " in line]

    done = graft("resume", run, "--json")
    assert done.returncode == 0, done.stderr
    runs = all_runs(MlflowClient(server.address), experiment)
    assert set(runs) == {
        run,
        "evaluate",
        *(f"evaluate/{row}" for row in ("rootstock", "stage1", "stage2", "random_init")),
    }
    assert all(one.info.status == "FINISHED" for one in runs.values())
    assert runs[run].data.metrics["stage2.distance"] == json.loads(done.stdout)["results"]["stage2"]["distance"]
