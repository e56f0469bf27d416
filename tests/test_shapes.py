"""Scenes of shapes: what is drawn is found again, and judged as GenEval judges; how the metric sums it up."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from graftwork.specs.detector import ShapesSpec
from graftwork.stages.artifacts.texts import TextTable
from graftwork.stages.evaluation.geneval.prompts import Prompt
from graftwork.stages.evaluation.geneval.results import read_results
from graftwork.stages.evaluation.geneval.rules import judge_image
from graftwork.stages.evaluation.geneval.shapes import COLOURS, SHAPES, SLOTS, VOCABULARY, Shape, ShapesDetector, drawn
from graftwork.stages.evaluation.judges import Scores, Verdict
from graftwork.stages.evaluation.metrics import Seen, Summary
from graftwork.stages.evaluation.metrics.geneval import GenevalJudge
from tests.scenes import PROMPTS

DETECTOR = ShapesDetector()


def scene(*shapes: Shape) -> Image.Image:
    return Image.fromarray(drawn(shapes))


def found_in(image: Image.Image) -> list[tuple[str, str, float, tuple[float, ...]]]:
    objects = DETECTOR.detect(image)
    return sorted(
        (name, DETECTOR.classify(image, name, [one])[0], one.score, one.box)
        for name in objects
        for one in objects[name]
    )


@pytest.mark.parametrize("name, colour", itertools.product(SHAPES, COLOURS))
def test_each_shape_in_each_colour_is_found_where_it_was_drawn(name: str, colour: str) -> None:
    for slot, (left, top) in enumerate(SLOTS):
        box = (float(left), float(top), left + 6.0, top + 6.0)
        assert found_in(scene(Shape(name, colour, slot))) == [(name, colour, 1.0, box)]


def test_all_that_a_full_scene_has_is_found() -> None:
    draws = np.random.default_rng(0)
    for _ in range(50):
        shapes = [Shape(str(draws.choice(list(SHAPES))), str(draws.choice(list(COLOURS))), slot) for slot in range(4)]
        found = found_in(scene(*shapes))
        assert [one[:2] for one in found] == sorted((shape.name, shape.colour) for shape in shapes)


def test_a_pale_and_frayed_shape_is_found_with_less_certainty_and_specks_are_not() -> None:
    pixels = drawn([Shape("ring", "blue", 0)]).astype(int)
    pixels += np.random.default_rng(0).integers(-30, 30, pixels.shape)
    pixels[1:3, 1:3] = 128
    pixels[14, 14] = COLOURS["red"]
    (found,) = found_in(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    assert found[:2] == ("ring", "blue") and 0.6 < found[2] < 1


def test_nothing_is_found_in_an_empty_scene_or_one_of_another_grey() -> None:
    assert DETECTOR.detect(scene()) == {}
    assert DETECTOR.detect(Image.new("RGB", (16, 16), "#909090")) == {}


SCENES = {
    "a photo of a ring": [Shape("ring", "red", 2)],
    "a photo of a square and a cross": [Shape("square", "red", 0), Shape("cross", "green", 3)],
    "a photo of two crosses": [Shape("cross", "red", 1), Shape("cross", "red", 2)],
    "a photo of a red square": [Shape("square", "red", 1)],
    "a photo of a cross left of a ring": [Shape("cross", "blue", 0), Shape("ring", "blue", 1)],
    "a photo of a red square and a blue cross": [Shape("square", "red", 0), Shape("cross", "blue", 1)],
}
OTHERS = {
    "a photo of a ring": [Shape("square", "red", 2)],
    "a photo of a square and a cross": [Shape("square", "red", 0)],
    "a photo of two crosses": [Shape("cross", "red", slot) for slot in (0, 1, 2)],
    "a photo of a red square": [Shape("square", "blue", 1)],
    "a photo of a cross left of a ring": [Shape("cross", "blue", 1), Shape("ring", "blue", 0)],
    "a photo of a red square and a blue cross": [Shape("square", "blue", 0), Shape("cross", "red", 1)],
}


@pytest.mark.parametrize("document", PROMPTS, ids=lambda document: document["tag"])
def test_a_scene_of_a_prompt_is_right_and_another_is_not(document: dict[str, object]) -> None:
    prompt = Prompt.model_validate(document, context=VOCABULARY)
    for scenes, correct in ((SCENES, True), (OTHERS, False)):
        image = scene(*scenes[prompt.prompt])
        colours = lambda name, objects, image=image: DETECTOR.classify(image, name, objects)  # noqa: E731
        assert judge_image(prompt, DETECTOR.detect(image), colours, VOCABULARY.colours).correct == correct


# -- the metric


@pytest.fixture
def judge(tmp_path: Path) -> GenevalJudge:
    """Of texts with 3 captions and the six prompts behind them."""
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    meta = {"channels": 1, "tokens": 1, "captions": 3, "prompts": [one["prompt"] for one in PROMPTS]}
    (tmp_path / "texts.json").write_text(json.dumps(meta))
    inputs = {"text": SimpleNamespace(path=lambda: tmp_path)}
    context = SimpleNamespace(inputs=inputs, params=SimpleNamespace(detector=ShapesSpec()))
    assert TextTable(tmp_path).meta.captions == 3
    return GenevalJudge(context, None, torch.device("cpu"))  # type: ignore[arg-type]


def seen(judge: GenevalJudge, *scenes: dict[str, list[Shape]]) -> Seen:
    """What the metric sees in a sample of each prompt from each of these sets of scenes."""
    images = [drawn(one[prompt["prompt"]]) for one in scenes for prompt in PROMPTS]  # type: ignore[index]
    labels = torch.arange(6).repeat(len(scenes)) + 3
    return judge.look(np.stack(images).transpose(0, 3, 1, 2), labels)


def summed(judge: GenevalJudge, folder: Path, *batches: Seen) -> Scores:
    scores = Scores()
    for batch in batches:
        scores.add(Verdict(6, {"geneval": batch}))
        scores = Scores.of_state(scores.state(), ["geneval"])  # as if it had been killed and resumed
    folder.mkdir()
    scores.write(folder)
    return scores


def test_a_row_has_the_share_of_each_tag_and_their_mean(judge: GenevalJudge, tmp_path: Path) -> None:
    half = {**SCENES, "a photo of a ring": OTHERS["a photo of a ring"]}
    summed(judge, tmp_path / "row", seen(judge, SCENES), seen(judge, half))
    shares = json.loads((tmp_path / "row" / "scores.json").read_text())
    figures = GenevalJudge.figures(Summary(None, shares), Summary(None))
    assert figures.pop("geneval:shapes") == pytest.approx(5.5 / 6)
    assert figures == {
        f"{tag}:shapes": pytest.approx(0.5 if tag == "single_object" else 1.0)
        for tag in ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    }


def test_each_image_has_a_line_as_the_published_scorer_writes_it(judge: GenevalJudge, tmp_path: Path) -> None:
    summed(judge, tmp_path / "row", seen(judge, SCENES), seen(judge, OTHERS))
    results = read_results(tmp_path / "row" / "geneval.jsonl")
    assert [result.filename for result in results[5:8]] == [
        "00005/samples/0000.png",
        "00000/samples/0001.png",
        "00001/samples/0001.png",
    ]
    assert [result.correct for result in results] == [True] * 6 + [False] * 6
    assert all(result.reason for result in results[6:])


def test_a_row_stands_beside_the_rootstock_with_an_interval(judge: GenevalJudge, tmp_path: Path) -> None:
    summed(judge, tmp_path / "rootstock", seen(judge, OTHERS))
    summed(judge, tmp_path / "row", seen(judge, SCENES))
    beside = GenevalJudge.beside(tmp_path / "row", tmp_path / "rootstock")
    assert beside == {"gain:geneval": 1.0, "gain_low:geneval": 1.0, "gain_high:geneval": 1.0}
