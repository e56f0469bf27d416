"""Whatever somebody writes in a job: a plan comes out, or one line a problem that names the field."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from graftwork.pipeline import api
from graftwork.pipeline.cli.app import app
from graftwork.pipeline.planning.plan import Plan
from graftwork.specs.reading.load import SpecError, job_from, job_schema, load
from graftwork.specs.reading.overrides import read_job
from tests.conftest import ROOT

Path_ = tuple[str | int, ...]
FILES = [*sorted((ROOT / "examples").glob("*.yaml")), *sorted((ROOT / "examples" / "imagenet").glob("*.yaml"))]
SEARCHED: dict[str, Any] = {  # what the examples have none of
    "name": "searched",
    "model": {"size": "S/8"},
    "data": {"kind": "digits", "image_size": 64},
    "graft": [
        {
            "target": "mha",
            "operator": {"kind": "swa"},
            "layers": {"kind": "learned", "budget": 0.9, "operators": [{"kind": "mamba2"}], "search": {"steps": 5}},
        }
    ],
    "tracking": {"uri": "http://localhost:5000", "experiment": "fuzz"},
}
GROUPED: dict[str, Any] = {
    "name": "grouped",
    "model": {"depth": 6, "width": 32, "heads": 2, "patch": 2},
    "graft": [
        {"kind": "replace", "target": "mlp", "operator": {"kind": "mlp"}, "layers": {"kind": "most_local", "count": 2}},
        {
            "target": "mha",
            "operator": {"kind": "hyena_x"},
            "layers": {"kind": "learned", "groups": [[0, 1, 2], [3, 4, 5]], "keep": [1, 2], "pinned": [0]},
        },
    ],
}
PAIRED: dict[str, Any] = {**GROUPED, "name": "paired", "graft": [{"kind": "parallel", "pairs": [[0, 1], [4, 5]]}]}
EXAMPLES = [document for document in map(read_job, FILES) if "graft" in document]
DOCUMENTS = [*EXAMPLES, *[SEARCHED, GROUPED, PAIRED] * 4]
SCHEMA = job_schema()
LINE, NAME = 600, 40  # characters of a line, and of a field's name in it

# The same examples in every run: what fails here fails everywhere.
fuzzed = partial(settings, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def fields(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field that the schema has anywhere, with what it says of it."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {}).items()
        for part in schema.values():
            yield from fields(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from fields(part)


FIELDS = sorted({name for name, _ in fields(SCHEMA)})
KINDS = sorted({described["const"] for name, described in fields(SCHEMA) if name == "kind" and "const" in described})
CHOICES = sorted(
    {choice for _, described in fields(SCHEMA) for choice in described.get("enum", ()) if isinstance(choice, str)}
)


def bounds(schema: Any) -> Iterator[float]:
    """Every limit that the schema puts to a number."""
    if isinstance(schema, dict):
        for name, part in schema.items():
            if name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") and isinstance(part, int | float):
                yield part
            yield from bounds(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from bounds(part)


LIMITS = sorted(set(bounds(SCHEMA)))
NASTY = [
    "", " ", "\0", "\x1b[31mred", "a\nb", "\u202eabc", "\ud800", "é漢字🙂", "x" * 300, "x/" * 3000, "../../etc/passwd",
    "/dev/null/x", "~", "{}", "%s", "${HOME}", "http://[::1", "sqlite://", "nonsense://x", "s3://user:hunter2pass@b/x",
    "1e400", "nan", "NaN", "inf", "-0", "1_0", "0x10", "true", "null", "all", "XL/2", "١٢",
]  # fmt: skip
texts = st.one_of(st.sampled_from(NASTY), st.text(max_size=20), st.sampled_from([*FIELDS, *KINDS, *CHOICES]))
numbers = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**53, 2**63, 10**30, 10**400, -(10**30)]),
    st.sampled_from([64, 5000]).map(lambda digits: 16**digits),
    st.sampled_from([0.0, -0.0, 0.5, 1.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(LIMITS).flatmap(lambda limit: st.sampled_from([limit, limit - 1, limit + 1, limit + 0.5])),
    st.integers(),
    st.floats(),
)
plain = st.one_of(st.none(), st.booleans(), numbers, texts)
keys = st.one_of(
    st.sampled_from(FIELDS), st.text(max_size=8), st.sampled_from([None, 3, True, 1.5, "\0", "a.b", "x" * 500])
)


def nested(depth: int) -> Any:
    value: Any = 0
    for level in range(depth):
        value = [value] if level % 2 else {"kind": value}
    return value


values = st.one_of(
    plain,
    st.recursive(
        plain,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
        max_leaves=6,
    ),
    st.sampled_from([[], {}, [[]], [{}], {"kind": {}}, {"kind": []}, {"kind": None}]),
    st.sampled_from(KINDS).map(lambda kind: {"kind": kind}),
    st.sampled_from([5, 25]).map(nested),
    st.lists(st.integers(-1, 6), min_size=300, max_size=300),
)


def places(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The path of everything in a document."""
    if path:
        yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, part in parts:
        yield from places(part, (*path, step))


def at(document: Any, path: Path_) -> Any:
    for step in path:
        document = document[step]
    return document


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A job of the examples, changed in one to three places."""
    document: dict[str, Any] = deepcopy(draw(st.sampled_from(DOCUMENTS)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(document)) or [("name",)]))
        above, last = at(document, path[:-1]), path[-1]
        match draw(st.sampled_from(["set", "set", "set", "drop", "add", "swap", "repeat", "kind"])):
            case "set":
                above[last] = draw(values)
            case "drop":
                del above[last]
            case "add" if isinstance(above, dict):
                above[draw(keys)] = draw(values)
            case "swap":
                above[last] = deepcopy(at(document, draw(st.sampled_from(list(places(document)) or [("name",)]))))
            case "repeat" if isinstance(above, list) and isinstance(last, int):
                above.append(deepcopy(above[last]))
            case "kind" if isinstance(above, dict):
                above["kind"] = draw(st.sampled_from(KINDS))
    return document


def named(step: object) -> str:
    text = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in str(step))
    return text if len(text) <= NAME else text[: NAME - 3] + "..."


def assert_planned_or_refused(plan: Callable[[], Plan], document: Any, others: Sequence[str] = ()) -> None:
    """`plan()` gives a plan, or a SpecError whose lines are each one line about a field, or about one of the others."""
    try:
        assert plan().steps
        return
    except SpecError as error:
        lines = error.lines
    paths = {".".join(map(named, path)) for path in places(document)}
    assert lines
    for line in lines:
        assert line.isprintable() and len(line) <= LINE, line
        assert re.search(
            r": got |: missing; |: unknown field, got |: and \d+ more|: not valid YAML|cannot be read|is not text", line
        ), line
        assert "; accepted: " in line, line
        assert "hunter2pass" not in line
        of_a_place = any(line.startswith(f"{path}: ") for path in paths) or of_the_schema(line, paths)
        assert of_a_place or line.startswith(("job: and ", *others)), line


def of_the_schema(line: str, paths: set[str]) -> bool:
    """Whether it is about a field that the document lacks: below one that is there, by the schema's names alone."""
    steps = line.partition(": ")[0].split(".")
    known = (count for count in range(len(steps)) if ".".join(steps[:count]) in {"", *paths})
    return any(all(step in FIELDS or step.isdecimal() for step in steps[count:]) for count in known)


@fuzzed(max_examples=400)
@given(mutated())
def test_whatever_a_job_says_it_is_planned_or_refused_by_field(document: dict[str, Any]) -> None:
    assert_planned_or_refused(lambda: api.plan(job_from(deepcopy(document))), document)


paths = st.one_of(
    st.sampled_from(DOCUMENTS).flatmap(lambda document: st.sampled_from(list(places(document)))),
    st.lists(st.one_of(st.sampled_from([*FIELDS, 0, 1, -1, 99]), st.text(max_size=5)), min_size=1, max_size=4),
    st.just(["name"] * 5000),
)


def spelt(value: Any) -> str:
    try:
        return json.dumps(value)
    except ValueError:  # of an integer with more digits than Python writes
        return "9" * 5000


spellings = st.one_of(values.map(spelt), st.text(max_size=30), st.sampled_from(["[", "{a: 1, a: 2}", "*x", "!!int x"]))


@fuzzed(max_examples=200)
@given(st.sampled_from(DOCUMENTS), st.lists(st.tuples(paths, spellings), min_size=1, max_size=3))
def test_whatever_is_set_it_is_planned_or_refused_by_field(job: Any, settings_: list[tuple[Any, str]]) -> None:
    document = deepcopy(job)
    overrides = [f"{'.'.join(map(str, path))}={value}" for path, value in settings_]
    assert_planned_or_refused(lambda: api.plan(job_from(document, overrides)), document, ["--set"])


TOKENS = [
    *b"\0 \t \r \n { } [ ] | > # ' @ ` ~ = ...".split(b" "),
    *[b" ", b'"', b"? ", b": ", b"- ", b"&a ", b"*a", b"<<: ", b"!!python/object:os.system ", b"!!binary ", b"!x "],
    *[b"---\n", b"%YAML 9\n", b"\xff", b"\xc2\x85", b"\xe2\x80\xa8", b"\xef\xbb\xbf"],
    *[b"0x_", b"1:60", b"2024-13-45", b"9" * 5000, b"[" * 2000, b"- " * 500],
]


@st.composite
def torn(draw: st.DrawFn) -> bytes:
    """The text of an example, with bytes of it gone, changed or put in."""
    text = bytearray(draw(st.sampled_from(FILES)).read_bytes())
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        match draw(st.sampled_from(["put", "put", "cut", "change", "repeat", "end"])):
            case "put":
                text[start:start] = draw(st.sampled_from(TOKENS))
            case "cut":
                del text[start : start + draw(st.integers(1, 40))]
            case "change":
                text[start : start + 1] = draw(st.binary(min_size=1, max_size=2))
            case "repeat":
                text[start:start] = text[start : start + draw(st.integers(1, 80))]
            case "end":
                del text[start:]
    return bytes(text)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all examples, which extend each other."""
    folder = tmp_path_factory.mktemp("examples")
    for file in FILES:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@fuzzed(max_examples=200)
@given(text=torn())
def test_whatever_is_in_a_file_it_is_planned_or_refused(examples: Path, text: bytes) -> None:
    path = examples / "job.yaml"
    path.write_bytes(text)
    try:
        document = read_job(path)
    except SpecError:
        document = {}
    assert_planned_or_refused(lambda: api.plan(load(path)), document, [str(examples)])


@fuzzed(max_examples=15)
@given(mutated())
def test_whatever_a_file_says_the_command_line_ends_with_a_plan_or_with_2(document: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "job.yaml"
        path.write_text(spelt(document))
        done = CliRunner().invoke(app, ["plan", str(path), "--set", f"store={folder}/store"])
    assert done.exit_code in (0, 2) and isinstance(done.exception, SystemExit | None), done.exception
    assert "Traceback" not in done.output
    assert done.exit_code == 0 or all(line.startswith("graft: ") for line in done.stderr.splitlines())
