"""Input that was made to do harm, or is broken as files in the wild are: refused in a line, and in no time."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from graftwork.models import checkpoints
from graftwork.models.checkpoints import UnfitCheckpoint
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.pipeline.cli.app import app
from graftwork.pipeline.planning import preflight
from graftwork.pipeline.planning.contents import Contents
from graftwork.pipeline.planning.fingerprints import data_fingerprint
from graftwork.pipeline.runs import record
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.manifest import Origin
from graftwork.specs.data import ImageFolderData
from graftwork.specs.masking import masked
from graftwork.specs.problems import plain, shown
from graftwork.specs.reading.load import SpecError, job_from, load
from graftwork.specs.secrets import filled, redacted
from graftwork.stages.artifacts.latents import read, read_meta
from graftwork.stages.data.images import BrokenImage, read_image
from graftwork.stages.data.sources import class_sizes, split
from graftwork.stages.evaluation.inception import read_statistics
from tests.conftest import TINY
from tests.encoding import encode
from tests.small import lively

CPU = torch.device("cpu")
MINIMAL = "name: x\nmodel: {depth: 2, width: 16, heads: 2, patch: 2}\ngraft: [{kind: parallel}]\n"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def graft(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(SpecError) as caught:
        call()
    (line,) = caught.value.lines
    assert line.isprintable() and len(line) <= 600
    return line


# -- YAML

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 40)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 30)
)
FILES = {
    "aliases that explode": (LAUGHS, "more than 20,000 values with its aliases written out"),
    "merges that explode": (MERGED, "more than 20,000 values"),
    "exploding keys": (LAUGHS.replace("a39: &a39 ", "? ") + ": 1\n", "not valid YAML"),
    "an alias of itself": ("a: &a [*a]\n", "an alias of what it is in"),
    "lists in lists": ("a: " + "[" * 30_000, "nested more than 32 deep"),
    "items of items": ("- " * 30_000, "nested more than 32 deep"),
    "aliases of aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{level}: &a{level} [*a{level - 1}]\n" for level in range(1, 2000)),
        "nested more than 32 deep",
    ),
    "a huge file": (f"name: {'x' * 2**18}\n", "has more than 131,072 bytes"),
    "many values": ("a: [" + "1," * 25_000 + "]\n", "more than 20,000 values"),
    "a key twice": ("name: x\nname: y\n", "line 2, column 1: not valid YAML: the key 'name' is in line 1 already"),
    "a Python object": ("name: !!python/object/apply:os.system [touch me]\n", "column 7: not valid YAML: tags are not"),
    "binary": ("name: !!binary aGVsbG8=\n", "tags are not accepted"),
    "a set": ("name: !!set {a, b}\n", "tags are not accepted"),
    "a tab": ("name:\n\tx: 1\n", "line 2, column 1: not valid YAML"),
    "a NUL": ("name: x\0\n", "not valid YAML"),
    "a huge integer": (f"seed: {'9' * 5000}\n", "line 1, column 7: not valid YAML: a number that cannot be read"),
    "two documents": ("name: x\n---\nname: y\n", "not valid YAML"),
    "a terminal's command": ("name: x\n\x1b[2J: y\n", "not valid YAML"),
}


@pytest.mark.timeout(60)  # written out, they would take for ever
@pytest.mark.parametrize("how", FILES)
def test_yaml_that_would_do_harm_is_one_line_in_no_time(tmp_path: Path, how: str) -> None:
    text, told = FILES[how]
    (tmp_path / "job.yaml").write_text(text)
    line = refusal(lambda: load("job.yaml"))
    assert line.startswith("job.yaml") and told in line and "accepted: a YAML file with a job" in line
    assert not (tmp_path / "me").exists()


def test_no_more_of_a_file_is_read_than_a_job_can_have() -> None:
    assert "has more than 131,072 bytes" in refusal(lambda: load("/dev/zero"))


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_that_is_not_utf_8_is_one_line(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "job.yaml").write_bytes("name: é\n".encode(encoding))
    assert refusal(lambda: load("job.yaml")).startswith("job.yaml: is not text; accepted: ")


@pytest.mark.parametrize("path", ["none.yaml", ".", "a\0b", "x" * 5000, "loop.yaml", "job.yaml/below"])
def test_a_path_that_is_no_file_is_one_line(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "job.yaml").write_text(MINIMAL)
    line = refusal(lambda: load(path))
    assert "accepted: a YAML file with a job" in line


@pytest.mark.parametrize(
    "base",
    ["/etc/passwd", "../../../../../../etc/passwd", "/dev/zero", "folder.yaml", "pipe.yaml", "a\0.yaml", "loop.yaml"],
)
def test_what_extends_reads_job_files_alone(tmp_path: Path, base: str) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "job.yaml").write_text(f"extends: {json.dumps(base)}\n{MINIMAL}")
    line = refusal(lambda: load("job.yaml"))
    assert line.startswith("job.yaml: extends: got ") and "accepted: a .yaml file" in line
    assert "root:" not in line


def test_a_long_chain_of_files_is_one_line(tmp_path: Path) -> None:
    for number in range(2000):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    assert "accepted: at most 16 files that extend each other" in refusal(lambda: load("0.yaml"))


def test_files_that_extend_each_other_in_a_circle_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    assert "which extends this file; accepted: files without a circle" in refusal(lambda: load("a.yaml"))


def test_a_date_is_text_in_a_job(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(MINIMAL.replace("name: x", "name: 2024-13-45"))
    assert load("job.yaml").name == "2024-13-45"


# -- what a terminal would obey


def test_control_characters_never_reach_the_terminal(tmp_path: Path) -> None:
    nasty = "\x1b[2J\x1b]0;owned\x07\u202e"
    (tmp_path / "job.yaml").write_text(MINIMAL + json.dumps({nasty: nasty})[1:-1] + "\nstore: " + json.dumps(nasty))
    for done in (
        graft("run", "job.yaml"),
        graft("run", nasty),
        graft("show", nasty),
        graft("plan", "job.yaml", "--debug"),
    ):
        assert done.exit_code == 2
        assert all(line.isprintable() for line in done.output.splitlines())


@pytest.mark.parametrize("field", ["data.path", "weights.path", "store", "tracking.uri", "tracking.experiment"])
@pytest.mark.parametrize("value", ["a\nb", "a\x1b[31mb", "a\0b", "\u202eb"])
def test_names_of_places_have_no_control_characters(field: str, value: str) -> None:
    section, _, name = field.partition(".")
    kinds = {"data": "image_folder", "weights": "checkpoint"}
    given = {name: value} | ({"kind": kinds[section]} if section in kinds else {}) if name else value
    line = refusal(lambda: job_from({**yaml.safe_load(MINIMAL), section: given}))
    assert line.startswith(f"{field}: got ") and "accepted: printable characters on one line" in line


@pytest.mark.parametrize("value", ["x" * 300, "x/" * 3000])
def test_paths_that_no_file_system_takes_are_one_line(value: str) -> None:
    line = refusal(lambda: job_from({**yaml.safe_load(MINIMAL), "data": {"kind": "image_folder", "path": value}}))
    assert line.startswith("data.path: got ") and "accepted: at most 4096 bytes" in line


# -- names that would leave the store

NAMES = ["../../etc/passwd", "/etc/passwd", "..", "a\nb", "\x1b[31m", "x" * 5000, "../outside"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", ["show", "status", "resume", "export", "compare"])
def test_a_name_never_leaves_the_store(tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "outside.json").write_text("{}")
    (tmp_path / ".graftwork" / "runs").mkdir(parents=True)
    done = graft(command, name, *(["out"] if command == "export" else []))
    assert done.exit_code == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "accepted: " in line and "passwd:" not in line and len(line) < 400
    assert not (tmp_path / "out").exists()


KEY = "0" * 64
RUN: dict[str, Any] = {
    "run": "small-0123456789",
    "name": "small",
    "status": "finished",
    "started": "2024-05-06T07:08:09+00:00",
    "job": {},
    "steps": [{"name": "features", "key": KEY, "state": "done"}],
}


@pytest.mark.parametrize(
    "change",
    [
        {"run": "../../outside"},
        {"run": "another-0123456789"},
        {"name": "\x1b[2J"},
        {"started": "\x1b[2J"},
        {"git_commit": "\x1b[2J"},
        {"results": {"\x1b[2J": {"fid": 1.0}}},
        {"steps": [{"name": "features", "key": "../../outside", "state": "done"}]},
        {"steps": [{"name": "\x1b[2J", "key": KEY, "state": "done"}]},
        {"steps": [{"name": "features", "key": KEY, "state": "done", "made_by": "\x1b[2J"}]},
    ],
    ids=str,
)
def test_a_hostile_record_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    store = Store(str(tmp_path / "store"))
    store.write_run(RUN["run"], json.dumps(RUN))
    assert record.find(store, "small").steps[0].key == KEY
    store.write_run(RUN["run"], json.dumps(RUN | change))
    assert "cannot be read as a run's record" in refusal(lambda: record.find(store, "small"))


@pytest.mark.parametrize(
    "name", ["../../outside.txt", "/etc/passwd", "a/../../../outside.txt", "./x", "", "a\nb", "a//b"]
)
def test_a_manifest_that_names_files_elsewhere_is_none(tmp_path: Path, name: str) -> None:
    store, made = Store(str(tmp_path / "store")), tmp_path / "made"
    made.mkdir()
    (made / "file").write_text("x")
    manifest = store.commit(KEY, made, {}, Origin(step="s", run="r", seconds=0, made=""))
    (tmp_path / "outside.txt").write_text("x")
    entry = manifest.files["file"].model_dump()
    document = manifest.model_dump() | {"files": {name: entry}}
    store.write(f"artifacts/{KEY}/manifest.json", json.dumps(document))
    assert store.manifest(KEY) is None
    document = manifest.model_dump() | {"key": "1" * 64}
    store.write(f"artifacts/{KEY}/manifest.json", json.dumps(document))
    assert store.manifest(KEY) is None
    store.write(f"artifacts/{KEY}/manifest.json", manifest.model_dump_json())
    assert store.manifest(KEY) == manifest


# -- checkpoints (most of it is in test_checkpoints.py)

SHAPE = DiTConfig(input_size=8, in_channels=1, patch=2, depth=2, width=16, heads=2, num_classes=10)


@pytest.fixture
def model() -> DiT:
    return lively(DiT(SHAPE))


def unfit(path: Path) -> str:
    with pytest.raises(UnfitCheckpoint) as caught:
        checkpoints.read(path, config=SHAPE)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("file", ["model.pt", "model.safetensors"])
def test_a_tensor_with_nan_or_infinity_is_named(model: DiT, tmp_path: Path, file: str, value: float) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["blocks.1.mlp.fc1.weight"][3, 2] = value
    save = torch.save if file.endswith(".pt") else save_file
    save(state, tmp_path / file)
    assert (
        unfit(tmp_path / file) == f"{tmp_path / file}: blocks.1.mlp.fc1.weight: holds NaN or infinity, expected numbers"
    )


def test_integers_are_no_weights(model: DiT, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(state["blocks.0.mlp.fc1.weight"].shape, dtype=torch.int8)
    save_file(state, tmp_path / "model.safetensors")
    assert unfit(tmp_path / "model.safetensors").endswith("blocks.0.mlp.fc1.weight: holds int8, expected float32")


def test_a_compressed_checkpoint_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb/data.pkl", b"\0" * 2**26)
        file.writestr("bomb/version", b"3\n")
    assert unfit(path) == f"{path}: refused, it is compressed, which torch's files are not"


def lying_header(header: dict[str, Any], length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * 64


HEADERS = {
    "longer than the file": lying_header({}, 2**40),
    "past the end": lying_header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    "another size than the shape": lying_header({"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 64]}}),
    "backwards": lying_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}),
    "no JSON": struct.pack("<Q", 8) + b"{{{{{{{{",
}


@pytest.mark.parametrize("how", HEADERS)
def test_safetensors_with_a_lying_header_are_refused(tmp_path: Path, how: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[how])
    assert unfit(path).startswith(f"{path}: cannot be read as tensors: ")


@pytest.mark.parametrize(
    ("rootstock", "problem"),
    [
        ({"depth": 10**9}, "depth: 1000000000, expected at most 256"),
        ({"input_size": 2**40}, "input_size: 1099511627776, expected at most 8192"),
        ({"width": 2**30}, "expected a model of about"),
        ({"num_classes": 10**12}, "expected a model of about"),
    ],
    ids=str,
)
def test_a_config_of_a_model_that_no_memory_holds_is_refused(
    model: DiT, tmp_path: Path, rootstock: dict[str, int], problem: str
) -> None:
    checkpoints.save(model, (), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rootstock": config["rootstock"] | rootstock}))
    with pytest.raises(UnfitCheckpoint) as caught:
        checkpoints.read(tmp_path)
    assert problem in str(caught.value)


def test_a_config_that_is_nested_without_end_is_refused(model: DiT, tmp_path: Path) -> None:
    checkpoints.save(model, (), tmp_path)
    (tmp_path / "config.json").write_text("[" * 10**5)
    assert refusal(lambda: preflight.shortages(tiny(f"weights={{kind: checkpoint, path: {tmp_path}}}"))).startswith(
        "weights.path: got "
    )


def tiny(*overrides: str) -> Any:
    return load(TINY, overrides)


FEWER = [("num_classes", 7, "y_embedder.embedding_table.weight: (8, 32), expected (11, 32)"), ("depth", 2, "blocks.2")]


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(("field", "value", "told"), FEWER)
def test_a_checkpoint_of_another_model_or_of_fewer_classes_is_known_before_anything_runs(
    tmp_path: Path, field: str, value: int, told: str, command: str
) -> None:
    shape = DiTConfig(input_size=16, in_channels=1, patch=2, depth=4, width=32, heads=2, num_classes=10)
    changes: dict[str, Any] = {field: value}
    torch.save(DiT(replace(shape, **changes)).state_dict(), "other.pt")
    done = graft(command, str(TINY), "--set", "weights={kind: checkpoint, path: other.pt}")
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.count("; accepted: ") == 1 and " .. " not in line
    assert line.startswith(f"graft: weights.path: got {tmp_path}/other.pt: does not fit the model: ") and told in line
    assert not (tmp_path / ".graftwork").exists()


FILES_THAT_DO_NOT_FIT = {
    "weights.path": ["weights={kind: checkpoint, path: other.pt}"],
    "graft.0.scions": ["graft.0.scions=other.pt"],
    "evaluate.reference": ["evaluate={samples: 10, metrics: [fid], reference: other.npz, inception: other.pt}"],
}


@pytest.mark.parametrize("field", FILES_THAT_DO_NOT_FIT)
def test_a_plan_refuses_a_file_in_the_words_of_the_run(tmp_path: Path, field: str) -> None:
    torch.save({"layer.weight": torch.zeros(2)}, "other.pt")
    np.savez("other.npz", mu=np.zeros(64), sigma=np.zeros((64, 64)))
    settings = [part for one in FILES_THAT_DO_NOT_FIT[field] for part in ("--set", one)]
    planned, ran = (graft(command, str(TINY), *settings) for command in ("plan", "run"))
    assert planned.exit_code == ran.exit_code == 2 and planned.stderr == ran.stderr
    assert planned.stderr.startswith(f"graft: {field}: got ") and len(planned.stderr.splitlines()) == 1
    assert not list((tmp_path / ".graftwork").glob("runs/*.json"))


def test_a_plan_says_what_is_read_of_a_checkpoint_that_holds_several_models(tmp_path: Path) -> None:
    model = DiT(DiTConfig(input_size=16, in_channels=1, patch=2, depth=4, width=32, heads=2, num_classes=10))
    torch.save({"ema": model.state_dict(), "model": model.state_dict()}, "both.pt")
    done = graft("plan", str(TINY), "--set", "weights={kind: checkpoint, path: both.pt}")
    assert done.exit_code == 0
    assert done.stderr.endswith(f"\ngraft: weights.path: {tmp_path}/both.pt: ema is read, not model\n")


def test_a_line_on_a_file_shows_names_whole(tmp_path: Path) -> None:
    state = {f"module.{'x' * 30}{number}.weight": torch.zeros(2) for number in range(30)}
    torch.save(state, "other.pt")
    done = graft("plan", str(TINY), "--set", "weights={kind: checkpoint, path: other.pt}")
    assert " .. " not in done.stderr and "..." not in done.stderr
    assert all(name in done.stderr for name in sorted(state)[:3])


STATISTICS: dict[str, dict[str, Any]] = {
    "another network": {"mu": np.zeros(64), "sigma": np.zeros((64, 64))},
    "NaN": {"mu": np.full(2048, np.nan), "sigma": np.zeros((2048, 2048))},
    "code": {"mu": np.array([len], dtype=object), "sigma": np.zeros(1)},
    "no sigma": {"mu": np.zeros(2048)},
}


@pytest.mark.parametrize("how", STATISTICS)
def test_statistics_of_anything_else_are_refused(tmp_path: Path, how: str) -> None:
    np.savez("reference.npz", **STATISTICS[how])
    with pytest.raises(ValueError, match=r"^reference.npz: ") as caught:
        read_statistics("reference.npz")
    assert "\n" not in str(caught.value) and "mu and sigma" in str(caught.value)


def test_statistics_that_inflate_are_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**24,)})
    with zipfile.ZipFile("reference.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("mu.npy", header.getvalue() + b"\0" * 2**27)
    with pytest.raises(ValueError, match="mu is too large"):
        read_statistics("reference.npz")


# -- folders of images


def picture(seed: int = 0, size: tuple[int, int] = (20, 24)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def photos(home: Path, per_class: int = 8) -> Path:
    """Two classes of readable images."""
    for label in range(2):
        (home / f"class-{label}").mkdir(parents=True)
        for number in range(per_class):
            picture(100 * label + number).save(home / f"class-{label}" / f"{number}.png")
    return home


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is that large, and holds next to nothing."""
    whole = io.BytesIO()
    Image.new("1", (8, 8)).save(whole, "PNG")
    head = b"IHDR" + struct.pack(">II", width, height) + whole.getvalue()[24:29]
    import zlib

    return whole.getvalue()[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole.getvalue()[33:]


def break_images(folder: Path) -> list[str]:
    """Files of every kind that are no images, or none that can be read; returns their names."""
    whole = io.BytesIO()
    picture().save(whole, "PNG")
    jpeg = io.BytesIO()
    picture().save(jpeg, "JPEG")
    contents = {
        "empty.png": b"",
        "text.png": b"<html>404: not found</html>",
        "torn.png": whole.getvalue()[:600],
        "torn.jpg": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touched) (w) file\n",
        "bomb.png": png_of(30_000, 30_000),
        "larger-bomb.png": png_of(60_000, 60_000),
        "noise.webp": np.random.default_rng(0).bytes(500),
        "flipped.png": whole.getvalue()[:40] + b"\xff" * 20 + whole.getvalue()[60:],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    Image.new("1", (1, 1_000_000)).save(folder / "line.png")
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    return [*contents, "line.png", "folder.png", "loop.png", "pipe.png"]


def test_whatever_is_no_image_is_one_line_that_names_it(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos")
    data = ImageFolderData(path=str(home), image_size=16)
    for name in break_images(home / "class-0"):
        with pytest.raises(BrokenImage) as caught:
            read_image(data, f"class-0/{name}")
        line = str(caught.value)
        assert line.startswith(f"{home}/class-0/{name}: cannot be read as an image: ") and line.isprintable(), line


def kinds_of_images(folder: Path) -> None:
    base = picture()
    base.save(folder / "plain.png")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    base.convert("P").save(folder / "palette.png", transparency=3)
    base.convert("RGBA").save(folder / "alpha.png")
    base.convert("LA").save(folder / "grey-alpha.png")
    base.convert("1").save(folder / "bits.png")
    base.save(folder / "moving.webp", save_all=True, append_images=[picture(1)], lossless=True)
    base.save(folder / "moving.png", save_all=True, append_images=[picture(1)])
    grey = np.asarray(base.convert("L"))
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep-grey.png")


def test_images_of_every_mode_are_read_as_rgb(tmp_path: Path) -> None:
    kinds_of_images(tmp_path)
    data = ImageFolderData(path=str(tmp_path), image_size=16)
    plain_one, grey = read_image(data, "plain.png"), read_image(data, "grey.png")
    for path in tmp_path.iterdir():
        found = read_image(data, path.name)
        assert found.shape == (3, 16, 16) and np.isfinite(found).all() and np.abs(found).max() <= 1
    for name in ("alpha.png", "moving.webp", "moving.png"):
        assert np.array_equal(read_image(data, name), plain_one), name
    assert np.array_equal(read_image(data, "deep-grey.png"), grey)


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos")
    (home / "class-0" / "._0.png").write_bytes(b"\0\5\x16\7")
    (home / ".thumbnails").mkdir()
    (home / ".thumbnails" / "0.png").touch()
    (home / "loop").symlink_to("loop")
    data = ImageFolderData(path=str(home))
    assert class_sizes(data) == (8, 8)
    before = data_fingerprint(data, Contents())
    (home / "notes.txt").touch()
    assert data_fingerprint(data, Contents()) == before


def test_a_class_without_images_is_one_line_since_it_would_number_the_others_anew(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos")
    (home / "class-00").mkdir()
    job = tiny(f"data={{kind: image_folder, path: {home}, image_size: 16}}", "distill.samples=2", "distill.heldout=1")
    (line,) = preflight.shortages(job)
    assert line.startswith("data.path: got ") and "with none in 'class-00'; accepted: images in each folder" in line


def test_what_a_linked_folder_holds_is_in_the_fingerprint(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos")
    (home / "class-1").rename(tmp_path / "elsewhere")
    (home / "class-1").symlink_to(tmp_path / "elsewhere")
    data = ImageFolderData(path=str(home))
    before = data_fingerprint(data, Contents())
    picture(9).save(tmp_path / "elsewhere" / "9.png")
    assert data_fingerprint(data, Contents()) != before


def test_leaving_broken_images_out_is_another_key(tmp_path: Path) -> None:
    from graftwork.specs.fields import keyed

    keys = [keyed(ImageFolderData(path="x", skip_broken=skip)) for skip in (False, True)]
    assert keys[0] != keys[1]


def test_what_is_left_out_is_left_out_of_the_split_as_if_it_were_not_there(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos")
    data = ImageFolderData(path=str(home), heldout=0.25)
    without = split(data, without={"class-0/3.png", "class-1/5.png"})
    (home / "class-0" / "3.png").unlink()
    (home / "class-1" / "5.png").unlink()
    assert split(data) == without


# -- secrets

PASSWORD = "hunter2/hunter2@"
SECRET_URIS = [
    "postgresql://graft:hunter2hunter2@db/mlflow",
    "mysql+pymysql://graft:hunter2/hunter2@db/mlflow",
    "http://hunter2hunter2@mlflow:5000",
    "https://host/mlflow?access_token=hunter2hunter2",
    "abfs://box/path?sv=1&sig=hunter2hunter2",
    "s3://bucket/x?aws_secret_access_key=hunter2hunter2",
    "simplecache::ftp://graft:hunter2hunter2@host/x",
    "http://graft:${USER}hunter2hunter2@mlflow",
]


@pytest.mark.parametrize("uri", SECRET_URIS)
@pytest.mark.parametrize("field", ["store", "tracking.uri", "data.path", "trackingg", "tracking"])
def test_a_secret_in_a_job_is_refused_unseen(field: str, uri: str) -> None:
    section, _, name = field.partition(".")
    given: Any = {name: uri} | ({"kind": "image_folder"} if section == "data" else {}) if name else uri
    line = refusal(lambda: job_from({**yaml.safe_load(MINIMAL), section: given}))
    assert line.startswith(f"{field}: ") and "accepted: " in line and "hunter2" not in line
    if field in ("store", "tracking.uri", "data.path"):
        assert "***" in line and "a placeholder in its place, as in ${DB_PASSWORD}" in line


OPEN_URIS = [
    "http://host:5000/path@v1",
    "abfs://container@account.dfs.core.windows.net/x", "sftp://me@host/x", "s3://bucket/a=b",
    "postgresql://graft:${DB_PASSWORD}@db/mlflow", "https://${TOKEN}@host", "https://host/x?sig=${SIG}",
    "/data/a@b:c/d?e",
]  # fmt: skip


@pytest.mark.parametrize("uri", OPEN_URIS)
def test_a_uri_without_a_secret_is_taken_as_it_is(uri: str) -> None:
    assert job_from({**yaml.safe_load(MINIMAL), "store": uri}).store == uri
    assert masked(uri) == uri


def test_a_placeholder_is_filled_in_where_the_uri_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASS", PASSWORD)
    monkeypatch.setenv("PLACE", "s3://bucket/x")
    assert filled("postgresql://u:${DB_PASS}@db/x", "store") == "postgresql://u:hunter2%2Fhunter2%40@db/x"
    assert filled("https://host/x?sig=${DB_PASS}", "store") == "https://host/x?sig=hunter2%2Fhunter2%40"
    assert filled("${PLACE}/y", "store") == "s3://bucket/x/y"
    line = refusal(lambda: filled("http://u:${NOT_SET}@h", "tracking.uri"))
    assert line.startswith("tracking.uri: got ${NOT_SET}, which is not set; accepted: ")


def test_a_store_keeps_the_placeholder_in_its_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOX_PASSWORD", "hunter2hunter2")
    place = Store("memory://box?sig=${BOX_PASSWORD}")
    assert place.url == "memory://box?sig=${BOX_PASSWORD}"
    assert "hunter2hunter2" in str(place.root)
    assert refusal(lambda: Store("memory://${NOT_SET}")).startswith("store: got ${NOT_SET}, which is not set")


def test_secrets_of_the_environment_are_taken_out_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASS", PASSWORD)  # no name of a secret, but a URI was filled in from it
    filled("postgresql://u:${DB_PASS}@db/x", "store")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    text = f"no answer from u:{PASSWORD}@db, hunter2%2Fhunter2%40 or wJalrXUtnFEMI/K7MDENG; abc"
    assert redacted(text) == ("no answer from u:${DB_PASS}@db, ${DB_PASS} or ${AWS_SECRET_ACCESS_KEY}; abc")


def test_a_secret_reaches_neither_terminal_nor_store_nor_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails with the URI in hand, on the way to a run."""
    monkeypatch.setenv("DB_PASSWORD", "hunter2hunter2")
    monkeypatch.setenv("MY_API_TOKEN", "s3cr3ts3cr3t")
    (tmp_path / "s3cr3ts3cr3t").mkdir()
    for arguments in (
        ("run", str(TINY), "--set", "tracking.uri=http://u:${DB_PASSWORD}@127.0.0.1:9"),
        ("run", str(TINY), "--set", "tracking.uri=http://u:${DB_PASSWORD}@127.0.0.1:9", "--debug"),
        ("run", str(TINY), "--set", "tracking.uri=nonsense://u:${DB_PASSWORD}@127.0.0.1:9", "--debug"),
        ("run", str(TINY), "--set", "store=/dev/null/s3cr3ts3cr3t"),
        ("run", "s3cr3ts3cr3t"),
        ("run", str(TINY), "--set", "store=s3://hunter2hunter2:hunter2hunter2@bucket"),
        ("status",),
        ("status", "--json"),
    ):
        done = graft(*arguments)
        assert "hunter2" not in done.output and "s3cr3t" not in done.output, arguments
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if b"hunter2" in path.read_bytes()]


def test_a_secret_in_what_a_step_says_is_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose first step fails, and names a file that is called like the secret."""
    monkeypatch.setenv("MY_API_TOKEN", "s3cr3ts3cr3t")
    home = photos(tmp_path / "photos", per_class=20)
    (home / "class-0" / "s3cr3ts3cr3t.png").touch()
    data = f"data={{kind: image_folder, path: {home}, image_size: 16}}"
    model = ("--set", "distill.samples=8", "--set", "distill.heldout=2", "--set", "evaluate.samples=8")
    done = graft("run", str(TINY), "--set", data, *model, "--debug")
    assert done.exit_code == 1, done.output
    assert "class-0/${MY_API_TOKEN}.png: cannot be read as an image" in done.stderr
    assert "s3cr3t" not in done.output
    written = [path for path in (tmp_path / ".graftwork").rglob("*") if path.is_file()]
    assert {"mlflow.db"} < {path.name for path in written}
    found = [path.parent.name for path in written if b"s3cr3t" in path.read_bytes()]
    assert set(found) <= {"contents"}  # which lists the images by their names


def test_what_is_shown_is_short_and_plain() -> None:
    assert plain("a\x1b[2Jb\n\ud800") == "a\\x1b[2Jb\\n\\ud800"
    assert shown(10**5000) == "a value too large to be shown"
    assert len(shown("x" * 1000)) == 80


# -- folders of images, read by workers


def encode_folder(home: Path, out: Path, **settings: Any) -> Path:
    return encode(ImageFolderData(path=str(home), image_size=16, heldout=0.25, **settings), out)


def test_all_broken_images_are_told_at_once_and_left_out_only_if_the_spec_says_so(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos", per_class=20)
    broken = break_images(home / "class-1")
    odd = [os.fsdecode(b"caf\xe9.png"), "two\nlines.png"]
    for name in odd:
        picture(7).save(home / "class-0" / name)
    with pytest.raises(ValueError) as caught:
        encode_folder(home, tmp_path / "refused")
    line = str(caught.value)
    assert line.startswith(f"data.path: {len(broken)} of 55 images are broken: {home}/class-1/bomb.png: ")
    assert line.count("cannot be read as an image") == 10 and f"; and {len(broken) - 10} more; " in line
    assert line.isprintable() and "data.skip_broken: true" in line

    out = encode_folder(home, tmp_path / "skipped", skip_broken=True)
    meta, told = read_meta(out), json.loads((out / "broken.json").read_text())
    assert told == {"count": 13, "of": 55, "broken": sorted(f"class-1/{name}" for name in broken)}
    assert (meta.num_training, meta.num_heldout) == (31, 11)
    training, heldout = (read(out, split) for split in ("training", "heldout"))
    assert [int((part.labels == label).sum()) for part in (training, heldout) for label in (0, 1)] == [16, 15, 6, 5]

    for name in broken:
        path = home / "class-1" / name
        path.rmdir() if path.is_dir() else path.unlink()
    clean = encode_folder(home, tmp_path / "clean")
    for name in ("training_latents-00000.npy", "training_labels.npy", "heldout_latents-00000.npy"):
        assert (out / name).read_bytes() == (clean / name).read_bytes()  # as if they had not been there


def test_a_class_of_nothing_but_broken_images_is_refused(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos", per_class=2)
    for path in (home / "class-1").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"^data.path: no image of the class class-1 can be read; accepted: "):
        encode_folder(home, tmp_path / "out", skip_broken=True)
