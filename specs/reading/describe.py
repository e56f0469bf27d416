"""One line about each problem that pydantic reports: the field's path, what was given, what is accepted."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Literal, get_args, get_origin

from pydantic_core import ErrorDetails

from graftwork.specs.fields import NotANumber
from graftwork.specs.job import JobSpec
from graftwork.specs.problems import named, shown
from graftwork.specs.reading.schema import JOB, Place, Section, kind_of

NAME = "letters, digits, '.', '_' and '-', at most 100 in all, the first a letter or a digit"  # specs.job.Name


def describe(problem: ErrorDetails) -> str:
    """Return one line: the field's path as the file has it, the value there, and what is accepted."""
    location = problem["loc"]
    if problem["type"] == "invalid_key":  # which pydantic has as 1 where it is true
        location = (*location[:-1], str(problem["input"]))
    path, section, holds = _locate(location)
    value, kind, context = shown(problem["input"]), problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden" and path == "extends":
        return f"{path}: got {value}; accepted: in a job's file only"
    if kind == "extra_forbidden" and section is not None:
        known = sorted([*section.model_fields, *(["extends"] if section is JobSpec else [])])
        near = difflib.get_close_matches(path.rsplit(".", 1)[-1], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{path}: unknown field, got {value}; accepted: {', '.join(known)}{hint}"
    if kind == "missing":
        return f"{path}: missing; accepted: {_wanted(problem['loc'][-1], section, holds)}"
    if kind == "union_tag_invalid":
        return f"{path}.kind: got {shown(context['tag'])}; accepted: {context['expected_tags']}"
    return f"{path or 'job'}: got {value}; accepted: {_accepted(problem, holds)}"


def _accepted(problem: ErrorDetails, holds: Sequence[Section]) -> str:
    """What is accepted, where pydantic's own words are about Python."""
    kind, context, given = problem["type"], problem.get("ctx", {}), problem["input"]
    if isinstance(given, NotANumber) and given.too_large:
        return "a number of at most 64 bits"
    if kind in ("union_tag_not_found", "model_type", "model_attributes_type", "dict_type"):
        return _mapping(holds)
    if kind == "too_short":
        return "at least one" if context["min_length"] == 1 else f"at least {context['min_length']}"
    plain = {
        "refused": context.get("accepted"),
        "tuple_type": "a list",
        "list_type": "a list",
        "too_long": f"at most {context.get('max_length')}",
        "string_pattern_mismatch": NAME,
        "invalid_key": "the name of a field",
    }
    return plain.get(kind) or re.sub(r"^(Input should be|Value should be|String should have) ", "", problem["msg"])


def _mapping(holds: Sequence[Section]) -> str:
    kinds = sorted(filter(None, map(kind_of, holds)))
    return f"a mapping with a kind: {', '.join(kinds)}" if len(kinds) > 1 else "a mapping"


def _wanted(name: str | int, section: Section | None, holds: Sequence[Section]) -> str:
    """What a field that is missing may be."""
    field = section.model_fields.get(str(name)) if section else None
    if field is not None and field.description:
        return field.description
    if holds:
        several = field is not None and get_origin(field.annotation) is tuple
        return _mapping(holds).replace("a mapping", "a list of mappings") if several else _mapping(holds)
    if field is not None and get_origin(field.annotation) is Literal:
        return ", ".join(map(repr, get_args(field.annotation)))
    return "a value; the field is required"


def _locate(location: Sequence[str | int]) -> tuple[str, Section | None, Sequence[Section]]:
    """The path without pydantic's union tags, the section that has its last field, and the sections it may hold."""
    path: list[str] = []
    section: Section | None = None
    place = JOB
    holds = place.sections
    for step in location:
        if (tagged := place.of_kind(step)) is not None:
            place = tagged
            continue
        path.append(named(step))
        if not isinstance(step, int):
            section = place.section
            place = place.below(step) if section is not None else Place(())
            holds = place.sections  # whichever of them the location goes on in
    return ".".join(path), section, holds
