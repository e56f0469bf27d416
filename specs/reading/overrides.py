"""Documents that extend others, and single fields set from the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from graftwork.specs.paths import UnknownInPath, expand
from graftwork.specs.problems import SpecError, named, shown
from graftwork.specs.reading.safe_yaml import MAX_DEPTH, parsed, read_yaml
from graftwork.specs.reading.schema import place_at

MAX_FILES = 16  # that extend each other
EXTENDS = "the path of another job's file, from this one: it gives the fields that this file leaves out"


def read_job(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A job's document; `extends: other.yaml`, beside it, gives the fields that it does not name itself.

    Sections are merged field by field, unless their kinds differ; lists, such as the edits, are replaced.
    """
    document = read_yaml(path)
    if "extends" not in document:
        return document
    base = document.pop("extends")
    if not isinstance(base, str) or not base.strip():
        raise SpecError([f"{path}: extends: got {shown(base)}; accepted: the path of another job's file"])
    accepted = "accepted: a .yaml file, by its path from this one"
    if "\0" in base or Path(base).suffix not in (".yaml", ".yml"):
        raise SpecError([f"{path}: extends: got {shown(base)}; {accepted}"])
    other = path.parent / expanded(base, f"{path}: extends")
    try:
        if other.exists() and not other.is_file():
            raise SpecError([f"{path}: extends: got {shown(base)}, which is no file; {accepted}"])
        circle = other.resolve() in (file.resolve() for file in (*above, path))
    except (OSError, RuntimeError):  # a name too long, a link to itself
        raise SpecError([f"{path}: extends: got {shown(base)}, which cannot be read; {accepted}"]) from None
    if circle:
        raise SpecError([f"{path}: extends: got {base!r}, which extends this file; accepted: files without a circle"])
    if len(above) + 2 > MAX_FILES:
        raise SpecError(
            [f"{path}: extends: got {shown(base)}; accepted: at most {MAX_FILES} files that extend each other"]
        )
    return merged(read_job(other, (*above, path)), document)


def expanded(path: str, field: str, expansion: Callable[[str], str] = expand) -> str:
    """Return a path with `~` and the variables in it filled in; raise SpecError, which names the field."""
    try:
        return expansion(path)
    except UnknownInPath as unknown:
        raise SpecError([f"{field}: got {shown(path)}; accepted: {unknown}"]) from None


def merged(base: dict[str, Any], over: dict[str, Any], above: tuple[str, ...] = ()) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    result = dict(base)
    for name, value in over.items():
        below, path = result.get(name), (*above, str(name))
        if isinstance(below, dict) and isinstance(value, dict) and not _differs(below, value.get("kind"), path):
            result[name] = merged(below, value, path)
        else:
            result[name] = value
    return result


def _differs(section: dict[str, Any], kind: object, path: Sequence[str]) -> bool:
    """Whether the section at `path` is of another kind than the one asked for, if any."""
    present = section.get("kind") or place_at(path).default_kind
    return kind is not None and present is not None and kind != present


def apply_override(document: dict[str, Any], override: str) -> None:
    """Set `graft.0.operator.kernel=8`; the value is YAML.

    Setting a `kind` to another one starts that section anew: the fields of the old kind mean nothing to it.
    """
    path, equals, text = override.partition("=")
    steps = [step for step in re.split(r"[.\[\]]+", path.strip()) if step]
    if not equals or not steps:
        raise SpecError([f"--set: got {shown(override)}; accepted: path.to.field=value"])
    if len(steps) > MAX_DEPTH:
        raise SpecError([f"--set: got {shown(path)}; accepted: path.to.field=value, at most {MAX_DEPTH} deep"])
    try:
        value = parsed(text)
    except yaml.YAMLError:
        raise SpecError([f"--set {path}: got {shown(text)}; accepted: a YAML value, each key once"]) from None
    here: Any = document
    for number, step in enumerate(steps[:-1]):
        here = _enter(here, step, steps[:number])
    last = steps[-1]
    _enter(here, last, steps[:-1], make=False)
    if isinstance(here, list):
        here[int(last)] = value
    elif last == "kind" and _differs(here, value, steps[:-1]):
        here.clear()
        here["kind"] = value
    else:
        here[last] = value


def _enter(here: Any, step: str, above: list[str], make: bool = True) -> Any:
    """What stands at `step` of the section or list at `above`; a missing section is made."""
    path = ".".join(map(named, [*above, step]))
    if isinstance(here, list):
        if not here:
            name = ".".join(map(named, above))
            raise SpecError(
                [f"--set {path}: got {shown(step)}; accepted: no item, the list is empty; set {name} itself"]
            )
        if step not in map(str, range(len(here))):
            raise SpecError([f"--set {path}: got {shown(step)}; accepted: 0 .. {len(here) - 1}"])
        return here[int(step)]
    if not isinstance(here, dict):
        raise SpecError([f"--set {'.'.join(map(named, above))}: got {shown(here)}; accepted: a section with fields"])
    if here.get(step) is None and make:
        here[step] = {}
    return here.get(step)
