"""What the samples of a job are drawn of, in turn."""

from __future__ import annotations

from dataclasses import dataclass

from graftwork.stages.artifacts.latents import read_meta
from graftwork.stages.artifacts.texts import read_texts
from graftwork.stages.contract import Context


@dataclass(frozen=True)
class Subjects:
    """What samples are drawn of, in turn: the classes, or prompts or captions."""

    names: tuple[str, ...]
    first: int  # the label of the first one; the others follow


def subjects(context: Context) -> Subjects:
    """Return what a job's samples are drawn of."""
    texts = read_texts(context.inputs)
    if texts is not None and texts.meta.prompts:
        return Subjects(texts.meta.prompts, texts.meta.captions)
    return Subjects(read_meta(context.input("features")).classes, 0)
