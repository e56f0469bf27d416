"""GenEval's rules: whether the objects that a detector found in an image are those that the prompt asks for.

They are the rules of the published scorer (djghosh13/geneval, evaluation/evaluate_images.py) with its default options,
without a network: objects come from any detector, and a colour is asked for only when it decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Protocol

import numpy as np

from graftwork.stages.evaluation.geneval.prompts import ObjectCount, Prompt, Requirement
from graftwork.stages.evaluation.geneval.vocabulary import GENEVAL, Relation, Tag

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_SCORE, MIN_COUNTING_SCORE = 0.3, 0.9  # of an object that counts; its own is above it
MAX_OBJECTS = 16  # of a class, the best by score: a prompt that asks for more never holds
POSITION_SLACK = 0.1  # of both objects' sizes, by which they must lie apart along an axis
MIN_OFFSET_PIXELS = 1e-3  # beyond the slack
# Of the distance between centres, beyond the slack: for small objects that is within 60 degrees of an axis.
MIN_OFFSET_SHARE = 0.5

Box = tuple[float, float, float, float]  # left, top, right and bottom in pixels


@dataclass(frozen=True)
class DetectedObject:
    """An object in an image: the detector's confidence 0 .. 1, its box, and its pixels (H,W) if the detector tells."""

    score: float
    box: Box
    mask: NDArray[np.bool_] | None = None


Detections = Mapping[str, Sequence[DetectedObject]]  # the objects of each class, in any order


class ColourClassifier(Protocol):
    """Names the colours of objects of one class in one image, in their order."""

    def __call__(self, class_name: str, objects: Sequence[DetectedObject], /) -> Sequence[str]: ...


@dataclass(frozen=True)
class Judgement:
    """The reasons why an image does not show its prompt, in GenEval's words, and the objects that were considered.

    objects: those confident enough for the prompt's tag, by class, the best first.
    """

    reasons: tuple[str, ...]
    objects: Mapping[str, Sequence[DetectedObject]]

    @property
    def correct(self) -> bool:
        return not self.reasons


def judge_image(
    prompt: Prompt,
    detections: Detections,
    classify_colours: ColourClassifier,
    colours: Sequence[str] = GENEVAL.colours,
) -> Judgement:
    """Judge the objects of one image against its prompt. colours: the order in which a reason names them."""
    objects = confident_objects(detections, prompt.tag)
    matched: list[Sequence[DetectedObject]] = []  # for each requirement; empty if it does not hold
    reasons: list[str] = []
    for requirement in prompt.include:
        best = objects.get(requirement.class_name, [])[: requirement.count]
        problem = (
            _count_problem(requirement, best)
            or _colour_problem(requirement, best, classify_colours, colours)
            or _position_problem(requirement, best, matched)
        )
        matched.append([] if problem else best)
        reasons += [problem] if problem else []
    reasons += [problem for exclusion in prompt.exclude if (problem := _excess(exclusion, objects))]
    return Judgement(tuple(reasons), objects)


def confident_objects(detections: Detections, tag: Tag) -> dict[str, list[DetectedObject]]:
    """Return the objects of each class above the tag's score, the best first and at most 16; no class without any.

    Of equal scores the later object comes first, as in the scorer's reversed ascending order.
    """
    min_score = MIN_COUNTING_SCORE if tag == "counting" else MIN_SCORE
    ordered = {name: sorted(objects, key=lambda instance: instance.score)[::-1] for name, objects in detections.items()}
    confident = {
        name: [instance for instance in objects if _is_above(instance.score, min_score)][:MAX_OBJECTS]
        for name, objects in ordered.items()
    }
    return {name: objects for name, objects in confident.items() if objects}


def relative_positions(box: Box, reference: Box) -> tuple[Relation, ...]:
    """Return where a box lies from a reference: none, one or two relations, of the offset between their centres.

    Along each axis the offset counts beyond 0.1 of the sum of both sizes, and holds above half of the whole offset's
    length; y grows downwards.
    """
    one, other = np.asarray(box, np.float32), np.asarray(reference, np.float32)  # the scorer's precision decides ties
    offset = (one[:2] + one[2:]) / 2 - (other[:2] + other[2:]) / 2
    sizes = np.abs(one[2:] - one[:2]) + np.abs(other[2:] - other[:2])
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - np.float32(POSITION_SLACK) * sizes, 0)
    if (np.abs(beyond) < MIN_OFFSET_PIXELS).all():
        return ()
    x, y = beyond / np.linalg.norm(offset)
    holds: dict[Relation, bool] = {
        "left of": x < -MIN_OFFSET_SHARE,
        "right of": x > MIN_OFFSET_SHARE,
        "above": y < -MIN_OFFSET_SHARE,
        "below": y > MIN_OFFSET_SHARE,
    }
    return tuple(relation for relation, is_true in holds.items() if is_true)


def _is_above(score: float, min_score: float) -> bool:
    """Return whether a score is above another in 32 bits, as the scorer's are: a network's 0.3 is not above 0.3."""
    return bool(np.float32(score) > np.float32(min_score))


def _count_problem(requirement: ObjectCount, best: Sequence[DetectedObject]) -> str | None:
    if len(best) < requirement.count:
        return f"expected {requirement.class_name}>={requirement.count}, found {len(best)}"
    return None


def _colour_problem(
    requirement: Requirement, best: Sequence[DetectedObject], classify: ColourClassifier, order: Sequence[str]
) -> str | None:
    if requirement.colour is None:
        return None
    colours = list(classify(requirement.class_name, best))
    right = colours.count(requirement.colour)
    if right >= requirement.count:
        return None
    by_colour = ", ".join(f"{colours.count(colour)} {colour}" for colour in order if colour in colours)
    objects = f"{requirement.colour} {requirement.class_name}>={requirement.count}"
    return f"expected {objects}, found {right} {requirement.colour}; and {by_colour}"


def _position_problem(
    requirement: Requirement, best: Sequence[DetectedObject], matched: Sequence[Sequence[DetectedObject]]
) -> str | None:
    """Return what is wrong with the first pair of an object and a reference that is not in the relation."""
    if requirement.position is None:
        return None
    relation, index = requirement.position
    if not matched[index]:
        return f"no target for {requirement.class_name} to be {relation}"
    for instance, reference in product(best, matched[index]):
        relations = relative_positions(instance.box, reference.box)
        if relation not in relations:
            return f"expected {requirement.class_name} {relation} target, found {' and '.join(relations)} target"
    return None


def _excess(exclusion: ObjectCount, objects: Detections) -> str | None:
    num_found = len(objects.get(exclusion.class_name, ()))
    if num_found >= exclusion.count:
        return f"expected {exclusion.class_name}<{exclusion.count}, found {num_found}"
    return None
