"""Drivers that share a store: each step is done once, whoever waits says for whom, and all finish."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.conftest import TINY, Driver, Finished, keys


def steps_done(*logs: str) -> list[str]:
    """The steps that the drivers say they did, once for each time."""
    lines = [line.split("] ", 1)[1] for log in logs for line in log.splitlines() if "] " in line]
    return sorted(line.split(":")[0] for line in lines if ": done" in line)


@pytest.mark.slow
def test_two_drivers_of_one_job_and_one_of_another_do_each_step_once(distilled: Path, tmp_path: Path) -> None:
    long = ("--set", "finetune.steps=200")  # enough to be paused on its way
    job = ("run", str(TINY), *long, "--set", "finetune.control=false")
    first = Driver(*job, cwd=tmp_path)
    first.wait_for(lambda: "] finetune: 2" in first.log.read_text(), "finetune")
    with first.paused():  # until the others have come
        second = Driver(*job, cwd=tmp_path)
        other = Driver(*job, "--set", "evaluate.samples=20", "--set", "name=other", cwd=tmp_path)
        second.wait_for(lambda: "waiting for" in second.log.read_text(), "waiting")
        other.wait_for(lambda: "finetune: waiting for" in other.log.read_text(), "waiting")
    ends = [driver.process.wait(600) for driver in (first, second, other)]
    logs = [driver.log.read_text() for driver in (first, second, other)]
    assert ends == [0, 0, 0], logs

    done = steps_done(*logs)
    assert [step for step in done if step.startswith("finetune")] == ["finetune"]
    rows = [f"evaluate/{row}" for row in ("rootstock", "stage1", "stage2")]
    assert [step for step in done if step.startswith("evaluate")] == sorted(["evaluate", *rows] * 2)
    (record,) = (distilled / "runs").glob("digits-tiny-*.json")
    assert f"waiting for {record.stem} (process {first.process.pid}" in logs[1]
    assert f"finetune: waiting for {record.stem}" in logs[2]
    assert list((distilled / "leases").iterdir()) == []
    assert json.loads(record.read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_driver_that_dies_is_taken_over_from_at_once_by_the_one_that_waits(
    tiny: Finished, distilled: Path, tmp_path: Path
) -> None:
    first = Driver("run", str(TINY), cwd=tmp_path)
    pointer = distilled / "partial" / keys(tiny.outcome)["finetune"] / "training.safetensors.json"
    first.wait_for(pointer.exists, "checkpoint")
    second = Driver("run", str(TINY), cwd=tmp_path)
    second.wait_for(lambda: "waiting for" in second.log.read_text(), "waiting")
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    second.wait_for(lambda: "] finetune: running" in second.log.read_text(), "take-over")
    assert second.process.wait(300) == 0
    ours, theirs = (
        store / "artifacts" / keys(tiny.outcome)["finetune"] / "model.safetensors" for store in (distilled, tiny.store)
    )
    assert ours.read_bytes() == theirs.read_bytes()
