"""Bad input on the command line: one line a problem, exit code 2, nothing started, no traceback."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from graftwork.models.checkpoints import UnfitCheckpoint
from graftwork.pipeline.cli.app import app, problems
from graftwork.pipeline.execution import task
from graftwork.pipeline.execution.run import RunFailed
from graftwork.pipeline.execution.task import StepFailed
from graftwork.pipeline.runs.record import RunRecord
from graftwork.pipeline.store.errors import StoreError
from tests.conftest import GRAFT, ROOT, TINY


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def graft(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


BAD = [
    ("nonsense=1", "nonsense: unknown field"),
    ("finetune.lr=fast", "finetune.lr: got 'fast'"),
    ("graft.0.operator.kind=hyena_z", "graft.0.operator.kind: got 'hyena_z'; accepted: 'mha', 'swa'"),
    ("graft.0.layers.ratio=1.5", "graft.0.layers.ratio: got 1.5; accepted: less than or equal to 1"),
    ("graft.0.layers={kind: explicit, blocks: [9]}", "graft.0.layers.blocks.0: got 9; accepted: a block of this model"),
    ("model.heads=3", "model.heads: got 3; accepted: a number that divides the width, 32"),
    ("model.patch=3", "data.image_size: got 16; accepted: a multiple of the patch, 3"),
    ("distill.samples=5000", "distill.samples: got 5000; accepted: at most 899"),
    ("weights={kind: checkpoint, path: none.pt}", "weights.path: got '{here}/none.pt', no such file"),
    ("data={kind: image_folder, path: none}", "data.path: got '{here}/none', no such folder"),
    ("store=/dev/null/store", "store: got '/dev/null/store', which cannot be written"),
    ("store=nonsense://place", "store: got 'nonsense://place', which cannot be understood"),
    ("store=gs://bucket/prefix", "store: got 'gs://bucket/prefix', whose library is not installed"),
    ("tracking.uri=http://127.0.0.1:{port}", "tracking.uri: got http://127.0.0.1:{port}, which does not answer"),
]


@pytest.mark.parametrize(("override", "told"), BAD, ids=[override.split("=")[0] for override, _ in BAD])
def test_a_bad_field_is_one_line_and_exit_code_2(override: str, told: str) -> None:
    port = str(free_port())
    done = graft("run", str(TINY), "--set", override.replace("{port}", port))
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("graft: " + told.replace("{port}", port).replace("{here}", str(Path.cwd())))
    assert "accepted: " in line
    assert done.stdout == ""
    assert not Path(".graftwork").exists()  # nothing is made before the request is known to be good


def test_an_unreadable_yaml_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: x\nmodel: {kind: dit\n")
    done = graft("plan", "job.yaml")
    assert done.exit_code == 2
    assert done.stderr.startswith("graft: job.yaml, line 3, column 1: not valid YAML")


def test_several_problems_are_several_lines() -> None:
    done = graft("plan", str(TINY), "--set", "model.heads=3", "--set", "finetune.lr=-1", "--set", "seed=x")
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == ["seed", "model.heads", "finetune.lr"]


def test_fid_without_weights_says_where_to_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "real").mkdir()
    for number in range(2):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / "real" / f"{number}.png")
    done = graft("run", str(TINY), "--set", "evaluate.metrics=[fid]", "--set", "evaluate.reference=real")
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert f"{tmp_path}/torch/hub/checkpoints/pt_inception-2015-12-05-6726825d.pth" in line


def test_an_unknown_run_lists_those_that_are_there() -> None:
    done = graft("resume", "nobody")
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        f"graft: run: got 'nobody', no such run in {Path.cwd()}/.graftwork; accepted: none yet"
    ]


def test_plan_prints_the_documented_json() -> None:
    document = json.loads(graft("plan", str(TINY), "--json").stdout)
    assert set(document) == {"job", "steps", "costs", "expected", "last_estimate", "absent", "unread", "notes"}
    assert document["job"] == "digits-tiny"
    assert document["absent"] == []
    assert set(document["costs"]) == {"rootstock", "graft", "replaced", "scions"}
    assert document["costs"]["graft"] == {"params": 88_136, "flops": 7_493_632}  # what evaluate's table says
    assert all(
        set(step) == {"name", "stage", "key", "state", "needs", "resources"} and step["state"] == "pending"
        for step in document["steps"]
    )


def test_a_plan_needs_none_of_the_files_and_says_which_are_not_here(tmp_path: Path) -> None:
    elsewhere = ("data={kind: image_folder, path: none, classes: 7}", "weights={kind: checkpoint, path: none.pt}")
    done = graft("plan", str(TINY), *(part for override in elsewhere for part in ("--set", override)))
    assert done.exit_code == 0
    assert "0 cached, 0 partial, 16 pending" in done.stdout
    assert [line.split(": ")[1] for line in done.stderr.splitlines()[1:]] == ["data.path", "weights.path"]
    (tmp_path / "none" / "only").mkdir(parents=True)
    (tmp_path / "none" / "only" / "image.png").touch()
    done = graft("plan", str(TINY), "--set", elsewhere[0], "--set", "distill.samples=1")
    assert done.exit_code == 2
    assert done.stderr == f"graft: data.classes: got 7; accepted: 1, the class folders in {tmp_path}/none\n"


def test_planning_leaves_nothing_behind(tmp_path: Path) -> None:
    graft("plan", str(TINY))
    assert list(tmp_path.iterdir()) == []


def test_the_schema_describes_every_section() -> None:
    schema = json.loads(graft("schema").stdout)
    assert set(yaml.safe_load(TINY.read_text())) <= set(schema["properties"])


def test_the_schema_lets_a_file_that_extends_another_leave_out_what_it_inherits() -> None:
    schema = json.loads(graft("schema").stdout)
    assert schema["properties"]["extends"]["type"] == "string"
    assert "path of another job's file" in schema["properties"]["extends"]["description"]
    assert "required" not in schema
    assert schema["anyOf"] == [{"required": ["extends"]}, {"required": ["name", "model", "graft"]}]
    assert "may leave out what it inherits" in schema["description"]


@pytest.mark.parametrize(
    ("cause", "repeats"),
    [
        (TypeError("sqrtm() got an unexpected keyword argument 'disp'"), True),
        (UnfitCheckpoint("does not fit"), True),
        (np.linalg.LinAlgError("Singular matrix"), True),
        (ConnectionResetError("by peer"), False),
        (StoreError("/store", "which is full", "free some space"), False),
        (MemoryError(), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_to_resume_is_advised_only_where_it_can_help(
    cause: Exception, repeats: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = pickle.loads(pickle.dumps(StepFailed("base", str(cause), "", None, task._repeats(cause))))
    record = RunRecord(
        run="a-1", name="a", status="failed", started="", job={"store": "s"}, steps=[], error="step base failed: so"
    )
    with pytest.raises(typer.Exit) as left, problems(debug=False):
        raise RunFailed(record, "", all([failure.repeats]))
    assert left.value.exit_code == 1
    advice = "graft: resume with: graft resume a-1 --store s"
    assert (advice in capsys.readouterr().err.splitlines()) == (not repeats)


def test_a_name_that_the_terminal_cannot_show_is_spelt_out(tmp_path: Path) -> None:
    settings = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([GRAFT, "plan", "猫.yaml"], cwd=tmp_path, env=settings, capture_output=True, check=False)
    assert done.returncode == 2 and b"\\u732b.yaml" in done.stderr and b"Traceback" not in done.stderr
