"""Weights named by a hub id (`org/name`), found in the hub's local cache without importing its library.

A job's keys need to know which revision they are about, and a plan must be quick: so the cache's layout is read here.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")  # a file of several
INDEX = ".index.json"
_WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_FILES = (*_WEIGHTS, ".json", ".yaml", ".npz", ".model", ".txt")  # the last two are tokenizers'


def is_hub_id(path: str) -> bool:
    """Whether the path is no file here and could be the name of a repository on the hub."""
    return not Path(path).exists() and _ID.fullmatch(path) is not None and not path.endswith(_FILES)


def hub_cache() -> Path:
    """Return the folder that huggingface_hub keeps what it fetched in, by the variables that its library obeys."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = _expanded(os.environ.get("HF_HOME", os.path.join(caches, "huggingface")))  # noqa: PTH118  # keeps ""
    cache = os.environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))  # noqa: PTH118  # its older name
    return Path(_expanded(os.environ.get("HF_HUB_CACHE", cache)))


def _expanded(path: str) -> str:
    """Expand as the library does: what has no value stays as it is."""
    return os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111  # pathlib's fails without a home


def is_offline() -> bool:
    """Return whether huggingface_hub is told to ask nobody."""
    told = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return told.upper() in ("1", "ON", "YES", "TRUE")


def local_snapshot(hub_id: str) -> Path | None:
    """The folder of the repository's newest revision in the local cache, if it is there; its name is the revision."""
    repository = hub_cache() / f"models--{hub_id.replace('/', '--')}"
    newest = repository / "refs" / "main"
    if not newest.is_file():
        return None
    snapshot = repository / "snapshots" / newest.read_text().strip()
    return snapshot if snapshot.is_dir() else None


def missing_from(snapshot: Path, part: str) -> list[str]:
    """Return what a download that broke off left out of a model, as far as that can be told from what is there.

    part: the model's folder, where the snapshot is of a whole pipeline: `transformer`, `vae` or `text_encoder`.
    """
    within = snapshot / part
    if part in _read(snapshot / "model_index.json") and not within.is_dir():
        return [part]
    folder = within if within.is_dir() else snapshot
    files = list(folder.iterdir())
    missing = {path.name for path in files if not path.exists()}  # links to what was never fetched
    for index in files:
        if ".index." in index.name and index.suffix == ".json":
            names = _read(index).get("weight_map", {}).values()
            missing |= {name for name in names if not (folder / name).exists()}
    if not any(path.suffix in _WEIGHTS for path in files):
        missing.add("the weights")
    return [name if folder == snapshot else f"{part}/{name}" for name in sorted(missing)]


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def local_path(path: str, part: str = "transformer") -> Path:
    """Return the file or folder on this machine that `path` names; a hub id is fetched unless the cache has it whole.

    Raise OSError or ValueError, ours or those of the hub's library, if it cannot be had. part: see `missing_from`.
    """
    if not is_hub_id(path):
        return Path(path)
    snapshot = local_snapshot(path)
    if snapshot is not None and not missing_from(snapshot, part):
        return snapshot
    if is_offline():
        raise OSError("HF_HUB_OFFLINE is set")
    from huggingface_hub import snapshot_download

    revision = snapshot.name if snapshot is not None else None  # another one would be another key
    patterns = [f"*{suffix}" for suffix in _FILES]
    snapshot = Path(snapshot_download(path, revision=revision, cache_dir=hub_cache(), allow_patterns=patterns))
    if missing := missing_from(snapshot, part):
        raise OSError(f"the hub has no {', '.join(missing)} of it, or does not answer")
    return snapshot


def whereabouts(path: str, part: str) -> str | None:
    """Return where a hub id was looked for, as a file first, and what is missing there; None if the cache has it."""
    snapshot, here = local_snapshot(path), Path(path).absolute()
    missing = missing_from(snapshot, part) if snapshot is not None else []
    if snapshot is not None and missing:
        return f"in the hub's cache without {', '.join(missing)} ({snapshot})"
    if snapshot is not None:
        return None
    beside = [entry.name for entry in here.parent.iterdir()] if here.parent.is_dir() else []
    near = difflib.get_close_matches(here.name, beside, 1)
    like = f", but {Path(path).with_name(near[0])}" if near else ""
    return f"no file or folder here ({here}{like}), and not in the hub's cache ({hub_cache()})"


def parts_of(path: Path) -> list[Path]:
    """Return the files that hold one checkpoint with this one: those that an index names, or all of a number."""
    if path.name.endswith(INDEX):
        try:
            names = set(json.loads(path.read_text())["weight_map"].values())
            return [path, *(file for name in sorted(names) if (file := path.with_name(name)).is_file())]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return [path]  # whoever reads it says what is wrong
    if not (part := SHARD.fullmatch(path.name)) or not path.parent.is_dir():
        return [path]
    others = ((SHARD.fullmatch(other.name), other) for other in sorted(path.parent.iterdir()))
    keys = ("stem", "count", "suffix")
    return [other for match, other in others if match and all(match[key] == part[key] for key in keys)] or [path]
