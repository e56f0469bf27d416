"""Operators: modules that map (B,N,D) to (B,N,D), built from their specs.

A module registers itself for its spec's class; every builder is called with the spec and the place it goes to. The
definition here is plain PyTorch and is the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from specs.operators import OperatorSpec

_BUILDERS: dict[type[OperatorSpec], Callable[..., nn.Module]] = {}


def register(spec: type[OperatorSpec]) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Decorate a builder `(spec, width, heads, num_tokens) -> module`."""

    def keep(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        _BUILDERS[spec] = builder
        return builder

    return keep


def build_operator(spec: Any, width: int, heads: int, num_tokens: int) -> nn.Module:
    """A freshly initialised operator for blocks of `width` channels, `heads` heads and `num_tokens` tokens."""
    return _BUILDERS[type(spec)](spec, width, heads, num_tokens)


# Importing a module registers its operators.
from models.operators import attention, hyena, mlp  # noqa: E402, F401
