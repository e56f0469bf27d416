"""The rootstock: its shape and where its weights come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from graftwork.specs.costs import DIT, Formulas, PixartFormulas
from graftwork.specs.fields import KeyedIfSet, Spec, Unkeyed, WeightsPath, is_integer, refuse
from graftwork.specs.layers.strategy import MAX_DEPTH
from graftwork.specs.sampler import AncestralSampler, AnySampler, OdeSampler, Prediction, SchedulerSampler
from graftwork.specs.training import TrainingSpec

# Published sizes (arXiv 2212.09748, table 1): depth, width, heads.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
SIZE = "a published size; excludes the four fields below"
Size = Literal["S/2", "S/4", "S/8", "B/2", "B/4", "B/8", "L/2", "L/4", "L/8", "XL/2", "XL/4", "XL/8"]


class _Transformer(Spec):
    """The shape of a DiT: a published `size`, or depth, width, heads and patch of your own."""

    prediction: ClassVar[Prediction]
    default_sampler: ClassVar[AnySampler]  # of a job that names none
    formulas: ClassVar[Formulas] = DIT
    told: ClassVar[Literal["classes", "texts"]] = "classes"
    sizes: ClassVar[dict[str, tuple[int, int, int]]] = SIZES
    kind: str
    size: str | None = Field(None, description=SIZE)
    depth: int = Field(0, ge=0, le=MAX_DEPTH, description="blocks")
    width: int = Field(0, ge=0, le=65_536, description="channels of a token; a multiple of 4 and of heads")
    heads: int = Field(0, ge=0, le=65_536)
    patch: int = Field(0, ge=0, le=8192, description="latent pixels along a token's side")
    learn_sigma: bool = Field(True, description="predict the variance beside the noise")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        shape = ("depth", "width", "heads", "patch")
        explicit_fields = [name for name in shape if name in self.model_fields_set]
        if self.size is not None:
            letter, patch = self.size.split("/")
            for name, number in zip(shape, (*self.sizes[letter], int(patch)), strict=True):
                if name in explicit_fields and getattr(self, name) != number:
                    refuse([name], getattr(self, name), f"{number}, as size {self.size} says, or no size")
                object.__setattr__(self, name, number)
        for name in shape:
            if getattr(self, name) < 1:
                refuse(
                    [name],
                    getattr(self, name) if name in explicit_fields else None,
                    "an integer of at least 1, or a published size",
                )
        if self.width % self.heads:
            refuse(["heads"], self.heads, f"a number that divides the width, {self.width}")
        if self.width % 4:
            refuse(["width"], self.width, "a multiple of 4, for the 2-D position embedding")
        return self


class DitModel(_Transformer):
    """A diffusion transformer, which predicts noise: a published `size`, or depth, width, heads and patch."""

    prediction: ClassVar[Prediction] = "epsilon"
    default_sampler: ClassVar[AnySampler] = AncestralSampler()
    kind: Literal["dit"] = "dit"
    size: Size | None = Field(None, description=SIZE)


class SitModel(_Transformer):
    """The same network as a DiT, that predicts the velocity of a flow instead of the noise (SiT, arXiv 2401.08740).

    The second half of its output, which published files have (`learn_sigma`), is not used.
    """

    prediction: ClassVar[Prediction] = "velocity"
    default_sampler: ClassVar[AnySampler] = OdeSampler()
    kind: Literal["sit"] = "sit"
    size: Size | None = Field(None, description=SIZE)


# Published sizes of PixArt-Sigma (arXiv 2403.04692): depth, width, heads.
PIXART_SIZES = {"XL": (28, 1152, 16)}


class TextModel(_Transformer):
    """What models that are told texts have beside that."""

    told: ClassVar[Literal["classes", "texts"]] = "texts"
    caption_channels: int = Field(4096, ge=1, le=65_536, description="channels of the text encoder's states")
    text_tokens: int = Field(300, ge=1, le=8192, description="tokens of a text, at most")


class PixartModel(TextModel):
    """A transformer that is told texts, and predicts noise: PixArt-Sigma (arXiv 2403.04692)."""

    prediction: ClassVar[Prediction] = "epsilon"
    default_sampler: ClassVar[AnySampler] = SchedulerSampler(
        name="dpmsolver++", steps=20, guidance=4.5, guided_channels="all"
    )
    formulas: ClassVar[Formulas] = PixartFormulas()
    sizes: ClassVar[dict[str, tuple[int, int, int]]] = PIXART_SIZES
    kind: Literal["pixart"] = "pixart"
    size: Literal["XL/2"] | None = Field(None, description=SIZE)


def _kind(value: Any) -> str:
    """`kind` may be left out of the common case."""
    kind = value.get("kind", "dit") if isinstance(value, dict) else getattr(value, "kind", "dit")
    return str(kind)


Model = Annotated[
    Annotated[DitModel, Tag("dit")] | Annotated[SitModel, Tag("sit")] | Annotated[PixartModel, Tag("pixart")],
    Discriminator(_kind),
]


class PretrainWeights(TrainingSpec):
    """Train the rootstock in the job itself: the ordinary diffusion loss, EMA weights kept."""

    kind: Literal["pretrain"] = "pretrain"
    steps: int = Field(1500, ge=1)
    batch: int = Field(64, ge=1, description="samples a step, over all workers")
    lr: float = Field(1e-3, gt=0)
    label_std: float = Field(
        0.02, gt=0, description="of the label embedding at the start; narrow models need more than the published 0.02"
    )


class CheckpointWeights(Spec):
    """Read the rootstock, or a graft of one: DiT's or a graft's published `.pt`, a diffusers DiT folder, ours, or a hub
    id. What it carries already is found from its tensors."""

    kind: Literal["checkpoint"] = "checkpoint"
    path: Annotated[WeightsPath, Unkeyed()]  # its content is in the key
    classes: Annotated[Literal["fresh"] | dict[str, int] | None, KeyedIfSet()] = Field(
        None,
        description="for other classes than the checkpoint's: rows of its label table by the names of the job's "
        "classes, as {cat: 281}; the classes that are not named, or all with `fresh`, begin with random rows",
    )

    @field_validator("classes", mode="before")
    @classmethod
    def _rows(cls, rows: Any) -> Any:
        if rows is None or rows == "fresh":
            return rows
        if not isinstance(rows, dict) or not rows:
            refuse([], rows, "fresh, or a row of the checkpoint's label table for a class, as {cat: 281}")
        for name, row in rows.items():
            if not is_integer(row) or row < 0:
                refuse([str(name)], row, "the number of a row in the checkpoint's label table, 0 or more")
        return {str(name): row for name, row in rows.items()}

    def rows(self, names: Sequence[str]) -> tuple[int | None, ...] | None:
        """Return the row of the checkpoint's label table for each class, None for a fresh one; or None to keep it."""
        if self.classes is None:
            return None
        return tuple(None if self.classes == "fresh" else self.classes.get(name) for name in names)


Weights = Annotated[PretrainWeights | CheckpointWeights, Field(discriminator="kind")]
