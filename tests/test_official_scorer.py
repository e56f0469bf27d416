"""What goes to GenEval's own scorer, and what comes back: images in its folders, and its results."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from graftwork.pipeline import api
from graftwork.pipeline.planning.plan import make_plan
from graftwork.pipeline.runs import record
from graftwork.pipeline.runs.record import RunRecord, StepRecord
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.problems import SpecError, shown
from graftwork.specs.reading.load import load
from graftwork.stages.evaluation.metrics.geneval import GenevalJudge
from graftwork.stages.evaluation.samples import labels_of
from tests.conftest import Graft
from tests.scenes import PROMPTS, write_shapes_job
from tests.stores import commit

RUN = "scenes-tiny-0"
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 3, 16, 16), dtype=np.uint8)


def finished(folder: Path, *overrides: str) -> Store:
    """Return a store with a run of the tiny job of scenes that kept samples, as its steps would have left them."""
    settings = ["evaluate.keep_samples=true", f"store={folder / 'store'}", *overrides]
    made = make_plan(load(write_shapes_job(folder), settings))
    store, keys = Store(made.job.store), {step.name: step.key for step in made.steps}
    labels = labels_of(range(len(IMAGES)), len(IMAGES), len(PROMPTS)).numpy()
    commit(store, keys["text"], {"prompts.jsonl": (folder / "prompts.jsonl").read_bytes()})
    commit(store, keys["evaluate/stage2"], {"samples.npy": as_file(IMAGES), "labels.npy": as_file(labels)})
    run = RunRecord(
        run=RUN,
        name="scenes-tiny",
        status="finished",
        started="2025-11-20T22:00:00Z",
        job=made.job.model_dump(mode="json"),
        steps=[StepRecord(name=name, key=key, state="done") for name, key in keys.items()],
    )
    record.save(store, run)
    return store


def as_file(array: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def refusal(store: Store, name: str, out: Path) -> str:
    with pytest.raises(SpecError) as caught:
        api.images(name, out, store.url)
    (line,) = caught.value.lines
    return line


def test_a_rows_samples_lie_in_genevals_folders(tmp_path: Path) -> None:
    out = api.images(RUN, tmp_path / "images", finished(tmp_path).url)
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    of_prompt = ["metadata.jsonl", "samples/0000.png", "samples/0001.png"]
    assert files == [f"{number:05d}/{name}" for number in range(6) for name in of_prompt]
    for number, prompt in enumerate(PROMPTS):
        assert json.loads((out / f"{number:05d}/metadata.jsonl").read_text()) == prompt
        for sample in range(2):  # samples take turns at the six prompts
            with Image.open(out / f"{number:05d}/samples/{sample:04d}.png") as image:
                assert np.array_equal(np.asarray(image), IMAGES[6 * sample + number].transpose(1, 2, 0))


def test_the_command_says_where_the_images_are(graft: Graft, tmp_path: Path) -> None:
    store = finished(tmp_path)
    done = graft("images", "scenes", "images", "--store", store.url)
    assert (done.returncode, done.stdout) == (0, "images\n"), done.stderr
    again = graft("images", "scenes", "images", "--store", store.url)
    assert again.returncode == 2
    assert again.stderr == "graft: images: images: is there already; accepted: a new or empty folder\n"


def test_a_row_that_the_run_has_not_is_refused_with_those_it_has(tmp_path: Path) -> None:
    line = refusal(finished(tmp_path), f"{RUN}/stage1", tmp_path / "images")
    assert line == f"images: got '{RUN}/stage1'; accepted: {RUN}/rootstock, {RUN}/stage2"


def test_a_row_that_is_not_in_the_store_is_refused(tmp_path: Path) -> None:
    store = finished(tmp_path)
    line = refusal(store, f"{RUN}/rootstock", tmp_path / "images")
    missing = f"images: {RUN}/evaluate/rootstock is not in the store"
    assert line == f"{missing}; go on with: graft resume {RUN} --store {store.url}"


def test_a_run_that_kept_no_samples_is_refused_with_the_field_that_keeps_them(tmp_path: Path) -> None:
    line = refusal(finished(tmp_path, "evaluate.keep_samples=false"), RUN, tmp_path / "images")
    accepted = "accepted: a run that kept its samples, by --set evaluate.keep_samples=true"
    assert line == f"images: got {RUN}, with evaluate.keep_samples false; {accepted}"


@pytest.mark.parametrize("prompts", ["prompts.txt", "null"])
def test_a_run_of_other_prompts_is_refused(tmp_path: Path, prompts: str) -> None:
    (tmp_path / "prompts.txt").write_text("a ring\n")
    given = prompts if prompts == "null" else str(tmp_path / prompts)
    overrides = [f"evaluate.prompts={given}", "evaluate.metrics=[fid]", f"evaluate.reference={tmp_path}/some.npz"]
    (tmp_path / "some.npz").touch()
    line = refusal(finished(tmp_path, *overrides), RUN, tmp_path / "images")
    told = "nothing" if prompts == "null" else shown(given)  # which shortens a long path
    assert line.startswith(f"images: got {RUN}, with evaluate.prompts {told}")
    assert line.endswith("; accepted: a run whose samples are of GenEval's evaluation_metadata.jsonl")


def test_prompts_that_say_nothing_of_objects_are_refused(tmp_path: Path) -> None:
    store = finished(tmp_path)
    run = record.find(store, RUN)
    commit(store, "0" * 64, {"prompts.jsonl": b'{"prompt": "a ring", "tag": "colors"}\n'})
    run.step("text").key = "0" * 64
    record.save(store, run)
    line = refusal(store, RUN, tmp_path / "images")
    assert line == "evaluate.prompts:1: include: got nothing; accepted: a value"
    assert not (tmp_path / "images").exists()


# -- what comes back

PROMPTS_OF = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
# Images of 4 a prompt that are correct, in the order of the tags: arXiv 2506.05340, its table of PixArt-Sigma.
ROOTSTOCK, GRAFTED = (260, 244, 148, 290, 43, 86), (256, 226, 154, 266, 45, 78)


def write_results(file: Path, correct: tuple[int, ...], images: str, tags: int = 6) -> Path:
    """Write results as the published scorer does by pandas, / escaped, the images of a tag that are correct first."""
    lines: list[str] = []
    prompt = 0
    for (tag, count), right in list(zip(PROMPTS_OF.items(), correct, strict=True))[:tags]:
        for number in range(4 * count):
            index, text = prompt + number // 4, f"prompt {prompt + number // 4}"
            asked = {"tag": tag, "include": [{"class": "cat", "count": 1}], "prompt": text}
            judged: dict[str, Any] = {
                "filename": f"{images}/{index:05d}/samples/{number % 4:04d}.png",
                "tag": tag,
                "prompt": text,
            }
            judged |= {"correct": number < right, "reason": "", "metadata": json.dumps(asked), "details": "{}"}
            lines.append(json.dumps(judged, separators=(",", ":")).replace("/", "\\/"))
        prompt += count
    file.write_text("\n".join(reversed(lines)) + "\n")  # the scorer takes folders in any order
    return file


def test_published_scores_come_out_of_the_published_scorers_files(graft: Graft, tmp_path: Path) -> None:
    rootstock = write_results(tmp_path / "rootstock.jsonl", ROOTSTOCK, "here")
    grafted = write_results(tmp_path / "graft.jsonl", GRAFTED, "/there/images")
    scored = api.geneval(grafted, rootstock, "mask2former/mmdet")
    figures, beside = scored.figures["results"], scored.figures["beside"]
    assert figures["images"] == beside["images"] == 2212 and scored.notes == ()
    names = ["geneval", *PROMPTS_OF]
    assert list(beside) == ["images", *(f"{name}:mask2former-mmdet" for name in names)]
    shares = [count / (4 * of) for count, of in zip(ROOTSTOCK, PROMPTS_OF.values(), strict=True)]
    assert [beside[f"{tag}:mask2former-mmdet"] for tag in PROMPTS_OF] == pytest.approx(shares)
    assert (round(100 * beside["geneval:mask2former-mmdet"], 2), shares[0]) == (49.75, 0.8125)
    assert round(100 * figures["geneval:mask2former-mmdet"], 2) == 47.78
    assert round(100 * figures["gain:geneval"], 2) == -1.97
    assert figures["gain_low:geneval"] < figures["gain:geneval"] < figures["gain_high:geneval"] < 0
    shown = graft("geneval", str(grafted), "--beside", "rootstock.jsonl", cwd=tmp_path)
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert lines[:3] == [["figure", "results", "beside"], ["images", "2,212", "2,212"], ["geneval", "0.4778", "0.4975"]]
    assert lines[-3][:1] == ["gain:geneval"] and len(lines) == 12 and shown.stderr == ""


def test_the_gain_is_the_one_that_a_jobs_table_has(tmp_path: Path) -> None:
    folders = [tmp_path / "rootstock", tmp_path / "graft"]
    for folder, correct in zip(folders, (ROOTSTOCK, GRAFTED), strict=True):
        folder.mkdir()
        write_results(folder / "geneval.jsonl", correct, "images")
    theirs = GenevalJudge.beside(folders[1], folders[0])
    ours = api.geneval(folders[1] / "geneval.jsonl", folders[0] / "geneval.jsonl").figures["results"]
    assert len(theirs) == 3 and theirs == {name: value for name, value in ours.items() if name.startswith("gain")}


def test_results_without_a_tag_are_said_to_compare_to_no_published_ones(graft: Graft, tmp_path: Path) -> None:
    file = write_results(tmp_path / "few.jsonl", GRAFTED, "images", tags=4)
    shown = graft("geneval", str(file), "--json", cwd=tmp_path)
    expected = f"graft: {file}: no images of position, color_attr: geneval is the mean of the other tags, and compares"
    assert shown.stderr == f"{expected} to no published one\n"
    figures = json.loads(shown.stdout)["results"]
    assert figures["geneval"] == pytest.approx(sum(figures[tag] for tag in list(PROMPTS_OF)[:4]) / 4)


def test_results_of_other_samples_are_refused_in_one_line(graft: Graft, tmp_path: Path) -> None:
    grafted = write_results(tmp_path / "graft.jsonl", GRAFTED, "images")
    write_results(tmp_path / "few.jsonl", ROOTSTOCK, "images", tags=5)
    shown = graft("geneval", str(grafted), "--beside", "few.jsonl", cwd=tmp_path)
    assert shown.returncode == 2 and shown.stdout == ""
    got = "400 images in one set only, first 00453/samples/0000.png"
    assert shown.stderr == f"graft: paired difference: got {got}; accepted: the same prompts and samples in both sets\n"


def test_what_is_no_file_of_results_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        api.geneval(tmp_path / "none.jsonl")
    assert caught.value.lines == [
        f"{tmp_path}/none.jsonl: got No such file or directory; accepted: a file of one JSON object a line"
    ]
