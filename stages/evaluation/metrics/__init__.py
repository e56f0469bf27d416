"""Metrics at work: a module each, registered for its class in specs/metrics.py.

A judge looks at images some at a time. What it saw is summed over the images of a row, wherever they are drawn:
features become a mean and a covariance, counts become shares. From those of a row and its reference come the figures.
What is held against the rootstock image by image is kept in arrays, of the row's first samples only.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.models.measures.frechet import Gaussian
from graftwork.models.measures.inception_score import SplitSums
from graftwork.specs.metrics import MetricSpec
from graftwork.stages.contract import Context

JUDGES: dict[str, type[Judge]] = {}
SCORES = "scores.json"  # of a row: the shares of its images


@dataclass(frozen=True)
class Seen:
    """What a judge saw in some images."""

    features: Tensor | None = None  # (n,d) float64
    counts: Mapping[str, int] = field(default_factory=dict)  # images of which something holds, by the figure's name
    records: tuple[str, ...] = ()  # a line for each image, of metrics that keep one
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # (n,..) each, which the row keeps, by name
    addends: Tensor | None = None  # (n,d) float64, of which the sums over splits of consecutive images are kept
    rows: Tensor | None = None  # (n,d) float32, all of which an artifact keeps, as `keeps` of the metric names them

    def cpu(self) -> Seen:
        """Return what sums are made of; without what the row keeps, which a verdict has once for all metrics."""
        features, addends = (None if part is None else part.cpu() for part in (self.features, self.addends))
        return Seen(features, self.counts, self.records, addends=addends)


@dataclass(frozen=True)
class Summary:
    """What a judge saw in all images of a row, or of a reference."""

    statistics: Gaussian | None  # of the features
    shares: Mapping[str, float] = field(default_factory=dict)  # of the images, by the figure's name
    splits: SplitSums | None = None
    rows: NDArray[np.float32] | None = None  # (n,d), of metrics that keep every row; memory-mapped


class Judge(ABC):
    """One metric at work, with its network on a device."""

    max_samples: int | None = None  # of a row, the first ones, that it looks at; None: at all

    @abstractmethod
    def __init__(self, context: Context, inception: str | None, device: torch.device) -> None:
        """Load what the metric looks with. inception: the file with Inception's weights, if the spec names one."""

    @abstractmethod
    def look(self, images: NDArray[np.uint8], labels: Tensor) -> Seen:
        """Return what is seen in images (n,C,H,W) that should be of these labels (n,)."""

    @staticmethod
    @abstractmethod
    def figures(row: Summary, reference: Summary) -> dict[str, float]:
        """Return the figures of a row, in the order of the metric's columns. Needs no network and no GPU."""

    @staticmethod
    def write_records(records: Sequence[str], folder: Path) -> None:
        """Leave the lines of a row's images, in their order; for metrics that keep some."""
        raise NotImplementedError

    @staticmethod
    def beside(row: Path, rootstock: Path) -> dict[str, float]:
        """Return the figures by which a row stands beside the rootstock, from the folders that both left."""
        return {}

    @classmethod
    def read_reference(
        cls, context: Context, path: Path, background: str, inception: str | None, report: Callable[[int, int], None]
    ) -> Gaussian:
        """Return the statistics of what `evaluate.reference` names; for metrics whose reference is given."""
        raise NotImplementedError


J = TypeVar("J", bound=type[Judge])


def register(metric: type[MetricSpec]) -> Callable[[J], J]:
    """Decorate the judge of a metric."""

    def keep(judge: J) -> J:
        JUDGES[metric.name] = judge
        return judge

    return keep


def as_floats(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Return images (n,C,H,W) as float32 tensors of 0 .. 255 on a device."""
    return torch.from_numpy(images).to(device).float()


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
