"""A row of the table: its samples are judged as they are drawn, and only sums are kept. Also of real images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.artifacts import Folder
from graftwork.models import checkpoints
from graftwork.models.condition import Condition
from graftwork.models.measures import inception_score
from graftwork.models.measures.classifier import Classifier
from graftwork.models.measures.frechet import Gaussian, distance
from graftwork.models.measures.inception_score import score_values
from graftwork.models.numerics.precision import allow_tf32
from graftwork.models.numerics.streams import generator
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.codec import PixelCodec
from graftwork.specs.evaluate import EvaluateSpec
from graftwork.specs.likeness import LikenessSpec
from graftwork.specs.resources import StepResources
from graftwork.specs.sampler import DdimSampler
from graftwork.specs.training import Precision
from graftwork.stages.artifacts.hybrids import row_model
from graftwork.stages.artifacts.latents import Latents, LatentsMeta, Shards, write_meta
from graftwork.stages.catalog.evaluate import EvaluateParams, SampleParams
from graftwork.stages.catalog.reference import GivenFeaturesParams, HeldoutParams, TrainingStatisticsParams
from graftwork.stages.contract import Context, Stopped
from graftwork.stages.evaluation import evaluate, inception, reference
from graftwork.stages.evaluation import samples as rows
from graftwork.stages.evaluation.judges import read_summary
from graftwork.stages.evaluation.metrics.fid import FidJudge
from graftwork.stages.evaluation.metrics.likeness import LikenessJudge
from graftwork.stages.pictures import pictures
from tests.products import Products
from tests.small import PixelFeatures, lively, noting
from tests.stores import KEY

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SIDE, CLASSES = 8, ("a", "b", "c")
SAMPLES, BATCH = 50, 8


@pytest.fixture(scope="module", autouse=True)
def _nothing_stays_loaded() -> Iterator[None]:
    yield
    rows._LOADED.clear()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    """Latents that are pixels, a rootstock and a classifier."""
    home = tmp_path_factory.mktemp("inputs")
    made = {name: Folder(name, home / name) for name in ("features", "base", "classifier")}
    for one in made.values():
        one.place.mkdir()
    meta = LatentsMeta(codec="pixel", shape=(1, SIDE, SIDE), classes=CLASSES, num_training=600, num_heldout=300)
    write_meta(made["features"].place, meta)
    for split, count in (("training", 600), ("heldout", 300)):
        pixels = torch.rand(count, 1, SIDE, SIDE, generator=generator(0, split)) * 2 - 1
        np.save(made["features"].place / f"{split}_latents.npy", pixels.numpy())
        np.save(made["features"].place / f"{split}_labels.npy", np.arange(count) % len(CLASSES))
    config = DiTConfig(input_size=SIDE, in_channels=1, patch=4, depth=1, width=16, heads=2, num_classes=len(CLASSES))
    checkpoints.save(lively(DiT(config)), (), made["base"].place)
    save_file(
        lively(Classifier(1, SIDE, len(CLASSES))).state_dict(), made["classifier"].place / "classifier.safetensors"
    )
    return made


@pytest.fixture
def context(inputs: dict[str, Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """A step that draws the rootstock's row in this process."""

    def here(work: Callable[..., Any], shared: Any, items: Iterable[Any], _: StepResources) -> Iterator[Any]:
        return (work(shared, item, CPU) for item in items)

    def drawn(images: NDArray[np.uint8], labels: list[str], title: str, path: Path) -> None:
        path.with_suffix(".png").write_bytes(images.tobytes())  # a second less than a picture takes

    monkeypatch.setattr(rows, "fan_out", here)
    monkeypatch.setattr(pictures, "sample_grid", drawn)
    return Context(
        step="evaluate/rootstock",
        params=SampleParams(
            seed=0,
            row="rootstock",
            codec=PixelCodec(),
            samples=SAMPLES,
            batch=BATCH,
            metrics=("classifier",),
            sampler=DdimSampler(steps=2),
        ),
        inputs=inputs,
        out=folder(tmp_path / "out"),
        partial=Store(str(tmp_path / "store")).partial(KEY),
        report=lambda done, total, metrics=None: None,
        resources=StepResources(),
        device=CPU,
    )


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def keeping(context: Context) -> Context:
    return replace(context, params=context.params.model_copy(update={"keep_samples": True}))


def compared(context: Context) -> Context:
    """A row whose first samples, of whole batches and a part of one, are held against the rootstock's."""
    update = {"metrics": ("classifier", "likeness"), "likeness": LikenessSpec(samples=2 * BATCH + 3)}
    return replace(context, params=context.params.model_copy(update=update))


def stopped_at(context: Context, batch: int) -> None:
    """Have the step stop, with what it has saved, after so many batches."""
    asked = iter([False] * (batch - 1) + [True] * 2)
    with pytest.raises(Stopped):
        rows.sample_row(replace(context, stopping=lambda: next(asked)))


def files(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(place.iterdir())}


def judge(context: Context) -> Classifier:
    return reference.Judges(context, ("classifier",), None, CPU).judges["classifier"].network  # type: ignore[attr-defined]


def at_once(context: Context, images: NDArray[np.uint8]) -> tuple[Gaussian, NDArray[np.int64]]:
    """The statistics of all images' features in one pass, and the labels that the classifier reads."""
    with torch.no_grad():
        features = judge(context).features((torch.from_numpy(images).float() - 128) / 127.5)
        read = judge(context).head(features).argmax(1).numpy()
    seen = features.double().numpy()
    return Gaussian(seen.mean(0), np.cov(seen, rowvar=False)), read


def assert_equal_to_1e6(found: Gaussian, expected: Gaussian) -> None:
    assert np.abs(found.mu - expected.mu).max() <= 1e-6 * np.abs(expected.mu).max()
    assert np.abs(found.sigma - expected.sigma).max() <= 1e-6 * np.abs(expected.sigma).max()


def test_the_figures_of_a_row_are_those_of_all_its_samples_at_once(context: Context) -> None:
    context = keeping(context)
    rows.sample_row(context)
    samples, labels = (np.load(context.out / f"{name}.npy") for name in ("samples", "labels"))
    assert samples.shape == (SAMPLES, 1, SIDE, SIDE) and labels.tolist() == [i % 3 for i in range(SAMPLES)]
    found, (expected, read) = Gaussian.read(context.out / "classifier.npz"), at_once(context, samples)
    assert_equal_to_1e6(found, expected)
    held_against, _ = at_once(context, np.random.default_rng(0).integers(0, 256, samples.shape).astype(np.uint8))
    assert distance(found, held_against) == pytest.approx(distance(expected, held_against), rel=1e-6)
    scores = json.loads((context.out / "scores.json").read_text())
    assert scores == {"samples": SAMPLES, "agreement": (read == labels).mean()}


def test_without_being_asked_for_no_sample_is_kept_but_those_of_the_picture(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    came_back: list[int] = []

    def note(progress: rows.Progress, drawn: rows.Drawn) -> None:
        came_back.append(len(drawn.in_picture) + sum(map(len, drawn.arrays.values())))

    monkeypatch.setattr(rows.Progress, "add", noting(note, rows.Progress.add))
    rows.sample_row(context)
    assert set(files(context.out)) == {"classifier.npz", "scores.json", "grid.png"}
    assert came_back == [8, 8, 8, 8, 8, 0, 0]


def test_a_row_keeps_the_samples_that_are_held_against_the_rootstocks_once(context: Context, tmp_path: Path) -> None:
    rows.sample_row(compared(context))
    assert set(files(context.out)) == {"classifier.npz", "scores.json", "grid.png"} | {
        f"likeness.{name}.npy" for name in ("images", "classes")
    }
    both = replace(keeping(compared(context)), out=folder(tmp_path / "both"), partial=Store(str(tmp_path)).partial(KEY))
    rows.sample_row(both)
    assert set(files(both.out)) - set(files(context.out)) == {"samples.npy", "labels.npy"}
    assert set(files(context.out)) - set(files(both.out)) == {"likeness.images.npy"}
    images, every = np.load(context.out / "likeness.images.npy"), np.load(both.out / "samples.npy")
    assert len(images) == 2 * BATCH + 3 and np.array_equal(images, every[: len(images)])
    ceiling = 20 * np.log10(255) + 10 * np.log10(SIDE * SIDE)
    figures = LikenessJudge.beside(both.out, context.out)
    assert list(figures) == ["likeness:psnr", "likeness_low:psnr", "likeness_high:psnr"]
    assert list(figures.values()) == pytest.approx([ceiling] * 3)


@pytest.mark.parametrize("keep", ["sums", "the first samples", "all samples", "both"])
@pytest.mark.parametrize("batch", [1, 3, 6])
def test_a_row_that_was_stopped_ends_in_the_bits_of_one_that_was_not(
    context: Context, tmp_path: Path, batch: int, keep: str
) -> None:
    context = keeping(context) if keep in ("all samples", "both") else context
    context = compared(context) if keep in ("the first samples", "both") else context
    rows.sample_row(context)
    again = replace(context, out=folder(tmp_path / "again"), partial=Store(str(tmp_path / "other")).partial(KEY))
    stopped_at(again, batch)
    begun: list[int] = []
    rows.sample_row(replace(again, report=lambda done, total, metrics=None: begun.append(done)))
    assert begun[0] == batch * BATCH  # it went on from there
    assert files(again.out) == files(context.out)


def test_a_kill_between_two_checkpoints_goes_back_to_the_first(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "SAVE_SECONDS", 0.0)
    rows.sample_row(context)
    again = replace(context, out=folder(tmp_path / "again"), partial=Store(str(tmp_path / "other")).partial(KEY))
    stopped_at(again, 2)
    monkeypatch.setattr(rows, "SAVE_SECONDS", 1e9)

    class Killed(BaseException):
        pass

    def die(done: int, total: int, metrics: object = None) -> None:
        if done > 4 * BATCH:
            raise Killed

    with pytest.raises(Killed):
        rows.sample_row(replace(again, report=die))
    begun: list[int] = []
    rows.sample_row(replace(again, report=lambda done, total, metrics=None: begun.append(done)))
    assert begun[0] == 2 * BATCH
    assert files(again.out) == files(context.out)


def test_a_kept_sample_that_was_damaged_is_drawn_again(context: Context, tmp_path: Path) -> None:
    context = keeping(context)
    rows.sample_row(context)
    again = replace(context, out=folder(tmp_path / "again"), partial=Store(str(tmp_path / "other")).partial(KEY))
    stopped_at(again, 3)
    path = again.partial.load("samples-0000008.npy")
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    begun: list[int] = []
    rows.sample_row(replace(again, report=lambda done, total, metrics=None: begun.append(done)))
    assert begun[0] == 0
    assert files(again.out) == files(context.out)


def test_features_of_every_sample_and_sums_over_splits_are_kept_through_a_stop(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows._LOADED.clear()
    monkeypatch.setattr(inception.Inception, "shared", classmethod(lambda *_: PixelFeatures()))
    monkeypatch.setattr(inception_score, "SPLIT_IMAGES", 20)  # not a multiple of a batch
    metrics = ("is", "kid", "precision_recall")
    context = keeping(replace(context, params=context.params.model_copy(update={"metrics": metrics})))
    rows.sample_row(context)
    again = replace(context, out=folder(tmp_path / "again"), partial=Store(str(tmp_path / "other")).partial(KEY))
    stopped_at(again, 3)
    rows.sample_row(again)
    assert files(again.out) == files(context.out)
    pixels = np.load(context.out / "samples.npy")
    rows_of_kid = read_summary(context.out, "kid").rows
    assert rows_of_kid is not None and np.array_equal(rows_of_kid, PixelFeatures().pool3(pixels).float().numpy())
    splits = read_summary(context.out, "is").splits
    assert splits is not None and splits.sizes() == [20, 20, 10]
    expected = score_values(PixelFeatures().logits(pixels))
    for place, sums in zip((0, 20, 40), splits.sums, strict=True):
        torch.testing.assert_close(sums, expected[place : place + 20].sum(0))
    rows._LOADED.clear()


def test_a_process_loads_the_model_of_a_row_once(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    rows._LOADED.clear()
    loads: list[str] = []
    monkeypatch.setattr(rows, "row_model", noting(lambda context, row, seed: loads.append(row), row_model))
    rows.sample_row(context)
    assert loads == ["rootstock"]


@pytest.mark.parametrize("asked", [False, True])
def test_the_network_is_compiled_where_that_is_asked_for(
    context: Context, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    rows._LOADED.clear()
    compiled: list[object] = []

    def as_it_is(model: nn.Module, dynamic: bool) -> nn.Module:
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", as_it_is)
    rows.sample_row(replace(context, params=context.params.model_copy(update={"compile": asked})))
    assert [type(model) for model in compiled] == [DiT] * asked
    rows._LOADED.clear()


@pytest.mark.parametrize(
    ("samples", "labels"),
    [
        (4, [0, 2, 5, 7]),
        (10, list(range(10))),
        (13, [*range(10), 0, 3, 6]),
        (30, [i % 10 for i in range(30)]),
    ],
)
def test_labels_of_a_turn_that_is_not_full_are_spread_over_all_classes(samples: int, labels: list[int]) -> None:
    assert rows.labels_of(range(samples), samples, 10).tolist() == labels
    assert rows.labels_of(range(2, 4), samples, 10).tolist() == labels[2:4]


def test_fewer_samples_than_classes_are_drawn_of_classes_all_over(context: Context) -> None:
    few = keeping(replace(context, params=context.params.model_copy(update={"samples": 2})))
    rows.sample_row(few)
    labels = np.load(few.out / "labels.npy").tolist()
    assert labels == rows.labels_of(range(2), 2, len(CLASSES)).tolist() == [0, 1]


def test_the_picture_shows_classes_all_over_where_it_has_no_room_for_all() -> None:
    assert rows.picture_samples_of(50_000, 1000, 40) == list(range(0, 1000, 25))
    assert rows.picture_samples_of(50_000, 10, 40) == list(range(40))
    assert rows.picture_samples_of(7, 1000, 40) == list(range(7))
    assert rows.picture_samples_of(60, 1000, 40)[-1] == 58


def test_samples_of_the_picture_are_taken_from_whichever_batch_has_them(context: Context) -> None:
    params = context.params.model_copy(update={"samples": 10, "batch": 4})
    assert [batch.in_picture for batch in rows.batches_of(params, [0, 3, 5, 9])] == [(0, 3), (1,), (1,)]
    shown = rows.sample_batch(context, rows.Batch(range(8), (1, 6)), CPU).in_picture
    every = rows.sample_batch(keeping(context), rows.Batch(range(8), ()), CPU).arrays[rows.ALL_SAMPLES]
    assert np.array_equal(shown, every[[1, 6]])


def test_held_out_images_that_are_fewer_than_the_classes_are_spread_over_them() -> None:
    labels = torch.arange(100) % 10
    for x in (torch.arange(100), Shards([torch.arange(60), torch.arange(60, 100)])):
        held = Latents(x, Condition(labels=labels), x)
        assert held.spread(4).labels.tolist() == [0, 2, 5, 7]
        found = held.spread(23)
        assert found.tensor().tolist() == [*range(20), 20, 23, 26] and len(found.labels) == 23
        assert found.mirrored is not None and len(found.mirrored) == 23
        for count in (20, 100, 1000):
            assert torch.equal(held.spread(count).tensor(), held.first(count).tensor())
        assert held.stratified(4).labels.tolist() == held.share(0.04).labels.tolist() == [0, 2, 5, 7]
        assert held.stratified(23).labels.tolist() == [i % 10 for i in range(23)]


def as_images(context: Context, split: str, count: int) -> NDArray[np.uint8]:
    pixels = torch.from_numpy(np.load(context.input("features") / f"{split}_latents.npy"))[:count]
    return (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8).numpy()


def test_the_reference_is_the_training_images_at_once(context: Context) -> None:
    reference.run(replace(context, params=TrainingStatisticsParams(codec=PixelCodec())))
    assert set(files(context.out)) == {"classifier.npz"}
    expected, _ = at_once(context, as_images(context, "training", 600))
    assert_equal_to_1e6(Gaussian.read(context.out / "classifier.npz"), expected)


@pytest.mark.parametrize("samples", [270, 1000])
def test_the_row_of_real_images_has_as_many_as_are_sampled_or_all_there_are(context: Context, samples: int) -> None:
    params = HeldoutParams(codec=PixelCodec(), samples=samples, metrics=("classifier",), inception=None)
    reference.run(replace(context, params=params))
    count = min(samples, 300)
    expected, read = at_once(context, as_images(context, "heldout", count))
    assert_equal_to_1e6(Gaussian.read(context.out / "classifier.npz"), expected)
    scores = json.loads((context.out / "scores.json").read_text())
    assert scores == {"samples": count, "agreement": (read == np.arange(count) % 3).mean()}
    assert (context.out / "grid.png").stat().st_size > 0


def test_features_of_given_images_and_of_real_ones_are_kept(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception.Inception, "shared", classmethod(lambda *_: PixelFeatures()))
    pictures = np.random.default_rng(0).integers(0, 256, (300, 4, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "reference.npz", pictures)
    given = GivenFeaturesParams(features="pool3", reference=str(tmp_path / "reference.npz"))
    reference.run(replace(context, params=given))
    expected = PixelFeatures().pool3(pictures.transpose(0, 3, 1, 2)).float().numpy()
    assert np.array_equal(np.load(context.out / "pool3.npy"), expected)
    heldout = replace(context, out=folder(tmp_path / "heldout"))
    params = HeldoutParams(codec=PixelCodec(), samples=270, metrics=("kid", "precision_recall"))
    reference.run(replace(heldout, params=params))
    expected = PixelFeatures().pool3(as_images(context, "heldout", 270)).float().numpy()
    assert np.array_equal(np.load(heldout.out / "pool3.npy"), expected)


# -- precision, and what a model costs


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_samples_have_the_steps_precision_and_are_judged_in_fp32(context: Context, precision: Precision) -> None:
    params = context.params.model_copy(update={"precision": precision})
    context = replace(context, params=params)
    products = []
    for decoded_only in (True, False):
        with pytest.MonkeyPatch.context() as patch, Products() as counted:
            if decoded_only:
                patch.setattr(rows, "draw", lambda *_: torch.zeros(4, 1, SIDE, SIDE))
            allow_tf32(matrices=False, convolutions=False)  # as a task begins
            rows.sample_batch(context, rows.Batch(range(4), (0,)), CPU)
        products.append(counted.matrices + counted.convolutions)
    judged, everything = products
    assert set(judged) == {"fp32"}
    assert set(everything - judged) == {precision}


def costs_of(context: Context, **changes: Any) -> dict[str, float]:
    """The rootstock, measured."""
    recipe = EvaluateSpec(**{"samples": SAMPLES, "batch": BATCH, "sampler": DdimSampler(steps=2), **changes})
    params = EvaluateParams(seed=0, recipe=recipe)
    inputs = {**context.inputs, "rows/rootstock": context.inputs["base"]}
    table = evaluate._costs(replace(context, params=params, inputs=inputs), params, CPU)
    assert table["heldout"] == dict.fromkeys(evaluate.COSTS, 0)
    return table["rootstock"]


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_measured_is_what_samples_are_drawn_with(
    context: Context, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    passes, compiled_passes = list[int](), list[int]()
    forward, compiling = DiT.forward, torch.compile

    def noted(self: DiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if not x.is_meta and not torch.compiler.is_compiling():
            passes.append(len(x))
        return forward(self, x, t, y)

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:  # as traced, without machine code
        def run(*args: Tensor) -> Any:
            compiled_passes.append(max(len(value) for value in args if value.dim() == 4 and value.shape[-1] == SIDE))
            return graph.forward(*args)

        return run

    monkeypatch.setattr(DiT, "forward", noted)
    monkeypatch.setattr(torch, "compile", partial(compiling, backend=backend))
    costs_of(context, compile=compiled)
    rounds, ours, others = (
        evaluate.TIMED_RUNS + 1,
        *((compiled_passes, passes) if compiled else (passes, compiled_passes)),
    )
    assert others == []
    # Two steps of a guided sampling and a pass a round; and one for the memory.
    assert sorted(ours) == [BATCH] * (rounds + 1) + [2 * evaluate.TIMED_SAMPLES] * 2 * rounds


def test_the_weights_that_bf16_rounds_are_part_of_the_memory(context: Context) -> None:
    model, _ = checkpoints.load(context.inputs["base"].path())
    assert isinstance(model, DiT)
    rounded = (
        sum(value.numel() for value in model.parameters() if value.dim() > 1)
        - model.y_embedder.embedding_table.weight.numel()
    )
    found = costs_of(context, batch=1, precision="bf16")
    held = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    assert found["peak_memory"] > held + 2 * rounded


def test_the_root_of_covariances_is_taken_where_no_gpu_is_held_and_what_is_no_number_is_left_out(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, StepResources] = {}
    table = {"heldout": {"params": 0}, "rootstock": {"params": 7}}

    def here(work: Callable[..., Any], shared: Any, items: Iterable[Any], resources: StepResources) -> Iterator[Any]:
        held[work.__name__] = resources
        return iter([table]) if work is evaluate._costs else (work(shared, item, CPU) for item in items)

    monkeypatch.setattr(evaluate, "fan_out", here)
    shown: list[str] = []
    monkeypatch.setattr(evaluate, "quality_against_cost", lambda results, quality, path: shown.append(quality))
    found = iter([{"fid": 2.5}, {"fid": math.nan}])
    monkeypatch.setattr(FidJudge, "figures", staticmethod(lambda row, reference: next(found)))
    params = EvaluateParams(seed=0, recipe=EvaluateSpec(metrics=["fid"], reference="reference.npz"))
    inputs = {**context.inputs, "rows/rootstock": context.inputs["base"], "rows/heldout": context.inputs["base"]}
    inputs["reference/fid"] = context.inputs["base"]
    resources = StepResources(cpu=2, gpu=1, custom={"fast": 1})
    evaluate.run(replace(context, params=params, inputs=inputs, resources=resources))
    assert held == {"_costs": resources, "_quality": StepResources(cpu=2, custom={"fast": 1})}
    results = json.loads((context.out / "results.json").read_text())
    # What is no number is in no table, which could not be read then, and is told.
    assert results == {"heldout": {"fid": 2.5, "params": 0}, "rootstock": {"params": 7}} and shown == ["fid"]
    notes = json.loads((context.out / "notes.json").read_text())
    assert notes == ["rootstock: fid is nan, and left out of the table"]
