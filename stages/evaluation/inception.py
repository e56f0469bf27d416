"""pytorch-fid's Inception network: from a weights file, or from torch's hub cache; and the statistics it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from graftwork.specs.metrics import INCEPTION_FILE, inception_file
from graftwork.specs.problems import first_few, plain, text
from graftwork.stages.data.images import is_image, read_rgb, size_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from graftwork.models.measures.frechet import Gaussian

DIMENSIONS = 2048
BATCH = 50
MIN_IMAGES = 2  # that have a covariance
NAMED = 3  # folders or sizes that an error names
LARGEST = 2**26  # bytes of an array of statistics


def load_inception(weights: str | None, device: torch.device) -> Any:
    """pytorch-fid's network; FileNotFoundError, ValueError where the weights are missing or are others."""
    import pytorch_fid.inception
    import torch

    path = inception_file(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no Inception weights there; put {INCEPTION_FILE} there, or name a file in evaluate.inception"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a file of Inception weights ({type(error).__name__})") from None
    tensors = state.items() if isinstance(state, dict) else ()
    for name, value in tensors:
        if isinstance(value, torch.Tensor) and not value.isfinite().all():
            raise ValueError(f"{path}: {name}: holds NaN or infinity, expected Inception weights")
    # pytorch-fid takes its weights from a URL only; hand it the file's instead.
    by_url = pytorch_fid.inception.load_state_dict_from_url
    pytorch_fid.inception.load_state_dict_from_url = lambda *args, **kwargs: state
    try:
        block = pytorch_fid.inception.InceptionV3.BLOCK_INDEX_BY_DIM[DIMENSIONS]
        return pytorch_fid.inception.InceptionV3([block]).to(device).eval()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: not pytorch-fid's Inception weights: {str(error).splitlines()[0]}") from None
    finally:
        pytorch_fid.inception.load_state_dict_from_url = by_url


def reference_statistics(
    path: str,
    background: str,
    network: Callable[[], Any],
    device: torch.device,
    report: Callable[[int, int], object],
) -> Gaussian:
    """Return those of an .npz that holds mu and sigma, or of the images in a folder, looked at some at a time.

    `background` shows through what is transparent in images, `network` loads what is only needed for a folder, `report`
    is told the images done and their number. Raise ValueError for anything else.
    """
    import numpy as np

    from graftwork.models.measures.frechet import Moments

    if not Path(path).is_dir():
        return read_statistics(path)
    files = reference_images(path)
    require_one_size(path, files)
    loaded, parts = network(), [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
    total: Moments | None = None
    with ThreadPoolExecutor() as pool:
        for number, part in enumerate(parts):
            images = np.stack(list(pool.map(partial(_pixels, background=background), part)))
            moments = Moments.of(inception_features(images, loaded, device))
            total = moments if total is None else total + moments
            report(number * BATCH + len(part), len(files))
    assert total is not None
    return total.gaussian()


def reference_images(path: str) -> list[Path]:
    """Return the images of a reference, which lie directly in its folder; raise ValueError where that cannot be meant.

    Hidden files count for nothing, as they do in the data.
    """
    entries = sorted(entry for entry in Path(path).iterdir() if not entry.name.startswith("."))
    images = [entry for entry in entries if is_image(entry)]
    folders = [text(entry.name) for entry in entries if entry.is_dir() and any(map(is_image, entry.rglob("*")))]
    if folders:
        nested = f"in folders within it ({first_few([*map(plain, folders)], NAMED)}), which are not looked into"
        directly = f"{len(images)} images" if images else "no images"
        raise ValueError(f"{path}: {directly} directly in this folder, and more {nested}")
    if len(images) < MIN_IMAGES:
        raise ValueError(
            f"{path}: {len(images) or 'no'} image{'s' * (len(images) != 1)} directly in this folder; a covariance "
            f"needs at least {MIN_IMAGES}"
        )
    return images


def require_one_size(path: str, files: Sequence[Path]) -> None:
    """Raise ValueError if the images' headers have several sizes, or if a file is not an image."""
    sizes: dict[tuple[int, int], Path] = {}
    with ThreadPoolExecutor() as pool:
        for file, size in zip(files, pool.map(size_of, files), strict=True):
            sizes.setdefault(size, file)
    if len(sizes) > 1:
        examples = [f"{text(file.name)} {width} x {height}" for (width, height), file in sizes.items()]
        several = ", ".join(map(plain, examples[:NAMED]))
        raise ValueError(f"{path}: images of {len(sizes)} sizes ({several}); a reference's are all of one")


def _pixels(file: Path, background: str) -> NDArray[np.uint8]:
    """Return an image (3,H,W)."""
    import numpy as np

    return np.asarray(read_rgb(file, background)).transpose(2, 0, 1)


def read_statistics(path: str) -> Gaussian:
    """Read mu and sigma from an .npz, as pytorch-fid and published references have them. Raise ValueError if unfit."""
    import numpy as np

    from graftwork.models.measures.frechet import Gaussian

    if Path(path).suffix != ".npz":
        raise ValueError(f"{path}: neither a folder of images nor an .npz with mu and sigma")
    shapes = {"mu": (DIMENSIONS,), "sigma": (DIMENSIONS, DIMENSIONS)}
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name, shape in shapes.items():
                if file.zip.getinfo(f"{name}.npy").file_size > LARGEST:
                    raise ValueError(f"{name} is too large")
                arrays[name] = file[name]
                if arrays[name].shape != shape:
                    raise ValueError(f"{name} has the shape {arrays[name].shape}, not {shape}")
                if not np.isfinite(arrays[name]).all():
                    raise ValueError(f"{name} holds NaN or infinity")
    except KeyError:
        missing = next(name for name in shapes if name not in arrays)
        raise ValueError(f"{path}: holds no {missing}; an .npz with mu and sigma is needed") from None
    except Exception as error:  # torn files make numpy and zlib raise whatever their bytes happen to stand for
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path}: cannot be read as an .npz with mu and sigma ({reason})") from None
    return Gaussian(arrays["mu"], arrays["sigma"])


def inception_features(images: NDArray[np.uint8], network: Any, device: torch.device) -> Tensor:
    """Return the features (n,2048), float64 on the device, of images (n,C,S,S). A single channel becomes three."""
    import torch

    features = []
    with torch.no_grad():
        for part in torch.from_numpy(images).split(BATCH):
            batch = part.to(device).float() / 255
            if batch.shape[1] == 1:
                batch = batch.expand(-1, 3, -1, -1)
            features.append(network(batch)[0][:, :, 0, 0].double())
    return torch.cat(features)
