"""The `geneval` metric: whether samples show what their prompts say, by GenEval's rules and the detector of the job.

Its figures carry the detector's name, since another detector gives another number: the share of each tag, and
`geneval`, the mean of the tags' shares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from graftwork.specs.detector import Detector, Mask2FormerSpec
from graftwork.specs.figures import column_word
from graftwork.specs.hub import local_path
from graftwork.specs.metrics import GenevalMetric
from graftwork.stages.artifacts.samples import as_picture
from graftwork.stages.artifacts.texts import GENEVAL_PROMPTS, read_texts
from graftwork.stages.contract import Context
from graftwork.stages.evaluation.geneval.prompts import Prompt, read_prompts
from graftwork.stages.evaluation.geneval.results import Result, gain_figures, read_results, score_figures
from graftwork.stages.evaluation.geneval.rules import DetectedObject, judge_image
from graftwork.stages.evaluation.geneval.vocabulary import GENEVAL, PROMPT_TAGS, Vocabulary
from graftwork.stages.evaluation.metrics import Judge, Seen, Summary, register
from graftwork.stages.evaluation.records import place_of, write_records

RESULTS = "geneval.jsonl"  # of a row: a line an image, as the published scorer writes them


class ObjectDetector(Protocol):
    """Finds objects in an image, and names their colours."""

    name: str
    vocabulary: Vocabulary

    def detect(self, image: Image.Image, /) -> dict[str, list[DetectedObject]]: ...

    def classify(self, image: Image.Image, class_name: str, objects: Sequence[DetectedObject], /) -> list[str]: ...


@register(GenevalMetric)
class GenevalJudge(Judge):
    """A detector, and GenEval's rules."""

    def __init__(self, context: Context, inception: str | None, device: torch.device) -> None:
        texts = read_texts(context.inputs)
        assert texts is not None
        self.detector = load_detector(context.params.detector, device)
        self.first = texts.meta.captions  # the label of the first prompt
        self.prompts = read_prompts(texts.folder / GENEVAL_PROMPTS, self.detector.vocabulary)

    def look(self, images: NDArray[np.uint8], labels: Tensor) -> Seen:
        counts, records = Counter[str](), []
        for pixels, label in zip(images, labels.tolist(), strict=True):
            number = label - self.first
            result = self._judged(as_picture(pixels), number, self.prompts[number])
            counts[self._counted(result.tag, "images")] += 1
            counts[self._counted(result.tag, "correct")] += result.correct
            records.append(result.line())
        return Seen(counts=counts, records=tuple(records))

    def _judged(self, image: Image.Image, number: int, prompt: Prompt) -> Result:
        colours = partial(self.detector.classify, image)
        judgement = judge_image(prompt, self.detector.detect(image), colours, self.detector.vocabulary.colours)
        return Result.of_judgement(Path(place_of(number)), prompt, judgement)

    def _counted(self, tag: str, what: str) -> str:
        return f"geneval:{column_word(self.detector.name)}/{tag}/{what}"

    @staticmethod
    def figures(row: Summary, reference: Summary) -> dict[str, float]:
        counted = {tuple(name.split("/")): share for name, share in row.shares.items() if name.startswith("geneval:")}
        names = {name for name, _, _ in counted}
        columns: dict[str, float] = {}
        for name in names:
            shares = {
                tag: counted[name, tag, "correct"] / counted[name, tag, "images"]
                for tag in PROMPT_TAGS
                if (name, tag, "images") in counted
            }
            columns |= score_figures(shares, name.partition(":")[2])
        return columns

    @staticmethod
    def write_records(records: Sequence[str], folder: Path) -> None:
        """Leave the published scorer's lines, with the number of each image among those of its prompt."""
        write_records(records, folder / RESULTS)

    @staticmethod
    def beside(row: Path, rootstock: Path) -> dict[str, float]:
        """Return the difference to the rootstock, with the bounds of its 95% interval, over prompts and paired."""
        return gain_figures(read_results(rootstock / RESULTS), read_results(row / RESULTS))


def load_detector(spec: Detector, device: torch.device) -> ObjectDetector:
    """Return the detector of a job, on a device. Raise SpecError in one line if it cannot be loaded."""
    if isinstance(spec, Mask2FormerSpec):
        return _WithColours(spec, device)
    from graftwork.stages.evaluation.geneval.shapes import ShapesDetector

    return ShapesDetector()


class _WithColours:
    """Mask2Former with CLIP."""

    vocabulary = GENEVAL

    def __init__(self, spec: Mask2FormerSpec, device: torch.device) -> None:
        from graftwork.stages.evaluation.geneval.colours import ClipColourClassifier
        from graftwork.stages.evaluation.geneval.detector import Mask2FormerDetector

        # Not by a hub id, for which transformers would fetch a newer revision than the one in the step's key.
        path, colours_path = (str(local_path(path)) for path in (spec.path, spec.colours))
        detector, colours = Mask2FormerDetector(path, device), ClipColourClassifier(colours_path, device)
        self.name, self.detect, self.classify = detector.name, detector.detect, colours.classify
