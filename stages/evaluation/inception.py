"""pytorch-fid's Inception network: from a weights file, or from torch's hub cache; and the statistics it gives.

FID, IS, precision, recall and KID look at its last features (pool3), of images that are resized as pytorch-fid does it:
one pass for all of them. sFID looks at an earlier layer, of images that are resized as TensorFlow 1 did it, which its
published reference statistics are of: another pass, as far as that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from weakref import WeakValueDictionary

from graftwork.specs.metrics import INCEPTION_FILE, METRICS, Metric, inception_file
from graftwork.specs.problems import first_few, plain, text
from graftwork.stages.data.images import is_image, read_rgb, size_of
from graftwork.stages.data.npz import IMAGES, holds_images, npz_images, npz_names

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from graftwork.models.measures.frechet import Gaussian

DIMENSIONS = 2048  # of pool3
SPATIAL_CHANNELS, SPATIAL_DIMENSIONS = 7, 2023  # of Mixed_6d.branch1x1: 17 x 17 places x 7 of its 192 channels
SPATIAL_BLOCKS = 6  # of the third group, before Mixed_6d
SIDE = 299  # pixels of an image as the network sees it
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
        network = pytorch_fid.inception.InceptionV3([block])
        # pytorch-fid leaves the classifier out, which the Inception Score reads.
        network.register_buffer("class_weights", state["fc.weight"], persistent=False)
        return network.to(device).eval()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: not pytorch-fid's Inception weights: {str(error).splitlines()[0]}") from None
    finally:
        pytorch_fid.inception.load_state_dict_from_url = by_url


class Inception:
    """The network, shared by the metrics of a process that look with it: images pass once, whoever asks for pool3."""

    _shared: ClassVar[WeakValueDictionary[tuple[str, str], Inception]] = WeakValueDictionary()

    def __init__(self, weights: str | None, device: torch.device) -> None:
        self.network, self.device = load_inception(weights, device), device
        self._last: tuple[NDArray[np.uint8], Tensor] | None = None  # images, and their features

    @classmethod
    def shared(cls, weights: str | None, device: torch.device) -> Inception:
        """Return the one that other metrics have on that device, or load it."""
        place = str(inception_file(weights)), str(device)
        inception = cls._shared.get(place) or cls(weights, device)
        cls._shared[place] = inception
        return inception

    def pool3(self, images: NDArray[np.uint8]) -> Tensor:
        """Return the features (n,2048) of images, see `inception_features`; those of the last call are kept."""
        if self._last is None or self._last[0] is not images:
            self._last = images, inception_features(images, self.network, self.device)
        return self._last[1]

    def spatial(self, images: NDArray[np.uint8]) -> Tensor:
        """Return the features (n,2023) of images, see `spatial_features`."""
        return spatial_features(images, self.network, self.device)

    def logits(self, images: NDArray[np.uint8]) -> Tensor:
        """Return the logits (n,1008), float64, without the bias, which evaluators in TensorFlow leave out."""
        return self.pool3(images) @ self.network.class_weights.double().T


@dataclass(frozen=True)
class Statistics:
    """A mean and a covariance as files have them: the arrays' names, and the features that they are of."""

    mu: str
    sigma: str
    dimensions: int
    features: Callable[[NDArray[np.uint8], Any, torch.device], Tensor]


def reference_statistics(
    path: str,
    background: str,
    network: Callable[[], Any],
    device: torch.device,
    report: Callable[[int, int], object],
    metric: Metric = "fid",
) -> Gaussian:
    """Return those that an .npz holds, or those of the images in a folder or an .npz, looked at some at a time.

    `background` shows through what is transparent in images, `network` loads what is only needed for images, `report`
    is told the images done and their number. Raise ValueError for anything else.
    """
    if not holds_images(path):
        return read_statistics(path, metric)
    loaded = network()
    return statistics_of(
        images_of(path, background), lambda batch: STATISTICS[metric].features(batch, loaded, device), report
    )


def statistics_of(
    images: Images, features: Callable[[NDArray[np.uint8]], Tensor], report: Callable[[int, int], object]
) -> Gaussian:
    """Return the mean and covariance of the features (n,d) of images, looked at some at a time; report: see above."""
    from graftwork.models.measures.frechet import Moments

    total: Moments | None = None
    done = 0
    for batch in images.batches(BATCH):
        moments = Moments.of(features(batch))
        total = moments if total is None else total + moments
        done += len(batch)
        report(done, len(images))
    assert total is not None
    return total.gaussian()


def check_reference(path: str, metrics: Sequence[Metric]) -> None:
    """Raise ValueError if a folder or file lacks what one of the metrics is held against."""
    if not Path(path).exists():
        raise ValueError(f"{path}, which does not exist")
    if not Path(path).is_dir():
        check_reference_file(path, metrics)
        return
    files = reference_images(path)
    require_one_size(path, files)
    require_enough(path, len(files), metrics)


def check_reference_file(path: str, metrics: Sequence[Metric]) -> None:
    """Raise ValueError if a file that is not a folder lacks what one of the metrics is held against."""
    if Path(path).suffix != ".npz":
        raise ValueError(f"{path}: neither a folder of images nor an .npz")
    names = npz_names(path)
    for metric in metrics:
        accepted = f"accepted: with metrics [{metric}], {METRICS[metric].accepted_reference}"
        form = STATISTICS.get(metric)
        if form is not None and not holds_images(path):
            if missing := [name for name in (form.mu, form.sigma) if name not in names]:
                raise ValueError(f"{path} without {', '.join(missing)}; {accepted}")
            read_statistics(path, metric)
        elif form is not None or METRICS[metric].takes_images:
            if IMAGES not in names:
                raise ValueError(f"{path} without {IMAGES}; {accepted}")
            require_enough(path, len(npz_images(path)), [metric])


def require_enough(path: str, count: int, metrics: Sequence[Metric]) -> None:
    """Raise ValueError if there are too few images to hold samples against."""
    for metric in metrics:
        if count < (least := METRICS[metric].min_images):
            images = f"{count} image{'s' * (count != 1)}"
            raise ValueError(f"{path} with {images}; accepted: with metrics [{metric}], {least} or more")


def images_of(path: str, background: str) -> Images:
    """Return the images of a folder or an .npz, which are all of one size; raise ValueError if it has none."""
    if not Path(path).is_dir():
        return npz_images(path)
    files = reference_images(path)
    require_one_size(path, files)
    return FolderImages(tuple(files), background)


class Images(Protocol):
    """Images of one size."""

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """Yield images (at most size,3,H,W), in their order."""
        ...


@dataclass(frozen=True)
class FolderImages:
    """The images of a folder."""

    files: tuple[Path, ...]
    background: str  # that shows through what is transparent

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """Yield images (at most size,3,H,W), in the order of their names."""
        import numpy as np

        with ThreadPoolExecutor() as pool:
            for start in range(0, len(self.files), size):
                read = pool.map(partial(_pixels, background=self.background), self.files[start : start + size])
                yield np.stack(list(read))


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


def read_statistics(path: str, metric: Metric = "fid") -> Gaussian:
    """Read a metric's statistics from an .npz, as published references have them. Raise ValueError if unfit."""
    import numpy as np

    from graftwork.models.measures.frechet import Gaussian

    form = STATISTICS[metric]
    both = f"{form.mu} and {form.sigma}"
    if Path(path).suffix != ".npz":
        raise ValueError(f"{path}: neither a folder of images nor an .npz with {both}")
    shapes = {form.mu: (form.dimensions,), form.sigma: (form.dimensions, form.dimensions)}
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
        raise ValueError(f"{path}: holds no {missing}; an .npz with {both} is needed") from None
    except Exception as error:  # torn files make numpy and zlib raise whatever their bytes happen to stand for
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path}: cannot be read as an .npz with {both} ({reason})") from None
    return Gaussian(arrays[form.mu], arrays[form.sigma])


def inception_features(images: NDArray[np.uint8], network: Any, device: torch.device) -> Tensor:
    """Return pool3 (n,2048), float64 on the device, of images (n,C,S,S). A single channel becomes three."""
    import torch

    features = []
    with torch.no_grad():
        for part in torch.from_numpy(images).split(BATCH):
            batch = part.to(device).float() / 255
            if batch.shape[1] == 1:
                batch = batch.expand(-1, 3, -1, -1)
            features.append(network(batch)[0][:, :, 0, 0].double())
    return torch.cat(features)


def spatial_features(images: NDArray[np.uint8], network: Any, device: torch.device) -> Tensor:
    """Return sFID's features (n,2023), float64 on the device, of images (n,C,H,W): Mixed_6d.branch1x1 after its ReLU.

    Places come before channels, as TensorFlow has them: the order of published statistics.
    """
    import torch

    features = []
    stem, second, third = network.blocks[:3]
    with torch.no_grad():
        for part in torch.from_numpy(images).split(BATCH):
            batch = part.to(device).float()
            if batch.shape[1] == 1:
                batch = batch.expand(-1, 3, -1, -1)
            seen = (tensorflow_resize(batch, SIDE) - 128) / 128
            seen = third[SPATIAL_BLOCKS].branch1x1(third[:SPATIAL_BLOCKS](second(stem(seen))))
            features.append(seen[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).double())
    return torch.cat(features)


def tensorflow_resize(images: Tensor, side: int) -> Tensor:
    """Return images (n,C,side,side) by TensorFlow 1's bilinear resize of (n,C,H,W).

    Without align_corners or half-pixel centres: pixel i comes from i * H / side, so that its neighbours are that place
    rounded down, and the next one.
    """
    for dim in (3, 2):
        images = _interpolated(images, dim, side)
    return images


def _interpolated(images: Tensor, dim: int, side: int) -> Tensor:
    import torch

    size = images.shape[dim]
    places = torch.arange(side, dtype=torch.float32, device=images.device) * (size / side)
    lower = places.long().clamp(max=size - 1)
    share = (places - lower).view(-1, *[1] * (3 - dim))
    below = images.index_select(dim, lower)
    above = images.index_select(dim, (lower + 1).clamp(max=size - 1))
    return below + (above - below) * share


STATISTICS: dict[Metric, Statistics] = {
    "fid": Statistics("mu", "sigma", DIMENSIONS, inception_features),
    "sfid": Statistics("mu_s", "sigma_s", SPATIAL_DIMENSIONS, spatial_features),
}
