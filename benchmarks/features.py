"""Images to latents: the `features` stage against the public way, and against a bare loop over the encoder.

    python benchmarks/features.py                                          (CPU: a small VAE, images of 64 pixels)
    python benchmarks/features.py --vae sd --size 256 --precision bf16     (GPU: the shape of the published VAE)

public: one process, one image at a time through the VAE, two files an image, its latent and its label. On a CPU it runs
    on one thread and on all; the faster counts, round by round. For a GPU, four processes read the images.
bare loop: the encoder alone, in as many processes as the stage has workers (one on a GPU), with the same batch,
    precision and memory format; the images lie in its memory, decoded. It writes nothing.
features: the stage as a job runs it: reading, encoding, shards in a store.

All three are measured while they run, without their starting: the stage from the first quarter of its images on, and
`start_s` says how long it took to get there. The public way's latents have the noise of the stage's own, so that the
latents of both can be compared, number by number. The floor is the encoder's FLOPs over the machine's measured peak.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command_line import parser
from benchmarks.report import fastest_device, in_turn, limits, ratio, show
from graftwork.cluster.machine import num_cpus
from graftwork.cluster.memory import keep_freed
from graftwork.models.numerics.streams import generator, initialising
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.codec import VaeCodec
from graftwork.specs.data import ImageFolderData
from graftwork.specs.resources import StepResources
from graftwork.stages.artifacts.latents import read
from graftwork.stages.catalog.features import FeaturesParams
from graftwork.stages.contract import Context
from graftwork.stages.data.images import read_image, read_pixels
from graftwork.stages.data.sources import Item, split
from graftwork.stages.features import features
from graftwork.stages.features.codec import GPU_BYTES, Vae, batch_size_for, in_range, load_codec

LEVELS = 4  # so a latent's side is an eighth of the image's
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8},
    "sd": {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32},
}
HELDOUT = 0.02
CLASSES = 4


class Benchmark:
    """One comparison, on images and a VAE of its own in `home`."""

    def __init__(self, home: Path, asked: argparse.Namespace) -> None:
        self.home, self.asked = home, asked
        self.device = fastest_device()
        self.on_gpu = self.device.type == "cuda"
        self.workers = 1 if self.on_gpu else asked.workers
        self.data = ImageFolderData(path=str(home / "photos"), image_size=asked.size, heldout=HELDOUT, flip=asked.flip)
        self.codec = VaeCodec(path=str(home / "vae"), precision=asked.precision, batch=asked.batch)
        self.batch = batch_size_for(self.codec, asked.size, GPU_BYTES if self.on_gpu else None)
        self.starts: list[float] = []
        self.runs = 0
        _photographs(home / "photos", asked.images, asked.size)
        levels = {
            "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
            "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
        }
        with initialising(0, "vae"):
            vae = AutoencoderKL(layers_per_block=2, latent_channels=4, **levels, **SHAPES[asked.vae])
        vae.save_pretrained(home / "vae")
        self.training: list[Item] = split(self.data)[0]

    def public(self, threads: int) -> float:
        """Seconds an image."""
        torch.set_num_threads(threads)
        folder = self.home / "public"
        folder.mkdir(exist_ok=True)
        vae = AutoencoderKL.from_pretrained(self.home / "vae").to(self.device).eval()
        chosen = self.training[: self.asked.public_images + 1]
        loader = DataLoader(Photographs(self.data, chosen), batch_size=1, num_workers=4 if self.on_gpu else 0)
        start = time.perf_counter()
        with torch.no_grad():
            for number, (image, label) in enumerate(loader):
                posterior = vae.encode(image.to(self.device)).latent_dist
                noise = torch.randn(posterior.mean.shape[1:], generator=generator(0, "posterior", chosen[number].name))
                latent = (posterior.mean + posterior.std * noise.to(self.device)) * vae.config.scaling_factor
                np.save(folder / f"latent-{number}.npy", latent.cpu().numpy())
                np.save(folder / f"label-{number}.npy", label.numpy())
                if number == 0:  # has warmed up
                    start = time.perf_counter()
        return (time.perf_counter() - start) / self.asked.public_images

    def bare(self) -> float:
        """Seconds an image."""
        processes = multiprocessing.get_context("spawn")
        ready, found = processes.Barrier(self.workers), processes.Queue()
        count = max(1, self.asked.images // self.batch // self.workers)
        told = (self.codec, self.data, [item.name for item in self.training[: self.batch]], count, ready, found)
        started = [processes.Process(target=bare_loop, args=told) for _ in range(self.workers)]
        for one in started:
            one.start()
        seconds = [found.get() for _ in started]
        for one in started:
            one.join()
        return statistics.mean(seconds) / (count * self.batch * self.workers)

    def stage(self) -> float:
        """Seconds an image."""
        seen: list[tuple[float, int]] = []
        store = Store(str(self.home / f"store-{self.runs}"))
        self.runs += 1
        self.out = store.workplace("features")
        context = Context(
            step="features",
            params=FeaturesParams(data=self.data, codec=self.codec),
            inputs={},
            out=self.out,
            partial=store.partial("features"),
            report=lambda done, total, metrics=None: seen.append((time.perf_counter(), done)),
            resources=StepResources(gpu=float(self.on_gpu)),
            device=torch.device("cpu"),
        )
        features.run(context)
        began, (ended, total) = seen[0][0], seen[-1]
        quarter, done = next((at, done) for at, done in seen if done >= total / 4)
        self.starts.append(quarter - began)
        return (ended - quarter) / (total - done)

    def difference(self) -> float:
        """The largest between a latent of the stage and the public way's, over the latents' standard deviation."""
        ours = read(self.out, "training").x[torch.arange(self.asked.public_images)]
        files = (self.home / "public" / f"latent-{number}.npy" for number in range(len(ours)))
        theirs = torch.from_numpy(np.concatenate([np.load(file) for file in files]))
        labels = [int(np.load(self.home / "public" / f"label-{number}.npy")[0]) for number in range(len(ours))]
        assert labels == read(self.out, "training").labels[: len(ours)].tolist()
        return ((ours - theirs).abs().max() / theirs.std()).item()

    def flops(self) -> int:
        """Of the encoder, an image."""
        vae = AutoencoderKL.from_pretrained(self.home / "vae").eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            vae.encode(torch.zeros(1, 3, self.asked.size, self.asked.size))
        return int(counter.get_total_flops())


class Photographs(Dataset[tuple[torch.Tensor, int]]):
    """Images, decoded when they are asked for."""

    def __init__(self, data: ImageFolderData, items: list[Item]) -> None:
        self.data, self.items = data, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        item = self.items[index]
        return torch.from_numpy(read_image(self.data, item.name).copy()), item.label


def bare_loop(codec: VaeCodec, data: ImageFolderData, names: list[str], count: int, ready: Any, found: Any) -> None:
    """One process's part: `count` batches through the encoder; puts the seconds into `found`."""
    torch.set_num_threads(1)
    keep_freed()  # as the stage's workers do
    device = fastest_device()
    coder = load_codec(codec, device)
    assert isinstance(coder, Vae)
    images = in_range(torch.from_numpy(np.stack([read_pixels(data, name) for name in names])).to(device))
    images = images.to(coder.dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        coder.vae.encode(images).latent_dist.mean.sum().item()
        ready.wait()
        start = time.perf_counter()
        for _ in range(count * (1 + data.flip)):
            mean = coder.vae.encode(images).latent_dist.mean
        mean.sum().item()
    found.put(time.perf_counter() - start)


def _photographs(home: Path, count: int, size: int) -> None:
    """JPEGs a quarter larger than the images that are made of them."""
    pixels = np.random.default_rng(0)
    for label in range(CLASSES):
        (home / f"class-{label}").mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(pixels.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8))
        picture = coarse.resize((size + size // 4, size + size // 8), Image.Resampling.BICUBIC)
        picture.save(home / f"class-{number % CLASSES}" / f"{number}.jpg", quality=90)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--vae", choices=list(SHAPES), default="small", help="sd: the shape of sd-vae-ft-ema")
    made.add_argument("--size", type=int, default=64, help="pixels a side")
    made.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the stage and the bare loop")
    made.add_argument("--batch", type=int, default=None, help="images; by default what the stage takes by itself")
    made.add_argument("--flip", action="store_true", help="have the stage and the bare loop encode mirror images too")
    made.add_argument("--images", type=int, default=6144, help="for the stage and the bare loop")
    made.add_argument("--public-images", type=int, default=256)
    made.add_argument("--workers", type=int, default=num_cpus(), help="on a CPU, each on one thread")
    made.add_argument("--rounds", type=int, default=3)
    asked = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compared = Benchmark(Path(folder), asked)
        cpus = num_cpus() if compared.on_gpu else compared.workers
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        threads = [1] if compared.on_gpu else sorted({1, num_cpus()})
        ways = {f"public, {count} thread{'s' * (count > 1)}": partial(compared.public, count) for count in threads}
        seconds = in_turn(ways | {"bare loop": compared.bare, "features": compared.stage}, asked.rounds)
        ray.shutdown()
        torch.set_num_threads(compared.workers)
        peak = limits(compared.device, asked.precision)
        flops, difference = compared.flops(), compared.difference()
    public = [min(each) for each in zip(*(seconds[way] for way in ways), strict=True)]
    floor = peak.floor_seconds(flops * (1 + asked.flip))
    rows = [
        {
            "way": way,
            "images a second": 1 / statistics.median(each),
            "times the public way": ratio(public, each),
            "share of the bare loop": ratio(seconds["bare loop"], each),
            "share of the floor's speed": floor / statistics.median(each),
        }
        for way, each in seconds.items()
    ]
    facts = {
        "vae": f"{asked.vae}, {asked.precision}, batches of {compared.batch}",
        "pixels": asked.size,
        "mirror images": asked.flip,
        "workers": compared.workers,
        "encoder GFLOP an image": flops / 1e9,
        "peak TFLOP/s": peak.flops / 1e12,
        "floor, images a second": 1 / floor,
        "start_s": statistics.median(compared.starts),
        "rounds": asked.rounds,
        "largest difference of a latent, over their standard deviation": difference,
    }
    show("Images to latents", rows, facts, asked.json)
    most = 0.2 if asked.precision == "bf16" else 1e-3  # TF32 on a GPU, another order of sums on a CPU
    assert difference < most, "the stage's latents are not the public way's"


if __name__ == "__main__":
    main()
