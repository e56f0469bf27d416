"""The `classifier` metric: distance and agreement by the small classifier that the job trains."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from graftwork.models.measures.classifier import Classifier
from graftwork.models.measures.frechet import distance
from graftwork.specs.metrics import ClassifierMetric
from graftwork.stages.artifacts.latents import read_meta
from graftwork.stages.contract import Context
from graftwork.stages.data.pixels import before_rounding
from graftwork.stages.evaluation.metrics import Judge, Seen, Summary, as_floats, register


@register(ClassifierMetric)
class ClassifierJudge(Judge):
    """The job's own classifier."""

    def __init__(self, context: Context, inception: str | None, device: torch.device) -> None:
        meta = read_meta(context.input("features"))
        self.network = Classifier(meta.channels, meta.side, len(meta.classes))
        self.network.load_state_dict(load_file(context.input("classifier") / "classifier.safetensors"))
        self.network.eval().to(device)
        self.device = device

    def look(self, images: NDArray[np.uint8], labels: Tensor) -> Seen:
        with torch.no_grad():
            features = self.network.features(before_rounding(as_floats(images, self.device)))
            agreed = int((self.network.head(features).argmax(1) == labels.to(self.device)).sum())
        return Seen(features.double(), {"agreement": agreed})

    @staticmethod
    def figures(row: Summary, reference: Summary) -> dict[str, float]:
        assert row.statistics is not None and reference.statistics is not None
        return {"distance": distance(row.statistics, reference.statistics), "agreement": row.shares["agreement"]}
