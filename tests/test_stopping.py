"""A job that is asked to stop saves what it has, leaves no process behind, and ends in the same bits when resumed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import TINY, Driver, Finished, Graft, keys


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    _, left = psutil.wait_procs(processes, timeout=5)
    return left


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
        pytest.param(signal.SIGINT, 130, id="Ctrl-C", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_a_checkpoint_and_the_resumed_job_ends_in_the_same_bits(
    tiny: Finished, distilled: Path, graft: Graft, tmp_path: Path, number: int, code: int
) -> None:
    key = keys(tiny.outcome)["finetune"]
    job = [str(TINY), "--set", "finetune.checkpoint_every=1000"]  # which no regular checkpoint would come of
    driver = Driver("run", *job, cwd=tmp_path)
    driver.wait_for(lambda: "] finetune: 1" in driver.log.read_text(), "progress")
    processes = driver.family()
    driver.signal(number)
    ended, log = driver.end()
    assert ended == code, log
    assert f"graft: resume with: graft resume {tiny.run}" in log and "Traceback" not in log
    assert alive(processes) == []
    assert (distilled / "partial" / key / "training.safetensors.json").exists()

    if number == signal.SIGTERM:
        done = graft("resume", tiny.run, "--json")
        assert done.returncode == 0, done.stderr
        first_point = next(line for line in done.stderr.splitlines() if "] finetune: " in line and "/40" in line)
        assert int(first_point.split("finetune: ")[1].split("/")[0]) > 1  # it went on from where it was stopped
        ours, theirs = (store / "artifacts" / key / "model.safetensors" for store in (distilled, tiny.store))
        assert ours.read_bytes() == theirs.read_bytes()
        for row, columns in json.loads(done.stdout)["results"].items():
            assert columns["distance"] == tiny.outcome["results"][row]["distance"]


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(distilled: Path, tmp_path: Path) -> None:
    driver = Driver("run", str(TINY), cwd=tmp_path)
    driver.wait_for(lambda: "] finetune: running" in driver.log.read_text(), "finetune")
    processes = driver.family()
    driver.signal(signal.SIGINT)
    time.sleep(0.5)
    driver.signal(signal.SIGINT)
    ended, log = driver.end()
    assert ended == 130 and "interrupted" in log and "Traceback" not in log
    assert alive(processes) == []


@pytest.mark.slow
def test_graft_stop_reaches_a_run_through_its_store(
    tiny: Finished, distilled: Path, graft: Graft, tmp_path: Path
) -> None:
    driver = Driver("run", str(TINY), cwd=tmp_path)
    driver.wait_for(lambda: "] finetune: running" in driver.log.read_text(), "finetune")
    asked = graft("stop", tiny.run)
    assert asked.returncode == 0 and tiny.run in asked.stdout
    ended, log = driver.end()
    assert ended == 143 and "stopped by graft stop" in log
    assert json.loads((distilled / "runs" / f"{tiny.run}.json").read_text())["status"] == "stopped"
    again = graft("stop", tiny.run)
    assert again.returncode == 2 and "not running" in again.stderr
