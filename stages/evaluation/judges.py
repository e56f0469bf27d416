"""What the metrics make of images, be they drawn or real: judges look at each once, and only sums of what they saw are
kept, so that memory does not grow with the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor

from graftwork.models.measures.classifier import Classifier
from graftwork.models.measures.frechet import Gaussian, Moments
from graftwork.specs.evaluate import Metric
from graftwork.stages.artifacts.latents import read_meta
from graftwork.stages.contract import Context
from graftwork.stages.evaluation.inception import inception_features, load_inception

SCORES = "scores.json"


@dataclass(frozen=True)
class Verdict:
    """What the judges saw in some images."""

    count: int
    agreed: int  # images that the classifier reads as their label
    features: Mapping[Metric, Tensor]  # (n,d) float64

    def cpu(self) -> Verdict:
        return Verdict(self.count, self.agreed, {metric: seen.cpu() for metric, seen in self.features.items()})


class Judges:
    """The networks that the metrics ask for, loaded: the job's own classifier, and pytorch-fid's Inception."""

    def __init__(
        self, context: Context, metrics: tuple[Metric, ...], inception: str | None, device: torch.device
    ) -> None:
        self.classifier = load_classifier(context).to(device) if "classifier" in metrics else None
        self.inception = load_inception(inception, device) if "fid" in metrics else None
        self.device = device

    def look(self, images: NDArray[np.uint8], labels: Tensor) -> Verdict:
        """At images (n,C,S,S) that should be of these labels (n,)."""
        features: dict[Metric, Tensor] = {}
        agreed = 0
        if self.classifier is not None:
            with torch.no_grad():
                seen = self.classifier.features((torch.from_numpy(images).to(self.device).float() - 128) / 127.5)
                agreed = int((self.classifier.head(seen).argmax(1) == labels.to(self.device)).sum())
            features["classifier"] = seen.double()
        if self.inception is not None:
            features["fid"] = inception_features(images, self.inception, self.device)
        return Verdict(len(images), agreed, features)


def load_classifier(context: Context) -> Classifier:
    meta = read_meta(context.input("features"))
    judge = Classifier(meta.channels, meta.side, len(meta.classes))
    judge.load_state_dict(load_file(context.input("classifier") / "classifier.safetensors"))
    return judge.eval()


class Row(BaseModel):
    """`scores.json`."""

    samples: int
    agreement: float  # share of the images that the classifier, if there is one, reads as their label


@dataclass
class Scores:
    """Sums over all images that were looked at so far. Verdicts added in the same order give the same bits."""

    count: int = 0
    agreed: int = 0
    moments: dict[Metric, Moments] = field(default_factory=dict)

    def add(self, verdict: Verdict) -> None:
        self.count += verdict.count
        self.agreed += verdict.agreed
        for metric, seen in verdict.features.items():
            more = Moments.of(seen)
            self.moments[metric] = self.moments[metric] + more if metric in self.moments else more

    def state(self) -> dict[str, Tensor]:
        """All of it, for a checkpoint."""
        state = {"counts": torch.tensor([self.count, self.agreed])}
        for metric, moments in self.moments.items():
            state |= {f"{metric}.mean": moments.mean, f"{metric}.scatter": moments.scatter}
        return state

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], metrics: tuple[Metric, ...]) -> Scores:
        count, agreed = state["counts"].tolist()
        moments = {
            metric: Moments(count, state[f"{metric}.mean"], state[f"{metric}.scatter"])
            for metric in metrics
            if f"{metric}.mean" in state
        }
        return cls(count, agreed, moments)

    def write(self, folder: Path) -> None:
        """Leave `<metric>.npz` with mu and sigma of each, and `scores.json`."""
        for metric, moments in self.moments.items():
            moments.gaussian().write(statistics_file(folder, metric))
        (folder / SCORES).write_text(Row(samples=self.count, agreement=self.agreed / self.count).model_dump_json())


def statistics_file(folder: Path, metric: Metric) -> Path:
    """Where an artifact has the statistics of a metric's features."""
    return folder / f"{metric}.npz"


def read_statistics_of(folder: Path, metric: Metric) -> Gaussian:
    return Gaussian.read(statistics_file(folder, metric))


def read_scores(folder: Path) -> Row:
    return Row.model_validate_json((folder / SCORES).read_text())
