"""Sampling and scoring a row of the table, against the public loop on the same device, steps and noise.

    python -m benchmarks.sampling                                      # a small DiT and classifier, on any machine
    python -m benchmarks.sampling --imagenet [--vae FOLDER] [--inception FILE] # DiT-XL/2 at 256 px: for a GPU
    python -m benchmarks.sampling --imagenet --precision bf16 --compile        # as a job would set it there

The public loop draws a batch after the other in eager mode, guidance in one batch, with the chain's constants on the
host; saves each image as a PNG file of its own; and reads all of them back for the features, whose mean and covariance
are taken at once. Ours is what a worker and the step of a row do: features where the batch is drawn, sums only. The
baseline is given its noise beforehand, on the device, and where ours is told bf16 it multiplies in TF32, as the
published sampler does. Both are warmed up, and timed in turn.

Images and figures are compared, and have to agree unless --precision or --compile has ours compute otherwise. The floor
is the network's passes alone: steps x samples, twice where guided, at the matrix products' measured peak. Networks for
which no file is given have random weights, which changes no time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import report
from benchmarks.artifacts import Folder
from benchmarks.command_line import parser
from benchmarks.public_sampling import public_sample
from graftwork.models import checkpoints
from graftwork.models.condition import Condition
from graftwork.models.measures.classifier import Classifier
from graftwork.models.measures.frechet import Gaussian, distance
from graftwork.models.numerics.precision import products
from graftwork.models.numerics.streams import SampleNoise, initialising
from graftwork.models.rootstocks import Rootstock, new_rootstock
from graftwork.specs.codec import PixelCodec, VaeCodec
from graftwork.specs.costs import rootstock_cost
from graftwork.specs.metrics import Metric
from graftwork.specs.resources import StepResources
from graftwork.specs.rootstock import DitModel
from graftwork.specs.sampler import AncestralSampler, DdimSampler, Sampler
from graftwork.stages.artifacts.latents import LatentsMeta, read_meta, write_meta
from graftwork.stages.catalog.evaluate import SampleParams
from graftwork.stages.contract import Context
from graftwork.stages.evaluation.judges import Judges, Scores
from graftwork.stages.evaluation.samples import ALL_SAMPLES, Batch, batches_of, labels_of, sample_batch
from graftwork.stages.features.codec import load_codec

READ_BATCH = 50  # pytorch-fid's
# The shape of stabilityai/sd-vae-ft-ema.
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 256,
}


@dataclass(frozen=True)
class Setting:
    """One row to sample, and where its images go in the public way."""

    context: Context
    home: Path
    device: torch.device

    @property
    def params(self) -> SampleParams:
        return self.context.params

    @cached_property
    def metric(self) -> Metric:
        return self.params.metrics[0]

    @cached_property
    def meta(self) -> LatentsMeta:
        return read_meta(self.context.input("features"))

    @cached_property
    def model(self) -> Rootstock:
        return checkpoints.load(self.context.input("base"))[0].to(self.device).eval()

    @cached_property
    def judges(self) -> Judges:
        return Judges(self.context, self.params.metrics, self.params.inception, self.device)

    @cached_property
    def codec(self) -> Any:
        return load_codec(self.params.codec, self.device)

    @cached_property
    def noise(self) -> list[list[Tensor]]:
        """All draws of each batch, on the device."""
        draws = self.params.sampler.steps if self.params.sampler.kind == "ancestral" else 1
        shape = self.meta.shape
        sources = [SampleNoise(self.params.seed, batch.samples, shape, self.device) for batch in self.batches]
        return [[source() for _ in range(draws)] for source in sources]

    @cached_property
    def batches(self) -> list[Any]:
        return batches_of(self.params, ())

    def labels(self, indices: range) -> Tensor:
        return labels_of(indices, self.params.samples, len(self.meta.classes))

    def png(self, index: int) -> Path:
        return self.home / f"{index:06d}.png"


def public(setting: Setting) -> Gaussian:
    """Draw, save, read back, and take the statistics of all features at once."""
    for batch, noise in zip(setting.batches, setting.noise, strict=True):
        latents = public_sample(
            setting.model,
            Condition(labels=setting.labels(batch.samples)).to(setting.device),
            iter(noise),
            sampler=setting.params.sampler,
            conditioner=setting.model.config.conditioner,
            bounded=setting.meta.bounded,
            tf32=setting.params.precision != "fp32",
        )
        for index, image in zip(batch.samples, setting.codec.decode(latents), strict=True):
            Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(setting.png(index))
    features = []
    for start in range(0, setting.params.samples, READ_BATCH):
        indices = range(start, min(start + READ_BATCH, setting.params.samples))
        images, labels = read_back(setting, indices), setting.labels(indices)
        seen = setting.judges.look(images, labels).by_metric[setting.metric].features
        assert seen is not None
        features.append(seen.cpu().numpy())
    found = np.concatenate(features)
    return Gaussian(found.mean(0), np.cov(found, rowvar=False))


def read_back(setting: Setting, indices: range) -> NDArray[np.uint8]:
    images = [np.asarray(Image.open(setting.png(index))) for index in indices]
    return np.stack([image[None] if image.ndim == 2 else image.transpose(2, 0, 1) for image in images])


def ours(setting: Setting) -> Scores:
    """What a worker does with each batch, and the step with what comes back."""
    scores = Scores()
    for batch in setting.batches:
        scores.add(sample_batch(setting.context, batch, setting.device).verdict)
    return scores


def kept(setting: Setting, scores: Scores) -> dict[str, float]:
    """Megabytes that each way holds on to until the end."""
    files = sum(path.stat().st_size for path in setting.home.iterdir())
    features = setting.params.samples * len(scores.moments[setting.metric].mean) * 4
    sums = sum(value.nbytes for value in scores.state().values())
    return {"MB kept, public": (files + features) / 1e6, "MB kept, ours": sums / 1e6}


def largest_difference(setting: Setting) -> int:
    """Of any pixel of any image, in levels of 256."""
    keeping = replace(setting.context, params=setting.params.model_copy(update={"keep_samples": True}))

    def difference(batch: Batch) -> int:
        drawn = sample_batch(keeping, batch, setting.device).arrays[ALL_SAMPLES]
        return int(np.abs(drawn.astype(int) - read_back(setting, batch.samples)).max())

    return max(map(difference, setting.batches))


# -- what is sampled


def made(chosen: argparse.Namespace, home: Path, device: torch.device) -> Setting:
    """Artifacts as the steps before would have left them."""
    inputs = {name: Folder(name, home / name) for name in ("features", "base", "classifier")}
    for folder in (*(one.place for one in inputs.values()), home / "images"):
        folder.mkdir()
    model = DitModel(size=chosen.size) if chosen.imagenet else DitModel(depth=4, width=64, heads=4, patch=4)
    metric: Metric = "fid" if chosen.imagenet or chosen.inception else "classifier"
    num_classes, (channels, side) = (1000, (4, 32)) if chosen.imagenet else (10, (3, 64))
    meta = LatentsMeta(
        codec="vae" if chosen.imagenet else "pixel",
        shape=(channels, side, side),
        classes=tuple(map(str, range(num_classes))),
        num_training=0,
        num_heldout=0,
    )
    write_meta(inputs["features"].place, meta)
    with initialising(0, "benchmark"):
        checkpoints.save(report.random_weights(new_rootstock(meta.rootstock_config(model))), (), inputs["base"].place)
        judge = Classifier(channels, side, num_classes).state_dict()
        save_file(judge, inputs["classifier"].place / "classifier.safetensors")
    sampler: Sampler = DdimSampler(steps=chosen.steps or 10)
    if chosen.imagenet:
        sampler = AncestralSampler(steps=chosen.steps or 250)
    params = SampleParams(
        seed=0,
        row="rootstock",
        codec=VaeCodec(path=str(chosen.vae or random_vae(home / "vae"))) if chosen.imagenet else PixelCodec(),
        samples=chosen.samples or (256 if chosen.imagenet else 100),
        batch=chosen.batch or (64 if chosen.imagenet else 50),
        metrics=(metric,),
        sampler=sampler,
        precision=chosen.precision,
        inception=str(chosen.inception or random_inception(home / "inception.pth")) if metric == "fid" else None,
        compile=chosen.compile,
    )
    context = Context(
        step="evaluate/rootstock",
        params=params,
        inputs=inputs,
        out=home,
        partial=None,  # type: ignore[arg-type]
        report=lambda done, total, metrics=None: None,
        resources=StepResources(),
        device=device,
    )
    return Setting(context, home / "images", device)


def random_vae(folder: Path, **changed: Any) -> Path:
    from diffusers import AutoencoderKL

    AutoencoderKL(**VAE | changed).save_pretrained(folder)
    return folder


def random_inception(path: Path) -> Path:
    """Weights in the published names and shapes."""
    import pytorch_fid.inception
    from torchvision.models import Inception3

    by_url, load = pytorch_fid.inception.load_state_dict_from_url, Inception3.load_state_dict
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: {}
    Inception3.load_state_dict = lambda *_, **__: None
    try:
        state = pytorch_fid.inception.fid_inception_v3().state_dict()
    finally:
        pytorch_fid.inception.load_state_dict_from_url, Inception3.load_state_dict = by_url, load
    for value in state.values():
        if value.dim() == 4:  # He's deviation, for the ReLU that follows each convolution
            value.normal_(std=(2 / value[0].numel()) ** 0.5)
    torch.save(state, path)
    return path


# -- the comparison


@contextmanager
def set_up(chosen: argparse.Namespace) -> Iterator[Setting]:
    device = report.fastest_device()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as home:
        yield made(chosen, Path(home), device)


def compared(setting: Setting, ones: Gaussian, others: Gaussian, exact: bool) -> dict[str, object]:
    """How far both results are apart; AssertionError where they must not be."""
    pixels = largest_difference(setting)
    # What a network makes of an image varies in the last bits of float32 with those beside it, and the public way looks
    # at others together: differences are told on the scale of the features.
    scale = float(np.abs(ones.mu).max())
    mu = float(np.abs(ones.mu - others.mu).max()) / scale
    sigma = float(np.abs(ones.sigma - others.sigma).max()) / scale**2
    found: dict[str, object] = {"largest difference of a pixel": pixels, "of the mean": mu, "of the covariance": sigma}
    if setting.metric == "classifier":  # of 2048 features, from few images, the square root takes minutes
        reference = Gaussian(np.zeros_like(ones.mu), np.eye(len(ones.mu)))
        one, other = (distance(figures, reference) for figures in (ones, others))
        found |= {"distance, public": one, "distance, ours": other}
        assert not exact or abs(one - other) <= 1e-6 * one
    assert not exact or (pixels == 0 and max(mu, sigma) <= 1e-6), found
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--imagenet", action="store_true", help="256 px, a VAE, 250 ancestral steps, Inception")
    arguments.add_argument("--size", default="XL/2", help="of --imagenet: a published size")
    arguments.add_argument("--vae", type=Path, help="of --imagenet: a folder with an AutoencoderKL")
    arguments.add_argument("--inception", type=Path, help="pytorch-fid's weights; then they judge the small DiT too")
    arguments.add_argument("--samples", type=int)
    arguments.add_argument("--batch", type=int)
    arguments.add_argument("--steps", type=int)
    arguments.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="of ours")
    arguments.add_argument("--compile", action="store_true", help="ours")
    arguments.add_argument("--threads", type=int, help="of torch on a CPU, for both")
    arguments.add_argument("--rounds", type=int, default=3)
    chosen = arguments.parse_args()
    with set_up(chosen) as setting:
        params, device = setting.params, setting.device
        expected, found = public(setting), ours(setting)  # also to warm up
        exact = chosen.precision == "fp32" and not chosen.compile
        agreed = compared(setting, expected, found.moments[setting.metric].gaussian(), exact)
        agreed |= kept(setting, found)
        works: dict[str, Callable[[], object]] = {"public": partial(public, setting), "ours": partial(ours, setting)}
        seconds = report.in_turn(
            {name: partial(report.timed, work, device) for name, work in works.items()}, chosen.rounds
        )
        with products(params.precision):
            limits = report.limits(device, chosen.precision)
    flops = passes(params) * network_flops(setting)
    floor = limits.floor_seconds(flops)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        {"way": name, "s": median, "samples/s": params.samples / median, "of the floor's speed": floor / median}
        for name, median in medians.items()
    ]
    facts = {
        "samples": params.samples,
        "batch": params.batch,
        "steps": params.sampler.steps,
        "GFLOP a pass": network_flops(setting) / 1e9,
        "peak TFLOP/s": limits.flops / 1e12,
        "floor s": floor,
        **agreed,
        "times faster": report.ratio(seconds["public"], seconds["ours"]),
    }
    report.show("Sampling and scoring", rows, facts, chosen.json)


def passes(params: SampleParams) -> int:
    """Of a sample through the network."""
    return params.samples * params.sampler.steps * (1 if params.sampler.guidance == 1.0 else 2)


def network_flops(setting: Setting) -> int:
    config = setting.model.config
    return rootstock_cost(config, config.place, config.in_channels, config.num_classes).flops


if __name__ == "__main__":
    main()
