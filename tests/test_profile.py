"""The profile: where attention goes is counted right, in bounded memory, and activations are described as they are."""

from __future__ import annotations

import csv
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.artifacts import Folder
from graftwork.models import checkpoints
from graftwork.models.measures.locality import BandMass, Locality
from graftwork.models.objectives.gaussian import Diffusion
from graftwork.models.operators.attention import Attention, split_heads
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.models.surgery import graft, observe, scion_at
from graftwork.specs.edits import Edit, Site
from graftwork.specs.operators import Mha, NoOperator, Place, Swa
from graftwork.specs.resources import StepResources
from graftwork.specs.training import Precision
from graftwork.stages.artifacts.evidence import Distance, Profile, read_profile
from graftwork.stages.artifacts.latents import LatentsMeta, noised, read, write_meta
from graftwork.stages.catalog.profile import ProfileParams
from graftwork.stages.contract import Context
from graftwork.stages.selection import profile
from tests.products import Products
from tests.small import lively

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TINY = DiTConfig(input_size=8, in_channels=1, patch=2, depth=2, width=16, heads=2, num_classes=3)
ONE_ROW = 1  # bytes of a chunk: less than a row of queries, of which one is taken in any case


# -- locality


def dense(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mass within each distance, by the definition: over tokens, over patches."""
    q, k, _ = (a.transpose(1, 2).double() for a in split_heads(attention.qkv(x), attention.heads))
    mean = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1).mean((0, 1))
    num_tokens = len(mean)
    side = round(num_tokens**0.5)
    tokens, patches = torch.zeros(num_tokens, dtype=torch.float64), torch.zeros(side, dtype=torch.float64)
    for i in range(num_tokens):
        for j in range(num_tokens):
            mass = mean[i, j] / num_tokens
            tokens[abs(i - j) :] += mass
            patches[max(abs(i // side - j // side), abs(i % side - j % side)) :] += mass
    return tokens, patches


def assert_curves(found: BandMass | None, tokens: Any, patches: Any) -> None:
    assert found is not None
    torch.testing.assert_close(found.tokens, torch.as_tensor(tokens, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.patches, torch.as_tensor(patches, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk_bytes", [64 * 2**20, 3 * 25 * 25 * 16, 2 * 5 * 25 * 16, ONE_ROW])
def test_the_mass_within_every_band_is_that_of_the_dense_computation(chunk_bytes: int) -> None:
    attention = lively(Attention(Mha(), Place(width=12, heads=2, num_tokens=25)), scale=0.6)
    draws = torch.Generator().manual_seed(1)
    x, quarters = torch.randn(7, 25, 12, generator=draws), torch.tensor([0, 3, 2, 0, 2, 3, 2])
    locality = Locality((5, 5), CPU, chunk_bytes)
    locality.add(attention, x[:4], quarters[:4])
    locality.add(attention, x[4:], quarters[4:])
    with torch.no_grad():
        assert_curves(locality.overall(), *dense(attention, x))
        first, second, third, fourth = locality.by_quarter()
        assert_curves(first, *dense(attention, x[[0, 3]]))
        assert second is None
        assert_curves(third, *dense(attention, x[[2, 4, 6]]))
        assert_curves(fourth, *dense(attention, x[[1, 5]]))


def pairs_within(length: int) -> np.ndarray:
    """Of a line of that length, how many ordered pairs of places are within 0, 1, .. of each other."""
    return np.cumsum([length, *(2 * (length - d) for d in range(1, length))])


@pytest.mark.parametrize("side", [1, 2, 5, 8])
def test_of_uniform_attention_a_band_holds_its_share_of_the_pairs(side: int) -> None:
    attention = Attention(Mha(), Place(width=8, heads=2, num_tokens=side**2))
    nn.init.zeros_(attention.qkv.weight)
    locality = Locality((side, side), CPU)
    locality.add(attention, torch.randn(3, side**2, 8), torch.tensor([0, 2, 3]))
    tokens, patches = pairs_within(side**2) / side**4, (pairs_within(side) / side**2) ** 2
    assert_curves(locality.overall(), tokens, patches)


def pointing(num_tokens: int, to: int) -> Attention:
    """Attention of tokens that are one-hot in their place: each looks at the one `to` places on, round the end."""
    attention = Attention(Mha(), Place(width=num_tokens, heads=1, num_tokens=num_tokens))
    with torch.no_grad():
        nn.init.zeros_(attention.qkv.bias)
        attention.qkv.weight[:num_tokens] = 1000 * torch.eye(num_tokens)  # of place i: 1000 e_i
        attention.qkv.weight[num_tokens : 2 * num_tokens] = torch.eye(num_tokens).roll(-to, 0)  # of place i + to: e_i
    return attention


# Of 16 tokens, 4 x 4, the share that looks no further than 0, 1, ..
POINTING = {
    0: ([1.0] * 16, [1.0] * 4),
    # The last of a row looks at the first of the next, and the very last at the first of all.
    1: ([0.0] + [15 / 16] * 14 + [1.0], [0.0, 12 / 16, 12 / 16, 1.0]),
    4: ([0.0] * 4 + [12 / 16] * 8 + [1.0] * 4, [0.0, 12 / 16, 12 / 16, 1.0]),  # the patch below
    5: ([0.0] * 5 + [11 / 16] * 6 + [1.0] * 5, [0.0, 9 / 16, 9 / 16, 1.0]),  # the patch below, to the right
}


@pytest.mark.parametrize("chunk_bytes", [64 * 2**20, ONE_ROW])
@pytest.mark.parametrize("to", POINTING)
def test_of_attention_to_one_known_token_the_mass_stands_at_its_distance(to: int, chunk_bytes: int) -> None:
    locality = Locality((4, 4), CPU, chunk_bytes)
    locality.add(pointing(16, to), torch.eye(16)[None], torch.tensor([0]))
    assert_curves(locality.overall(), *POINTING[to])


def test_a_quarter_of_the_timesteps_ends_before_the_next_begins() -> None:
    itself, nowhere = torch.eye(16), torch.zeros(16, 16)  # tokens that look at themselves, and at all alike
    locality = Locality((4, 4), CPU)
    times = torch.tensor([0, 249, 250, 499, 500, 749, 750, 999])
    locality.add(pointing(16, 0), torch.stack([itself, itself, nowhere, nowhere] * 2), Diffusion().quarter(times))
    by_quarter = [mass.tokens[0].item() for mass in locality.by_quarter() if mass is not None]
    assert by_quarter == pytest.approx([1, 1 / 16, 1, 1 / 16])


class Footprint(TorchDispatchMode):
    """Bytes of the largest tensor made, and of all that lived at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.peak = 0, 0
        self.living: dict[int, tuple[int, int]] = {}  # storage -> bytes, tensors on it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                place, size = storage.data_ptr(), storage.nbytes()
                self.living[place] = (size, self.living.get(place, (size, 0))[1] + 1)
                weakref.finalize(tensor, self._died, place)
                self.largest = max(self.largest, size)
                self.peak = max(self.peak, sum(size for size, _ in self.living.values()))
        return made

    def _died(self, place: int) -> None:
        size, count = self.living.pop(place)
        if count > 1:
            self.living[place] = (size, count - 1)


def footprint(side: int, num_samples: int, chunk_bytes: int) -> Footprint:
    attention = lively(Attention(Mha(), Place(width=8, heads=2, num_tokens=side**2)))
    x, quarters = torch.randn(num_samples, side**2, 8), torch.full((num_samples,), 2)
    locality = Locality((side, side), CPU, chunk_bytes)
    with Footprint() as seen:
        locality.add(attention, x, quarters)
    return seen


@pytest.mark.parametrize("chunk_bytes", [4 * 2**20, 64 * 2**20], ids=["part of a map", "several maps"])
def test_memory_stays_within_a_chunk_and_does_not_grow_with_samples(chunk_bytes: int) -> None:
    few, many = (footprint(32, num_samples, chunk_bytes) for num_samples in (3, 9))
    inputs = 9 * 1024 * 8 * 4
    assert few.largest <= chunk_bytes and few.peak <= chunk_bytes + 10 * inputs
    assert many.largest == few.largest and many.peak <= few.peak + inputs


# -- activations


def heavy_tailed(count: int = 40_000) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    return 0.3 + torch.randn(count, generator=draws) ** 3


def tallied(values: Tensor, batch: int) -> profile.Tally:
    tally = profile.Tally(CPU)
    for part in values.split(batch):
        tally.add(part)
    return tally


def test_moments_and_largest_magnitudes_are_those_of_all_values() -> None:
    values = heavy_tailed()
    found = tallied(values, 1000).summary("03.mha")
    exact = values.double()
    centred = exact - exact.mean()
    assert found.mean == pytest.approx(exact.mean().item())
    assert found.std == pytest.approx(centred.square().mean().sqrt().item())
    assert found.excess_kurtosis == pytest.approx(((centred**4).mean() / centred.square().mean() ** 2 - 3).item())
    assert found.excess_kurtosis > 10
    assert found.largest_magnitudes == tuple(values.abs().sort(descending=True).values[:5].tolist())
    assert found.largest == values.abs().max().item()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_quantiles_are_right_to_within_four_thousandths_at_any_magnitude(scale: float) -> None:
    values = scale * heavy_tailed()
    expected = np.quantile(values.numpy(), profile.LEVELS, method="inverted_cdf")
    found = tallied(values, 1000).quantiles()
    assert list(found) == ["0.001", "0.01", "0.25", "0.5", "0.75", "0.99", "0.999"]
    assert list(found.values()) == pytest.approx(expected.tolist(), rel=0.004)


def test_quantiles_are_the_same_however_values_are_split() -> None:
    assert tallied(heavy_tailed(), 40_000).quantiles() == tallied(heavy_tailed(), 17).quantiles()


@pytest.mark.parametrize("value", [0.0, 0.3, 0.7])  # rounding leaves a variance of zero, below it, and above
def test_a_constant_has_no_spread_and_no_tails(value: float) -> None:
    found = tallied(torch.full((997,), value), 10).summary("03.mha")
    assert found.std < 1e-7 and found.excess_kurtosis == 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_is_complained_of_by_its_site(wrong: float) -> None:
    values = heavy_tailed(100)
    values[7] = wrong
    with pytest.raises(FloatingPointError, match=r"03\.mha puts out values that are not finite"):
        tallied(values, 10).summary("03.mha")


# -- the whole step, and what it leaves


def make_inputs(folder: Path, model: DiT, edits: tuple[Edit, ...] = ()) -> dict[str, Folder]:
    features, base = folder / "features", folder / "base"
    for each in (features, base):
        each.mkdir(parents=True)
    draws = np.random.default_rng(0)
    np.save(features / "training_latents.npy", draws.standard_normal((30, 1, 8, 8), dtype=np.float32))
    np.save(features / "training_labels.npy", np.arange(30) % 3)
    meta = LatentsMeta(codec="pixel", shape=(1, 8, 8), classes=("a", "b", "c"), num_training=30, num_heldout=0)
    write_meta(features, meta)
    checkpoints.save(model, edits, base)
    return {"features": Folder("f", features), "base": Folder("b", base)}


def run_profile(
    inputs: dict[str, Folder], out: Path, seed: int = 0, precision: Precision = "fp32"
) -> list[tuple[int, int]]:
    """Returns what was reported."""
    reports: list[tuple[int, int]] = []

    def report(done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        reports.append((done, total))

    out.mkdir()
    nothing: Any = None
    params = ProfileParams(seed=seed, samples=24, precision=precision)
    profile.run(Context("profile", params, inputs, out, nothing, report, StepResources(), CPU))
    return reports


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    return make_inputs(tmp_path_factory.mktemp("inputs"), lively(DiT(TINY)))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Folder]) -> Path:
    """What the step left."""
    folder = tmp_path_factory.mktemp("step") / "out"
    run_profile(inputs, folder)
    return folder


@pytest.fixture
def found(out: Path) -> Profile:
    return read_profile(out)


@pytest.mark.usefixtures("painted_alone")
def test_every_product_of_a_profile_has_its_precision(inputs: dict[str, Folder], tmp_path: Path) -> None:
    for precision in get_args(Precision):
        with Products() as counted:
            run_profile(inputs, tmp_path / precision, precision=precision)
        assert set(counted.convolutions) == {precision}
        # In bf16, that of attention's statistics stays fp32.
        assert set(counted.matrices) == ({"bf16", "fp32"} if precision == "bf16" else {precision})
    exact, rounded = (read_profile(tmp_path / precision) for precision in ("fp32", "bf16"))
    for site, output in exact.outputs.items():
        assert rounded.outputs[site].std == pytest.approx(output.std, rel=0.05)
    for site, curve in exact.locality.tokens.items():
        assert rounded.locality.tokens[site] == pytest.approx(curve, abs=0.02)


PICTURES = ("activations.png", "locality.png", "locality_by_quarter.png")


def test_the_profile_is_of_each_operator_on_noised_training_latents(found: Profile, inputs: dict[str, Folder]) -> None:
    rootstock = lively(DiT(TINY))
    shown = noised(read(inputs["features"].place, "training").first(24), TINY.objective, 1, 0, "profile")
    sites = [Site(block=block, target=target) for block in (0, 1) for target in ("mha", "mlp")]
    for site, seen in observe(rootstock, sites, shown.z, shown.t, shown.condition).items():
        described = found.outputs[str(site)]
        assert described.mean == pytest.approx(seen.output.mean().item(), abs=1e-6)
        assert described.std == pytest.approx(seen.output.std(correction=0).item())
        assert described.largest == pytest.approx(seen.output.abs().max().item())
        assert found.excess_kurtosis(site) == described.excess_kurtosis
        if site.target == "mha":
            with torch.no_grad():
                attention = scion_at(rootstock, site)
                assert isinstance(attention, Attention)
                tokens, patches = dense(attention, seen.inputs[0])
            curves: dict[Distance, Tensor] = {"tokens": tokens, "patches": patches}
            for distance, curve in curves.items():
                masses = [found.mass_within(site.block, band, distance) for band in range(len(curve))]
                assert masses == pytest.approx(curve.tolist(), abs=1e-6)
    assert list(found.outputs) == [str(site) for site in sites]


def test_curves_rise_to_one_and_a_band_beyond_the_last_holds_all(found: Profile) -> None:
    curves = [*found.locality.tokens.values(), *found.locality.patches.values()]
    assert {len(curve) for curve in curves} == {16, 4}
    assert all(list(curve) == sorted(curve) and curve[-1] == 1 for curve in curves)
    assert found.mass_within(0, 500, "tokens") == found.mass_within(0, 500, "patches") == 1


def test_the_quarters_average_to_the_whole_by_their_numbers_of_samples(
    found: Profile, inputs: dict[str, Folder]
) -> None:
    times = noised(read(inputs["features"].place, "training").first(24), TINY.objective, 1, 0, "profile").t
    weights = np.array([((times >= start) & (times < start + 250)).sum() / 24 for start in (0, 250, 500, 750)])
    assert (weights > 0).all()
    for distance in ("tokens", "patches"):
        for site, quarters in found.locality.by_quarter.along(distance).items():
            assert weights @ np.array(quarters) == pytest.approx(np.array(found.locality.along(distance)[site]))


def test_the_same_step_leaves_the_same_files(tmp_path: Path, inputs: dict[str, Folder], out: Path) -> None:
    run_profile(inputs, tmp_path / "again")
    names = {path.name for path in out.iterdir()}
    assert names == {"profile.json", "profile.csv", *PICTURES}
    assert [name for name in names if (tmp_path / "again" / name).read_bytes() != (out / name).read_bytes()] == []


@pytest.mark.usefixtures("painted_alone")
def test_another_seed_sees_other_noise(tmp_path: Path, inputs: dict[str, Folder], found: Profile) -> None:
    run_profile(inputs, tmp_path / "other", seed=1)
    assert read_profile(tmp_path / "other").mass_within(1, 3, "tokens") != found.mass_within(1, 3, "tokens")


@pytest.mark.usefixtures("painted_alone")
def test_progress_is_told_in_samples_and_the_batch_changes_no_figure(
    tmp_path: Path, inputs: dict[str, Folder], found: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "BATCH", 10)
    assert run_profile(inputs, tmp_path / "batches") == [(10, 24), (20, 24), (24, 24)]
    batched = read_profile(tmp_path / "batches")
    for site, outputs in found.outputs.items():
        assert batched.outputs[site].std == pytest.approx(outputs.std, rel=1e-5)
        assert batched.outputs[site].quantiles == pytest.approx(outputs.quantiles, rel=0.01)
    for site, curve in found.locality.tokens.items():
        assert batched.locality.tokens[site] == pytest.approx(curve, abs=1e-6)


def test_the_activations_of_a_batch_fit_into_their_memory() -> None:
    at_512_px = DiTConfig(input_size=64, in_channels=4, patch=2, depth=28, width=1152, heads=16, num_classes=1000)
    batch = profile.batch_size(at_512_px, 56)
    assert 0.5 < batch * 2 * 56 * 1024 * 1152 * 4 / profile.OBSERVED_BYTES <= 1
    assert profile.batch_size(TINY, 4) == profile.BATCH


def test_the_table_has_the_profiles_figures_by_site(out: Path, found: Profile) -> None:
    with (out / "profile.csv").open(newline="") as file:
        rows = {row["site"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["00.mha", "00.mlp", "01.mha", "01.mlp"]
    for site, row in rows.items():
        assert float(row["excess_kurtosis"]) == found.outputs[site].excess_kurtosis
        assert float(row["quantile_0.999"]) == found.outputs[site].quantiles["0.999"]
    assert float(rows["01.mha"]["within_8_tokens"]) == found.mass_within(1, 8, "tokens")
    assert float(rows["01.mha"]["within_2_patches"]) == found.mass_within(1, 2, "patches")
    assert rows["01.mlp"]["within_8_tokens"] == ""
    assert [name for name in rows["00.mha"] if name.startswith("within")] == [
        *(f"within_{band}_tokens" for band in (1, 2, 4, 8)),
        *(f"within_{band}_patches" for band in (1, 2)),
    ]


def windows(*blocks: int) -> tuple[Edit, ...]:
    return tuple(Edit(site=Site(block=block, target="mha"), operator=Swa(window=2)) for block in blocks)


@pytest.mark.usefixtures("painted_alone")
def test_where_there_is_no_full_attention_only_outputs_are_described(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, graft(lively(DiT(TINY)), windows(1), 0), windows(1))
    run_profile(inputs, tmp_path / "out")
    found = read_profile(tmp_path / "out")
    assert list(found.locality.tokens) == list(found.locality.by_quarter.patches) == ["00.mha"]
    assert found.outputs["01.mha"].std > 0
    with pytest.raises(ValueError, match=r"01\.mha has no softmax attention over all tokens"):
        found.mass_within(1, 3, "tokens")


@pytest.mark.usefixtures("painted_alone")
def test_a_rootstock_without_any_full_attention_has_no_locality_to_show(tmp_path: Path) -> None:
    edits = (*windows(0), Edit(site=Site(block=1, target="mha"), operator=NoOperator()))
    run_profile(make_inputs(tmp_path, graft(lively(DiT(TINY)), edits, 0), edits), tmp_path / "out")
    dropped = read_profile(tmp_path / "out").outputs["01.mha"]
    assert {dropped.mean, dropped.std, dropped.excess_kurtosis, *dropped.quantiles.values()} == {0.0}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"profile.json", "profile.csv", "activations.png"}


def test_a_profile_is_read_without_torch() -> None:
    code = "import sys, graftwork.stages.artifacts.evidence; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
