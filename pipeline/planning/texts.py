"""What can be known to be wrong with a job's texts, and the network that reads them, before a run starts."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from graftwork.cluster.drivers import num_gpus_here
from graftwork.specs.data import TEXT_DATA
from graftwork.specs.detector import Detector, ShapesSpec
from graftwork.specs.hub import is_hub_id, whereabouts
from graftwork.specs.job import JobSpec
from graftwork.specs.problems import SpecError
from graftwork.specs.rootstock import TextModel
from graftwork.specs.text import T5Text
from graftwork.stages.data.prompts import read_prompts
from graftwork.stages.data.sources import are_here, class_names
from graftwork.stages.evaluation.geneval import prompts as geneval
from graftwork.stages.evaluation.geneval.vocabulary import GENEVAL, Vocabulary
from graftwork.stages.text.encoder import Folders, Tokenizer, UnfitText, missing_packages

MEASURED = 1000  # captions that a run counts the tokens of before it starts, however short they are


def text_shortages(job: JobSpec) -> Iterator[str]:
    """Yield a line for what the encoder or the prompts, where they are on this machine, cannot meet."""
    if job.text is None or not isinstance(job.model, TextModel):
        return
    if problem := missing_packages(job.text):
        yield problem
    yield from _prompt_shortages(job)
    yield from _detector_shortages(job)
    if not _encoder_is_here(job.text.path):
        return
    try:
        channels = Folders(job.text.path).channels
    except UnfitText as error:
        yield str(error)
        return
    if channels != job.model.caption_channels:
        accepted = f"an encoder of {job.model.caption_channels} channels, as model.caption_channels says"
        yield f"text.path: got {job.text.path!r}, an encoder of {channels} channels; accepted: {accepted}"


def _prompt_shortages(job: JobSpec) -> Iterator[str]:
    """Yield a line for each thing that is wrong with the prompts, or with how many samples are drawn for them."""
    path, evaluate = job.evaluate.prompts, job.evaluate
    if path is None or not Path(path).exists():
        return
    try:
        count = len(read_prompts(path))
        if "geneval" in evaluate.metrics:
            geneval.read_prompts(Path(path), _vocabulary(evaluate.detector))
    except SpecError as error:
        yield from (f"evaluate.prompts: {line}" for line in error.lines)
    except ValueError as error:
        yield str(error)
    else:
        if "geneval" in evaluate.metrics and evaluate.samples % count:
            accepted = f"a multiple of {count:,}, the number of prompts; GenEval draws 4 for each, {4 * count:,}"
            yield f"evaluate.samples: got {evaluate.samples:,}; accepted: {accepted}"


def _detector_shortages(job: JobSpec) -> Iterator[str]:
    """Yield a line if the detector finds objects in images of another size only."""
    detector = job.evaluate.detector
    if detector is None or "geneval" not in job.evaluate.metrics:
        return
    if isinstance(detector, ShapesSpec) and job.data.image_size != detector.side:
        accepted = f"mask2former, or data.image_size {detector.side}: its shapes are of scenes of so many pixels a side"
        yield f"evaluate.detector.kind: got 'shapes', for images of {job.data.image_size} pixels; accepted: {accepted}"


def _vocabulary(detector: Detector | None) -> Vocabulary:
    """Return the classes and colours that a detector knows."""
    if not isinstance(detector, ShapesSpec):
        return GENEVAL
    from graftwork.stages.evaluation.geneval.shapes import VOCABULARY  # NumPy, which other plans do not need

    return VOCABULARY


def check_texts(job: JobSpec, pending: Collection[str]) -> Iterator[str]:
    """Yield a line if the pending `text` step would refuse texts for their length, or the tokenizer.

    Captions that are short for sure are not measured, but for the first of them: a million would take an hour.
    """
    if job.text is None or "text" not in pending or not isinstance(job.model, TextModel):
        return
    if not _encoder_is_here(job.text.path):
        return
    if not num_gpus_here():
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed, which comes with the tokenizers, warns else
    try:
        Tokenizer(job.text, job.model.text_tokens)([*_measured(job, job.text, job.model.text_tokens), *_prompts(job)])
    except UnfitText as error:
        yield str(error)


def _measured(job: JobSpec, text: T5Text, tokens: int) -> list[str]:
    """Return the first captions and, unless texts are cut, those that may be of more tokens.

    A token is at least a byte, but for two: one that begins a text and one that ends it.
    """
    captions = _captions(job)
    long = [] if text.truncate else [one for one in captions[MEASURED:] if len(one.encode()) + 2 > tokens]
    return [*captions[:MEASURED], *long]


def _captions(job: JobSpec) -> tuple[str, ...]:
    return class_names(job.data) if isinstance(job.data, TEXT_DATA) and are_here(job.data) else ()


def _prompts(job: JobSpec) -> tuple[str, ...]:
    path = job.evaluate.prompts
    return read_prompts(path) if path is not None and Path(path).is_file() else ()


def _encoder_is_here(path: str) -> bool:
    return whereabouts(path, "text_encoder") is None if is_hub_id(path) else Path(path).exists()
