"""Which files of a folder hold its model: one, several numbered ones, or what an index names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from graftwork.models.checkpoints.errors import UnfitCheckpoint, named
from graftwork.models.checkpoints.wrappers import AVERAGED
from graftwork.specs.hub import INDEX, SHARD

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
# What tools save beside a model that has the suffix of one.
BESIDE_MODELS = re.compile(r"optim|scheduler|lr_scheduler|sampler|random_states|rng|scaler|training_args|custom_", re.I)
# Stems by which a folder's model is known among others, the first before the next.
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
MAX_NAME_BYTES = 255
ZERO_TOOL = "zero_to_fp32.py"  # DeepSpeed saves it beside its checkpoints
ZERO_PART = re.compile(r"(\w*_)?zero_pp_rank_\d+.*|mp_rank_\d+_model_states\.pt")


def model_files(folder: Path, accepted: str) -> tuple[list[Path], list[Path]]:
    """Return the files of the folder's model (one, its numbered parts, or their index), and those of others in it.

    Averaged weights come before others. Raises UnfitCheckpoint if there is no model, or several of equal right.
    """
    _refuse_parts(folder)
    models = _models(folder)
    averaged = [stem for stem in models if AVERAGED.search(stem)]
    first = averaged if len(averaged) == 1 else [stem for stem in STEMS if stem in models] or list(models)
    if not models:
        held = named(sorted(path.name for path in folder.iterdir()), 5, ", ")
        raise UnfitCheckpoint(f"{folder}: no checkpoint in it{f', but {held}' if held else ''}", accepted)
    if first[0] not in STEMS and len(first) > 1:
        several = named([files[0].name for files in models.values()], 5, ", ")
        raise UnfitCheckpoint(f"{folder}: several checkpoints, {several}", "one of these files, by its path")
    return models[first[0]], [files[0] for stem, files in models.items() if stem != first[0]]


def _models(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each model in a folder by stem: a `.pt` before a `.safetensors`, an index before parts."""
    whole: dict[str, list[Path]] = {}
    parts: dict[str, list[Path]] = {}
    indices: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or BESIDE_MODELS.match(path.name):
            continue
        if path.name.endswith(INDEX):
            indices[_stem(path)] = [path]
        elif path.suffix.lower() in SUFFIXES and (part := SHARD.fullmatch(path.name)):
            parts.setdefault(part["stem"], []).append(path)
        elif path.suffix.lower() in SUFFIXES:
            whole.setdefault(path.stem, [path])
    return parts | indices | whole


def _stem(path: Path) -> str:
    """Return the name of a model's file or index without what says which of the two it is, and of which format."""
    return path.name.removesuffix(INDEX).rpartition(".")[0]


def _refuse_parts(folder: Path) -> None:
    """Raise UnfitCheckpoint, with the tool that joins them, if the folder has a model in parts of a training's own."""
    if _names_a_step(folder) or any(_zero_parts(folder)):
        top = folder.parent if _names_a_step(folder.parent) else folder
        raise UnfitCheckpoint(
            f"{folder}: is a DeepSpeed checkpoint, whose weights are in parts",
            f"the file that {ZERO_TOOL} joins them in: python {top / ZERO_TOOL} {top} OUT",
        )
    if (folder / ".metadata").is_file() and any(folder.glob("*.distcp")):
        raise UnfitCheckpoint(
            f"{folder}: is a distributed checkpoint of torch, in parts",
            "the file that torch joins them in: python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{folder} OUT.pt",
        )


def _names_a_step(folder: Path) -> bool:
    """Return whether the folder has DeepSpeed's `latest`, a text with the name of a folder beside it."""
    latest = folder / "latest"
    if not latest.is_file() or latest.stat().st_size > MAX_NAME_BYTES:
        return False
    name = latest.read_text(errors="replace").strip()
    return "\0" not in name and Path(name).name == name != "" and (folder / name).is_dir()


def _zero_parts(folder: Path) -> Iterator[Path]:
    """Yield the files of DeepSpeed's in a folder, or in those of its steps."""
    for place in (folder, *folder.glob("global_step*")):
        yield from (path for path in place.iterdir() if place.is_dir() and ZERO_PART.fullmatch(path.name))
