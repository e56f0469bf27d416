"""YAML read safely: limits on size, depth and aliases; no duplicated keys, no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from graftwork.specs.problems import SpecError, shown

MAX_BYTES = 2**17  # of a job's file
MAX_DEPTH = 32  # of sections and lists
MAX_VALUES = 20_000  # with aliases written out


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
    """Return a node's number of values and its depth, aliases written out. Raise if either is too large or endless."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 0
    measure = known.get(id(node), (0, 0))
    if measure is None:
        raise _unfit("an alias of what it is in", node.start_mark)
    if id(node) in known:
        return measure
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
