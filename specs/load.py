"""Read a job: YAML, overrides, validation. Whatever is wrong comes out as `SpecError`, one line a problem."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Discriminator, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from graftwork.specs.fields import NoNumber, with_room
from graftwork.specs.job import JobSpec
from graftwork.specs.paths import UnknownInPath, expand
from graftwork.specs.problems import SpecError, named, shown

__all__ = ["SpecError", "job_from", "job_schema", "load", "read_job", "read_yaml", "shown"]

MAX_BYTES = 2**17  # of a job's file
MAX_DEPTH = 32  # of sections and lists
MAX_VALUES = 20_000  # with aliases written out
MAX_FILES = 16  # that extend each other
MAX_LINES = 50  # of problems
MAX_BESIDE = 500  # files beside a base that are looked at
NAMED_FILES = 3  # of those that extend a base
NAME = "letters, digits, '.', '_' and '-', at most 100 in all, the first a letter or a digit"  # specs.job.Name
EXTENDS = "the path of another job's file, from this one: it gives the fields that this file leaves out"


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
    """The names of the files beside a job's file that say `extends` of it."""
    named = re.compile(rf"""^extends:\s*(['"]?)(?:\./)?{re.escape(base.name)}\1\s*(?:#.*)?$""", re.MULTILINE)
    beside = sorted(path for suffix in ("*.yaml", "*.yml") for path in base.parent.glob(suffix))[:MAX_BESIDE]
    found = []
    for path in beside:
        with suppress(OSError, UnicodeDecodeError):
            if path.stat().st_size <= MAX_BYTES and named.search(path.read_text(encoding="utf-8")):
                found.append(path.name)
    return found


def _base(file: Path, missing: Sequence[str], extending: Sequence[str]) -> str:
    more = f" and {len(extending) - NAMED_FILES} more" if len(extending) > NAMED_FILES else ""
    names = ", ".join(extending[:NAMED_FILES]) + more
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
        return JobSpec.model_validate(with_room(document))
    except ValidationError as error:
        problems = error.errors()
        # pydantic counts a list's valid items only, so a bad item makes the list too short as well: say it once.
        blamed = {problem["loc"][:cut] for problem in problems for cut in range(len(problem["loc"]))}
        lines = [describe(problem) for problem in problems if problem["loc"] not in blamed]
        more = [f"job: and {len(lines) - MAX_LINES} more problems; accepted: none"] if len(lines) > MAX_LINES else []
        raise SpecError([*lines[:MAX_LINES], *more]) from None


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
    present = section.get("kind") or _default_kind(path)
    return kind is not None and present is not None and kind != present


def _default_kind(path: Sequence[str]) -> str | None:
    """The kind of the section at `path` where it does not say: a list's index is a step of the path, too."""
    sections: list[type[BaseModel]] = [JobSpec]
    field: FieldInfo | None = None
    for step in path:
        if not step.isdecimal():
            field = next((one.model_fields[step] for one in sections if step in one.model_fields), None)
            sections = _sections(field.annotation) if field is not None else []
    if field is None:
        return None
    if len(sections) == 1:
        return _kind(sections[0])
    for part in _parts(field.annotation):
        if isinstance(part, Discriminator) and callable(part.discriminator):
            return str(part.discriminator({}))
    return getattr(field.default, "kind", None)


class _Loader(yaml.SafeLoader):
    """YAML of plain values, each key once, that stays as small as it was written."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _unfit("tags are not accepted", event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _unfit(f"nested more than {MAX_DEPTH} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            name = (key.tag, key.value)
            if name in lines:
                raise _unfit(f"the key {shown(key.value)} is in line {lines[name]} already", key.start_mark)
            lines[name] = key.start_mark.line + 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        _measure(node, {})
        return super().construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError:  # of int(), for digits that are too many or none
            raise _unfit("a number that cannot be read", node.start_mark) from None


# Dates are text, as a job has no field for one.
_Loader.yaml_implicit_resolvers = {
    sign: [(tag, pattern) for tag, pattern in found if not tag.endswith((":timestamp", ":value"))]
    for sign, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _unfit(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, problem, mark)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node comes to with its aliases written out, and how deep; too many or an endless one raise."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 0
    found = known.get(id(node), (0, 0))
    if found is None:
        raise _unfit("an alias of what it is in", node.start_mark)
    if id(node) in known:
        return found
    known[id(node)] = None
    pairs = isinstance(node, yaml.MappingNode)
    parts = [part for item in node.value for part in (item if pairs else (item,))]
    sizes = [_measure(part, known) for part in parts]
    size, depth = 1 + sum(size for size, _ in sizes), 1 + max((deep for _, deep in sizes), default=0)
    if size > MAX_VALUES:
        raise _unfit(f"more than {MAX_VALUES:,} values with its aliases written out", node.start_mark)
    if depth > MAX_DEPTH:
        raise _unfit(f"nested more than {MAX_DEPTH} deep", node.start_mark)
    known[id(node)] = size, depth
    return size, depth


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A file's mapping; raises SpecError, in one line that names the file."""
    accepted = "accepted: a YAML file with a job"
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise SpecError([f"{path}: has more than {MAX_BYTES:,} bytes; {accepted}"])
        document = parsed(content.decode("utf-8"))
    except OSError as error:
        raise SpecError([f"{path}: cannot be read: {error.strerror}; {accepted}"]) from None
    except UnicodeDecodeError:
        raise SpecError([f"{path}: is not text; {accepted}"]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SpecError([f"{path}{where}: not valid YAML: {problem}; {accepted}"]) from None
    except ValueError:  # a NUL in its name
        raise SpecError([f"{path}: is no name of a file; {accepted}"]) from None
    if not isinstance(document, dict):
        raise SpecError([f"{path}: got {shown(document)}; accepted: a mapping with the fields of a job"])
    return document


def parsed(text: str) -> Any:
    """What YAML text stands for; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


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


def describe(problem: ErrorDetails) -> str:
    """One line: the field's path as the file has it, what was given, what is accepted."""
    location = problem["loc"]
    if problem["type"] == "invalid_key":  # which pydantic has as 1 where it is true
        location = (*location[:-1], str(problem["input"]))
    path, section, holds = _locate(location)
    given, kind, context = shown(problem["input"]), problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden" and path == "extends":
        return f"{path}: got {given}; accepted: in a job's file only"
    if kind == "extra_forbidden" and section is not None:
        known = sorted([*section.model_fields, *(["extends"] if section is JobSpec else [])])
        near = difflib.get_close_matches(path.rsplit(".", 1)[-1], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{path}: unknown field, got {given}; accepted: {', '.join(known)}{hint}"
    if kind == "missing":
        return f"{path}: missing; accepted: {_wanted(problem['loc'][-1], section, holds)}"
    if kind == "union_tag_invalid":
        return f"{path}.kind: got {shown(context['tag'])}; accepted: {context['expected_tags']}"
    return f"{path or 'job'}: got {given}; accepted: {_accepted(problem, holds)}"


def _accepted(problem: ErrorDetails, holds: Sequence[type[BaseModel]]) -> str:
    """What is accepted, where pydantic's own words are about Python."""
    kind, context, given = problem["type"], problem.get("ctx", {}), problem["input"]
    if isinstance(given, NoNumber) and given.too_large:
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


def _mapping(holds: Sequence[type[BaseModel]]) -> str:
    kinds = sorted(filter(None, map(_kind, holds)))
    return f"a mapping with a kind: {', '.join(kinds)}" if len(kinds) > 1 else "a mapping"


def _wanted(name: str | int, section: type[BaseModel] | None, holds: Sequence[type[BaseModel]]) -> str:
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


def _locate(location: Sequence[str | int]) -> tuple[str, type[BaseModel] | None, list[type[BaseModel]]]:
    """The path without pydantic's union tags, the section that has its last field, and the sections it may hold."""
    path: list[str] = []
    section: type[BaseModel] | None = None
    holds: list[type[BaseModel]] = [JobSpec]
    chosen: type[BaseModel] | None = JobSpec  # of these, the one that the location goes on in
    for step in location:
        tagged = next((one for one in holds if chosen is None and _kind(one) == step), None)
        if tagged is not None:
            chosen = tagged
            continue
        path.append(named(step))
        if isinstance(step, int):
            continue
        section = chosen
        field = section.model_fields.get(step) if section is not None else None
        holds = _sections(field.annotation) if field is not None else []
        chosen = holds[0] if len(holds) == 1 else None
    return ".".join(path), section, holds


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models in a type, however deep."""
    return [part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]


def _parts(annotation: Any) -> list[Any]:
    """A type and what it is made of, however deep, annotations included."""
    return [annotation, *(part for inner in get_args(annotation) for part in _parts(inner))]


def _kind(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return field.default if field else None
