"""Models of transformers, loaded from a folder or by a hub id, and their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from graftwork.specs.problems import SpecError, first_few

MAX_NAMED_TENSORS = 3
HUB_FOLDER = "models--"  # how a folder of the hub's cache begins, before its id with -- for /

T = TypeVar("T")


def load_model(model_class: Any, path: str, device: torch.device, **options: Any) -> Any:
    """Return a model with the weights of a folder or hub id, in fp32, not in training.

    model_class: a PreTrainedModel; options: of its constructor. Raise SpecError in one line if the weights cannot be
    read, or if some are missing, which transformers would leave random.
    """
    model, report = read_pretrained(
        lambda: model_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **options), path
    )
    if missing := sorted(report["missing_keys"]):
        names = first_few(missing, MAX_NAMED_TENSORS)
        raise SpecError([f"{path}: got weights without {names}; accepted: those of a {model_class.__name__}"])
    return model.to(device).eval()


def read_pretrained(read: Callable[[], T], path: str) -> T:
    """Return what `read` reads from a path; raise SpecError in one line if it cannot."""
    try:
        return read()
    except Exception as error:  # transformers lets through what json, safetensors and the hub's library raise
        problem = " ".join(str(error).split()) or type(error).__name__
        raise SpecError([f"{path}: cannot be loaded by transformers: {problem}"]) from None


def model_name(path: str) -> str:
    """Return the name of a model, without its owner: the last part of a hub id or path.

    A snapshot in the hub's cache, whose folder is named by its revision, has the name of its repository.
    """
    repository = next((part for part in Path(path).parts if part.startswith(HUB_FOLDER)), None)
    return repository.rpartition("--")[2] if repository else Path(path).absolute().name
