"""The course of a search, as tables and pictures: how probable each gate's choices were, and what they would cost."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.specs.costs import BUDGET_TOLERANCE
from graftwork.stages.pictures.drawing import draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 4  # of panels
NAMED = 6  # choices of a gate that the legend tells apart
Course = Sequence[tuple[float, ...]]


def course_of_the_gates(course: Course, gates: Mapping[str, Sequence[str]], path: Path) -> None:
    """Write `path`.csv and `path`.png; a row of the course is (step, probability of each choice, gate after gate).

    gates: the choices of each, by its title.
    """
    names = [f"{title} {choice}" for title, choices in gates.items() for choice in choices]
    _table(("step", *names), course, path)

    lines, columns = -(-len(gates) // COLUMNS), min(COLUMNS, len(gates))

    def paint(figure: Figure) -> None:
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        steps, *probabilities = zip(*course, strict=True)
        for axes in panels.flat[len(gates) :]:
            axes.set_visible(False)
        for axes, (title, choices) in zip(panels.flat, gates.items(), strict=False):
            own, probabilities = probabilities[: len(choices)], probabilities[len(choices) :]
            ranked = sorted(range(len(choices)), key=lambda index: -own[index][-1])
            for rank, index in enumerate(ranked):
                label = choices[index] if rank < NAMED else None
                axes.plot(steps, own[index], label=label, color=f"C{index}", linewidth=2 if rank == 0 else 1)
            axes.set(title=title, ylim=(-0.02, 1.02))
            axes.legend(frameon=False, fontsize=7)
        figure.supxlabel("step")
        figure.supylabel("probability of each choice")

    draw(path, (3.2 * columns, 2.6 * lines), paint)


def course_of_the_cost(course: Course, budget: float, share: float, path: Path) -> None:
    """Write `path`.csv and `path`.png; a row of the course is (step, expected FLOPs over the rootstock's).

    share: of the model as chosen.
    """
    _table(("step", "expected_flops_share"), course, path)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        steps, shares = zip(*course, strict=True)
        tolerance = BUDGET_TOLERANCE * budget
        axes.axhspan(budget - tolerance, budget + tolerance, color="0.9", label=f"budget {budget:g}, within 2%")
        axes.plot(steps, shares, label="expected by the gates")
        axes.plot(steps[-1:], [share], "o", label="as chosen")
        axes.set(title="cost of the model under search", xlabel="step", ylabel="FLOPs over the rootstock's")
        axes.legend(frameon=False)

    draw(path, (6, 3.5), paint)


def keeping(mask: Sequence[int]) -> str:
    """As in "keeps 0+2"."""
    return "keeps " + ("+".join(map(str, mask)) or "none")


def _table(names: Sequence[str], rows: Course, path: Path) -> None:
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])
