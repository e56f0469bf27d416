"""A T5 encoder with its tokenizer: texts become states of their tokens.

Shapes: T tokens of a text, E channels of the encoder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.specs.hub import local_path
from graftwork.specs.problems import first_few, shown
from graftwork.specs.text import T5Text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FAMILY = ("t5", "mt5", "umt5")  # `model_type` of encoders with these states
CLEANING = {"ftfy": "ftfy", "bs4": "beautifulsoup4"}  # module -> package
ACCEPTED = "a folder with a T5 encoder and its tokenizer, or of a pipeline that has them as text_encoder and tokenizer"
MAX_NAMED = 3
MIN_VOCABULARY = 2  # tokens beside those of special meaning; one that is made up has the blank alone


class UnfitText(ValueError):
    """An encoder that cannot be read, or texts that do not fit it; the text is the whole line."""


class Folders:
    """Where the encoder and its tokenizer lie. The hub is asked for an id that is not in its cache."""

    def __init__(self, path: str) -> None:
        root = local_path(path, "text_encoder")
        self.encoder, self.tokenizer = (within if (within := root / name).is_dir() else root for name in PARTS)

    @property
    def config(self) -> dict[str, Any]:
        """What the encoder's config.json says. Raise UnfitText if it is no T5's."""
        try:
            config = json.loads((self.encoder / "config.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise _unfit(self.encoder, "without a config.json of an encoder")
        if config.get("model_type") not in FAMILY or not isinstance(config.get("d_model"), int):
            raise _unfit(self.encoder, f"whose config.json says {shown(str(config.get('model_type')))}, no T5")
        return config

    @property
    def channels(self) -> int:
        """E."""
        return int(self.config["d_model"])


PARTS = ("text_encoder", "tokenizer")


def missing_packages(text: T5Text) -> str | None:
    """Return a line if what the text's settings need is not installed."""
    absent = [package for module, package in CLEANING.items() if find_spec(module) is None]
    if find_spec("transformers") is None:
        return "text.kind: got 't5', without transformers; accepted: pip install 'graftwork[text]'"
    if text.clean and absent:
        accepted = "accepted: pip install 'graftwork[text]', or text.clean: false"
        return f"text.clean: got true, without {' and '.join(absent)}; {accepted}"
    return None


def cleaned(texts: Sequence[str], clean: bool) -> list[str]:
    """Return texts as PixArtSigmaPipeline hands them to its tokenizer: in lower case, and cleaned where asked for."""
    if not clean:
        return [text.lower().strip() for text in texts]
    from diffusers import PixArtSigmaPipeline

    # The method needs no components, only the class's patterns; there is no public function for it.
    pipeline = PixArtSigmaPipeline.__new__(PixArtSigmaPipeline)
    return list(pipeline._text_preprocessing(list(texts), clean_caption=True)) if texts else []


class Tokenizer:
    """Texts as numbers of tokens, at most `tokens` of each."""

    def __init__(self, text: T5Text, tokens: int) -> None:
        from transformers import AutoTokenizer

        self.text, self.tokens = text, tokens
        folder = Folders(text.path).tokenizer
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever the library raises for what it finds there
            raise _unfit(folder, f"whose tokenizer cannot be read ({_first_line(error)})") from None
        # Beside an encoder without a tokenizer the library makes one up, to which all words are unknown.
        if len(self.tokenizer) - len(set(self.tokenizer.all_special_tokens)) < MIN_VOCABULARY:
            raise _unfit(folder, "without the files of a tokenizer")

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, cleaned. Raise UnfitText for texts of too many, unless they may be cut."""
        if not texts:
            return []
        numbers: list[list[int]] = self.tokenizer(cleaned(texts, self.text.clean), verbose=False)["input_ids"]
        long = [place for place, one in enumerate(numbers) if len(one) > self.tokens]
        if long and not self.text.truncate:
            raise UnfitText(self._too_long([(texts[place], len(numbers[place])) for place in long]))
        self._require_known(numbers)
        end = self.tokenizer.eos_token_id
        return [self._cut(one, end) for one in numbers]

    def _require_known(self, numbers: Sequence[Sequence[int]]) -> None:
        """Raise UnfitText for a token that the encoder has no embedding of: it belongs to another tokenizer."""
        folders = Folders(self.text.path)
        largest, vocabulary = max((max(one, default=0) for one in numbers), default=0), folders.config.get("vocab_size")
        if isinstance(vocabulary, int) and largest >= vocabulary:
            raise _unfit(folders.tokenizer, f"a tokenizer with token {largest}, for an encoder of {vocabulary} tokens")

    def _cut(self, numbers: list[int], end: int | None) -> list[int]:
        """Return the first tokens, the last of them the one that ends a text, as a tokenizer that truncates does."""
        if len(numbers) <= self.tokens:
            return numbers
        return numbers[: self.tokens] if end is None else [*numbers[: self.tokens - 1], end]

    def _too_long(self, long: Sequence[tuple[str, int]]) -> str:
        named = first_few([f"{shown(text)} of {count}" for text, count in long], MAX_NAMED)
        problem = f"got {self.tokens}, and {len(long)} texts of more tokens: {named}"
        return f"model.text_tokens: {problem}; accepted: shorter texts, or text.truncate: true, which cuts them"


class TextEncoder:
    """An encoder on a device. The others of a batch show in the states of a text only in their last bits."""

    def __init__(self, text: T5Text, tokens: int, device: torch.device) -> None:
        self.text, self.device = text, device
        self.tokenizer = Tokenizer(text, tokens)

    @cached_property
    def model(self) -> Any:
        import torch
        from transformers import T5EncoderModel, UMT5EncoderModel

        folders = Folders(self.text.path)
        family = UMT5EncoderModel if folders.config["model_type"] == "umt5" else T5EncoderModel
        dtype = torch.bfloat16 if self.text.precision == "bf16" else torch.float32
        try:
            loaded: Any = family.from_pretrained(
                folders.encoder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
            model, loading = loaded
        except Exception as error:
            raise _unfit(folders.encoder, f"whose encoder cannot be read ({_first_line(error)})") from None
        if absent := sorted(loading["missing_keys"]):
            raise _unfit(folders.encoder, f"without the weights {first_few(absent, MAX_NAMED)}")
        if more := sorted(name for name in loading["unexpected_keys"] if name.startswith("encoder.block.")):
            problem = f"with weights that its config.json has no place for, {first_few(more, MAX_NAMED)}"
            raise _unfit(folders.encoder, problem)
        return model.eval().to(self.device)

    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the states (T,E) of each text, on the host. Raise UnfitText, also for states that are not finite."""
        import torch

        numbers = self.tokenizer(texts)
        states: list[Tensor] = [torch.empty(0)] * len(numbers)
        order = sorted(range(len(numbers)), key=lambda place: (len(numbers[place]), place))
        for start in range(0, len(order), self.text.batch):
            places = order[start : start + self.text.batch]
            for place, one in zip(places, self._encoded([numbers[place] for place in places]), strict=True):
                if not one.isfinite().all():
                    raise UnfitText(f"text.path: its states of {shown(texts[place])} are no finite numbers")
                states[place] = one.cpu()
        return states

    def _encoded(self, numbers: Sequence[Sequence[int]]) -> list[Tensor]:
        import torch

        width = max(map(len, numbers))
        tokens, mask = (torch.zeros(len(numbers), width, dtype=torch.long) for _ in range(2))
        for row, one in enumerate(numbers):
            tokens[row, : len(one)], mask[row, : len(one)] = torch.tensor(one), 1
        with torch.no_grad():
            states = self.model(tokens.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
        return [states[row, : len(one)] for row, one in enumerate(numbers)]


def _unfit(folder: Path, problem: str) -> UnfitText:
    return UnfitText(f"text.path: got {str(folder)!r}, {problem}; accepted: {ACCEPTED}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
