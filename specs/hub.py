"""Weights named by a hub id (`org/name`), found in the hub's local cache without importing its library.

A job's keys need to know which revision they are about, and a plan must be quick: so the cache's layout is read here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".json", ".yaml", ".npz")


def is_hub_id(path: str) -> bool:
    """Whether the path is no file here and could be the name of a repository on the hub."""
    return not Path(path).exists() and _ID.fullmatch(path) is not None and not path.endswith(_FILES)


def local_snapshot(hub_id: str) -> Path | None:
    """The folder of the repository's newest revision in the local cache, if it is there; its name is the revision."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    repository = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{hub_id.replace('/', '--')}"
    newest = repository / "refs" / "main"
    if not newest.is_file():
        return None
    snapshot = repository / "snapshots" / newest.read_text().strip()
    return snapshot if snapshot.is_dir() else None


def local_path(path: str) -> Path:
    """The file or folder on this machine that `path` names; a hub id is fetched unless the cache has it."""
    if not is_hub_id(path):
        return Path(path)
    snapshot = local_snapshot(path)
    if snapshot is None:
        from huggingface_hub import snapshot_download

        snapshot = Path(snapshot_download(path, allow_patterns=[f"*{suffix}" for suffix in _FILES]))
    return snapshot
