"""The JSON Schema of a job as a page of Markdown: each section a table of its fields."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]
INTRODUCTION = """# Every field of a spec

Made by `graft schema --markdown` from the same classes that check a spec; `graft schema` prints the JSON Schema, from
which an editor completes YAML. A field without a default is required. A section with kinds takes the fields of its
kind only. Setting another `kind` starts a section anew.
"""


def page_of(schema: Schema) -> str:
    """Return the Markdown page of a job's schema: the job's own fields first, then each section in the order of use."""
    sections = [_section("The job", schema, schema)]
    sections += [_section(_title(name, schema["$defs"][name]), schema["$defs"][name], schema) for name in _used(schema)]
    return "\n".join([INTRODUCTION, *sections])


def _section(title: str, section: Schema, schema: Schema) -> str:
    rows = [
        f"| `{name}` | {_cell(_accepted(field, schema))} | {_cell(_default(name, field, section))} "
        f"| {_cell(field.get('description', ''))} |"
        for name, field in section["properties"].items()
        if name != "kind"
    ]
    head = ["| field | accepted | default | |", "|---|---|---|---|"] if rows else []
    said = section.get("description", "") if section is not schema else ""
    return "\n".join([f"## {title}", "", *([said, ""] if said else []), *head, *rows, ""])


def _title(name: str, section: Schema) -> str:
    kind = section["properties"].get("kind", {}).get("const")
    words = " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*", name.removesuffix("Spec")))
    return f"{words} (`kind: {kind}`)" if kind else words


def _used(schema: Schema) -> list[str]:
    """Return the names of all sections, each where the job comes to it first."""
    names: list[str] = []
    waiting = list(_references(schema["properties"]))
    while waiting:
        name = waiting.pop(0)
        if name not in names:
            names.append(name)
            waiting[:0] = _references(schema["$defs"][name]["properties"])
    return names


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"].rpartition("/")[2]
        for key, part in value.items():
            if key not in ("default", "mapping"):
                yield from _references(part)
    elif isinstance(value, list):
        for part in value:
            yield from _references(part)


def _accepted(field: Schema, schema: Schema) -> str:
    """Return what a field takes, in a few words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        kind = schema["$defs"][name]["properties"].get("kind", {}).get("const")
        return f"`{kind}`" if kind else f"a section, {_title(name, schema['$defs'][name])}"
    for several in ("anyOf", "oneOf"):
        if several in field:
            options = [_accepted(option, schema) for option in field[several]]
            section = (
                "a section of kind " if all(part.startswith("`") and "$ref" in str(field) for part in options) else ""
            )
            return section + " or ".join(dict.fromkeys(options))
    if "const" in field:
        return f"`{_json(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    return _plain_type(field, schema)


def _plain_type(field: Schema, schema: Schema) -> str:
    match field.get("type"):
        case "array":
            items: Schema = field.get("items") or next(iter(field.get("prefixItems", [])), {})
            return f"a list: {_accepted(items, schema)}"
        case "object":
            values = field.get("additionalProperties")
            return f"names with {_accepted(values, schema)} each" if isinstance(values, dict) else "a mapping"
        case "null":
            return "null"
        case "boolean":
            return "true or false"
        case "string":
            return f"text like `{field['pattern']}`" if "pattern" in field else "text"
        case kind:
            return {"integer": "integer", "number": "number"}.get(str(kind), "any value") + _range(field)


def _range(field: Schema) -> str:
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    said = [f"{words} {field[name]:,}" for name, words in bounds.items() if name in field]
    return f", {' and '.join(said)}" if said else ""


def _default(name: str, field: Schema, section: Schema) -> str:
    if "default" not in field:
        required = section.get("required", [other for other in section["properties"] if other != "extends"])
        return "required" if name in required else ""
    default = field["default"]
    if isinstance(default, dict):  # a section, whose own table has its fields' defaults
        return f"`{{kind: {default['kind']}}}`" if "kind" in default else "see there"
    return f"`{_json(default)}`"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
