"""Small pictures with captions, and a text encoder of T5's class, to be made in a moment: for tests of texts."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from graftwork.stages.evaluation.geneval.shapes import COLOURS as INKS
from graftwork.stages.evaluation.geneval.shapes import SHAPES, Shape, drawn

COLOURS = {"red": (230, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "yellow": (230, 220, 40)}
CHANNELS = 32  # of the encoder's states


def write_pictures(folder: Path, count: int = 24, side: int = 16) -> dict[str, str]:
    """Write pictures of one colour each; return the caption of each by its file's name. Captions repeat."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for number in range(count):
        colour, size = list(COLOURS)[number % 4], ("small", "large")[number // 4 % 2]
        pixels = np.full((side, side, 3), 128, np.uint8)
        margin = side // 4 if size == "large" else 3 * side // 8
        pixels[margin : side - margin, margin : side - margin] = COLOURS[colour]
        name = f"{number:03d}.png"
        Image.fromarray(pixels).save(folder / name)
        captions[name] = f"a {size} {colour} square"
    return captions


def write_table(folder: Path, captions: dict[str, str]) -> None:
    """Write `metadata.jsonl`."""
    lines = [json.dumps({"file_name": name, "text": caption, "more": 1}) for name, caption in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def captioned(folder: Path, count: int = 24) -> Path:
    """Return a folder of pictures with their captions in a table."""
    write_table(folder, write_pictures(folder, count))
    return folder


def write_encoder(folder: Path, **changed: Any) -> Path:
    """Write a T5 encoder with random weights and a tokenizer of bytes, as a pipeline has them; return the folder."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    shape = {"vocab_size": 384, "d_model": CHANNELS, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    config = T5Config(**shape | {"feed_forward_proj": "gated-gelu"} | changed)
    torch.manual_seed(0)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    return folder


SHAPES_JOB = """
name: scenes-tiny
data: {kind: captions, path: DATA, image_size: 16, heldout: 0.25}
model: {kind: pixart, depth: 4, width: 32, heads: 2, patch: 2, caption_channels: 32, text_tokens: 80}
text: {kind: t5, path: ENCODER, precision: fp32}
weights: {kind: pretrain, steps: 20, batch: 16, lr: 1e-3, warmup: 5, ema: 0.9, workers: 2}
graft:
  - {target: mha, operator: {kind: hyena_x, kernel: 4}, layers: {kind: interleaved, ratio: 0.5}}
distill: {samples: 32, heldout: 16, passes: 4, batch: 16, lr: 1e-3}
finetune: {fraction: 1.0, steps: 8, batch: 16, lr: 5e-4, warmup: 2, ema: 0.9, caption_dropout: 0.2,
  control: false, train: lora, lora: {rank: 2}}
evaluate:
  samples: 12
  batch: 6
  rows: [rootstock, stage2]
  metrics: [geneval]
  prompts: PROMPTS
  detector: {kind: shapes}
  sampler: {kind: scheduler, name: dpmsolver++, steps: 2, guidance: 4.5, guided_channels: all}
"""
PROMPTS = [
    {"tag": "single_object", "include": [{"class": "ring", "count": 1}], "prompt": "a photo of a ring"},
    {
        "tag": "two_object",
        "include": [{"class": "square", "count": 1}, {"class": "cross", "count": 1}],
        "prompt": "a photo of a square and a cross",
    },
    {
        "tag": "counting",
        "include": [{"class": "cross", "count": 2}],
        "exclude": [{"class": "cross", "count": 3}],
        "prompt": "a photo of two crosses",
    },
    {
        "tag": "colors",
        "include": [{"class": "square", "count": 1, "color": "red"}],
        "prompt": "a photo of a red square",
    },
    {
        "tag": "position",
        "include": [{"class": "ring", "count": 1}, {"class": "cross", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a cross left of a ring",
    },
    {
        "tag": "color_attr",
        "include": [
            {"class": "square", "count": 1, "color": "red"},
            {"class": "cross", "count": 1, "color": "blue"},
        ],
        "prompt": "a photo of a red square and a blue cross",
    },
]


def write_scenes(folder: Path, count: int = 64, shards: int = 2) -> None:
    """Write scenes of one to three shapes with their captions, in webdataset's tars."""
    draws = np.random.default_rng(0)
    members: list[dict[str, bytes | str]] = [{} for _ in range(shards)]
    for number in range(count):
        slots = draws.permutation(4)[: draws.integers(1, 4)]
        shapes = [Shape(str(draws.choice(list(SHAPES))), str(draws.choice(list(INKS))), int(slot)) for slot in slots]
        png = io.BytesIO()
        Image.fromarray(drawn(shapes)).save(png, "png")
        caption = "a photo of " + " and ".join(f"a {shape.colour} {shape.name}" for shape in shapes)
        members[number * shards // count] |= {f"{number:04d}.png": png.getvalue(), f"{number:04d}.txt": caption}
    for shard, content in enumerate(members):
        write_shard(folder / f"{shard:05d}.tar", content)


def write_shapes_job(folder: Path) -> Path:
    """Write all that the tiny job of scenes reads, and the job; return its file."""
    write_scenes(folder / "data")
    write_encoder(folder / "encoder")
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    job = SHAPES_JOB.replace("DATA", "data").replace("ENCODER", "encoder").replace("PROMPTS", "prompts.jsonl")
    (folder / "job.yaml").write_text(job)
    return folder / "job.yaml"


def write_shard(file: Path, members: Mapping[str, bytes | str]) -> Path:
    """Write a tar of files with that content by their names; return it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            member, data = tarfile.TarInfo(name), content.encode() if isinstance(content, str) else content
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


def samples_of(folder: Path, count: int = 24) -> dict[str, bytes | str]:
    """Return what a tar of captioned pictures holds, as webdataset has them; they are written to a folder first."""
    captions = write_pictures(folder, count)
    members: dict[str, bytes | str] = {}
    for name, caption in captions.items():
        members |= {name: (folder / name).read_bytes(), f"{Path(name).stem}.txt": caption}
    return members
