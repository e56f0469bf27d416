"""Reading an AutoencoderKL, for the codec and for pipelines that are written; diffusers is imported only then."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from graftwork.models.checkpoints.errors import UnfitCheckpoint, named
from graftwork.models.checkpoints.files import read_tensors
from graftwork.specs.vae import WeightFiles, weight_files

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def check_vae(folder: Path) -> WeightFiles:
    """Return the files of a VAE's weights; raise UnfitCheckpoint where some are missing, torn or of no use."""
    try:
        chosen = weight_files(folder)
    except ValueError as error:
        raise UnfitCheckpoint(f"{folder}: {error}") from None
    if chosen.missing:
        raise UnfitCheckpoint(f"{folder}: has no {', '.join(chosen.missing)}, which its index names")
    for file in chosen.files:
        try:
            tensors = read_tensors(file)
        except UnfitCheckpoint as unfit:
            problem = unfit.problem.removeprefix(f"{folder}/")
            raise UnfitCheckpoint(f"{folder}: {problem}", unfit.accepted) from None
        if tensors.odd:
            problems = [
                f"{name}: holds {kind}, expected floats of 16 bits at least" for name, kind in tensors.odd.items()
            ]
            raise UnfitCheckpoint(f"{folder}: {file.name}: {named(sorted(problems))}")
    return chosen


def read_vae(folder: Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Return the autoencoder in a folder, with all of its weights; raise UnfitCheckpoint, in one line."""
    chosen = check_vae(folder)
    from diffusers import AutoencoderKL

    try:
        vae, report = AutoencoderKL.from_pretrained(
            folder,
            torch_dtype=dtype,
            variant=chosen.variant,
            use_safetensors=chosen.safe,
            output_loading_info=True,
            low_cpu_mem_usage=False,
            local_files_only=True,
        )
    except Exception as error:  # diffusers lets through what json, safetensors and its own modules raise
        problem = " ".join(str(error).split())[:300] or type(error).__name__
        raise UnfitCheckpoint(f"{folder}: cannot be read as an AutoencoderKL: {problem}") from None
    problems = [f"{name}: missing" for name in sorted(report["missing_keys"])]
    problems += [f"{name}: expected none of that name" for name in sorted(report["unexpected_keys"])]
    if problems:  # diffusers would leave what is missing random
        raise UnfitCheckpoint(f"{folder}: is no AutoencoderKL: {named(problems)}")
    for name, value in vae.state_dict().items():
        if not value.isfinite().all():
            raise UnfitCheckpoint(f"{folder}: {name}: holds NaN or infinity, expected numbers")
    return vae
