"""Texts: cleaned, cut into tokens, encoded once, and what models are told of them by their labels."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork.models.condition import EMPTY_TEXT, Condition
from graftwork.models.rootstocks.pixart import PixArt, PixArtConfig
from graftwork.models.sampling import sample
from graftwork.pipeline import api
from graftwork.pipeline.planning import preflight, texts
from graftwork.pipeline.planning.contents import Contents
from graftwork.pipeline.planning.plan import make_plan
from graftwork.pipeline.planning.texts import check_texts
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.reading.load import SpecError, job_from
from graftwork.specs.resources import StepResources
from graftwork.specs.sampler import DdimSampler
from graftwork.specs.text import T5Text
from graftwork.specs.training import TrainingSpec
from graftwork.stages.artifacts.latents import Latents, LatentsMeta, write_meta
from graftwork.stages.artifacts.texts import TextTable
from graftwork.stages.catalog.text import TextParams
from graftwork.stages.contract import Context, Stopped
from graftwork.stages.data.prompts import read_prompts
from graftwork.stages.text import encode
from graftwork.stages.text import encoder as text_encoder
from graftwork.stages.text.encoder import TextEncoder, Tokenizer, UnfitText, cleaned
from graftwork.stages.training.batches import TrainingSet, draw_batch
from tests.scenes import CHANNELS, captioned, write_encoder
from tests.small import lively, noting

CPU = torch.device("cpu")
TOKENS = 40
CAPTIONS = ("a red square", "two blue rings & a cross", "a")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def spec_of(folder: Path, **changed: object) -> T5Text:
    return T5Text.model_validate({"path": str(folder), "precision": "fp32", "batch": 2, **changed})


class Folder:
    """An artifact in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, "k"

    def path(self) -> Path:
        return self.folder


@pytest.fixture
def context(tmp_path: Path, store: Store, encoder: Path) -> Context:
    """Of a `text` step for CAPTIONS and a file of two prompts."""
    (tmp_path / "features").mkdir()
    meta = LatentsMeta(codec="pixel", shape=(3, 8, 8), classes=CAPTIONS, num_training=3, num_heldout=0)
    write_meta(tmp_path / "features", meta)
    (tmp_path / "prompts.txt").write_text("A Green ring\n\n  a cross \n")
    (tmp_path / "out").mkdir()
    return Context(
        step="text",
        params=TextParams(text=spec_of(encoder), tokens=TOKENS, prompts=str(tmp_path / "prompts.txt")),
        inputs={"features": Folder(tmp_path / "features")},
        out=tmp_path / "out",
        partial=store.partial("t"),
        report=lambda done, total, metrics=None: None,
        resources=StepResources(),
        device=CPU,
    )


@pytest.fixture
def table(context: Context) -> TextTable:
    encode.run(context)
    return TextTable(context.out)


# -- the encoder


def test_states_are_those_that_diffusers_pipeline_gives(encoder: Path) -> None:
    from diffusers import PixArtSigmaPipeline
    from transformers import ByT5Tokenizer, T5EncoderModel

    model = T5EncoderModel.from_pretrained(encoder / "text_encoder")
    parts = {"tokenizer": ByT5Tokenizer(), "text_encoder": model}
    pipeline = PixArtSigmaPipeline(**parts, vae=None, transformer=None, scheduler=None)
    prompts = ["A <b>Red</b> square, see https://a.b/c", "a ring"]
    for clean in (True, False):
        text, mask, empty, _ = pipeline.encode_prompt(
            prompts, negative_prompt="", max_sequence_length=60, clean_caption=clean, device=CPU
        )
        for row, states in enumerate(TextEncoder(spec_of(encoder, clean=clean), 60, CPU)(prompts)):
            assert len(states) == mask[row].sum()
            torch.testing.assert_close(states, text[row, : len(states)], rtol=0, atol=1e-5)
        (states,) = TextEncoder(spec_of(encoder, clean=clean), 60, CPU)([""])
        torch.testing.assert_close(states, empty[0, : len(states)], rtol=0, atol=1e-5)


def test_texts_are_cleaned_or_only_in_lower_case() -> None:
    assert cleaned(["  A &amp; B <br> "], clean=False) == ["a &amp; b <br>"]
    assert cleaned(["  A &amp; B <br> "], clean=True) == ["a b"]  # as diffusers does


def test_texts_that_are_too_long_are_refused_and_counted_or_cut_where_asked_for(encoder: Path) -> None:
    texts = ["x" * 39, "y" * 40, "z" * 400]
    with pytest.raises(UnfitText) as caught:
        Tokenizer(spec_of(encoder), TOKENS)(texts)
    said = str(caught.value)
    assert said.startswith("model.text_tokens: got 40, and 2 texts of more tokens: 'yyy") and "of 41" in said
    assert "text.truncate: true" in said and "\n" not in said
    cut = Tokenizer(spec_of(encoder, truncate=True), TOKENS)(texts)
    assert [len(one) for one in cut] == [40, 40, 40] and {one[-1] for one in cut} == {1}  # the end of a text


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda folder: (folder / "text_encoder/config.json").unlink(), "without a config.json of an encoder"),
        (lambda folder: (folder / "text_encoder/config.json").write_text('{"model_type": "bert"}'), "'bert', no T5"),
        (lambda folder: (folder / "text_encoder/model.safetensors").write_bytes(b"torn"), "cannot be read"),
        (lambda folder: _without(folder / "text_encoder/model.safetensors", "final_layer_norm"), "without the weights"),
        (lambda folder: (folder / "tokenizer/tokenizer_config.json").write_text("{"), "whose tokenizer cannot be read"),
        (lambda folder: _of_another_config(folder, num_layers=1), "has no place for, encoder.block.1"),
    ],
)
def test_an_encoder_that_is_none_or_not_whole_is_one_line(tmp_path: Path, spoil, said: str) -> None:  # type: ignore[no-untyped-def]
    write_encoder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UnfitText) as caught:
        TextEncoder(spec_of(tmp_path), TOKENS, CPU)(["a"])
    line = str(caught.value)
    assert line.startswith("text.path: got ") and said in line and "; accepted: " in line and "\n" not in line


def _of_another_config(folder: Path, **changed: int) -> None:
    file = folder / "text_encoder/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def test_an_encoder_without_a_tokenizer_is_refused_for_which_the_library_makes_one_up(encoder: Path) -> None:
    with pytest.raises(UnfitText, match=r"text.path: got .*, without the files of a tokenizer; accepted: "):
        Tokenizer(spec_of(encoder / "text_encoder"), TOKENS)


def test_a_tokenizer_of_more_tokens_than_the_encoder_has_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(spec_of(write_encoder(tmp_path, vocab_size=100)), TOKENS)
    assert tokenizer(["0"])
    with pytest.raises(UnfitText, match="a tokenizer with token 125, for an encoder of 100 tokens; accepted: "):
        tokenizer(["0", "z"])


def _without(file: Path, part: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: value for name, value in load_file(file).items() if part not in name}
    save_file(tensors, file, {"format": "pt"})


def test_states_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = write_encoder(tmp_path) / "text_encoder/model.safetensors"
    tensors = load_file(file)
    tensors["shared.weight"][ord("b") + 3] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    encoder = TextEncoder(spec_of(tmp_path), TOKENS, CPU)
    with pytest.raises(UnfitText, match="its states of 'b' are no finite numbers"):
        encoder(["a", "b"])


# -- prompts


@pytest.mark.parametrize(
    "content, said",
    [(b"", "with no prompt in it"), (b"\n \r\n", "no prompt"), (b"a\n\xff", "line 2 is no UTF-8"), (b"\0", "no text")],
)
def test_a_file_without_prompts_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"evaluate.prompts: got .*{said}.*; accepted: "):
        read_prompts(str(tmp_path / "p.txt"))


@pytest.mark.parametrize("line", ['{"tag": "colors"}', '{"prompt": " "}', '{"prompt": "half \\ud800"}', '["a"]', "a"])
def test_a_line_of_jsonl_without_a_prompt_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"whose line 2 has no prompt: .*; accepted: "):
        read_prompts(str(tmp_path / "p.jsonl"))


def test_prompts_are_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\n\n two, three \n".encode())
    assert read_prompts(str(tmp_path / "p.txt")) == ("one", "two, three")


# -- the artifact


def test_labels_are_captions_then_prompts_and_the_last_text_is_empty(table: TextTable, encoder: Path) -> None:
    texts = [*CAPTIONS, "A Green ring", "a cross", ""]
    own = TextEncoder(spec_of(encoder), TOKENS, CPU)(texts)
    found = table(Condition(labels=torch.tensor([4, 0, 3, EMPTY_TEXT])))
    text, mask = found.require("text"), found.require("mask")
    assert text.shape == (4, TOKENS, CHANNELS) and table.meta.prompts == ("A Green ring", "a cross")
    for row, label in enumerate([4, 0, 3, 5]):
        length = len(own[label])
        assert mask[row].tolist() == [1] * length + [0] * (TOKENS - length)
        torch.testing.assert_close(text[row, :length], own[label], rtol=0, atol=1e-5)
        assert not text[row, length:].any()


def test_a_text_that_cleaning_empties_is_told(context: Context) -> None:
    (context.inputs["features"].path() / "meta.json").write_text(
        LatentsMeta(
            codec="pixel", shape=(3, 8, 8), classes=("a", "https://www.example.com/x"), num_training=2, num_heldout=0
        ).model_dump_json(exclude_none=True)
    )
    params = context.params.model_copy(update={"prompts": None})
    encode.run(Context(**{**vars(context), "params": params}))
    (line,) = json.loads((context.out / "notes.json").read_text())
    assert line == "1 text with nothing left once cleaned, so the empty text: 'https://www.example.com/x'"


@pytest.mark.parametrize("label", [5, 99, -2])
def test_a_label_of_no_text_is_an_error(table: TextTable, label: int) -> None:
    with pytest.raises(IndexError):
        table(Condition(labels=torch.tensor([label])))


def test_bf16_states_are_kept_as_they_are(context: Context, encoder: Path) -> None:
    params = context.params.model_copy(update={"text": spec_of(encoder, precision="bf16")})
    encode.run(Context(**{**vars(context), "params": params}))
    states = TextTable(context.out).states(1)
    assert states.dtype == torch.bfloat16
    assert torch.equal(states, TextEncoder(spec_of(encoder, precision="bf16"), TOKENS, CPU)([*CAPTIONS, ""])[1])


def test_a_copy_of_the_table_shares_its_files(table: TextTable) -> None:
    assert copy.deepcopy(table) is table
    there = pickle.loads(pickle.dumps(table))
    assert torch.equal(there.states(0), table.states(0)) and len(pickle.dumps(table)) < 1000


def test_shards_that_are_whole_are_not_encoded_again(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "SHARD", 2)
    monkeypatch.setattr(encode, "WORTH_A_STREAM", 99)
    asked = iter([False, True])
    with pytest.raises(Stopped):
        encode.run(Context(**{**vars(context), "stopping": lambda: next(asked)}))
    for file in context.out.iterdir():
        file.unlink()
    encoded: list[int] = []
    real = TextEncoder.__call__
    monkeypatch.setattr(TextEncoder, "__call__", noting(lambda self, texts: encoded.append(len(texts)), real))
    encode.run(context)
    assert encoded == [2]  # of three shards, the last
    straight = TextEncoder(context.params.text, TOKENS, CPU)([*CAPTIONS, "A Green ring", "a cross", ""])
    for label, states in enumerate(straight[:-1]):
        torch.testing.assert_close(TextTable(context.out).states(label), states, rtol=0, atol=1e-5)


# -- models that are told labels of texts


@pytest.fixture
def model(table: TextTable) -> PixArt:
    config = PixArtConfig(
        input_size=8, in_channels=3, patch=2, depth=2, width=16, heads=2, caption_channels=CHANNELS, learn_sigma=True
    )
    model = lively(PixArt(config)).eval()
    model.texts = table
    return model


def test_a_label_says_to_a_model_what_its_text_says(model: PixArt, table: TextTable) -> None:
    x, t, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([2, 0, EMPTY_TEXT])
    with torch.no_grad():
        by_label = model(x, t, Condition(labels=labels))
        assert torch.equal(by_label, model(x, t, table(Condition(labels=labels))))
        assert not torch.equal(by_label, model(x, t, Condition(labels=labels.flip(0))))
    model.texts = None
    with pytest.raises(ValueError, match="accepted: text"):
        model(x, t, Condition(labels=labels))


def test_training_drops_texts_for_the_empty_one(model: PixArt, table: TextTable) -> None:
    data = Latents(torch.zeros(3, 3, 8, 8), Condition(labels=torch.tensor([0, 1, 2])))
    recipe = TrainingSpec(batch=64, steps=1, caption_dropout=0.5)
    told = TrainingSet.of(data, model.config, CPU, table)
    batch = draw_batch(told, recipe, 0, "a", 0, 0, 1)
    lengths = batch.condition.require("mask").sum(1)
    empty = (lengths == 1).sum().item()
    assert 16 < empty < 48 and batch.condition.labels is None
    known = {len(table.states(label)) for label in (0, 1, 2)}
    assert set(lengths.int().tolist()) <= {1, *known} and len(lengths.unique()) >= 3


def test_guidance_is_from_the_empty_text(model: PixArt, table: TextTable) -> None:
    """Samples by labels are those by states, and guided by the states of the empty text."""
    condition = Condition(labels=torch.tensor([0, 4]))
    sampler = DdimSampler(steps=2, guidance=3.0)
    drawn = []
    for given, conditioner in ((condition, model.config.conditioner), (table(condition), model.conditioner)):
        noise = iter(torch.randn(9, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
        drawn.append(
            sample(
                model,
                given,
                lambda noise=noise: next(noise),  # type: ignore[misc]
                sampler=sampler,
                conditioner=conditioner,
                objective=model.config.objective,
                bounded=False,
            )
        )
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-5)


def test_the_artifact_says_what_it_is(table: TextTable) -> None:
    said = json.loads((table.folder / "texts.json").read_text())
    assert said == {"channels": CHANNELS, "tokens": TOKENS, "captions": 3, "prompts": ["A Green ring", "a cross"]}


# -- jobs of texts


def job_of(tmp_path: Path, encoder: Path, **changed: object) -> dict[str, Any]:
    """A job that is in order, with other sections."""
    return {
        "name": "t",
        "data": {"kind": "captions", "path": str(tmp_path / "data"), "image_size": 16, "heldout": 0.25},
        "model": {"kind": "pixart", "depth": 2, "width": 16, "heads": 2, "patch": 2, "caption_channels": CHANNELS},
        "text": {"kind": "t5", "path": str(encoder)},
        "graft": [{"target": "mha", "operator": {"kind": "hyena_y", "kernel": 4}, "layers": {"kind": "all"}}],
        "distill": {"samples": 8, "heldout": 4},
        "evaluate": {"samples": 4, "metrics": ["fid"], "reference": str(tmp_path / "data")},
        **changed,
    }


DIT = {"kind": "dit", "depth": 2, "width": 16, "heads": 2, "patch": 2}
DIGITS = {"kind": "digits"}


@pytest.mark.parametrize(
    "changed, field, said",
    [
        ({"text": None}, "text", "got nothing; accepted: {kind: t5, path: ..}, for a pixart, which is told texts"),
        ({"data": DIGITS}, "data.kind", "got 'digits'; accepted: captions or synthetic, for a pixart"),
        ({"weights": {"kind": "pretrain", "label_dropout": 0.2}}, "weights.label_dropout", "caption_dropout"),
        (
            {"weights": {"kind": "pretrain", "label_std": 0.3}},
            "weights.label_std",
            "accepted: no label_std, for a pixart",
        ),
        ({"finetune": {"label_dropout": 0.1}}, "finetune.label_dropout", "accepted: caption_dropout"),
        ({"finetune": {"caption_dropout": 0}}, "finetune.caption_dropout", "trains the empty text"),
        ({"weights": {"kind": "checkpoint", "path": "a.pth", "classes": "fresh"}}, "weights.classes", "no classes"),
        (
            {"evaluate": {"metrics": ["classifier"]}},
            "evaluate.metrics",
            "fid, likeness]; the classifier",
        ),
        ({"model": DIT}, "text", "accepted: no text, for a dit, which is told classes"),
        ({"model": DIT, "text": None}, "data.kind", "accepted: digits or image_folder, for a dit"),
        ({"model": DIT, "text": None, "data": DIGITS, "evaluate": {"prompts": "a"}}, "evaluate.prompts", "no prompts"),
        (
            {"model": DIT, "text": None, "data": DIGITS, "evaluate": {}, "finetune": {"caption_dropout": 0.1}},
            "finetune.caption_dropout",
            "accepted: label_dropout",
        ),
        ({"model": {"kind": "pixart", "size": "XL/4"}}, "model.size", "XL/2"),
    ],
)
def test_what_is_about_another_condition_is_one_line(
    tmp_path: Path, encoder: Path, changed: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(SpecError) as caught:
        job_from(job_of(tmp_path, encoder, **changed), ())
    (line,) = caught.value.lines
    assert line.startswith(f"{field}: ") and said in line, line


def shortages(document: dict[str, Any]) -> list[str]:
    return preflight.shortages(job_from(document, ()))


def test_an_encoder_of_another_width_is_refused_before_anything_runs(tmp_path: Path, encoder: Path) -> None:
    captioned(tmp_path / "data")
    assert shortages(job_of(tmp_path, encoder)) == []
    document = job_of(tmp_path, encoder)
    document["model"]["caption_channels"] = 4096
    (line,) = shortages(document)
    assert line.startswith(
        f"text.path: got {str(encoder)!r}, an encoder of {CHANNELS} channels; accepted: an encoder of 4096"
    )


def test_captions_and_prompts_are_looked_at_before_anything_runs(tmp_path: Path, encoder: Path) -> None:
    captioned(tmp_path / "data")
    document = job_of(tmp_path, encoder)
    (tmp_path / "data" / "000.png").unlink()
    (tmp_path / "p.txt").touch()
    document["evaluate"]["prompts"] = str(tmp_path / "p.txt")
    captions, prompts = shortages(document)
    assert captions.startswith("data.path: ") and prompts.startswith("evaluate.prompts: ")


def judged(tmp_path: Path, encoder: Path, detector: dict[str, str], name: str, side: int = 16) -> dict[str, Any]:
    """A job that GenEval's rules judge, of one prompt about an object."""
    captioned(tmp_path / "data")
    prompt = {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
    (tmp_path / "p.jsonl").write_text(json.dumps(prompt))
    evaluate = {"samples": 4, "metrics": ["geneval"], "detector": detector, "prompts": str(tmp_path / "p.jsonl")}
    document = job_of(tmp_path, encoder, evaluate=evaluate)
    document["data"]["image_size"] = side
    return document


def test_scenes_of_another_size_are_not_for_the_detector_of_shapes(tmp_path: Path, encoder: Path) -> None:
    assert shortages(judged(tmp_path, encoder, {"kind": "shapes"}, "ring")) == []
    (line,) = shortages(judged(tmp_path, encoder, {"kind": "shapes"}, "ring", side=32))
    assert line.startswith("evaluate.detector.kind: got 'shapes', for images of 32 pixels; accepted: mask2former, or ")


def test_a_detector_of_another_kind_is_refused_before_anything_runs(tmp_path: Path, encoder: Path) -> None:
    for name, kind in (("m", "mask2former"), ("c", "clip")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    good = {"kind": "mask2former", "path": str(tmp_path / "m"), "colours": str(tmp_path / "c")}
    assert shortages(judged(tmp_path, encoder, good, "dog")) == []
    swapped = good | {"path": good["colours"], "colours": str(tmp_path)}
    first, second = shortages(judged(tmp_path, encoder, swapped, "dog"))
    assert (
        first.startswith("evaluate.detector.path: got ") and "says 'clip'; accepted: a folder or hub id of a" in first
    )
    assert second.startswith("evaluate.detector.colours: got ") and "without a config.json of a clip" in second


def test_a_run_measures_its_texts_before_anything_starts(tmp_path: Path, encoder: Path) -> None:
    captioned(tmp_path / "data")
    document = job_of(tmp_path, encoder)
    document["model"]["text_tokens"] = 20
    (line,) = check_texts(job_from(document, ()), ["text"])
    assert line.startswith("model.text_tokens: got 20, and 4 texts of more tokens: ")
    assert list(check_texts(job_from(document, ()), ["base"])) == []
    document["text"]["truncate"] = True
    assert list(check_texts(job_from(document, ()), ["text"])) == []


def test_a_run_measures_of_many_captions_those_that_may_be_too_long(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "MEASURED", 1)
    monkeypatch.setattr(texts, "_captions", lambda _: ("first", "short", "x" * 38, "y" * 39, "z" * 40))
    job = job_from(job_of(tmp_path, encoder), ())
    assert texts._measured(job, spec_of(encoder), 40) == ["first", "y" * 39, "z" * 40]
    assert texts._measured(job, spec_of(encoder, truncate=True), 40) == ["first"]


def test_packages_that_are_not_there_are_named(tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioned(tmp_path / "data")
    monkeypatch.setattr(text_encoder, "find_spec", lambda name: None if name == "ftfy" else object())
    (line,) = shortages(job_of(tmp_path, encoder))
    assert line.startswith("text.clean: got true, without ftfy; accepted: pip install 'graftwork[text]'")


def test_the_same_bytes_are_other_prompts_in_a_file_of_another_format(tmp_path: Path, encoder: Path) -> None:
    captioned(tmp_path / "data")
    keys = []
    for name in ("p.txt", "p.jsonl", "other.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a ring"}\n')
        document = job_of(tmp_path, encoder)
        document["evaluate"]["prompts"] = str(tmp_path / name)
        steps = make_plan(job_from(document, ()), Contents()).steps
        keys.append(next(step.key for step in steps if step.name == "text"))
    assert keys[0] != keys[1] == keys[2]


def test_a_card_names_the_text_encoder_without_its_folder(tmp_path: Path, encoder: Path) -> None:
    job = job_from(job_of(tmp_path, encoder), ()).model_dump(mode="json")
    recipe = api._recipe(job)
    assert recipe["text"]["path"] == encoder.name and recipe["text"]["precision"] == "bf16"
    assert "text" not in api._recipe(job | {"text": None})


def test_steps_that_run_a_model_need_its_texts_and_others_do_not(tmp_path: Path, encoder: Path) -> None:
    captioned(tmp_path / "data")
    steps = {
        step.name: set(step.needs) for step in make_plan(job_from(job_of(tmp_path, encoder), ()), Contents()).steps
    }
    without = {name for name, needs in steps.items() if "text" not in needs}
    assert without == {"features", "text", "select", "reference/fid", "reference/heldout"}
