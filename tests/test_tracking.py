"""What stands in MLflow after a job: in the default SQLite file, and on a real server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.conftest import TINY, Finished, Graft, keys


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real `mlflow server` on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "server"
    folder.mkdir()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "files")),
        ],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("the MLflow server did not come up")
        yield address
    finally:
        process.terminate()
        process.wait(20)


def all_runs(client: MlflowClient) -> dict[str, Run]:
    experiment = client.get_experiment_by_name("graftwork")
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_the_database_holds_a_child_a_step_nested_by_site(tiny: Finished) -> None:
    runs = all_runs(MlflowClient(f"sqlite:///{tiny.store}/mlflow.db"))
    assert set(runs) == {tiny.run, "distill", *keys(tiny.outcome)}
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


def test_a_server_gets_the_same_as_the_database(tiny_copy: Finished, server: str, graft: Graft) -> None:
    done = graft(
        "run", str(TINY), "--json", "--set", f"tracking.uri={server}", "--set", "evaluate.sampler.guidance=1.25"
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    client = MlflowClient(server)
    runs = all_runs(client)
    sampled = {"evaluate", *(f"evaluate/{row}" for row in ("rootstock", "stage1", "stage2", "random_init"))}
    assert set(runs) == {outcome["run"], *sampled}
    job = runs[outcome["run"]]
    assert job.data.metrics["stage2.distance"] == outcome["results"]["stage2"]["distance"]
    assert job.data.tags["graftwork.made_by.finetune"] == tiny_copy.run  # a cached step points to the run that made it
    assert "quality-cost.png" in {file.path for file in client.list_artifacts(runs["evaluate"].info.run_id)}
