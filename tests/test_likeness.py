"""Likeness to the rootstock: PSNR and cosines, held to formulas; rows that keep what they are compared by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from graftwork.pipeline.planning import preflight
from graftwork.pipeline.planning.plan import make_plan
from graftwork.specs.clip import ClipSpec
from graftwork.specs.likeness import DinoSpec, LikenessSpec
from graftwork.specs.problems import SpecError
from graftwork.specs.reading.load import load
from graftwork.stages.evaluation.dino import Dino
from graftwork.stages.evaluation.inception import check_reference_file
from graftwork.stages.evaluation.judges import Judges, Scores, read_summary
from graftwork.stages.evaluation.metrics import JUDGES, Summary
from graftwork.stages.evaluation.metrics.likeness import LikenessJudge, psnr
from tests.clips import unit, write_clip
from tests.conftest import TINY

CPU = torch.device("cpu")
SIDE = 16
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, as published with every DINO
# In the form published with facebook/dinov2-base, dinov3-vitb16-pretrain-lvd1689m and dino-vitb16, but for the sides.
_CUT = {"height": SIDE, "width": SIDE}
_DINOV2 = {
    "image_processor_type": "BitImageProcessor",
    "resample": 3,
    "size": {"shortest_edge": SIDE},
    "crop_size": _CUT,
}
PROCESSORS = {
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": {"image_processor_type": "DINOv3ViTImageProcessorFast", "resample": 2, "size": _CUT},
    "vit": {"feature_extractor_type": "ViTFeatureExtractor", "resample": 2, "size": SIDE},
}
DRAWS = np.random.default_rng(0)
IMAGES = DRAWS.integers(30, 226, (12, 3, SIDE, SIDE), dtype=np.uint8)
CEILING = 20 * np.log10(255) + 10 * np.log10(3 * SIDE * SIDE)

pytestmark = pytest.mark.usefixtures("one_thread")


def noisy(levels: int) -> NDArray[np.uint8]:
    """The images, each value so many levels off, or none."""
    return (IMAGES + DRAWS.integers(-1, 2, IMAGES.shape) * levels).astype(np.uint8)


def write_dino(folder: Path, kind: str = "dinov2", seed: int = 0) -> Path:
    """Write a DINO with random weights, in the files that facebook/dinov2-base has; return its folder."""
    from transformers import AutoConfig, AutoModel, ViTModel

    folder.mkdir()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
    config = AutoConfig.for_model(kind, **sizes, intermediate_size=32, initializer_range=0.5)
    torch.manual_seed(seed)
    model = ViTModel(config, add_pooling_layer=False) if kind == "vit" else AutoModel.from_config(config)
    model.save_pretrained(folder)
    processor = PROCESSORS[kind] | {"image_mean": MEAN, "image_std": DEVIATION}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dino(tmp_path_factory.mktemp("models") / "dino-tiny.v2")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


def row(
    folder: Path, images: NDArray[np.uint8], spec: LikenessSpec, prompts: int = 0, batches: tuple[int, ...] = (5, 7)
) -> Path:
    """Write what a row leaves of images, which were drawn in parts; of so many prompts in turn, or of classes."""
    folder.mkdir()
    inputs = {"text": None} if prompts else {}
    context = SimpleNamespace(params=SimpleNamespace(likeness=spec, keep_samples=False), inputs=inputs)
    judges, scores, labels = Judges(context, ["likeness"], None, CPU), Scores(), torch.arange(12) % (prompts or 12)  # type: ignore[arg-type]
    arrays: dict[str, list[NDArray[np.generic]]] = {}
    for end, count in zip(np.cumsum(batches).tolist(), batches, strict=True):
        verdict = judges.look(images[end - count : end], labels[end - count : end], end - count)
        scores.add(verdict)
        for name, rows in verdict.arrays().items():
            arrays.setdefault(name, []).append(rows)
    for name, parts in arrays.items():
        np.save(folder / f"{name}.npy", np.concatenate(parts))
    scores.write(folder)
    return folder


# -- the figures


def test_psnr_is_that_of_the_formula() -> None:
    others = noisy(20)
    squares = ((IMAGES.astype(float) - others) ** 2).mean((1, 2, 3))
    assert psnr(IMAGES, others) == pytest.approx(10 * np.log10(255**2 / squares))
    assert psnr(np.zeros_like(IMAGES), np.full_like(IMAGES, 255)) == pytest.approx(np.zeros(12))


def test_equal_images_count_as_if_one_value_were_one_level_off() -> None:
    nearest = IMAGES.copy()
    nearest[0, 0, 0, 0] += 1
    assert psnr(IMAGES, IMAGES) == pytest.approx(np.full(12, CEILING))
    assert psnr(nearest, IMAGES)[0] == pytest.approx(CEILING)


def test_a_row_that_is_the_rootstocks_is_at_the_ceiling_and_a_noisier_one_is_lower(
    dino: Path, clip: Path, tmp_path: Path
) -> None:
    spec = LikenessSpec(dino=DinoSpec(path=str(dino)), clip=ClipSpec(path=str(clip)))
    names = ("rootstock", "same", "near", "far")
    rootstock, *rows = (
        row(tmp_path / name, images, spec)
        for name, images in zip(names, (IMAGES, IMAGES, noisy(3), noisy(30)), strict=True)
    )
    same, near, far = (LikenessJudge.beside(one, rootstock) for one in rows)
    figures = ("psnr", "dino:dino-tiny-v2", "clip:clip")
    assert list(same) == [
        f"{part}:{name}" for name in figures for part in ("likeness", "likeness_low", "likeness_high")
    ]
    assert list(same.values()) == pytest.approx([CEILING] * 3 + [1] * 6)
    for name in figures:
        assert same[f"likeness:{name}"] > near[f"likeness:{name}"] > far[f"likeness:{name}"]
        assert far[f"likeness_low:{name}"] < far[f"likeness:{name}"] < far[f"likeness_high:{name}"]


def test_the_cosine_is_that_of_the_class_tokens(dino: Path, tmp_path: Path) -> None:
    from transformers import Dinov2Model

    spec, model, others = (
        LikenessSpec(dino=DinoSpec(path=str(dino))),
        Dinov2Model.from_pretrained(dino).eval(),
        noisy(60),
    )

    def vectors(images: NDArray[np.uint8]) -> list[NDArray[np.float64]]:
        pixels = (images.transpose(0, 2, 3, 1) / 255 - MEAN) / DEVIATION
        with torch.no_grad():
            tokens = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float()).pooler_output
        return [unit(vector) for vector in tokens.double().numpy()]

    wanted = [one @ other for one, other in zip(vectors(IMAGES), vectors(others), strict=True)]
    rootstock, other = row(tmp_path / "rootstock", IMAGES, spec), row(tmp_path / "row", others, spec)
    figures = LikenessJudge.beside(other, rootstock)
    assert figures["likeness:dino:dino-tiny-v2"] == pytest.approx(np.mean(wanted), abs=1e-5)
    assert np.mean(wanted) < 0.99


@pytest.mark.parametrize("kind", ["vit", "dinov2_with_registers", "dinov3_vit"])
def test_every_dino_sees_by_its_class_token(kind: str, tmp_path: Path) -> None:
    network = Dino(str(write_dino(tmp_path / kind, kind)), CPU)
    vectors = network.image_vectors([Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in IMAGES])
    assert vectors.shape == (12, 16) and torch.allclose(vectors.norm(dim=1), torch.ones(12))
    assert len(vectors.unique(dim=0)) == 12


def test_a_row_drawn_in_other_parts_leaves_the_same(tmp_path: Path) -> None:
    spec = LikenessSpec(samples=8)
    one, other = (
        row(tmp_path / str(number), IMAGES, spec, batches=batches) for number, batches in enumerate([(12,), (3, 3, 6)])
    )
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    assert files == {path.name: path.read_bytes() for path in other.iterdir()}
    assert np.array_equal(np.load(one / "likeness.images.npy"), IMAGES[:8])


def test_the_interval_is_over_prompts_if_there_are_some(tmp_path: Path) -> None:
    """Images of a prompt that are alike say no more of it than one of them does."""
    others = IMAGES.copy()
    others[::2] = noisy(40)[::2]  # of two prompts, the first one's
    widths = []
    for name, prompts in (("texts", 2), ("classes", 0)):
        spec, folder = LikenessSpec(), tmp_path / name
        folder.mkdir()
        rootstock = row(folder / "rootstock", IMAGES, spec, prompts)
        figures = LikenessJudge.beside(row(folder / "row", others, spec, prompts), rootstock)
        widths.append(figures["likeness_high:psnr"] - figures["likeness_low:psnr"])
    assert widths[0] > 1.5 * widths[1] > 0


def test_a_grey_image_is_seen_as_one_of_colours(clip: Path, dino: Path) -> None:
    context = SimpleNamespace(
        params=SimpleNamespace(
            likeness=LikenessSpec(dino=DinoSpec(path=str(dino)), clip=ClipSpec(path=str(clip))), keep_samples=True
        ),
        inputs={},
    )
    judge = LikenessJudge(context, None, CPU)  # type: ignore[arg-type]
    grey = IMAGES[:, :1]
    seen, wanted = (judge.look(images, torch.arange(12)) for images in (grey, grey.repeat(3, 1)))
    assert "images" not in seen.arrays  # which the row keeps anyway
    assert all(np.array_equal(seen.arrays[name], wanted.arrays[name]) for name in ("dino", "clip"))


# -- in a job


def refusal(*overrides: str) -> str:
    """What the tiny job is refused with before anything runs."""
    with pytest.raises(SpecError) as caught:
        preflight.check(load(TINY, ["evaluate.metrics=[classifier, likeness]", *overrides]))
    (line,) = caught.value.lines
    return line


def test_a_job_without_the_rootstocks_row_is_refused() -> None:
    line = refusal("evaluate.rows=[stage2]")
    assert line.startswith("evaluate.rows: got ['stage2']; accepted: with metrics [likeness], rootstock among them")


def test_what_is_no_dino_is_refused_before_anything_runs(dino: Path, clip: Path, tmp_path: Path) -> None:
    none = tmp_path / "none"
    for path, got in ((clip, f"{str(clip)!r}, whose config.json says 'clip'"), (none, f"{str(none)!r}, no such file")):
        assert refusal(f"evaluate.likeness.dino={{kind: dino, path: {path}}}").startswith(
            f"evaluate.likeness.dino.path: got {got}; accepted: "
        )
    assert refusal(f"evaluate.likeness.clip={{kind: clip, path: {dino}}}").startswith(
        "evaluate.likeness.clip.path: got"
    )
    preflight.check(load(TINY, ["evaluate.metrics=[likeness]", f"evaluate.likeness.dino={{kind: dino, path: {dino}}}"]))


def test_a_row_is_drawn_anew_for_what_it_keeps_and_not_for_other_rows(dino: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(dino, tmp_path / dino.name)
    (tmp_path / "other").mkdir()
    other = write_dino(tmp_path / "other" / dino.name, seed=1)

    def keys(*overrides: str) -> dict[str, str]:
        return {step.name: step.key for step in make_plan(load(TINY, overrides)).steps}

    def changed(*overrides: str, since: dict[str, str]) -> set[str]:
        new = keys("evaluate.metrics=[classifier, likeness]", *overrides)
        return {name for name in since if since[name] != new[name]}

    def seen_by(path: Path) -> str:
        return f"evaluate.likeness.dino={{kind: dino, path: {path}}}"

    rows = {f"evaluate/{row}" for row in ("rootstock", "stage1", "stage2", "random_init")} | {"evaluate"}
    assert changed(since=keys()) == rows
    before = keys("evaluate.metrics=[classifier, likeness]", seen_by(dino))
    assert changed(seen_by(moved), since=before) == set()
    assert changed(seen_by(other), since=before) == rows
    assert changed(seen_by(dino), "evaluate.likeness.samples=20", since=before) == rows
    assert changed(seen_by(dino), "finetune.lr=1e-4", since=before) & rows == rows - {
        "evaluate/rootstock",
        "evaluate/stage1",
    }


# -- the Frechet distance on a DINO's features


def test_the_distance_is_that_of_the_class_tokens(dino: Path, tmp_path: Path) -> None:
    from scipy.linalg import sqrtm
    from transformers import AutoModel

    draws = np.random.default_rng(3)
    images, others = (draws.integers(0, 256, (count, 3, SIDE, SIDE), np.uint8) for count in (40, 60))
    np.savez(tmp_path / "others.npz", arr_0=others.transpose(0, 2, 3, 1))
    params = SimpleNamespace(dino=DinoSpec(path=str(dino)))
    context: Any = SimpleNamespace(params=params, device=CPU, inputs={})
    judges, scores = Judges(context, ["fd_dino"], None, CPU), Scores()
    for part in (images[:15], images[15:]):
        scores.add(judges.look(part, torch.zeros(len(part))))
    scores.write(tmp_path)
    reference = JUDGES["fd_dino"].read_reference(context, tmp_path / "others.npz", "", None, lambda *_: None)
    (figure,) = JUDGES["fd_dino"].figures(read_summary(tmp_path, "fd_dino"), Summary(reference)).items()

    def features(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
        scaled = (torch.from_numpy(pixels).double() / 255 - mean) / deviation
        with torch.no_grad():
            tokens = AutoModel.from_pretrained(dino)(pixel_values=scaled.float()).last_hidden_state
        return tokens[:, 0].double().numpy()

    first, second = features(images), features(others)
    covariances = [np.cov(one, rowvar=False) for one in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    wanted = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert figure[0] == "fd_dino:dino-tiny-v2" and figure[1] == pytest.approx(wanted, rel=1e-4)


def test_what_a_distance_on_dino_lacks_is_one_line_and_its_network_is_in_the_keys(dino: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, SIDE, SIDE, 3), np.uint8))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4))

    def asked(reference: str, *more: str) -> list[str]:
        return ["evaluate.metrics=[fd_dino]", f"evaluate.reference={tmp_path / reference}", *more]

    seen = f"evaluate.dino={{kind: dino, path: {dino}}}"
    with pytest.raises(SpecError, match=r"evaluate.dino: got nothing; accepted: with metrics \[fd_dino\], a DINO"):
        load(TINY, asked("images.npz"))
    with pytest.raises(ValueError, match=r"statistics.npz without arr_0; accepted: with metrics \[fd_dino\], a folder"):
        check_reference_file(str(tmp_path / "statistics.npz"), ["fd_dino"])
    check_reference_file(str(tmp_path / "images.npz"), ["fd_dino"])
    preflight.check(load(TINY, asked("images.npz", seen)))
    (tmp_path / "other").mkdir()
    other = f"evaluate.dino={{kind: dino, path: {write_dino(tmp_path / 'other' / dino.name, seed=1)}}}"
    plans = [
        {step.name: step.key for step in make_plan(load(TINY, asked("images.npz", one))).steps} for one in (seen, other)
    ]
    changed = {name for name in plans[0] if plans[0][name] != plans[1][name]}
    assert changed >= {"reference/fd_dino", "reference/heldout", "evaluate/rootstock", "evaluate"}
    assert not [name for name in changed if name.startswith(("base", "distill", "finetune"))]
