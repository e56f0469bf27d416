"""The texts of a job become states of its text encoder, once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from graftwork.specs.fields import LocalPath, Spec, Unkeyed
from graftwork.specs.rootstock import TextModel
from graftwork.specs.text import T5Text
from graftwork.stages.catalog.inputs import LABELS, prompts_format
from graftwork.stages.stage import External, Stage, StepDraft

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec


class TextParams(Spec):
    """Texts to states."""

    text: T5Text
    tokens: int  # of a text, at most
    prompts: Annotated[LocalPath | None, Unkeyed()] = None  # a file, whose content is in the key


def steps(job: JobSpec) -> Iterator[StepDraft]:
    if job.text is None or not isinstance(job.model, TextModel):
        return
    external, outside = [External("encoder", job.text.path, "text.path")], dict[str, str]()
    if job.evaluate.prompts is not None:
        external.append(External("prompts", job.evaluate.prompts, "evaluate.prompts"))
        outside = prompts_format(job.evaluate.prompts)
    params = TextParams(text=job.text, tokens=job.model.text_tokens, prompts=job.evaluate.prompts)
    yield StepDraft("text", params, LABELS, outside, tuple(external), precision=job.text.precision, spreads=True)


STAGE = Stage(
    version=1,
    steps=steps,
    module="graftwork.stages.text.encode",
    orchestrates=True,
    foundation=True,
    memory="text.batch",
)
