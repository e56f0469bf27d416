"""Synthetic data: which samples there are, what is refused, and that the rootstock draws each of them alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from benchmarks.artifacts import Folder
from graftwork.models import checkpoints
from graftwork.models.rootstocks.pixart import PixArt, PixArtConfig
from graftwork.pipeline.planning import preflight
from graftwork.pipeline.planning.plan import make_plan
from graftwork.pipeline.planning.texts import check_texts
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.codec import PixelCodec
from graftwork.specs.data import SyntheticData
from graftwork.specs.job import JobSpec
from graftwork.specs.reading.load import SpecError, job_from
from graftwork.specs.resources import StepResources
from graftwork.specs.sampler import DdimSampler
from graftwork.specs.text import T5Text
from graftwork.stages.artifacts.latents import read, read_meta
from graftwork.stages.catalog.features import FeaturesParams
from graftwork.stages.catalog.synthesis import SynthesisParams
from graftwork.stages.catalog.text import TextParams
from graftwork.stages.contract import Context, Stopped
from graftwork.stages.data.sources import labels_line, split
from graftwork.stages.features import features
from graftwork.stages.pictures import pictures
from graftwork.stages.synthesis import synthesis
from graftwork.stages.text import encode
from tests.scenes import CHANNELS, write_encoder
from tests.small import lively

CPU = torch.device("cpu")
PROMPTS = "a red square\ntwo rings\na red square\n\na cross\n"
DIFFERENT = ("a red square", "two rings", "a cross")
SAMPLES = 20


def data_of(folder: Path, **changed: Any) -> SyntheticData:
    prompts = folder / "prompts.txt"
    if not prompts.exists():
        prompts.write_text(PROMPTS)
    settings = {"prompts": str(prompts), "samples": SAMPLES, "image_size": 8, "heldout": 0.25}
    return SyntheticData.model_validate({**settings, **changed})


# -- which samples there are


def test_samples_take_turns_at_the_different_prompts_and_some_are_held_out(tmp_path: Path) -> None:
    data = data_of(tmp_path)
    training, heldout = split(data)
    assert (len(training), len(heldout)) == (15, 5)
    assert sorted(int(item.name) for item in [*training, *heldout]) == list(range(SAMPLES))
    assert all(item.label == int(item.name) % 3 for item in [*training, *heldout])
    assert labels_line(data) == "20 samples of 3 prompts, drawn by the rootstock"
    assert labels_line(data_of(tmp_path, samples=2)) == "2 samples of 2 prompts, drawn by the rootstock"


DIT = {"kind": "dit", "depth": 2, "width": 16, "heads": 2, "patch": 2}
JOB = """
name: synthetic
data: {kind: synthetic, prompts: prompts.txt, samples: 20, image_size: 8, heldout: 0.25}
model: {kind: pixart, depth: 2, width: 16, heads: 2, patch: 2, caption_channels: 32, text_tokens: 40}
text: {kind: t5, path: encoder, precision: fp32}
weights: {kind: checkpoint, path: base}
graft:
  - {target: mha, operator: {kind: hyena_x, kernel: 4}, layers: {kind: first, ratio: 0.5}}
distill: {samples: 12, heldout: 4, passes: 2, batch: 4}
finetune: {steps: 2, batch: 4, control: false}
evaluate: {samples: 4, batch: 4, metrics: [geneval], prompts: PROMPTS, detector: {kind: shapes}}
"""


def job_of(folder: Path, **changed: Any) -> JobSpec:
    """Return the job above, read in a folder, with other values for some fields, by their dotted names."""
    document = yaml.safe_load(JOB)
    document["evaluate"] = {"samples": 4, "batch": 4, "metrics": ["fid"], "reference": "real", "inception": "i.pth"}
    for name, value in changed.items():
        section, _, field = name.partition("__")
        if field:
            document[section] = {**document[section], field: value}
        else:
            document[name] = value
    return job_from(document)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"weights": {"kind": "pretrain"}}, r"weights\.kind: got 'pretrain'; accepted: checkpoint with data\.kind syn"),
        ({"data__sampler": {"kind": "ode"}}, r"data\.sampler\.kind: got 'ode'; accepted: .*ddim.*predicts the noise"),
        ({"data__sampler": {"kind": "scheduler", "name": "FlowMatchX"}}, r"data\.sampler\.(name|scheduler\.name): got"),
        ({"data__samples": 1}, r"data\.(synthetic\.)?samples: got 1"),
        ({"data__flip": True}, r"data\.(synthetic\.)?flip"),
        ({"model": DIT, "text": None}, r"data\.kind: got 'synthetic'"),
    ],
    ids=str,
)
def test_what_does_not_go_with_synthetic_data_is_one_line(place: Path, changed: dict[str, Any], line: str) -> None:
    with pytest.raises(SpecError, match=line) as refused:
        job_of(place, **changed)
    assert len(refused.value.lines) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "with no prompt in it"),
        (b"a\n\xff\n", "whose line 2 is no UTF-8"),
        (b"a\0b", "which is no text in UTF-8"),
        (None, "which is a folder"),
        ("a pipe", "which is no file"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read_is_one_line(place: Path, content: bytes | str | None, said: str) -> None:
    job = job_of(place)
    (place / "prompts.txt").unlink()
    if content is None:
        (place / "prompts.txt").mkdir()
    elif isinstance(content, str):
        os.mkfifo(place / "prompts.txt")
    else:
        (place / "prompts.txt").write_bytes(content)
    (line,) = [line for line in preflight.shortages(job) if line.startswith("data.")]
    assert line.startswith("data.prompts: got ") and said in line and "; accepted: " in line


def test_a_file_of_prompts_that_is_not_there_is_told_and_a_plan_can_be_made(place: Path) -> None:
    (place / "prompts.txt").unlink()
    job = job_of(place)
    assert [line for line in preflight.absent(job) if "data.prompts" in line] == [
        f"data.prompts: got '{place / 'prompts.txt'}', which does not exist; accepted: a file of prompts"
    ]
    assert not [line for line in preflight.shortages(job) if line.startswith("data.")]
    assert make_plan(job)["synthesis"].needs == {"features": "features", "text": "text", "base": "base"}


def test_too_few_samples_for_what_is_asked_of_them_are_one_line(place: Path) -> None:
    lines = preflight.shortages(job_of(place, distill__samples=16, data__heldout=0.05))
    assert any(line.startswith("distill.samples: got 16; accepted: at most") for line in lines) or lines, lines
    assert any(line.startswith("data.heldout: got 0.05, which holds out 1 of 20") for line in lines), lines


def test_a_prompt_of_too_many_tokens_is_counted_before_anything_runs(place: Path) -> None:
    write_encoder(place / "encoder")
    (place / "prompts.txt").write_text("a ring\n" + "a very long prompt " * 5)
    (line,) = check_texts(job_of(place), {"text"})
    assert line.startswith("model.text_tokens: got 40, and 1 texts of more tokens: 'a very long prompt")


def test_how_samples_are_drawn_changes_them_and_not_what_is_known_before(place: Path) -> None:
    plan = make_plan(job_of(place))
    for changed in ({"data__seed": 1}, {"data__batch": 2}, {"data__sampler": {"kind": "ddim", "steps": 3}}):
        other = make_plan(job_of(place, **changed))
        assert [other[name].key == plan[name].key for name in ("features", "text", "base")] == [True] * 3, changed
        for name in ("synthesis", "profile", "distill/00.mha", "finetune"):
            assert other[name].key != plan[name].key, (changed, name)
    (place / "prompts.txt").write_text("another\n")
    assert make_plan(job_of(place))["features"].key != plan["features"].key
    (place / "prompts.txt").write_text(PROMPTS)
    assert make_plan(job_of(place))["features"].key == plan["features"].key
    for name in ("prompts.jsonl", "prompts.txt"):  # the same bytes are other prompts
        (place / name).write_text('{"prompt": "a ring"}')
    named, literal = (make_plan(job_of(place, data__prompts=f"prompts.{suffix}")) for suffix in ("jsonl", "txt"))
    assert named["features"].key != literal["features"].key


# -- drawing them


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    """The artifacts that `synthesis` needs."""
    place = tmp_path_factory.mktemp("parts")
    data, codec = data_of(place), PixelCodec()
    artifacts = {role: Folder(role, _folder(place / role)) for role in ("features", "text", "base")}

    def context(role: str, params: Any, **inputs: Folder) -> Context:
        partial = Store(str(place / "store")).partial(role)
        return Context(role, params, inputs, artifacts[role].place, partial, _silent, StepResources(), CPU)

    features.run(context("features", FeaturesParams(data=data.listing(), codec=codec)))
    text = T5Text(path=str(write_encoder(place / "encoder")), precision="fp32")
    encode.run(context("text", TextParams(text=text, tokens=40), features=artifacts["features"]))
    config = PixArtConfig(
        input_size=8, in_channels=3, patch=2, depth=2, width=16, heads=2, caption_channels=CHANNELS, learn_sigma=True
    )
    checkpoints.save(lively(PixArt(config)), (), artifacts["base"].place)
    return artifacts


def _silent(done: int, total: int, metrics: Any = None) -> None: ...


@pytest.fixture
def context(parts: dict[str, Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """A `synthesis` step that draws in this process, in shards of six."""

    def here(work: Callable[..., Any], shared: Any, items: Iterable[Any], _: StepResources) -> Iterator[Any]:
        return (work(shared, item, CPU) for item in items)

    def drawn(images: NDArray[np.uint8], labels: list[str], title: str, path: Path) -> None:
        path.with_suffix(".json").write_text(json.dumps([list(images.shape), labels]))

    monkeypatch.setattr(synthesis, "fan_out", here)
    monkeypatch.setattr(synthesis, "SHARD", 6)
    monkeypatch.setattr(pictures, "sample_grid", drawn)
    return Context(
        step="synthesis",
        params=SynthesisParams(
            seed=0, sampler=DdimSampler(steps=2, guidance=2.0), batch=4, precision="fp32", codec=PixelCodec()
        ),
        inputs=parts,
        out=_folder(tmp_path / "out"),
        partial=Store(str(tmp_path / "store")).partial("s"),
        report=_silent,
        resources=StepResources(),
        device=CPU,
    )


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _drawn(folder: Path) -> dict[str, torch.Tensor]:
    return {name: read(folder, name).tensor() for name in ("training", "heldout")}


def test_what_is_drawn_is_read_as_latents_of_images_are(context: Context, tmp_path: Path) -> None:
    synthesis.run(context)
    meta = read_meta(context.out)
    assert meta.classes == DIFFERENT and (meta.num_training, meta.num_heldout) == (15, 5) and meta.bounded
    for name, items in zip(("training", "heldout"), split(data_of(tmp_path)), strict=True):
        latents = read(context.out, name)
        assert latents.labels.tolist() == [item.label for item in items]
        assert latents.tensor().shape == (len(items), 3, 8, 8) and latents.tensor().std() > 0.1
    assert len(sorted(context.out.glob("training_latents-*.npy"))) == 3
    shape, labels = json.loads((context.out / "grid.json").read_text())
    assert shape == [6, 3, 8, 8] and labels == [DIFFERENT[label] for label in read(context.out, "training").labels[:6]]


def test_a_sample_is_the_same_in_any_batch_and_shard(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesis.run(context)
    monkeypatch.setattr(synthesis, "SHARD", 100)
    params = context.params.model_copy(update={"batch": 1})
    other = replace(context, params=params, out=_folder(tmp_path / "b"), partial=Store(str(tmp_path)).partial("b"))
    synthesis.run(other)
    for name, latents in _drawn(context.out).items():
        # Sums of batches of other sizes differ in their last bits, which guidance enlarges; noise is of size 1.
        torch.testing.assert_close(_drawn(other.out)[name], latents, rtol=0, atol=1e-2)
        assert len({row.tobytes() for row in latents.numpy()}) == len(latents)  # each has noise of its own


def test_shards_that_are_whole_are_not_drawn_again(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesis.run(context)
    store = Store(str(tmp_path / "stopped"))
    partial = store.partial("c")

    def two_are_whole() -> bool:
        return partial.load("training_latents-00001.npy") is not None

    stopped = replace(context, out=_folder(tmp_path / "c"), partial=partial, stopping=two_are_whole)
    with pytest.raises(Stopped):
        synthesis.run(stopped)
    drawn: list[int] = []
    real = synthesis.draw_batch

    def counted(shared: Context, batch: synthesis.Batch, device: torch.device) -> NDArray[np.float32]:
        drawn.append(len(batch.numbers))
        return real(shared, batch, device)

    monkeypatch.setattr(synthesis, "draw_batch", counted)
    resumed = replace(context, out=_folder(tmp_path / "d"), partial=store.partial("c"))
    synthesis.run(resumed)
    assert sum(drawn) == 3 + 5  # of 15 and 5, two shards of six were there
    for name, latents in _drawn(context.out).items():
        assert torch.equal(_drawn(resumed.out)[name], latents)


def test_what_is_asked_to_stop_does_not_wait_for_the_end_of_a_shard(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    real = synthesis.draw_batch

    def counted(shared: Context, batch: synthesis.Batch, device: torch.device) -> NDArray[np.float32]:
        numbers.extend(batch.numbers)
        return real(shared, batch, device)

    monkeypatch.setattr(synthesis, "draw_batch", counted)
    with pytest.raises(Stopped):
        synthesis.run(replace(context, stopping=lambda: True))
    assert len(numbers) == 4  # a batch, of a shard of six


def test_another_seed_draws_other_samples_and_so_do_the_rows_of_the_table(context: Context) -> None:
    from graftwork.models.condition import Condition
    from graftwork.stages.artifacts.hybrids import load_model
    from graftwork.stages.evaluation.samples import draw

    batch = synthesis.shards(context.input("features"), "training", 4)[0].batches[0]
    first = synthesis.draw_batch(context, batch, CPU)
    other = replace(context, params=context.params.model_copy(update={"seed": 1}))
    assert not np.allclose(synthesis.draw_batch(other, batch, CPU), first)
    model, _ = load_model(context.inputs, "base")
    condition, params = Condition(labels=torch.tensor(batch.labels)), context.params
    meta = read_meta(context.input("features"))
    as_rows = draw(model, model, meta, batch.numbers, condition, params.sampler, params.seed, CPU)
    assert not np.allclose(as_rows.numpy(), first)


def test_samples_that_are_no_numbers_are_an_error(context: Context, parts: dict[str, Folder], tmp_path: Path) -> None:
    model, edits = checkpoints.load(parts["base"].place)
    with torch.no_grad():
        next(model.parameters()).fill_(1e38)  # a checkpoint with NaN would not be read
    broken = Folder("broken", _folder(tmp_path / "broken"))
    checkpoints.save(model, edits, broken.place)
    with pytest.raises(FloatingPointError, match="samples of 4 prompts are no finite numbers"):
        synthesis.run(replace(context, inputs={**parts, "base": broken}))
