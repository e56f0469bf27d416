"""Pictures: drawn whatever a name holds and whatever a user's settings are, and never at the cost of a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from graftwork.pipeline.execution.report import RecordWriter, RunReport
from graftwork.pipeline.execution.run import Run
from graftwork.pipeline.execution.task import StepResult
from graftwork.pipeline.execution.view import SilentView
from graftwork.pipeline.planning.plan import make_plan
from graftwork.specs.reading.load import load
from graftwork.stages import contract
from graftwork.stages.artifacts.evidence import LocalityCurves, Outputs, QuarterCurves
from graftwork.stages.pictures import pictures
from graftwork.stages.pictures import search as search_pictures
from graftwork.stages.pictures.drawing import label
from tests.conftest import TINY
from tests.stores import ORIGIN

if TYPE_CHECKING:
    from graftwork.pipeline.tracking.tracker import Tracker

NAMES = {
    "mathematics": "US$5_^x$",
    "one dollar": "$",
    "an escaped dollar": "\\$x\\$",
    "TeX": "\\frac{a}{b} % # & ~",
    "Chinese": "猫",
    "Arabic": "قطة",
    "Hebrew": "חתול",
    "emoji": "🐈‍⬛",
    "control characters": "a\nb\tc\x1b[31m\x7f",
    "bytes that are no text": os.fsdecode(b"caf\xe9"),
    "a lone surrogate": "a\ud800b",
    "a reversal": "\u202eabc",
    "very long": "n02084071_" * 40,
    "empty": "",
    "blank": "   ",
}


def notes(folder: Path) -> list[str]:
    path = folder / "notes.json"
    return json.loads(path.read_text()) if path.exists() else []


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_shown_under_any_name(tmp_path: Path, name: str) -> None:
    images = np.zeros((3, 3, 8, 8), np.uint8)
    pictures.sample_grid(images, [NAMES[name]] * 3, "stage1", tmp_path / "grid")
    assert notes(tmp_path) == []
    with Image.open(tmp_path / "grid.png") as picture:
        picture.load()


def test_a_name_is_shown_as_it_is_but_for_what_cannot_be() -> None:
    assert [label(name) for name in ("cat", "US$5_^x$", "قطة")] == ["cat", "US$5_^x$", "قطة"]
    assert label("a\nb") == "a\\nb" and label(NAMES["bytes that are no text"]) == "caf\\udce9"
    assert label("猫") in ("猫", "\\u732b")  # with a font that has it, and without
    assert label("n02084071_poodle") == "n02084071…"


def test_a_dollar_sign_is_drawn_as_one(tmp_path: Path) -> None:
    ink = {}
    for name in ("", "a", "$a$"):
        pictures.sample_grid(np.full((1, 1, 8, 8), 255, np.uint8), [name], "x", tmp_path / "grid")
        with Image.open(tmp_path / "grid.png") as picture:
            ink[name] = int((255 - np.asarray(picture.convert("L"), np.int64)).sum())
    assert ink["$a$"] - ink[""] > 2 * (ink["a"] - ink[""])  # as mathematics it would be an a alone


def test_a_picture_that_fails_is_a_note_and_no_error(tmp_path: Path) -> None:
    pictures.sample_grid(np.zeros((3, 5, 8, 8), np.uint8), ["cat"] * 3, "five channels", tmp_path / "grid")
    pictures.loss_curve([(1, 2.0)], "loss", tmp_path / "loss")
    (line,) = notes(tmp_path)
    assert line.startswith("grid.png could not be drawn (TypeError: ") and "\n" not in line
    assert not (tmp_path / "grid.png").exists()
    assert (tmp_path / "loss.png").exists() and (tmp_path / "loss.csv").exists()


DRAW = r"""
import sys
from pathlib import Path
import numpy as np
from graftwork.stages.pictures import pictures
out = Path(sys.argv[1])
pictures.sample_grid(np.zeros((3, 3, 8, 8), np.uint8), ["US$5_^x$", "caf\xe9", "\u732b"], "title", out / "grid")
pictures.loss_curve([(1, 2.0), (2, 1.0)], "loss", out / "loss")
"""

SETTINGS = {
    "as they come": {},
    "a backend that is not there": {"MPLBACKEND": "nonsense"},
    "a notebook's": {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    "a folder that cannot be written": {"MPLCONFIGDIR": "/proc/nope"},
    "warnings as errors": {"PYTHONWARNINGS": "error::UserWarning"},
    "a plain locale": {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, bytes]]:
    """Draw in a process with these settings of the environment and this file; return what it wrote."""

    def call(settings: dict[str, str], matplotlibrc: str | None) -> dict[str, bytes]:
        folder = tmp_path_factory.mktemp("settings")
        (folder / "out").mkdir()
        if matplotlibrc is not None:
            (folder / "matplotlibrc").write_text(matplotlibrc)
        done = subprocess.run(
            [sys.executable, "-c", DRAW, str(folder / "out")],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if not name.startswith("MPL")} | settings,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}

    return call


@pytest.fixture(scope="module")
def plainly(drawn: Callable[..., dict[str, bytes]]) -> dict[str, bytes]:
    return drawn({}, None)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_picture_is_the_same_whatever_the_user_s_settings(
    drawn: Callable[..., dict[str, bytes]], plainly: dict[str, bytes], settings: str
) -> None:
    rc = "text.usetex: True\nfont.size: 30\nsavefig.bbox: tight\naxes.formatter.use_locale: True\n"
    assert drawn(SETTINGS[settings], rc) == plainly
    assert set(plainly) == {"grid.png", "loss.png", "loss.csv"}


def test_a_broken_file_of_settings_costs_no_step(drawn: Callable[..., dict[str, bytes]]) -> None:
    assert {"loss.csv"} <= set(drawn({}, "backend: nonsense\n\x00: \nfigure.dpi: many\n"))


def test_the_run_tells_the_notes_of_a_step(tmp_path: Path) -> None:
    class Saying(SilentView):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def say(self, line: str) -> None:
            self.lines.append(line)

    view = Saying()
    run = Run(make_plan(load(TINY, [f"store={tmp_path}"])), view)
    tracker = cast("Tracker", SimpleNamespace(started=lambda _: None, ended=lambda *_: None))
    writer = RecordWriter(run.store, run.record, view.say)
    report = RunReport(run.plan, run.store, view, writer, tracker, run.stop)
    key = run.plan["base"].key
    folder = run.store.workplace(key)
    contract.note(folder, "loss.png could not be drawn")
    run.store.commit(key, folder, {}, ORIGIN)
    report.ended("base", StepResult("base", key, "done"))
    assert view.lines == ["base: loss.png could not be drawn"]


# -- what is drawn stays within the picture


def outputs(scale: float) -> Outputs:
    quantiles = {name: scale * value for name, value in zip(QUANTILES, (-9, -4, -1, 0, 1, 4, 9), strict=True)}
    largest = 12 * scale
    return Outputs(
        mean=0.0, std=scale, excess_kurtosis=1.0, largest=largest, largest_magnitudes=(largest,), quantiles=quantiles
    )


QUANTILES = ("0.001", "0.01", "0.25", "0.5", "0.75", "0.99", "0.999")
SITES = [f"{block:02d}.{target}" for block in range(28) for target in ("mha", "mlp")]
CURVE = (0.1, 0.4, 0.8, 1.0)
GATES = {f"{block:02d}.mha": [f"an operator with a name {number}" for number in range(8)] for block in range(8)}


def locality(sites: list[str]) -> LocalityCurves:
    quarters = dict.fromkeys(sites, (CURVE,) * 4)
    curves = dict.fromkeys(sites, CURVE)
    by_quarter = QuarterCurves(tokens=quarters, patches=dict.fromkeys(sites, (CURVE[:2],) * 4))
    return LocalityCurves(tokens=curves, patches=dict.fromkeys(sites, CURVE[:2]), by_quarter=by_quarter)


PICTURES: dict[str, Callable[[Path], None]] = {
    "activations of 4 blocks": lambda path: pictures.activation_boxes({one: outputs(0.3) for one in SITES[:8]}, path),
    "activations of 28 blocks": lambda path: pictures.activation_boxes({one: outputs(40.0) for one in SITES}, path),
    "samples": lambda path: pictures.sample_grid(
        np.zeros((40, 1, 8, 8), np.uint8), [f"n{number:08d}_a_name" for number in range(40)], "random_init", path
    ),
    "loss": lambda path: pictures.loss_curve([(1, 1e-9), (2, 1e9)], "distilling 27.mlp", path),
    "quality": lambda path: pictures.quality_against_cost(
        {row: {"flops": 1e6 * n, "distance": 10.0**n} for n, row in enumerate(("heldout", "stage1"))}, "distance", path
    ),
    "gates": lambda path: search_pictures.course_of_the_gates([(n, *[0.1] * 64) for n in range(3)], GATES, path),
    "cost": lambda path: search_pictures.course_of_the_cost([(1, 0.9), (2, 0.8)], 0.8, 0.81, path),
    "locality": lambda path: pictures.locality_map(locality(SITES[::2]), path),
    "quarters": lambda path: pictures.locality_by_quarter(locality(SITES[::2]), path),
}


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (["a photo of a ring", "a photo of two rings"], ["a ring", "two rings"]),
        (["a photo of", "a photo of a ring"], ["a photo of", "a photo of a ring"]),
        (["great white shark", "great white heron"], ["great white shark", "great white heron"]),
        (["a photo of a ring"] * 2, ["ring", "ring"]),
        (["", "a"], ["", "a"]),
        ([], []),
    ],
    ids=str,
)
def test_words_that_all_labels_begin_with_are_left_out(labels: list[str], shown: list[str]) -> None:
    assert pictures.without_shared_words(labels) == shown


@pytest.mark.parametrize("name", PICTURES)
def test_no_title_and_no_label_is_cut_at_the_edges(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig

    def saved(figure: Figure, *arguments: Any, **settings: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **settings)

    monkeypatch.setattr(Figure, "savefig", saved)
    PICTURES[name](tmp_path / "picture")
    assert notes(tmp_path) == []
    (figure,) = figures
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 > -0.01 and box.y0 > -0.01 and box.x1 < width + 0.01 and box.y1 < height + 0.01, box


def test_notes_add_up(tmp_path: Path) -> None:
    contract.note(tmp_path, "one")
    contract.note(tmp_path, "two")
    assert notes(tmp_path) == ["one", "two"]
