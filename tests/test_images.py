"""How an image is read: upright, over a background, black to white, whatever its format and the depth of its pixels."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from graftwork.specs.data import ImageFolderData
from graftwork.specs.reading.load import SpecError, job_from
from graftwork.stages.data.images import IMAGE_SUFFIXES, SUFFIXES, BrokenImage, read_pixels, read_rgb, size_of

WHITE, GREEN = "#ffffff", "#00ff00"
WIDTH, HEIGHT = 48, 32
RAMP = np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 42  # 0 .. 64,470
UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE"}
UPRIGHT[8] = "ROTATE_270"  # what has to be done to an upright picture to have it stored under that orientation


def scene() -> Image.Image:
    """Four quarters of different colours."""
    quarters = np.array([[[200, 30, 30], [30, 200, 30]], [[30, 30, 200], [220, 220, 40]]], np.uint8)
    return Image.fromarray(quarters.repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1))


def pixels(path: Path, background: str = WHITE) -> NDArray[np.int64]:
    return np.asarray(read_rgb(path, background)).astype(int)


def png(path: Path, bits: int, kind: int, rows: bytes, *, transparent: bytes = b"", width: int = 2) -> Path:
    """A PNG of one row, as its specification has it: kind 0 is grey, 2 is RGB."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0))
    extra = chunk(b"tRNS", transparent) if transparent else b""
    body = chunk(b"IDAT", zlib.compress(b"\0" + rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + extra + body)
    return path


def tiff(path: Path, rows: bytes, *, bits: int, width: int = 2, photometric: int = 1, sample_format: int = 1) -> Path:
    """A TIFF of one row of grey, as its specification has it."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, 1)]
    tags += [(279, len(rows)), (339, sample_format)]
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, offset if tag == 273 else value) for tag, value in tags]
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4) + rows
    )
    return path


# -- formats


WRITABLE = ["png", "jpg", "jfif", "mpo", "webp", "avif", "gif", "bmp", "dib", "tif", "tiff", "ppm", "jp2", "j2k", "tga"]
WRITABLE += ["qoi", "pcx", "sgi", "dds"]


@pytest.mark.parametrize("suffix", WRITABLE)
def test_an_image_of_any_format_that_pillow_reads_safely_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    scene().save(path)
    assert f".{suffix}" in IMAGE_SUFFIXES
    found = pixels(path)
    assert size_of(path) == (WIDTH, HEIGHT) and found.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(found - np.asarray(scene())).mean() < 8


def test_every_suffix_that_pillow_knows_is_read_or_left_out_on_purpose() -> None:
    programs, stubs = {"EPS", "WMF"}, {"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "IPTC"}
    data, old = {"FITS", "FTEX", "BLP", "GBR", "SPIDER"}, {"CUR", "DCX", "FLI", "ICNS", "IM", "MSP", "PCD", "PIXAR"}
    old |= {"SUN", "XBM", "XPM"}
    Image.init()
    for suffix, kind in Image.EXTENSION.items():
        left_out = kind in programs | stubs | data | old
        assert (suffix in IMAGE_SUFFIXES) != left_out, suffix
    assert not SUFFIXES.keys() & programs and SUFFIXES.keys() <= Image.OPEN.keys()


def test_a_png_under_another_name_is_read(tmp_path: Path) -> None:
    scene().save(tmp_path / "image.jpg", "PNG")
    assert np.array_equal(pixels(tmp_path / "image.jpg"), np.asarray(scene()))


@pytest.mark.parametrize(
    ("begin", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    ],
    ids=["heic", "eps", "svg"],
)
def test_what_only_a_plugin_or_a_program_reads_is_named(tmp_path: Path, begin: bytes, kind: str) -> None:
    (tmp_path / "image.jpg").write_bytes(begin + bytes(200))
    with pytest.raises(BrokenImage, match=rf"^{tmp_path}/image.jpg: cannot be read as an image: it is .*{kind}.*; acc"):
        read_rgb(tmp_path / "image.jpg", WHITE)


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_of_several_frames_the_first_is_read(tmp_path: Path, suffix: str) -> None:
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    black = Image.new("RGB", (WIDTH, HEIGHT))
    scene().save(tmp_path / f"moving.{suffix}", save_all=True, append_images=[black, black], **options)
    assert np.abs(pixels(tmp_path / f"moving.{suffix}") - np.asarray(scene())).max() <= 3


# -- orientation


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_that_lies_on_its_side_is_turned(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored, path = scene(), tmp_path / f"turned.{suffix}"
    if orientation > 1:
        stored = stored.transpose(Image.Transpose[UPRIGHT[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 95} if suffix in ("jpg", "webp", "avif") else {}
    stored.save(path, exif=exif, **options)
    assert size_of(path) == (WIDTH, HEIGHT)
    difference = np.abs(pixels(path) - np.asarray(scene()))
    assert difference[1 : HEIGHT // 2 - 2].mean() < 8 and difference[HEIGHT // 2 + 2 :].mean() < 8


def test_deep_grey_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "tif"):
        Image.fromarray(RAMP).transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"deep.{suffix}", exif=exif)
        assert size_of(tmp_path / f"deep.{suffix}") == (WIDTH, HEIGHT)
        assert np.array_equal(pixels(tmp_path / f"deep.{suffix}")[..., 0], np.rint(RAMP / 257))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_an_uncompressed_tiff_of_any_mode_is_turned_too(tmp_path: Path, mode: str) -> None:
    picture, exif = scene().convert(mode), Image.Exif()
    picture.save(tmp_path / "upright.tif")
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.tif", exif=exif)
    assert np.array_equal(pixels(tmp_path / "turned.tif"), pixels(tmp_path / "upright.tif"))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("notes", [b"garbage", b"", b"II*\0", b"II*\0\x08\0\0\0\xff\xff"])
def test_a_picture_whose_cameras_notes_are_damaged_is_read_as_it_lies(
    tmp_path: Path, notes: bytes, suffix: str
) -> None:
    path = tmp_path / f"image.{suffix}"
    scene().save(path, exif=b"Exif\0\0" + notes)
    assert size_of(path) == read_rgb(path, WHITE).size == (WIDTH, HEIGHT)


# -- transparency


def translucent() -> Image.Image:
    """Black; its left half is transparent."""
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:, WIDTH // 2 :] = 255
    picture = Image.new("RGB", (WIDTH, HEIGHT))
    picture.putalpha(Image.fromarray(alpha))
    return picture


def palette(path: Path) -> None:
    translucent().quantize(4).save(path)


SEE_THROUGH: dict[str, Callable[[Path], object]] = {
    "rgba.png": lambda path: translucent().save(path),
    "rgba.webp": lambda path: translucent().save(path, lossless=True),
    "rgba.tif": lambda path: translucent().save(path),
    "rgba.tga": lambda path: translucent().save(path),
    "rgba.avif": lambda path: translucent().save(path, quality=100),
    "grey.png": lambda path: translucent().convert("LA").save(path),
    "grey.tif": lambda path: translucent().convert("LA").save(path),
    "palette.png": palette,
    "palette.gif": lambda path: translucent().save(path),
    "palette.tif": lambda path: translucent().quantize(4).convert("PA").save(path),
}


@pytest.mark.parametrize("name", SEE_THROUGH)
def test_the_background_shows_through_what_is_transparent(tmp_path: Path, name: str) -> None:
    SEE_THROUGH[name](tmp_path / name)
    for background, expected in ((WHITE, [255, 255, 255]), (GREEN, [0, 255, 0])):
        found = pixels(tmp_path / name, background)
        assert np.abs(found[:, : WIDTH // 2 - 2] - expected).max() <= 2
        assert found[:, WIDTH // 2 + 2 :].max() <= 2


def test_what_is_half_transparent_is_half_the_background(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert pixels(tmp_path / "half.png").tolist() == [[[127] * 3] * 2] * 2


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_png_of_grey_of_any_depth_may_have_a_transparent_number(tmp_path: Path, bits: int) -> None:
    most = 2**bits - 1
    row = struct.pack(">HH", most, 0) if bits == 16 else (bytes([most, 0]) if bits == 8 else bytes([most << 8 - bits]))
    path = png(tmp_path / "grey.png", bits, 0, row, transparent=struct.pack(">H", most))
    assert pixels(path, GREEN).tolist() == [[[0, 255, 0], [0, 0, 0]]]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_png_in_colour_may_have_a_transparent_colour(tmp_path: Path, bits: int) -> None:
    most, code = 2**bits - 1, ">6H" if bits == 16 else ">6B"
    row, through = struct.pack(code, most, 0, most, most, most, 0), struct.pack(">3H", most, 0, most)
    path = png(tmp_path / "colour.png", bits, 2, row, transparent=through)
    assert pixels(path, GREEN).tolist() == [[[0, 255, 0], [255, 255, 0]]]


def test_the_background_of_training_images_is_the_specs_and_is_white_by_default(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16)).save(tmp_path / "nothing.png")
    for given, expected in (({}, 255), ({"background": "black"}, 0), ({"background": "#808080"}, 128)):
        data = ImageFolderData(path=str(tmp_path), image_size=8, **given)
        assert read_pixels(data, "nothing.png").tolist() == [[[expected] * 8] * 8] * 3
    assert ImageFolderData(path="x", background="#FFFFFF") == ImageFolderData(path="x", background="white")


@pytest.mark.parametrize("background", ["#fff", "transparent", "255", ""])
def test_another_background_is_refused(background: str) -> None:
    data = {"kind": "image_folder", "path": "x", "background": background}
    with pytest.raises(SpecError, match=r"^data\.background: got '"):
        job_from({"name": "job", "data": data, "model": {"size": "S/2"}})


# -- depth


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_sixteen_bits_of_grey_go_from_black_to_white(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(RAMP).save(path)
    found = pixels(path)
    assert np.abs(found - (RAMP / 257)[..., None]).max() <= 1 and found.std() > 50


def test_the_byte_order_of_sixteen_bits_makes_no_difference(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(">u2")).save(tmp_path / "big.tif")
    assert np.array_equal(pixels(tmp_path / "big.tif")[..., 0], np.rint(RAMP / 257))


def test_sixteen_bits_of_colour_are_read(tmp_path: Path) -> None:
    path = png(tmp_path / "colour.png", 16, 2, struct.pack(">6H", 257 * 10, 257 * 128, 65535, 0, 257, 257 * 200))
    assert pixels(path).tolist() == [[[10, 128, 255], [0, 1, 200]]]


def test_white_is_the_most_that_the_bits_of_a_tiff_hold(tmp_path: Path) -> None:
    twelve = tiff(tmp_path / "12.tif", b"\xff\xf8\x00", bits=12)  # 4095 and 2048
    assert pixels(twelve)[..., 0].tolist() == [[255, 128]]
    long = tiff(tmp_path / "32.tif", struct.pack("<II", 2**32 - 1, 2**31), bits=32)
    assert pixels(long)[..., 0].tolist() == [[255, 128]]


@pytest.mark.parametrize(
    ("bits", "rows", "sample_format"),
    [(8, bytes([0, 255]), 1), (16, struct.pack("<HH", 0, 65535), 1), (32, struct.pack("<ff", 0, 1), 3)],
)
def test_where_a_tiff_says_that_zero_is_white_it_is(tmp_path: Path, bits: int, rows: bytes, sample_format: int) -> None:
    path = tiff(tmp_path / "negative.tif", rows, bits=bits, photometric=0, sample_format=sample_format)
    assert pixels(path)[..., 0].tolist() == [[255, 0]]


@pytest.mark.parametrize("suffix", ["tif", "pfm"])
def test_floats_of_zero_to_one_go_from_black_to_white(tmp_path: Path, suffix: str) -> None:
    Image.fromarray((RAMP / 65535).astype(np.float32)).save(tmp_path / f"float.{suffix}")
    assert np.array_equal(pixels(tmp_path / f"float.{suffix}")[..., 0], np.rint(RAMP / 257))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.array([[0, 255]], np.float32), r"its pixels are 0 \.\. 255; accepted: 0 \.\. 1"),
        (np.array([[-1, 1]], np.float32), r"its pixels are -1 \.\. 1; accepted: 0 \.\. 1"),
        (np.array([[np.nan, 1]], np.float32), r"its pixels are nan \.\. nan; accepted: 0 \.\. 1"),
        (np.array([[0, 255]], np.int32), "its samples are signed integers; accepted: unsigned ones"),
    ],
    ids=["bytes", "signed", "nan", "integers"],
)
def test_numbers_of_which_nothing_says_what_is_white_are_refused(
    tmp_path: Path, content: NDArray[Any], said: str
) -> None:
    Image.fromarray(content).save(tmp_path / "numbers.tif")
    with pytest.raises(BrokenImage, match=said):
        read_rgb(tmp_path / "numbers.tif", WHITE)


# -- colour


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_inks_are_colours(tmp_path: Path, suffix: str) -> None:
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    scene().convert("CMYK").save(tmp_path / f"inks.{suffix}", **options)
    assert np.abs(pixels(tmp_path / f"inks.{suffix}") - np.asarray(scene())).mean() < 3


def test_a_jpeg_of_inks_as_adobe_stores_them_is_no_negative(tmp_path: Path) -> None:
    """YCCK, inverted: the Adobe marker's transform is 2, and three of the four inks are as YCbCr."""
    buffer = BytesIO()
    planes = [np.asarray(part) for part in ImageOps.invert(scene()).convert("YCbCr").split()]
    Image.merge("CMYK", [Image.fromarray(255 - part) for part in [*planes, np.full_like(planes[0], 255)]]).save(
        buffer, "JPEG", quality=100, subsampling=0
    )
    content = buffer.getvalue()
    marker = content.index(b"Adobe")
    (tmp_path / "ycck.jpg").write_bytes(content[: marker + 11] + b"\2" + content[marker + 12 :])
    assert np.abs(pixels(tmp_path / "ycck.jpg") - np.asarray(scene())).mean() < 3


def test_lab_and_ycbcr_are_colours(tmp_path: Path) -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(scene(), *profiles, outputMode="LAB")
    assert lab is not None
    lab.save(tmp_path / "lab.tif")
    scene().convert("YCbCr").save(tmp_path / "ycbcr.tif")
    for name in ("lab.tif", "ycbcr.tif"):
        with Image.open(tmp_path / name) as picture:
            assert picture.mode in ("LAB", "YCbCr")
        assert np.abs(pixels(tmp_path / name) - np.asarray(scene())).mean() < 3


def test_palettes_and_single_bits_are_colours(tmp_path: Path) -> None:
    scene().quantize(4).save(tmp_path / "palette.png")
    scene().quantize(4).save(tmp_path / "palette.tif")
    for name in ("palette.png", "palette.tif"):
        assert np.abs(pixels(tmp_path / name) - np.asarray(scene())).max() < 3
    Image.fromarray(RAMP > 30_000).save(tmp_path / "bits.png")
    Image.fromarray(RAMP > 30_000).save(tmp_path / "bits.tif")
    for name in ("bits.png", "bits.tif"):
        assert np.array_equal(pixels(tmp_path / name)[..., 0], 255 * (RAMP > 30_000))


def test_premultiplied_transparency_is_blended(tmp_path: Path) -> None:
    """Extra samples of kind 1 in a TIFF: the colours are multiplied with alpha already."""
    for mode, pixel in (("LA", (64, 128)), ("RGBA", (64, 64, 64, 128))):
        path, kind_of_extra = tmp_path / f"{mode}.tif", struct.pack("<HHI", 338, 3, 1)
        Image.new(mode, (2, 2), pixel).save(path)
        content = path.read_bytes()
        place = content.index(kind_of_extra) + len(kind_of_extra)
        path.write_bytes(content[:place] + b"\1" + content[place + 1 :])
        assert np.abs(pixels(path) - (64 + 127)).max() <= 2, mode
