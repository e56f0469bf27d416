"""Where images come from, and the codec that turns them into latents."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, TypeAdapter, field_validator

from graftwork.specs.fields import Line, LocalPath, Spec, Unkeyed, is_integer, refuse
from graftwork.specs.sampler import Sampler
from graftwork.specs.training import PRECISION, Precision

PER_CLASS = "training images kept of each class, the first by a hash of their names; left out: all of them"
_LOCAL_PATH = TypeAdapter(LocalPath)

COLOURS = {"white": "#ffffff", "black": "#000000"}


def _colour(name: str) -> str:
    """Return a colour as #rrggbb."""
    if re.fullmatch("#[0-9a-fA-F]{6}", name) is None and name not in COLOURS:
        refuse([], name, f"{', '.join(COLOURS)} or #rrggbb")
    return COLOURS.get(name, name.lower())


class DigitsData(Spec):
    """scikit-learn's 1,797 handwritten digits: 8x8, one channel, 10 classes, enlarged bilinearly."""

    channels: ClassVar[int] = 1
    classes: ClassVar[int] = 10
    flip: ClassVar[bool] = False  # a digit's mirror image is none
    background: ClassVar[str] = COLOURS["white"]
    skip_broken: ClassVar[bool] = False
    kind: Literal["digits"] = "digits"
    image_size: int = Field(16, ge=8, le=64, multiple_of=8, description="pixels a side")
    heldout: float = Field(0.5, gt=0, lt=1, description="share of each class kept from training")
    per_class: int | None = Field(None, ge=1, description=PER_CLASS)


class ImageFiles(Spec):
    """Images in files, whatever goes with them."""

    channels: ClassVar[int] = 3
    kind: str
    path: Annotated[LocalPath, Unkeyed()]  # its files are in the key
    image_size: int = Field(
        256, ge=8, le=8192, description="pixels a side, after scaling the short side and a centre crop"
    )
    heldout: float = Field(0.1, gt=0, lt=1, description="share kept from training, of each class if there are classes")
    flip: bool = Field(
        False, description="also encode each training image's mirror image; training draws which of the two it sees"
    )
    background: Annotated[Line, AfterValidator(_colour)] = Field(
        COLOURS["white"], description="what shows through transparent pixels: white, black or #rrggbb"
    )
    skip_broken: bool = Field(
        False, description="leave out, and count, the images that cannot be read; they are an error otherwise"
    )
    trust: Annotated[Literal["content", "times"], Unkeyed()] = Field(
        "content",
        description="by what images are known to be the same: what they hold, for which each is read once; or their "
        "names, sizes and times, which another picture may have too",
    )


class ImageFolderData(ImageFiles):
    """A folder with one folder of images a class; classes are numbered by their names' numbers if all names are digits,
    in the order of their names otherwise."""

    kind: Literal["image_folder"] = "image_folder"
    classes: Annotated[int | str | None, Unkeyed()] = Field(
        None,
        description="how many classes there must be, with which a plan needs no images; or a file that names the class "
        "folders, a line each, in the order of their labels",
    )
    per_class: int | None = Field(None, ge=1, description=PER_CLASS)

    @field_validator("classes", mode="wrap")
    @classmethod
    def _number_or_file(cls, value: Any, _: object) -> int | str | None:
        if isinstance(value, str):
            return _LOCAL_PATH.validate_python(value)
        if value is not None and not (is_integer(value) and value >= 1):
            refuse([], value, "a number from 1 on, or the path of a file that names the class folders")
        return value


class CaptionsData(ImageFiles):
    """Images with captions, for models that are told texts: a folder of them with `metadata.jsonl` or `metadata.csv` in
    it (`file_name`, `text`), or with a .txt beside each image; or webdataset's tars, as a .tar, a folder of them or a
    glob."""

    classes: ClassVar[None] = None
    per_class: ClassVar[None] = None
    kind: Literal["captions"] = "captions"


class SyntheticData(Spec):
    """Samples that the rootstock draws of prompts, for models that are told texts: nothing else is trained on, and no
    image is read. Sample i is of prompt i, in turns, and has noise of its own."""

    channels: ClassVar[int] = 3
    classes: ClassVar[None] = None
    per_class: ClassVar[None] = None
    flip: ClassVar[bool] = False
    background: ClassVar[str] = COLOURS["white"]
    skip_broken: ClassVar[bool] = False
    kind: Literal["synthetic"] = "synthetic"
    prompts: Annotated[LocalPath, Unkeyed()] = Field(  # its content is in the key
        description="a file of prompts, a line each, or as GenEval's with a JSON object a line if its name ends in "
        ".jsonl"
    )
    samples: int = Field(12_000, ge=2, description="to train on and held out")
    image_size: int = Field(256, ge=8, le=8192, description="pixels a side")
    heldout: float = Field(0.1, gt=0, lt=1, description="share of the samples kept from training")
    sampler: Sampler | None = Field(None, description="by default that of the model's family")
    batch: int = Field(16, ge=1, description="samples drawn at once; sums differ in their last bits with it")
    precision: Precision = Field("fp32", description=PRECISION)
    seed: int = Field(0, ge=0, lt=2**31, description="of the noise; evaluate draws other noise")

    def listing(self) -> SyntheticData:
        """Return these data with the defaults for all that says how samples are drawn, not which there are."""
        drawing = ("sampler", "batch", "precision", "seed")
        return self.model_copy(update={name: type(self).model_fields[name].default for name in drawing})


DataFiles = ImageFolderData | CaptionsData
TEXT_DATA = (CaptionsData, SyntheticData)  # whose labels are those of texts
Data = Annotated[DigitsData | ImageFolderData | CaptionsData | SyntheticData, Field(discriminator="kind")]
