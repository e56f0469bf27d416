"""A driver killed in the middle of a step: what was done is kept, and what follows ends in the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import GRAFT, TINY, Finished, Graft, keys, states

SECONDS_TO_BEGIN = 180
SECONDS_TO_DIE = 2  # of Ray's processes, once their driver is gone


@pytest.mark.slow
def test_a_job_killed_in_distill_and_again_in_finetune_ends_in_the_same_bits(
    tiny: Finished, graft: Graft, tmp_path: Path
) -> None:
    store, found = tmp_path / ".graftwork", keys(tiny.outcome)
    partial = store / "partial"
    for step in ("features", "base", "classifier", "profile"):
        shutil.copytree(tiny.store / "artifacts" / found[step], store / "artifacts" / found[step])

    kill_when_saved(["run", str(TINY)], partial / found["distill/03.mha"] / "distill.safetensors.json", tmp_path)
    assert states(json.loads(graft("plan", str(TINY), "--json").stdout))["distill/03.mha"] == "partial"
    left = json.loads(graft("status", tiny.run, "--json").stdout)
    assert left["status"] == "lost" and "running" not in states(left).values()

    kill_when_saved(["resume", tiny.run], partial / found["finetune"] / "training.safetensors.json", tmp_path)
    between = states(json.loads(graft("plan", str(TINY), "--json").stdout))
    assert between["finetune"] == "partial" and between["distill/03.mha"] == "cached"
    made = {
        step: (store / "artifacts" / found[step] / "manifest.json").stat().st_mtime_ns
        for step in found
        if between[step] == "cached"
    }

    done = graft("resume", tiny.run, "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["status"] == "finished"
    for step, when in made.items():
        assert (store / "artifacts" / found[step] / "manifest.json").stat().st_mtime_ns == when, f"{step} ran again"
    first_point = next(line for line in done.stderr.splitlines() if "] finetune: " in line and "/40" in line)
    assert int(first_point.split("finetune: ")[1].split("/")[0]) >= 5  # it went on from a checkpoint
    for step, file in (
        ("distill/01.mha", "scion.safetensors"),
        ("distill/03.mha", "scion.safetensors"),
        ("finetune", "model.safetensors"),
        ("finetune/random_init", "model.safetensors"),
        ("evaluate/stage2", "classifier.npz"),
    ):
        ours, theirs = (place / "artifacts" / found[step] / file for place in (store, tiny.store))
        assert ours.read_bytes() == theirs.read_bytes(), f"{step} differs"
    for row, columns in tiny.outcome["results"].items():
        assert outcome["results"][row]["distance"] == columns["distance"]
        assert outcome["results"][row]["agreement"] == columns["agreement"]


def kill_when_saved(arguments: list[str], checkpoint: Path, cwd: Path) -> None:
    """Start graft, SIGKILL it as soon as the checkpoint is there, and wait for its Ray processes to be gone."""
    driver = subprocess.Popen([GRAFT, *arguments], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + SECONDS_TO_BEGIN
    while not checkpoint.exists():
        if time.monotonic() > deadline or driver.poll() is not None:
            pytest.fail(f"no {checkpoint.name} was saved; the driver ended with {driver.poll()}")
        time.sleep(0.01)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(SECONDS_TO_DIE)
