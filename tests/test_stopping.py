"""A job that is asked to stop saves what it has, leaves no process behind, and ends in the same bits when resumed."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import TINY, Driver, Graft, keys


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    _, left = psutil.wait_procs(processes, timeout=5)
    return left


# Long enough to be stopped on its way, and without a checkpoint of its own accord.
LONG = (
    *("finetune.steps=200", "finetune.checkpoint_every=10000", "finetune.control=false"),
    *("evaluate.samples=20", "evaluate.rows=[stage2]"),
)
JOB = [str(TINY), *(word for setting in LONG for word in ("--set", setting))]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_a_checkpoint_from_which_the_job_ends_in_the_same_bits(
    distilled: Path, graft: Graft, tmp_path: Path, number: int, code: int
) -> None:
    key = keys(json.loads(graft("plan", *JOB, "--json").stdout))["finetune"]
    driver = Driver("run", *JOB, cwd=tmp_path)
    driver.wait_for(lambda: "] finetune: 2" in driver.log.read_text(), "progress")
    processes = driver.family()
    driver.signal(number)
    ended, log = driver.end()
    assert ended == code, log
    resume = next(line for line in log.splitlines() if line.startswith("graft: resume with: graft resume "))
    assert "Traceback" not in log
    assert alive(processes) == []
    assert (distilled / "partial" / key / "training.safetensors.json").exists()

    if number == signal.SIGINT:  # which saves in the same way
        return
    done = graft("resume", resume.split()[-1])
    assert done.returncode == 0, done.stderr
    first_point = next(line for line in done.stderr.splitlines() if "] finetune: " in line and "/200" in line)
    assert int(first_point.split("finetune: ")[1].split("/")[0]) >= 20  # it went on from where it was stopped
    straight = tmp_path / "straight"
    shutil.copytree(distilled / "artifacts", straight / "artifacts", ignore=lambda *_: [key])
    undisturbed = graft("run", *JOB, "--set", f"store={straight}")
    assert undisturbed.returncode == 0, undisturbed.stderr
    ours, theirs = (store / "artifacts" / key / "model.safetensors" for store in (distilled, straight))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(distilled: Path, tmp_path: Path) -> None:
    driver = Driver("run", *JOB, cwd=tmp_path)
    driver.wait_for(lambda: "] finetune: running" in driver.log.read_text(), "finetune")
    processes = driver.family()
    driver.signal(signal.SIGINT)
    time.sleep(0.5)
    driver.signal(signal.SIGINT)
    ended, log = driver.end()
    assert ended == 130 and "interrupted" in log and "Traceback" not in log
    assert alive(processes) == []


@pytest.mark.slow
def test_graft_stop_reaches_a_run_through_its_store(distilled: Path, graft: Graft, tmp_path: Path) -> None:
    driver = Driver("run", *JOB, cwd=tmp_path)
    driver.wait_for(lambda: "] finetune: running" in driver.log.read_text(), "finetune")
    asked = graft("stop", "digits-tiny")
    assert asked.returncode == 0
    run = asked.stdout.split(":")[0]
    ended, log = driver.end()
    assert ended == 143 and "stopped by graft stop" in log
    assert json.loads((distilled / "runs" / f"{run}.json").read_text())["status"] == "stopped"
    again = graft("stop", run)
    assert again.returncode == 2 and "not running" in again.stderr
