"""What a network is told beside the noised latent and its timestep: a class or a text; and what to say for "nothing".

Shapes: B samples, L tokens of a text, E channels of a token, P channels of a pooled text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Condition:
    """The conditions of B samples: labels, or texts. A field that a network does not know stays None."""

    labels: Tensor | None = None  # (B,) integers
    text: Tensor | None = None  # (B,L,E)
    mask: Tensor | None = None  # (B,L), 1 at the tokens of a text and 0 at what fills it up
    pooled: Tensor | None = None  # (B,P)

    @classmethod
    def of(cls, condition: Condition | Tensor) -> Condition:
        """Return a Condition unchanged; make one from a tensor (B,) of labels."""
        return condition if isinstance(condition, Condition) else cls(labels=condition)

    def __len__(self) -> int:
        """Return B. Raises ValueError if no field is set."""
        for value in self.tensors().values():
            return len(value)
        raise ValueError(f"condition: got none; accepted: at least one of {', '.join(NAMES)}")

    def __getitem__(self, chosen: Tensor | slice) -> Condition:
        """Return those of some samples: a slice, or indices (n,), or a mask (B,)."""
        return self._each(lambda value: value[chosen])

    def join(self, other: Condition) -> Condition:
        """Return the conditions of this batch, then those of the other; both must have the same fields."""
        return self._with(other, lambda own, others: torch.cat([own, others]))

    def replace(self, which: Tensor, other: Condition) -> Condition:
        """Return this batch with the samples where `which` (B,) is true taken from the other, as large, batch."""
        return self._with(
            other, lambda own, others: torch.where(which.reshape(-1, *[1] * (own.dim() - 1)), others, own)
        )

    def to(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> Condition:
        """Return the condition on a device, and what is floating-point in it in a type; both stay where left out."""
        return self._each(
            lambda value: value.to(
                device=value.device if device is None else device,
                dtype=dtype if dtype is not None and value.is_floating_point() else value.dtype,
                non_blocking=non_blocking,
            )
        )

    def pin_memory(self) -> Condition:
        """Return the condition in memory from which a GPU copies while the host goes on."""
        return self._each(lambda value: value.pin_memory())

    def require(self, name: str) -> Tensor:
        """Return a field. Raises ValueError if it is not set."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"condition: got {', '.join(self.tensors()) or 'none'}; accepted: {name}")
        return value

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that are set, by name."""
        return {name: value for name in NAMES if (value := getattr(self, name)) is not None}

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(**{name: change(value) for name, value in self.tensors().items()})

    def _with(self, other: Condition, change: Callable[[Tensor, Tensor], Tensor]) -> Condition:
        own, others = self.tensors(), other.tensors()
        if own.keys() != others.keys():
            raise ValueError(f"condition: got {', '.join(others) or 'none'} beside {', '.join(own) or 'none'}")
        return Condition(**{name: change(value, others[name]) for name, value in own.items()})


EXAMPLE_TOKENS = 300  # of a text, as the released PixArt-Sigmas take
EMPTY_TEXT = -1  # the label of the empty text, where texts go by labels
NAMES = tuple(field.name for field in fields(Condition))


class Texts(Protocol):
    """Texts by their labels: what a text encoder made of them."""

    def __call__(self, condition: Condition) -> Condition:
        """Return the texts and masks for labels (B,); EMPTY_TEXT is the empty text's."""
        ...

    @property
    def conditioner(self) -> TextConditioner:
        """What knows the empty text."""
        ...


class Conditioner(Protocol):
    """What conditions a model takes: each family's config has one as `conditioner`."""

    def null(self, like: Condition) -> Condition:
        """Return the condition of unconditional samples, of the batch size and shapes and on the device of `like`."""
        ...

    def drop(self, condition: Condition, which: Tensor) -> Condition:
        """Return the condition, made null in the samples where `which` (B,) is true."""
        return condition.replace(which, self.null(condition))

    def example(self, count: int, device: torch.device) -> Condition:
        """Return some condition of `count` samples, to run the model on where only its shape matters."""
        ...


@dataclass(frozen=True)
class ClassConditioner(Conditioner):
    """Labels 0 .. num_classes - 1; label `num_classes` is the null class."""

    num_classes: int

    def null(self, like: Condition) -> Condition:
        return Condition(labels=torch.full_like(like.require("labels"), self.num_classes))

    def example(self, count: int, device: torch.device) -> Condition:
        return Condition(labels=torch.zeros(count, dtype=torch.long, device=device))


@dataclass(frozen=True)
class TextConditioner(Conditioner):
    """Texts as states of an encoder (B,L,E) with their mask (B,L), or as labels of texts that the model knows.

    The null condition is the empty text.
    """

    channels: int  # E
    empty: Condition | None = None  # of one sample: what the encoder makes of the empty text

    def null(self, like: Condition) -> Condition:
        """Return the empty text for each sample of `like`: its label, where texts go by labels.

        Raise ValueError for states if nobody said what that is.
        """
        if like.text is None and like.labels is not None:
            return Condition(labels=torch.full_like(like.labels, EMPTY_TEXT))
        if self.empty is None:
            raise ValueError("condition: got no states of the empty text; accepted: those of the model's text encoder")
        count, text = len(like), like.require("text")
        null = self.empty.to(text.device, text.dtype)
        return null[torch.zeros(count, dtype=torch.long, device=text.device)]

    def example(self, count: int, device: torch.device) -> Condition:
        length = EXAMPLE_TOKENS if self.empty is None else self.empty.require("text").shape[1]
        return Condition(
            text=torch.zeros(count, length, self.channels, device=device),
            mask=torch.ones(count, length, device=device),
        )
