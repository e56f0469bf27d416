"""GenEval's `results.jsonl`, a line an image; the scores of all images, and how far those of two sets are apart."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, field_validator

from graftwork.specs.fields import Spec, refuse
from graftwork.specs.problems import SpecError
from graftwork.stages.evaluation.bootstrap import BOOTSTRAP_SEED, NUM_BOOTSTRAP_DRAWS, interval, resampled_means
from graftwork.stages.evaluation.geneval.files import read_jsonl, write_whole
from graftwork.stages.evaluation.geneval.prompts import Prompt
from graftwork.stages.evaluation.geneval.rules import Judgement
from graftwork.stages.evaluation.geneval.vocabulary import PROMPT_TAGS, Tag

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLE_PATH = re.compile(r"(?:.*[/\\])?(\d+)[/\\]samples[/\\](\d+)\.png")

ScoredBox = tuple[float, float, float, float, float]  # left, top, right and bottom in pixels, and the score


class Result(Spec):
    """What was judged of one image. Fields as in the published scorer's file; more of them are ignored.

    filename: .../PROMPT/samples/SAMPLE.png; reason: a line for each, none if correct; details: the objects that were
    considered, by class.
    """

    model_config = ConfigDict(extra="ignore")
    filename: str
    tag: Tag
    prompt: str
    correct: Annotated[bool, Field(strict=True)]
    reason: str
    metadata: Prompt
    details: dict[str, tuple[ScoredBox, ...]]

    @field_validator("metadata", "details", mode="before")
    @classmethod
    def _is_json_or_its_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            refuse([], value, "a JSON object, or its text")

    @field_validator("filename")
    @classmethod
    def _names_a_sample(cls, name: str) -> str:
        if not SAMPLE_PATH.fullmatch(name):
            refuse([], name, "a path that ends in PROMPT/samples/SAMPLE.png, both of them numbers")
        return name

    @property
    def place(self) -> tuple[int, int]:
        """The index of the prompt, and that of the sample."""
        match = SAMPLE_PATH.fullmatch(self.filename)
        assert match is not None
        return int(match[1]), int(match[2])

    @classmethod
    def of_judgement(cls, file: Path, prompt: Prompt, judgement: Judgement) -> Result:
        """Return the result for an image file."""
        boxes = {
            name: [(*instance.box, instance.score) for instance in objects]
            for name, objects in judgement.objects.items()
        }
        return cls(
            filename=str(file),
            tag=prompt.tag,
            prompt=prompt.prompt,
            correct=judgement.correct,
            reason="\n".join(judgement.reasons),
            metadata=prompt,
            details={name: tuple(objects) for name, objects in boxes.items()},
        )

    def line(self) -> str:
        """Return the line of the published format, which has metadata and details as JSON within a string."""
        values = {"metadata": json.dumps(self.metadata.document()), "details": json.dumps(self.details)}
        return json.dumps(self.model_dump(mode="json") | values)


@dataclass(frozen=True)
class TagScore:
    """How many images of a tag show their prompts."""

    num_correct: int
    num_images: int

    @property
    def share(self) -> float:
        return self.num_correct / self.num_images


@dataclass(frozen=True)
class GenEvalScore:
    """The score of each tag that has images, in GenEval's order."""

    tags: Mapping[Tag, TagScore]

    @property
    def overall(self) -> float:
        """GenEval's score, 0 .. 1: the mean of the tags' shares, each with the same weight."""
        return fmean(tag.share for tag in self.tags.values())

    @property
    def absent(self) -> tuple[Tag, ...]:
        """The tags without images: with any, `overall` compares to no published score."""
        return tuple(tag for tag in PROMPT_TAGS if tag not in self.tags)


@dataclass(frozen=True)
class PairedDifference:
    """How much higher a second set of images scores overall, and the bounds of the 95% interval; 0.01 is one point."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class PromptGains:
    """For each prompt of a tag: its images, and how many more of them are correct in a second set; both (P,)."""

    gains: NDArray[np.int64]
    images: NDArray[np.int64]


def read_results(file: Path) -> list[Result]:
    """Return the results of a file, of ours or of the published scorer.

    Raise SpecError with a line for each problem: FILE:LINE: field: got X; accepted: Y.
    """
    results = read_jsonl(file, Result)
    ((place, count),) = Counter(result.place for result in results).most_common(1)
    if count > 1:
        raise SpecError([f"{file}: filename: got {_image(place)} {count} times; accepted: one line for each image"])
    return results


def write_results(file: Path, results: Iterable[Result]) -> None:
    """Write the results in the published format; the file is there whole or not at all."""
    content = "".join(f"{result.line()}\n" for result in results)
    write_whole(file, lambda out: out.write(content.encode()))


def score(results: Iterable[Result]) -> GenEvalScore:
    """Return the scores of results, of which there is at least one."""
    images, correct = Counter[Tag](), Counter[Tag]()
    for result in results:
        images[result.tag] += 1
        correct[result.tag] += result.correct
    return GenEvalScore({tag: TagScore(correct[tag], images[tag]) for tag in PROMPT_TAGS if tag in images})


def score_figures(shares: Mapping[Tag, float], detector: str | None) -> dict[str, float]:
    """Return the columns of the tags' shares and of their mean, named after the detector if one is given."""
    suffix = "" if detector is None else f":{detector}"
    overall = sum(shares.values()) / len(shares)
    return {f"geneval{suffix}": overall} | {f"{tag}{suffix}": share for tag, share in shares.items()}


def gain_figures(rootstock: Sequence[Result], graft: Sequence[Result]) -> dict[str, float]:
    """Return the columns of how much higher a graft scores than its rootstock; see `paired_difference`."""
    difference = paired_difference(rootstock, graft, np.random.default_rng(BOOTSTRAP_SEED))
    values = {"gain": difference.difference, "gain_low": difference.low, "gain_high": difference.high}
    return {f"{name}:geneval": value for name, value in values.items()}


def paired_difference(
    first: Sequence[Result],
    second: Sequence[Result],
    generator: np.random.Generator,
    num_draws: int = NUM_BOOTSTRAP_DRAWS,
) -> PairedDifference:
    """Return the second set's overall score minus the first's, with a bootstrap interval over prompts.

    Each draw takes as many prompts of each tag as there are, with replacement, each with its samples of both sets:
    what is common to both, such as how hard a prompt is, cancels. Raise SpecError if the sets are not of the same
    prompts and samples.
    """
    _require_same_images(first, second)
    by_tag = _gains_by_tag(first, second)
    draws = [resampled_means(tag.gains, tag.images, generator, num_draws) for tag in by_tag]
    low, high = interval(np.mean(draws, axis=0))
    return PairedDifference(score(second).overall - score(first).overall, low, high)


def _require_same_images(first: Sequence[Result], second: Sequence[Result]) -> None:
    accepted = "accepted: the same prompts and samples in both sets"
    one, other = ({result.place: result.metadata for result in results} for results in (first, second))
    if unpaired := one.keys() ^ other.keys():
        got = f"{len(unpaired):,} images in one set only, first {_image(min(unpaired))}"
        raise SpecError([f"paired difference: got {got}; {accepted}"])
    if different := [place for place in one if one[place] != other[place]]:
        got = f"two prompts for {_image(min(different))}, and {len({prompt for prompt, _ in different}):,} in all"
        raise SpecError([f"paired difference: got {got}; {accepted}"])


def _image(place: tuple[int, int]) -> str:
    prompt, sample = place
    return f"{prompt:05d}/samples/{sample:04d}.png"


def _gains_by_tag(first: Sequence[Result], second: Sequence[Result]) -> list[PromptGains]:
    """Return the gains of each tag's prompts, in an order that the results' order does not change."""
    before = {result.place: result.correct for result in first}
    gains, images, tags = Counter[int](), Counter[int](), dict[int, Tag]()
    for result in second:
        prompt, _ = result.place
        gains[prompt] += result.correct - before[result.place]
        images[prompt] += 1
        tags[prompt] = result.tag
    by_tag = [[prompt for prompt in sorted(images) if tags[prompt] == tag] for tag in PROMPT_TAGS]
    counts = ([[of[prompt] for prompt in prompts] for of in (gains, images)] for prompts in by_tag if prompts)
    return [PromptGains(*map(np.asarray, pair)) for pair in counts]
