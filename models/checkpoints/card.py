"""The model card: a README.md that says what a model is, how it was made, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from graftwork.specs.edits import Edit
from graftwork.specs.figures import figure
from graftwork.specs.hub import is_hub_id

TAGS = ("grafting", "diffusion-transformer")
PLACES = (
    "path",
    "scions",
    "reference",
    "inception",
    "prompts",
    "colours",
)  # fields of a job that hold a path or a hub id


@dataclass(frozen=True)
class Card:
    """What a card says beyond what the model itself tells."""

    title: str
    rootstock: str  # a sentence
    recipe: Mapping[str, Any] = field(default_factory=dict)  # sections of the job, as JSON has them
    results: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)  # rows of columns
    keys: Mapping[str, str] = field(default_factory=dict)  # of the artifacts, by step


def write_card(
    folder: Path,
    card: Card,
    edits: Sequence[Edit],
    usage: str = "",
    note: str = "",
    task: str = "class-conditional-image-generation",
) -> None:
    """Write README.md.

    usage: Python that loads the model; note: what to know of what it loads; task: the hub's tag for what it does.
    """
    front = {"library_name": "graftwork", "tags": [*TAGS, task]}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {card.title}",
        f"## Rootstock\n\n{card.rootstock}",
        f"## Edits\n\n{_edits(edits)}",
    ]
    if usage:
        sections.append(f"## Use\n\n```python\n{usage}\n```")
    if note:
        sections.append(note)
    if card.results:
        columns = list(dict.fromkeys(column for row in card.results.values() for column in row))
        rows = [[name, *(figure(column, row.get(column)) for column in columns)] for name, row in card.results.items()]
        sections.append(f"## Results\n\n{_table(['', *columns], rows)}")
    if card.recipe:
        sections.append(f"## Recipe\n\n```yaml\n{yaml.safe_dump(_placeless(card.recipe), sort_keys=False)}```")
    if card.keys:
        sections.append(f"## Artifacts\n\n{_table(['step', 'key'], [[step, key] for step, key in card.keys.items()])}")
    (folder / "README.md").write_text("\n\n".join(sections) + "\n")


def _placeless(value: Any, key: str | None = None) -> Any:
    """The value with the last component alone of each path in it: where a file lay is a matter of one machine."""
    if isinstance(value, Mapping):
        return {name: _placeless(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_placeless(item, key) for item in value]
    if key in PLACES and isinstance(value, str) and not is_hub_id(value):
        return Path(value).name
    return value


def _edits(edits: Sequence[Edit]) -> str:
    """A row for each operator with its settings, and the blocks that it stands in."""
    if not edits:
        return "None: the rootstock itself."
    rows = [(_target(edit), _operator(edit), edit.site.block) for edit in edits]
    rows.sort()
    table = [
        [target, operator, ", ".join(str(block) for _, _, block in group)]
        for (target, operator), group in groupby(rows, key=lambda row: row[:2])
    ]
    return _table(["in place of", "operator", "blocks"], table)


def _target(edit: Edit) -> str:
    return {"mha": "attention", "mlp": "feed-forward", "pair": "this block and the next"}[edit.site.target]


def _operator(edit: Edit) -> str:
    settings = edit.operator.model_dump(exclude={"kind", "backend"})
    return (
        f"{edit.operator.kind} ({', '.join(f'{k} {v}' for k, v in settings.items())})"
        if settings
        else edit.operator.kind
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
