"""The tiny job on a Ray cluster on loopback: a head without CPUs and two workers, a token, an MLflow server beside."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from mlflow import MlflowClient

from graftwork.pipeline.execution import remote
from graftwork.specs.reading.load import SpecError, load
from tests.conftest import GRAFT, ROOT, TINY, Finished, keys, states
from tests.loopback import LOOPBACK, LoopbackCluster
from tests.servers import mlflow_server
from tests.shadows import shadow

LOOPBACKS = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
SECRET = secrets.token_hex(16)  # stands for the credentials that nodes have in their environment


@dataclass(frozen=True)
class Site:
    """A cluster, an MLflow server and a store that all nodes share."""

    cluster: LoopbackCluster
    mlflow: str
    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def graft(
        self, *arguments: str, timeout: float = 600, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`graft ARGUMENTS --address ADDRESS`, by someone who has the token and nothing else."""
        here = self.folder / "elsewhere"  # a folder with a `models.py` of its own, as a checkout of DiT
        here.mkdir(exist_ok=True)
        shadow(here)
        env = {name: value for name, value in self.cluster.environment.items() if name not in self.cluster.given}
        env |= {"PYTHONPATH": str(ROOT)}  # the project is here, and not on the nodes
        return subprocess.run(
            [GRAFT, *arguments, "--address", self.cluster.address],
            cwd=here,
            env={**env, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        where = ("--set", f"store={self.store}", "--set", f"tracking.uri={self.mlflow}")
        return self.graft("submit", str(TINY), *where, *arguments)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    given = {"AWS_SECRET_ACCESS_KEY": SECRET, "MLFLOW_TRACKING_USERNAME": "graft", "MLFLOW_TRACKING_PASSWORD": SECRET}
    nodes = LoopbackCluster(workers=2, worker_cpus=1, environment=given)
    with mlflow_server(folder / "mlflow") as mlflow, nodes as cluster:
        yield Site(cluster, mlflow, folder)


@pytest.fixture(scope="module")
def sent(site: Site) -> tuple[str, str]:
    """The tiny job, sent and finished: its submission and what it printed."""
    done = site.submit("--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    submission, log = done.stdout.split("\n", 1)
    assert done.stderr == f"graft: follow it with: graft logs -f {submission} --address {site.cluster.address}\n"
    return submission, log


@contextmanager
def signed_in(site: Site) -> Iterator[None]:
    """In this process, too, the token is known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(site.cluster.token_file))
        yield


def status(site: Site, name: str) -> dict[str, Any]:
    shown = site.graft("status", name, "--json")
    assert shown.returncode == 0, shown.stderr
    found: dict[str, Any] = json.loads(shown.stdout)
    return found


def test_a_submitted_job_ends_in_the_figures_of_a_local_one(site: Site, sent: tuple[str, str], tiny: Finished) -> None:
    found = status(site, sent[0])
    assert (found["status"], found["run"], found["submissions"]) == ("finished", tiny.run, [sent[0]])
    assert set(states(found).values()) == {"done"}
    by_clock = {"ms_per_sample", "latency_ms", "peak_memory"}
    figures, local = (
        {row: {name: value for name, value in columns.items() if name not in by_clock} for row, columns in rows.items()}
        for rows in (found["results"], tiny.outcome["results"])
    )
    assert figures == local


def test_the_project_that_travelled_is_what_the_workers_run(site: Site) -> None:
    look = """
import ray
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1)
def where():
    import graftwork
    return graftwork.__file__
print(ray.get(where.remote()))
"""
    with signed_in(site), remote.staged(None) as folder:
        answer = remote.connect(site.cluster.address).ask(["python", "-c", look], folder)
    assert answer.code == 0 and "/working_dir_files/" in answer.stdout, answer


def test_what_it_prints_comes_here(site: Site, sent: tuple[str, str]) -> None:
    assert "finetune: done" in sent[1] and "stage2" in sent[1]
    assert site.graft("logs", sent[0]).stdout == sent[1]


def test_mlflow_has_the_run(site: Site, sent: tuple[str, str], tiny: Finished) -> None:
    client = MlflowClient(site.mlflow)
    experiment = client.get_experiment_by_name("graftwork")
    assert experiment is not None
    assert tiny.run in {run.info.run_name for run in client.search_runs([experiment.experiment_id])}


def test_status_lists_submissions_and_shows_the_steps_of_one(site: Site, sent: tuple[str, str]) -> None:
    (line,) = [line for line in site.graft("status").stdout.splitlines() if sent[0] in line]
    assert line.startswith("SUCCEEDED")
    shown = site.graft("status", sent[0])
    assert shown.returncode == 0 and "finetune" in shown.stdout and "agreement" in shown.stdout
    assert "graft-ask" not in site.graft("status", "--json").stdout  # the jobs that answered leave no trace


def test_compare_reads_the_store_of_the_cluster(site: Site, sent: tuple[str, str], tiny: Finished) -> None:
    (row,) = json.loads(site.graft("compare", sent[0], "--json").stdout)
    assert row["stage2.distance"] == tiny.outcome["results"]["stage2"]["distance"]
    (row,) = json.loads(site.graft("compare", tiny.run, "--store", str(site.store), "--json").stdout)
    assert row["run"] == tiny.run


def test_the_same_job_again_is_served_from_the_store(site: Site, sent: tuple[str, str]) -> None:
    done = site.submit("--follow")
    again = done.stdout.split("\n", 1)[0]
    assert done.returncode == 0 and again != sent[0], done.stderr
    assert re.search(r"\b(\d+) of \1 steps from the store", done.stdout)
    assert status(site, sent[0])["submissions"] == [sent[0], again]


def test_resume_is_a_submission_too(site: Site, sent: tuple[str, str]) -> None:
    resumed = site.graft("resume", sent[0])
    assert resumed.returncode == 0, resumed.stderr
    submission = resumed.stdout.strip()
    assert site.graft("logs", "-f", submission).returncode == 0
    assert submission in status(site, sent[0])["submissions"]


def test_a_running_job_stops_in_good_order_and_keeps_what_it_has(site: Site, sent: tuple[str, str]) -> None:
    submission = site.submit("--set", "seed=1", "--set", "weights.steps=3000").stdout.strip()
    deadline = time.monotonic() + 200
    while not re.search(r"base: \d+/3000", log := site.graft("logs", submission).stdout):
        assert time.monotonic() < deadline, log
    stopped = site.graft("stop", submission)
    assert stopped.returncode == 0 and "stopped in good order" in stopped.stdout, stopped.stdout + stopped.stderr
    found = status(site, submission)
    assert (found["status"], states(found)["base"]) == ("stopped", "pending")
    assert list((site.store / "partial" / keys(found)["base"]).iterdir())
    assert site.graft("stop", submission).returncode == 2  # it is not running


def test_a_job_that_cannot_run_there_says_why(site: Site) -> None:
    path = "/not/on/the/nodes"
    done = site.submit("--follow", "--set", f"data={{kind: image_folder, path: {path}, image_size: 16}}")
    assert done.returncode == 1 and f"data.path: got '{path}', no such folder" in done.stdout
    submission = done.stdout.split("\n", 1)[0]
    shown = site.graft("status", submission)
    assert shown.returncode == 2 and "no such run" in shown.stderr


def test_no_secret_is_in_anything_that_was_written(site: Site, sent: tuple[str, str]) -> None:
    files = [path for path in [*site.folder.rglob("*"), *site.cluster.folder.rglob("*")] if path.is_file()]
    files.remove(site.cluster.token_file)
    texts = {str(path): path.read_bytes() for path in files}
    assert len(texts) > 50
    with signed_in(site):
        jobs = remote.connect(site.cluster.address).client.list_jobs()
    texts["the cluster's list"] = "".join(map(str, jobs)).encode()
    for secret in (SECRET, site.cluster.token):
        assert [name for name, text in texts.items() if secret.encode() in text] == []


def test_what_we_start_listens_on_loopback_only(site: Site, sent: tuple[str, str]) -> None:
    for node in site.cluster.nodes.values():
        assert node.listening() and node.listening() <= LOOPBACKS


def test_a_local_run_listens_on_loopback_only() -> None:
    look = """
import psutil
import ray
from graftwork.cluster.session.runtime import session
with session([], min_parallel=1):
    ray.get(ray.remote(num_cpus=0)(lambda: None).remote())  # there is a worker
    me = psutil.Process()
    for one in (me, *me.children(recursive=True)):
        print(*(s.laddr.ip for s in one.net_connections("tcp") if s.status == psutil.CONN_LISTEN), sep="\\n")
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    looked = subprocess.run(
        [sys.executable, "-c", look], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert looked.returncode == 0, looked.stderr
    assert {*looked.stdout.split()} and {*looked.stdout.split()} <= LOOPBACKS


ON_THE_CLUSTER = """
import ray
from graftwork.cluster.session.runtime import session
@ray.remote(num_cpus=1)
def look():
    import sys, graftwork.stages.data.sources
    return sorted({"cluster", "models", "pipeline", "specs", "stages"} & {*sys.modules}), sys.path
with session([], min_parallel=1):
    print(ray.get(look.remote()))
"""


def test_a_driver_on_the_cluster_needs_the_token_alone_and_imports_nothing_of_its_folder(site: Site) -> None:
    secret = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN"}
    env = {name: value for name, value in site.cluster.driver_environment.items() if name not in secret}
    env |= {"PYTHONPATH": str(ROOT), "HOME": str(site.folder)}
    here = site.folder / "beside"
    here.mkdir()
    shadow(here)
    refused = subprocess.run([GRAFT, "run", str(TINY)], cwd=here, env=env, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and not (here / ".graftwork").exists()
    assert "RAY_ADDRESS: got '" in refused.stderr and "which asks for a token; accepted: " in refused.stderr
    env |= {"RAY_AUTH_TOKEN": site.cluster.token}
    (here / "script.py").write_text(ON_THE_CLUSTER)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=here, env=env, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("([], [") and str(here) not in done.stdout


@pytest.mark.parametrize("token", ["", "0" * 64])
def test_without_the_right_token_one_line_says_so(site: Site, token: str, tmp_path: Path) -> None:
    no_file = {"RAY_AUTH_TOKEN_PATH": "", "HOME": str(tmp_path)}
    refused = site.graft("status", environment={**no_file, "RAY_AUTH_TOKEN": token})
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 2 and ("refuses the token" if token else "asks for a token") in line
    assert "RAY_AUTH_TOKEN" in line and not (token and token in line)


def test_an_unknown_submission_is_one_line(site: Site) -> None:
    for command in ("logs", "status", "resume"):
        refused = site.graft(command, "nobody")
        (line,) = refused.stderr.splitlines()
        assert refused.returncode == 2 and "got 'nobody', no such submission" in line


@contextmanager
def other_server(answer: bytes) -> Iterator[str]:
    """A server on loopback that says the same to everyone."""
    with socket.create_server((LOOPBACK, 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    with server.accept()[0] as caller:
                        caller.recv(65536)
                        caller.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://{LOOPBACK}:{server.getsockname()[1]}"


OK = b"HTTP/1.0 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (OK + b'{"ray_version": "1.13.0"}', f"a cluster with Ray 1.13.0; accepted: Ray {ray.__version__}"),
        (OK + b'{"version": "another server"}', "is not a Ray dashboard"),
        (OK + b"<html>", "is not a Ray dashboard"),
        (b"SSH-2.0-OpenSSH\r\n", "is not a Ray dashboard"),
        (b"HTTP/1.0 302 Found\r\nLocation: http://nobody.invalid/login\r\n\r\n", "is not a Ray dashboard"),
        (b"HTTP/1.0 403 Forbidden\r\n\r\n", "refuses the token that is here"),
    ],
    ids=["old", "JSON", "HTML", "SSH", "redirection", "403"],
)
def test_another_ray_and_other_servers_are_one_line_each(
    answer: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    with other_server(answer) as address, pytest.raises(SpecError) as refused:
        remote.connect(address)
    (line,) = refused.value.lines
    assert said in line and address in line and SECRET not in line


@pytest.mark.parametrize("host", [f"{LOOPBACK}:1", "nobody.invalid:8265"])
def test_a_head_that_cannot_be_reached_is_one_line(host: str) -> None:
    with pytest.raises(SpecError) as refused:
        remote.connect(f"http://{host}")
    (line,) = refused.value.lines
    assert f"got http://{host}, which does not answer" in line


@pytest.mark.parametrize(
    "odd", [f"{SECRET} {SECRET}", f"{SECRET}\nX: y", f"{SECRET}\u00e9"], ids=["space", "line", "accent"]
)
def test_a_token_that_is_none_is_refused_and_not_shown(odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", odd)
    with pytest.raises(SpecError) as refused:
        remote.connect("http://nobody.invalid:8265")
    assert "token" in str(refused.value) and SECRET not in str(refused.value)


def test_nobody_without_a_token_is_told_where_it_may_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("RAY_AUTH_TOKEN", ""), ("RAY_AUTH_TOKEN_PATH", ""), ("HOME", str(tmp_path))):
        monkeypatch.setenv(name, value)
    with other_server(b"HTTP/1.0 401 Unauthorized\r\n\r\n") as address, pytest.raises(SpecError) as refused:
        remote.connect(address)
    assert "asks for a token; accepted: the cluster's token in RAY_AUTH_TOKEN" in str(refused.value)
    assert f"{tmp_path}/.ray/auth_token" in str(refused.value)


def test_a_token_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(SpecError, match=r"RAY_AUTH_TOKEN_PATH: got .*token', which cannot be read"):
        remote.connect("http://nobody.invalid:8265")


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "http://", "http://graft:hunter2@head:8265"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(SpecError) as refused:
        remote.connect(address)
    assert "accepted" in str(refused.value) and "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("store=runs", "store: got 'runs', a folder of this machine"),
        ("store=file://runs", "a folder of this machine"),
        ("store=s3://bucket/prefix", "tracking.uri: got nothing"),
        ("tracking.uri=sqlite:///runs.db", "tracking.uri: got 'sqlite:///runs.db', a file of this machine"),
        ("tracking.uri=http://me:hunter2@host:5000", "tracking.uri: got 'http://me:***@host:5000'"),
    ],
)
def test_places_that_the_cluster_would_lose_are_refused_before_anything_is_sent(override: str, said: str) -> None:
    with pytest.raises(SpecError) as refused:
        remote.submit(TINY, "http://nobody.invalid:8265", ["store=/shared", override])
    assert said in str(refused.value) and "hunter2" not in str(refused.value)


@pytest.mark.parametrize("store", ["/shared/graft", "file:///shared/graft"])
def test_a_folder_that_all_nodes_share_is_accepted(store: str) -> None:
    assert remote.homeless(load(TINY, [f"store={store}"])) == []
    assert remote.homeless(load(TINY, [f"store={store}", "tracking.uri=sqlite:////shared/mlflow.db"])) == []


def test_a_uri_of_any_store_is_accepted_with_a_server_beside_it() -> None:
    for store in ("s3://bucket/prefix", "abfs://container@account.dfs.core.windows.net/prefix"):
        assert remote.homeless(load(TINY, [f"store={store}", "tracking.uri=http://host:5000"])) == []


def test_a_secret_stays_a_placeholder_on_its_way() -> None:
    job = load(TINY, ["store=/shared", "tracking.uri=http://me:${PASSWORD}@host:5000"])
    assert remote.homeless(job) == []
    with remote.staged(job) as folder:
        assert load(folder / remote.JOB_FILE).tracking.uri == job.tracking.uri
    with pytest.raises(SpecError, match=r"--store: got .*me:\*\*\*@host"):
        remote.store_of(None, "run", "ftp://me:hunter2@host/store")


def test_what_travels_is_the_project_and_the_job_as_it_was_resolved(tmp_path: Path) -> None:
    shutil.copy(TINY, tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"extends": TINY.name, "seed": 7}))
    job = load(tmp_path / "mine.yaml", ["store=/shared"])
    with remote.staged(job) as folder:
        assert load(folder / remote.JOB_FILE) == job
        assert {path.name for path in folder.iterdir()} == {"graftwork", remote.JOB_FILE}
        assert not list(folder.rglob("__pycache__"))
