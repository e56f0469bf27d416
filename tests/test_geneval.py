"""GenEval's prompts, rules, folders and results, on constructed detections; no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from graftwork.specs.problems import SpecError
from graftwork.stages.evaluation.geneval import files
from graftwork.stages.evaluation.geneval.layout import FolderContent, ImageFolder
from graftwork.stages.evaluation.geneval.prompts import Prompt, read_prompts
from graftwork.stages.evaluation.geneval.results import (
    GenEvalScore,
    Result,
    TagScore,
    paired_difference,
    read_results,
    score,
    write_results,
)
from graftwork.stages.evaluation.geneval.rules import (
    Box,
    DetectedObject,
    Judgement,
    confident_objects,
    judge_image,
    relative_positions,
)
from graftwork.stages.evaluation.geneval.vocabulary import (
    GENEVAL,
    GENEVAL_NAMES,
    PROMPT_TAGS,
    RELATIONS,
    Relation,
    Tag,
    Vocabulary,
)

SHAPES = Vocabulary(("square", "cross", "triangle", "ring"), ("red", "green", "blue", "yellow"))
# One line of each tag, as published.
LINES = [
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
    '{"tag": "two_object", "include": [{"class": "tie", "count": 1}, {"class": "broccoli", "count": 1}], '
    '"prompt": "a photo of a tie and a broccoli"}',
    '{"tag": "counting", "include": [{"class": "bus", "count": 3}], "exclude": [{"class": "bus", "count": 4}], '
    '"prompt": "a photo of three buses"}',
    '{"tag": "colors", "include": [{"class": "pizza", "count": 1, "color": "purple"}], '
    '"prompt": "a photo of a purple pizza"}',
    '{"tag": "position", "include": [{"class": "couch", "count": 1}, {"class": "bird", "count": 1, '
    '"position": ["left of", 0]}], "prompt": "a photo of a bird left of a couch"}',
    '{"tag": "color_attr", "include": [{"class": "dog", "count": 1, "color": "white"}, {"class": "potted plant", '
    '"count": 1, "color": "blue"}], "prompt": "a photo of a white dog and a blue potted plant"}',
]


def prompt_of(
    *include: Mapping[str, Any], tag: str = "two_object", exclude: Sequence[Mapping[str, Any]] = ()
) -> Prompt:
    return Prompt.model_validate({"tag": tag, "include": include, "exclude": exclude, "prompt": "a photo"})


def wanted(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


# -- vocabulary


def test_the_vocabulary_has_cocos_classes_in_order_and_genevals_other_words() -> None:
    assert len(GENEVAL.classes) == len(set(GENEVAL.classes)) == 80
    places = {0: "person", 63: "laptop", 64: "computer mouse", 65: "tv remote", 66: "computer keyboard"}
    assert {index: GENEVAL.classes[index] for index in places} == places and GENEVAL.classes[79] == "toothbrush"
    assert (len(GENEVAL.colours), len(RELATIONS), len(PROMPT_TAGS)) == (10, 4, 6)


def test_other_names_of_classes_are_none_of_genevals_and_stand_for_one() -> None:
    assert not {*GENEVAL_NAMES} & {*GENEVAL.classes} and {*GENEVAL_NAMES.values()} <= {*GENEVAL.classes}


# -- prompts


def prompt_file(folder: Path, content: str | bytes) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(folder: Path, content: str | bytes, vocabulary: Vocabulary = GENEVAL) -> list[str]:
    """What is said of a file, without its name."""
    path = prompt_file(folder, content)
    with pytest.raises(SpecError) as caught:
        read_prompts(path, vocabulary)
    assert all(
        line.startswith(str(path)) and "\n" not in line for line in caught.value.lines[: files.MAX_NAMED_PROBLEMS]
    )
    return [line.removeprefix(str(path)) for line in caught.value.lines]


def test_published_lines_are_read_and_written_as_they_are(tmp_path: Path) -> None:
    prompts = read_prompts(prompt_file(tmp_path, "\n".join(LINES) + "\n"))
    assert [json.dumps(prompt.document()) for prompt in prompts] == LINES
    assert [prompt.tag for prompt in prompts] == list(PROMPT_TAGS)


def test_a_prompt_has_what_its_line_says(tmp_path: Path) -> None:
    (colour, position) = read_prompts(prompt_file(tmp_path, "\n".join(LINES[3:5])))
    assert (colour.include[0].class_name, colour.include[0].colour) == ("pizza", "purple")
    assert position.include[1].position == ("left of", 0) and position.exclude == ()


def test_a_prompt_cannot_be_changed(tmp_path: Path) -> None:
    (prompt,) = read_prompts(prompt_file(tmp_path, LINES[0]))
    with pytest.raises(ValidationError, match="frozen"):
        prompt.prompt = "another"  # type: ignore[misc]


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + "\n".join(LINES[:2]),
        "\r\n".join([*LINES[:2], ""]),
        "\n\n" + "\n\n".join(LINES[:2]) + "\n \n",
    ],
    ids=["byte order mark", "CRLF", "blank lines"],
)
def test_what_editors_leave_in_a_file_is_tolerated(tmp_path: Path, content: str) -> None:
    assert [json.dumps(prompt.document()) for prompt in read_prompts(prompt_file(tmp_path, content))] == LINES[:2]


def test_a_prompt_may_come_twice(tmp_path: Path) -> None:
    first, second = read_prompts(prompt_file(tmp_path, f"{LINES[0]}\n{LINES[0]}"))
    assert first == second


CAT = '{"class": "cat", "count": 1}'
PROBLEMS = {
    "include: got []; accepted: at least one": '"include": []',
    "include: got nothing; accepted: a value": '"exclude": []',
    "include: got 'cat'; accepted: a list": '"include": "cat"',
    "include.0: got 'cat'; accepted: a JSON object": '"include": ["cat"]',
    "include.0.class: got nothing; accepted: a value": '"include": [{"count": 1}]',
    "include.0.count: got 0; accepted: greater than or equal to 1": '"include": [{"class": "cat", "count": 0}]',
    "include.0.count: got True; accepted: a valid integer": '"include": [{"class": "cat", "count": true}]',
    "include.0.count: got '2'; accepted: a valid integer": '"include": [{"class": "cat", "count": "2"}]',
    "include.0.count: got 1.0; accepted: a valid integer": '"include": [{"class": "cat", "count": 1.0}]',
    "include.0.colour: got 'red'; accepted: no field of this name": (
        '"include": [{"class": "cat", "count": 1, "colour": "red"}]'
    ),
    "include.0.color: got 'reddish'; accepted: red, orange, yellow, green, blue, purple, pink, brown, black, white; "
    "did you mean red?": '"include": [{"class": "cat", "count": 1, "color": "reddish"}]',
    "include.1.position.0: got 'on'; accepted: 'left of', 'right of', 'above' or 'below'": (
        f'"include": [{CAT}, {{"class": "dog", "count": 1, "position": ["on", 0]}}]'
    ),
    "include.1.position.1: got 1; accepted: an earlier index, at most 0": (
        f'"include": [{CAT}, {{"class": "dog", "count": 1, "position": ["above", 1]}}]'
    ),
    "include.1.position.1: got -1; accepted: greater than or equal to 0": (
        f'"include": [{CAT}, {{"class": "dog", "count": 1, "position": ["above", -1]}}]'
    ),
    "include.0.position.1: got 0; accepted: no position for the first object": (
        '"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]'
    ),
    "exclude.0.count: got 0; accepted: greater than or equal to 1": (
        f'"include": [{CAT}], "exclude": [{{"class": "cat", "count": 0}}]'
    ),
    "exclude.0.color: got 'red'; accepted: no field of this name": (
        f'"include": [{CAT}], "exclude": [{{"class": "cat", "count": 2, "color": "red"}}]'
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_field_that_is_wrong_is_refused_in_one_line(tmp_path: Path, problem: str) -> None:
    line = f'{{"tag": "position", {PROBLEMS[problem]}, "prompt": "a photo"}}'
    assert refusal(tmp_path, f"{LINES[0]}\n{line}\n") == [f":2: {problem}"]


def test_an_unknown_class_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    (line,) = refusal(tmp_path, LINES[0].replace('"bench"', '"mouse"'))
    assert line.startswith(":1: include.0.class: got 'mouse'; accepted: person, bicycle, car, ")
    assert line.endswith("and 68 more; did you mean computer mouse?")


def test_an_unknown_tag_is_refused(tmp_path: Path) -> None:
    (line,) = refusal(tmp_path, LINES[0].replace("single_object", "single"))
    accepted = "'single_object', 'two_object', 'counting', 'colors', 'position' or 'color_attr'"
    assert line == f":1: tag: got 'single'; accepted: {accepted}"


def test_a_prompt_of_several_lines_is_refused(tmp_path: Path) -> None:
    (line,) = refusal(tmp_path, LINES[0].replace("a photo", "a\\nphoto"))
    assert line.startswith(":1: prompt: got 'a\\nphoto of a bench'; accepted: ")


@pytest.mark.parametrize("text", ["{'tag'", "[" * 100_000, '{"count": ' + "9" * 5000 + "}"])
def test_a_line_that_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    (line,) = refusal(tmp_path, f"{LINES[0]}\n{text}")
    assert line.startswith(":2: line: got ") and line.endswith("; accepted: a JSON object")


def test_a_line_that_is_no_object_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "[1]") == [":1: line: got [1]; accepted: a JSON object"]


@pytest.mark.parametrize("content", ["", "\ufeff\r\n", "\n \n"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: str) -> None:
    assert refusal(tmp_path, content) == [": got no lines; accepted: one JSON object a line"]


def test_a_file_that_is_not_utf_8_is_refused_with_the_line(tmp_path: Path) -> None:
    content = f"{LINES[0]}\n".encode() + LINES[0].replace("bench", "bänch").encode("latin-1")
    assert refusal(tmp_path, content) == [":2: got bytes that are not UTF-8; accepted: text in UTF-8"]


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"absent\.jsonl: got No such file or directory; accepted: a file"):
        read_prompts(tmp_path / "absent.jsonl")


def test_every_wrong_line_is_named_up_to_a_number(tmp_path: Path) -> None:
    wrong = LINES[0].replace('"count": 1', '"count": 0')
    two = refusal(tmp_path, f"{wrong}\n{LINES[0]}\n{wrong}")
    assert [line.partition(" ")[0] for line in two] == [":1:", ":3:"]
    many = refusal(tmp_path, f"{wrong}\n" * (files.MAX_NAMED_PROBLEMS + 3))
    assert len(many) == files.MAX_NAMED_PROBLEMS + 1 and many[-1] == "and 3 more problems"


def test_a_caller_may_have_another_vocabulary(tmp_path: Path) -> None:
    ring = LINES[3].replace("pizza", "ring").replace("purple", "green")
    assert read_prompts(prompt_file(tmp_path, ring), SHAPES)[0].include[0].class_name == "ring"
    (line,) = refusal(tmp_path, ring.replace('"green"', '"purple"'), SHAPES)
    assert line == ":1: include.0.color: got 'purple'; accepted: red, green, blue, yellow"
    assert "accepted: square, cross, triangle, ring" in refusal(tmp_path, LINES[0], SHAPES)[0]


# -- the rules: which objects count


def instance(score: float = 0.95, box: Box = (0, 0, 10, 10)) -> DetectedObject:
    return DetectedObject(score, box)


def no_colours(class_name: str, objects: Sequence[DetectedObject]) -> list[str]:
    raise AssertionError(f"a colour of {class_name} was asked for")


def judge(prompt: Prompt, **detections: Sequence[DetectedObject]) -> Judgement:
    return judge_image(prompt, detections, no_colours)


ABOVE_03, ABOVE_09 = (float(np.nextafter(np.float32(value), np.float32(1))) for value in (0.3, 0.9))


@pytest.mark.parametrize(
    ("tag", "score", "is_confident"),
    [
        ("colors", 0.3, False),
        ("colors", float(np.float32(0.3)), False),  # a little above 0.3 in 64 bits
        ("colors", ABOVE_03, True),
        ("counting", ABOVE_03, False),
        ("counting", 0.9, False),
        ("counting", float(np.float32(0.9)), False),
        ("counting", ABOVE_09, True),
    ],
)
def test_an_object_counts_above_the_score_of_the_tag(tag: Tag, score: float, is_confident: bool) -> None:
    assert ("cat" in confident_objects({"cat": [instance(score)]}, tag)) is is_confident


@pytest.mark.parametrize("tag", [tag for tag in PROMPT_TAGS if tag != "counting"])
def test_counting_alone_has_the_higher_score(tag: Tag) -> None:
    assert confident_objects({"cat": [instance(0.5)]}, tag)


def test_objects_come_by_score_and_of_equal_ones_the_later_first() -> None:
    objects = [
        instance(0.5, (0, 0, 1, 1)),
        instance(0.9, (0, 0, 2, 2)),
        instance(0.5, (0, 0, 3, 3)),
        instance(0.2, (0, 0, 4, 4)),
    ]
    confident = confident_objects({"cat": objects}, "colors")
    assert confident == {"cat": [objects[1], objects[2], objects[0]]}


def test_the_best_16_objects_of_a_class_count() -> None:
    scores = np.linspace(0.4, 0.8, 20).tolist()
    confident = confident_objects({"cat": [instance(score) for score in scores], "dog": [instance()]}, "colors")
    assert [cat.score for cat in confident["cat"]] == scores[:3:-1] and len(confident["dog"]) == 1


def test_a_judgement_has_the_objects_that_it_considered() -> None:
    objects = judge(prompt_of(wanted("cat")), cat=[instance(0.2), instance(0.6)], dog=[instance(0.1)]).objects
    assert objects == {"cat": [instance(0.6)]}


# -- the rules: counts


def test_an_image_with_all_objects_is_correct() -> None:
    judgement = judge(prompt_of(wanted("cat"), wanted("dog")), cat=[instance()], dog=[instance()])
    assert judgement.correct and judgement.reasons == ()


def test_each_missing_object_is_a_reason() -> None:
    judgement = judge(prompt_of(wanted("cat", 2), wanted("dog")), cat=[instance()])
    assert not judgement.correct
    assert judgement.reasons == ("expected cat>=2, found 1", "expected dog>=1, found 0")


def test_more_objects_than_asked_for_are_correct_unless_excluded() -> None:
    cats = [instance(), instance(), instance()]
    assert judge(prompt_of(wanted("cat", 2)), cat=cats).correct
    judgement = judge(prompt_of(wanted("cat", 2), exclude=[wanted("cat", 3)]), cat=cats)
    assert judgement.reasons == ("expected cat<3, found 3",)


def test_fewer_objects_than_the_excluded_number_are_correct() -> None:
    prompt = prompt_of(wanted("cat"), exclude=[wanted("cat", 3), wanted("dog")])
    assert judge(prompt, cat=[instance(), instance()]).correct


def test_an_exclusion_counts_no_more_than_16_objects() -> None:
    cats = [instance()] * 20
    assert judge(prompt_of(wanted("cat"), exclude=[wanted("cat", 17)]), cat=cats).correct
    judgement = judge(prompt_of(wanted("cat"), exclude=[wanted("cat", 16)]), cat=cats)
    assert judgement.reasons == ("expected cat<16, found 16",)


# -- the rules: colours


class Painted:
    """Objects whose colours are known by their boxes' left edge; it notes what it was asked."""

    def __init__(self, *colours: str) -> None:
        self.colours = colours
        self.asked: list[tuple[str, int]] = []

    def __call__(self, class_name: str, objects: Sequence[DetectedObject]) -> list[str]:
        self.asked.append((class_name, len(objects)))
        return [self.colours[int(one.box[0])] for one in objects]


def painted_cats(*scores: float) -> dict[str, list[DetectedObject]]:
    return {"cat": [instance(score, (index, 0, index + 10, 10)) for index, score in enumerate(scores)]}


def test_an_object_of_the_colour_is_correct() -> None:
    assert judge_image(prompt_of(wanted("cat", color="red")), painted_cats(0.8), Painted("red")).correct


def test_only_the_best_objects_are_asked_for_their_colour() -> None:
    colours = Painted("red", "green", "red")
    judgement = judge_image(prompt_of(wanted("cat", 2, color="red")), painted_cats(0.9, 0.6, 0.5), colours)
    assert colours.asked == [("cat", 2)]
    assert judgement.reasons == ("expected red cat>=2, found 1 red; and 1 red, 1 green",)
    assert judge_image(prompt_of(wanted("cat", 2, color="red")), painted_cats(0.9, 0.5, 0.6), colours).correct


def test_a_reason_names_the_colours_in_their_order() -> None:
    prompt, detections = prompt_of(wanted("cat", 3, color="red")), painted_cats(0.9, 0.8, 0.7)
    judgement = judge_image(prompt, detections, Painted("white", "blue", "white"))
    assert judgement.reasons == ("expected red cat>=3, found 0 red; and 1 blue, 2 white",)
    judgement = judge_image(prompt, detections, Painted("teal", "blue", "teal"), ("teal", "blue"))
    assert judgement.reasons == ("expected red cat>=3, found 0 red; and 2 teal, 1 blue",)


def test_a_colour_is_asked_for_only_if_it_decides() -> None:
    assert judge(prompt_of(wanted("cat")), cat=[instance()]).correct
    assert not judge(prompt_of(wanted("cat", 2, color="red")), cat=[instance()]).correct


# -- the rules: positions

REFERENCE: Box = (100, 100, 120, 120)


def beside(x: float, y: float, size: float = 20) -> Box:
    """A square whose centre is so far to the right of the reference's, and below it."""
    return (110 + x - size / 2, 110 + y - size / 2, 110 + x + size / 2, 110 + y + size / 2)


@pytest.mark.parametrize(
    ("box", "relations"),
    [
        (beside(-50, 0), ("left of",)),
        (beside(50, 0), ("right of",)),
        (beside(0, -50), ("above",)),
        (beside(0, 50), ("below",)),
        (beside(-50, -50), ("left of", "above")),
        (beside(50, 50), ("right of", "below")),
        (beside(0, 0), ()),
        (beside(4, 0), ()),  # 0.1 of 20 + 20 pixels lies within the slack
        (beside(4, 4), ()),
        (beside(8, 0), ()),  # 4 beyond the slack, half of 8: not above it
        (beside(8.5, 0), ("right of",)),
        (beside(-8, 0), ()),
        (beside(0, 8), ()),
        (beside(0, -8), ()),
        (beside(0, -8.5), ("above",)),
        (beside(42, 60), ("right of", "below")),  # 38 and 56 beyond, of 73.2
        (beside(40, 70), ("below",)),  # 36 and 66 beyond, of 80.6
        (beside(16, 0, 60), ()),  # 8 beyond the slack of both sizes, half of 16
        (beside(17, 0, 60), ("right of",)),
    ],
)
def test_a_box_lies_where_most_of_the_offset_beyond_the_slack_points(box: Box, relations: tuple[Relation, ...]) -> None:
    assert relative_positions(box, REFERENCE) == relations


def test_an_offset_barely_beyond_the_slack_is_none() -> None:
    """At the size of a point the share would be 1, whatever the offset."""
    point, near, far = (0.0, 0.0, 0.0, 0.0), (0.0009, 0.0, 0.0009, 0.0), (0.0011, 0.0, 0.0011, 0.0)
    assert relative_positions(near, point) == () and relative_positions(far, point) == ("right of",)


def test_the_corners_of_a_box_may_come_in_any_order() -> None:
    left, top, right, bottom = beside(17, 0, 60)
    assert relative_positions((right, bottom, left, top), REFERENCE) == ("right of",)
    left, top, right, bottom = beside(16, 0, 60)
    assert relative_positions((right, bottom, left, top), REFERENCE) == ()


LEFT_OF_DOG = prompt_of(wanted("dog"), wanted("cat", position=["left of", 0]), tag="position")
TWO_DOGS = prompt_of(wanted("dog", 2), wanted("cat", 2, position=["left of", 0]), tag="position")


def at(x: float, score: float = 0.9) -> DetectedObject:
    return instance(score, (x, 0, x + 10, 10))


def test_an_object_in_the_relation_is_correct() -> None:
    assert judge(LEFT_OF_DOG, cat=[at(0)], dog=[at(50)]).correct


def test_an_object_in_another_relation_is_a_reason() -> None:
    assert judge(LEFT_OF_DOG, cat=[at(100)], dog=[at(50)]).reasons == (
        "expected cat left of target, found right of target",
    )
    diagonal = judge(LEFT_OF_DOG, cat=[instance(0.9, (100, 50, 110, 60))], dog=[at(50)])
    assert diagonal.reasons == ("expected cat left of target, found right of and below target",)
    assert judge(LEFT_OF_DOG, cat=[at(50)], dog=[at(50)]).reasons == ("expected cat left of target, found  target",)


@pytest.mark.parametrize(
    ("cats", "dogs", "where"),
    [
        ([at(20, 0.9), at(0, 0.8)], [at(50, 0.9), at(-20, 0.8)], "right of"),
        ([at(0, 0.9), at(90, 0.8)], [at(50, 0.9), at(60, 0.8)], "right of"),
        ([at(20, 0.9), at(90, 0.8)], [at(50, 0.9), instance(0.8, (20, -40, 30, -30))], "below"),
    ],
    ids=["the second reference", "the second object", "both"],
)
def test_the_first_pair_that_is_not_in_the_relation_is_the_reason(
    cats: list[DetectedObject], dogs: list[DetectedObject], where: str
) -> None:
    judgement = judge(TWO_DOGS, cat=cats, dog=dogs)
    assert judgement.reasons == (f"expected cat left of target, found {where} target",)


def test_the_relation_may_hold_between_all_objects_and_all_references() -> None:
    assert judge(TWO_DOGS, cat=[at(0), at(10)], dog=[at(50), at(60)]).correct


def test_the_best_objects_alone_are_in_the_relation() -> None:
    assert judge(LEFT_OF_DOG, cat=[at(0), at(100, 0.5)], dog=[at(50), at(-50, 0.5)]).correct
    assert not judge(LEFT_OF_DOG, cat=[at(0, 0.5), at(100)], dog=[at(50)]).correct
    assert not judge(LEFT_OF_DOG, cat=[at(0)], dog=[at(50, 0.5), at(-50)]).correct


def test_without_its_reference_an_object_is_in_no_relation() -> None:
    assert judge(LEFT_OF_DOG, cat=[at(0)]).reasons == (
        "expected dog>=1, found 0",
        "no target for cat to be left of",
    )


def test_a_reference_of_another_colour_is_no_reference() -> None:
    prompt = prompt_of(wanted("dog", color="red"), wanted("cat", position=["left of", 0]), tag="position")
    judgement = judge_image(prompt, {"cat": [at(0)], "dog": [at(1)]}, lambda name, objects: ["blue"])
    assert judgement.reasons == (
        "expected red dog>=1, found 0 red; and 1 blue",
        "no target for cat to be left of",
    )


def test_an_object_of_another_colour_is_not_asked_where_it_lies() -> None:
    prompt = prompt_of(wanted("dog"), wanted("cat", color="red", position=["left of", 0]), tag="position")
    judgement = judge_image(prompt, {"cat": [at(90)], "dog": [at(50)]}, lambda name, objects: ["blue"])
    assert judgement.reasons == ("expected red cat>=1, found 0 red; and 1 blue",)


def test_a_position_is_from_the_object_of_its_index() -> None:
    include = wanted("dog"), wanted("bird"), wanted("cat", position=["left of", 1])
    prompt = prompt_of(*include, tag="position")
    assert judge(prompt, dog=[at(0)], bird=[at(90)], cat=[at(50)]).correct
    assert not judge(prompt, dog=[at(90)], bird=[at(0)], cat=[at(50)]).correct


def test_an_object_out_of_its_relation_is_no_reference() -> None:
    include = wanted("dog"), wanted("cat", position=["left of", 0]), wanted("bird", position=["left of", 1])
    judgement = judge(prompt_of(*include, tag="position"), dog=[at(50)], cat=[at(90)], bird=[at(0)])
    assert judgement.reasons[1:] == ("no target for bird to be left of",)


# -- folders of images

PROMPTS = [Prompt.model_validate_json(line) for line in LINES]


def image(level: int = 0) -> Image.Image:
    return Image.new("RGB", (4, 4), (level, 0, 0))


def folder_of(root: Path, prompts: Sequence[Prompt] = PROMPTS[:3], num_samples: int = 2) -> ImageFolder:
    return ImageFolder(root / "images", prompts, num_samples)


def fill(root: Path) -> ImageFolder:
    folder = folder_of(root)
    for missing in folder.content().missing:
        folder.write(missing.prompt, missing.sample, image(10 * missing.prompt + missing.sample))
    return folder


def indices(content: FolderContent) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Which samples are present, and which are missing."""
    present, missing = ([(place.prompt, place.sample) for place in of] for of in (content.present, content.missing))
    return present, missing


def test_images_lie_in_the_published_layout(tmp_path: Path) -> None:
    root = fill(tmp_path).root
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    of_prompt = ["metadata.jsonl", "samples/0000.png", "samples/0001.png"]
    assert names == [f"{prompt:05d}/{name}" for prompt in range(3) for name in of_prompt]
    assert (root / "00002/metadata.jsonl").read_text() == f"{LINES[2]}\n"
    with Image.open(root / "00002/samples/0001.png") as read:
        assert read.getpixel((0, 0)) == (21, 0, 0)


def test_an_empty_folder_misses_every_sample(tmp_path: Path) -> None:
    content = folder_of(tmp_path).content()
    assert indices(content) == ([], [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)])
    assert content.note is not None and content.note.startswith("6 of 6 images are missing: 00000/samples/0000.png, ")


def test_a_full_folder_misses_none(tmp_path: Path) -> None:
    content = fill(tmp_path).content()
    assert len(content.present) == 6 and content.missing == () and content.note is None
    assert content.present[3].file == tmp_path / "images/00001/samples/0001.png"


@pytest.mark.parametrize("torn", [slice(0), slice(8), slice(-1), slice(1, None)], ids=str)
def test_a_torn_image_is_missing(tmp_path: Path, torn: slice) -> None:
    folder = fill(tmp_path)
    file = folder.sample_file(1, 1)
    file.write_bytes(file.read_bytes()[torn])
    assert indices(folder.content())[1] == [(1, 1)]


def test_missing_images_are_counted_in_one_line(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    for prompt, sample in [(0, 1), (1, 0), (1, 1), (2, 0)]:
        folder.sample_file(prompt, sample).unlink()
    names = "00000/samples/0001.png, 00001/samples/0000.png, 00001/samples/0001.png"
    assert folder.content().note == f"4 of 6 images are missing: {names} and 1 more"


def test_a_run_goes_on_with_what_is_missing_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    kept = folder.sample_file(0, 0).stat().st_mtime_ns
    folder.sample_file(2, 1).unlink()
    assert not fill(tmp_path).content().missing
    assert folder.sample_file(0, 0).stat().st_mtime_ns == kept


def test_an_image_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    with pytest.raises(OSError, match="CMYK"):
        folder.write(0, 0, Image.new("CMYK", (4, 4)))
    assert list((folder.prompt_folder(0) / "samples").iterdir()) == []


def test_a_file_of_before_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text("before")
    with pytest.raises(ZeroDivisionError):
        files.write_whole(file, lambda out: out.write(b"after") and 1 / 0)
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"] and file.read_text() == "before"


def mismatch(folder: ImageFolder) -> str:
    with pytest.raises(SpecError) as caught:
        folder.content()
    (line,) = caught.value.lines
    return line.removeprefix(f"{folder.root}/")


def test_images_of_other_prompts_are_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    got = mismatch(folder_of(tmp_path, [PROMPTS[0], PROMPTS[3], PROMPTS[2]]))
    assert got == "00001/metadata.jsonl: tag: got 'two_object'; accepted: 'colors', as in the prompts"
    renamed = PROMPTS[0].model_copy(update={"prompt": "a bench"})
    got = mismatch(folder_of(tmp_path, [renamed, *PROMPTS[1:3]]))
    accepted = "accepted: 'a bench', as in the prompts"
    assert got == f"00000/metadata.jsonl: prompt: got 'a photo of a bench'; {accepted}"


def test_folders_of_more_prompts_are_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    got = mismatch(folder_of(tmp_path, PROMPTS[:2]))
    assert got == "00002: got a folder of another prompt; accepted: 00000 to 00001"


def test_a_folder_of_a_number_written_otherwise_is_refused(tmp_path: Path) -> None:
    (fill(tmp_path).root / "1").mkdir()
    assert mismatch(folder_of(tmp_path)) == "1: got a folder of another prompt; accepted: 00000 to 00002"


def test_images_without_their_prompt_are_refused(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    (folder.prompt_folder(1) / "metadata.jsonl").unlink()
    assert mismatch(folder).startswith("00001/metadata.jsonl: got No such file or directory; accepted: ")


def test_a_prompts_file_of_several_lines_is_refused(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    (folder.prompt_folder(1) / "metadata.jsonl").write_text(f"{LINES[1]}\n{LINES[1]}\n")
    assert mismatch(folder) == "00001/metadata.jsonl: got 2 lines; accepted: that of the prompt"


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    (folder.root / "notes").mkdir()
    (folder.root / "00003").write_text("a file")
    (folder.prompt_folder(0) / "grid.png").write_bytes(b"")
    (folder.prompt_folder(0) / "samples" / "0007.png").write_bytes(b"")
    assert len(folder.content().present) == 6


# -- results


def result(prompt: int, sample: int, correct: bool, tag: Tag = "colors") -> Result:
    described = Prompt.model_validate({"tag": tag, "include": [wanted("cat")], "prompt": f"prompt {prompt}"})
    file = Path(f"images/{prompt:05d}/samples/{sample:04d}.png")
    return Result.of_judgement(file, described, Judgement(() if correct else ("no", "not"), {"cat": [instance(0.5)]}))


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = [result(0, 0, True), result(0, 1, False)]
    write_results(tmp_path / "results.jsonl", results)
    assert read_results(tmp_path / "results.jsonl") == results


def test_a_result_has_the_published_fields_in_their_order() -> None:
    line = json.loads(result(7, 2, False).line())
    assert list(line) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert line["filename"] == "images/00007/samples/0002.png" and line["correct"] is False
    assert line["reason"] == "no\nnot" and line["details"] == '{"cat": [[0.0, 0.0, 10.0, 10.0, 0.5]]}'
    assert line["metadata"] == '{"tag": "colors", "include": [{"class": "cat", "count": 1}], "prompt": "prompt 7"}'


# As pandas writes it for the published scorer, with / escaped.
OFFICIAL = (
    '{"filename":"images\\/00001\\/samples\\/0003.png","tag":"counting","prompt":"a photo of three buses",'
    '"correct":false,"reason":"expected bus>=3, found 1","metadata":' + json.dumps(LINES[2]) + ","
    '"details":"{\\"bus\\": [[1.0, 2.0, 3.0, 4.0, 0.95]], \\"car\\": []}"}'
)


def test_the_published_scorers_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(OFFICIAL + "\n")
    (read,) = read_results(tmp_path / "results.jsonl")
    assert read.place == (1, 3) and read.metadata == PROMPTS[2] and not read.correct
    assert read.details == {"bus": ((1.0, 2.0, 3.0, 4.0, 0.95),), "car": ()}


def test_metadata_and_details_may_be_objects_and_more_fields_may_follow(tmp_path: Path) -> None:
    line = json.loads(OFFICIAL)
    line |= {"metadata": json.loads(line["metadata"]), "details": json.loads(line["details"]), "seed": 4}
    (tmp_path / "results.jsonl").write_text(json.dumps(line))
    (tmp_path / "official.jsonl").write_text(OFFICIAL)
    assert read_results(tmp_path / "results.jsonl") == read_results(tmp_path / "official.jsonl")


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("metadata", "{", "metadata: got '{'; accepted: a JSON object, or its text"),
        ("correct", "yes", "correct: got 'yes'; accepted: a valid boolean"),
        ("correct", 1, "correct: got 1; accepted: a valid boolean"),
        ("tag", "color", "tag: got 'color'; accepted: 'single_object', "),
        ("filename", "a/0001.png", "filename: got 'a/0001.png'; accepted: a path that ends in PROMPT/samples/SAMPLE"),
        ("details", '{"bus": [[1, 2, 3, 4]]}', "details.bus.0.4: got nothing; accepted: a value"),
    ],
)
def test_a_result_that_is_wrong_is_refused_in_one_line(tmp_path: Path, field: str, value: object, problem: str) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(f"{OFFICIAL}\n{json.dumps(json.loads(OFFICIAL) | {field: value})}\n")
    with pytest.raises(SpecError) as caught:
        read_results(file)
    (line,) = caught.value.lines
    assert line.startswith(f"{file}:2: {problem}")


def test_an_image_that_comes_twice_is_refused(tmp_path: Path) -> None:
    write_results(tmp_path / "results.jsonl", [result(0, 0, True), result(1, 0, True), result(1, 0, False)])
    with pytest.raises(SpecError, match=r"filename: got 00001/samples/0000\.png 2 times; accepted: one line"):
        read_results(tmp_path / "results.jsonl")


# -- scores

PUBLISHED = {"single_object": (260, 320), "two_object": (244, 396), "counting": (148, 320)}
PUBLISHED |= {"colors": (290, 376), "position": (43, 400), "color_attr": (86, 400)}


def test_the_overall_score_is_the_mean_of_the_tags_whatever_their_numbers() -> None:
    tags = {tag: TagScore(*PUBLISHED[tag]) for tag in PROMPT_TAGS}
    assert round(100 * GenEvalScore(tags).overall, 2) == 49.75


def test_images_are_counted_by_tag() -> None:
    results = [result(0, 0, True, "position"), result(0, 1, False, "position"), result(1, 0, True, "counting")]
    scored = score(results)
    assert scored.tags == {"counting": TagScore(1, 1), "position": TagScore(1, 2)}
    assert scored.overall == 0.75 and list(scored.tags) == ["counting", "position"]


def test_a_score_says_which_tags_it_lacks() -> None:
    assert score([result(0, 0, True, "position")]).absent == tuple(tag for tag in PROMPT_TAGS if tag != "position")
    assert score(result(index, 0, True, tag) for index, tag in enumerate(PROMPT_TAGS)).absent == ()


# -- the paired difference

Images = dict[tuple[int, int], tuple[Tag, bool]]  # prompt and sample -> tag, whether it is correct


def results_of(images: Images) -> list[Result]:
    return [result(prompt, sample, correct, tag) for (prompt, sample), (tag, correct) in images.items()]


def seeded() -> np.random.Generator:
    return np.random.default_rng(7)


def random_images(prompts: int, share: float, seed: int, tag: Tag = "colors", samples: int = 1) -> Images:
    """All samples of a prompt are alike."""
    correct = np.random.default_rng(seed).random(prompts) < share
    return {(prompt, sample): (tag, bool(correct[prompt])) for prompt in range(prompts) for sample in range(samples)}


def test_a_set_differs_from_itself_by_nothing() -> None:
    results = results_of(random_images(20, 0.5, 0))
    difference = paired_difference(results, results, seeded())
    assert (difference.difference, difference.low, difference.high) == (0, 0, 0)


def test_the_interval_is_that_of_the_prompts_differences() -> None:
    first, second = random_images(300, 0.6, 1), random_images(300, 0.5, 2)
    gains = np.array([int(second[place][1]) - int(first[place][1]) for place in first])
    error = gains.std() / len(gains) ** 0.5
    interval = paired_difference(results_of(first), results_of(second), seeded())
    assert interval.difference == pytest.approx(gains.mean())
    assert interval.low == pytest.approx(gains.mean() - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(gains.mean() + 1.96 * error, abs=0.1 * error)


def test_what_is_hard_in_both_sets_does_not_widen_the_interval() -> None:
    first, second = (
        results_of(
            {
                (prompt, sample): ("colors", sample >= 4 - prompt % 4 - better)
                for prompt in range(30)
                for sample in range(4)
            }
        )
        for better in (0, 1)
    )
    difference = paired_difference(first, second, seeded())
    assert (difference.low, difference.high) == (0.25, 0.25) and difference.difference == pytest.approx(0.25)


def test_prompts_are_drawn_and_not_images() -> None:
    single, fourfold = (
        paired_difference(
            results_of(random_images(40, 0.5, 4, samples=samples)),
            results_of(random_images(40, 0.5, 5, samples=samples)),
            seeded(),
        )
        for samples in (1, 4)
    )
    assert single == fourfold and single.low < single.high


def test_prompts_are_drawn_within_their_tag() -> None:
    tags: dict[int, Tag] = {prompt: "colors" if prompt < 10 else "position" for prompt in range(40)}
    first = results_of({(prompt, 0): (tag, tag == "position") for prompt, tag in tags.items()})
    second = results_of({(prompt, 0): (tag, tag == "colors") for prompt, tag in tags.items()})
    difference = paired_difference(first, second, seeded())
    assert (difference.low, difference.difference, difference.high) == (0, 0, 0)


def test_tags_weigh_the_same_in_the_difference() -> None:
    tags: dict[int, Tag] = {prompt: "colors" if prompt < 10 else "position" for prompt in range(40)}
    first = results_of({(prompt, 0): (tag, False) for prompt, tag in tags.items()})
    second = results_of({(prompt, 0): (tag, tag == "colors") for prompt, tag in tags.items()})
    difference = paired_difference(first, second, seeded())
    assert (difference.low, difference.difference, difference.high) == (0.5, 0.5, 0.5)


def test_a_prompt_with_fewer_images_weighs_by_them() -> None:
    first: Images = {(0, 0): ("colors", False), (1, 0): ("colors", False), (1, 1): ("colors", False)}
    second: Images = {place: ("colors", place[0] == 0) for place in first}
    difference = paired_difference(results_of(first), results_of(second), seeded())
    assert difference.difference == pytest.approx(1 / 3) and (difference.low, difference.high) == (0, 1)


def test_the_interval_depends_on_the_seed_and_not_on_the_order_of_lines() -> None:
    first, second = results_of(random_images(50, 0.6, 1)), results_of(random_images(50, 0.5, 2))
    once = paired_difference(first, second, seeded())
    assert paired_difference(first[::-1], second[::-1], seeded()) == once
    assert paired_difference(first, second, np.random.default_rng(8)) != once


def test_a_swap_of_the_sets_turns_the_difference() -> None:
    first, second = results_of(random_images(50, 0.6, 1)), results_of(random_images(50, 0.5, 2))
    forth, back = paired_difference(first, second, seeded()), paired_difference(second, first, seeded())
    assert back.difference == pytest.approx(-forth.difference) and back.low == pytest.approx(-forth.high)


def test_sets_of_other_samples_are_refused() -> None:
    first, second = results_of(random_images(3, 0.5, 1, samples=2)), results_of(random_images(3, 0.5, 1, samples=1))
    message = (
        r"^paired difference: got 3 images in one set only, first 00000/samples/0001\.png; accepted: the same [^\n]*$"
    )
    with pytest.raises(SpecError, match=message):
        paired_difference(first, second, seeded())


def test_sets_of_other_prompts_are_refused() -> None:
    first, second = results_of(random_images(3, 0.5, 1)), results_of(random_images(3, 0.5, 1))
    second[1] = second[1].model_copy(update={"metadata": PROMPTS[0]})
    message = (
        r"^paired difference: got two prompts for 00001/samples/0000\.png, and 1 in all; accepted: the same [^\n]*$"
    )
    with pytest.raises(SpecError, match=message):
        paired_difference(first, second, seeded())
