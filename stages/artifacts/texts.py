"""The artifact of `text`: states of the text encoder, and how the other stages read them.

    texts.json             what they are, and the prompts
    states-00000.npy       (T,E) of all tokens of a shard's texts, one text after another; bf16 as its bits in uint16
    lengths-00000.npy      (n,) tokens of each of these texts
    prompts.jsonl          of GenEval's prompts: what an image of each must show

The texts are the captions of the data, in the order of their labels, then the prompts that samples are drawn for, then
the empty one. The files are memory-mapped: of a batch, no more than its texts is read.

Shapes: B samples, L tokens that each text is filled up to, E channels of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from graftwork.models.condition import EMPTY_TEXT, Condition, TextConditioner
from graftwork.models.rootstocks import Rootstock
from graftwork.stages.contract import Input

META = "texts.json"
GENEVAL_PROMPTS = "prompts.jsonl"  # where the prompts are GenEval's: what an image of each must show


class TextsMeta(BaseModel):
    """What the states are."""

    model_config = ConfigDict(frozen=True)
    channels: int  # E
    tokens: int  # L
    captions: int  # how many texts the data have
    prompts: tuple[str, ...]  # that samples are drawn for; none where they are drawn for the captions


class TextTable:
    """Texts by their numbers; EMPTY_TEXT is that of the empty one. Copies of it share the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = TextsMeta.model_validate_json((folder / META).read_text())

    def __reduce__(self) -> tuple[type[TextTable], tuple[Path]]:
        return TextTable, (self.folder,)

    def __deepcopy__(self, _: object) -> TextTable:
        return self

    @cached_property
    def shards(self) -> list[NDArray[Any]]:
        return [np.load(path, mmap_mode="r") for path in sorted(self.folder.glob("states-*.npy"))]

    @cached_property
    def places(self) -> list[tuple[int, int, int]]:
        """Of each text: its shard, and its first and last token there."""
        places = []
        for number, path in enumerate(sorted(self.folder.glob("lengths-*.npy"))):
            ends = np.load(path).cumsum().tolist()
            places += [(number, begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        return places

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text, the empty one's last."""
        return [end - begin for _, begin, end in self.places]

    def states(self, label: int) -> Tensor:
        """Return the states (T,E) of a text. Raise IndexError for a label of none."""
        if not EMPTY_TEXT <= label < len(self.places) - 1:
            raise IndexError(f"text {label} of {len(self.places) - 1}")
        shard, begin, end = self.places[label]
        states = torch.from_numpy(np.array(self.shards[shard][begin:end]))
        return states.view(torch.bfloat16) if states.dtype == torch.uint16 else states

    def __call__(self, condition: Condition) -> Condition:
        """Return the texts (B,L,E) with their masks (B,L) for labels (B,), on their device."""
        labels = condition.require("labels")
        states = [self.states(label) for label in labels.tolist()]
        text = states[0].new_zeros(len(states), self.meta.tokens, self.meta.channels)
        mask = torch.zeros(len(states), self.meta.tokens)
        for row, one in enumerate(states):
            text[row, : len(one)], mask[row, : len(one)] = one, 1
        return Condition(text=text, mask=mask).to(labels.device)

    @cached_property
    def conditioner(self) -> TextConditioner:
        """What knows the null condition: the empty text."""
        return TextConditioner(self.meta.channels, self(Condition(labels=torch.tensor([EMPTY_TEXT]))))


def read_texts(inputs: Mapping[str, Input]) -> TextTable | None:
    """Return the texts of a step's inputs; None in a job without."""
    return TextTable(inputs["text"].path()) if "text" in inputs else None


def told(model: Rootstock, inputs: Mapping[str, Input]) -> Rootstock:
    """Return the model, which from now on knows the texts of a step's inputs by their labels."""
    model.texts = read_texts(inputs)
    return model


def write_shard(folder: Path, number: int, states: Sequence[Tensor]) -> tuple[Path, Path]:
    """Write the states (T,E) of some texts; return the two files."""
    joined = torch.cat(list(states))
    bits = joined.view(torch.uint16) if joined.dtype == torch.bfloat16 else joined
    files = folder / f"states-{number:05d}.npy", folder / f"lengths-{number:05d}.npy"
    np.save(files[0], bits.numpy())
    np.save(files[1], np.array([len(one) for one in states], dtype=np.int64))
    return files
