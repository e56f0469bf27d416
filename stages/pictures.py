"""Pictures and tables that people look at: loss curves, sample grids, quality against cost."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

COLUMNS, LINES = 10, 4  # of a sample grid


def loss_curve(curve: Sequence[tuple[float, ...]], title: str, path: Path, names: Sequence[str] = ("loss",)) -> None:
    """Write `path`.csv and `path`.png; a row of the curve is (step, value of each name)."""
    with path.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([("step", *names), *curve])
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    steps = [row[0] for row in curve]
    for column, name in enumerate(names, start=1):
        axes.plot(steps, [row[column] for row in curve], label=name)
    axes.set(title=title, xlabel="step", yscale="log")
    axes.legend(frameon=False)
    _write(figure, path)


def sample_grid(images: NDArray[np.uint8], labels: Sequence[str], title: str, path: Path) -> None:
    """Write `path`.png: up to 40 images (n,C,S,S), each under its label."""
    count = min(len(images), COLUMNS * LINES)
    lines = -(-count // COLUMNS)
    figure, axes = plt.subplots(lines, COLUMNS, figsize=(COLUMNS * 0.75, lines * 0.95 + 0.4), layout="constrained")
    figure.suptitle(title)
    for axis in np.atleast_1d(axes).flat:
        axis.axis("off")
    for axis, image, label in zip(np.atleast_1d(axes).flat, images[:count], labels, strict=False):
        picture = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axis.set_title(label, fontsize=8, pad=2)
    _write(figure, path)


def quality_against_cost(results: Mapping[str, Mapping[str, float]], quality: str, path: Path) -> None:
    """Write `path`.png: each row's distance against its FLOPs; what has no model is a line, the floor."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for row, columns in results.items():
        if columns["flops"] == 0:
            axes.axhline(columns[quality], color="0.6", linestyle="--", label=row)
        else:
            axes.scatter(columns["flops"] / 1e6, columns[quality], label=row)
    axes.set(xlabel="MFLOP a forward pass", ylabel=quality, title="quality against cost")
    axes.legend(frameon=False)
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    # No date in the file: the same picture is the same bytes.
    figure.savefig(path.with_suffix(".png"), dpi=120, metadata={"Software": None})
    plt.close(figure)
