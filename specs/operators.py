"""Operators that a graft can put into a block: where each may go, what it sees, what it costs (defaults and tensor
names are the published ones, arXiv 2506.05340).

To add one: a class here, listed in `Operator`, and a module registered in `models/operators/`. Nothing else; the
conformance tests hold what the class says (reach, parameters, FLOPs) to what the module does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from graftwork.specs.fields import Spec, Unkeyed

Target = Literal["mha", "mlp"]
Backend = Literal["auto", "torch", "kernel"]


@dataclass(frozen=True)
class Place:
    """The shape of the blocks that an operator stands in."""

    width: int  # D, channels of a token
    heads: int  # H, of the rootstock's attention
    num_tokens: int  # N


@dataclass(frozen=True)
class Reach:
    """The tokens that an output may depend on, relative to its own; None is all of them."""

    before: int | None
    after: int | None


EVERYWHERE, ITSELF = Reach(None, None), Reach(0, 0)
NOWHERE = Reach(0, -1)  # from its own to the one before that: no token


def linear_parameters(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


class OperatorSpec(Spec):
    """What all operators share. FLOPs are those of one forward pass of one sample: of matrix products and
    convolutions, a multiply-add counting as two."""

    targets: ClassVar[frozenset[Target]]
    kind: str  # each operator's own, a Literal

    def reach(self) -> Reach:
        raise NotImplementedError

    def num_parameters(self, place: Place) -> int:
        raise NotImplementedError

    def flops(self, place: Place) -> int:
        raise NotImplementedError

    def misfit(self, place: Place) -> tuple[str, object, str] | None:
        """Where the operator cannot stand there: the field at fault, its value, and what is accepted."""
        return None


class Accelerated(OperatorSpec):
    """An operator for which there is a fused GPU kernel beside its definition in plain PyTorch."""

    backend: Annotated[Backend, Unkeyed()] = Field(
        "auto",
        description="auto: the kernel where it is installed and takes the tensors; kernel: it, or fail; torch: never",
    )


class Mha(Accelerated):
    """Softmax attention over all tokens: the self-graft control."""

    targets = frozenset({"mha"})
    kind: Literal["mha"] = "mha"

    def reach(self) -> Reach:
        return EVERYWHERE

    def num_parameters(self, place: Place) -> int:
        return linear_parameters(place.width, 3 * place.width) + linear_parameters(place.width, place.width)

    def flops(self, place: Place) -> int:
        return 8 * place.num_tokens * place.width**2 + 4 * place.num_tokens**2 * place.width


class Swa(Accelerated):
    """Softmax attention within a band of `window` tokens on each side, bidirectional."""

    targets = frozenset({"mha"})
    kind: Literal["swa"] = "swa"
    window: int = Field(4, ge=1, description="tokens seen on each side")

    def reach(self) -> Reach:
        return Reach(self.window, self.window)

    def num_parameters(self, place: Place) -> int:
        return Mha().num_parameters(place)

    def flops(self, place: Place) -> int:
        return 8 * place.num_tokens * place.width**2 + 4 * place.num_tokens * (2 * self.window + 1) * place.width


class Hyena(Accelerated):
    """Gates around short causal depthwise convolutions."""

    targets = frozenset({"mha"})
    short: ClassVar[bool]  # a convolution on q, k, v
    inner: ClassVar[bool]  # a convolution between the gates
    kernel: int = Field(4, ge=1, description="taps of each convolution")

    def reach(self) -> Reach:
        return Reach((self.short + self.inner) * (self.kernel - 1), 0)

    def num_parameters(self, place: Place) -> int:
        channels = (3 * self.short + self.inner) * place.width
        return Mha().num_parameters(place) + channels * (self.kernel + 1)

    def flops(self, place: Place) -> int:
        channels = (3 * self.short + self.inner) * place.width
        return 8 * place.num_tokens * place.width**2 + 2 * place.num_tokens * channels * self.kernel


class HyenaSE(Hyena):
    """Hyena-SE: a causal depthwise conv on q, k, v, a gate, an inner causal conv, a gate."""

    short, inner = True, True
    kind: Literal["hyena_se"] = "hyena_se"


class HyenaX(Hyena):
    """Hyena-SE without the inner convolution."""

    short, inner = True, False
    kind: Literal["hyena_x"] = "hyena_x"


class HyenaY(Hyena):
    """Hyena-SE without the convolution on q, k, v."""

    short, inner = False, True
    kind: Literal["hyena_y"] = "hyena_y"


class Mamba2(Accelerated):
    """Mamba-2 (arXiv 2405.21060): a causal state space of `d_state` dimensions a channel, with one group."""

    targets = frozenset({"mha"})
    chunk: ClassVar[int] = 64  # tokens that the plain definition takes at a time
    kind: Literal["mamba2"] = "mamba2"
    d_state: int = Field(64, ge=1, description="dimensions of the state")
    d_conv: int = Field(4, ge=1, description="taps of the causal convolution")
    expand: int = Field(2, ge=1, description="inner width over the model's width")
    headdim: int = Field(16, ge=1, description="channels of a head; divides the inner width")

    def inner(self, place: Place) -> int:
        return self.expand * place.width

    def num_heads(self, place: Place) -> int:
        return self.inner(place) // self.headdim

    def reach(self) -> Reach:
        return Reach(None, 0)

    def num_parameters(self, place: Place) -> int:
        inner, heads = self.inner(place), self.num_heads(place)
        convolved = inner + 2 * self.d_state
        projected = linear_parameters(place.width, inner + convolved + heads, bias=False)
        return projected + convolved * (self.d_conv + 1) + 3 * heads + inner + inner * place.width

    def flops(self, place: Place) -> int:
        inner, num_tokens = self.inner(place), place.num_tokens
        convolved = inner + 2 * self.d_state
        linear = 2 * num_tokens * place.width * (2 * inner + convolved + self.num_heads(place))
        convolution = 2 * num_tokens * convolved * self.d_conv
        chunk = min(self.chunk, num_tokens)
        padded = -(-num_tokens // chunk) * chunk
        # C B^T once a group; its product with x, the states of the chunks and what they put out, once a head.
        scan = 2 * padded * chunk * (self.d_state + inner) + 4 * padded * self.d_state * inner
        return linear + convolution + scan

    def misfit(self, place: Place) -> tuple[str, object, str] | None:
        if self.inner(place) % self.headdim:
            return "headdim", self.headdim, f"a number that divides expand * width, {self.inner(place)}"
        return None


class Mlp(OperatorSpec):
    """Two linear layers with a tanh-GELU between; `ratio` 4 is the self-graft control."""

    targets = frozenset({"mlp"})
    kind: Literal["mlp"] = "mlp"
    ratio: float = Field(3.0, gt=0, le=64, description="hidden width over the model's width")

    def hidden(self, place: Place) -> int:
        return max(1, round(place.width * self.ratio))

    def reach(self) -> Reach:
        return ITSELF

    def num_parameters(self, place: Place) -> int:
        hidden = self.hidden(place)
        return linear_parameters(place.width, hidden) + linear_parameters(hidden, place.width)

    def flops(self, place: Place) -> int:
        return 4 * place.num_tokens * place.width * self.hidden(place)


class MlpHyenaX(Accelerated):
    """Hyena-X across channels: a causal convolution slides along each token's width, with taps of the token's own."""

    targets = frozenset({"mlp"})
    kind: Literal["mlp_hyena_x"] = "mlp_hyena_x"
    ratio: int = Field(2, ge=1, le=64, description="inner width over the model's width")
    kernel: int = Field(4, ge=1, description="taps of the convolution")

    def reach(self) -> Reach:
        return ITSELF

    def num_parameters(self, place: Place) -> int:
        hidden = self.ratio * place.width
        linear = linear_parameters(place.width, 3 * hidden) + linear_parameters(hidden, place.width)
        return linear + place.num_tokens * (self.kernel + 1)

    def flops(self, place: Place) -> int:
        hidden = self.ratio * place.width
        return 8 * place.num_tokens * place.width * hidden + 2 * place.num_tokens * 3 * hidden * self.kernel


class NoOperator(OperatorSpec):
    """Zeros: the block adds nothing there, as if its attention or MLP were dropped."""

    targets = frozenset({"mha", "mlp"})
    kind: Literal["none"] = "none"

    def reach(self) -> Reach:
        return NOWHERE

    def num_parameters(self, place: Place) -> int:
        return 0

    def flops(self, place: Place) -> int:
        return 0


Operator = Annotated[
    Mha | Swa | HyenaSE | HyenaX | HyenaY | Mamba2 | Mlp | MlpHyenaX | NoOperator, Field(discriminator="kind")
]
