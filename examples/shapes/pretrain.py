"""Makes the rootstock of `examples/shapes.yaml`: a small PixArt, and the small T5 encoder that reads its prompts.

    python examples/shapes/pretrain.py examples/shapes/rootstock

The encoder learns first, by itself, which colour and shape each slot of a scene has by its prompt; then it is frozen,
and the transformer learns to draw. Three things differ from the published recipe, each because a run this short needs
it: cross-attention does not start at zero, most timesteps are drawn where a picture's content is decided, and the error
counts there nearly as if it were the picture's (by 1 / SNR, bounded). The schedule, the objective and the architecture
are PixArt-Sigma's. It takes about half an hour of one core.

Shapes: B samples, L tokens of a prompt, E channels of the encoder, S pixels a side.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

import scenes

from graftwork.models import checkpoints
from graftwork.models.condition import Condition
from graftwork.models.objectives.gaussian import STEPS, Diffusion, at
from graftwork.models.rootstocks.pixart import CrossAttention, PixArt, PixArtConfig
from graftwork.stages.evaluation.geneval.prompts import Prompt
from graftwork.stages.evaluation.geneval.rules import judge_image
from graftwork.stages.evaluation.geneval.shapes import SIDE, VOCABULARY, ShapesDetector, drawn

WIDTH, DEPTH, HEADS, CHANNELS, TOKENS = 64, 4, 4, 64, 16
SPECIAL = ("<pad>", "</s>", "<unk>")
CONTENTS = 1 + len(scenes.NAMES) * len(scenes.INKS)  # of a slot: nothing, or a shape in a colour
MAX_WEIGHT = 5.0  # of an error, over 1
DECIDED = (250, 700)  # timesteps at which the content of a picture is decided ..
SHARE_DECIDED = 0.7  # .. and how many are drawn there
EMPTY = 0.1  # share of prompts replaced by the empty one
CONSTANT = 0.3  # share of the steps before the learning rate falls, to 0


def write_tokenizer(folder: Path) -> Any:
    """Write and return a tokenizer to which a word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *scenes.WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )
    fast.save_pretrained(folder)
    return fast


def new_encoder(words: int) -> Any:
    """Return a T5 encoder for so many words."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=words, d_model=CHANNELS, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, relative_attention_num_buckets=16,
    )  # fmt: skip
    return T5EncoderModel(config)


class Reader(nn.Module):
    """Tells from the states of a prompt what is in each slot."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(scenes.SLOTS, CHANNELS) / math.sqrt(CHANNELS))
        self.attention = nn.MultiheadAttention(CHANNELS, 4, batch_first=True)
        self.head = nn.Sequential(nn.Linear(CHANNELS, 128), nn.GELU(), nn.Linear(128, CONTENTS))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return logits (B,slots,contents) for states (B,L,E) and their mask (B,L)."""
        queries = self.queries.expand(len(states), -1, -1)
        return self.head(self.attention(queries, states, states, key_padding_mask=mask == 0, need_weights=False)[0])


def contents(scene: scenes.Scene) -> list[int]:
    """Return what each slot of a scene holds, by number; 0 is nothing."""
    found = [0] * scenes.SLOTS
    for shape in scene.shapes:
        found[shape.slot] = 1 + scenes.NAMES.index(shape.name) * len(scenes.INKS) + scenes.INKS.index(shape.colour)
    return found


def tokens_of(tokenizer: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return tokens (B,L) and their mask (B,L)."""
    numbers = tokenizer(prompts, padding="max_length", max_length=TOKENS, return_tensors="pt")
    return numbers["input_ids"], numbers["attention_mask"]


def train_encoder(tokenizer: Any, encoder: Any, steps: int) -> None:
    """Teach the encoder, with a reader that is thrown away, what prompts say."""
    draws, reader = np.random.default_rng(1), Reader()
    optimizer = torch.optim.AdamW([*encoder.parameters(), *reader.parameters()], lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    for step in range(steps):
        batch = [scenes.scene(draws) for _ in range(128)]
        tokens, mask = tokens_of(tokenizer, [scene.prompt for scene in batch])
        states = encoder(tokens, attention_mask=mask).last_hidden_state
        logits = reader(states, mask)
        loss = F.cross_entropy(logits.flatten(0, 1), torch.tensor([contents(scene) for scene in batch]).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"encoder {step} {loss.item():.4f}", flush=True)


class Prompts:
    """The encoder's states of prompts, each made once."""

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder.eval()
        self.known: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Condition:
        if new := sorted(set(prompts) - self.known.keys()):
            tokens, mask = tokens_of(self.tokenizer, new)
            states = self.encoder(tokens, attention_mask=mask).last_hidden_state * mask[..., None]
            self.known |= {prompt: (states[row], mask[row].float()) for row, prompt in enumerate(new)}
        text, mask = (torch.stack(values) for values in zip(*map(self.known.__getitem__, prompts), strict=True))
        return Condition(text=text, mask=mask)


def new_model() -> PixArt:
    """Return a PixArt with the published initialisation, but for the way of the prompts."""
    torch.manual_seed(0)
    config = PixArtConfig(
        depth=DEPTH, width=WIDTH, heads=HEADS, patch=2, in_channels=3, input_size=SIDE, caption_channels=CHANNELS,
        interpolation=1.0,
    )  # fmt: skip
    model = PixArt(config)
    model.initialise()
    for module in model.modules():
        if isinstance(module, CrossAttention):
            nn.init.xavier_uniform_(module.proj.weight)
    for linear in model.y_embedder.y_proj.values():
        nn.init.xavier_uniform_(linear.weight)
    return model


def pixels(batch: list[scenes.Scene], source: torch.Generator) -> Tensor:
    """Return pictures (B,3,S,S) from -1 to 1, with less than a level of noise."""
    images = torch.from_numpy(np.stack([drawn(scene.shapes) for scene in batch])).float()
    exact = images.permute(0, 3, 1, 2) / 127.5 - 1
    return exact + (torch.rand(exact.shape, generator=source) - 0.5) / 127.5


def draw_t(count: int, source: torch.Generator) -> Tensor:
    """Return timesteps (B,)."""
    here = torch.rand(count, generator=source) < SHARE_DECIDED
    some, all_of_them = (torch.randint(*bounds, (count,), generator=source) for bounds in (DECIDED, (0, STEPS)))
    return torch.where(here, some, all_of_them)


def train(model: PixArt, prompts: Prompts, out: Path, *, steps: int, batch: int, lr: float) -> None:
    """Teach the model to draw; leave the average of its weights in it, and in a file every 1,500 steps.

    Printed beside the loss: by how much a wrong prompt raises the error. At 0 the model does not read.
    """
    chain, draws = Diffusion().on(torch.device("cpu")), np.random.default_rng(2)
    source = torch.Generator().manual_seed(2)
    weights = 1 + ((1 - chain.alpha_bar) / chain.alpha_bar).clamp(max=MAX_WEIGHT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    average, network = copy.deepcopy(model), torch.compile(model)

    def error_of(x: Tensor, t: Tensor, condition: Condition, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        predicted, raw = network(x, t, condition).chunk(2, dim=1)
        return (predicted - noise).square().flatten(1).mean(1), predicted, raw

    began, total = time.monotonic(), 0.0
    for step in range(steps):
        shown = [scenes.scene(draws) for _ in range(batch)]
        x0 = pixels(shown, source)
        condition = prompts([scene.prompt if draws.random() >= EMPTY else "" for scene in shown])
        t, noise = draw_t(batch, source), torch.randn(x0.shape, generator=source)
        x = chain.noised(x0, t, noise)
        error, predicted, raw = error_of(x, t, condition, noise)
        # The objective's own loss but for the weights: its bound trains the variance alone.
        loss = (weights[t] * error).mean() / 4 + chain._bound(x0, x, t, predicted.detach(), raw).mean()
        along = step / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 500) * min(1.0, (1 - along) / (1 - CONSTANT))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        total += (weights[t] * error).mean().item()
        if step % 250 == 249:
            with torch.no_grad():
                other = Condition(text=condition.require("text").roll(1, 0), mask=condition.require("mask").roll(1, 0))
                wrong, right = (error_of(x, t, told, noise)[0] for told in (other, condition))
            gap = wrong[here].sum() / right[here].sum() - 1 if (here := (t > 300) & (t < 700)).any() else 0.0
            rate = (step + 1) * batch / (time.monotonic() - began)
            print(f"step {step + 1} loss {total / 250:.4f} wrong prompt {gap:+.3f} {rate:.0f} samples/s", flush=True)
            total = 0.0
        if step % 1500 == 1499 or step == steps - 1:
            save_file(average.state_dict(), out / "average.safetensors")
            print(json.dumps(score(average, prompts)), flush=True)
    model.load_state_dict(average.state_dict())


@torch.no_grad()
def score(model: PixArt, prompts: Prompts, guidance: float = 1.5, steps: int = 20) -> dict[str, float]:
    """Return GenEval's shares by the rule-based detector: a sample a prompt by DDIM."""
    every = scenes.every_prompt(120, seed=3)
    source, chain = torch.Generator().manual_seed(4), Diffusion().on(torch.device("cpu"))
    x = torch.randn(len(every), 3, SIDE, SIDE, generator=source)
    both = prompts([scene.prompt for scene in every]).join(prompts([""] * len(every)))
    for now, then in pairwise(torch.linspace(STEPS - 1, 0, steps + 1).round().long()):
        t = now.expand(2 * len(x))
        noise, unconditional = model(torch.cat([x, x]), t, both)[:, :3].chunk(2)
        noise = unconditional + guidance * (noise - unconditional)
        x0 = chain.x0_from_noise(x, t[: len(x)], noise).clamp(-1, 1)
        noise = (x - at(chain.sqrt_kept, t[: len(x)], x) * x0) / at(chain.sqrt_noise, t[: len(x)], x)
        x = chain.noised(x0, then.expand(len(x)), noise)
    images = ((x0 + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    detector, right = ShapesDetector(), {tag: list[bool]() for tag in scenes.TAGS}
    for scene, image in zip(every, images, strict=True):
        prompt, picture = Prompt.model_validate(scene.line, context=VOCABULARY), to_image(image)
        judgement = judge_image(prompt, detector.detect(picture), partial(detector.classify, picture))
        right[scene.tag].append(judgement.correct)
    shares = {tag: round(float(np.mean(values)), 3) for tag, values in right.items()}
    return {**shares, "overall": round(float(np.mean(list(shares.values()))), 3)}


def to_image(pixels: Any) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


def finish(model: PixArt, folder: Path) -> None:
    """Write the model in bf16, which halves its file; it is read as fp32."""
    folder.mkdir(exist_ok=True)
    checkpoints.save(model, [], folder)
    file = folder / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=9_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--encoder-steps", type=int, default=400)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.out.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(chosen.out / "tokenizer")
    encoder = new_encoder(len(tokenizer))
    train_encoder(tokenizer, encoder, chosen.encoder_steps)
    encoder.bfloat16().save_pretrained(chosen.out / "text_encoder")
    prompts, model = Prompts(tokenizer, encoder.float()), new_model()
    train(model, prompts, chosen.out, steps=chosen.steps, batch=chosen.batch, lr=chosen.lr)
    finish(model, chosen.out / "transformer")
    (chosen.out / "average.safetensors").unlink()


if __name__ == "__main__":
    main()
