"""What can be asked for, and how a bad request is refused: a line a problem, with path, value and what is accepted."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import ValidationError

from graftwork.specs.edits import OperatorEdits, ParallelEdits
from graftwork.specs.fields import Spec, Unkeyed, keyed
from graftwork.specs.job import JobSpec
from graftwork.specs.layers.learned import LearnedLayers
from graftwork.specs.layers.static import AllLayers, InterleavedLayers
from graftwork.specs.operators import HyenaY
from graftwork.specs.problems import problem
from graftwork.specs.problems import refusal as refusal_line
from graftwork.specs.reading.load import SpecError, job_from, job_schema, load
from graftwork.specs.rootstock import DitModel
from graftwork.specs.sampler import AncestralSampler

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "ray", "mlflow", "deepspeed", "sklearn")

DOCUMENT: dict[str, Any] = {
    "name": "small",
    "data": {"kind": "digits", "image_size": 16},
    "model": {"kind": "dit", "depth": 4, "width": 32, "heads": 2, "patch": 2},
    "weights": {"kind": "pretrain", "steps": 20, "batch": 16},
    "graft": [
        {
            "target": "mha",
            "operator": {"kind": "hyena_y", "kernel": 4},
            "layers": {"kind": "explicit", "blocks": [1, 3]},
        }
    ],
    "distill": {"samples": 64, "milestones": [3]},
    "evaluate": {"samples": 40, "sampler": {"kind": "ddim", "steps": 4}},
}


@pytest.fixture
def document() -> dict[str, Any]:
    return copy.deepcopy(DOCUMENT)


def put(document: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """Set a field by hand, without the code under test."""
    here: Any = document
    steps: list[Any] = [int(step) if step.isdigit() else step for step in path.split(".")]
    *steps, last = steps
    for step in steps:
        here = here[step] if isinstance(here, list) else here.setdefault(step, {})
    here[last] = value
    return document


def refusal(document: dict[Any, Any], *overrides: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        job_from(document, overrides)
    return caught.value.lines


def assert_says(lines: list[str], path: str, given: str, accepted: str) -> None:
    assert len(lines) == 1, lines
    (line,) = lines
    assert "\n" not in line
    assert line.startswith(f"{path}: "), line
    assert f"got {given}" in line, line
    assert accepted in line.partition("accepted: ")[2], line


# -- bad input


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("seeed", "seed"),
        ("distill.epoch", "epochs"),
        ("model.widht", "width"),
        ("finetune.deepspeed.zeero", "zero"),
        ("evaluate.sampler.stepz", "steps"),
        ("graft.0.targett", "target"),
        ("graft.0.operator.kernal", "kernel"),
        ("graft.0.layers.block", "blocks"),
        ("resources.distil", "distill"),
    ],
)
def test_an_unknown_field_is_refused_with_the_one_that_was_meant(
    document: dict[str, Any], path: str, near: str
) -> None:
    lines = refusal(put(document, path, 7))
    assert_says(lines, path, "7", near)
    assert f"did you mean {near}?" in lines[0]


@pytest.mark.parametrize(
    ("path", "value", "accepted"),
    [
        ("seed", "abc", "integer"),
        ("seed", 1.5, "integer"),
        ("name", 5, "string"),
        ("distill", 3, "a mapping"),
        ("distill.lr", [1], "number"),
        ("distill.gate_weighted", "perhaps", "boolean"),
        ("graft", "swa", "a list"),
        ("graft.0", 3, "a mapping with a kind: parallel, replace"),
        ("graft.0.operator", "hyena_y", "a mapping with a kind: hyena_se, hyena_x, hyena_y, mamba2, mha, mlp"),
        ("graft.0.layers", "all", "a mapping with a kind: all, explicit"),
        ("codec", "pixel", "a mapping with a kind: pixel, vae"),
        ("graft.0.layers.blocks", 1, "a list"),
        ("finetune.betas", [0.9, 0.99, 0.999], "at most 2"),
        ("store", "", "at least 1 character"),
        ("graft.0.layers.blocks.1", "two", "integer"),
        ("data.image_size", None, "integer"),
        ("tracking.uri", 3, "string"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(
    document: dict[str, Any], path: str, value: object, accepted: str
) -> None:
    given = "nothing" if value is None else repr(value)
    assert_says(refusal(put(document, path, value)), path, given, accepted)


PYTHON = ("tuple", "dictionary", "instance", "literal", "object", "pattern", "validation", "Edits")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("distill", 3),
        ("graft", "swa"),
        ("graft", []),
        ("graft.0", 3),
        ("graft.0.operator", "hyena_y"),
        ("graft.0.layers", "all"),
        ("codec", "pixel"),
        ("evaluate.metrics", []),
        ("finetune.betas", [0.9, 0.99, 0.999]),
        ("name", "a b"),
        ("3", 1),
    ],
)
def test_no_refusal_speaks_of_python(document: dict[Any, Any], path: str, value: object) -> None:
    if path == "3":
        document = {**document, 3: value}
    else:
        put(document, path, value)
    (line,) = refusal(document)
    assert not any(word in line for word in PYTHON), line


def test_a_number_for_a_field_is_refused(document: dict[Any, Any]) -> None:
    assert_says(refusal({**document, 3: 1}), "3", "3", "the name of a field")


@pytest.mark.parametrize("value", [[0, 1], "some", 3, None, [[0, 1, 2]], [["a", 1]], [[True, 1]], {"0": 1}])
def test_pairs_that_are_no_pairs_are_one_line(document: dict[str, Any], value: object) -> None:
    put(document, "graft.0", {"kind": "parallel", "pairs": value})
    given = "nothing" if value is None else repr(value)
    assert_says(refusal(document), "graft.0.pairs", given, "all, or a list of pairs, as in [[0, 1], [4, 5]]")


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("groups", [0, 1], "a list of groups, as in [[0, 1], [2, 3]]"),
        ("groups", "four", "how many blocks"),
        ("groups", True, "how many blocks"),
        ("groups", [[0, "x"]], "how many blocks"),
        ("keep", "two", "how many originals stay"),
        ("keep", [[1]], "a number for each"),
        ("keep", 1.5, "how many originals stay"),
        ("pinned", 3, "a list"),
    ],
)
def test_groups_that_are_no_groups_are_one_line(
    document: dict[str, Any], field: str, value: object, accepted: str
) -> None:
    put(document, "graft.0.layers", {"kind": "learned", field: value})
    assert_says(refusal(document), f"graft.0.layers.{field}", repr(value), accepted)


@pytest.mark.parametrize(
    ("path", "value", "accepted"),
    [
        ("seed", True, "integer"),
        ("seed", "4", "integer"),
        ("graft.0.operator.kernel", True, "integer"),
        ("graft.0.layers.blocks.1", True, "integer"),
        ("distill.milestones.0", "3", "integer"),
        ("distill.heldout", False, "integer"),
        ("finetune.lr", True, "number"),
        ("finetune.betas", [True, 0.9], "number"),
        ("finetune.deepspeed.zero", True, "3"),
        ("resources.distill.gpu", True, "number"),
    ],
)
def test_what_is_no_number_is_not_taken_for_one(
    document: dict[str, Any], path: str, value: object, accepted: str
) -> None:
    lines = refusal(put(document, path, value))
    if isinstance(value, list):
        path, value = f"{path}.0", value[0]
    assert_says(lines, path, repr(value), accepted)


def test_a_boolean_for_a_number_hides_no_other_problem_of_its_section(document: dict[str, Any]) -> None:
    put(document, "finetune.lr", -1)
    put(document, "finetune.steps", True)
    assert [line.partition(":")[0] for line in refusal(document)] == ["finetune.steps", "finetune.lr"]


@pytest.mark.parametrize(
    ("path", "value", "read"), [("finetune.lr", "1e-3", 1e-3), ("finetune.lr", 1, 1.0), ("finetune.steps", 1e4, 10_000)]
)
def test_numbers_as_yaml_writes_them_are_taken(document: dict[str, Any], path: str, value: object, read: float) -> None:
    section, field = path.split(".")
    assert getattr(getattr(job_from(put(document, path, value)), section), field) == read


@pytest.mark.parametrize(
    ("path", "value", "accepted"),
    [
        ("seed", -1, "0"),
        ("data.image_size", 12, "multiple of 8"),
        ("data.heldout", 1.0, "less than 1"),
        ("graft.0.operator.kernel", 0, "1"),
        ("distill.loss", "l3", "'huber'"),
        ("evaluate.metrics.0", "lpips", "'fid'"),
        ("evaluate.sampler.steps", 1001, "1000"),
        ("finetune.fraction", 1.5, "1"),
        ("finetune.deepspeed.zero", 4, "3"),
        ("resources.distill.gpu", -1, "0"),
        ("weights.lr", float("nan"), "finite"),
        ("name", "a b", "letters, digits, '.', '_' and '-', at most 100 in all"),
        ("model.size", "XXL/2", "'XL/2'"),
    ],
)
def test_a_value_out_of_range_is_refused(document: dict[str, Any], path: str, value: object, accepted: str) -> None:
    if path == "evaluate.metrics.0":
        document["evaluate"]["metrics"] = [None]
    assert_says(refusal(put(document, path, value)), path, repr(value), accepted)


@pytest.mark.parametrize("guidance", [0, 1.5, 4])
@pytest.mark.parametrize("section", ["weights", "finetune"])
def test_guidance_needs_a_null_class_that_every_training_trains(
    document: dict[str, Any], section: str, guidance: float
) -> None:
    put(document, f"{section}.label_dropout", 0)
    put(document, "evaluate.sampler.guidance", guidance)
    assert_says(refusal(document), f"{section}.label_dropout", "0", "more than 0, which trains the null class")
    put(document, "evaluate.sampler.guidance", 1)
    JobSpec.model_validate(document)


def test_finetuning_a_checkpoint_without_dropped_labels_would_leave_its_null_class_behind(
    document: dict[str, Any],
) -> None:
    document["weights"] = {"kind": "checkpoint", "path": "dit.pt"}
    put(document, "finetune.label_dropout", 0)
    assert_says(refusal(document), "finetune.label_dropout", "0", "or guidance 1")


@pytest.mark.parametrize("gpu", [0.5, 2])
@pytest.mark.parametrize(("stage", "section"), [("base", "weights"), ("finetune", "finetune")])
def test_workers_that_train_together_have_a_gpu_each(
    document: dict[str, Any], stage: str, section: str, gpu: float
) -> None:
    put(document, f"{section}.workers", 2)
    put(document, "resources", {stage: {"gpu": gpu}})
    assert_says(refusal(document), f"resources.{stage}.gpu", str(gpu), "0 or 1 a worker, since 2 workers train")
    put(document, f"{section}.workers", 1)
    JobSpec.model_validate(document)


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("inf")])
def test_a_ratio_outside_0_to_1_is_refused(document: dict[str, Any], ratio: float) -> None:
    put(document, "graft.0.layers", {"kind": "interleaved", "ratio": ratio})
    assert_says(refusal(document), "graft.0.layers.ratio", repr(ratio), "")


def test_a_ratio_of_an_operator_out_of_range_is_refused(document: dict[str, Any]) -> None:
    put(document, "graft.0", {"target": "mlp", "operator": {"kind": "mlp", "ratio": 0}, "layers": {"kind": "all"}})
    assert_says(refusal(document), "graft.0.operator.ratio", "0", "greater than 0")


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("graft.0.operator", ("mha", "swa", "hyena_se", "hyena_x", "hyena_y", "mlp")),
        ("graft.0.layers", ("all", "explicit", "interleaved")),
        ("data", ("digits", "image_folder")),
        ("weights", ("pretrain", "checkpoint")),
        ("evaluate.sampler", ("ancestral", "ddim")),
    ],
)
class TestKinds:
    def test_an_unknown_kind_is_refused_with_the_known_ones(
        self, document: dict[str, Any], path: str, known: tuple[str, ...]
    ) -> None:
        lines = refusal(put(document, path, {"kind": "nonesuch"}))
        for kind in known:
            assert_says(lines, f"{path}.kind", "'nonesuch'", f"'{kind}'")

    def test_a_missing_kind_is_refused_with_the_known_ones(
        self, document: dict[str, Any], path: str, known: tuple[str, ...]
    ) -> None:
        lines = refusal(put(document, path, {}))
        for kind in known:
            assert_says(lines, path, "{}", kind)


@pytest.mark.parametrize("path", ["name", "model", "graft", "graft.0.target", "graft.0.layers.blocks"])
def test_a_missing_field_is_named(document: dict[str, Any], path: str) -> None:
    *steps, last = path.split(".")
    here: Any = document
    for step in steps:
        here = here[int(step)] if step.isdigit() else here[step]
    del here[last]
    (line,) = refusal(document)
    assert line.startswith(f"{path}: missing; accepted: ")


@pytest.mark.parametrize(
    ("field", "accepted"),
    [
        ("operator", "a mapping with a kind: hyena_se, hyena_x, hyena_y, mamba2, mha, mlp, mlp_hyena_x"),
        ("layers", "a mapping with a kind: all, explicit, first"),
        ("target", "'mha', 'mlp'"),
    ],
)
def test_a_missing_field_of_an_edit_lists_what_it_may_be(document: dict[str, Any], field: str, accepted: str) -> None:
    del document["graft"][0][field]
    (line,) = refusal(document)
    assert line.startswith(f"graft.0.{field}: missing; accepted: {accepted}")


def test_a_missing_graft_is_a_list_of_the_kinds_of_edit(document: dict[str, Any]) -> None:
    del document["graft"], document["model"]
    assert refusal(document) == [
        "model: missing; accepted: a mapping with a kind: dit, pixart, sit",
        "graft: missing; accepted: a list of mappings with a kind: parallel, replace",
    ]


@pytest.mark.parametrize(
    ("changes", "path", "given", "accepted"),
    [
        ({"graft.0.layers.blocks": [1, 4]}, "graft.0.layers.blocks.1", "4", "0 .. 3"),
        ({"graft.0.layers.blocks": [-1]}, "graft.0.layers.blocks.0", "-1", "0"),
        ({"graft.0.layers.blocks": []}, "graft.0.layers.blocks", "[]", "at least one"),
        ({"graft.0.layers.blocks": [1, 3, 1]}, "graft.0.layers.blocks.2", "1", "once"),
        ({"model.heads": 3}, "model.heads", "3", "divides the width, 32"),
        ({"model.width": 34}, "model.width", "34", "multiple of 4"),
        ({"model.depth": 0}, "model.depth", "0", "at least 1"),
        ({"model.size": "XL/2"}, "model.depth", "4", "28"),
        ({"model.patch": 3}, "data.image_size", "16", "multiple of the patch, 3"),
        ({"graft.0.target": "mlp"}, "graft.0.operator.kind", "'hyena_y'", "an operator for mlp"),
        ({"graft.0.operator": {"kind": "mlp"}}, "graft.0.operator.kind", "'mlp'", "an operator for mha"),
        ({"graft.0.layers": {"kind": "interleaved", "ratio": 0.1}}, "graft.0.layers.ratio", "0.1", "4 blocks"),
        ({"graft.0.layers": {"kind": "first", "count": 5}}, "graft.0.layers.count", "5", "at most 4"),
        ({"graft.0.layers": {"kind": "last", "count": 1, "ratio": 0.5}}, "graft.0.layers.count", "1", "not both"),
        (
            {"graft.0.layers": {"kind": "learned", "groups": [[0, 1], [3]]}},
            "graft.0.layers.groups",
            "((0, 1), (3,))",
            "cover each of the blocks 0 .. 3 once",
        ),
        (
            {"graft.0.layers": {"kind": "learned", "groups": [[0, 2], [1, 3]]}},
            "graft.0.layers.groups.0",
            "[0, 2]",
            "consecutive",
        ),
        (
            {"graft.0.layers": {"kind": "learned", "budget": 0.6, "operators": [{"kind": "swa"}]}},
            "graft.0.layers.budget",
            "0.6",
            "nearest is 0.761",
        ),
        (
            {"graft.0.layers": {"kind": "learned", "budget": 0.9, "keep": 1}},
            "graft.0.layers.keep",
            "1",
            "groups or a budget",
        ),
        (
            {"graft.0.layers": {"kind": "learned", "operators": [{"kind": "swa"}]}},
            "graft.0.layers.operators",
            "['swa']",
            "a budget beside it",
        ),
        ({"graft.0.layers": {"kind": "learned", "keep": 5}}, "graft.0.layers.keep", "5", "0 .. 4"),
        ({"graft.0.layers": {"kind": "learned", "count": 5}}, "graft.0.layers.count", "5", "at most 4"),
        ({"graft.0.layers": {"kind": "learned", "ratio": 0.5, "keep": 1}}, "graft.0.layers.ratio", "0.5", "or keep"),
        ({"graft.0.layers": {"kind": "learned", "ratio": 0.5, "budget": 1}}, "graft.0.layers.ratio", "0.5", "a budget"),
        ({"graft.0.layers": {"kind": "learned", "keep": 4}}, "graft.0.layers.keep", "4", "something to replace"),
        ({"graft.0.layers": {"kind": "learned", "keep": [1, 1]}}, "graft.0.layers.keep", "[1, 1]", "each of 1 groups"),
        ({"graft.0.layers": {"kind": "learned", "pinned": [7]}}, "graft.0.layers.pinned", "7", "0 .. 3"),
        (
            {"graft.0.layers": {"kind": "learned", "keep": 1, "pinned": [0, 1]}},
            "graft.0.layers.pinned",
            "[0, 1]",
            "at most 1",
        ),
        ({"weights.workers": 17}, "weights.workers", "17", "at most batch, 16"),
        (
            {"finetune.compile": True, "finetune.deepspeed": {"zero": 3}},
            "finetune.compile",
            "True",
            "false where deepspeed.zero is 3",
        ),
        ({"evaluate.metrics": ["fid"]}, "evaluate.reference", "nothing", "mu and sigma"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_does_not_fit_together_is_refused_at_the_field_to_change(
    document: dict[str, Any], changes: dict[str, object], path: str, given: str, accepted: str
) -> None:
    for field, value in changes.items():
        put(document, field, value)
    assert_says(refusal(document), path, given, accepted)


@pytest.mark.parametrize(
    ("fields", "replaced"),
    [
        ({}, [2, 2, 1]),
        ({"ratio": 0.5}, [2, 2, 1]),
        ({"ratio": 0.75}, [3, 3, 1]),
        ({"count": 3}, [1, 1, 1]),
        ({"count": 10, "pinned": []}, [4, 4, 2]),
        ({"groups": 10, "count": 7}, [7]),
        ({"keep": [0, 4, 1]}, [4, 0, 1]),
    ],
)
def test_a_ratio_or_a_count_is_shared_out_among_the_groups(fields: dict[str, Any], replaced: list[int]) -> None:
    layers = LearnedLayers(**(fields or {"keep": [2, 2, 1]}))
    assert layers.misfit(10) is None
    assert [len(group.blocks) - group.keep for group in layers.grouped(10)] == replaced
    assert layers.number(10) == sum(replaced)


def test_a_budget_suffers_no_other_edit(document: dict[str, Any]) -> None:
    put(document, "graft.0.layers", {"kind": "learned", "budget": 0.9})
    document["graft"].append({"target": "mlp", "operator": {"kind": "mlp"}, "layers": {"kind": "all"}})
    assert_says(refusal(document), "graft.0.layers.budget", "0.9", "no other edit")


def test_two_edits_on_one_site_are_refused_naming_the_site_and_the_first_edit(document: dict[str, Any]) -> None:
    document["graft"].append({"target": "mha", "operator": {"kind": "swa"}, "layers": {"kind": "all"}})
    assert_says(refusal(document), "graft.1.layers", "'01.mha'", "graft.0")


def test_two_edits_on_different_targets_of_one_block_are_accepted(document: dict[str, Any]) -> None:
    document["graft"].append({"target": "mlp", "operator": {"kind": "mlp"}, "layers": {"kind": "all"}})
    sites = [str(edit.site) for edit in job_from(document).edits()]
    assert sites == ["00.mlp", "01.mha", "01.mlp", "02.mlp", "03.mha", "03.mlp"]


def test_every_problem_gets_a_line_of_its_own(document: dict[str, Any]) -> None:
    put(document, "seed", -1)
    put(document, "graft.0.operator.kernel", 0)
    put(document, "distill.epoch", 3)
    lines = refusal(document)
    assert sorted(line.partition(":")[0] for line in lines) == ["distill.epoch", "graft.0.operator.kernel", "seed"]


def test_a_long_value_is_shortened(document: dict[str, Any]) -> None:
    (line,) = refusal(put(document, "seed", "x\n" * 1000))
    assert len(line) < 250 and "\n" not in line


# -- files


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"name: x\nmodel: {kind: dit\ngraft: 1\n", "line 3"),
        (b"name: x\n\tmodel: 1\n", "line 2"),
        (b"- name: x\n", "mapping"),
        (b"just words", "mapping"),
        (b"", "mapping"),
        (b"\xff\xfe\x00binary\x9f", "not text"),
        (b"name: !!python/object/apply:os.system ['true']\n", "line 1"),
        (b"name: x\nseed: 1\nseed: 2\n", ", line 3, column 1: not valid YAML: the key 'seed' is in line 2 already"),
        (b"model:\n  depth: 1\n  depth: 2\n", ", line 3, column 3: not valid YAML: the key 'depth'"),
        (b"name: 0b_\n", "line 1, column 7: not valid YAML: a number that cannot be read"),
    ],
    ids=["unbalanced", "tab", "list", "scalar", "empty", "binary", "python tag", "twice", "twice below", "no number"],
)
def test_a_file_that_is_no_job_is_refused_in_one_line_that_names_it(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        load(path)
    (line,) = caught.value.lines
    assert "\n" not in line and line.startswith(str(path)) and says in line


def test_a_file_extends_another_section_by_section(tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(document))
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\nname: middle\nfinetune: {steps: 7}\n")
    (tmp_path / "sub" / "top.yaml").write_text(
        "extends: ../middle.yaml\nname: top\ngraft: [{kind: parallel}]\nevaluate: {sampler: {kind: ancestral}}\n"
    )
    base, top = load(tmp_path / "base.yaml"), load(tmp_path / "sub" / "top.yaml", ["finetune.lr=0.5"])
    assert top.name == "top" and len(top.graft) == 1 and top.graft[0].kind == "parallel"
    assert top.finetune == base.finetune.model_copy(update={"steps": 7, "lr": 0.5})
    assert top.evaluate.samples == base.evaluate.samples
    assert top.evaluate.sampler == AncestralSampler()  # another kind: nothing of the old one stays


def test_a_merge_key_is_no_key_twice(tmp_path: Path, document: dict[str, Any]) -> None:
    document["finetune"] = {"steps": 3}
    text = yaml.safe_dump(document).replace("finetune:\n", "finetune:\n  <<: &recipe {steps: 9, lr: 0.5}\n")
    (tmp_path / "job.yaml").write_text(text + "resources: {base: {cpu: 1}, search: {cpu: 1}}\n")
    job = load(tmp_path / "job.yaml")
    assert (job.finetune.steps, job.finetune.lr) == (3, 0.5)


@pytest.mark.parametrize("in_base", [True, False])
def test_a_section_extended_by_its_default_kind_keeps_its_fields(
    tmp_path: Path, document: dict[str, Any], in_base: bool
) -> None:
    if not in_base:
        del document["model"]["kind"]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(document))
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nmodel: {kind: dit, depth: 6}\n")
    model = load(tmp_path / "top.yaml").model
    assert (model.depth, model.width, model.heads, model.patch) == (6, 32, 2, 2)


def test_a_section_without_a_kind_is_of_the_default_one_when_it_is_extended(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    document["data"] = {"image_size": 24}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(document))
    (tmp_path / "same.yaml").write_text("extends: base.yaml\ndata: {kind: digits, heldout: 0.25}\n")
    (tmp_path / "other.yaml").write_text("extends: base.yaml\ndata: {kind: image_folder, path: here}\n")
    same, other = load(tmp_path / "same.yaml").data, load(tmp_path / "other.yaml").data
    assert (same.image_size, same.heldout) == (24, 0.25)
    assert other.image_size == 256


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("extends: ''", "self.yaml: extends: got ''; accepted: the path of another job's file"),
        ("extends: ' '", "self.yaml: extends: got ' '; accepted: the path"),
        ("extends:", "self.yaml: extends: got nothing; accepted: the path"),
        ("extends: self.yaml", "which extends this file"),
        ("extends: [a]", "extends: got ['a']; accepted: the path"),
        ("extends: none.yaml", "none.yaml: cannot be read"),
    ],
)
def test_what_cannot_be_extended_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "self.yaml").write_text(text)
    with pytest.raises(SpecError) as caught:
        load(tmp_path / "self.yaml")
    assert len(caught.value.lines) == 1 and told in caught.value.lines[0]


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["missing", "a folder"])
def test_a_file_that_cannot_be_read_is_refused_in_one_line_that_names_it(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "job.yaml"
    make(path)
    with pytest.raises(SpecError, match="cannot be read") as caught:
        load(path)
    (line,) = caught.value.lines
    assert line.startswith(f"{path}: ") and "accepted: " in line


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_the_example_is_a_valid_job(path: Path) -> None:
    assert load(path).edits()


def test_a_job_survives_a_round_trip_through_yaml(document: dict[str, Any]) -> None:
    job = job_from(document)
    assert job_from(yaml.safe_load(yaml.safe_dump(job.model_dump(mode="json")))) == job


# -- overrides


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("seed=7", lambda job: job.seed, 7),
        ("name=other", lambda job: job.name, "other"),
        ("weights.lr=1e-3", lambda job: job.weights.lr, 1e-3),
        ("finetune.control=false", lambda job: job.finetune.control, False),
        ("finetune.deepspeed.zero=3", lambda job: job.finetune.deepspeed.zero, 3),
        ("graft.0.operator.kernel=8", lambda job: job.graft[0].operator.kernel, 8),
        ("graft[0].operator.kernel=8", lambda job: job.graft[0].operator.kernel, 8),
        ("graft.0.layers.blocks=[0]", lambda job: job.graft[0].layers.blocks, (0,)),
        ("graft[0].layers.blocks[1]=2", lambda job: job.graft[0].layers.blocks, (1, 2)),
        ("distill.milestones.0=5", lambda job: job.distill.milestones, (5,)),
        ("evaluate.sampler.guidance=4.0", lambda job: job.evaluate.sampler.guidance, 4.0),
        ("store=s3://bucket/a=b", lambda job: job.store, "s3://bucket/a=b"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_override_sets_the_field(document: dict[str, Any], override: str, read: Any, value: object) -> None:
    assert read(job_from(document, [override])) == value


def test_the_last_override_of_a_field_wins(document: dict[str, Any]) -> None:
    assert job_from(document, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("kind_is", ["graft.0.operator.kind=swa", "graft[0].operator.kind=swa"])
def test_another_kind_drops_the_fields_of_the_old_one(document: dict[str, Any], kind_is: str) -> None:
    edits = job_from(document, [kind_is, "graft.0.operator.window=6"]).graft[0]
    assert isinstance(edits, OperatorEdits)
    assert edits.operator.model_dump(exclude_defaults=True) == {"window": 6}
    assert edits.operator.kind == "swa"


def test_the_same_kind_again_keeps_its_fields(document: dict[str, Any]) -> None:
    put(document, "graft.0.operator.kernel", 9)
    edits = job_from(document, ["graft.0.operator.kind=hyena_y"]).graft[0]
    assert isinstance(edits, OperatorEdits) and isinstance(edits.operator, HyenaY)
    assert edits.operator.kernel == 9


def test_the_kind_that_a_section_has_by_default_keeps_its_fields(document: dict[str, Any]) -> None:
    del document["model"]["kind"], document["data"]["kind"]
    put(document, "data.image_size", 24)
    bare = copy.deepcopy(document)
    put(bare, "data.kind", "digits")
    assert job_from(document, ["graft.0.kind=replace", "model.kind=dit", "data.kind=digits"]) == job_from(bare)


def test_another_kind_than_the_default_one_drops_the_fields(document: dict[str, Any]) -> None:
    (edit,) = job_from(document, ["graft.0.kind=parallel"]).graft
    assert edit == ParallelEdits()


def test_an_item_of_an_empty_list_is_refused_saying_so(document: dict[str, Any]) -> None:
    lines = refusal(document, "graft=[]", "graft.0.x=1")
    assert_says(lines, "--set graft.0", "'0'", "the list is empty")


def test_a_key_twice_in_an_override_is_refused(document: dict[str, Any]) -> None:
    assert_says(refusal(document, "model={depth: 1, depth: 2}"), "--set model", "'{depth", "each key once")


def test_extends_is_suggested_and_belongs_in_a_file(document: dict[str, Any]) -> None:
    lines = refusal(put(copy.deepcopy(document), "extend", "a.yaml"))
    assert_says(lines, "extend", "'a.yaml'", "extends")
    assert lines[0].endswith("did you mean extends?")
    assert refusal(document, "extends=a.yaml") == ["extends: got 'a.yaml'; accepted: in a job's file only"]


@pytest.mark.parametrize(
    ("override", "path", "given"),
    [
        ("seed=abc", "seed", "'abc'"),
        ("finetune.steps=1.5", "finetune.steps", "1.5"),
        ("finetune.control=perhaps", "finetune.control", "'perhaps'"),
        ("graft.0.operator.kernel=[4]", "graft.0.operator.kernel", "[4]"),
        ("seed=", "seed", "nothing"),
    ],
)
def test_an_override_is_checked_like_the_file(document: dict[str, Any], override: str, path: str, given: str) -> None:
    assert_says(refusal(document, override), path, given, "")


@pytest.mark.parametrize(
    ("override", "path", "given"),
    [
        ("nonsense", "--set", "'nonsense'"),
        ("=3", "--set", "'=3'"),
        ("seed={a", "--set seed", "'{a'"),
        ("seed=!!python/object/apply:os.getcwd []", "--set seed", "'!!python"),
        ("graft.1.target=mlp", "--set graft.1", "'1'"),
        ("graft[1].target=mlp", "--set graft.1", "'1'"),
        ("graft.-1.target=mlp", "--set graft.-1", "'-1'"),
        ("graft.\u00b2=3", "--set graft.\u00b2", "'\u00b2'"),
        ("graft.\u00b2.target=mlp", "--set graft.\u00b2", "'\u00b2'"),
        ("seed=0b_", "--set seed", "'0b_'"),
        ("graft.first.target=mlp", "--set graft.first", "'first'"),
        ("distill.milestones.1=7", "--set distill.milestones.1", "'1'"),
        ("name.first=x", "--set name", "'small'"),
        ("name.kind=x", "--set name", "'small'"),
        ("distill.milestones.0.x=1", "--set distill.milestones.0", "3"),
        ("distill.milestones.0.kind=1", "--set distill.milestones.0", "3"),
        ("distill.milestones.0.x.y=1", "--set distill.milestones.0", "3"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(
    document: dict[str, Any], override: str, path: str, given: str
) -> None:
    assert_says(refusal(document, override), path, given, "")


# -- models and layers


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize(
    ("letter", "depth", "width", "heads"),
    [("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16), ("XL", 28, 1152, 16)],
)
def test_a_published_size_stands_for_its_shape(letter: str, depth: int, width: int, heads: int, patch: int) -> None:
    model = DitModel.model_validate({"size": f"{letter}/{patch}"})
    assert (model.depth, model.width, model.heads, model.patch) == (depth, width, heads, patch)


def test_half_interleaved_takes_every_second_block() -> None:
    assert InterleavedLayers(ratio=0.5).candidates(28) == tuple(range(1, 28, 2))


def test_three_quarters_interleaved_leaves_every_fourth_block() -> None:
    left = set(range(28)) - set(InterleavedLayers(ratio=0.75).candidates(28))
    assert left == {0, 4, 8, 12, 16, 20, 24}


@pytest.mark.parametrize(("depth", "percent"), [(28, 25), (28, 100), (10, 70), (8, 13), (50, 58)])
def test_interleaving_takes_its_share_whatever_its_binary_fraction(depth: int, percent: int) -> None:
    # In binary, 50 * 0.58 is less than 29.
    assert len(InterleavedLayers(ratio=percent / 100).candidates(depth)) == depth * percent // 100


def test_all_takes_every_block() -> None:
    assert AllLayers().candidates(3) == (0, 1, 2)


# -- specs as values


def test_what_cannot_change_a_result_is_dropped_however_deep() -> None:
    class Inner(Spec):
        matters: int = 1
        cannot_matter: Annotated[int, Unkeyed()] = 2

    class Outer(Spec):
        one: Inner = Inner()
        several: tuple[Inner, ...] = (Inner(), Inner())
        hidden: Annotated[Inner, Unkeyed()] = Inner()

    assert keyed(Outer()) == {"one": {"matters": 1}, "several": [{"matters": 1}, {"matters": 1}]}


def test_a_spec_cannot_be_changed(document: dict[str, Any]) -> None:
    job = job_from(document)
    with pytest.raises(ValidationError, match="frozen"):
        job.seed = 3  # type: ignore[misc]  # which is what is promised


def test_the_schema_describes_every_section() -> None:
    assert set(job_schema()["properties"]) == {"extends", *JobSpec.model_fields}


@pytest.mark.parametrize(
    "modules", ["graftwork.specs.job, graftwork.specs.reading.load", "graftwork", "graftwork.pipeline.cli.app"]
)
def test_the_front_door_opens_without_the_heavy_libraries(modules: str) -> None:
    check = f"import sys, {modules}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_long_line_is_cut_between_words_and_keeps_what_is_accepted() -> None:
    names = ", ".join(f"blocks.{number}.adaLN_modulation.1.weight" for number in range(40))
    line = problem(f"weights.path: got a file that lacks {names}; accepted: a checkpoint of the job's model")
    assert len(line) <= 600 and line.endswith(" ...; accepted: a checkpoint of the job's model")
    shown_names = line.partition("lacks ")[2].partition(" ...")[0].split(", ")
    assert len(shown_names) > 5 and set(shown_names) <= set(names.split(", "))


def test_what_is_accepted_is_said_once() -> None:
    assert refusal_line("a", "x", "y") == "a: got x; accepted: y"
    assert refusal_line("a", "x; accepted: z", "y") == "a: got x; accepted: z"


@pytest.mark.parametrize("text", ["x" * 2000, "word " * 400, "; accepted: " + "y" * 2000, ""])
def test_no_line_is_longer_than_its_limit(text: str) -> None:
    assert len(problem(text)) <= 600


def test_a_base_that_others_extend_says_that_it_is_one(tmp_path: Path) -> None:
    base = ROOT / "examples" / "imagenet" / "dit-xl-2.yaml"
    with pytest.raises(SpecError) as caught:
        load(base)
    (line,) = caught.value.lines
    assert "which has no graft: it is a base that others extend; accepted: one of those beside it, depth-to" in line
    assert "and 16 more; or one with extends: dit-xl-2.yaml" in line
    assert load(base, ["graft=[{kind: parallel}]"]).graft
    alone = tmp_path / "alone.yaml"
    alone.write_text(base.read_text())
    with pytest.raises(SpecError, match=r"^graft: missing; accepted: "):
        load(alone)
    (tmp_path / "other.yaml").write_text("extends: ./alone.yaml  # with more\n")
    with pytest.raises(SpecError) as caught:
        load(alone, ["seed=x"])
    assert [line.partition(": ")[0] for line in caught.value.lines] == [str(alone), "seed"]
