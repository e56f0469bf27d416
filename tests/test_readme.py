"""What the documentation shows works: its operator, metric and stage, in two places each, in a copy of the project."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, TINY, Finished, keys

COPIED = ("graftwork", "specs", "models", "cluster", "stages", "pipeline", "tests", "examples", "pyproject.toml")


@pytest.fixture(scope="module")
def code() -> tuple[str, str]:
    """The two blocks under "Adding an operator"."""
    spec, module = blocks("operators.md", "## Adding an operator")
    return spec, module


def blocks(page: str, title: str) -> list[str]:
    """Return the blocks of Python under a title: of a spec, if there are two, and of a module."""
    section = (ROOT / "docs" / page).read_text().split(title)[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory, code: tuple[str, str]) -> Path:
    """The project with the operator, the metric and the stage in it."""
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    specs = folder / "specs" / "operators.py"
    before, listed = specs.read_text().split("Operator = Annotated[")
    specs.write_text(f"{before}{code[0]}\n\nOperator = Annotated[Mean | {listed.lstrip()}")
    (folder / "models" / "operators" / "mean.py").write_text(code[1])
    spec, judge = blocks("metrics.md", "## Adding a metric")
    specs = folder / "specs" / "metrics.py"
    before, after = specs.read_text().split("METRICS: dict")
    listed = after.replace("ClassifierMetric,", "ClassifierMetric, BrightnessMetric,", 1)
    specs.write_text(f"{before}{spec}\n\nMETRICS: dict{listed}")
    (folder / "stages" / "evaluation" / "metrics" / "brightness.py").write_text(judge)
    (stage,) = blocks("architecture.md", "## Adding a stage")
    specs = folder / "specs" / "resources.py"
    specs.write_text(specs.read_text().replace('("reference", "evaluate"),', '("reference", "evaluate", "balance"),'))
    (folder / "stages" / "catalog" / "balance.py").write_text(stage)
    return folder


def python(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in the copy, whose packages come before the installed ones."""
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )


def test_an_operator_takes_under_forty_lines(code: tuple[str, str]) -> None:
    assert sum(len(block.strip().splitlines()) for block in code) < 40


def test_the_operator_of_the_readme_passes_the_conformance_tests(copy: Path) -> None:
    done = python(copy, "-m", "pytest", "tests/test_operators.py", "-k", "Mean or mean", "-v", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.findall(r"::(\w+)\[.*[Mm]ean.*\] PASSED", done.stdout)
    assert len(passed) > 10 and any("reach" in name for name in passed) and any("flops" in name for name in passed)


def test_the_operator_of_the_readme_can_be_asked_for(copy: Path) -> None:
    main = "from graftwork.pipeline.cli.app import app; app()"
    wish = "graft.0.operator.kind=mean"
    done = python(copy, "-c", main, "plan", "examples/digits-tiny.yaml", "--set", wish)
    assert done.returncode == 0, done.stderr
    assert "distill/01.mha" in done.stdout and "operators after" in done.stdout


def test_the_conformance_tests_catch_an_operator_that_is_not_what_it_says(copy: Path) -> None:
    specs = copy / "specs" / "operators.py"
    text = specs.read_text()
    specs.write_text(text.replace("return 2 * place.num_tokens * place.width**2", "return place.num_tokens"))
    try:
        done = python(copy, "-m", "pytest", "tests/test_operators.py", "-k", "(Mean or mean) and flops", "-q")
        assert done.returncode == 1 and "flops" in done.stdout
    finally:
        specs.write_text(text)


def test_they_took_two_places_each(copy: Path) -> None:
    def files(root: Path) -> dict[str, bytes]:
        folders = (root / name for name in ("specs", "models", "cluster", "stages", "pipeline"))
        return {str(path.relative_to(root)): path.read_bytes() for one in folders for path in one.rglob("*.py")}

    before, after = files(ROOT), files(copy)
    assert sorted(name for name in after if after[name] != before.get(name)) == [
        "models/operators/mean.py",
        "specs/metrics.py",
        "specs/operators.py",
        "specs/resources.py",
        "stages/catalog/balance.py",
        "stages/evaluation/metrics/brightness.py",
    ]


@dataclass(frozen=True)
class Extended:
    """A run of the tiny job with the metric and the stage, on a store that had the rest of its steps."""

    store: Path
    outcome: dict[str, Any]
    told: str


@pytest.fixture(scope="module")
def extended(copy: Path, tiny: Finished, tmp_path_factory: pytest.TempPathFactory) -> Extended:
    store = tmp_path_factory.mktemp("extended") / ".graftwork"
    shutil.copytree(tiny.store, store, ignore=shutil.ignore_patterns("mlflow*"))
    main = "from graftwork.pipeline.cli.app import app; app()"
    wishes = ["evaluate.metrics=[classifier, brightness]", "evaluate.rows=[rootstock]", "evaluate.keep_samples=true"]
    wishes += [f"store={store}", "resources.balance.cpu=0.5"]
    options = [part for wish in wishes for part in ("--set", wish)]
    done = python(copy, "-c", main, "run", str(TINY), "--json", *options)
    assert done.returncode == 0, done.stderr
    return Extended(store, json.loads(done.stdout), done.stderr)


def test_the_stage_has_its_step_and_tells_what_it_notes(extended: Extended) -> None:
    key = keys(extended.outcome)
    counts = json.loads((extended.store / "artifacts" / key["balance"] / "balance.json").read_text())
    meta = json.loads((extended.store / "artifacts" / key["features"] / "meta.json").read_text())
    assert len(counts) == len(meta["classes"]) and sum(counts) == meta["num_training"]
    assert f"a class has {min(counts)} training images only" in extended.told


def test_the_metric_is_measured_for_every_row(extended: Extended, tiny: Finished) -> None:
    outcome = extended.outcome
    assert outcome["results"]["heldout"]["brightness_error"] > 0 and outcome["results"]["heldout"]["dark"] < 1
    key = keys(outcome)
    samples = np.load(extended.store / "artifacts" / key["evaluate/rootstock"] / "samples.npy")
    with np.load(extended.store / "artifacts" / key["reference/brightness"] / "brightness.npz") as reference:
        expected = abs(samples.mean((1, 2, 3)).mean() - reference["mu"][0])
    found = outcome["results"]["rootstock"]
    assert found["brightness_error"] == pytest.approx(expected)
    assert found["dark"] == (samples.mean((1, 2, 3)) < 32).mean()
    assert found["distance"] == tiny.outcome["results"]["rootstock"]["distance"]
