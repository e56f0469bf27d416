"""CLIP score, on a tiny random CLIP that is saved as the published ones are, held to a direct computation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from graftwork.pipeline.planning import preflight
from graftwork.pipeline.planning.plan import make_plan
from graftwork.specs.clip import ClipSpec
from graftwork.specs.codec import PixelCodec
from graftwork.specs.likeness import LikenessSpec
from graftwork.specs.problems import SpecError
from graftwork.specs.reading.load import load
from graftwork.specs.resources import StepResources
from graftwork.specs.sampler import DdimSampler
from graftwork.stages.catalog.evaluate import SampleParams
from graftwork.stages.evaluation import bootstrap, samples
from graftwork.stages.evaluation.clip import Clip
from graftwork.stages.evaluation.judges import Scores, Verdict, read_summary
from graftwork.stages.evaluation.metrics import Summary
from graftwork.stages.evaluation.metrics.clip_score import ClipScoreJudge
from tests.clips import prepared, write_clip
from tests.conftest import TINY
from tests.scenes import write_shapes_job

CPU = torch.device("cpu")
TEXTS = ["a red cup", "two green dogs", "a cat left of a tree", "blue"]
NUM_CAPTIONS = 3  # of the data, whose labels come before those of the prompts
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 3, 24, 24), dtype=np.uint8)
LABELS = torch.arange(12) % 4 + NUM_CAPTIONS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "clip-tiny.v1")


@pytest.fixture
def judge(clip: Path, tmp_path: Path) -> ClipScoreJudge:
    """Of texts with 3 captions and the prompts behind them."""
    meta = {"channels": 1, "tokens": 1, "captions": NUM_CAPTIONS, "prompts": TEXTS}
    (tmp_path / "texts.json").write_text(json.dumps(meta))
    inputs = {"text": SimpleNamespace(path=lambda: tmp_path)}
    context = SimpleNamespace(inputs=inputs, params=SimpleNamespace(clip=ClipSpec(path=str(clip))))
    return ClipScoreJudge(context, None, CPU)  # type: ignore[arg-type]


def direct(clip: Path) -> NDArray[np.float64]:
    """The score of each image with its text, one pair at a time, from the logits of transformers' own model."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    cosines = []
    for number, pixels in enumerate(IMAGES):
        picture = prepared(Image.fromarray(pixels.transpose(1, 2, 0)))
        with torch.no_grad():
            out = model(**tokenizer([TEXTS[number % 4]], return_tensors="pt"), pixel_values=picture)
            cosines.append(float(out.logits_per_image / model.logit_scale.exp()))
    return 100 * np.maximum(cosines, 0)


def test_a_rows_score_is_that_of_a_direct_computation(judge: ClipScoreJudge, clip: Path, tmp_path: Path) -> None:
    wanted, scores = direct(clip), Scores()
    assert (wanted == 0).any() and (wanted > 10).any()  # both sides of the bound, or it would not show
    for part in (slice(0, 5), slice(5, 12)):
        scores.add(Verdict(len(LABELS[part]), {"clip_score": judge.look(IMAGES[part], LABELS[part])}))
        scores = Scores.of_state(scores.state(), ["clip_score"])  # as if it had been killed and resumed
    scores.write(tmp_path)
    figures = ClipScoreJudge.figures(read_summary(tmp_path, "clip_score"), Summary(None))
    assert figures == {"clip_score:clip-tiny-v1": pytest.approx(wanted.mean(), abs=1e-3)}
    lines = [json.loads(line) for line in (tmp_path / "clip_score.jsonl").read_text().splitlines()]
    assert [line["clip_score"] for line in lines] == pytest.approx(list(wanted), abs=1e-3)
    assert [line["filename"] for line in lines] == [f"{n % 4:05d}/samples/{n // 4:04d}.png" for n in range(12)]
    assert [line["prompt"] for line in lines] == TEXTS * 3


def test_a_text_of_more_tokens_than_the_model_reads_is_cut(clip: Path) -> None:
    network = Clip(str(clip), CPU)
    long, short = (" ".join("abc"[number % 3] for number in range(count)) for count in (120, 75))  # and its two ends
    torch.testing.assert_close(network.text_vectors([long]), network.text_vectors([short]))
    assert not torch.allclose(network.text_vectors([long]), network.text_vectors([short[:-4]]), atol=1e-3)


# -- beside the rootstock


def write_scores(folder: Path, scores: NDArray[np.float64]) -> Path:
    """Write a row's scores (P,n): of n images of each of P prompts, which samples take turns at."""
    folder.mkdir()
    lines = [
        json.dumps({"filename": f"{prompt:05d}/samples/0000.png", "prompt": "a", "clip_score": float(score)})
        for of_turn in scores.T
        for prompt, score in enumerate(of_turn)
    ]
    ClipScoreJudge.write_records(lines, folder)
    return folder


def test_the_gains_interval_is_that_of_the_prompts_gains(tmp_path: Path) -> None:
    draws = np.random.default_rng(1)
    hard = draws.normal(25, 8, (400, 1))  # how near images of a prompt come, in both rows
    gains = draws.normal(0.5, 1.0, (400, 1)) + draws.normal(0, 0.1, (400, 3))
    rootstock = write_scores(tmp_path / "rootstock", np.broadcast_to(hard, (400, 3)))
    figures = ClipScoreJudge.beside(write_scores(tmp_path / "row", hard + gains), rootstock)
    assert list(figures) == ["gain:clip_score", "gain_low:clip_score", "gain_high:clip_score"]
    gain, low, high = figures.values()
    half = 1.96 * gains.mean(1).std() / 400**0.5
    assert gain == pytest.approx(gains.mean())
    assert [gain - low, high - gain] == pytest.approx([half, half], rel=0.08)


def test_a_row_gains_nothing_over_itself(tmp_path: Path) -> None:
    row = write_scores(tmp_path / "row", np.random.default_rng(0).normal(25, 8, (5, 2)))
    assert set(ClipScoreJudge.beside(row, row).values()) == {0.0}


def test_many_prompts_are_drawn_in_parts_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, counts = np.random.default_rng(0).normal(size=30), np.full(30, 2)
    whole = bootstrap.resampled_means(sums, counts, np.random.default_rng(0), 101)
    monkeypatch.setattr(bootstrap, "MAX_DRAWN", 250)
    parts = bootstrap.resampled_means(sums, counts, np.random.default_rng(0), 101)
    assert len(whole) == 101 and np.array_equal(whole, parts)


# -- in a job


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny job of scenes, in the folder from which its paths lead."""
    monkeypatch.chdir(tmp_path)
    return write_shapes_job(tmp_path)


def refusal(job: Path, *overrides: str) -> str:
    """What a job is refused with before anything runs."""
    with pytest.raises(SpecError) as caught:
        preflight.check(load(job, ["evaluate.metrics=[clip_score]", *overrides]))
    (line,) = caught.value.lines
    return line


def test_a_job_names_its_clip(job: Path) -> None:
    line = refusal(job)
    assert line == "evaluate.clip: got nothing; accepted: with metrics [clip_score], a CLIP, as {kind: clip, path: ..}"


def test_samples_of_classes_have_no_score(clip: Path) -> None:
    line = refusal(TINY, f"evaluate.clip={{kind: clip, path: {clip}}}")
    assert line.startswith("evaluate.metrics: got ['clip_score']; accepted: classifier, fid or likeness; a dit is told")


def test_what_is_no_clip_is_refused_before_anything_runs(clip: Path, job: Path, tmp_path: Path) -> None:
    encoder, none = tmp_path / "encoder" / "text_encoder", tmp_path / "none"
    line = refusal(job, f"evaluate.clip={{kind: clip, path: {encoder}}}")
    got = f"got {str(encoder)!r}, whose config.json says 't5'"
    assert line == f"evaluate.clip.path: {got}; accepted: a folder or hub id of a clip, as transformers reads it"
    line = refusal(job, f"evaluate.clip={{kind: clip, path: {none}}}")
    assert line.startswith(f"evaluate.clip.path: got {str(none)!r}, no such file; accepted: ")
    preflight.check(load(job, ["evaluate.metrics=[clip_score]", f"evaluate.clip={{kind: clip, path: {clip}}}"]))


def test_the_clips_content_is_in_the_keys_of_what_it_judges_and_its_place_is_not(
    clip: Path, job: Path, tmp_path: Path
) -> None:
    (tmp_path / "moved").mkdir()
    moved = shutil.copytree(clip, tmp_path / "moved" / clip.name)
    other = write_clip(tmp_path / clip.name, seed=1)

    def keys(*overrides: str) -> dict[str, str]:
        return {step.name: step.key for step in make_plan(load(job, overrides)).steps}

    without = keys()
    scored, again, else_ = (
        keys("evaluate.metrics=[geneval, clip_score]", f"evaluate.clip={{kind: clip, path: {path}}}")
        for path in (clip, moved, other)
    )
    judged = {"evaluate/rootstock", "evaluate/stage2", "evaluate"}
    assert scored == again
    assert {name for name in scored if scored[name] != else_[name]} == judged
    assert {name for name in scored if scored[name] != without[name]} == judged


def test_a_process_loads_all_that_a_row_is_judged_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two jobs that one process draws may differ in that alone."""
    for name in ("row_model", "network_of", "load_codec"):
        monkeypatch.setattr(samples, name, MagicMock())
    monkeypatch.setattr(samples, "Judges", loads := MagicMock())
    monkeypatch.setattr(samples, "_LOADED", {})
    first, second = LikenessSpec(samples=2), LikenessSpec(samples=3)
    for path, likeness in (("/first", first), ("/second", first), ("/second", second), ("/first", first)):
        params = SampleParams(
            seed=0,
            row="stage2",
            codec=PixelCodec(),
            samples=4,
            batch=2,
            metrics=("clip_score",),
            clip=ClipSpec(path=path),
            likeness=likeness,
            sampler=DdimSampler(steps=2),
        )
        samples._loaded(SimpleNamespace(params=params, inputs={}, resources=StepResources()), CPU)  # type: ignore[arg-type]
    assert loads.call_count == 3
