"""The documentation says what is: the page of fields, the face of the package, and the files beside the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

import graftwork
from graftwork.pipeline.execution.view import LoggedView, SilentView
from graftwork.specs.reading.load import job_from, job_schema
from graftwork.specs.reading.page import page_of
from tests.conftest import ROOT, TINY, Finished

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_page_of_fields_is_what_the_schema_says() -> None:
    assert (ROOT / "docs" / "fields.md").read_text() == page_of(job_schema()), (
        "graft schema --markdown > docs/fields.md"
    )


def test_the_page_has_every_field_of_every_section() -> None:
    schema, page = job_schema(), page_of(job_schema())
    for section in (schema, *schema["$defs"].values()):
        for name in section["properties"]:
            assert name == "kind" or f"| `{name}` |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_of_code_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(
        r"`((?:specs|models|cluster|stages|pipeline|tests|benchmarks|examples)/[\w./-]*)`", page.read_text()
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("file", [".pre-commit-config.yaml", ".github/workflows/ci.yml", "CITATION.cff", "mkdocs.yml"])
def test_files_for_other_tools_are_yaml(file: str) -> None:
    assert isinstance(yaml.safe_load((ROOT / file).read_text()), dict)


def test_the_workflow_runs_what_is_there_on_each_python() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run", "make test"] and (ROOT / ".ci/run").exists()
    assert jobs["pythons"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_one_version_everywhere() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == graftwork.__version__
    for file in ("cluster/Dockerfile", "cluster/kuberay/raycluster.yaml", "cluster/kuberay/rayjob.yaml"):
        assert set(re.findall(r"REGISTRY/graftwork:([\d.]+)", (ROOT / file).read_text())) == {graftwork.__version__}


def test_the_face_is_all_there_and_says_what_it_does() -> None:
    for name in graftwork.__all__:
        value = getattr(graftwork, name)
        assert name == "__version__" or (value.__doc__ or "").strip(), name
        if callable(value) and not isinstance(value, type):
            assert name in (graftwork.__doc__ or ""), name


def test_a_logger_has_what_the_views_show(caplog: pytest.LogCaptureFixture) -> None:
    view = LoggedView(SilentView())
    with caplog.at_level("DEBUG", logger="graftwork"):
        view.change("base", "done", seconds=1.0)
        view.change("finetune", "failed", "its worker was lost")
        view.progress("base", 1, 2, {"loss": 0.5})
        view.say("a line")
    assert [(one.levelname, one.getMessage()) for one in caplog.records] == [
        ("INFO", "base: done"),
        ("ERROR", "finetune: failed (its worker was lost)"),
        ("DEBUG", "base: 1/2 {'loss': 0.5}"),
        ("INFO", "a line"),
    ]


def test_the_command_line_says_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graftwork.pipeline", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"graftwork {graftwork.__version__}\n"


def test_the_notebook_runs_from_its_first_cell_to_its_last(
    tiny_copy: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    folder = tiny_copy.store.parent  # where the job is done: each of its steps comes from the store
    shutil.copy(TINY, folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    shown = [
        "".join(output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", []))
        for cell in notebook.cells
    ]
    assert "'distill/01.mha'" in shown[1] and "stage2" in shown[3]
    assert shown[7] == "torch.Size([10, 1, 16, 16])" and "once-more" in shown[10]
    assert all(not cell.get("outputs") for cell in nbformat.read(ROOT / "examples" / "quickstart.ipynb", 4).cells)


def block(language: str) -> str:
    """Return the one block of the README in a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return str(found)


def test_the_job_of_the_readme_is_one() -> None:
    job = job_from(yaml.safe_load(block("yaml")))
    assert job.model.size == "XL/2" and len(job.edits()) == 14


def test_the_python_of_the_readme_runs(tiny_copy: Finished) -> None:
    folder = tiny_copy.store.parent
    (folder / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, "-c", block("python")], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stage2" in done.stdout and tiny_copy.run in done.stdout
