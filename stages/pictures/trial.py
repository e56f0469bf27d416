"""The picture of a trial: what plans were predicted to come to, and what they come to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.stages.artifacts.evidence import Trial
from graftwork.stages.pictures.drawing import draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def errors_of_plans(trial: Trial, path: Path) -> None:
    """Write `path`.png: the error of each plan, the least first, with what its sites' scores add up to."""
    plans = sorted(trial.plans, key=lambda one: one.error)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, one in enumerate(plans):
            axes.barh(place, one.error, height=0.6, color="C0" if one.predicted_error is not None else "0.6")
            if one.predicted_error is not None:
                axes.plot([one.predicted_error], [place], "k|", markersize=12)
        axes.set_yticks(range(len(plans)), [one.name for one in plans])
        axes.invert_yaxis()
        axes.set(xlabel=f"{trial.words} (ticks: sum of scores)", title="plans as whole models")

    draw(path, (6, 1.2 + 0.28 * len(plans)), paint)
