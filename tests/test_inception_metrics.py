"""The formulas of IS, precision and recall, and KID, held against others in plain numpy; and files of references.

What the network sees is in test_fid.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from graftwork.models.measures import inception_score, kid, precision_recall
from graftwork.models.measures.inception_score import SplitSums, inception_scores, score_values
from graftwork.models.measures.kid import subset_distances
from graftwork.models.measures.precision_recall import precision_recall_hits
from graftwork.pipeline.cli.app import app
from graftwork.specs.metrics import METRICS
from graftwork.stages.data.npz import npz_images
from graftwork.stages.evaluation.inception import Inception, check_reference_file
from graftwork.stages.evaluation.metrics import Summary
from graftwork.stages.evaluation.metrics.inception_score import InceptionScoreJudge
from graftwork.stages.evaluation.metrics.neighbours import KidJudge, PrecisionRecallJudge
from tests.small import PixelFeatures

CPU = torch.device("cpu")
DRAWS = np.random.default_rng(0)


def features(count: int, shift: float = 0.0, width: int = 8) -> NDArray[np.float32]:
    return (np.random.default_rng(count).normal(size=(count, width)) + shift).astype(np.float32)


def summary_of(row: NDArray[np.float32]) -> Summary:
    return Summary(None, rows=row)


# -- Inception Score


def scores_by_hand(logits: NDArray[np.float64], split: int) -> list[float]:
    """As the ADM suite's evaluator has it: softmax, then exp of the mean KL in each split, in the given order."""
    exp = np.exp(logits - logits.max(1, keepdims=True))
    p = exp / exp.sum(1, keepdims=True)
    scores = []
    for start in range(0, len(p), split):
        part = p[start : start + split]
        kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(np.mean(np.sum(kl, 1))))
    return scores


@pytest.mark.parametrize("batch", [3, 10, 64])
def test_the_inception_score_is_that_of_splits_in_the_given_order(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(inception_score, "SPLIT_IMAGES", 10)
    logits = DRAWS.normal(size=(27, 6)) * 3 + np.arange(27)[:, None] * np.arange(6) / 20  # the order matters
    splits = SplitSums()
    for part in torch.from_numpy(logits).split(batch):
        splits = splits.plus(score_values(part))
    assert splits.sizes() == [10, 10, 7]
    expected = scores_by_hand(logits, 10)
    np.testing.assert_allclose(inception_scores(splits), expected, rtol=1e-12)
    figures = InceptionScoreJudge.figures(Summary(None, splits=splits), Summary(None))
    assert figures == pytest.approx({"is": np.mean(expected), "is_sd": np.std(expected)}, rel=1e-12)


def test_the_spread_of_one_split_is_no_figure() -> None:
    splits = SplitSums().plus(score_values(torch.from_numpy(DRAWS.normal(size=(9, 4)))))
    assert list(InceptionScoreJudge.figures(Summary(None, splits=splits), Summary(None))) == ["is"]


# -- precision and recall


def hits_by_hand(samples: NDArray[Any], reference: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """With all distances at once, in float64."""

    def distances(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
        return ((first[:, None].astype(float) - second.astype(float)) ** 2).sum(2)

    def radii(one: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(np.sort(distances(one, one), 1)[:, 3])  # the first is its own

    between = distances(samples, reference)
    return np.any(between <= radii(reference), axis=1), np.any(between <= radii(samples)[:, None], axis=0)


@pytest.mark.parametrize("block", [7, 4096])
def test_precision_and_recall_are_those_of_all_distances_at_once(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(precision_recall, "BLOCK_IMAGES", block)
    samples, reference = features(60, 0.9), features(45)
    precise, recalled = precision_recall_hits(samples, reference, CPU)
    expected = hits_by_hand(samples, reference)
    assert 0.1 < expected[0].mean() < 0.9 and 0.1 < expected[1].mean() < 0.9
    assert np.array_equal(precise, expected[0]) and np.array_equal(recalled, expected[1])


def test_a_radius_ends_at_the_third_neighbour_and_precision_is_of_the_samples() -> None:
    """Reference images at 0, 1, 2, 3 on a line: radii 9, 4, 4, 9. Samples at 5.9, 6.1 and far away."""
    reference = np.array([[0.0], [1], [2], [3]], np.float32)
    samples = np.array([[5.9], [6.1], [100], [200], [300]], np.float32)
    figures = PrecisionRecallJudge.figures(summary_of(samples), summary_of(reference))
    assert figures["precision"] == 0.2  # 5.9 alone is within 3 of the image at 3
    assert figures["recall"] == 1.0  # 100 is the third neighbour of 6.1
    assert 0 <= figures["precision_low"] < 0.2 < figures["precision_high"] < 1
    assert figures["recall_low"] == figures["recall_high"] == 1


def test_distances_far_from_the_origin_keep_their_digits() -> None:
    samples, reference = features(60, 0.9) + np.float32(300), features(45) + np.float32(300)
    found, expected = precision_recall_hits(samples, reference, CPU), hits_by_hand(samples, reference)
    assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])


def test_rows_of_three_images_have_no_precision() -> None:
    assert PrecisionRecallJudge.figures(summary_of(features(3)), summary_of(features(9))) == {}


# -- KID


def mmd_by_hand(x: NDArray[Any], y: NDArray[Any]) -> float:
    """Eq. 4 of arXiv 1801.01401, pair by pair."""
    k = lambda a, b: (float(np.dot(a.astype(float), b.astype(float))) / len(a) + 1) ** 3  # noqa: E731
    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (n * (n - 1))
    return within - 2 * sum(k(x[i], y[j]) for i, j in pairs) / n**2


def test_kid_is_the_unbiased_estimate_of_the_cubic_kernel() -> None:
    samples, reference = features(12, 0.5, width=5), features(13, width=5)
    found = subset_distances(samples, reference[:12], CPU)
    assert found == pytest.approx(mmd_by_hand(samples, reference[:12]), rel=1e-10)
    # All subsets are the same.
    assert list(KidJudge.figures(summary_of(samples), summary_of(reference[:12]))) == [
        "kid"
    ]  # all subsets are the same


def test_kid_is_over_subsets_without_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kid, "SUBSET_IMAGES", 10)
    monkeypatch.setattr(kid, "NUM_SUBSETS", 3)
    drawn: list[NDArray[Any]] = []
    original = kid.unbiased_mmd

    def noted(first: torch.Tensor, second: torch.Tensor) -> float:
        drawn.extend([first.numpy(), second.numpy()])
        return original(first, second)

    monkeypatch.setattr(kid, "unbiased_mmd", noted)
    samples, reference = features(12), features(30)
    figures = KidJudge.figures(summary_of(samples), summary_of(reference))
    assert [part.shape for part in drawn] == [(10, 8)] * 6
    assert all(len(np.unique(part, axis=0)) == 10 for part in drawn)
    assert len({part.tobytes() for part in drawn}) == 6
    each = [mmd_by_hand(*drawn[at : at + 2]) for at in (0, 2, 4)]
    assert figures == pytest.approx({"kid": np.mean(each), "kid_sd": np.std(each)}, rel=1e-10)


# -- files of references


GIVEN = ("fid", "sfid", "precision_recall", "kid")
PIXELS = DRAWS.integers(0, 256, (5, 6, 4, 3)).astype(np.uint8)
SMALL = {"mu": np.zeros(2048), "sigma": np.zeros((2048, 2048), np.float16)}
LACKING: dict[str, tuple[dict[str, Any], str, str]] = {
    "statistics of pool3 alone": (SMALL, "sfid", "without mu_s, sigma_s; accepted: with metrics [sfid], an .npz with"),
    "a half": ({"mu_s": np.zeros(2023), "arr_0": PIXELS}, "sfid", "without sigma_s; accepted: with metrics [sfid], "),
    "spatial statistics alone": ({"mu_s": np.zeros(3), "sigma_s": np.zeros(3)}, "fid", "without mu, sigma; accepted: "),
    "no images": (SMALL, "kid", "without arr_0; accepted: with metrics [kid], a folder with images"),
    "images of floats": (
        {"arr_0": PIXELS / 255},
        "precision_recall",
        "arr_0 (5, 6, 4, 3) of float64; accepted: arr_0 ",
    ),
    "channels first": ({"arr_0": PIXELS.transpose(0, 3, 1, 2)}, "kid", "arr_0 (5, 3, 6, 4) of uint8; accepted: arr_0 "),
    "too few": (
        {"arr_0": PIXELS[:3]},
        "precision_recall",
        "with 3 images; accepted: with metrics [precision_recall], 4",
    ),
    "one": ({"arr_0": PIXELS[:1]}, "fid", "with 1 image; accepted: with metrics [fid], 2 or more"),
}


@pytest.mark.parametrize("how", LACKING)
def test_what_a_reference_lacks_is_one_line(tmp_path: Path, how: str) -> None:
    arrays, metric, problem = LACKING[how]
    path = tmp_path / "reference.npz"
    np.savez_compressed(path, **arrays)
    with pytest.raises(ValueError) as caught:
        check_reference_file(str(path), [metric])
    assert str(caught.value).startswith(str(path)) and problem in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_images_serves_every_metric_and_is_read_some_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    np.savez_compressed(path, PIXELS)
    check_reference_file(str(path), [name for name in GIVEN if METRICS[name].reference == "given"])
    batches = list(npz_images(str(path)).batches(2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert np.array_equal(np.concatenate(batches), PIXELS.transpose(0, 3, 1, 2))


def test_a_torn_file_of_images_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, PIXELS)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(PIXELS.tobytes()[:64], bytes(64)))
    with pytest.raises(ValueError, match=r"samples\.npz: arr_0 cannot be read \(BadZipFile\)"):
        list(npz_images(str(path)).batches(2))


# -- graft score


def scored(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["score", *arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one, with samples, references and Inception weights; Inception itself is some pixels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Inception, "shared", classmethod(lambda *_: PixelFeatures()))
    np.savez("samples.npz", PIXELS)
    np.savez("virtual.npz", arr_0=PIXELS[::-1] // 2, mu=np.zeros(2048), sigma=np.zeros(3))
    Path("weights.pth").touch()
    Path("images").mkdir()
    for number, picture in enumerate(PIXELS):
        Image.fromarray(picture).save(f"images/{number}.png")
    return tmp_path


def test_samples_of_a_file_and_of_a_folder_have_the_same_figures(folder: Path) -> None:
    asked = ("--reference", "virtual.npz", "--metrics", "is,precision_recall,kid", "--inception", "weights.pth")
    of_file, of_folder = (scored(samples, *asked, "--json") for samples in ("samples.npz", "images"))
    assert of_file.exit_code == 0, of_file.output
    assert of_file.stdout == of_folder.stdout
    pool3 = [PixelFeatures().pool3(part.transpose(0, 3, 1, 2)).float().numpy() for part in (PIXELS, PIXELS[::-1] // 2)]
    expected = PrecisionRecallJudge.figures(*map(summary_of, pool3)) | KidJudge.figures(*map(summary_of, pool3))
    figures = json.loads(of_file.stdout)
    assert figures.pop("is") == pytest.approx(
        scores_by_hand(PixelFeatures().logits(PIXELS.transpose(0, 3, 1, 2)).numpy(), 5)[0]
    )
    assert figures == pytest.approx(expected)


def test_what_a_reference_does_not_serve_is_left_out_in_a_line_each(folder: Path) -> None:
    np.savez("virtual.npz", arr_0=PIXELS, mu_s=np.zeros(2023))
    done = scored("samples.npz", "--reference", "virtual.npz", "--inception", "weights.pth")
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "is", "precision", "precision_low", "precision_high", "recall", "recall_low", "recall_high", "kid",
    ]  # fmt: skip
    left = [line for line in done.stderr.splitlines() if "left out" in line]
    assert [line.split()[1] for line in left] == ["fid", "sfid"]
    assert "virtual.npz without mu, sigma; accepted: " in left[0]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["none.npz", "--metrics", "is"], "samples: got none.npz: cannot be read as an .npz (FileNotFoundError); acc"),
        (["samples.npz", "--metrics", "lpips"], "metrics: got 'lpips'; accepted: fid, sfid, is, "),
        (["samples.npz", "--metrics", "kid"], "reference: got nothing; accepted: with metrics [kid], a folder with"),
        (
            ["samples.npz", "--metrics", "fid", "--reference", "virtual.npz"],
            "an .npz with mu and sigma (sigma has",
        ),
        (["samples.npz", "--metrics", "is", "--inception", "x"], "inception: got x, which does not exist; accepted: "),
    ],
)
def test_what_cannot_be_scored_is_one_line(folder: Path, arguments: list[str], line: str) -> None:
    done = scored("--inception", "weights.pth", *arguments)
    assert done.exit_code == 2 and done.stdout == ""
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1
