"""The detector that GenEval's figures are made with: Mask2Former on COCO, by transformers.

The published scorer runs it by mmdet 2.x, which no longer installs. What mmdet does before and after the network is
done here as there (mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco, MaskFormerFusionHead.instance_postprocess); the
weights are other ones of the same architecture, so that a figure has to name its detector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.specs.problems import SpecError, first_few
from graftwork.stages.evaluation.geneval.rules import MIN_SCORE, Box, DetectedObject
from graftwork.stages.evaluation.geneval.vocabulary import GENEVAL, GENEVAL_NAMES, Vocabulary
from graftwork.stages.evaluation.pretrained import load_model, model_name

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

SHORTEST_EDGE, LONGEST_EDGE = 800, 1333  # pixels of an image as the network sees it, at most
SIZE_DIVISOR, PADDING_LEVEL = 32, 128.0  # to the right and below, of 0 .. 255
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of red, green and blue, 0 .. 255
MAX_CANDIDATES = 100  # pairs of a query and a class, the most probable ones
AREA_EPSILON = 1e-6  # pixels, as in mmdet
MAX_NAMED_CLASSES = 4  # in an error

Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class Geometry:
    """The sizes of an image: its own, scaled for the network, and filled up to a multiple of 32."""

    image_size: Size
    scaled_size: Size
    padded_size: Size

    @classmethod
    def of(cls, image_size: Size) -> Geometry:
        scale = min(LONGEST_EDGE / max(image_size), SHORTEST_EDGE / min(image_size))
        height, width = (int(length * scale + 0.5) for length in image_size)
        return cls(image_size, (height, width), (_round_up(height), _round_up(width)))


@dataclass(frozen=True)
class Candidate:
    """A query's object with one of its classes, by the index in the network's output."""

    class_index: int
    instance: DetectedObject


@dataclass(frozen=True)
class QueryMask:
    """The pixels of a query's object (H,W), the mean sigmoid of its logits inside, and its box."""

    pixels: NDArray[np.bool_]
    certainty: Tensor
    box: Box


class Mask2FormerDetector:
    """Mask2Former, loaded on a device.

    path: a folder or hub id, such as facebook/mask2former-swin-small-coco-instance; min_score: objects at or below it
    are left out, which no rule of GenEval looks at. Raise SpecError in one line if the model cannot be loaded, or if
    its classes are not those of the vocabulary.
    """

    def __init__(
        self, path: str, device: torch.device, vocabulary: Vocabulary = GENEVAL, min_score: float = MIN_SCORE
    ) -> None:
        from transformers import Mask2FormerForUniversalSegmentation

        self.name = model_name(path)
        self.device = device
        self.min_score = min_score
        self.model = load_model(Mask2FormerForUniversalSegmentation, path, device)
        self.classes = class_names(self.model.config.id2label, path, vocabulary)
        self.vocabulary = vocabulary

    @torch.no_grad()
    def detect(self, image: Image.Image) -> dict[str, list[DetectedObject]]:
        """Return the objects in an RGB image, by class in the vocabulary's order; no class without any."""
        pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()).to(self.device)
        geometry = Geometry.of((image.height, image.width))
        output = self.model(pixel_values=network_input(pixels, geometry))
        class_logits, mask_logits = output.class_queries_logits[0], output.masks_queries_logits[0]
        objects: dict[str, list[DetectedObject]] = {name: [] for name in self.vocabulary.classes}
        for candidate in candidates(class_logits, mask_logits, geometry, self.min_score):
            objects[self.classes[candidate.class_index]].append(candidate.instance)
        return {name: instances for name, instances in objects.items() if instances}


def class_names(labels: Mapping[int, str], path: str, vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return the vocabulary's names of a model's classes, in the model's order.

    labels: the model's own names, by index from 0. Raise SpecError in one line if they are of other classes.
    """
    own = [labels[index] for index in range(len(labels))]
    names = tuple(name if name in vocabulary.classes else GENEVAL_NAMES.get(name, name) for name in own)
    if sorted(names) != sorted(vocabulary.classes):
        got = f"a model of {len(own)} classes ({first_few(own, MAX_NAMED_CLASSES)})"
        accepted = f"one of {len(vocabulary.classes)}: {first_few(vocabulary.classes, MAX_NAMED_CLASSES)}"
        raise SpecError([f"{path}: got {got}; accepted: {accepted}"])
    return names


def network_input(pixels: Tensor, geometry: Geometry) -> Tensor:
    """Return an image (3,H,W), uint8 RGB, as the network takes it (1,3,H',W').

    It is scaled as OpenCV does in mmdet, bilinearly between the nearest pixels and without smoothing, which tells in
    images that become smaller; then rounded, filled up, and normalised.
    """
    scaled = F.interpolate(
        pixels[None].float(), size=geometry.scaled_size, mode="bilinear", align_corners=False
    ).round()
    below, right = (whole - part for whole, part in zip(geometry.padded_size, geometry.scaled_size, strict=True))
    padded = F.pad(scaled, (0, right, 0, below), value=PADDING_LEVEL)
    mean, deviation = (padded.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (padded - mean) / deviation


def candidates(class_logits: Tensor, mask_logits: Tensor, geometry: Geometry, min_score: float) -> Iterator[Candidate]:
    """Yield the objects above a score, the most probable class first.

    class_logits (Q,C+1), the last of them for no object; mask_logits (Q,h,w) of the padded image. A score is the
    class's probability times the mean sigmoid of the logits inside the mask, which is where they are above 0.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    best = probabilities.flatten().topk(min(MAX_CANDIDATES, probabilities.numel()))
    # A query comes up once for each of its classes, and its mask takes the time.
    mask_of = cache(lambda query: _query_mask(mask_logits[query], geometry))
    for probability, index in zip(best.values, best.indices.tolist(), strict=True):
        if probability <= min_score:  # a score is at most the probability
            return
        mask = mask_of(index // num_classes)
        score = float(probability * mask.certainty)
        if score > min_score:
            yield Candidate(index % num_classes, DetectedObject(score, mask.box, mask.pixels))


def _query_mask(logits: Tensor, geometry: Geometry) -> QueryMask:
    """Return the mask of a query's logits (h,w); without any pixel, its certainty is 0."""
    at_size = _at_original_size(logits, geometry)
    inside = at_size > 0
    certainty = (at_size.sigmoid() * inside).sum() / (inside.sum() + AREA_EPSILON)
    return QueryMask(inside.cpu().numpy(), certainty, _box(inside))


def _at_original_size(logits: Tensor, geometry: Geometry) -> Tensor:
    """Return logits (h,w) of a padded image as (H,W) of the original: scaled up, cut, and scaled to it, as in mmdet."""
    height, width = geometry.scaled_size
    padded = F.interpolate(logits[None, None], size=geometry.padded_size, mode="bilinear", align_corners=False)
    cut = padded[:, :, :height, :width]
    return F.interpolate(cut, size=geometry.image_size, mode="bilinear", align_corners=False)[0, 0]


def _box(inside: Tensor) -> Box:
    """Return the box around the pixels of a mask (H,W), its right and bottom behind the last ones; zeros if empty."""
    rows, columns = inside.any(1).nonzero().flatten().tolist(), inside.any(0).nonzero().flatten().tolist()
    if not rows:
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def _round_up(length: int) -> int:
    return -(-length // SIZE_DIVISOR) * SIZE_DIVISOR
