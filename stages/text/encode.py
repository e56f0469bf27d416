"""`text`: the captions of the data, the prompts and the empty text become states of the text encoder.

They are encoded in shards, streamed through Ray Data: a shard that is whole is kept, and not encoded again after a kill
or a stop. The encoder leaves its device with the step. Leaves what `stages.artifacts.texts` reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import ray.data
import torch

from graftwork.cluster.session.runtime import options, room_for, settle
from graftwork.specs.figures import counted
from graftwork.specs.resources import StepResources
from graftwork.specs.text import JSON_PROMPTS, T5Text
from graftwork.stages.artifacts.latents import read_meta
from graftwork.stages.artifacts.texts import GENEVAL_PROMPTS, META, TextsMeta, TextTable, write_shard
from graftwork.stages.catalog.text import TextParams
from graftwork.stages.contract import Context
from graftwork.stages.data.listing import listed
from graftwork.stages.data.prompts import read_prompts
from graftwork.stages.features.features import link
from graftwork.stages.text.encoder import Folders, TextEncoder, UnfitText, missing_packages

SHARD = 256  # texts: of 300 tokens of 4096 channels at most 630 MB
WORTH_A_STREAM = 2  # shards: fewer are encoded in the step itself, before Ray Data has begun
Row = dict[str, Any]  # of Ray's data set: `shard`, `texts`; later `states` and `lengths`


def run(context: Context) -> None:
    params: TextParams = context.params
    if problem := missing_packages(params.text):
        raise UnfitText(problem)
    captions = read_meta(context.input("features")).classes
    prompts = read_prompts(params.prompts) if params.prompts is not None else ()
    meta = TextsMeta(
        channels=Folders(params.text.path).channels, tokens=params.tokens, captions=len(captions), prompts=prompts
    )
    encode(context, [*captions, *prompts, ""])
    if params.prompts is not None and params.prompts.endswith(JSON_PROMPTS):
        shutil.copyfile(params.prompts, context.out / GENEVAL_PROMPTS)
    (context.out / META).write_text(meta.model_dump_json(indent=1))
    *lengths, least = TextTable(context.out).lengths
    empty = [text for text, length in zip([*captions, *prompts], lengths, strict=True) if length <= least]
    if empty:
        problem = f"{counted(len(empty), 'text')} with nothing left once cleaned, so the empty text"
        context.note(f"{problem}: {listed(empty)}")


def encode(context: Context, texts: Sequence[str]) -> None:
    """Have each shard's files in the step's folder: as they were kept, or encoded now."""
    params: TextParams = context.params
    shards = {number: texts[start : start + SHARD] for number, start in enumerate(range(0, len(texts), SHARD))}
    missing = {number: part for number, part in shards.items() if not _take(number, context)}
    left = sum(map(len, missing.values()))
    context.report(len(texts) - left, len(texts))
    for row in _encoded(params, missing, context):
        for file in write_shard(context.out, row["shard"], row["states"]):
            context.partial.save(file.name, partial(link, file))
        left -= len(row["states"])
        context.report(len(texts) - left, len(texts))
        context.stop_if_asked()


def _take(number: int, context: Context) -> bool:
    """Have a shard that was kept in the step's folder; False where it has to be encoded."""
    files = [f"{name}-{number:05d}.npy" for name in ("states", "lengths")]
    kept = [context.partial.load(file) for file in files]
    if None in kept:
        return False
    for file, path in zip(files, kept, strict=True):
        assert path is not None
        link(path, context.out / file)
    return True


def _encoded(params: TextParams, missing: dict[int, Sequence[str]], context: Context) -> Iterator[Row]:
    """Yield the shards as they are ready."""
    if len(missing) < WORTH_A_STREAM:
        encoder = TextEncoder(params.text, params.tokens, context.device)
        yield from ({"shard": number, "states": encoder(part)} for number, part in missing.items())
        return
    rows = [{"shard": number, "texts": list(part)} for number, part in missing.items()]
    for row in _stream(params, rows, context.resources):
        yield {"shard": row["shard"], "states": _apart(row)}


def _stream(params: TextParams, rows: list[Row], resources: StepResources) -> Iterator[Row]:
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars, settings.raise_original_map_exception = False, True
    told_ray = {name: value for name, value in options(resources).items() if value}
    at_once = min(len(rows), max(1, room_for(resources)))
    workers = ray.data.ActorPoolStrategy(min_size=1, initial_size=at_once, max_size=len(rows))
    encoded = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        Encoder, fn_constructor_args=(params.text, params.tokens), compute=workers, **told_ray
    )
    try:
        yield from encoded.iter_rows()
    except ray.exceptions.RayTaskError as error:  # without the advice on retries that Ray puts below it
        if isinstance(error.cause, UnfitText):
            raise UnfitText(str(error.cause).splitlines()[0]) from None
        raise


class Encoder:
    """A worker that holds the encoder, and a share of a GPU."""

    def __init__(self, text: T5Text, tokens: int) -> None:
        self.text, self.tokens = text, tokens

    def __call__(self, row: Row) -> Row:
        settle()
        states = self._encoder([str(text) for text in row["texts"]])
        joined = torch.cat(states)
        bits = joined.view(torch.int16) if joined.dtype == torch.bfloat16 else joined
        return {"shard": row["shard"], "states": bits.numpy(), "lengths": [len(one) for one in states]}

    @cached_property
    def _encoder(self) -> TextEncoder:
        """Loaded with the first texts: of an error before that, Ray says only that a worker died."""
        return TextEncoder(self.text, self.tokens, settle())


def _apart(row: Row) -> list[torch.Tensor]:
    """Return the states of each text of a shard that came from a worker."""
    joined = torch.from_numpy(row["states"].copy())
    states = joined.view(torch.bfloat16) if joined.dtype == torch.int16 else joined
    return list(states.split([int(length) for length in row["lengths"]]))
