"""Read a job: YAML, overrides, validation. Whatever is wrong comes out as `SpecError`, one line a problem."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from graftwork.specs.fields import wrap_large_integers
from graftwork.specs.job import JobSpec
from graftwork.specs.problems import SpecError, first_few, shown
from graftwork.specs.reading.describe import describe
from graftwork.specs.reading.overrides import EXTENDS, apply_override, expanded, read_job
from graftwork.specs.reading.safe_yaml import MAX_BYTES, read_yaml

__all__ = ["SpecError", "job_from", "job_schema", "load", "read_job", "read_yaml", "shown"]
MAX_LINES = 50  # of problems
MAX_BESIDE = 500  # files beside a base that are looked at
NAMED_FILES = 3  # of those that extend a base


def load(path: str | Path, overrides: Iterable[str] = ()) -> JobSpec:
    """The job in a YAML file, with `section.field=value` overrides applied before it is checked."""
    file = Path(expanded(str(path), "the job's file"))
    document = read_job(file)
    try:
        return job_from(document, overrides)
    except SpecError as error:
        missing = [name for name, field in JobSpec.model_fields.items() if field.is_required() and name not in document]
        extending = files_extending(file) if missing else []
        if not extending:
            raise
        others = [line for line in error.lines if not line.startswith(tuple(f"{name}: missing" for name in missing))]
        raise SpecError([_base(file, missing, extending), *others]) from None


def files_extending(base: Path) -> list[str]:
    """Return the names of the files beside a job's file that extend it."""
    named = re.compile(rf"""^extends:\s*(['"]?)(?:\./)?{re.escape(base.name)}\1\s*(?:#.*)?$""", re.MULTILINE)
    beside = sorted(path for suffix in ("*.yaml", "*.yml") for path in base.parent.glob(suffix))[:MAX_BESIDE]
    names = []
    for path in beside:
        with suppress(OSError, UnicodeDecodeError):
            if path.stat().st_size <= MAX_BYTES and named.search(path.read_text(encoding="utf-8")):
                names.append(path.name)
    return names


def _base(file: Path, missing: Sequence[str], extending: Sequence[str]) -> str:
    names = first_few(extending, NAMED_FILES)
    found = f"which has no {', '.join(missing)}: it is a base that others extend"
    return f"{file}: got a file {found}; accepted: one of those beside it, {names}; or one with extends: {file.name}"


def job_schema() -> dict[str, Any]:
    """The JSON Schema of a job's file."""
    schema = JobSpec.model_json_schema()
    required = schema.pop("required")
    said = f"A file that extends another may leave out what it inherits; any other needs {', '.join(required)}."
    return {
        **schema,
        "description": f"{schema['description']} {said}",
        "properties": {"extends": {"title": "Extends", "type": "string", "description": EXTENDS}}
        | schema["properties"],
        "anyOf": [{"required": ["extends"]}, {"required": required}],
    }


def job_from(document: dict[str, Any], overrides: Iterable[str] = ()) -> JobSpec:
    """The job in a plain dictionary, as YAML gives it."""
    for override in overrides:
        apply_override(document, override)
    try:
        return JobSpec.model_validate(wrap_large_integers(document))
    except ValidationError as error:
        problems = error.errors()
        # pydantic counts a list's valid items only, so a bad item makes the list too short as well: say it once.
        blamed = {problem["loc"][:cut] for problem in problems for cut in range(len(problem["loc"]))}
        lines = [describe(problem) for problem in problems if problem["loc"] not in blamed]
        more = [f"job: and {len(lines) - MAX_LINES} more problems; accepted: none"] if len(lines) > MAX_LINES else []
        raise SpecError([*lines[:MAX_LINES], *more]) from None
