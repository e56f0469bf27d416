"""One import name, `graftwork`: folders with modules of other names, wherever they lie, are nobody's business."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import GRAFT, ROOT, TINY
from tests.shadows import BARE, shadow

API = f"""
import sys
from graftwork import plan
print(len(plan({str(TINY)!r}).steps), sorted({{*sys.modules}} & {{*{BARE!r}}}))
"""


@pytest.fixture(params=["modules", "packages", "a package itself", "folders without __init__.py"])
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with modules, or packages, of the names that ours have in our checkout."""
    folder = tmp_path / "DiT"
    folder.mkdir()
    if request.param == "packages":
        return shadow(folder, (), BARE)
    if request.param == "folders without __init__.py":
        for name in BARE:
            (folder / name).mkdir()
            (folder / name / "execute.py").write_text("raise RuntimeError('of somebody else')\n")
        return folder
    if request.param == "a package itself":
        (folder / "__init__.py").touch()
    return shadow(folder)


def environment(*folders: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*folders, ROOT)))}


def output(*command: str, cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("on_the_path", [False, True], ids=["current folder", "PYTHONPATH too"])
def test_the_command_line_works_in_such_a_folder(checkout: Path, on_the_path: bool) -> None:
    env = environment(*([checkout] if on_the_path else []))
    assert len(json.loads(output(GRAFT, "plan", str(TINY), "--json", cwd=checkout, env=env))["steps"]) == 16


@pytest.mark.parametrize("on_the_path", [False, True], ids=["current folder", "PYTHONPATH too"])
def test_a_script_in_such_a_folder_has_the_calls_and_imports_nothing_of_it(checkout: Path, on_the_path: bool) -> None:
    (checkout / "script.py").write_text(API)
    env = environment(*([checkout] if on_the_path else []))
    assert output(sys.executable, "script.py", cwd=checkout, env=env) == "16 []\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git has of this project, to be built in."""
    copy = tmp_path_factory.mktemp("source")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if files.returncode:
        pytest.skip("not a checkout")
    for name in files.stdout.decode().split("\0")[:-1]:
        if (ROOT / name).exists():  # it may be removed, and that not yet committed
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
    return copy


def ours() -> set[str]:
    """The package's files by their path below it."""
    package = ROOT / "graftwork"
    folders = [ROOT / name for name in BARE]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    return {f"graftwork/{path.relative_to(ROOT)}" for path in files} | {
        f"graftwork/{path.name}" for path in package.iterdir() if path.is_file()
    }


def build(source: Path, kind: str) -> Path:
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True, timeout=300
    )
    return source / done.stdout.splitlines()[-1]


def test_a_wheel_holds_the_files_that_are_links_in_a_checkout(source: Path) -> None:
    with zipfile.ZipFile(build(source, "wheel")) as wheel:
        held = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    assert {*held} == ours()
    assert held["graftwork/specs/paths.py"] == (ROOT / "specs" / "paths.py").read_bytes()


def test_a_source_distribution_holds_them_too(source: Path) -> None:
    with tarfile.open(build(source, "sdist")) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert ours() <= held
