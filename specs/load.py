"""Read a job: YAML, overrides, validation. Whatever is wrong comes out as `SpecError`, one line a problem."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from specs.job import JobSpec


class SpecError(Exception):
    """The request cannot be carried out as it stands; each line names a field or file, what it is, what is accepted."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)


def load(path: str | Path, overrides: Iterable[str] = ()) -> JobSpec:
    """The job in a YAML file, with `section.field=value` overrides applied before it is checked."""
    return job_from(read_job(Path(path)), overrides)


def job_from(document: dict[str, Any], overrides: Iterable[str] = ()) -> JobSpec:
    """The job in a plain dictionary, as YAML gives it."""
    for override in overrides:
        apply_override(document, override)
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        problems = error.errors()
        # pydantic counts a list's valid items only, so a bad item makes the list too short as well: say it once.
        blamed = {problem["loc"][:cut] for problem in problems for cut in range(len(problem["loc"]))}
        raise SpecError([describe(problem) for problem in problems if problem["loc"] not in blamed]) from None


def read_job(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A job's document; `extends: other.yaml`, beside it, gives the fields that it does not name itself.

    Sections are merged field by field, unless their kinds differ; lists, such as the edits, are replaced.
    """
    document = read_yaml(path)
    base = document.pop("extends", None)
    if base is None:
        return document
    if not isinstance(base, str):
        raise SpecError([f"{path}: extends: got {shown(base)}; accepted: the path of another job's file"])
    other = path.parent / base
    if other.resolve() in (file.resolve() for file in (*above, path)):
        raise SpecError([f"{path}: extends: got {base!r}, which extends this file; accepted: files without a circle"])
    return merged(read_job(other, (*above, path)), document)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    result = dict(base)
    for name, value in over.items():
        below = result.get(name)
        if isinstance(below, dict) and isinstance(value, dict) and value.get("kind") in (None, below.get("kind")):
            result[name] = merged(below, value)
        else:
            result[name] = value
    return result


def read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError([f"{path}: cannot be read: {error.strerror}; accepted: a YAML file with a job"]) from None
    except UnicodeDecodeError:
        raise SpecError([f"{path}: is not text; accepted: a YAML file with a job"]) from None
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SpecError([f"{path}{where}: not valid YAML: {problem}"]) from None
    if not isinstance(document, dict):
        raise SpecError([f"{path}: got {shown(document)}; accepted: a mapping with the fields of a job"])
    return document


def apply_override(document: dict[str, Any], override: str) -> None:
    """Set `graft.0.operator.kernel=8`; the value is YAML.

    Setting a `kind` to another one starts that section anew: the fields of the old kind mean nothing to it.
    """
    path, equals, text = override.partition("=")
    steps = [step for step in re.split(r"[.\[\]]+", path.strip()) if step]
    if not equals or not steps:
        raise SpecError([f"--set: got {override!r}; accepted: path.to.field=value"])
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SpecError([f"--set {path}: got {text!r}; accepted: a YAML value"]) from None
    here: Any = document
    for number, step in enumerate(steps[:-1]):
        here = _enter(here, step, steps[:number])
    last = steps[-1]
    _enter(here, last, steps[:-1], make=False)
    if isinstance(here, list):
        here[int(last)] = value
    elif last == "kind" and here.get("kind") != value:
        here.clear()
        here["kind"] = value
    else:
        here[last] = value


def _enter(here: Any, step: str, above: list[str], make: bool = True) -> Any:
    """What stands at `step` of the section or list at `above`; a missing section is made."""
    path = ".".join([*above, step])
    if isinstance(here, list):
        if not step.isdigit() or int(step) >= len(here):
            raise SpecError([f"--set {path}: got {step!r}; accepted: 0 .. {len(here) - 1}"])
        return here[int(step)]
    if not isinstance(here, dict):
        raise SpecError([f"--set {'.'.join(above)}: got {shown(here)}; accepted: a section with fields"])
    if here.get(step) is None and make:
        here[step] = {}
    return here.get(step)


def describe(problem: ErrorDetails) -> str:
    """One line: the field's path as the file has it, what was given, what is accepted."""
    path, section, choices = _locate(problem["loc"])
    given, kind, context = shown(problem["input"]), problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden" and section is not None:
        known = sorted(section.model_fields)
        near = difflib.get_close_matches(path.rsplit(".", 1)[-1], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{path}: unknown field, got {given}; accepted: {', '.join(known)}{hint}"
    if kind == "missing":
        return f"{path}: missing; accepted: {_wanted(section, path)}"
    if kind == "union_tag_not_found":
        kinds = ", ".join(sorted(filter(None, map(_kind, choices))))
        return f"{path}: got {given}; accepted: a mapping with a kind{': ' if kinds else ''}{kinds}"
    if kind == "union_tag_invalid":
        return f"{path}.kind: got {context['tag']!r}; accepted: {context['expected_tags']}"
    if kind == "refused":
        return f"{path}: got {given}; accepted: {context['accepted']}"
    accepted = problem["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
    return f"{path or 'job'}: got {given}; accepted: {accepted}"


def _wanted(section: type[BaseModel] | None, path: str) -> str:
    field = section.model_fields.get(path.rsplit(".", 1)[-1]) if section else None
    return (field.description if field and field.description else None) or "a value; the field is required"


def _locate(location: Sequence[str | int]) -> tuple[str, type[BaseModel] | None, list[type[BaseModel]]]:
    """The path without pydantic's union tags, the section that holds its last field, and what that field may hold."""
    path: list[str] = []
    section: type[BaseModel] | None = JobSpec
    inside: list[type[BaseModel]] = []  # the members of a union whose tag comes next
    for step in location:
        member = next((m for m in inside if _kind(m) == step), None)
        if member is not None:
            section, inside = member, []
            continue
        path.append(str(step))
        if isinstance(step, str) and section is not None and step in section.model_fields:
            inside = _sections(section.model_fields[step].annotation)
            holder, section = section, inside[0] if len(inside) == 1 else None
            if section is None and not inside:
                section = holder
    return ".".join(path), section, inside


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models in a type, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _sections(part)]


def _kind(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return field.default if field else None


def shown(value: object) -> str:
    """A value as an error line shows it: short, on one line."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
