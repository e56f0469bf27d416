"""A pass of PixArt-Sigma and of its published graft, and a whole image by each, beside diffusers' model and pipeline.

    python -m benchmarks.pixart [--json FILE]                        2048 pixels, 28 blocks, bf16: for a GPU
    python -m benchmarks.pixart --pixels 512 --layers 2 --steps 4    the same code on a CPU, in a minute or two

Rootstock and graft are those of examples/pixart/hyena_x-2048.yaml; of another number of blocks than 28, every second
one is grafted. Weights are random, and the same in both ways. A pass is of two samples, as for one image with guidance.
An image is all steps by DPM-Solver++ with guidance, and the VAE. diffusers' model has its weights in the precision that
is asked for, as people load it; ours keeps fp32 weights and rounds them, as a job does.

Both ways must agree in fp32: the outputs of a pass, and the latents after a few steps. Where diffusers is missing, the
rootstock with PyTorch's attention stands for it, an image is drawn by DDIM in as many steps, and no VAE follows.
`times faster` is the median over rounds of the first row's time over the row's; `published, times faster` are others'
figures, over their own baselines and on their own machines, and were not measured here.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.command_line import parser
from benchmarks.operators import PublicAttention
from graftwork.models.condition import Condition, TextConditioner
from graftwork.models.numerics.precision import computing, products
from graftwork.models.numerics.streams import SampleNoise, generator
from graftwork.models.objectives import Network
from graftwork.models.operators.attention import Attention
from graftwork.models.rootstocks import Rootstock, new_rootstock
from graftwork.models.rootstocks.pixart import Block, PixArt, PixArtConfig
from graftwork.models.sampling import sample
from graftwork.models.surgery import graft
from graftwork.specs.codec import VaeCodec
from graftwork.specs.costs import graft_cost, rootstock_cost
from graftwork.specs.edits import Edit, OperatorEdits
from graftwork.specs.job import JobSpec
from graftwork.specs.reading.load import load
from graftwork.specs.rootstock import PixartModel
from graftwork.specs.sampler import DdimSampler, SchedulerSampler
from graftwork.specs.training import Precision
from graftwork.stages.features.codec import load_codec

JOB = Path(__file__).parents[1] / "examples" / "pixart" / "hyena_x-2048.yaml"
PUBLISHED_DEPTH = 28
GUIDED = 2  # samples of a pass for one image
FEW = 2  # steps after which both ways' latents are compared
APART = 1e-3  # that both ways' results may be in fp32, over the largest number
ROOTSTOCK, GRAFT = "ours, rootstock", "ours, graft"
PUBLISHED: list[dict[str, Any]] = [
    {"way": "Hyena-X in 14 blocks, 2048 pixels, H100, batch 2 (arXiv 2506.05340)", "published, times faster": 1.43},
    {"way": "DiTFastAttn, 2048 pixels, 50 steps, A100 (arXiv 2406.08552)", "published, times faster": 1.79},
]
SMALL_VAE = {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8}


class Way(Protocol):
    """A model, as someone draws from it."""

    def output(self) -> Tensor:
        """Return what the network says of the setting's samples (2,2C,S,S)."""
        ...

    def latents(self, steps: int) -> Tensor:
        """Return the latents (1,C,S,S) of the setting's noise after so many steps."""
        ...

    def image(self) -> object:
        """Draw a whole image."""
        ...


@dataclass(frozen=True)
class Setting:
    """What all ways are given."""

    job: JobSpec
    config: PixArtConfig
    sampler: SchedulerSampler | DdimSampler
    precision: Precision
    device: torch.device
    vae: Path | None  # a folder; none where diffusers is missing

    @property
    def tokens(self) -> int:
        """How many a text has at most."""
        assert isinstance(self.job.model, PixartModel)
        return self.job.model.text_tokens

    @cached_property
    def text(self) -> Condition:
        """The image's prompt: as long as can be."""
        return self._text("prompt", self.tokens)

    @cached_property
    def empty(self) -> Condition:
        """What stands for the empty text."""
        return self._text("empty", 1)

    @cached_property
    def samples(self) -> tuple[Tensor, Tensor, Condition]:
        """Noised latents (2,C,S,S), their timestep, and their texts: of a pass."""
        x = torch.cat([self.noise()] * GUIDED)
        return x, torch.full((GUIDED,), 500, device=self.device), self.text.join(self.empty)

    def noise(self) -> Tensor:
        return SampleNoise(0, range(1), self.config.latent_shape, self.device)()

    def _text(self, name: str, length: int) -> Condition:
        shape = (1, self.tokens, self.config.caption_channels)
        mask = (torch.arange(self.tokens)[None] < length).float()
        return Condition(text=torch.randn(shape, generator=generator(0, name)), mask=mask).to(self.device)


class Ours:
    """A rootstock or a graft of it, as a job draws from it."""

    def __init__(self, setting: Setting, model: PixArt, compiled: bool = False) -> None:
        self.setting, self.model = setting, model
        self.network: Network = torch.compile(model, dynamic=False) if compiled else model
        vae, precision = setting.vae, "fp32" if setting.precision == "fp32" else "bf16"
        self.codec = load_codec(VaeCodec(path=str(vae), precision=precision), setting.device) if vae else None

    @torch.no_grad()
    def output(self) -> Tensor:
        with computing(self.setting.precision, self.setting.device):
            return self.network(*self.setting.samples)

    def latents(self, steps: int) -> Tensor:
        setting = self.setting
        with computing(setting.precision, setting.device):
            return sample(
                self.network,
                setting.text,
                SampleNoise(0, range(1), setting.config.latent_shape, setting.device),
                sampler=setting.sampler.model_copy(update={"steps": steps}),
                conditioner=TextConditioner(setting.config.caption_channels, setting.empty),
                objective=setting.config.objective,
                bounded=False,
            )

    def image(self) -> object:
        latents = self.latents(self.setting.sampler.steps)
        return latents if self.codec is None else self.codec.decode(latents)


class Diffusers:
    """diffusers' own model and pipeline, with the rootstock's weights in the setting's precision."""

    def __init__(self, setting: Setting, model: PixArt) -> None:
        from diffusers import AutoencoderKL, PixArtSigmaPipeline
        from diffusers.utils import logging

        from graftwork.models.checkpoints.layouts.diffusers_pixart import rootstock_transformer
        from graftwork.models.sampling.scheduled import new_scheduler

        logging.set_verbosity_error()  # it warns of lists that are empty
        assert isinstance(setting.sampler, SchedulerSampler)
        self.setting = setting
        self.dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
        self.transformer = rootstock_transformer(model).to(setting.device, self.dtype)
        self.pipeline = PixArtSigmaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=AutoencoderKL.from_pretrained(setting.vae).to(setting.device, self.dtype),
            transformer=self.transformer,
            scheduler=new_scheduler(setting.sampler, "epsilon", bounded=False),
        )
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def output(self) -> Tensor:
        x, t, condition = self.setting.samples
        with products(self.setting.precision):
            output: Tensor = self.transformer(
                x.to(self.dtype),
                encoder_hidden_states=condition.require("text").to(self.dtype),
                encoder_attention_mask=condition.mask,
                timestep=t,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0]
        return output

    def latents(self, steps: int) -> Tensor:
        latents: Tensor = self._drawn(steps, "latent")
        return latents

    def image(self) -> object:
        return self._drawn(self.setting.sampler.steps, "np")

    def _drawn(self, steps: int, output: str) -> Any:
        setting, side = self.setting, self.setting.config.input_size * self.pipeline.vae_scale_factor
        with products(setting.precision):
            return self.pipeline(
                prompt=None,
                negative_prompt=None,
                prompt_embeds=setting.text.require("text").to(self.dtype),
                prompt_attention_mask=setting.text.mask,
                negative_prompt_embeds=setting.empty.require("text").to(self.dtype),
                negative_prompt_attention_mask=setting.empty.mask,
                latents=setting.noise().to(self.dtype),
                num_inference_steps=steps,
                guidance_scale=setting.sampler.guidance,
                height=side,
                width=side,
                use_resolution_binning=False,
                output_type=output,
            ).images


@torch.no_grad()
def with_random_weights(model: Rootstock) -> Rootstock:
    """Return the model with weights by which each layer keeps the size of what goes in: whatever differs is seen."""
    for value in model.parameters():
        value.normal_(std=value[0].numel() ** -0.5 if value.dim() > 1 else 0.1)
    return model


def with_public_attention(model: PixArt) -> PixArt:
    """Return a copy whose self-attention is run as diffusers runs it."""
    made = copy.deepcopy(model)
    for block in made.blocks:
        assert isinstance(block, Block) and isinstance(block.attn, Attention)
        block.attn = PublicAttention(block.attn)
    return made


def measured(options: argparse.Namespace, device: torch.device) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a row for each way, and one for each published figure; and what holds for all."""
    with prepared(options, device) as setting:
        # The rootstock and its graft, and the public way with the same weights.
        edits = edits_of(setting.job)
        with device:
            rootstock = with_random_weights(new_rootstock(setting.config).eval())
        assert isinstance(rootstock, PixArt)
        grafted = graft(copy.deepcopy(rootstock), edits, seed=0).to(device).eval()
        apart = differences(setting, rootstock)
        public, way = public_way(setting, rootstock)
        ways: dict[str, Way] = {public: way}
        ways |= {ROOTSTOCK: Ours(setting, rootstock), GRAFT: Ours(setting, grafted)}
        if options.compile:
            compiled = {ROOTSTOCK: rootstock, GRAFT: grafted}
            ways |= {f"{name}, compiled": Ours(setting, model, True) for name, model in compiled.items()}

        # Time them in turn: each way's pass, then each way's image.
        for way in ways.values():
            way.output()  # to warm up
            if device.type == "cuda":  # on a CPU the passes have done it
                way.image()
        passes = {name: partial(report.timed, way.output, device) for name, way in ways.items()}
        images = {name: partial(report.timed, way.image, device) for name, way in ways.items()}
        of_passes, of_images = (report.in_turn(works, options.rounds) for works in (passes, images))
        with products(setting.precision):
            peak = report.limits(device, setting.precision).flops

    flops = flops_of(setting, edits)
    rows = [
        {
            "way": name,
            "pass, ms": min(of_passes[name]) * 1e3,
            "pass, times faster": report.ratio(of_passes[public], of_passes[name]),
            "of peak": flops[GRAFT in name] * GUIDED / peak / min(of_passes[name]),
            "image, s": min(of_images[name]),
            "image, times faster": report.ratio(of_images[public], of_images[name]),
        }
        for name in ways
    ]
    facts = {
        "pixels, tokens": f"{options.pixels}, {setting.config.num_tokens}",
        "blocks, grafted": f"{setting.config.depth}, {len(edits)}",
        "width, heads": f"{setting.config.width}, {setting.config.heads}",
        "precision": setting.precision,
        "an image": drawing(setting),
        "rounds": options.rounds,
        "TFLOP a pass, rootstock": flops[False] * GUIDED / 1e12,
        "TFLOP a pass, graft": flops[True] * GUIDED / 1e12,
        "graft over our rootstock, a pass": report.ratio(of_passes[ROOTSTOCK], of_passes[GRAFT]),
        "graft over our rootstock, an image": report.ratio(of_images[ROOTSTOCK], of_images[GRAFT]),
        "peak TFLOP/s": peak / 1e12,
        **apart,
    }
    return rows + PUBLISHED, facts


@contextmanager
def prepared(options: argparse.Namespace, device: torch.device) -> Iterator[Setting]:
    """Return what all ways are given, for as long as the context lasts."""
    job = job_of(options)
    drawn_by = job.samplers()["data"]
    assert isinstance(job.model, PixartModel) and isinstance(drawn_by, SchedulerSampler)
    side = job.model.patch * math.isqrt(job.place().num_tokens)
    config = PixArtConfig.of(job.model, (job.codec.latent_channels(job.data), side, side), 0)
    sampler = drawn_by.model_copy(update={"steps": options.steps})
    plain = DdimSampler(steps=options.steps, guidance=sampler.guidance, guided_channels=sampler.guided_channels)
    with tempfile.TemporaryDirectory() as folder:
        vae = None
        if options.diffusers:
            from benchmarks.sampling import random_vae

            vae = random_vae(Path(folder) / "vae", **(SMALL_VAE if options.small_vae else {}))
        yield Setting(job, config, sampler if options.diffusers else plain, options.precision, device, vae)


def job_of(options: argparse.Namespace) -> JobSpec:
    """Return the job of the published graft, at the sizes that are asked for."""
    shape = f"depth: {options.layers}, width: {options.width}, heads: {options.heads}, patch: 2"
    text = f"caption_channels: {options.caption_channels}, text_tokens: {options.text_tokens}"
    settings = [f"data.image_size={options.pixels}", f"model={{kind: pixart, {shape}, {text}}}"]
    if options.layers != PUBLISHED_DEPTH:
        settings.append("graft=[{target: mha, operator: {kind: hyena_x}, layers: {kind: interleaved, ratio: 0.5}}]")
    return load(JOB, settings)


def edits_of(job: JobSpec) -> tuple[Edit, ...]:
    (spec,) = job.graft
    assert isinstance(spec, OperatorEdits)
    return spec.edits(job.model.depth)


def public_way(setting: Setting, rootstock: PixArt) -> tuple[str, Way]:
    """Return the way that ours is held against, and its name."""
    if setting.vae is not None:
        return "diffusers", Diffusers(setting, rootstock)
    return "PyTorch's attention", Ours(setting, with_public_attention(rootstock))


def differences(setting: Setting, rootstock: PixArt) -> dict[str, float]:
    """Return how far both ways are apart in fp32, over the largest number of the public one."""
    exact, steps = replace(setting, precision="fp32"), min(FEW, setting.sampler.steps)
    ours, (_, public) = Ours(exact, rootstock), public_way(exact, rootstock)

    def apart(one: Tensor, other: Tensor) -> float:
        return float((one - other).abs().max() / other.abs().max())

    return {
        "outputs of a pass apart": apart(ours.output(), public.output()),
        f"latents after {steps} steps apart": apart(ours.latents(steps), public.latents(steps)),
    }


def disagreements(facts: Mapping[str, Any]) -> list[str]:
    """Return a line for each result in which both ways differ by more than fp32 rounds."""
    found = {name: value for name, value in facts.items() if name.endswith("apart")}
    return [f"{name}: {value:.2g}" for name, value in found.items() if not value <= APART]


def flops_of(setting: Setting, edits: tuple[Edit, ...]) -> dict[bool, int]:
    """Return those of a pass of one sample, by whether it is of the graft."""
    model, config = setting.job.model, setting.config
    cost = graft_cost(rootstock_cost(model, config.place, config.in_channels, 0), edits, config.place)
    return {False: cost.rootstock.flops, True: cost.graft.flops}


def drawing(setting: Setting) -> str:
    sampler = setting.sampler
    name = sampler.name if isinstance(sampler, SchedulerSampler) else sampler.kind
    decoded = "its latents alone" if setting.vae is None else "and the VAE"
    return f"{sampler.steps} steps of {name}, guidance {sampler.guidance:g}, {decoded}"


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__)
    on_gpu, flag = torch.cuda.is_available(), argparse.BooleanOptionalAction
    made.add_argument("--pixels", type=int, default=2048, help="of an image's side, a multiple of 16")
    made.add_argument("--layers", type=int, default=PUBLISHED_DEPTH, help="blocks")
    made.add_argument("--width", type=int, default=1152)
    made.add_argument("--heads", type=int, default=16)
    made.add_argument("--caption-channels", type=int, default=4096, help="of the text encoder's states")
    made.add_argument("--text-tokens", type=int, default=300)
    made.add_argument("--steps", type=int, default=20, help="of the sampler")
    made.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="bf16" if on_gpu else "fp32")
    made.add_argument("--small-vae", action=flag, default=not on_gpu, help="an eighth of the published one's channels")
    made.add_argument("--compile", action=flag, default=False, help="two rows more, of compiled code")
    made.add_argument("--diffusers", action=flag, default=find_spec("diffusers") is not None)
    made.add_argument("--rounds", type=int, default=5 if on_gpu else 1)
    return made


def main() -> None:
    options, device = arguments().parse_args(), report.fastest_device()
    if device.type == "cpu":
        torch.set_num_threads(1)  # as every task of a job
    rows, facts = measured(options, device)
    report.show("PixArt-Sigma and its graft", rows, facts, options.json)
    assert not (lines := disagreements(facts)), f"ours is not what the public way computes: {'; '.join(lines)}"


if __name__ == "__main__":
    main()
