"""GenEval's detector and its judge of colours, on tiny random models that are saved as the published ones are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from graftwork.specs.detector import Mask2FormerSpec
from graftwork.specs.problems import SpecError
from graftwork.stages.evaluation.geneval.colours import ClipColourClassifier, object_crop
from graftwork.stages.evaluation.geneval.detector import (
    Candidate,
    Geometry,
    Mask2FormerDetector,
    Size,
    candidates,
    class_names,
    network_input,
)
from graftwork.stages.evaluation.geneval.prompts import Prompt
from graftwork.stages.evaluation.geneval.rules import DetectedObject, judge_image
from graftwork.stages.evaluation.geneval.vocabulary import GENEVAL, GENEVAL_NAMES
from graftwork.stages.evaluation.metrics.geneval import load_detector
from graftwork.stages.evaluation.pretrained import model_name
from tests.clips import prepared, unit, write_clip

CPU = torch.device("cpu")
COCO_NAMES = {name: own for own, name in list(GENEVAL_NAMES.items())[:3]}  # COCO's own, where they are others
OLDER_NAMES = {name: own for own, name in GENEVAL_NAMES.items()}

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


# -- direct computations


def bilinear(values: NDArray[np.float64], size: Size) -> NDArray[np.float64]:
    """Scale the last two axes: between the two nearest pixels of each, whose centres lie at halves."""
    for axis, length in zip((-2, -1), size, strict=True):
        values = np.moveaxis(values, axis, 0)
        place = ((np.arange(length) + 0.5) * len(values) / length - 0.5).clip(0)
        low = np.floor(place).astype(int)
        high = (low + 1).clip(max=len(values) - 1)
        weight = (place - low).reshape(-1, *[1] * (values.ndim - 1))
        values = np.moveaxis(values[low] * (1 - weight) + values[high] * weight, 0, axis)
    return values


def sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-values)))


Expected = tuple[int, float, tuple[int, ...], NDArray[np.bool_]]  # class, score, box and mask


def expected(class_logits: torch.Tensor, mask_logits: torch.Tensor, geometry: Geometry) -> list[Expected]:
    """All candidates with a mask, the most probable first."""
    exponentials = np.exp(class_logits.double().numpy())
    probabilities = (exponentials / exponentials.sum(1, keepdims=True))[:, :-1]
    height, width = geometry.scaled_size
    padded = bilinear(mask_logits.double().numpy(), geometry.padded_size)
    masks = bilinear(padded[:, :height, :width], geometry.image_size)
    objects = []
    for index in np.argsort(-probabilities, axis=None)[:100]:
        query, label = divmod(int(index), probabilities.shape[1])
        inside = masks[query] > 0
        if not inside.any():
            continue
        rows, columns = np.where(inside)
        score = probabilities[query, label] * sigmoid(masks[query])[inside].sum() / (inside.sum() + 1e-6)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        objects.append((label, float(score), tuple(map(int, box)), inside))
    return objects


def require_same(got: list[Candidate], wanted: list[Expected]) -> None:
    assert [candidate.class_index for candidate in got] == [label for label, *_ in wanted]
    for candidate, (_, score, box, mask) in zip(got, wanted, strict=True):
        assert candidate.instance.score == pytest.approx(score, rel=1e-5)
        assert candidate.instance.box == box
        assert candidate.instance.mask is not None and np.array_equal(candidate.instance.mask, mask)


def logits(queries: int, classes: int, side: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(queries, classes + 1, generator=draws), torch.randn(queries, side, side, generator=draws)


# -- the image, as the network sees it


@pytest.mark.parametrize(
    ("original", "scaled", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((2048, 2048), (800, 800), (800, 800)),
        ((300, 600), (667, 1333), (672, 1344)),  # the longer side decides
        ((600, 450), (1067, 800), (1088, 800)),
        ((801, 803), (800, 802), (800, 832)),
    ],
)
def test_an_image_is_scaled_to_800_pixels_but_not_beyond_1333(original: Size, scaled: Size, padded: Size) -> None:
    assert Geometry.of(original) == Geometry(original, scaled, padded)


SMALL = Geometry((30, 40), (20, 27), (32, 32))


@pytest.mark.parametrize(
    "geometry", [SMALL, Geometry((30, 40), (45, 60), (64, 64)), Geometry((100, 90), (10, 9), (32, 32))]
)
def test_an_image_becomes_the_networks_input_as_in_mmdet(geometry: Geometry) -> None:
    height, width = geometry.image_size
    image = picture(width, height)
    scaled = bilinear(np.asarray(image).transpose(2, 0, 1).astype(np.float64), geometry.scaled_size)
    found = network_input(as_tensor(image), geometry)[0]
    levels = found.double() * torch.tensor([58.395, 57.12, 57.375])[:, None, None].double()
    levels += torch.tensor([123.675, 116.28, 103.53])[:, None, None].double()
    inner = levels[:, : geometry.scaled_size[0], : geometry.scaled_size[1]]
    assert found.shape == (3, *geometry.padded_size)
    assert (inner - inner.round()).abs().max() < 1e-4
    assert np.abs(inner.numpy() - scaled).max() < 0.5001
    outer = levels.clone()
    outer[:, : geometry.scaled_size[0], : geometry.scaled_size[1]] = 128
    torch.testing.assert_close(outer, torch.full_like(outer, 128), rtol=0, atol=1e-4)


# -- what comes of the network's output


@pytest.mark.parametrize("seed", range(3))
def test_objects_are_those_of_a_direct_computation(seed: int) -> None:
    class_logits, mask_logits = logits(7, 3, 8, seed)
    got = list(candidates(class_logits, mask_logits, SMALL, 0))
    assert len(got) == 21
    require_same(got, expected(class_logits, mask_logits, SMALL))


def test_masks_are_scaled_up_before_the_padding_is_cut_off() -> None:
    geometry = Geometry((64, 48), (44, 33), (64, 64))
    class_logits, mask_logits = logits(4, 2, 16)
    require_same(
        list(candidates(class_logits, mask_logits, geometry, 0)), expected(class_logits, mask_logits, geometry)
    )


def test_the_100_most_probable_pairs_of_a_query_and_a_class_are_looked_at() -> None:
    class_logits, mask_logits = logits(40, 4, 2)
    mask_logits = mask_logits.abs() + 1
    got = list(candidates(class_logits, mask_logits, SMALL, 0))
    assert len(got) == 100
    require_same(got, expected(class_logits, mask_logits, SMALL))


def test_no_object_is_among_the_classes_of_the_softmax_and_of_no_object() -> None:
    class_logits = torch.tensor([[0.0, 0.0, np.log(2)], [-9.0, -9.0, 9.0]])
    got = list(candidates(class_logits, torch.full((2, 4, 4), 50.0), SMALL, 0.1))
    assert {candidate.class_index for candidate in got} == {0, 1}
    assert [candidate.instance.score for candidate in got] == pytest.approx([0.25, 0.25])


def test_a_query_without_a_pixel_is_no_object() -> None:
    class_logits = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    mask_logits = torch.stack([torch.full((4, 4), -1.0), torch.full((4, 4), 1.0)])
    (got,) = candidates(class_logits, mask_logits, SMALL, 0)
    assert got.instance.box == (0, 0, 40, 30)


def test_a_logit_of_nothing_is_outside_the_mask() -> None:
    assert not list(candidates(torch.tensor([[9.0, 0.0]]), torch.zeros(1, 4, 4), SMALL, 0))


def test_objects_at_or_below_the_least_score_are_left_out() -> None:
    class_logits, mask_logits = logits(7, 3, 8)
    everything = list(candidates(class_logits, mask_logits, SMALL, 0))
    limit = sorted(candidate.instance.score for candidate in everything)[10]
    kept = list(candidates(class_logits, mask_logits, SMALL, limit))
    assert len(kept) == 10
    assert [one.instance.box for one in kept] == [one.instance.box for one in everything if one.instance.score > limit]


# -- classes


def labels(names: dict[str, str]) -> dict[int, str]:
    """A model's labels of COCO's classes, with other names for some."""
    return {index: names.get(name, name) for index, name in enumerate(GENEVAL.classes)}


@pytest.mark.parametrize("names", [{}, COCO_NAMES, OLDER_NAMES], ids=["GenEval's", "COCO's", "older"])
def test_classes_have_genevals_names(names: dict[str, str]) -> None:
    assert class_names(labels(names), "model", GENEVAL) == GENEVAL.classes


def test_classes_keep_the_models_order() -> None:
    turned = {79 - index: name for index, name in labels(COCO_NAMES).items()}
    assert class_names(turned, "model", GENEVAL) == GENEVAL.classes[::-1]


@pytest.mark.parametrize(
    ("own", "got"),
    [
        (labels({}) | {80: "sky"}, "81 classes (person, bicycle, car, motorcycle and 77 more)"),
        (labels({"person": "human"}), "80 classes (human, bicycle, car, motorcycle and 76 more)"),
        ({index: name for index, name in labels({}).items() if index < 79}, "79 classes (person, "),
        (labels({"bicycle": "person"}), "80 classes (person, person, "),
    ],
    ids=["more", "another", "fewer", "twice"],
)
def test_a_model_of_other_classes_is_refused_in_one_line(own: dict[int, str], got: str) -> None:
    with pytest.raises(SpecError) as caught:
        class_names(own, "some/model", GENEVAL)
    (line,) = caught.value.lines
    assert line.startswith(f"some/model: got a model of {got}")
    assert line.endswith("; accepted: one of 80: person, bicycle, car, motorcycle and 76 more")


# -- the detector


def save_mask2former(folder: Path, own: dict[int, str]) -> Path:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = [f"stage{number}" for number in range(1, 5)]
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=stages
    )
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    config = Mask2FormerConfig(
        backbone_config=backbone,
        **sizes,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label=own,
        label2id={name: index for index, name in own.items()},
    )
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    turned = {79 - index: name for index, name in labels(OLDER_NAMES).items()}
    return save_mask2former(tmp_path_factory.mktemp("models") / "mask2former-tiny", turned)


@pytest.fixture(scope="module")
def detector(mask2former: Path) -> Mask2FormerDetector:
    return Mask2FormerDetector(str(mask2former), CPU, min_score=0.0)


@pytest.fixture
def small_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of at most 64 pixels for the network, which 800 keep busy for seconds."""
    monkeypatch.setattr("graftwork.stages.evaluation.geneval.detector.SHORTEST_EDGE", 48)


@pytest.mark.usefixtures("small_input")
def test_an_images_objects_are_those_of_the_networks_output(detector: Mask2FormerDetector) -> None:
    image, geometry = picture(40, 30), Geometry((30, 40), (48, 64), (64, 64))
    with torch.no_grad():
        output = detector.model(network_input(as_tensor(image), geometry))
    wanted: dict[str, list[DetectedObject]] = {}
    for candidate in candidates(output.class_queries_logits[0], output.masks_queries_logits[0], geometry, 0):
        wanted.setdefault(GENEVAL.classes[79 - candidate.class_index], []).append(candidate.instance)
    objects = detector.detect(image)
    assert wanted and list(objects) == [name for name in GENEVAL.classes if name in wanted]
    for name, found in objects.items():
        assert [(one.score, one.box) for one in found] == [(one.score, one.box) for one in wanted[name]]
        assert found[0].mask is not None and found[0].mask.shape == (30, 40)


@pytest.mark.usefixtures("small_input")
def test_a_random_detector_finds_nothing_above_genevals_score(mask2former: Path) -> None:
    assert Mask2FormerDetector(str(mask2former), CPU).detect(picture(40, 30)) == {}


def test_a_job_reads_the_revision_of_a_hub_id_that_its_key_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers, asked for the id, would fetch a newer one."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    networks = {"detector.Mask2FormerDetector": MagicMock(), "colours.ClipColourClassifier": MagicMock()}
    for name in ("m", "c"):
        snapshot = tmp_path / f"models--org--{name}" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").touch()
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0123")
    for name, network in networks.items():
        monkeypatch.setattr(f"graftwork.stages.evaluation.geneval.{name}", network)
    load_detector(Mask2FormerSpec(path="org/m", colours="org/c"), CPU)
    places = [network.call_args.args[0] for network in networks.values()]
    assert places == [str(tmp_path / f"models--org--{name}/snapshots/0123") for name in ("m", "c")]


def test_a_detector_does_not_train(detector: Mask2FormerDetector) -> None:
    assert not detector.model.training


def test_a_detector_has_the_name_of_its_model(detector: Mask2FormerDetector) -> None:
    assert detector.name == "mask2former-tiny"


@pytest.mark.parametrize(
    "path",
    [
        "facebook/mask2former-swin-small-coco-instance",
        "/models/mask2former-swin-small-coco-instance/",
        "/cache/hub/models--facebook--mask2former-swin-small-coco-instance/snapshots/0123abcd",
    ],
)
def test_a_model_is_named_by_its_hub_id_or_folder(path: str) -> None:
    assert model_name(path) == "mask2former-swin-small-coco-instance"


def refused(path: Path) -> str:
    with pytest.raises(SpecError) as caught:
        Mask2FormerDetector(str(path), CPU)
    (line,) = caught.value.lines
    assert line.startswith(f"{path}: ")
    return line


def test_a_panoptic_model_is_refused(tmp_path: Path) -> None:
    path = save_mask2former(tmp_path / "panoptic", labels({}) | {80: "sky"})
    assert "got a model of 81 classes" in refused(path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "cannot be loaded by transformers: " in refused(tmp_path)


def test_weights_that_are_incomplete_are_refused(mask2former: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(mask2former / "model.safetensors")
    del tensors["class_predictor.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((mask2former / "config.json").read_bytes())
    line = refused(tmp_path)
    assert "got weights without class_predictor.weight; accepted: those of a Mask2FormerFor" in line


def test_weights_of_another_network_are_refused(clip: Path) -> None:
    assert refused(clip)


# -- colours

COLOURS = ("red", "green", "blue", "teal", "plum")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "clip-tiny")


@pytest.fixture(scope="module")
def classifier(clip: Path) -> ClipColourClassifier:
    return ClipColourClassifier(str(clip), CPU, COLOURS)


def text_vector(classifier: ClipColourClassifier, text: str) -> NDArray[np.float64]:
    with torch.no_grad():
        output = classifier.model.get_text_features(**classifier.tokenizer([text], return_tensors="pt"))
    return unit(output.pooler_output[0].double().numpy())


def image_vector(classifier: ClipColourClassifier, crop: Image.Image) -> NDArray[np.float64]:
    with torch.no_grad():
        output = classifier.model.get_image_features(pixel_values=prepared(crop))
    return unit(output.pooler_output[0].double().numpy())


def test_a_colours_text_is_the_mean_of_three_templates(classifier: ClipColourClassifier) -> None:
    found = classifier.text_features("hot dog").numpy()
    for row, colour in zip(found, COLOURS, strict=True):
        texts = [
            f"a photo of a {colour} hot dog",
            f"a photo of a {colour}-colored hot dog",
            f"a photo of a {colour} object",
        ]
        np.testing.assert_allclose(row, unit(np.mean([text_vector(classifier, text) for text in texts], 0)), atol=1e-5)


def test_texts_of_a_class_are_read_once(classifier: ClipColourClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    first = classifier.text_features("cup")
    monkeypatch.setattr(classifier, "tokenizer", None)
    assert classifier.text_features("cup") is first


def masked(width: int, height: int, box: tuple[int, int, int, int]) -> DetectedObject:
    """An object whose mask is the ellipse within its box."""
    y, x = np.ogrid[:height, :width]
    left, top, right, bottom = box
    inside = ((x + 0.5 - (left + right) / 2) / (right - left)) ** 2 + (
        (y + 0.5 - (top + bottom) / 2) / (bottom - top)
    ) ** 2 <= 0.25
    return DetectedObject(0.9, (left, top, right, bottom), inside)


def test_an_object_is_cut_to_its_box_on_grey() -> None:
    image, instance = picture(40, 30), masked(40, 30, (5, 8, 25, 20))
    crop = np.asarray(object_crop(image, instance))
    assert instance.mask is not None
    inside, original = instance.mask[8:20, 5:25], np.asarray(image)[8:20, 5:25]
    assert inside.any() and not inside.all()
    assert np.array_equal(crop[inside], original[inside]) and (crop[~inside] == 0x99).all()


def test_an_object_without_a_mask_keeps_its_background() -> None:
    image = picture(40, 30)
    crop = object_crop(image, DetectedObject(0.9, (5.2, 7.6, 25.4, 19.9)))
    assert np.array_equal(np.asarray(crop), np.asarray(image)[8:20, 5:25])


def test_a_colour_is_the_one_whose_text_is_nearest(classifier: ClipColourClassifier) -> None:
    image = picture(60, 50, seed=3)
    boxes = [(0, 0, 20, 20), (5, 5, 59, 25), (30, 2, 40, 48), (10, 20, 50, 50), (20, 0, 60, 30), (0, 30, 16, 46)]
    objects = [masked(60, 50, box) for box in boxes]
    texts = classifier.text_features("cup").numpy()
    nearness = [texts @ image_vector(classifier, object_crop(image, instance)) for instance in objects]
    wanted = [COLOURS[int(near.argmax())] for near in nearness]
    assert len(set(wanted)) > 1
    assert classifier.classify(image, "cup", objects) == wanted


def test_images_are_prepared_as_open_clip_does(classifier: ClipColourClassifier) -> None:
    crop = picture(50, 37, seed=1)
    pixels = classifier.processor(images=[crop], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = classifier.model.get_image_features(pixel_values=pixels).pooler_output[0].numpy()
    np.testing.assert_allclose(unit(found), image_vector(classifier, crop), atol=1e-4)


def test_rules_ask_the_classifier_about_one_image(classifier: ClipColourClassifier) -> None:
    image, cup = picture(40, 30), masked(40, 30, (5, 8, 25, 20))
    (colour,) = classifier.classify(image, "cup", [cup])
    include = [{"class": "cup", "count": 1, "color": colour}]
    prompt = Prompt.model_validate({"tag": "colors", "include": include, "prompt": f"a photo of a {colour} cup"})
    assert judge_image(prompt, {"cup": [cup]}, partial(classifier.classify, image), COLOURS).correct


def test_a_classifier_has_the_name_of_its_model_and_does_not_train(classifier: ClipColourClassifier) -> None:
    assert classifier.name == "clip-tiny" and not classifier.model.training


def test_the_colours_are_genevals_ten_unless_others_are_given(clip: Path) -> None:
    assert ClipColourClassifier(str(clip), CPU).colours == GENEVAL.colours


def without(clip: Path, folder: Path, *missing: str) -> str:
    """What is said of a copy of a CLIP's folder without some of its files."""
    for file in clip.iterdir():
        if file.name not in missing:
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SpecError) as caught:
        ClipColourClassifier(str(folder), CPU)
    (line,) = caught.value.lines
    return line.removeprefix(f"{folder}: ")


@pytest.mark.parametrize("missing", ["preprocessor_config.json", "model.safetensors", "config.json", "merges.txt"])
def test_a_folder_without_all_files_of_a_clip_is_refused(clip: Path, tmp_path: Path, missing: str) -> None:
    assert without(clip, tmp_path, missing).startswith("cannot be loaded by transformers: ")


def test_a_folder_without_a_tokenizer_is_refused(clip: Path, tmp_path: Path) -> None:
    line = without(clip, tmp_path, "vocab.json", "merges.txt")
    assert line.startswith("got a tokenizer of 2 tokens; accepted: the model's of 58, in tokenizer.json or vocab.json")
