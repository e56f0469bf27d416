"""The course of a search: how probable each group's masks were to its gates, as a table and a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from specs.layers import Group

COLUMNS = 4  # of panels
NAMED = 6  # masks of a group that the legend tells apart


def course_of_the_gates(
    course: Sequence[tuple[float, ...]], groups: Sequence[Group], masks: Sequence[Sequence[tuple[int, ...]]], path: Path
) -> None:
    """Write `path`.csv and `path`.png; a row of the course is (step, probability of each mask, group after group)."""
    titles = [f"blocks {group.blocks[0]}-{group.blocks[-1]}" for group in groups]
    with path.with_suffix(".csv").open("w", newline="") as file:
        names = [f"{title} {keeping(mask)}" for title, kept in zip(titles, masks, strict=True) for mask in kept]
        csv.writer(file).writerows([("step", *names), *course])

    lines, columns = -(-len(groups) // COLUMNS), min(COLUMNS, len(groups))
    figure = Figure(figsize=(3.2 * columns, 2.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    steps, *probabilities = zip(*course, strict=True)
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, title, kept in zip(panels.flat, titles, masks, strict=False):
        own, probabilities = probabilities[: len(kept)], probabilities[len(kept) :]
        ranked = sorted(range(len(kept)), key=lambda index: -own[index][-1])
        for rank, index in enumerate(ranked):
            label = keeping(kept[index]) if rank < NAMED else None
            axes.plot(steps, own[index], label=label, linewidth=2 if rank == 0 else 1)
        axes.set(title=title, ylim=(-0.02, 1.02))
        axes.legend(frameon=False, fontsize=7)
    figure.supxlabel("step")
    figure.supylabel("probability of each mask")
    # No date in the file: the same picture is the same bytes.
    figure.savefig(path.with_suffix(".png"), dpi=120, metadata={"Software": None})


def keeping(mask: Sequence[int]) -> str:
    """As in "keeps 0+2"."""
    return "keeps " + ("+".join(map(str, mask)) or "none")
