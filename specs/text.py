"""The text encoder of a job whose model is told texts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from graftwork.specs.fields import Spec, Unkeyed, WeightsPath

JSON_PROMPTS = ".jsonl"  # how the name of a file of prompts ends that has a JSON object a line, as GenEval's


class T5Text(Spec):
    """A T5 encoder with its tokenizer, as PixArt-Sigma's pipelines have them: a folder or a hub id, of such a pipeline
    (`text_encoder` and `tokenizer` in it) or of an encoder alone."""

    kind: Literal["t5"] = "t5"
    path: Annotated[WeightsPath, Unkeyed()]  # its content is in the key
    clean: bool = Field(
        True,
        description="clean texts as diffusers does, with ftfy and beautifulsoup4; else only lower their case",
    )
    truncate: bool = Field(False, description="cut texts of more tokens than model.text_tokens, which are refused else")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of the encoder, and of the states that are kept")
    batch: int = Field(16, ge=1, description="texts at a time; sums differ in their last bits with it")
