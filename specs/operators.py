"""Operators that a graft can put into a block, and where each may go (REFERENCE: published names and defaults).

To add one: a class here, listed in `Operator`, and a module registered in `models/operators/`. Nothing else.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from specs.fields import Spec

Target = Literal["mha", "mlp"]


class OperatorSpec(Spec):
    """What all operators share: the targets that they can replace."""

    targets: ClassVar[frozenset[Target]]


class Mha(OperatorSpec):
    """Softmax attention over all tokens: the self-graft control."""

    targets = frozenset({"mha"})
    kind: Literal["mha"] = "mha"


class Swa(OperatorSpec):
    """Softmax attention within a band of `window` tokens on each side, bidirectional."""

    targets = frozenset({"mha"})
    kind: Literal["swa"] = "swa"
    window: int = Field(4, ge=1, description="tokens seen on each side")


class HyenaSE(OperatorSpec):
    """Hyena-SE: a causal depthwise conv on q, k, v, a gate, an inner causal conv, a gate."""

    targets = frozenset({"mha"})
    kind: Literal["hyena_se"] = "hyena_se"
    kernel: int = Field(4, ge=1, description="taps of both convolutions")


class HyenaX(OperatorSpec):
    """Hyena-SE without the inner convolution."""

    targets = frozenset({"mha"})
    kind: Literal["hyena_x"] = "hyena_x"
    kernel: int = Field(4, ge=1, description="taps of the convolution on q, k, v")


class HyenaY(OperatorSpec):
    """Hyena-SE without the convolution on q, k, v."""

    targets = frozenset({"mha"})
    kind: Literal["hyena_y"] = "hyena_y"
    kernel: int = Field(4, ge=1, description="taps of the inner convolution")


class Mlp(OperatorSpec):
    """Two linear layers with a tanh-GELU between; `ratio` 4 is the self-graft control."""

    targets = frozenset({"mlp"})
    kind: Literal["mlp"] = "mlp"
    ratio: float = Field(3.0, gt=0, le=64, description="hidden width over the model's width")


Operator = Annotated[Mha | Swa | HyenaSE | HyenaX | HyenaY | Mlp, Field(discriminator="kind")]
