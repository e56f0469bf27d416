"""Scenes of plain shapes with their prompts, in the six kinds of GenEval's grammar.

A scene shows exactly what its prompt names, in the slots in reading order, or where the prompt says. The colours that
it does not name are drawn at random.

    python examples/shapes/scenes.py    # writes prompts.txt and geneval.jsonl beside it
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graftwork.stages.evaluation.geneval.shapes import COLOURS, SHAPES, Shape

NAMES, INKS = tuple(SHAPES), tuple(COLOURS)
PLURALS = {name: f"{name}es" if name.endswith("s") else f"{name}s" for name in NAMES}
NUMBERS = {2: "two", 3: "three", 4: "four"}
SLOTS = 4  # two by two: 0 and 1 above, 2 and 3 below
# Slots of the first and the second object, of prompts "SECOND relation FIRST".
RELATIONS = {"left of": (1, 0), "right of": (0, 1), "above": (2, 0), "below": (0, 2)}
WORDS = (
    *("a", "photo", "of", "and", "left", "right", "above", "below"),
    *NUMBERS.values(), *NAMES, *PLURALS.values(), *INKS,
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """A prompt, what GenEval asks of a picture of it, and one such picture."""

    prompt: str
    tag: str
    include: tuple[dict[str, Any], ...]
    shapes: tuple[Shape, ...]
    exclude: tuple[dict[str, Any], ...] = ()

    @property
    def line(self) -> dict[str, Any]:
        """The prompt's line in GenEval's `evaluation_metadata.jsonl`."""
        exclude = {"exclude": list(self.exclude)} if self.exclude else {}
        return {"tag": self.tag, "include": list(self.include), **exclude, "prompt": self.prompt}


def _one(draws: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(draws.integers(len(options)))]


def _two(draws: np.random.Generator, options: Sequence[str]) -> tuple[str, str]:
    first, second = draws.permutation(len(options))[:2]
    return options[int(first)], options[int(second)]


def single_object(draws: np.random.Generator) -> Scene:
    name = _one(draws, NAMES)
    shapes = (Shape(name, _one(draws, INKS), 0),)
    return Scene(f"a photo of a {name}", "single_object", ({"class": name, "count": 1},), shapes)


def colors(draws: np.random.Generator) -> Scene:
    name, ink = _one(draws, NAMES), _one(draws, INKS)
    include = ({"class": name, "count": 1, "color": ink},)
    return Scene(f"a photo of a {ink} {name}", "colors", include, (Shape(name, ink, 0),))


def counting(draws: np.random.Generator) -> Scene:
    name, count = _one(draws, NAMES), int(draws.integers(2, SLOTS + 1))
    shapes = tuple(Shape(name, _one(draws, INKS), slot) for slot in range(count))
    include, exclude = ({"class": name, "count": count},), ({"class": name, "count": count + 1},)
    return Scene(f"a photo of {NUMBERS[count]} {PLURALS[name]}", "counting", include, shapes, exclude)


def two_object(draws: np.random.Generator) -> Scene:
    names = _two(draws, NAMES)
    shapes = tuple(Shape(name, _one(draws, INKS), slot) for slot, name in enumerate(names))
    include = tuple({"class": name, "count": 1} for name in names)
    return Scene(f"a photo of a {names[0]} and a {names[1]}", "two_object", include, shapes)


def position(draws: np.random.Generator) -> Scene:
    first, second = _two(draws, NAMES)
    relation = _one(draws, tuple(RELATIONS))
    slots = zip((first, second), RELATIONS[relation], strict=True)
    shapes = tuple(Shape(name, _one(draws, INKS), slot) for name, slot in slots)
    include = ({"class": first, "count": 1}, {"class": second, "count": 1, "position": [relation, 0]})
    return Scene(f"a photo of a {second} {relation} a {first}", "position", include, shapes)


def color_attr(draws: np.random.Generator) -> Scene:
    names, inks = _two(draws, NAMES), _two(draws, INKS)
    shapes = tuple(map(Shape, names, inks, range(2)))
    include = tuple({"class": name, "count": 1, "color": ink} for name, ink in zip(names, inks, strict=True))
    words = " and ".join(f"a {ink} {name}" for name, ink in zip(names, inks, strict=True))
    return Scene(f"a photo of {words}", "color_attr", include, shapes)


TAGS: dict[str, Callable[[np.random.Generator], Scene]] = {
    "single_object": single_object,
    "two_object": two_object,
    "counting": counting,
    "colors": colors,
    "position": position,
    "color_attr": color_attr,
}


def scene(draws: np.random.Generator, shares: Sequence[float] | None = None) -> Scene:
    """Return a scene of a random kind; all kinds are as likely, or have these shares."""
    return list(TAGS.values())[int(draws.choice(len(TAGS), p=shares))](draws)


def every_prompt(count: int, seed: int = 0) -> list[Scene]:
    """Return up to `count` different prompts, as many of each kind as there are."""
    draws = np.random.default_rng(seed)
    chosen: dict[str, dict[str, Scene]] = {tag: {} for tag in TAGS}
    for _ in range(400):
        for tag, make in TAGS.items():
            one = make(draws)
            if len(chosen[tag]) < -(-count // len(TAGS)):
                chosen[tag].setdefault(one.prompt, one)
    return [one for prompts in chosen.values() for one in prompts.values()]


def main() -> None:
    """Write the prompts that samples to learn from are drawn of, and GenEval's lines of those that judge a graft."""
    here = Path(__file__).parent
    prompts = sorted(scene.prompt for scene in every_prompt(2_000))
    (here / "prompts.txt").write_text("\n".join(prompts) + "\n")
    lines = [json.dumps(scene.line) for scene in every_prompt(96, seed=1)]
    (here / "geneval.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
