"""Pictures and tables that people look at: loss curves, locality, activations, sample grids, quality against cost."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from graftwork.stages.artifacts.evidence import DISTANCES, Distance, LocalityCurves, Outputs
from graftwork.stages.pictures.drawing import draw, fonts_for, label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS, LINES = 10, 4  # of a sample grid
CELLS = COLUMNS * LINES
SHARED_WORDS = 3  # with which all labels of a picture begin, and which then say nothing: "a photo of"


def loss_curve(curve: Sequence[tuple[float, ...]], title: str, path: Path, names: Sequence[str] = ("loss",)) -> None:
    """Write `path`.csv and `path`.png; a row of the curve is (step, value of each name)."""
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("step", *names), *curve])

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        steps = [row[0] for row in curve]
        for column, name in enumerate(names, start=1):
            axes.plot(steps, [row[column] for row in curve], label=name)
        axes.set(title=title, xlabel="step", yscale="log")
        axes.legend(frameon=False)

    draw(path, (6, 3.5), paint)


def without_shared_words(labels: Sequence[str]) -> list[str]:
    """Return labels without the words that all of them begin with, as prompts do, if those are SHARED_WORDS or more."""
    words = [name.split() for name in labels]
    shared = 0
    while words and all(len(one) > shared + 1 and one[shared] == words[0][shared] for one in words):
        shared += 1
    return [" ".join(one[shared:]) for one in words] if shared >= SHARED_WORDS else list(labels)


def sample_grid(images: NDArray[np.uint8], labels: Sequence[str], title: str, path: Path) -> None:
    """Write `path`.png: up to CELLS images (n,C,S,S), each under its label, or under what is its own in that."""
    labels = without_shared_words(labels)
    count = min(len(images), CELLS)
    lines = -(-count // COLUMNS)

    def paint(figure: Figure) -> None:
        fonts = fonts_for(labels[:count])
        figure.suptitle(title, parse_math=False)
        panels = np.atleast_1d(figure.subplots(lines, COLUMNS))
        for axis in panels.flat:
            axis.axis("off")
        for axis, image, name in zip(panels.flat, images[:count], labels, strict=False):
            picture = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axis.set_title(label(name), fontsize=8, pad=2, parse_math=False, fontfamily=fonts)

    draw(path, (COLUMNS * 0.75, lines * 0.95 + 0.4), paint)


def quality_against_cost(results: Mapping[str, Mapping[str, float]], quality: str, path: Path) -> None:
    """Write `path`.png: each row's distance against its FLOPs; what has no model is a line, the floor."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for row, columns in results.items():
            if quality not in columns:
                continue
            if columns["flops"] == 0:
                axes.axhline(columns[quality], color="0.6", linestyle="--", label=row)
            else:
                axes.scatter(columns["flops"] / 1e6, columns[quality], label=row)
        axes.set(xlabel="MFLOP a forward pass", ylabel=quality, title="quality against cost")
        axes.legend(frameon=False)

    draw(path, (6, 3.5), paint)


def locality_map(locality: LocalityCurves, path: Path) -> None:
    """Write `path`.png: the attention mass within each band, block by k, and where it comes to half of all."""

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        figure.suptitle("attention mass within k; from the dot on it is half of all or more")
        for axes, distance in zip(panels, DISTANCES, strict=True):
            curves = locality.along(distance)
            mass = np.array(list(curves.values()))
            image = axes.imshow(mass, aspect="auto", vmin=0, vmax=1, interpolation="nearest")
            axes.plot((mass < 0.5).sum(1), range(len(mass)), "w.")
            axes.set(xlabel=f"k {distance}", yticks=range(len(mass)))
            axes.set_yticklabels(list(curves), fontsize=7)
        figure.colorbar(image, ax=panels)

    draw(path, (11, 2 + 0.2 * len(locality.tokens)), paint)


def locality_by_quarter(locality: LocalityCurves, path: Path) -> None:
    """Write `path`.png: the same mass as curves over k, a line a block, a column a quarter of the timesteps."""
    sites, num_quarters = list(locality.tokens), len(next(iter(locality.by_quarter.tokens.values())))

    def paint(figure: Figure) -> None:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        lines = figure.subplots(2, num_quarters, sharey=True)
        figure.suptitle("attention mass within k; dashed: if a query looked at all tokens alike")
        colours = colormaps["viridis"].resampled(len(sites))
        for line, distance in zip(lines, DISTANCES, strict=True):
            alike = attention_to_all_alike(len(locality.tokens[sites[0]]), len(locality.patches[sites[0]]), distance)
            for quarter, axes in enumerate(line):
                for number, site in enumerate(sites):
                    curve = locality.by_quarter.along(distance)[site][quarter]
                    if curve is not None:
                        axes.plot(curve, color=colours(number), linewidth=1)
                axes.plot(alike, "k--", linewidth=1)
                noise = {0: ", least noise", num_quarters - 1: ", most noise"}.get(quarter, "")
                axes.set(title=f"quarter {quarter + 1} of timesteps{noise}", xlabel=f"k {distance}", ylim=(0, 1.02))
                axes.title.set_fontsize(9)
        bar = figure.colorbar(ScalarMappable(Normalize(-0.5, len(sites) - 0.5), colours), ax=lines)
        bar.set_ticks(range(len(sites)), labels=sites, fontsize=7)

    draw(path, (3 * num_quarters, 5.5), paint)


def attention_to_all_alike(num_tokens: int, longest: int, distance: Distance) -> NDArray[np.float64]:
    """Return the mass within each distance if it were spread evenly: the share of pairs of tokens.

    longest: tokens along the longer side of the image.
    """
    if distance == "tokens":
        return _pairs_within(num_tokens)
    shorter = _pairs_within(num_tokens // longest)
    return _pairs_within(longest) * np.pad(shorter, (0, longest - len(shorter)), constant_values=1.0)


def _pairs_within(length: int) -> NDArray[np.float64]:
    """Return the share of ordered pairs of places on a line that are 0, 1, .. or less apart."""
    return np.cumsum([length, *(2 * (length - apart) for apart in range(1, length))]) / length**2


def activation_boxes(outputs: Mapping[str, Outputs], path: Path) -> None:
    """Write `path`.png: what each operator puts out; boxes of quartiles, whiskers at 1% and 99%, then the extremes."""

    def paint(figure: Figure) -> None:
        figure.suptitle(
            "boxes: quartiles; whiskers: 1% and 99%; o: 0.1% and 99.9%; x: the largest magnitude", fontsize=9
        )
        for axes, target in zip(figure.subplots(2, 1), ("mha", "mlp"), strict=True):
            sites = {site: output for site, output in outputs.items() if site.endswith(target)}
            boxes = [
                {
                    "label": site.partition(".")[0],
                    "whislo": output.quantiles["0.01"],
                    "q1": output.quantiles["0.25"],
                    "med": output.quantiles["0.5"],
                    "q3": output.quantiles["0.75"],
                    "whishi": output.quantiles["0.99"],
                    "fliers": [output.quantiles["0.001"], output.quantiles["0.999"]],
                }
                for site, output in sites.items()
            ]
            axes.bxp(boxes, flierprops={"marker": ".", "markersize": 4})
            axes.plot(range(1, len(sites) + 1), [output.largest for output in sites.values()], "rx", markersize=4)
            # Linear where most outputs are, logarithmic for the outliers.
            linear = max(1e-6, *(output.std for output in sites.values()))
            axes.set_yscale("symlog", linthresh=linear)
            axes.set_yticks([tick for tick in axes.get_yticks() if tick == 0 or abs(tick) >= linear])
            axes.set(title=f"outputs of {target}", xlabel="block")

    draw(path, (max(6.5, 1.5 + 0.18 * len(outputs)), 6.4), paint)  # two sites a block
