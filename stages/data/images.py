"""Images: how one is read, and what is said of those that cannot be.

There is one reader, for the images that a job is trained on and for those that its samples are held against. This file
is read before a job starts, so it is light: Pillow and NumPy load with the first image.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.specs.data import Data, DigitsData, ImageFiles
from graftwork.specs.problems import first_few, plain, text
from graftwork.stages.data.pixels import scaled_levels
from graftwork.stages.data.shards import home_of
from graftwork.stages.data.tars import Span

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image
    from PIL.ImageFile import ImageFile

# What is read, by Pillow's name of the format. None runs a program, as PostScript would; none is a container of data
# that are no picture; and what needs a plugin (HEIC) is not there on every machine.
SUFFIXES = {
    "PNG": {".png", ".apng"},
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"},
    "WEBP": {".webp"},
    "AVIF": {".avif", ".avifs"},
    "GIF": {".gif"},
    "BMP": {".bmp"},
    "DIB": {".dib"},
    "TIFF": {".tif", ".tiff"},
    "PPM": {".ppm", ".pgm", ".pbm", ".pnm", ".pfm"},
    "JPEG2000": {".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"},
    "TGA": {".tga", ".icb", ".vda", ".vst"},
    "QOI": {".qoi"},
    "PCX": {".pcx"},
    "SGI": {".sgi", ".rgb", ".rgba", ".bw"},
    "DDS": {".dds"},
    "ICO": {".ico"},
    "PSD": {".psd"},
}
FORMATS = tuple(SUFFIXES)  # that a file of any of these names may be in: a PNG is often called .jpg
IMAGE_SUFFIXES = frozenset().union(*SUFFIXES.values())
# The beginnings of files that are met under the names of images, and why they are not read.
NOT_READ = (
    (re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL), "HEIC, for which Pillow needs a plugin"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "PostScript, which is a program"),
    (re.compile(rb"\s*<(\?xml|svg|!DOCTYPE svg)"), "a drawing (SVG)"),
)
NO_IMAGE = "its content is of no format that is read"
MAX_PIXELS = 2**26  # of an image after it is scaled, before the crop: a line of pixels would become a wall
SHOWN = 10  # broken images that an error names
ORIENTATION = 0x0112  # Exif's tag; what makes an image upright, by its value; and the values of one on its side
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"}
TURNS |= {7: "TRANSVERSE", 8: "ROTATE_90"}
SIDEWAYS = range(5, 9)
PHOTOMETRIC, BITS, SAMPLE_FORMAT = 262, 258, 339  # TIFF's tags
SIGNED, WHITE_IS_ZERO = 2, 0  # a SAMPLE_FORMAT, a PHOTOMETRIC
GREY_STEPS = {"2": 85, "4": 17}  # of grey of so many bits, as 8 bits


class BrokenImage(ValueError):
    """A file that cannot be read as an image; the message is one line that names it."""


def is_image(path: Path) -> bool:
    """Return whether a file's name is that of an image, and not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def read_image(data: Data, name: str, span: Span | None = None) -> NDArray[Any]:
    """Return an image (C,S,S) as float32 in [-1, 1]; raise BrokenImage."""
    return scaled(read_pixels(data, name, span))


def scaled(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return what `read_pixels` gives as float32 in [-1, 1]."""
    return scaled_levels(pixels.astype("float32")) if pixels.dtype == "uint8" else pixels


def read_pixels(data: Data, name: str, span: Span | None = None) -> NDArray[Any]:
    """Return an image (C,S,S), cheap to send: uint8, 0 .. 255, or (digits) float32 in [-1, 1]; raise BrokenImage.

    span: where it lies in a tar, if it does.
    """
    import numpy as np
    from PIL import Image

    side = data.image_size
    if isinstance(data, DigitsData):
        digit = Image.fromarray(digits()[0][int(name)].astype(np.float32) / 8 - 1)
        return np.asarray(digit.resize((side, side), Image.Resampling.BILINEAR))[None]

    assert isinstance(data, ImageFiles)
    path = Path(data.path if span is None else home_of(data.path)) / name
    picture = read_rgb(path, data.background, span)
    width, height = (max(side, round(length * side / min(picture.size))) for length in picture.size)
    if width * height > MAX_PIXELS:
        raise _broken(path, f"{picture.width} x {picture.height} pixels, too long for an image")
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(picture.crop((left, top, left + side, top + side))).transpose(2, 0, 1)


def read_rgb(path: Path, background: str, span: Span | None = None) -> Image.Image:
    """Return an image's first frame in RGB: upright, over the colour `background`; raise BrokenImage.

    span: where it lies in a tar; the path only names it then.
    """
    try:
        with _opened(path, span) as picture:
            return _flattened(picture, background)
    except Exception as error:  # torn files make the library raise whatever their bytes happen to stand for
        raise _broken(path, error) from None


def size_of(path: Path) -> tuple[int, int]:
    """Return the width and height of `read_rgb` by the file's header alone; raise BrokenImage."""
    try:
        with _opened(path) as picture:
            width, height = picture.size
            turned = _orientation(picture) in SIDEWAYS
    except Exception as error:
        raise _broken(path, error) from None
    return (height, width) if turned else (width, height)


@contextmanager
def _opened(path: Path, span: Span | None = None) -> Iterator[ImageFile]:
    """Open an image, of which only the header is read; raise ValueError where it is too large or of no format."""
    from PIL import Image, UnidentifiedImageError

    if span is None and not path.is_file():  # a pipe would never end
        raise ValueError("no file")
    _silence_pillow()
    # Given the path, Pillow would map uncompressed pixels, and a TIFF's that lie on their side in the wrong shape.
    with path.open("rb") if span is None else io.BytesIO(span.read()) as file:
        try:
            picture = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            file.seek(0)
            begin = file.read(64)
            kind = next((kind for pattern, kind in NOT_READ if pattern.match(begin)), None)
            raise ValueError(f"it is {kind}; accepted: the same image as PNG or JPEG" if kind else NO_IMAGE) from None
        if picture.width * picture.height > (limit := Image.MAX_IMAGE_PIXELS or MAX_PIXELS):
            raise ValueError(f"{picture.width} x {picture.height} pixels; accepted: at most {limit} in all")
        yield picture


@cache
def _silence_pillow() -> None:
    """Leave Pillow's warnings out: each is of one image among many, and threads cannot each have a filter."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _flattened(picture: ImageFile, background: str) -> Image.Image:
    """Return an opened image in RGB, upright, over the colour `background`."""
    from PIL import Image

    levels, transparency = _levels(picture), _transparency(picture)
    picture.load()
    turn = TURNS.get(_orientation(picture))
    upright = picture.transpose(Image.Transpose[turn]) if turn else picture
    if levels is not None:
        upright = _grey(upright, levels, transparency)
    elif transparency is not None:
        upright.info["transparency"] = transparency
    if upright.mode == "La":  # Pillow turns it into nothing else
        upright = upright.convert("LA")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")


def _orientation(picture: ImageFile) -> int:
    """Return how an opened image lies, by Exif's numbers; 1 is upright."""
    from PIL import Image

    if picture.format == "TIFF":  # whose size and pixels Pillow gives as those of the upright image
        return 1
    try:
        return Image.Image.getexif(picture).get(ORIENTATION, 1)  # that of PNG would read all of the file
    except (SyntaxError, ValueError, struct.error):  # notes of a camera that are damaged; the picture need not be
        return 1


def _levels(picture: ImageFile) -> tuple[float, float] | None:
    """Return the numbers that are black and white in an opened image of deep grey; None for others.

    Floats are taken to be 0 .. 1, as TIFF's and PFM's are by convention. Raise ValueError for signed integers, of which
    no convention says what is white.
    """
    tags = getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}
    if SIGNED in _tuple(tags.get(SAMPLE_FORMAT, 1)):
        raise ValueError("its samples are signed integers; accepted: unsigned ones, or floats of 0 .. 1")
    if picture.mode == "F":
        white = 1.0
    elif picture.mode.startswith("I"):
        white = 2.0 ** _tuple(tags.get(BITS, 16))[0] - 1
    else:
        return None
    return (white, 0.0) if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else (0.0, white)


def _tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _transparency(picture: ImageFile) -> Any:
    """Return what an opened image says is transparent, in the numbers that Pillow reads its pixels as.

    In a PNG that is a colour of the file's own depth, which Pillow leaves as it is.
    """
    value, tiles = picture.info.get("transparency"), picture.tile
    if value is None or picture.format != "PNG" or not tiles:
        return value
    depth = str(tiles[0].args).rpartition(";")[2]
    if picture.mode == "L" and depth in GREY_STEPS:
        return value * GREY_STEPS[depth]
    return tuple(part >> 8 for part in value) if picture.mode == "RGB" and depth == "16B" else value


def _grey(picture: Image.Image, levels: tuple[float, float], transparency: int | None) -> Image.Image:
    """Return deep grey as 8 bits, with an alpha channel where a number is transparent."""
    import numpy as np
    from PIL import Image

    black, white = levels
    numbers = np.asarray(picture)
    if picture.mode == "I":  # Pillow calls integers of 32 bits signed
        numbers = numbers.view(np.uint32)
    least, most = float(numbers.min()), float(numbers.max())
    if not (min(levels) <= least and most <= max(levels)):  # NaN, too
        raise ValueError(f"its pixels are {least:g} .. {most:g}; accepted: {min(levels):g} .. {max(levels):g}")
    grey = np.rint((numbers.astype(np.float32) - black) * (255 / (white - black))).astype(np.uint8)
    shade = Image.fromarray(grey)
    if transparency is not None:
        shade.putalpha(Image.fromarray(np.where(numbers == transparency, 0, 255).astype(np.uint8)))
    return shade


def _broken(path: Path, reason: Exception | str) -> BrokenImage:
    """Return the error that names the file, with the first line of what is wrong."""
    said = plain(str(reason)) or type(reason).__name__
    return BrokenImage(f"{plain(text(str(path)))}: cannot be read as an image: {said}")


def broken_images(data: Data, places: Iterable[tuple[str, Span | None]]) -> dict[str, str]:
    """Return the problem of each of these images that cannot be read, by name.

    places: names, with where they lie in a tar.
    """
    problems = {}
    for name, span in places:
        try:
            read_image(data, name, span)
        except BrokenImage as error:
            problems[name] = str(error)
    return problems


def broken_line(problems: Collection[str], total: int) -> str:
    """One line about broken images: how many there are, and the first of them."""
    return f"{len(problems)} of {total} images are broken: {first_few(sorted(problems), SHOWN, '; ', '; and ')}"


@cache
def digits() -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the digits' pixels (n,8,8), 0 .. 16, and their labels (n,)."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return loaded.images, loaded.target
