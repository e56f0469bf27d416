"""Distilling: killed, resumed, beside others in its task, kept or computed anew, a site ends in the same bits."""

from __future__ import annotations

import copy
import json
import math
import pickle
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.artifacts import Folder
from graftwork.models import checkpoints
from graftwork.models.numerics import parts as cache
from graftwork.models.numerics.precision import computing
from graftwork.models.rootstocks.dit import DiT, modulations
from graftwork.models.surgery import answer, graft, new_scion, observe, scion_at
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.edits import Edit, Parallel, Site
from graftwork.specs.operators import HyenaY, Mha, Mlp, NoOperator
from graftwork.specs.training import DistillSpec
from graftwork.stages.artifacts import hybrids as hybrid
from graftwork.stages.artifacts.evidence import read_distilled
from graftwork.stages.artifacts.latents import Latents, Noised, NoisedAnew, noised, read, read_meta
from graftwork.stages.contract import Context, Portion, Stopped, TaskScope
from graftwork.stages.distillation import activations, distill, sources
from graftwork.stages.distillation import loss as losses
from graftwork.stages.distillation.activations import Pairs, Teacher
from graftwork.stages.distillation.sources import InMemory, Recomputed, TaskState, choose_source
from graftwork.stages.training.batches import TrainingSet
from graftwork.stages.training.engine import PlainEngine
from tests.products import Products
from tests.small import block_of, noting
from tests.tiny_distillation import (
    DROPPED,
    MHA_EDIT,
    MHA_SITE,
    MLP_EDIT,
    MLP_SITE,
    SEVERAL,
    keep_profile,
    make_context,
    run_distill,
    write_inputs,
)
from tests.tiny_training import (
    CPU,
    TINY,
    Killed,
    Reports,
    assert_same_bits,
    lively,
    run_training,
)

pytestmark = pytest.mark.usefixtures("one_thread", "painted_alone")


# -- latents as distillation sees them


def test_a_samples_noise_depends_on_its_place_alone(data: TrainingSet) -> None:
    latents = Latents(data.latents, data.condition)
    few, many = (noised(latents.first(count), TINY.objective, 2, 0, "distill") for count in (4, 9))
    assert torch.equal(few.z, many.z[:8]) and torch.equal(few.t, many.t[:8])
    assert torch.equal(few.condition.require("labels"), many.condition[:8].require("labels"))


def test_each_draw_of_a_sample_has_a_timestep_and_noise_of_its_own(data: TrainingSet) -> None:
    latents = noised(Latents(data.latents[:1], data.condition[:1]), TINY.objective, 3, 0, "distill")
    assert len(set(latents.t.tolist())) == 3
    assert latents.condition.require("labels").tolist() == [0, 0, 0]


# -- distillation


@pytest.fixture
def rootstock() -> DiT:
    return lively(DiT(TINY))


@pytest.fixture
def latents(data: TrainingSet) -> Noised:
    return noised(Latents(data.latents[:24], data.condition[:24]), TINY.objective, 1, 0, "distill")


@pytest.fixture
def source(rootstock: DiT, latents: Noised) -> InMemory:
    return captured(rootstock, MHA_SITE, latents)


@pytest.fixture
def heldout(rootstock: DiT, data: TrainingSet) -> InMemory:
    kept = Latents(data.latents[24:], data.condition[24:])
    return captured(rootstock, MHA_SITE, noised(kept, TINY.objective, 1, 0, "distill/heldout"))


def captured(rootstock: DiT, site: Site, latents: Noised, gate_weighted: bool = False) -> InMemory:
    whole = Teacher(rootstock, (), latents, latents, DistillSpec(gate_weighted=gate_weighted), CPU)
    return InMemory(whole.capture([site], latents, CPU)[site], CPU)


@pytest.mark.parametrize("deaths", [(1,), (3,), (4,), (7,), (3, 5, 6)], ids=str)
def test_distilling_that_was_killed_and_resumed_ends_in_the_same_bits(
    rootstock: DiT, source: InMemory, heldout: InMemory, store: Store, tmp_path: Path, deaths: tuple[int, ...]
) -> None:
    def distilled(key: str, deaths: tuple[int, ...]) -> tuple[dict[str, Tensor], list[tuple[float, float, float]]]:
        for death in deaths:
            scion = new_scion(rootstock, MHA_EDIT, 99 if store.state(key) == "partial" else 0)
            with pytest.raises(Killed):
                distill.fit(scion, source, heldout, "l1", make_context(store, key, tmp_path, Reports(dies_at=death)))
        scion = new_scion(rootstock, MHA_EDIT, 99 if store.state(key) == "partial" else 0)
        history = distill.fit(scion, source, heldout, "l1", make_context(store, key, tmp_path))
        return scion.state_dict(), history

    straight, killed = distilled("straight", ()), distilled("killed", deaths)
    assert killed[1] == straight[1]
    assert_same_bits(killed[0], straight[0])


def test_distilling_that_is_asked_to_stop_saves_and_goes_on_in_the_same_bits(
    rootstock: DiT, source: InMemory, heldout: InMemory, store: Store, tmp_path: Path
) -> None:
    ends = []
    for key, asked in (("straight", False), ("stopped", True)):
        report = Reports()
        context = replace(make_context(store, key, tmp_path, report), stopping=report.past(3))
        if asked:
            with pytest.raises(Stopped, match="after epoch 3"):
                distill.fit(new_scion(rootstock, MHA_EDIT, 0), source, heldout, "l1", context)
        scion = new_scion(rootstock, MHA_EDIT, 99 if asked else 0)
        history = distill.fit(scion, source, heldout, "l1", make_context(store, key, tmp_path))
        ends.append((scion.state_dict(), history))
    assert ends[0][1] == ends[1][1]
    assert_same_bits(ends[0][0], ends[1][0])


def test_distilling_brings_the_scion_nearer(
    rootstock: DiT, source: InMemory, heldout: InMemory, store: Store, tmp_path: Path
) -> None:
    scion = new_scion(rootstock, MHA_EDIT, 0)
    before = losses.relative_error(scion, heldout)
    distill.fit(scion, source, heldout, "l1", make_context(store, "a", tmp_path, epochs=30))
    assert losses.relative_error(scion, heldout) < 0.7 * before


def test_the_weights_of_the_best_epoch_are_kept(rootstock: DiT, source: InMemory, store: Store, tmp_path: Path) -> None:
    scion = new_scion(rootstock, MHA_EDIT, 0)
    with torch.no_grad():  # held out is what the scion puts out at first, so that each epoch leads away from it
        contrary = InMemory(Pairs(source.pairs.inputs, scion(*source.pairs.inputs), None), CPU)
    history = distill.fit(scion, source, contrary, "l1", make_context(store, "a", tmp_path))
    errors = [heldout for _, _, heldout in history]
    assert errors.index(min(errors)) == 0
    assert losses.error_on(scion, contrary, losses.LOSSES["l1"]) == errors[0]


def test_the_rate_halves_at_each_milestone(
    rootstock: DiT, source: InMemory, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(PlainEngine, "step", noting(lambda self, loss, lr: rates.append(lr), PlainEngine.step))
    scion = new_scion(rootstock, MHA_EDIT, 0)
    context = make_context(store, "a", tmp_path, epochs=5, batch=24, lr=0.08, milestones=(1, 3))
    distill.fit(scion, source, source, "l1", context)
    assert rates == [0.08, 0.04, 0.04, 0.02, 0.02]


def test_a_heldout_error_that_is_no_number_stops_the_distilling_and_names_the_epoch(
    rootstock: DiT, source: InMemory, store: Store, tmp_path: Path
) -> None:
    broken = InMemory(Pairs(source.pairs.inputs, source.pairs.outputs * math.nan, None), CPU)
    with pytest.raises(FloatingPointError, match="epoch 1"):
        distill.fit(new_scion(rootstock, MHA_EDIT, 0), source, broken, "l1", make_context(store, "a", tmp_path))


@pytest.mark.parametrize(
    ("site", "loss", "kind", "because"),
    [
        (MHA_SITE, "auto", "l1", "the outputs' excess kurtosis is 30, above 12"),
        (MLP_SITE, "auto", "l2", "the outputs' excess kurtosis is 12, at most 12"),
        (MHA_SITE, "l2", "l2", "set in the spec"),
        (MLP_SITE, "huber", "huber", "set in the spec"),
        (Site(block=0, target="pair"), "auto", "l1", "a pair adds what its attention puts out"),
    ],
    ids=str,
)
def test_auto_goes_by_the_tails_of_what_the_operator_puts_out(
    tmp_path: Path, site: Site, loss: Any, kind: str, because: str
) -> None:
    keep_profile(tmp_path, {MHA_SITE: 30.0, MLP_SITE: 12.0})
    context = make_bare({"profile": Folder("p", tmp_path)})
    assert losses.loss_for(DistillSpec(loss=loss), site, context) == (kind, because)


ERRORS: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": torch.abs,
    "l2": torch.square,
    "huber": lambda e: torch.where(e.abs() < 1, 0.5 * e.square(), e.abs() - 0.5),
}


@pytest.mark.parametrize("part", [cache.PART, 600], ids=["whole", "in parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_absolute_error_is_pytorchs_and_its_gradient_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, part: int
) -> None:
    monkeypatch.setattr(cache, "PART", part)
    draws = torch.Generator().manual_seed(0)
    predicted, wanted = (torch.randn(7, 16, 16, generator=draws).to(dtype) for _ in range(2))
    predicted[0] = wanted[0]  # where the gradient is 0
    found = []
    for mean in (losses.MeanAbsolute.apply, lambda one, other: F.l1_loss(one.float(), other.float())):
        one = predicted.clone().requires_grad_()
        value = mean(one, wanted)
        found.append((value, *torch.autograd.grad(3.0 * value, one)))
    (ours, our_gradient), (theirs, their_gradient) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert our_gradient.dtype == their_gradient.dtype and torch.equal(our_gradient, their_gradient)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "gate weighted"])
@pytest.mark.parametrize("kind", ERRORS)
def test_the_error_is_the_mean_loss_each_entry_by_its_weight(kind: str, weighted: bool) -> None:
    draws = torch.Generator().manual_seed(0)
    inputs, outputs = 2 * torch.randn(2, 5, 4, 3, generator=draws)
    weights = torch.rand(5, 1, 3, generator=draws)
    pairs = Pairs((inputs[1:4],), outputs[1:4], weights[1:4] if weighted else None)
    expected = ERRORS[kind](inputs[1:4] - outputs[1:4]) * (weights[1:4] if weighted else 1)
    found = losses.error(nn.Identity(), pairs, losses.LOSSES[kind])
    torch.testing.assert_close(found, expected.mean())


@pytest.mark.parametrize("site", [MHA_SITE, MLP_SITE], ids=str)
def test_the_weight_of_an_error_is_the_size_of_the_sites_gate(rootstock: DiT, latents: Noised, site: Site) -> None:
    pairs = captured(rootstock, site, latents, gate_weighted=True).pairs
    (c,) = rootstock.start(latents.z, latents.t, latents.condition).conditioning
    gate = modulations(block_of(rootstock, site.block), c)[{"mha": 2, "mlp": 5}[site.target]]
    assert pairs.weights is not None
    torch.testing.assert_close(pairs.weights, gate.abs()[:, None])


@pytest.mark.parametrize("shuffled", [False, True])
def test_batches_from_the_hosts_memory_are_those_that_lie_on_the_device(source: InMemory, shuffled: bool) -> None:
    order = torch.randperm(len(source)) if shuffled else None
    for there, sent in zip(source.batches(10, order), source._uploaded(10, order), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(there.tensors(), sent.tensors(), strict=True))


def test_unweighted_pairs_have_no_weights(source: InMemory) -> None:
    assert source.pairs.weights is None


def test_pairs_are_what_the_operator_saw_and_put_out_whatever_the_batches(
    rootstock: DiT, latents: Noised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "PASS_BATCH", 7)
    pairs = captured(rootstock, MHA_SITE, latents).pairs
    seen = observe(rootstock, [MHA_SITE], latents.z, latents.t, latents.condition)[MHA_SITE]
    torch.testing.assert_close((pairs.inputs, pairs.outputs), (seen.inputs, seen.output))


def test_the_heldout_error_is_the_mean_over_all_pairs_whatever_the_batches(
    source: InMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (source.pairs.inputs[0] - source.pairs.outputs).abs().mean().item()
    monkeypatch.setattr(losses, "PASS_BATCH", 7)
    assert losses.error_on(nn.Identity(), source, losses.LOSSES["l1"]) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(("site", "operator"), [(MHA_SITE, Mha()), (MLP_SITE, Mlp(ratio=4))], ids=str)
def test_a_copy_of_the_operator_has_no_error(rootstock: DiT, latents: Noised, site: Site, operator: Any) -> None:
    scion = new_scion(rootstock, Edit(site=site, operator=operator), seed=0)
    scion.load_state_dict(scion_at(rootstock, site).state_dict())
    same = captured(rootstock, site, latents)
    assert losses.error_on(scion, same, losses.LOSSES["l1"]) == 0
    assert losses.relative_error(scion, same) == 0


def test_a_mimic_that_puts_out_the_mean_has_a_relative_error_of_one(source: InMemory) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return source.pairs.outputs.mean((0, 1)).expand_as(x)

    assert losses.relative_error(Mean(), source) == pytest.approx(1, rel=1e-5)


# -- the whole step, and what it leaves


@pytest.fixture
def inputs(tmp_path: Path, rootstock: DiT, data: TrainingSet) -> dict[str, Folder]:
    return write_inputs(tmp_path, rootstock, data)


def test_a_distill_step_leaves_the_best_scion_and_its_figures(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, rootstock: DiT, heldout: InMemory
) -> None:
    report = Reports()
    run_distill(store, "a", inputs, tmp_path / "out", report)
    summary = json.loads((tmp_path / "out" / "distill.json").read_text())
    best_done, _, best = min((seen for seen in report.seen if seen[2]), key=lambda seen: seen[2]["heldout_error"])
    scion = new_scion(rootstock, MHA_EDIT, 0)
    scion.load_state_dict(load_file(tmp_path / "out" / "scion.safetensors"))
    assert summary == {
        "loss": "l1",
        "loss_because": "the outputs' excess kurtosis is 30, above 12",
        "heldout_error": best["heldout_error"],
        "best_epoch": best_done,
        "relative_error": pytest.approx(losses.relative_error(scion, heldout)),
    }


def test_a_distill_step_that_was_killed_and_resumed_leaves_the_same_files(
    store: Store, inputs: dict[str, Folder], tmp_path: Path
) -> None:
    run_distill(store, "straight", inputs, tmp_path / "straight")
    with pytest.raises(Killed):
        run_distill(store, "killed", inputs, tmp_path / "killed", Reports(dies_at=5))
    run_distill(store, "killed", inputs, tmp_path / "killed")
    for name in ("scion.safetensors", "distill.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


PAIR = Edit(site=Site(block=0, target="pair"), operator=Parallel())


def test_a_pair_is_distilled_with_the_scions_of_its_blocks_against_the_rootstocks_pair(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, rootstock: DiT
) -> None:
    run_distill(store, "scion", inputs, tmp_path / "scion")
    inputs |= {f"scions/{MHA_SITE}": Folder("s", tmp_path / "scion")}
    run_distill(store, "pair", inputs, tmp_path / "pair", edit=PAIR, within=(MHA_EDIT,), epochs=20, lr=3e-3)
    pair = load_file(tmp_path / "pair" / "scion.safetensors")
    assert "second.attn.inner_filter.weight" in pair and "first.attn.qkv.weight" in pair and "merge.weight" in pair
    # What it started from: the rootstock's blocks, the distilled scion, and the sum of both.
    model = hybrid.with_scions(rootstock, (MHA_EDIT,), make_bare(inputs), 0)
    start = new_scion(model, PAIR, 0)
    latents = read(inputs["features"].place, "heldout").first(24)
    heldout = captured(lively(DiT(TINY)), PAIR.site, noised(latents, TINY.objective, 1, 0, "distill/heldout"))
    summary = json.loads((tmp_path / "pair" / "distill.json").read_text())
    assert summary["relative_error"] < 0.9 * losses.relative_error(answer(start), heldout)
    start.load_state_dict(pair)
    assert summary["relative_error"] == pytest.approx(losses.relative_error(answer(start), heldout), rel=1e-5)


# -- sites that share a task


A_SITE = (24 + 6) * 2 * 16 * 16 * 4  # bytes: samples, what goes in and out, tokens, width, fp32


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Site, ...]]:
    """The sites that each batch of the rootstock's pass looked at."""
    found: list[tuple[Site, ...]] = []

    def counted(model: DiT, sites: Any, *args: Tensor) -> Any:
        found.append(tuple(sites))
        return observe(model, sites, *args)

    monkeypatch.setattr(activations, "observe", counted)
    return found


def distilled_together(store: Store, inputs: dict[str, Folder], folder: Path, **changes: Any) -> dict[str, bytes]:
    """Two sites in one task: the files that they leave."""
    kept: dict[str, Any] = {}
    for name, edit, ahead in (("mha", MHA_EDIT, [MLP_EDIT]), ("mlp", MLP_EDIT, [])):
        following = [make_context(store, "", folder, edit=other, **changes).params for other in ahead]
        task_scope = TaskScope(next=following, state=kept)
        folder.mkdir(exist_ok=True)
        run_distill(store, f"{folder}/{name}", inputs, folder / name, edit=edit, task_scope=task_scope, **changes)
    return {
        f"{name}/{file}": (folder / name / file).read_bytes()
        for name in ("mha", "mlp")
        for file in ("scion.safetensors", "distill.json")
    }


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (2 * A_SITE, [(MHA_SITE, MLP_SITE)] * 2),  # the training samples, then the held-out ones
        (2 * A_SITE - 1, [(MHA_SITE,)] * 2 + [(MLP_SITE,)] * 2),
    ],
    ids=["room for both", "room for one"],
)
def test_sites_of_one_task_share_passes_as_far_as_memory_goes_and_end_in_the_bits_of_sites_alone(
    store: Store,
    inputs: dict[str, Folder],
    tmp_path: Path,
    passes: list[tuple[Site, ...]],
    room: int,
    expected: list[tuple[Site, ...]],
) -> None:
    found = distilled_together(store, inputs, tmp_path / "together", activations=room)
    assert passes == expected
    for name, edit in (("mha", MHA_EDIT), ("mlp", MLP_EDIT)):
        run_distill(store, f"alone/{name}", inputs, tmp_path / f"alone-{name}", edit=edit)
        for file in ("scion.safetensors", "distill.json"):
            assert found[f"{name}/{file}"] == (tmp_path / f"alone-{name}" / file).read_bytes()


@pytest.mark.parametrize("room", [3 * A_SITE, A_SITE, A_SITE - 1], ids=["for all", "for a site", "for none"])
@pytest.mark.parametrize("captured", [False, True], ids=["own passes", "passes of tasks before"])
def test_several_scions_for_one_site_learn_in_one_task_as_they_do_alone(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, room: int, captured: bool
) -> None:
    before = dict(zip(SEVERAL, recorded_in(2, inputs, *SEVERAL), strict=True)) if captured else {}
    state: dict[str, Any] = {}
    for number, edit in enumerate(SEVERAL):
        ahead = [
            make_context(store, "", tmp_path, edit=other, activations=room).params for other in SEVERAL[number + 1 :]
        ]
        recorded = partial(before.__getitem__, edit) if captured else None
        scope, folder = TaskScope(next=ahead, state=state, recorded=recorded), tmp_path / edit.name
        run_distill(store, f"t/{edit.name}", inputs, folder, edit=edit, task_scope=scope, activations=room)
        run_distill(store, f"a/{edit.name}", inputs, tmp_path / f"alone-{edit.name}", edit=edit)
        for file in ("scion.safetensors", "distill.json"):
            assert (folder / file).read_bytes() == (tmp_path / f"alone-{edit.name}" / file).read_bytes()


def test_a_site_without_an_operator_changes_nothing_for_those_that_share_its_task(
    store: Store, inputs: dict[str, Folder], tmp_path: Path
) -> None:
    order, kept = (DROPPED, MHA_EDIT), dict[str, Any]()
    for number, edit in enumerate(order):
        ahead = [make_context(store, "", tmp_path, edit=other).params for other in order[number + 1 :]]
        scope = TaskScope(next=ahead, state=kept)
        run_distill(store, f"together/{edit.site}", inputs, tmp_path / str(edit.site), edit=edit, task_scope=scope)
        run_distill(store, f"alone/{edit.site}", inputs, tmp_path / f"alone-{edit.site}", edit=edit)
        for file in ("scion.safetensors", "distill.json"):
            together, alone = (tmp_path / name / file for name in (str(edit.site), f"alone-{edit.site}"))
            assert together.read_bytes() == alone.read_bytes()


def test_a_site_that_does_not_fit_is_computed_anew_in_chunks_with_the_same_result(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def note(teacher: Teacher, sites: Sequence[Site], latents: Noised, place: torch.device) -> None:
        sizes.append(len(latents))

    monkeypatch.setattr(Teacher, "capture", noting(note, Teacher.capture))
    run_distill(store, "fits", inputs, tmp_path / "fits")
    assert sizes == [24, 6]
    sizes.clear()
    room = 24 * A_SITE // 30  # for two chunks of 12 samples, of which whole batches of 10 are taken
    run_distill(store, "streamed", inputs, tmp_path / "streamed", activations=room)
    assert sizes[:4] == [10, 10, 4, 6] and len(sizes) == 4 * 7 + 1
    scions = [load_file(tmp_path / name / "scion.safetensors") for name in ("fits", "streamed")]
    for name, value in scions[0].items():
        torch.testing.assert_close(scions[1][name], value, rtol=1e-4, atol=1e-6)


# -- sites whose pass other tasks made


def recorded_in(parts: int, inputs: dict[str, Folder], *edits: Edit, **changes: Any) -> list[list[Any]]:
    """For each site, its parts, as they come out of another process."""
    steps = [make_context(Store("unused"), "", Path(), edit=edit, **changes).params for edit in edits]
    found = [activations.capture(Portion(steps, inputs, CPU, part, parts)) for part in range(parts)]
    return [list(site) for site in zip(*pickle.loads(pickle.dumps(found)), strict=True)]


# Batches of 5: five to learn from, two held-out ones.
@pytest.mark.parametrize(("parts", "precision"), [(1, "bf16"), (2, "fp32"), (3, "bf16"), (8, "fp32")])
def test_a_site_whose_pass_was_made_in_parts_ends_in_the_bits_of_one_that_made_its_own(
    store: Store,
    inputs: dict[str, Folder],
    tmp_path: Path,
    passes: list[tuple[Site, ...]],
    monkeypatch: pytest.MonkeyPatch,
    parts: int,
    precision: str,
) -> None:
    monkeypatch.setattr(activations, "PASS_BATCH", 5)
    edits = (MHA_EDIT, MLP_EDIT, PAIR)
    changes: dict[str, Any] = {"precision": precision, "gate_weighted": True}
    found = dict(zip(edits, recorded_in(parts, inputs, *edits, **changes), strict=True))
    assert passes == [(MHA_SITE, MLP_SITE, PAIR.site)] * 7
    passes.clear()
    for edit in (MHA_EDIT, MLP_EDIT):
        task_scope = TaskScope(recorded=partial(found.__getitem__, edit))
        run_distill(store, f"g/{edit}", inputs, tmp_path / "given", edit=edit, task_scope=task_scope, **changes)
        assert passes == []
        run_distill(store, f"o/{edit}", inputs, tmp_path / "own", edit=edit, **changes)
        assert len(passes) == 7
        passes.clear()
        for file in ("scion.safetensors", "distill.json"):
            assert (tmp_path / "given" / file).read_bytes() == (tmp_path / "own" / file).read_bytes()


def test_every_sample_is_in_one_part() -> None:
    for count, parts in ((1, 4), (64, 2), (65, 2), (640, 3), (1000, 7)):
        found = [activations._share_of(count, part, parts) for part in range(parts)]
        assert [index for one in found for index in range(one.start, one.stop)] == list(range(count))
        assert all(one.start % activations.PASS_BATCH == 0 for one in found if one.start < one.stop)


@pytest.mark.parametrize("lost", ["one part", "all parts"])
def test_a_site_of_whose_pass_something_was_lost_makes_its_own(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, passes: list[tuple[Site, ...]], lost: str
) -> None:
    ((first, _),) = recorded_in(2, inputs, MHA_EDIT)
    passes.clear()
    left = [first, None] if lost == "one part" else []
    run_distill(store, "own", inputs, tmp_path / "own", task_scope=TaskScope(recorded=lambda: left))
    assert passes == [(MHA_SITE,)] * 2


def test_what_does_not_fit_a_task_is_not_fetched(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, passes: list[tuple[Site, ...]]
) -> None:
    def fetch() -> list[Any]:
        raise AssertionError("fetched")

    run_distill(store, "a", inputs, tmp_path / "a", activations=A_SITE - 1, task_scope=TaskScope(recorded=fetch))
    assert len(passes) > 2


def test_a_pass_that_is_asked_to_stop_stops_between_batches(
    inputs: dict[str, Folder], passes: list[tuple[Site, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "PASS_BATCH", 5)
    params = make_context(Store("unused"), "", Path()).params
    with pytest.raises(Stopped):
        activations.capture(Portion([params], inputs, CPU, 0, 1, stopping=lambda: len(passes) == 2))
    assert len(passes) == 2


class OnCard:
    """A teacher on a GPU that is not there, which notes where it is to leave what it captures: 10 bytes a site."""

    device, num_samples, train, heldout = torch.device("cuda"), 1, "train", "heldout"

    def __init__(self) -> None:
        self.captured: list[tuple[list[Site], str, str]] = []

    def bytes_a_sample(self, site: Site) -> int:
        return 10

    def capture(self, sites: list[Site], latents: str, place: torch.device) -> dict[Site, Pairs]:
        self.captured.append((sites, latents, place.type))
        return {site: Pairs((torch.zeros(1),), torch.zeros(1), None) for site in sites}


@pytest.mark.parametrize(
    ("card", "host", "expected"),
    [
        (20, 0, ([MHA_SITE, MLP_SITE], "cuda")),
        (10, 99, ([MHA_SITE], "cuda")),
        (9, 20, ([MHA_SITE, MLP_SITE], "cpu")),
        (9, 19, ([MHA_SITE], "cpu")),
        (9, 9, None),
    ],
)
def test_what_does_not_fit_the_gpu_is_kept_on_the_host_and_what_fits_neither_is_computed_anew(
    monkeypatch: pytest.MonkeyPatch, card: int, host: int, expected: tuple[list[Site], str] | None
) -> None:
    monkeypatch.setattr(sources, "memory_budget", lambda context, place: card if place.type == "cuda" else host)
    teacher: Any = OnCard()
    context = make_context(Store("unused"), "", Path())
    ahead = make_context(Store("unused"), "", Path(), edit=MLP_EDIT).params
    context = replace(context, task_scope=TaskScope(next=[ahead]))
    task = TaskState((), teacher, {})
    found = choose_source(task, context)
    if expected is None:
        assert all(isinstance(one, Recomputed) for one in found) and not teacher.captured
        return
    sites, place = expected
    assert teacher.captured == [(sites, "train", place), (sites, "heldout", place)]
    assert [*task.pairs] == sites[1:]  # the step's own are taken, the others wait for their steps


def test_in_bf16_an_operators_pairs_are_kept_in_bf16_and_its_error_is_the_same(rootstock: DiT, latents: Noised) -> None:
    recipe = DistillSpec(precision="bf16")
    found = Teacher(rootstock, (), latents, latents, recipe, CPU).capture([MHA_SITE, PAIR.site], latents, CPU)
    assert {value.dtype for value in found[MHA_SITE].tensors()} == {torch.bfloat16}
    assert {value.dtype for value in found[PAIR.site].tensors()} == {torch.float32}
    scion = new_scion(rootstock, MHA_EDIT, 0)
    with computing("bf16", CPU), torch.no_grad():
        seen = observe(rootstock, [MHA_SITE], latents.z, latents.t, latents.condition)[MHA_SITE]
        exact = losses.error(scion, Pairs(seen.inputs, seen.output, None), losses.LOSSES["l1"])
        assert losses.error(scion, found[MHA_SITE], losses.LOSSES["l1"]) == exact


def test_in_bf16_a_scion_learns_as_it_does_in_fp32(
    rootstock: DiT, source: InMemory, heldout: InMemory, store: Store, tmp_path: Path
) -> None:
    histories = {}
    for precision in ("fp32", "bf16"):
        context = make_context(store, precision, tmp_path, precision=precision)
        histories[precision] = distill.fit(new_scion(rootstock, MHA_EDIT, 0), source, heldout, "l1", context)
    assert histories["fp32"][-1][2] < 0.9 * histories["fp32"][0][2]
    assert histories["bf16"] == [pytest.approx(point, rel=0.02) for point in histories["fp32"]]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_every_product_of_a_distillation_has_its_precision(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, precision: str
) -> None:
    with Products() as counted:
        run_distill(store, "a", inputs, tmp_path / "out", precision=precision, epochs=2)
        steps = [make_context(Store("unused"), "", Path(), precision=precision).params]
        activations.capture(Portion(steps, inputs, CPU, 0, 1))
    assert set(counted.matrices) == set(counted.convolutions) == {precision}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_scion_learns_the_same(store: Store, inputs: dict[str, Folder], tmp_path: Path) -> None:
    for name, compiled in (("eager", False), ("compiled", True)):
        run_distill(store, name, inputs, tmp_path / name, compile=compiled, epochs=2)
    scions = [load_file(tmp_path / name / "scion.safetensors") for name in ("eager", "compiled")]
    for name, value in scions[0].items():
        torch.testing.assert_close(scions[1][name], value, rtol=1e-3, atol=1e-5)


def make_bare(inputs: dict[str, Folder]) -> Context:
    """A context of which only the inputs are read."""
    nothing: Any = None
    return Context("", nothing, inputs, nothing, nothing, nothing, nothing, CPU)


@pytest.mark.parametrize("changes", [{}, {"passes": 2}], ids=["epochs", "passes"])
def test_scions_of_another_graft_are_taken_as_they_are(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, rootstock: DiT, changes: dict[str, Any]
) -> None:
    donor = lively(graft(DiT(TINY), [MHA_EDIT], 0), seed=5)
    (tmp_path / "donor").mkdir()
    checkpoints.save(donor, (MHA_EDIT,), tmp_path / "donor")
    edit = MHA_EDIT.model_copy(update={"scions": str(tmp_path / "donor")})
    run_distill(store, "a", inputs, tmp_path / "out", edit=edit, **changes)
    assert_same_bits(load_file(tmp_path / "out" / "scion.safetensors"), scion_at(donor, MHA_SITE).state_dict())
    summary = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert summary["best_epoch"] == 0 and summary["heldout_error"] > 0
    other = Edit(site=MHA_SITE, operator=HyenaY(kernel=2), scions=edit.scions)
    with pytest.raises(checkpoints.UnfitCheckpoint, match=r"donor: 01.mha: got .*'kernel': 4.*accepted: .*'kernel': 2"):
        run_distill(store, "b", inputs, tmp_path / "out", edit=other)


@pytest.mark.parametrize("changes", [{"start": "inherited"}, {"passes": 2, "workers": 2}], ids=["epochs", "passes"])
def test_where_no_operator_is_to_stand_nothing_is_trained_and_its_error_is_measured(
    store: Store, inputs: dict[str, Folder], tmp_path: Path, rootstock: DiT, changes: dict[str, Any]
) -> None:
    report, out = Reports(), tmp_path / "out"
    run_distill(store, "a", inputs, out, report, edit=DROPPED, **changes)
    assert report.seen == [(0, 0, {})]
    assert {path.name for path in out.iterdir()} == {"scion.safetensors", "distill.json"}  # no curve, and no notes
    latents = read(inputs["features"].place, "heldout").first(24)
    stream = ("distill/heldout",)
    if "passes" in changes:
        latents = latents.stratified(3)
        noisy = NoisedAnew(latents, TINY.objective, 0, stream)[:]
    else:
        noisy = noised(latents, TINY.objective, 1, 0, *stream)
    outputs = captured(rootstock, DROPPED.site, noisy).pairs.outputs.double()
    variance = (outputs - outputs.mean((0, 1))).square().sum()
    assert json.loads((out / "distill.json").read_text()) == {
        "loss": "l2",
        "loss_because": "the outputs' excess kurtosis is 0, at most 12",
        "heldout_error": pytest.approx(outputs.square().mean().item(), rel=1e-5),
        "relative_error": pytest.approx((outputs.square().sum() / variance).item(), rel=1e-5),
        "best_epoch": 0,
    }
    # What it leaves is read back as a block that adds nothing there.
    dropped = hybrid.with_scions(rootstock, (DROPPED,), make_bare({f"scions/{DROPPED.site}": Folder("s", out)}), 0)
    assert load_file(out / "scion.safetensors") == {}
    assert not scion_at(dropped, DROPPED.site)(torch.randn(2, 16, 16)).any()


@pytest.mark.parametrize("changes", [{"epochs": 1}, {"passes": 1}], ids=["epochs", "passes"])
def test_a_site_that_was_dropped_before_may_be_edited_again(
    store: Store, data: TrainingSet, tmp_path: Path, changes: dict[str, Any]
) -> None:
    dropped = Edit(site=MHA_SITE, operator=NoOperator())
    inputs = write_inputs(tmp_path, lively(graft(DiT(TINY), [dropped], 0)), data, [dropped])
    for edit, error in ((dropped, 0.0), (MHA_EDIT, math.inf)):  # of what never changes
        run_distill(store, edit.operator.kind, inputs, tmp_path / "out", edit=edit, **changes)
        measured = read_distilled(tmp_path / "out")
        assert measured.relative_error == error and (measured.heldout_error > 0) == (error > 0)


def is_pickle(path: Path) -> bool:
    content = path.read_bytes()
    if content.startswith(b"PK"):
        return True  # torch.save's archive
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r").dtype.hasobject
    try:
        return len(list(pickletools.genops(content))) > 1
    except Exception:
        return False


def test_nothing_that_a_step_leaves_or_keeps_is_a_pickle(
    store: Store, data: TrainingSet, inputs: dict[str, Folder], tmp_path: Path
) -> None:
    run_training(store.partial("base"), data)
    run_distill(store, "distill", inputs, tmp_path / "out")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".npy", ".json"}
    assert [path.name for path in files if is_pickle(path)] == []


def test_latents_of_a_spec_become_the_models_shape(inputs: dict[str, Folder]) -> None:
    from graftwork.specs.rootstock import DitModel

    model = DitModel(depth=2, width=16, heads=2, patch=2)
    assert read_meta(inputs["features"].path()).rootstock_config(model) == copy.deepcopy(TINY)
