"""What the documentation shows works: its operator is added, in two places, to a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

COPIED = ("graftwork", "specs", "models", "cluster", "stages", "pipeline", "tests", "examples", "pyproject.toml")


@pytest.fixture(scope="module")
def code() -> tuple[str, str]:
    """The two blocks under "Adding an operator"."""
    section = (ROOT / "docs" / "operators.md").read_text().split("## Adding an operator")[1].split("\n## ")[0]
    spec, module = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return spec, module


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory, code: tuple[str, str]) -> Path:
    """The project with the README's operator in it."""
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
