"""The codec: latents and images are diffusers' own, whatever the batch or the worker, and another VAE is one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.artifacts import Folder
from graftwork.models import checkpoints
from graftwork.models.condition import Condition
from graftwork.models.numerics.streams import generator, initialising
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.pipeline import api
from graftwork.pipeline.planning import preflight
from graftwork.pipeline.planning.contents import Contents
from graftwork.pipeline.planning.plan import Plan, make_plan
from graftwork.pipeline.runs import record
from graftwork.pipeline.runs.record import RunRecord, StepRecord
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.codec import Codec, PixelCodec, VaeCodec
from graftwork.specs.data import DigitsData, ImageFolderData
from graftwork.specs.job import JobSpec
from graftwork.specs.reading.load import SpecError, job_from
from graftwork.specs.resources import StepResources
from graftwork.specs.sampler import DdimSampler
from graftwork.stages.artifacts.latents import Shards, read, read_meta
from graftwork.stages.catalog.evaluate import SampleParams
from graftwork.stages.contract import Context
from graftwork.stages.data.hashes import ChangedImage, ImageHashes
from graftwork.stages.data.images import read_image, scaled
from graftwork.stages.data.sources import split
from graftwork.stages.evaluation import samples as rows
from graftwork.stages.features import codec, features
from graftwork.stages.features.codec import UnfitCodec, load_codec, misfits
from tests.encoding import encode
from tests.products import Products
from tests.small import Payload
from tests.stores import commit
from tests.vaes import SHAPE, SIDE, make_vae

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
COUNT = 6
NAMES = [f"cat/{number}.png" for number in range(COUNT)]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vae(tmp_path_factory.mktemp("models") / "vae")


@pytest.fixture(scope="module")
def official(folder: Path) -> Any:
    return AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand((COUNT, 3, SIDE, SIDE), generator=generator(0, "images")) * 2 - 1


@pytest.fixture(scope="module")
def latents(folder: Path, images: Tensor) -> Tensor:
    return loaded(folder).encode(images, NAMES)


def spec(path: Path | str, **changes: Any) -> VaeCodec:
    return VaeCodec(**{"path": str(path), "factor": 2, **changes})


def loaded(path: Path | str, **changes: Any) -> codec.Coder:
    return load_codec(spec(path, **changes), CPU)


# -- images to latents and back


def test_a_latent_is_a_sample_of_diffusers_posterior_scaled(official: Any, images: Tensor, latents: Tensor) -> None:
    with torch.no_grad():
        expected = [
            0.18215 * official.encode(image[None]).latent_dist.sample(generator(0, "posterior", name))
            for image, name in zip(images, NAMES, strict=True)
        ]
    assert latents.shape == (COUNT, 4, SIDE // 2, SIDE // 2)
    torch.testing.assert_close(latents, torch.cat(expected), rtol=0, atol=1e-5)


def test_an_image_is_diffusers_decoding_rounded_as_published(folder: Path, official: Any, latents: Tensor) -> None:
    with torch.no_grad():
        expected = official.decode(latents / 0.18215).sample
    assert expected.std() > 0.1  # so that the next line says something
    assert_truncated(loaded(folder).decode(latents), expected)


def assert_truncated(found: NDArray[np.uint8], pixels: Tensor) -> None:
    """The published rounding, downwards; within that of the float, a pixel may fall to either side."""
    exact = (127.5 * pixels + 128).clamp(0, 255).numpy()
    assert found.dtype == np.uint8 and found.shape == exact.shape
    assert np.all((found <= exact + 1e-2) & (found.astype(int) > exact - 1 - 1e-2))


SCALES: dict[str, dict[str, Any]] = {
    "a factor of its own": {"scaling_factor": 0.13025},
    "a shift": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "means and deviations": {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [2.0, 0.5, 1.0, 4.0]},
}


@pytest.mark.parametrize("how", SCALES)
def test_what_the_vaes_config_says_of_its_latents_is_done(
    official: Any, images: Tensor, tmp_path: Path, how: str
) -> None:
    says = SCALES[how]
    scale = torch.tensor(says.get("scaling_factor", 0.18215)) / torch.tensor(says.get("latents_std", [1.0]))
    shift = torch.tensor(says.get("latents_mean", [says.get("shift_factor", 0.0)]))
    scale, shift = scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
    with torch.no_grad():
        own = [
            official.encode(image[None]).latent_dist.sample(generator(0, "posterior", name))
            for image, name in zip(images, NAMES, strict=True)
        ]
        vae = loaded(make_vae(tmp_path / "vae", **says))
        latents = vae.encode(images, NAMES)
        torch.testing.assert_close(latents, scale * (torch.cat(own) - shift), rtol=0, atol=1e-5)
        assert_truncated(vae.decode(latents), official.decode(latents / scale + shift).sample)


def test_a_config_that_leaves_the_scale_out_has_diffusers_own(images: Tensor, latents: Tensor, tmp_path: Path) -> None:
    config = json.loads((make_vae(tmp_path / "vae") / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if name != "scaling_factor"})
    )
    assert torch.equal(loaded(tmp_path / "vae").encode(images, NAMES), latents)


def test_a_scale_that_the_vae_contradicts_is_refused_and_its_own_is_not_needed(photos: Path, tmp_path: Path) -> None:
    folder = make_vae(tmp_path / "vae", scaling_factor=0.13025)
    with pytest.raises(SpecError) as caught:
        api.plan(job(photos, folder, codec={"scale": 0.18215}))
    assert caught.value.lines[0] == f"codec.scale: got 0.18215; accepted: 0.13025, as the VAE in {folder} has it"
    assert misfits(spec(folder, scale=0.13025)) == misfits(spec(folder)) == []


@pytest.mark.parametrize(
    ("says", "problem"),
    [
        ({"scaling_factor": 0}, "scaling_factor is wrong"),
        ({"scaling_factor": None}, "scaling_factor is wrong"),
        ({"latents_mean": [0.5]}, "latents_mean has 1 numbers for 4 channels"),
        ({"latents_mean": [0, 0, 0, 1], "shift_factor": 0.1}, "both shift_factor and latents_mean are there"),
    ],
)
def test_a_vae_whose_latents_cannot_be_normalised_is_refused(
    folder: Path, tmp_path: Path, says: dict[str, Any], problem: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **says}))
    (line,) = misfits(spec(tmp_path))
    assert line.startswith(f"codec.path: got '{tmp_path}', in whose config.json ") and problem in line


def test_an_images_noise_comes_from_its_name_alone(folder: Path, images: Tensor) -> None:
    same = images[:1].expand(3, -1, -1, -1)
    first, second, third = loaded(folder).encode(same, ["a", "b", "a"])
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(first, third, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 4, 5])
def test_any_split_into_batches_gives_the_same_up_to_rounding(
    folder: Path, images: Tensor, latents: Tensor, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, whole = loaded(folder), loaded(folder).decode(latents)
    monkeypatch.setattr(codec, "BATCH", size)
    torch.testing.assert_close(vae.encode(images, NAMES), latents, rtol=0, atol=1e-6)
    assert np.abs(vae.decode(latents).astype(int) - whole).max() <= 1


def test_the_batch_is_the_specs_or_suits_the_device(folder: Path) -> None:
    assert [codec.batch_size_for(spec(folder), side, None) for side in (64, 256, 512)] == [16, 16, 16]
    assert [codec.batch_size_for(spec(folder), side, 80e9) for side in (64, 256, 512, 8192)] == [256, 64, 16, 1]
    assert codec.batch_size_for(spec(folder, batch=5), 256, 80e9) == 5


def test_a_gpus_batch_is_of_its_memory_and_the_tasks_share_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding 64 images of 256 pixels takes about 15 GB."""
    moved = codec.Vae(spec(folder), CPU)
    assert moved.room is None
    monkeypatch.setattr(codec, "_read", lambda codec, dtype: torch.nn.Identity())
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    for total, share, most in ((80e9, 1.0, 64), (80e9, 0.25, 16), (24e9, 1.0, 16), (24e9, 0.5, 8), (10e9, 0.1, 1)):
        card = SimpleNamespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        vae = codec.Vae(spec(folder), torch.device("cuda"), share)
        assert codec.batch_size_for(vae.codec, 256, vae.room) == most
        assert most * 15e9 / 64 <= 0.2 * share * total or most == 1


def test_images_as_bytes_are_those_in_range(folder: Path) -> None:
    data = torch.randint(256, (COUNT, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator(0, "bytes"))
    floats = torch.from_numpy(scaled(data.numpy()))
    assert floats.min() == -1 and floats.max() == 1
    assert torch.equal(loaded(folder).encode(data, NAMES), loaded(folder).encode(floats, NAMES))


def test_the_same_batch_gives_the_same_bits(folder: Path, images: Tensor, latents: Tensor) -> None:
    assert torch.equal(loaded(folder).encode(images, NAMES), latents)


def test_in_bf16_latents_are_close_and_still_float32(folder: Path, images: Tensor, latents: Tensor) -> None:
    rough = loaded(folder, precision="bf16").encode(images, NAMES)
    assert rough.dtype == torch.float32
    assert 1e-5 < (rough - latents).abs().max() < 0.02
    assert loaded(folder, precision="bf16").decode(latents).dtype == np.uint8


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_every_product_of_a_vae_has_its_precision(folder: Path, images: Tensor, precision: str) -> None:
    coder = loaded(folder, precision=precision)
    with Products() as counted:
        coder.decode(coder.encode(images, NAMES))
    assert set(counted.convolutions) == set(counted.matrices) == {precision}


def test_pixels_are_their_own_latents(images: Tensor) -> None:
    assert load_codec(PixelCodec(), CPU).encode(images, NAMES) is images


def test_pixels_are_rounded_as_published() -> None:
    pixels = torch.tensor([-1.5, -1, -0.5, 0, 0.5, 1, 1.5])
    assert load_codec(PixelCodec(), CPU).decode(pixels).tolist() == [0, 0, 64, 128, 191, 255, 255]


# -- where a VAE lies, and in what form


def test_a_pipelines_folder_holds_its_vae(folder: Path, images: Tensor, latents: Tensor, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "vae").symlink_to(folder)
    assert torch.equal(loaded(tmp_path).encode(images, NAMES), latents)


def test_weights_in_a_bin_are_read(images: Tensor, latents: Tensor, tmp_path: Path) -> None:
    make_vae(tmp_path, safe=False)
    assert not (tmp_path / WEIGHTS).exists()
    assert torch.equal(loaded(tmp_path).encode(images, NAMES), latents)


def test_attention_under_its_old_names_is_read(folder: Path, images: Tensor, latents: Tensor, tmp_path: Path) -> None:
    """As in the published sd-vae-ft-ema."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(folder / WEIGHTS)
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    assert any(".proj_attn." in key for key in state) and not any(".to_" in key for key in state)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(state, tmp_path / WEIGHTS, {"format": "pt"})
    assert torch.equal(loaded(tmp_path).encode(images, NAMES), latents)


def test_a_hub_id_is_read_from_the_local_cache(
    images: Tensor, latents: Tensor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--someone--vae"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123abc")
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / "0123abc").symlink_to(folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert torch.equal(loaded("someone/vae").encode(images, NAMES), latents)
    assert misfits(spec("someone/vae", factor=8))[0].startswith("codec.factor: got 8; accepted: 2, ")


def written(vae: Any, folder: Path, form: str) -> None:
    """Save a VAE in one of the forms in which they are shared."""
    variant = "fp16" if "fp16" in form else None
    vae.save_pretrained(
        folder,
        variant=variant,
        safe_serialization="bin" not in form,
        max_shard_size="20KB" if "parts" in form else "10GB",
    )


FORMS = ["fp16", "fp16 bin", "parts", "parts fp16", "parts bin"]


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_any_form_that_diffusers_saves_are_read(
    official: Any, images: Tensor, latents: Tensor, tmp_path: Path, form: str
) -> None:
    written(official, tmp_path, form)
    assert torch.equal(loaded(tmp_path).encode(images, NAMES), latents)


def test_full_weights_are_read_before_a_variant(official: Any, images: Tensor, latents: Tensor, tmp_path: Path) -> None:
    written(make_other(), tmp_path, "fp16")
    written(official, tmp_path, "parts bin")
    assert torch.equal(loaded(tmp_path).encode(images, NAMES), latents)


def make_other() -> Any:
    with initialising(1, "vae"):
        return AutoencoderKL(**SHAPE)


def test_of_several_variants_alone_none_is_chosen(official: Any, tmp_path: Path) -> None:
    for variant in ("fp16", "non_ema"):
        official.save_pretrained(tmp_path, variant=variant)
    with pytest.raises(UnfitCodec, match=f"^{tmp_path}: has weights of the variants fp16, non_ema only"):
        loaded(tmp_path)


# -- what does not fit


def unfit(how: str, path: Path) -> tuple[VaeCodec, str]:
    """A codec that contradicts its VAE, and how the line about it begins."""
    match how:
        case "factor":
            return spec(make_vae(path), factor=8), "codec.factor: got 8; accepted: 2, "
        case "channels":
            return spec(make_vae(path), channels=16), "codec.channels: got 16; accepted: 4, "
        case "another network":
            make_vae(path)
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DConditionModel"}))
            return spec(path), f"codec.path: got '{path}', a UNet2DConditionModel; accepted: "
        case "no VAE":
            path.mkdir()
        case "a file":
            path.touch()
        case "no JSON":
            path.mkdir()
            (path / "config.json").write_text("<html>404: not found</html>")
    return spec(path), f"codec.path: got '{path}', with no VAE's config.json in it; accepted: "


UNFIT = ["factor", "channels", "another network", "no VAE", "a file", "no JSON"]


@pytest.mark.parametrize("how", UNFIT)
def test_a_vae_that_the_spec_contradicts_is_one_line(tmp_path: Path, how: str) -> None:
    given, beginning = unfit(how, tmp_path / "vae")
    (line,) = misfits(given)
    assert line.startswith(beginning) and "\n" not in line
    with pytest.raises(UnfitCodec) as caught:
        load_codec(given, CPU)
    assert str(caught.value) == line


def test_a_vae_that_is_not_there_is_one_line_when_it_is_needed(tmp_path: Path) -> None:
    given = spec(tmp_path / "none")
    assert misfits(given) == []
    with pytest.raises(UnfitCodec, match=rf"^codec\.path: got '{tmp_path}/none', no such folder; accepted: .+$"):
        load_codec(given, CPU)


def test_a_vae_of_other_images_than_the_data_is_one_line(folder: Path) -> None:
    (line,) = misfits(spec(folder), DigitsData())
    assert line.startswith(f"codec.path: got '{folder}', of images with 3 channels; accepted: ")


def wrong_weights(how: str, path: Path) -> None:
    """Break a VAE's weights; its config.json stays as it is."""
    file = make_vae(path) / WEIGHTS
    match how:
        case "missing":
            file.unlink()
        case "truncated":
            file.write_bytes(file.read_bytes()[:-100])
        case "a tensor less":
            save_file(dict(list(load_file(file).items())[1:]), file, {"format": "pt"})
        case "a tensor more":
            save_file({**load_file(file), "stranger": torch.zeros(2)}, file, {"format": "pt"})
        case "other shapes":
            other = make_vae(path.with_name("other"), block_out_channels=(4, 8))
            file.write_bytes((other / WEIGHTS).read_bytes())
        case "integers":
            save_file({n: v.to(torch.int8) for n, v in load_file(file).items()}, file, {"format": "pt"})
        case "eight bits":
            save_file({n: v.to(torch.float8_e4m3fn) for n, v in load_file(file).items()}, file, {"format": "pt"})
        case "a part less":
            written(AutoencoderKL.from_pretrained(path, low_cpu_mem_usage=False), path, "parts")
            file.unlink(missing_ok=True)
            next(path.glob("*-00002-of-*")).unlink()
        case "code":
            file.unlink()
            torch.save({"weight": Payload(path.with_name("marker"))}, file.with_suffix(".bin"))


BEFORE = ["missing", "truncated", "code", "integers", "eight bits", "a part less"]  # known by names and headers


@pytest.mark.parametrize("how", [*BEFORE, "a tensor less", "a tensor more", "other shapes"])
def test_broken_weights_are_refused_in_one_line_that_names_the_folder(tmp_path: Path, how: str) -> None:
    wrong_weights(how, tmp_path / "vae")
    with pytest.raises(UnfitCodec) as caught:
        loaded(tmp_path / "vae")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/vae: ") and "\n" not in message
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("how", BEFORE)
def test_what_names_and_headers_tell_of_a_vae_is_said_before_the_run(photos: Path, tmp_path: Path, how: str) -> None:
    wrong_weights(how, tmp_path / "vae")
    with pytest.raises(SpecError) as caught:
        preflight.check_files(job(photos, tmp_path / "vae"), ["features"])
    (line,) = caught.value.lines
    assert line.startswith(f"codec.path: got {tmp_path}/vae") and "; accepted: " in line


# -- a job with a VAE, before it starts


def job(photos: Path, vae: Path | str, **changes: Any) -> JobSpec:
    return job_from(
        {
            "name": "photos",
            "data": {"kind": "image_folder", "path": str(photos), "image_size": SIDE},
            "codec": {"kind": "vae", "path": str(vae), "factor": 2, **changes.pop("codec", {})},
            "model": {"kind": "dit", "depth": 2, "width": 16, "heads": 2, "patch": 2},
            "graft": [{"target": "mha", "operator": {"kind": "swa"}, "layers": {"kind": "all"}}],
            "distill": {"samples": 8},
            "evaluate": {"metrics": ["fid"], "reference": str(photos / "class-0"), "inception": str(photos)},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 14 photographs: with 16 in a batch, the last of each split is a short one."""
    home = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0)
    for label in range(3):
        (home / f"class-{label}").mkdir()
        for number in range(14):
            image = pixels.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(image).save(home / f"class-{label}" / f"{number}.png")
    return home


def keys(plan: Plan) -> dict[str, str]:
    return {step.name: step.key for step in plan.steps}


def shared(one: dict[str, str], other: dict[str, str]) -> set[str]:
    """The steps with the same key in both."""
    return {name for name, _ in one.items() & other.items()}


def test_the_vaes_content_is_in_every_key_and_its_place_in_none(photos: Path, tmp_path: Path) -> None:
    here = keys(make_plan(job(photos, make_vae(tmp_path / "vae"))))
    there = keys(make_plan(job(photos, make_vae(tmp_path / "elsewhere"))))
    other = keys(make_plan(job(photos, make_vae(tmp_path / "other", seed=1))))
    assert here == there
    assert shared(here, other) <= {"reference/fid"}  # which sees no latents


def test_a_pipelines_key_is_that_of_its_vae(photos: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").symlink_to(folder)
    (tmp_path / "unet.bin").write_bytes(b"large")
    assert keys(make_plan(job(photos, tmp_path))) == keys(make_plan(job(photos, folder)))


@pytest.mark.parametrize("field", ["precision", "batch"])
def test_how_the_vae_is_used_is_in_every_key(photos: Path, folder: Path, field: str) -> None:
    changed = {"precision": "bf16", "batch": 8}
    before, after = (keys(make_plan(job(photos, folder, codec=part))) for part in ({}, {field: changed[field]}))
    assert shared(before, after) <= {"reference/fid"}


def test_another_vae_than_the_specs_is_known_before_anything_starts(photos: Path, folder: Path) -> None:
    with pytest.raises(SpecError) as caught:
        preflight.check(job(photos, folder, codec={"channels": 8}))
    assert caught.value.lines == [f"codec.channels: got 8; accepted: 4, as the VAE in {folder} has it"]


def test_the_classifier_is_refused_where_latents_are_no_pixels(photos: Path, folder: Path) -> None:
    with pytest.raises(SpecError) as caught:
        job(photos, folder, evaluate={"metrics": ["classifier"]})
    (line,) = caught.value.lines
    assert line.startswith("evaluate.metrics: got ")


def test_asking_whether_a_vae_fits_loads_no_torch() -> None:
    check = (
        "import sys, graftwork.stages.features.codec; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


# -- features, and samples


def encode_photos(
    photos: Path, codec: Codec, out: Path, cpu: float = 1, hashed: ImageHashes | None = None, **settings: Any
) -> Path:
    data = ImageFolderData(path=str(photos), image_size=SIDE, heldout=0.25, **settings)
    return encode(data, out, codec=codec, cpu=cpu, images=hashed)


@pytest.fixture(scope="module")
def encoded(photos: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory, warm_ray: None) -> Path:
    """The photographs' features, made by one worker that takes every CPU there is."""
    return encode_photos(photos, spec(folder), tmp_path_factory.mktemp("features") / "one", cpu=2)


def test_features_are_the_vaes_latents_in_the_order_of_the_split(photos: Path, folder: Path, encoded: Path) -> None:
    data, vae = ImageFolderData(path=str(photos), image_size=SIDE, heldout=0.25), loaded(folder)
    for name, items in zip(("training", "heldout"), split(data), strict=True):
        pictures = torch.from_numpy(np.stack([read_image(data, item.name) for item in items]))
        expected = vae.encode(pictures, [item.name for item in items])
        found = read(encoded, name)
        assert torch.equal(found.tensor(), expected)
        assert found.labels.tolist() == [item.label for item in items]


def test_what_the_latents_are_is_written_beside_them(encoded: Path) -> None:
    meta = read_meta(encoded)
    assert (meta.codec, meta.scale, meta.channels, meta.side) == ("vae", 0.18215, 4, 8)
    assert meta.classes == ("class-0", "class-1", "class-2")
    assert (meta.num_training, meta.num_heldout) == (30, 12)
    assert not meta.bounded


def test_two_workers_other_tasks_and_mirror_images_beside_them_make_the_same_bits(
    photos: Path, folder: Path, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = ray.data.ActorPoolStrategy
    monkeypatch.setattr(features, "BATCHES_A_TASK", 1)
    monkeypatch.setattr(ray.data, "ActorPoolStrategy", lambda **_: pool(size=2))
    made = encode_photos(photos, spec(folder), tmp_path / "two", flip=True)
    for name in ("training_latents-00000.npy", "heldout_latents-00000.npy"):
        assert (made / name).read_bytes() == (encoded / name).read_bytes()

    data, vae = ImageFolderData(path=str(photos), image_size=SIDE, heldout=0.25), loaded(folder)
    names = [item.name for item in split(data)[0]]
    pictures = torch.from_numpy(np.stack([read_image(data, name) for name in names])).flip(-1)
    mirrored = read(made, "training").mirrored
    assert isinstance(mirrored, Shards) and read(made, "heldout").mirrored is None
    assert torch.equal(mirrored[: len(names)].tensor(), vae.encode(pictures, [f"{name}/mirrored" for name in names]))


@pytest.mark.usefixtures("warm_ray")
def test_weights_that_a_worker_cannot_read_are_one_line(photos: Path, tmp_path: Path) -> None:
    wrong_weights("truncated", tmp_path / "vae")
    with pytest.raises(UnfitCodec) as caught:
        encode_photos(photos, spec(tmp_path / "vae"), tmp_path / "out")
    assert str(caught.value).startswith(f"{tmp_path}/vae: {WEIGHTS}: cannot be read as tensors: ")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("warm_ray")
def test_a_photograph_that_changed_since_it_was_hashed_is_one_line_of_a_worker(
    photos: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    hashed = Contents().images(ImageFolderData(path=str(tmp_path / "photos"), image_size=SIDE, heldout=0.25))
    shutil.copy(photos / "class-0" / "1.png", tmp_path / "photos" / "class-2" / "3.png")
    with pytest.raises(ChangedImage) as caught:
        encode_photos(tmp_path / "photos", spec(folder), tmp_path / "out", hashed=hashed)
    assert str(caught.value).startswith("data.path: class-2/3.png holds something else than when the job began; acc")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("warm_ray")
def test_a_photograph_that_a_worker_cannot_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for few in ("WORTH_A_STREAM", "WORTH_A_SURVEY"):
        monkeypatch.setattr(features, few, 0)
    broken = tmp_path / "photos" / "class-0" / "0.png"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"<html>404: not found</html>")
    with pytest.raises(ValueError) as caught:
        encode_photos(tmp_path / "photos", PixelCodec(), tmp_path / "out")
    told = f"data.path: 1 of 1 images are broken: {broken}: cannot be read as an image: "
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)


def test_samples_are_decoded_and_their_latents_know_no_bounds(
    folder: Path, official: Any, encoded: Path, tmp_path: Path
) -> None:
    with initialising(0, "rootstock"):
        model = DiT(DiTConfig(input_size=8, in_channels=4, patch=2, depth=1, width=16, heads=2, num_classes=3))
        model.initialise()
    checkpoints.save(model, (), tmp_path)
    sampler = DdimSampler(steps=4)
    context = Context(
        step="evaluate/rootstock",
        params=SampleParams(
            seed=0, row="rootstock", codec=spec(folder), samples=5, batch=3, metrics=(), sampler=sampler
        ),
        inputs={"features": Folder("f", encoded), "base": Folder("b", tmp_path)},
        out=tmp_path,
        partial=None,  # type: ignore[arg-type]
        report=lambda done, total, metrics=None: None,
        resources=StepResources(),
        device=CPU,
    )
    found = rows.sample_batch(context, rows.Batch(range(3, 5), in_picture=(0, 1)), CPU).in_picture
    condition = Condition(labels=rows.labels_of(range(3, 5), 5, 3))
    drawn = rows.draw(model.eval(), model, read_meta(encoded), range(3, 5), condition, sampler, 0, CPU)
    assert drawn.abs().max() > 1
    with torch.no_grad():
        assert_truncated(found, official.decode(drawn / 0.18215).sample)


# -- exported


def tiny_model(folder: Path) -> Path:
    folder.mkdir()
    with initialising(0, "rootstock"):
        model = DiT(DiTConfig(input_size=8, in_channels=4, patch=2, depth=1, width=16, heads=2, num_classes=3))
        model.initialise()
    checkpoints.save(model, (), folder)
    return folder


def test_a_pipeline_that_is_exported_keeps_the_vaes_scale(tmp_path: Path) -> None:
    vae = make_vae(tmp_path / "vae", scaling_factor=0.13025)
    checkpoints.export(tiny_model(tmp_path / "model"), tmp_path / "out", "diffusers", vae=vae)
    assert json.loads((tmp_path / "out" / "vae" / "config.json").read_text())["scaling_factor"] == 0.13025


def test_a_vae_whose_shift_a_pipeline_would_not_undo_is_not_exported(tmp_path: Path) -> None:
    vae = make_vae(tmp_path / "vae", shift_factor=0.1159)
    with pytest.raises(checkpoints.ExportRefused, match=r"^vae: .*/vae: shifts its latents, which DiTPipeline would"):
        checkpoints.export(tiny_model(tmp_path / "model"), tmp_path / "out", "diffusers", vae=vae)


def test_a_vae_of_another_scale_than_the_runs_is_not_exported(
    encoded: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_plan(job(photos, make_vae(tmp_path / "own"), store=str(tmp_path / "store")))
    store, names = Store(made.job.store), keys(made)
    commit(store, names["features"], {"meta.json": (encoded / "meta.json").read_bytes()})
    model = tiny_model(tmp_path / "model")
    commit(store, names["finetune"], {file.name: file.read_bytes() for file in model.iterdir()})
    run = RunRecord(
        run="photos-0",
        name="photos",
        status="finished",
        started="2025-11-20T22:00:00Z",
        job=made.job.model_dump(mode="json"),
        steps=[StepRecord(name=name, key=key, state="done") for name, key in names.items()],
    )
    record.save(store, run)
    other = make_vae(tmp_path / "other", scaling_factor=0.13025)
    with pytest.raises(SpecError) as caught:
        api.export(run.run, tmp_path / "out", "diffusers", store.url, vae=str(other))
    assert caught.value.lines == [
        f"vae: got {other}, whose scaling_factor is 0.13025; accepted: 0.18215, as the run has it"
    ]
    monkeypatch.setenv("HOME", str(tmp_path))
    api.export(run.run, "~/out", "diffusers", store.url, vae="~/own")
    assert (tmp_path / "out" / "vae" / "config.json").is_file()
    with pytest.raises(SpecError, match=r"^vae: got '\$NOWHERE/vae'; accepted: variables that are set"):
        api.export(run.run, "~/other", "diffusers", store.url, vae="$NOWHERE/vae")
