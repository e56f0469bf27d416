"""The `clip_score` metric: how near samples are to their texts, as a CLIP sees both (CLIPScore, arXiv 2104.08718).

Of an image it is 100 max(cos, 0), of the angle between its vector and its text's; of a row the mean over its images.
The figure carries the name of the CLIP, since another one gives another number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.specs.figures import column_word
from graftwork.specs.hub import local_path
from graftwork.specs.metrics import ClipScoreMetric
from graftwork.stages.artifacts.samples import as_picture
from graftwork.stages.contract import Context
from graftwork.stages.evaluation.bootstrap import mean_with_interval
from graftwork.stages.evaluation.clip import Clip
from graftwork.stages.evaluation.metrics import Judge, Seen, Summary, register
from graftwork.stages.evaluation.records import place_of, write_records
from graftwork.stages.evaluation.subjects import subjects

RECORDS = "clip_score.jsonl"  # of a row: a line an image
SCALE = 100.0  # of the cosine, as torchmetrics has it; the paper's is 2.5


@register(ClipScoreMetric)
class ClipScoreJudge(Judge):
    """A CLIP, and the texts that samples are drawn of."""

    def __init__(self, context: Context, inception: str | None, device: torch.device) -> None:
        # Not by a hub id, for which transformers would fetch a newer revision than the one in the step's key.
        self.clip = Clip(str(local_path(context.params.clip.path)), device)
        self.subjects = subjects(context)

    def look(self, images: NDArray[np.uint8], labels: Tensor) -> Seen:
        numbers = (labels - self.subjects.first).tolist()
        texts = [self.subjects.names[number] for number in numbers]
        vectors = self.clip.image_vectors([as_picture(pixels) for pixels in images])
        cosines = (vectors * self.clip.text_vectors(texts)).sum(1).double()
        scores = SCALE * cosines.clamp(min=0)
        judged = zip(numbers, texts, scores.tolist(), strict=True)
        records = tuple(
            json.dumps({"filename": place_of(number), "prompt": text, "clip_score": score})
            for number, text, score in judged
        )
        return Seen(scores[:, None], {f"clip_score:{column_word(self.clip.name)}": len(images)}, records)

    @staticmethod
    def figures(row: Summary, reference: Summary) -> dict[str, float]:
        assert row.statistics is not None
        (name,) = (name for name in row.shares if name.startswith("clip_score:"))
        return {name: float(row.statistics.mu[0])}

    @staticmethod
    def write_records(records: Sequence[str], folder: Path) -> None:
        write_records(records, folder / RECORDS)

    @staticmethod
    def beside(row: Path, rootstock: Path) -> dict[str, float]:
        """Return the difference to the rootstock, with the bounds of its 95% interval, over prompts and paired."""
        first, second = (_read_scores(folder / RECORDS) for folder in (rootstock, row))
        gains = np.array([score - first[place] for place, score in second.items()])
        prompts = np.array([place.partition("/")[0] for place in second])
        values = zip(("gain", "gain_low", "gain_high"), mean_with_interval(gains, prompts), strict=True)
        return {f"{name}:clip_score": value for name, value in values}


def _read_scores(file: Path) -> dict[str, float]:
    """Return the score of each image of a row, by its place."""
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {line["filename"]: line["clip_score"] for line in lines}
