"""Paths in a spec as people write them: `~`, variables, from the current folder; and what they come to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import graftwork
from graftwork.pipeline import api
from graftwork.pipeline.cli.app import app
from graftwork.pipeline.execution import remote
from graftwork.pipeline.planning import plan as planning
from graftwork.pipeline.store.errors import StoreError
from graftwork.pipeline.store.open import open_files
from graftwork.specs.job import JobSpec
from graftwork.specs.reading.load import SpecError, job_from, load
from tests.conftest import TINY

FIELDS: dict[str, Callable[[str], str]] = {
    "data.path": lambda path: f"data={{kind: image_folder, image_size: 16, path: {path}}}",
    "weights.path": lambda path: f"weights={{kind: checkpoint, path: {path}}}",
    "codec.path": lambda path: f"codec={{kind: vae, factor: 2, path: {path}}}",
    "graft.0.scions": lambda path: f"graft.0.scions={path}",
    "evaluate.reference": lambda path: f"evaluate.reference={path}",
    "evaluate.inception": lambda path: f"evaluate.inception={path}",
    "store": lambda path: f"store={path}",
}
FID = "evaluate.metrics=[fid]"  # that a VAE's codec wants


def loaded(field: str, path: str) -> Any:
    """The value of a field that was given `path`."""
    overrides = [FIELDS[field](f"'{path}'")]
    if field in ("codec.path", "evaluate.reference", "evaluate.inception"):
        overrides = [FID, "evaluate.reference=/reference", *overrides]
    value: Any = load(TINY, overrides).model_dump()
    for name in field.split("."):
        value = value[int(name) if name.isdigit() else name]
    return value


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and an empty folder beside it as the current one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("written", "meant"),
    [("~/x y", "home/x y"), ("~", "home"), ("$DATA/x", "data/x"), ("${DATA}/x", "data/x"), ("${DATA}x", "datax")],
)
def test_home_and_variables_are_filled_in_in_every_path(tmp_path: Path, field: str, written: str, meant: str) -> None:
    assert loaded(field, written) == str(tmp_path / meant)


@pytest.mark.parametrize("field", [field for field in FIELDS if field != "store"])
def test_a_relative_path_is_from_where_the_spec_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    assert loaded(field, "x") == str(tmp_path / "here" / "x")
    monkeypatch.setenv("PART", "x")
    assert loaded(field, "$PART/y.pt") == str(tmp_path / "here" / "x" / "y.pt")


@pytest.mark.parametrize("field", ["weights.path", "codec.path", "graft.0.scions"])
def test_a_hub_id_stays_a_hub_id_unless_there_is_such_a_folder(tmp_path: Path, field: str) -> None:
    assert loaded(field, "org/name") == "org/name"
    (tmp_path / "here" / "org" / "name").mkdir(parents=True)
    assert loaded(field, "org/name") == str(tmp_path / "here" / "org" / "name")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("$NOWHERE/x", "NOWHERE is not set"),
        ("${NOWHERE}/x", "NOWHERE is not set"),
        ("$EMPTY/x", "EMPTY is empty"),
        ("${A-b}/x", "${A-b}"),
        ("~nobody-of-that-name/x", "nobody-of-that-name"),
    ],
)
def test_an_unknown_variable_or_user_is_one_line_that_names_field_and_name(
    monkeypatch: pytest.MonkeyPatch, field: str, written: str, named: str
) -> None:
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(SpecError) as refused:
        loaded(field, written)
    (line,) = refused.value.lines
    assert line.startswith(f"{field}: got '{written}'; accepted: ") and named in line


def test_a_home_that_nobody_knows_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: dict[str, None]()["no entry"])
    with pytest.raises(SpecError, match=r"data\.path: got '~/photos'; accepted: ~ for HOME set"):
        loaded("data.path", "~/photos")


def test_what_a_variable_holds_is_checked_as_if_it_stood_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/two\nlines")
    with pytest.raises(SpecError, match="accepted: printable characters on one line"):
        loaded("data.path", "$DATA/x")
    monkeypatch.setenv("DATA", "/" + "x" * 300)
    with pytest.raises(SpecError, match="accepted: at most 4096 bytes, and 255"):
        loaded("data.path", "$DATA/x")


def test_a_folder_with_a_dollar_sign_in_its_name_is_read_again_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "US$price").mkdir()
    path = str(tmp_path / "US$price")
    assert loaded("data.path", path) == path
    assert loaded("data.path", "/a/US$5") == "/a/US$5"  # no variable is named 5


def test_a_job_made_in_python_is_read_the_same_way_and_only_once(tmp_path: Path) -> None:
    document = yaml.safe_load(TINY.read_text()) | {"data": {"kind": "image_folder", "path": "~/photos"}}
    job = JobSpec.model_validate(document)
    assert job.data.path == str(tmp_path / "home" / "photos")  # type: ignore[union-attr]
    assert job_from(job.model_dump(mode="json")) == job


@pytest.mark.parametrize(
    ("uri", "read"),
    [
        ("sqlite:///~/mlflow.db", "sqlite:///{home}/mlflow.db"),
        ("sqlite:///$DATA/mlflow.db", "sqlite:///{data}/mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("sqlite:////there/mlflow.db", "sqlite:////there/mlflow.db"),
        ("sqlite:///${DATA}/mlflow.db", "sqlite:///${{DATA}}/mlflow.db"),  # filled in where it is used
        ("file://~/runs", "file://{home}/runs"),
        ("http://me:${PASSWORD}@host:5000", "http://me:${{PASSWORD}}@host:5000"),
        ("databricks", "databricks"),
    ],
)
def test_a_uri_of_a_file_has_its_home_and_its_variables(tmp_path: Path, uri: str, read: str) -> None:
    there = load(TINY, [f"tracking.uri={uri}"]).tracking.uri
    assert there == read.format(home=tmp_path / "home", data=tmp_path / "data")


@pytest.mark.parametrize("field", ["store", "tracking.uri"])
def test_a_variable_without_braces_in_a_uri_is_refused_with_the_way_to_write_it(field: str) -> None:
    with pytest.raises(SpecError) as refused:
        load(TINY, [f"{field}=s3://$BUCKET/prefix"])
    (line,) = refused.value.lines
    assert line.startswith(f"{field}: got 's3://$BUCKET/prefix'; accepted: ${{BUCKET}} in a URI")


def test_a_store_on_the_command_line_is_read_as_in_a_spec(tmp_path: Path) -> None:
    assert str(open_files("~/store").root) == str(tmp_path / "home" / "store")
    assert str(open_files("$DATA/store").root) == str(tmp_path / "data" / "store")
    for store in ("$NOWHERE/store", "~nobody-of-that-name/store"):
        with pytest.raises(StoreError, match=r"^store: got '.+', which cannot be understood; accepted: "):
            open_files(store)
        done = CliRunner().invoke(app, ["status", "--store", store])
        assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("base", ["~/base.yaml", "$DATA/base.yaml", "${DATA}/base.yaml"])
def test_a_file_extends_one_at_home_or_in_a_variable_s_folder(tmp_path: Path, base: str) -> None:
    (tmp_path / "data").mkdir()
    for folder in ("home", "data"):
        shutil.copy(TINY, tmp_path / folder / "base.yaml")
    Path("top.yaml").write_text(f"extends: {base}\nseed: 7\n")
    assert load("top.yaml").seed == 7
    Path("top.yaml").write_text("extends: $NOWHERE/base.yaml\n")
    with pytest.raises(SpecError, match=r"top\.yaml: extends: got '\$NOWHERE/base\.yaml'; accepted: .*NOWHERE is not"):
        load("top.yaml")


def test_how_a_path_is_written_changes_no_key(tmp_path: Path, home: Path) -> None:
    from PIL import Image

    for number in range(8):
        folder = home / "photos" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), number).save(folder / f"{number}.png")
    Path("photos").symlink_to(home / "photos")
    few = ["distill.samples=2", "distill.heldout=1", "evaluate.samples=4"]
    keys = [
        [step.key for step in planning.make_plan(load(TINY, [FIELDS["data.path"](path), *few])).steps]
        for path in ("~/photos", "photos", str(home / "photos"))
    ]
    assert keys[0] == keys[1] == keys[2]


def test_a_submitted_job_says_which_paths_of_this_machine_the_nodes_need(tmp_path: Path, home: Path) -> None:
    (home / "photos").mkdir()
    job = load(TINY, [FIELDS["data.path"]("~/photos"), FIELDS["weights.path"]("org/name"), "store=/shared"])
    (line,) = remote.needed_there(job)
    assert line == f"data.path: '{home}/photos' is a path of this machine; the cluster's nodes must have it, too"
    with remote.staged(job) as folder:
        assert load(folder / remote.JOB_FILE) == job
    assert remote.needed_there(load(TINY, [FIELDS["data.path"]("/only/there")])) == []
    (home / "order.txt").write_text("a\nb\n")
    (line,) = remote.needed_there(load(TINY, [FIELDS["data.path"]("/only/there"), "data.classes=~/order.txt"]))
    assert line.startswith(f"data.classes: '{home}/order.txt' is a path of this machine")


def test_a_plan_reads_a_job_at_home(home: Path) -> None:
    shutil.copy(TINY, home / "job.yaml")
    assert graftwork.plan("~/job.yaml").job.name == "digits-tiny"


def test_a_model_card_names_files_without_the_folders_of_this_machine() -> None:
    job = load(TINY, [FIELDS["data.path"]("~/photos"), FIELDS["graft.0.scions"]("org/name")]).model_dump(mode="json")
    told = api._without_folders(job)
    assert told["data"]["path"] == "photos" and told["graft"][0]["scions"] == "org/name"
