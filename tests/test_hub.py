"""Weights by a hub id: found where the hub's library has them, fetched again if they are not whole, named otherwise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from graftwork.pipeline import api
from graftwork.pipeline.planning import preflight
from graftwork.specs.hub import hub_cache, is_offline, local_path, local_snapshot, missing_from
from graftwork.specs.job import JobSpec
from graftwork.specs.reading.load import SpecError, load
from tests.conftest import TINY

NAMES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
ENVIRONMENTS: list[dict[str, str]] = [
    {},
    {"XDG_CACHE_HOME": "/xdg"},
    {"XDG_CACHE_HOME": "~/xdg"},
    {"XDG_CACHE_HOME": "$HOME/xdg", "HF_HUB_OFFLINE": "1"},
    {"XDG_CACHE_HOME": ""},
    {"HF_HOME": "~/hf", "XDG_CACHE_HOME": "/xdg", "HF_HUB_OFFLINE": "yes"},
    {"HF_HOME": "${HOME}/hf", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "TRUE"},
    {"HF_HUB_CACHE": "$HOME/cache", "HUGGINGFACE_HUB_CACHE": "/older", "HF_HUB_OFFLINE": "0"},
    {"HUGGINGFACE_HUB_CACHE": "~/older", "HF_HOME": "/hf", "TRANSFORMERS_OFFLINE": "1"},
    {"HF_HUB_CACHE": "$UNKNOWN/cache", "HF_HUB_OFFLINE": "off"},
]
ASK = """
import importlib, json, os, sys
import huggingface_hub.constants as constants
found = []
for environment in json.loads(sys.argv[1]):
    os.environ.update(environment)
    importlib.reload(constants)
    found.append([constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE])
    for name in environment:
        del os.environ[name]
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, without the variables of whoever runs it."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, files: dict[str, str], hub_id: str = "org/model", revision: str = "0123abc") -> Path:
    """Lay files into the cache, as the hub's library does."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_text(content)
    return snapshot


def test_the_cache_is_where_the_hubs_library_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    asked = [sys.executable, "-c", ASK, json.dumps(ENVIRONMENTS)]
    told = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    for environment, expected in zip(ENVIRONMENTS, told, strict=True):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert [str(hub_cache()), is_offline()] == expected, environment


def test_without_a_home_a_cache_is_looked_for_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user of no entry in the passwd file
    assert str(hub_cache()) == "~/.cache/huggingface/hub" and local_snapshot("org/model") is None
    preflight.check(load(TINY))  # asks for no Inception weights, which are looked for there


# -- downloads that broke off


INDEX = json.dumps({"weight_map": {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}})
BROKEN_OFF: dict[str, tuple[dict[str, str], str]] = {
    "only the config": ({"config.json": "{}"}, "the weights"),
    "nothing": ({"README.md": ""}, "the weights"),
    "a part": ({"m.safetensors.index.json": INDEX, "m-00001-of-00002.safetensors": ""}, "m-00002-of-00002.safetensors"),
    "a variant's part": (
        {"m.safetensors.index.fp16.json": INDEX, "m-00002-of-00002.safetensors": ""},
        "m-00001-of-00002",
    ),
    "a pipeline's model": ({"model_index.json": '{"vae": ["diffusers", "AutoencoderKL"]}'}, "vae"),
    "a pipeline's weights": ({"vae/config.json": "{}"}, "vae/the weights"),
}


@pytest.mark.parametrize("how", BROKEN_OFF)
def test_what_a_download_left_out_is_named(cache: Path, how: str) -> None:
    files, missing = BROKEN_OFF[how]
    assert missing in ", ".join(missing_from(cached(cache, files), "vae"))


def test_a_link_to_what_was_never_fetched_is_missing(cache: Path) -> None:
    snapshot = cached(cache, {"config.json": "{}"})
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert missing_from(snapshot, "vae") == ["model.safetensors"]


def test_of_a_pipeline_only_the_part_that_is_used_has_to_be_there(cache: Path) -> None:
    index = '{"vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIP"]}'
    files = {"model_index.json": index, "vae/config.json": "{}", "vae/diffusion_pytorch_model.bin": ""}
    assert missing_from(cached(cache, files), "vae") == []


@pytest.fixture
def fetching(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub from which the weights can be fetched; what it was asked for."""
    asked: list[dict[str, Any]] = []

    def fetch(hub_id: str, **options: Any) -> str:
        asked.append({"hub_id": hub_id, **options})
        return str(cached(cache, {"model.safetensors": ""}, hub_id, options["revision"] or "4567def"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return asked


def test_what_a_download_left_out_is_fetched_again_of_the_same_revision(
    cache: Path, fetching: list[dict[str, Any]]
) -> None:
    snapshot = cached(cache, {"config.json": "{}"})
    assert local_path("org/model") == snapshot and missing_from(snapshot, "transformer") == []
    assert [(one["revision"], one["cache_dir"]) for one in fetching] == [("0123abc", cache)]
    assert local_path("org/model") == snapshot and len(fetching) == 1  # whole now


def with_vae(path: str) -> JobSpec:
    vae = f"codec={{kind: vae, path: {path}, factor: 2}}"
    data = "data={kind: image_folder, path: nowhere, image_size: 16}"
    return load(TINY, [data, vae, "evaluate={metrics: [fid], samples: 8, reference: x.npz, inception: x.pth}"])


@pytest.mark.usefixtures("fetching")
def test_a_plan_names_what_is_incomplete_and_a_run_fetches_it(cache: Path) -> None:
    snapshot, job = cached(cache, {"config.json": "{}"}), with_vae("org/model")
    line = (
        f"codec.path: got 'org/model', in the hub's cache without the weights ({snapshot}); a run asks the hub for it"
    )
    assert line in preflight.absent(job)
    api.plan(job)  # keys are not those of a run, but it can be made
    preflight.fetch(job)
    assert not any(line.startswith("codec.path") for line in preflight.absent(job))


def test_offline_an_incomplete_download_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot, job = cached(cache, {"config.json": "{}"}), with_vae("org/model")
    with pytest.raises(SpecError) as caught:
        preflight.fetch(job)
    (line,) = caught.value.lines
    place = (
        f"codec.path: got 'org/model', in the hub's cache without the weights ({snapshot}), and it cannot be fetched"
    )
    assert line.startswith(f"{place}: HF_HUB_OFFLINE is set; accepted: a file or folder on this machine, or ")
    assert any("HF_HUB_OFFLINE keeps a run from fetching it" in line for line in preflight.absent(job))


# -- paths that may be ids


def test_a_mistyped_path_is_told_where_it_was_looked_for(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "vae").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    job = with_vae("models/vea")
    place = f"no file or folder here ({tmp_path}/models/vea, but models/vae), and not in the hub's cache ({cache})"
    assert any(line.startswith(f"codec.path: got 'models/vea', {place}; ") for line in preflight.absent(job))
    with pytest.raises(SpecError, match="no file or folder here"):
        preflight.fetch(job)
    shutil.rmtree(tmp_path / "models")
    assert any(f"no file or folder here ({tmp_path}/models/vea), " in line for line in preflight.absent(job))


def test_looking_into_the_cache_imports_nothing_heavy() -> None:
    code = (
        "import sys; from graftwork.specs.hub import whereabouts; whereabouts('org/model', 'vae'); "
        "print([name for name in ('huggingface_hub', 'torch', 'numpy', 'PIL', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
