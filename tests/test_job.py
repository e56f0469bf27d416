"""The tiny job, run for real with Ray, DeepSpeed and MLflow: what it leaves, and what running it again costs."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import TINY, Finished, Graft, keys, states

ROWS = ["heldout", "rootstock", "stage1", "stage2", "random_init"]
COLUMNS = {"distance", "agreement", "params", "flops", "ms_per_sample", "latency_ms", "peak_memory"}


def test_the_outcome_names_every_step_and_row(tiny: Finished) -> None:
    outcome = tiny.outcome
    assert outcome["status"] == "finished"
    assert set(states(outcome).values()) == {"done"}
    assert all(step["seconds"] > 0 for step in outcome["steps"])
    assert list(outcome["results"]) == ROWS
    assert all(set(columns) == COLUMNS for columns in outcome["results"].values())


def test_every_row_and_every_site_leaves_a_picture(tiny: Finished) -> None:
    found = keys(tiny.outcome)
    for step in ("reference/heldout", *(f"evaluate/{row}" for row in ROWS[1:])):
        assert (tiny.store / "artifacts" / found[step] / "grid.png").stat().st_size > 0
    for step in ("base", "finetune", "finetune/random_init", "distill/01.mha", "distill/03.mha"):
        assert (tiny.store / "artifacts" / found[step] / "loss.png").stat().st_size > 0
    assert (tiny.store / "artifacts" / found["evaluate"] / "quality-cost.png").stat().st_size > 0


def test_the_graft_costs_fewer_flops_than_the_rootstock(tiny: Finished) -> None:
    results = tiny.outcome["results"]
    assert results["stage1"]["flops"] == results["stage2"]["flops"] < results["rootstock"]["flops"]


def test_distillation_lowered_the_error_of_every_site(tiny: Finished) -> None:
    plan = json.loads((tiny.store / "artifacts" / keys(tiny.outcome)["select"] / "plan.json").read_text())
    assert [edit["edit"]["site"]["block"] for edit in plan] == [1, 3]
    for site in ("01.mha", "03.mha"):
        curve = (tiny.store / "artifacts" / keys(tiny.outcome)[f"distill/{site}"] / "loss.csv").read_text().split()
        first, last = (float(line.split(",")[2]) for line in (curve[1], curve[-1]))
        assert last < 0.8 * first


def test_the_same_command_again_starts_neither_ray_nor_torch(tiny: Finished) -> None:
    code = (
        "import sys, graftwork; "
        f"done = graftwork.run({str(TINY)!r}, ['store={tiny.store}']); "
        "assert done.status == 'finished' and all(step.state == 'cached' for step in done.steps), done; "
        "heavy = {'ray', 'torch', 'mlflow', 'deepspeed', 'sklearn'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_another_name_or_other_resources_recompute_nothing(tiny: Finished, graft: Graft) -> None:
    renamed = graft(
        "plan",
        str(TINY),
        "--json",
        *("--set", f"store={tiny.store}"),
        *("--set", "name=other"),
        *("--set", "resources.distill.cpu=2"),
        *("--set", "tracking.experiment=elsewhere"),
    )
    assert set(states(json.loads(renamed.stdout)).values()) == {"cached"}


def test_another_learning_rate_recomputes_finetune_and_evaluate_alone(tiny: Finished, graft: Graft) -> None:
    plan = graft("plan", str(TINY), "--json", "--set", f"store={tiny.store}", "--set", "finetune.lr=3e-4")
    pending = {step["stage"] for step in json.loads(plan.stdout)["steps"] if step["state"] != "cached"}
    assert pending == {"finetune", "evaluate"}
    told = graft("plan", str(TINY), "--set", f"store={tiny.store}", "--set", "finetune.lr=3e-4").stdout
    assert "recipe.lr: 0.0005 -> 0.0003" in told


def test_a_renamed_job_that_is_all_cached_still_stands_in_mlflow(tiny_copy: Finished, graft: Graft) -> None:
    done = graft("run", str(TINY), "--json", "--set", "name=renamed")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert set(states(outcome).values()) == {"cached"}
    with sqlite3.connect(tiny_copy.store / "mlflow.db") as database:
        assert database.execute("select name, status from runs").fetchall() == [(outcome["run"], "FINISHED")]


def test_a_flipped_byte_is_found_set_aside_and_recomputed(tiny_copy: Finished, graft: Graft) -> None:
    found = keys(tiny_copy.outcome)
    artifacts = tiny_copy.store / "artifacts"
    for step, file in (("evaluate/stage2", "classifier.npz"), ("evaluate", "results.json")):
        path = artifacts / found[step] / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    done = graft("run", str(TINY), "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert {name for name, state in states(outcome).items() if state == "done"} == {"evaluate/stage2", "evaluate"}
    assert "classifier.npz" in done.stderr and "results.json" in done.stderr
    assert len(list((tiny_copy.store / "rotten").iterdir())) == 2
    quality = {row: (c["distance"], c["agreement"]) for row, c in outcome["results"].items()}
    assert quality == {row: (c["distance"], c["agreement"]) for row, c in tiny_copy.outcome["results"].items()}


def test_a_failed_site_leaves_the_others_done_and_names_the_way_on(tiny_copy: Finished, graft: Graft) -> None:
    """One site asks for a window of a billion tokens, which no memory holds; the other is new and must finish."""
    wide = "{target: mha, operator: {kind: swa, window: 1000000000}, layers: {kind: explicit, blocks: [0]}}"
    fine = "{target: mlp, operator: {kind: mlp, ratio: 2}, layers: {kind: explicit, blocks: [2]}}"
    done = graft("run", str(TINY), "--json", "--set", f"graft=[{wide}, {fine}]")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("graft: ")]
    advice = (
        "out of memory; lower distill.activations, distill.batch, distill.micro_batch, distill.samples or distill.draws"
    )
    assert told[0] == f"graft: step distill/00.mha failed: {advice}"
    outcome = json.loads(done.stdout)
    assert told[1:] == [f"graft: resume with: graft resume {outcome['run']}"]
    ended = states(outcome)
    assert outcome["status"] == "failed"
    assert ended["distill/00.mha"] == "failed" and ended["distill/02.mlp"] == "done"
    assert ended["select"] == ended["finetune"] == ended["evaluate"] == "skipped"
    assert (
        json.loads(graft("plan", str(TINY), "--json", "--set", f"graft=[{fine}]").stdout)["steps"][4]["state"]
        == "cached"
    )


@pytest.mark.slow
def test_a_finetune_that_diverges_fails_at_once_and_says_so(tiny_copy: Finished, graft: Graft) -> None:
    wild = ("--set", "finetune.lr=1e30", "--set", "finetune.control=false")
    done = graft("run", str(TINY), *wild)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("graft: ")]
    assert told[0].startswith("graft: step finetune failed: FloatingPointError: the loss is nan at step ")
    assert "; last metrics at " in told[0] and "loss " in told[0].split("; last metrics at ")[1]
    assert done.stderr.count("finetune: running") == 1


def test_status_compare_and_show_agree_with_the_run(tiny: Finished, graft: Graft) -> None:
    store = ("--store", str(tiny.store))
    assert tiny.run in graft("status", *store).stdout
    rows = json.loads(graft("compare", tiny.run, tiny.run, "--json", *store).stdout)
    assert len(rows) == 2 and rows[0]["run"] == tiny.run
    assert rows[0]["stage2.distance"] == tiny.outcome["results"]["stage2"]["distance"]
    shown = json.loads(graft("show", f"{tiny.run}/finetune", "--json", *store).stdout)
    assert shown["key"] == keys(tiny.outcome)["finetune"]
    assert "model.safetensors" in shown["files"]


def test_a_graft_is_exported_with_a_card_and_loaded_again(tiny: Finished, tmp_path: Path, graft: Graft) -> None:
    out = tmp_path / "out"
    done = graft("export", tiny.run, str(out), "--store", str(tiny.store))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    code = f"import graftwork; print(sum(v.numel() for v in graftwork.load({str(out)!r}).parameters()))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    stage2 = tiny.outcome["results"]["stage2"]
    assert int(loaded.stdout) == stage2["params"]
    card = (out / "README.md").read_text()
    assert all(key in card for key in keys(tiny.outcome).values())
    assert "hyena_y (kernel 4) | 1, 3" in card and f"{stage2['distance']:.4g}" in card
    for option in ("--vae", "--pipeline"):
        asked = ("--as", "diffusers", option, "anywhere", "--store", str(tiny.store))
        refused = graft("export", tiny.run, str(tmp_path / "whole"), *asked)
        assert refused.returncode == 2 and f"graft: {option[2:]}: got " in refused.stderr
        assert "anywhere; accepted: nothing, or a run with codec" in refused.stderr
    for name, told in ((f"{tiny.run}/select", "accepted: "), (tiny.run, "is there already")):
        refused = graft("export", name, str(out), "--store", str(tiny.store))
        assert refused.returncode == 2 and told in refused.stderr and "Traceback" not in refused.stderr


EVERY_EDIT = """
- {target: mha, operator: {kind: swa, window: 2}, layers: {kind: explicit, blocks: [0]}}
- {target: mha, operator: {kind: hyena_se}, layers: {kind: explicit, blocks: [1]}}
- {target: mha, operator: {kind: hyena_x}, layers: {kind: explicit, blocks: [2]}}
- {target: mha, operator: {kind: hyena_y}, layers: {kind: explicit, blocks: [3]}}
- {target: mha, operator: {kind: mamba2, d_state: 8}, layers: {kind: explicit, blocks: [4]}}
- {target: mha, operator: {kind: mha}, layers: {kind: explicit, blocks: [5]}}
- {target: mlp, operator: {kind: mlp, ratio: 3}, layers: {kind: explicit, blocks: [0, 1]}}
- {target: mlp, operator: {kind: none}, layers: {kind: explicit, blocks: [2]}}
- {target: mlp, operator: {kind: mlp_hyena_x, ratio: 1}, layers: {kind: explicit, blocks: [3]}}
- {kind: parallel, pairs: [[2, 3], [4, 5]]}
"""


@pytest.mark.slow
def test_every_edit_goes_through_one_job_of_a_sit(tmp_path: Path, graft: Graft) -> None:
    """All operators in different blocks, at both targets, and pairs that take some of them in; velocities instead of
    noise, a teacher in stage 2, and another sampler costs its samples alone."""
    document = yaml.safe_load(TINY.read_text())
    document["model"] |= {"kind": "sit", "depth": 6}
    document["weights"] |= {"steps": 4, "workers": 1}
    document["graft"] = yaml.safe_load(EVERY_EDIT)
    document["distill"] |= {"epochs": 2, "milestones": []}
    document["finetune"] |= {"steps": 4, "control": False, "teacher": {}}
    document["evaluate"] |= {"samples": 10, "batch": 10, "sampler": {"kind": "ode", "method": "heun", "steps": 4}}
    (tmp_path / "every.yaml").write_text(yaml.safe_dump(document))
    planned = json.loads(graft("plan", "every.yaml", "--json").stdout)["costs"]
    done = graft("run", "every.yaml", "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert [name for name in keys(outcome) if name.startswith("distill/")][-3:] == [
        *("distill/05.mha", "distill/02.pair", "distill/04.pair")
    ]
    results = outcome["results"]
    for row, cost in (("rootstock", planned["rootstock"]), ("stage1", planned["graft"]), ("stage2", planned["graft"])):
        assert {name: results[row][name] for name in ("params", "flops")} == cost
    assert results["stage2"]["peak_memory"] > 4 * results["stage2"]["params"]
    assert math.isfinite(results["stage2"]["distance"])
    config = json.loads((tmp_path / ".graftwork" / "artifacts" / keys(outcome)["base"] / "config.json").read_text())
    assert config["rootstock"]["kind"] == "sit"
    unipc = ("--set", "evaluate.sampler={kind: scheduler, name: unipc, steps: 4}")
    other = states(json.loads(graft("plan", "every.yaml", "--json", *unipc).stdout))
    sampled = {"evaluate", *(f"evaluate/{row}" for row in ("rootstock", "stage1", "stage2"))}
    assert {step for step, state in other.items() if state != "cached"} == sampled
    refused = graft("run", "every.yaml", "--set", "evaluate.sampler={kind: ddim, steps: 4}")
    told = "evaluate.sampler.kind: got 'ddim'; accepted: ode, sde, scheduler: a sit predicts a velocity"
    assert refused.returncode == 2 and told in refused.stderr


@pytest.mark.slow
def test_a_job_whose_layers_gates_choose_finetunes_what_the_search_trained(tmp_path: Path, graft: Graft) -> None:
    document = yaml.safe_load(TINY.read_text())
    document["weights"] |= {"steps": 4, "workers": 1}
    search = {"steps": 6, "batch": 8, "warmup": 0, "fraction": 0.5, "ema": 0.5, "workers": 2, "undecided": 1.0}
    document["graft"][0]["layers"] = {"kind": "learned", "groups": 2, "keep": 1, "pinned": [3]}
    document["graft"][0]["layers"] |= {"finetune_from": "search", "search": search}
    document["distill"] |= {"epochs": 2, "milestones": []}
    document["finetune"] |= {"steps": 4, "control": False}
    document["evaluate"] |= {"samples": 10, "batch": 10, "rows": ["stage2"]}
    (tmp_path / "learned.yaml").write_text(yaml.safe_dump(document))
    done = graft("run", "learned.yaml", "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert [name for name in keys(outcome) if name.startswith(("distill/", "search/"))] == [
        *("distill/00.mha", "distill/01.mha", "distill/02.mha", "search/0")
    ]
    artifacts = tmp_path / ".graftwork" / "artifacts"
    found = json.loads((artifacts / keys(outcome)["search/0"] / "search.json").read_text())
    plan = json.loads((artifacts / keys(outcome)["select"] / "plan.json").read_text())
    blocks = [edit["edit"]["site"]["block"] for edit in plan]
    assert blocks == found["chosen"] and len(blocks) == 2 and blocks[1] == 2
    assert any("did not decide" in line and "search/0" in line for line in done.stderr.splitlines())
    # The finetune went on from the search: its rootstock's own tensors have moved with LoRA, even before finetuning.
    start = load_file(artifacts / keys(outcome)["search/0"] / "hybrid" / "model.safetensors")
    base = load_file(artifacts / keys(outcome)["base"] / "model.safetensors")
    assert not torch.equal(start["blocks.3.attn.qkv.weight"], base["blocks.3.attn.qkv.weight"])
