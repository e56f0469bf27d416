"""What a family says of its files: by what they are known among others', and in which layouts they are written.

`models/checkpoints` names no family, but asks all that are registered. A file is of the families whose tensors it has.
If it says something of itself, by a training script's arguments or by its name, it is of those that accept all that
it says, and claim some of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graftwork.specs.export import Layout
from graftwork.specs.sampler import Prediction


@dataclass(frozen=True)
class FamilyFiles:
    """A family's declaration; its config reads a shape from tensors (`of_tensors`) and names a published model."""

    name: str  # of published models, as the DiT of `DiT-XL/2`
    prediction: Prediction
    accepted: str  # a few words for what is read
    # The tensors that the shape is read from, with the number of dimensions of each. The first marks a model in a file.
    telling: Mapping[str, int]
    # The published name of the family whose tensors it shares. A file that says nothing is then the other family's.
    network: str | None = None
    arguments: Mapping[str, str] = field(default_factory=dict)  # of its training script, that no other family has
    # Tensors that only models of other families have, beside a few of its own: a pattern, and what those models are.
    others: Mapping[str, str] = field(default_factory=dict)
    label_table: str | None = None  # the tensor with a row a class, and a last one of the null class
    output: str | None = None  # the layer with rows for the variance behind those for the noise
    called: str | None = None  # a pattern of what its models are called, in lower case, if not by the name alone
    use: str = "model(x, t, labels)"  # a call of the model, for its card
    task: str = "class-conditional-image-generation"  # the hub's tag for what it does
    unused: tuple[str, ...] = ()  # tensors of training files that the model does without
    layouts: tuple[Layout, ...] = ("graftwork",)  # in which it is exported
