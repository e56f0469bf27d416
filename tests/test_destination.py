"""Where a run's figures go, what is known to be wrong there before it starts, and a database that was moved."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from graftwork.pipeline import api
from graftwork.pipeline.cli.app import app
from graftwork.pipeline.execution import remote
from graftwork.pipeline.runs import record
from graftwork.pipeline.runs.record import RunRecord
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.tracking import mlflow_database
from graftwork.pipeline.tracking.destination import OWN, Destination, destination
from graftwork.pipeline.tracking.held_back import waiting
from graftwork.specs.job import JobSpec
from graftwork.specs.problems import SpecError
from graftwork.specs.reading.load import load
from tests.conftest import TINY
from tests.servers import WebServer
from tests.test_tracking import Job, all_runs, until

VARIABLES = (
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_TOKEN"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the environment of whoever tests."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


@pytest.fixture
def web() -> Iterator[Callable[..., WebServer]]:
    """Make web servers that are no MLflow."""
    servers: list[WebServer] = []

    def make(*arguments: object, **settings: object) -> WebServer:
        servers.append(WebServer(*arguments, **settings))  # type: ignore[arg-type]
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def problem(uri: str, experiment: str = "graftwork") -> str:
    """The one line with which a URI is refused."""
    with pytest.raises(SpecError) as caught:
        Destination(uri, uri, experiment).check()
    (line,) = caught.value.lines
    assert line.count("accepted: ") == 1 and "\n" not in line
    return line


# -- the choice


def job(*changes: str) -> JobSpec:
    return load(TINY, changes)


def past(uri: str | None, experiment: str | None) -> RunRecord:
    """The record of an earlier start."""
    told = {"mlflow_uri": uri, "mlflow_experiment": experiment}
    return RunRecord(run="run", name="run", status="failed", started="2025", job={}, steps=[], **told)


def test_without_a_word_figures_go_to_the_store_s_own_database(store: Store) -> None:
    there = destination(job().tracking, store, None)
    assert (there.uri, there.recorded_uri) == (f"sqlite:///{store.root}/mlflow.db", "mlflow.db")
    assert (there.experiment, there.notes) == ("graftwork", ())


def test_mlflow_s_variables_are_obeyed_and_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    there = destination(job().tracking, store, None)
    assert (there.uri, there.recorded_uri, there.experiment) == ("http://host:5000", "http://host:5000", "mine")
    assert [note for note in there.notes if "http://host:5000" in note and "MLFLOW_TRACKING_URI" in note]
    assert [note for note in there.notes if "'mine'" in note and "MLFLOW_EXPERIMENT_NAME" in note]


def test_the_spec_comes_before_the_variables_and_that_is_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    there = destination(job("tracking.uri=http://other:1", "tracking.experiment=ours").tracking, store, None)
    assert (there.uri, there.experiment) == ("http://other:1", "ours")
    assert len(there.notes) == 2 and all("is not used" in note for note in there.notes)


def test_a_run_goes_on_where_it_began_without_the_variables(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = past("http://host:5000", "mine")
    there = destination(job().tracking, store, earlier)
    assert (there.uri, there.experiment) == ("http://host:5000", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other:5000")
    assert destination(job().tracking, store, earlier).uri == "http://other:5000"


def test_a_password_in_the_variable_is_kept_nowhere(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2hunter2@host:5000")
    there = destination(job().tracking, store, None)
    assert there.address == "http://me:hunter2hunter2@host:5000"
    assert "hunter2" not in repr(there) and there.name == there.recorded_uri == "http://me:***@host:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(SpecError, match=r"MLFLOW_TRACKING_URI: got nothing; accepted: .* http://me:\*\*\*@host:5000"):
        destination(job().tracking, store, past(there.recorded_uri, None))


def test_a_store_whose_path_no_database_uri_can_hold_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "what?"))
    with pytest.raises(SpecError, match=r"^store: got .*what\?.*; accepted: a path without \?"):
        destination(job().tracking, store, None)
    assert destination(job("tracking.uri=http://host:5000").tracking, store, None).uri == "http://host:5000"


def test_a_store_s_database_by_its_path_is_the_store_s_own(store: Store) -> None:
    assert destination(job(f"tracking.uri=sqlite:///{store.root}/mlflow.db").tracking, store, None).recorded_uri == OWN


def test_a_job_that_is_submitted_takes_the_variable_along(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = job("store=s3://bucket/x")
    assert remote.homeless(remote.with_tracking(spec)) != []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert remote.with_tracking(spec).tracking.uri == "http://host:5000"
    assert remote.homeless(remote.with_tracking(spec)) == []
    assert remote.homeless(job("store=s3://bucket/x", "tracking.uri=databricks")) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2hunter2@host:5000")
    with pytest.raises(SpecError, match=r"^MLFLOW_TRACKING_URI: got http://me:\*\*\*@host:5000; accepted: "):
        remote.with_tracking(spec)


# -- what is known before


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "./mlruns"])
def test_a_file_store_is_refused_before_the_run(
    uri: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "maintenance mode" in problem(uri) and not problem(uri).startswith("tracking.uri: got nothing")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(SpecError) as caught:
        destination(job().tracking, store, None).check()
    assert caught.value.lines[0].startswith("MLFLOW_TRACKING_URI: got ")
    assert not (tmp_path / "mlruns").exists()


def test_a_run_on_a_file_store_makes_nothing(tmp_path: Path) -> None:
    changes = [f"store={tmp_path / 'store'}", f"tracking.uri=file://{tmp_path}/mlruns"]
    with pytest.raises(SpecError, match=r"^tracking.uri: got file://"):
        api.run(str(TINY), changes)
    assert list(tmp_path.iterdir()) == []
    (line,) = api.untracked(api.plan(str(TINY), changes))
    assert line.startswith("tracking.uri: got file://")


ANSWERS = {
    "a page": (200, "<html>Welcome</html>", "does not answer as an MLflow server does"),
    "no MLflow": (404, "<html>Not found</html>", "does not answer as an MLflow server does (404)"),
    "another service": (404, '{"detail": "Not Found"}', "does not answer as an MLflow server does"),
    "a service that says yes to all": (200, '{"status": "ok"}', "does not answer as an MLflow server does"),
    "nothing": (200, "", "does not answer as an MLflow server does"),
    "a login": (401, "<html>Who are you?</html>", "MLFLOW_TRACKING_USERNAME"),
    "a wrong login": (403, "Forbidden", "does not let this login in (403"),
    "an error": (500, "oops", "it answers 500"),
    "too much to do": (503, "later", "it answers 503"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_server_that_answers_something_else_is_refused_in_a_line(web: Callable[..., WebServer], answer: str) -> None:
    status, body, words = ANSWERS[answer]
    server = web(status, body)
    line = problem(server.address)
    assert line.startswith(f"tracking.uri: got {server.address}, which ") and words in line


def test_a_redirect_to_a_login_page_is_refused(web: Callable[..., WebServer]) -> None:
    page = web(200, "<html>Log in</html>")
    assert "a page instead of JSON" in problem(web(302, "", {"Location": page.address}).address)


def test_a_server_that_is_not_there_is_refused_with_its_reason() -> None:
    assert "which does not answer (Connection refused)" in problem("http://127.0.0.1:9")
    assert "which does not answer (Name or service not known)" in problem("http://mlflow.invalid:5000")


@pytest.mark.timeout(120)  # less than the server takes
def test_a_server_that_is_slow_is_not_waited_for(web: Callable[..., WebServer]) -> None:
    server = web(200, "{}")
    server.pause = 300
    assert "does not answer within 2 seconds" in problem(server.address)


def test_a_certificate_that_cannot_be_trusted_is_named(web: Callable[..., WebServer]) -> None:
    line = problem(web().address.replace("http:", "https:"))
    assert "which cannot be trusted (" in line and "MLFLOW_TRACKING_SERVER_CERT_PATH" in line


UNKNOWN = '{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}'


def test_a_server_behind_a_proxy_is_asked_through_it(
    web: Callable[..., WebServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = web(404, UNKNOWN)  # as MLflow answers for a new experiment
    monkeypatch.setenv("http_proxy", proxy.address)
    there = Destination("http://mlflow.invalid:5000", "", "new")
    there.check()
    assert proxy.asked and proxy.asked[0].startswith("http://mlflow.invalid:5000/")

    monkeypatch.setenv("http_proxy", "http://me:hunter2hunter2@127.0.0.1:9")
    line = problem("http://mlflow.invalid:5000")
    assert "through the proxy http://me:***@127.0.0.1:9" in line and "hunter2" not in line
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Destination(proxy.address, "", "new").check()


def test_a_token_goes_along(web: Callable[..., WebServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token-of-mine")
    server = web(404, UNKNOWN)
    Destination(server.address, "", "new").check()
    assert server.authorizations == ["Bearer token-of-mine"]


@pytest.mark.parametrize("uri", ["databricks", "databricks://nobody", "uc", "foo://bar", "http:", "sqlite://"])
def test_a_uri_that_cannot_work_is_refused_in_a_line(uri: str) -> None:
    assert problem(uri).startswith("tracking.uri: got ")


def test_a_password_in_the_address_is_not_shown() -> None:
    assert "hunter2" not in problem("http://me:hunter2@127.0.0.1:9")


# -- databases


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with all of MLflow's tables, to be copied: making one takes seconds."""
    database = tmp_path_factory.mktemp("database") / "mlflow.db"
    mlflow_database.make(database)
    database.rename(database.with_suffix(".empty"))  # whose copies are no copies of a store's database
    return database.with_suffix(".empty")


def tracked(store: Path, empty_database: Path | None = None) -> Job:
    """The tiny job as the tracker sees it, with the database of its store."""
    if empty_database is not None:
        store.mkdir(parents=True)
        shutil.copy(empty_database, store / OWN)
    return Job(store, f"sqlite:///{store}/{OWN}", "graftwork")


def track(job: Job, *steps: str) -> None:
    tracker = job.opened()
    for step in steps:
        tracker.started(job.step(step))
        job.end(tracker, step)
    job.finish(tracker)
    assert not waiting(job.store, job.record.run), job.said


def pictures(store: Path, tmp_path: Path) -> dict[str, set[str]]:
    """The files of each run, downloaded as MLflow's user interface does."""
    client = MlflowClient(f"sqlite:///{store}/{OWN}")
    found = {}
    for name, run in all_runs(client).items():
        names = {file.path for file in client.list_artifacts(run.info.run_id)}
        for path in names:
            target = tmp_path / "downloads"
            target.mkdir(exist_ok=True)
            assert Path(client.download_artifacts(run.info.run_id, path, str(target))).is_file()
        found[name] = names
    return found


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", ["copied", "moved", "moved, and its place is somebody else's now", "linked"])
def test_a_store_elsewhere_keeps_its_pictures_to_itself(tmp_path: Path, empty_database: Path, how: str) -> None:
    old, new = tmp_path / "old", tmp_path / "a new place" / "store"
    first = tracked(old, empty_database)
    track(first, "features")
    new.parent.mkdir()
    if how == "linked":
        new.symlink_to(old)
    elif how == "copied":
        shutil.copytree(old, new)
    else:
        old.rename(new)
    if how.endswith("now"):
        old.write_text("not a folder")
    before = files(old)

    again = tracked(new)
    again.record.name = "tiny"
    track(again, "features", "finetune")
    assert pictures(new, tmp_path)["features"] == pictures(new, tmp_path)["finetune"] == {"loss.png"}
    assert pictures(new, tmp_path)[again.record.run] >= {"job.json", "results.json"}
    if how == "linked":
        assert pictures(old, tmp_path)["finetune"] == {"loss.png"}
    else:
        assert files(old) == before and old.exists() == (how != "moved")


def test_a_finished_run_in_a_moved_store_shows_its_pictures_after_one_look(
    tmp_path: Path, empty_database: Path
) -> None:
    track(tracked(tmp_path / "old", empty_database), "features")
    (tmp_path / "old").rename(tmp_path / "new")
    destination(job().tracking, Store(str(tmp_path / "new")), None).relocate()
    assert pictures(tmp_path / "new", tmp_path)["features"] == {"loss.png"}
    places = change(tmp_path / "new" / OWN, "SELECT artifact_location FROM experiments")
    places += change(tmp_path / "new" / OWN, "SELECT artifact_uri FROM runs")
    assert len(places) > 3
    assert all(place.startswith((tmp_path / "new" / "mlflow-files").as_uri()) for (place,) in places)


def test_an_experiment_with_a_place_of_its_own_keeps_it(tmp_path: Path, empty_database: Path) -> None:
    database = tmp_path / OWN
    shutil.copy(empty_database, database)
    client = MlflowClient(f"sqlite:///{database}")
    client.create_experiment("mine", artifact_location="s3://bucket/mlflow-files")
    client.create_experiment("his", artifact_location=(tmp_path / "elsewhere").as_uri())
    mlflow_database.relocate(database)
    places = {one.name: one.artifact_location for one in client.search_experiments()}
    assert places["mine"] == "s3://bucket/mlflow-files" and places["his"] == (tmp_path / "elsewhere").as_uri()


MAKE = """
import sys
from pathlib import Path
from mlflow import MlflowClient
from graftwork.pipeline.tracking import mlflow_database
mlflow_database.make(Path(sys.argv[1]))
client = MlflowClient(f"sqlite:///{sys.argv[1]}")
print(client.create_run("0").info.run_id)
"""


def test_two_processes_that_begin_a_database_at_once_both_have_it(tmp_path: Path) -> None:
    database = tmp_path / "store" / OWN
    makers = [
        subprocess.Popen([sys.executable, "-c", MAKE, str(database)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    ends = [maker.communicate(timeout=300) for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0], ends
    assert len(MlflowClient(f"sqlite:///{database}").search_runs(["0"])) == 2
    assert [path.name for path in database.parent.iterdir()] == [OWN]


def deleted(database: Path, experiment: str = "graftwork") -> MlflowClient:
    client = MlflowClient(f"sqlite:///{database}")
    client.delete_experiment(client.create_experiment(experiment))
    return client


def test_a_deleted_experiment_is_refused_with_the_way_to_restore_it(tmp_path: Path, empty_database: Path) -> None:
    database = tmp_path / OWN
    shutil.copy(empty_database, database)
    client = deleted(database)
    there = destination(job().tracking, Store(str(tmp_path)), None)
    with pytest.raises(SpecError) as caught:
        there.check()
    (line,) = caught.value.lines
    assert "whose experiment 'graftwork' is deleted; accepted: " in line
    command = f"MLFLOW_TRACKING_URI=sqlite:///{database} mlflow experiments restore --experiment-id 1"
    assert line.endswith(command)
    assert api.untracked(api.plan(str(TINY), [f"store={tmp_path}"])) == [line]
    client.restore_experiment("1")
    there.check()


@pytest.mark.parametrize("experiment", ["deleted", "out of date"])
def test_figures_wait_for_a_database_that_takes_none_and_all_are_delivered(
    tmp_path: Path, empty_database: Path, experiment: str
) -> None:
    one = tracked(tmp_path / "store", empty_database)
    database = tmp_path / "store" / OWN
    if experiment == "deleted":
        client, words = deleted(database), "has the experiment 'graftwork' as deleted"
    else:
        words = "out-of-date database schema"
        (revision,) = change(database, "SELECT version_num FROM alembic_version")
        change(database, "UPDATE alembic_version SET version_num = '0'")
    tracker = one.opened()
    tracker.started(one.step("features"))
    one.end(tracker, "features")
    until(lambda: one.said)
    tracker.outbox.close(30)
    (told, missing) = [line for line in one.said if words in line]
    assert "the job goes on" in told and f"deliver them: graft resume {one.record.run}" in missing
    assert waiting(one.store, one.record.run).entries and not waiting(one.store, one.record.run).refused

    record.save(one.store, one.record)
    status = CliRunner().invoke(app, ["status", one.record.run, "--store", str(tmp_path / "store")]).stdout
    assert "MLflow lacks " in status and f"deliver them: {one.record.resume_command()}" in status

    if experiment == "deleted":
        client.restore_experiment("1")
    else:
        change(database, f"UPDATE alembic_version SET version_num = '{revision[0]}'")
    one.finish(one.opened())
    assert not waiting(one.store, one.record.run)
    assert pictures(tmp_path / "store", tmp_path)["features"] == {"loss.png"}


def test_files_of_a_step_whose_driver_died_hold_up_no_figures(tmp_path: Path, empty_database: Path) -> None:
    one, place = tracked(tmp_path / "store", empty_database), tmp_path / "place"
    client = MlflowClient(one.uri)
    client.create_experiment("graftwork", artifact_location=(place / "files").as_uri())
    place.write_text("not a folder")
    one.end_without_driver("features")
    one.finish(one.opened())
    assert all_runs(client)[one.record.run].info.status == "FINISHED"
    assert waiting(one.store, one.record.run).refused and not waiting(one.store, one.record.run).entries

    place.unlink()
    one.tracker().close()
    assert not waiting(one.store, one.record.run)
    run = all_runs(client)["features"].info
    assert run.status == "FINISHED" and [file.path for file in client.list_artifacts(run.run_id)] == ["loss.png"]


def change(database: Path, statement: str) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(database)) as connection, connection:
        return connection.execute(statement).fetchall()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / OWN).write_text("not a database " * 100)
    assert "which cannot be used: file is not a database" in problem(f"sqlite:///{tmp_path}/{OWN}")
    assert "which cannot be made" in problem(f"sqlite:///{tmp_path}/{OWN}/nope/x.db")


def test_a_database_that_another_process_writes_to_is_not_refused(tmp_path: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, tmp_path / OWN)
    with closing(sqlite3.connect(tmp_path / OWN, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        Destination(f"sqlite:///{tmp_path}/{OWN}", OWN, "graftwork").check()


def test_nothing_of_a_database_in_the_making_is_left_by_a_kill(tmp_path: Path) -> None:
    database = tmp_path / "store" / OWN
    maker = subprocess.Popen([sys.executable, "-c", MAKE, str(database)], stdout=subprocess.PIPE)
    until(lambda: list(tmp_path.glob("store/.drafts/mlflow-*/mlflow.db")), 120)
    maker.kill()
    maker.wait()
    assert not database.exists()
