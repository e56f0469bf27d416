"""A job whose processes are killed at random ends in the bits of one that was left alone, and does nothing twice.

GRAFT_CHAOS_KILLS=100 GRAFT_CHAOS_SEED=7 pytest -m chaos -s
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from graftwork.pipeline.store.artifacts import Store
from tests.chaos.rack import BUCKET, Rack
from tests.conftest import Finished, keys

KILLS = int(os.environ.get("GRAFT_CHAOS_KILLS", "10"))
SEED = int(os.environ.get("GRAFT_CHAOS_SEED", str(time.time_ns() % 2**31)))
SECONDS_BETWEEN = (1.0, 20.0)
SECONDS_TO_A_TARGET = (0.2, 3.0)  # between two looks whether there is anything to hit
SECONDS_A_KILL, SECONDS_A_ROUND = 90, 900  # in which all must be over, on a slow machine
FILES = {"scion.safetensors", "model.safetensors", "classifier.safetensors", "plan.json"}
FILES |= {"classifier.npz", "grid.png"}  # sums over all samples, and the first of them
TRAININGS = ("base", "finetune", "finetune/random_init")


class Witness:
    """Sees that what is committed stays as it is, and that training never falls behind a checkpoint."""

    def __init__(self, url: str, found: dict[str, str]) -> None:
        self.store, self.keys = Store(url), found
        self.committed: dict[str, str] = {}  # step -> its manifest
        self.saved: dict[str, float] = {}  # training -> step of its last checkpoint

    def look(self) -> None:
        for step, key in self.keys.items():
            manifest = self.store.read(f"artifacts/{key}/manifest.json")
            if step in self.committed:
                assert manifest == self.committed[step], f"{step} was committed twice"
            elif manifest is not None:
                self.committed[step] = manifest
        for step in TRAININGS:
            if step in self.committed:
                continue
            path = self.store.partial(self.keys[step]).load("training.safetensors")
            if path is not None:
                done = load_file(path)["progress"][0].item()
                assert done >= self.saved.get(step, 0), f"{step} fell back to step {done}"
                self.saved[step] = done


@pytest.mark.chaos
@pytest.mark.timeout(SECONDS_A_ROUND + SECONDS_A_KILL * KILLS)
def test_a_job_that_is_killed_at_random_ends_in_the_same_bits(
    tiny: Finished, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"\nchaos: {KILLS} kills, seed {SEED}")
    draws, killed, starts, found = random.Random(SEED), Counter[str](), 0, keys(tiny.outcome)
    with Rack(tmp_path, s3_server, draws) as rack:
        for name, value in rack.given.items():
            if name.startswith("AWS_"):
                monkeypatch.setenv(name, value)
        Store(f"s3://{BUCKET}").fs.mkdir(BUCKET)
        witness = Witness(rack.store, found)
        pause, what = SECONDS_BETWEEN, draws.choice(list(rack.faults()))
        while True:
            if rack.driver is None or rack.ended() not in (None, 0):
                rack.start_driver()
                starts += 1
            wait_for_its_end(rack, draws.uniform(*pause))
            witness.look()
            if rack.ended() == 0:
                assert_undisturbed(rack, tiny, witness)
                if sum(killed.values()) >= KILLS:
                    break
                rack.round, rack.driver = rack.round + 1, None
                witness = Witness(rack.store, found)
                continue
            if sum(killed.values()) >= KILLS:
                continue
            if (hit := rack.faults()[what]()) is None:
                pause = SECONDS_TO_A_TARGET  # until it has been had, so that each fault has its share
                continue
            killed[what] += 1
            print(f"chaos: {sum(killed.values())}. killed {what}: {hit}", flush=True)
            witness.look()
            pause, what = SECONDS_BETWEEN, draws.choice(list(rack.faults()))
    print(f"chaos: {dict(killed)}; {rack.round + 1} jobs finished, {starts} drivers were started")


def wait_for_its_end(rack: Rack, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while rack.ended() is None and time.monotonic() < deadline:
        time.sleep(0.2)


def assert_undisturbed(rack: Rack, tiny: Finished, witness: Witness) -> None:
    """Weights, samples and figures are those of the job that was left alone; MLflow has nothing twice."""
    log = rack.log.read_text()
    assert "Traceback" not in log, log
    assert witness.committed.keys() == witness.keys.keys()
    for step, key in witness.keys.items():
        folder = witness.store.artifact(key).path()
        for path in sorted((tiny.store / "artifacts" / key).iterdir()):
            if path.name in FILES:
                assert (folder / path.name).read_bytes() == path.read_bytes(), f"{step}: {path.name} differs"
    assert witness.store.names("leases") == []
    client = MlflowClient(rack.mlflow.address)
    experiment = client.get_experiment_by_name(f"round{rack.round}")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    names = Counter(run.info.run_name for run in runs)
    assert set(names.values()) == {1}, names
    for run in runs:
        for metric in run.data.metrics:
            points = [point.step for point in client.get_metric_history(run.info.run_id, metric)]
            assert len(points) == len(set(points)), f"{run.info.run_name}: {metric} has {sorted(points)}"
