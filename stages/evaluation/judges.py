"""The metrics of a job together: each looks at every image once, and only sums of what they saw are kept, so that
memory does not grow with the images. Features that a metric needs of every image go to a file as they come."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.models.measures.frechet import Gaussian, Moments
from graftwork.models.measures.inception_score import SplitSums
from graftwork.specs.metrics import METRICS, Metric
from graftwork.stages.contract import Context
from graftwork.stages.evaluation.metrics import JUDGES, SCORES, Seen, Summary


@dataclass(frozen=True)
class Verdict:
    """What all judges saw in some images."""

    count: int
    by_metric: Mapping[Metric, Seen]

    def cpu(self) -> Verdict:
        return Verdict(self.count, {metric: seen.cpu() for metric, seen in self.by_metric.items()})

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that the row keeps, by the names of their files without the suffix."""
        judged = self.by_metric.items()
        own = {f"{metric}.{name}": rows for metric, seen in judged for name, rows in seen.arrays.items()}
        return own | self.feature_rows()

    def feature_rows(self) -> dict[str, NDArray[np.float32]]:
        """Return the features (n,d) of which every row is kept, by their name."""
        named = {METRICS[metric].keeps: seen.rows for metric, seen in self.by_metric.items()}
        return {name: rows.cpu().numpy() for name, rows in named.items() if name is not None and rows is not None}


class Judges:
    """The judge of each metric, loaded on a device."""

    def __init__(
        self, context: Context, metrics: Sequence[Metric], inception: str | None, device: torch.device
    ) -> None:
        self.judges = {metric: JUDGES[metric](context, inception, device) for metric in metrics}

    def look(self, images: NDArray[np.uint8], labels: Tensor, start: int = 0) -> Verdict:
        """Return what is seen in images (n,C,H,W) that should be of these labels (n,). The images stay as they are.

        start: the number of the first of them among all of the row.
        """
        seen = dict[Metric, Seen]()
        for metric, judge in self.judges.items():
            count = len(images) if judge.max_samples is None else judge.max_samples - start
            if count >= len(images):  # the very array, by which judges of one network know that it passed already
                seen[metric] = judge.look(images, labels)
            elif count > 0:
                seen[metric] = judge.look(images[:count], labels[:count])
        return Verdict(len(images), seen)


@dataclass
class Scores:
    """Sums over all images that were looked at so far. Verdicts added in the same order give the same bits."""

    count: int = 0
    moments: dict[Metric, Moments] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)  # images of which something holds, by the figure's name
    records: dict[Metric, list[str]] = field(default_factory=dict)  # a line an image
    splits: dict[Metric, SplitSums] = field(default_factory=dict)

    def add(self, verdict: Verdict) -> None:
        self.count += verdict.count
        for metric, seen in verdict.by_metric.items():
            self.counts.update(seen.counts)
            if seen.records:
                self.records.setdefault(metric, []).extend(seen.records)
            if seen.features is not None:
                more = Moments.of(seen.features)
                self.moments[metric] = self.moments[metric] + more if metric in self.moments else more
            if seen.addends is not None:
                self.splits[metric] = self.splits.get(metric, SplitSums()).plus(seen.addends)

    def state(self) -> dict[str, Tensor]:
        """Return all of it, for a checkpoint."""
        state = {"count": torch.tensor(self.count)}
        state |= {f"counts/{name}": torch.tensor(count) for name, count in self.counts.items()}
        for metric, moments in self.moments.items():
            state |= {f"{metric}.mean": moments.mean, f"{metric}.scatter": moments.scatter}
        for metric, splits in self.splits.items():
            state[f"{metric}.splits"] = torch.stack(splits.sums)
        for metric, lines in self.records.items():
            state[f"{metric}.records"] = torch.frombuffer(bytearray("\n".join(lines).encode()), dtype=torch.uint8)
        return state

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], metrics: Sequence[Metric]) -> Scores:
        """Return what `state` had; raise KeyError if the state is none of this version."""
        count = int(state["count"])
        moments = {
            metric: Moments(count, state[f"{metric}.mean"], state[f"{metric}.scatter"])
            for metric in metrics
            if f"{metric}.mean" in state
        }
        counts = {name.removeprefix("counts/"): int(value) for name, value in state.items() if name[:7] == "counts/"}
        records = {
            metric: state[f"{metric}.records"].numpy().tobytes().decode().split("\n")
            for metric in metrics
            if f"{metric}.records" in state
        }
        splits = {
            metric: SplitSums(count, tuple(state[f"{metric}.splits"]))
            for metric in metrics
            if f"{metric}.splits" in state
        }
        return cls(count, moments, Counter(counts), records, splits)

    def write(self, folder: Path) -> None:
        """Leave `<metric>.npz` with mu and sigma of each metric's features, `<metric>-splits.npy` with the sums over
        splits, and `scores.json` with the shares."""
        for metric, moments in self.moments.items():
            moments.gaussian().write(statistics_file(folder, metric))
        for metric, splits in self.splits.items():
            np.save(_splits_file(folder, metric), torch.stack(splits.sums).cpu().numpy())
        for metric, lines in self.records.items():
            JUDGES[metric].write_records(lines, folder)
        shares = {name: count / self.count for name, count in self.counts.items()}
        (folder / SCORES).write_text(json.dumps({"samples": self.count, **shares}, separators=(",", ":")))


def statistics_file(folder: Path, metric: Metric) -> Path:
    """Return where an artifact has the statistics of a metric's features."""
    return folder / f"{metric}.npz"


def rows_file(folder: Path, name: str) -> Path:
    """Return where an artifact has features of every image."""
    return folder / f"{name}.npy"


def read_summary(folder: Path, metric: Metric) -> Summary:
    """Return what a metric saw in the images of an artifact."""
    scores, statistics, name = folder / SCORES, statistics_file(folder, metric), METRICS[metric].keeps
    shares = json.loads(scores.read_text()) if scores.exists() else {}
    splits = None
    if _splits_file(folder, metric).exists():
        splits = SplitSums(shares["samples"], tuple(torch.from_numpy(np.load(_splits_file(folder, metric)))))
    rows = np.load(rows_file(folder, name), mmap_mode="r") if name is not None else None
    return Summary(Gaussian.read(statistics) if statistics.exists() else None, shares, splits, rows)


def figures_of_row(context: Context, row: str, metrics: Iterable[Metric]) -> dict[str, float]:
    """Return the figures of metrics for a row of the table."""
    columns: dict[str, float] = {}
    folder, rootstock = context.input(f"rows/{row}"), "rows/rootstock"
    for metric in metrics:
        held = METRICS[metric].reference != "none"
        if row == "heldout" and not held:
            continue
        reference = read_summary(context.input(f"reference/{metric}"), metric) if held else Summary(None)
        columns |= JUDGES[metric].figures(read_summary(folder, metric), reference)
        if row not in ("heldout", "rootstock") and rootstock in context.inputs:
            columns |= JUDGES[metric].beside(folder, context.input(rootstock))
    return columns


def _splits_file(folder: Path, metric: Metric) -> Path:
    return folder / f"{metric}-splits.npy"
