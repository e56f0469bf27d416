"""Folders with modules of somebody else, of the names that our packages have in a checkout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

BARE = ("cluster", "models", "pipeline", "specs", "stages")  # every DiT checkout has a models.py


def shadow(folder: Path, modules: Iterable[str] = BARE, packages: Iterable[str] = ()) -> Path:
    """Write modules, and packages, that raise an error when they are imported; returns the folder."""
    for name in modules:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('this {name} is of somebody else')\n")
    for name in packages:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise RuntimeError('this {name} is of somebody else')\n")
    return folder
