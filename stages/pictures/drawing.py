"""How pictures are drawn: by our settings, whatever a user's matplotlibrc says, and never at the cost of a step.

matplotlib is loaded when the first picture is drawn, since that fails too, for a broken file of settings.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import east_asian_width

from graftwork.specs.problems import plain, shortened
from graftwork.stages.contract import note

if TYPE_CHECKING:
    from matplotlib.figure import Figure

os.environ["MPLBACKEND"] = "agg"  # of this process, a step's: a notebook's, or a wrong one, would fail the import
MAX_LABEL = 10  # letters' widths of a class's name over its sample
MAX_REASON = 200  # characters
FONT = "DejaVu Sans"  # matplotlib's own
# Fonts that have what it lacks, if they are installed.
OTHER_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Zen Hei"),
    *("WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans"),
    *("Yu Gothic", "Malgun Gothic", "NanumGothic", "Arial Unicode MS", "Unifont", "Noto Sans Devanagari"),
    *("Noto Sans Thai", "Noto Emoji", "Symbola", "Segoe UI Symbol", "FreeSans"),
)


def draw(path: Path, size: tuple[float, float], paint: Callable[[Figure], None]) -> None:
    """Write `path`.png, of that size in inches; if it cannot be drawn, write why as a note of the artifact instead."""
    try:
        _draw(path.with_suffix(".png"), size, paint)
    except Exception as error:  # of whatever kind: the samples of a step are worth more than their picture
        reason = shortened(plain(" ".join(f"{type(error).__name__}: {error}".split())), MAX_REASON)
        note(path.parent, f"{path.stem}.png could not be drawn ({reason}); the rest of the step is as it should be")


def _draw(path: Path, size: tuple[float, float], paint: Callable[[Figure], None]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        # No date in the file: the same picture is the same bytes.
        figure.savefig(path, dpi=120, metadata={"Software": None})


def label(name: str) -> str:
    """A class's name as it fits over a sample: short, on one line, what no font has spelt out."""
    name = plain(name)
    missing = {sign for sign in name if not _has(FONT, sign)}
    missing -= {sign for sign in missing if any(_has(font, sign) for font in other_fonts(name))}
    spelt = "".join(sign.encode("unicode_escape").decode() if sign in missing else sign for sign in name)
    ends = list(accumulate(2 if east_asian_width(sign) in "WF" else 1 for sign in spelt))
    return spelt if not ends or ends[-1] <= MAX_LABEL else f"{spelt[: sum(end < MAX_LABEL for end in ends)]}…"


def fonts_for(names: Collection[str]) -> list[str]:
    """The families that have the characters of names, to be tried in this order."""
    return [FONT, *dict.fromkeys(font for name in names for font in other_fonts(name))]


def other_fonts(name: str) -> list[str]:
    """The installed families that have a character that matplotlib's own font lacks."""
    lacking = [sign for sign in name if not _has(FONT, sign)]
    return [font for font in OTHER_FONTS if any(_has(font, sign) for sign in lacking)] if lacking else []


def _has(family: str, sign: str) -> bool:
    return ord(sign) in _characters(family)


@cache
def _characters(family: str) -> Collection[int]:
    """The code points of the file of a family that upright text is drawn with; none if the family is not installed."""
    from matplotlib import font_manager

    try:
        path = font_manager.findfont(family, fallback_to_default=False)
    except ValueError:
        return frozenset()
    return frozenset(font_manager.get_font(path).get_charmap())
