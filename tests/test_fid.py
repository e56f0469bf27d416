"""The Frechet Inception distance, through pytorch-fid's own network; its weights are of the test's making."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_fid.inception
import torch
from numpy.typing import NDArray
from PIL import Image
from pytorch_fid import fid_score
from torch import Tensor

from graftwork.models.measures.frechet import Gaussian, Moments, distance
from graftwork.pipeline import api
from graftwork.pipeline.planning import preflight
from graftwork.specs.data import ImageFolderData
from graftwork.specs.metrics import INCEPTION_FILE, inception_file
from graftwork.specs.reading.load import SpecError, load
from graftwork.stages.data.images import read_pixels
from graftwork.stages.evaluation import inception
from graftwork.stages.evaluation.inception import inception_features, load_inception, reference_statistics
from graftwork.stages.evaluation.judges import Judges
from tests.conftest import TINY
from tests.small import Payload

CPU = torch.device("cpu")
COUNT, SIDE = 4, 16

# Fewer images than features leave the covariances singular; pytorch-fid's square root says so.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning"),
]


@pytest.fixture(scope="module")
def network(weights: Path) -> Any:
    return load_inception(str(weights), CPU)


def images(seed: int, channels: int = 3) -> NDArray[np.uint8]:
    """Blobs of colour: each seed another kind."""
    coarse = np.random.default_rng(seed).integers(0, 256, (COUNT, channels, 2 + seed, 2 + seed))
    return coarse.astype(np.uint8).repeat(SIDE, 2).repeat(SIDE, 3)[:, :, :SIDE, :SIDE]


def as_folder(pictures: NDArray[np.uint8], folder: Path) -> Path:
    folder.mkdir()
    for index, picture in enumerate(pictures):
        shaped = picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)
        Image.fromarray(shaped).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("images")
    return as_folder(images(0), home / "ours"), as_folder(images(1), home / "theirs")


def statistics_of(reference: Path, network: Any) -> Gaussian:
    return reference_statistics(str(reference), "#ffffff", lambda: network, CPU, lambda done, total: None)


@pytest.fixture(scope="module")
def ours(network: Any) -> Gaussian:
    return Moments.of(inception_features(images(0), network, CPU)).gaussian()


@pytest.fixture(scope="module")
def theirs(folders: tuple[Path, Path], network: Any) -> Gaussian:
    return statistics_of(folders[1], network)


def within_their_span(first: Gaussian, second: Gaussian) -> tuple[Gaussian, Gaussian]:
    """Both in an orthonormal basis of the few directions in which either varies, or in which they differ.

    That leaves their distance as it is, and saves half a minute for the square root of a 2048 x 2048 matrix.
    """
    probe = np.random.default_rng(0).normal(size=(len(first.mu), COUNT))
    columns = [first.sigma @ probe, second.sigma @ probe, (first.mu - second.mu)[:, None]]
    basis, _ = np.linalg.qr(np.concatenate(columns, axis=1))
    one, other = (Gaussian(basis.T @ g.mu, basis.T @ g.sigma @ basis) for g in (first, second))
    return one, other


@dataclass
class Official:
    """What pytorch-fid's command line makes of the two folders."""

    fid: float
    first: Gaussian
    second: Gaussian


@pytest.fixture(scope="module")
def official(folders: tuple[Path, Path], weights: Path) -> Official:
    seen: list[Gaussian] = []
    original = fid_score.calculate_frechet_distance

    def smaller(*stats: NDArray[np.float64]) -> float:
        seen.extend([Gaussian(*stats[:2]), Gaussian(*stats[2:])])
        first, second = within_their_span(*seen)
        return original(first.mu, first.sigma, second.mu, second.sigma)

    with pytest.MonkeyPatch.context() as patch:
        by_url = lambda *_, **__: torch.load(weights, weights_only=True)  # noqa: E731
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", by_url)
        patch.setattr(fid_score, "calculate_frechet_distance", smaller)
        fid = fid_score.calculate_fid_given_paths([str(folder) for folder in folders], 50, CPU, 2048, num_workers=0)
    return Official(float(fid), *seen)


# -- the distance


def test_the_test_images_are_told_apart(official: Official) -> None:
    assert official.fid > 1


@pytest.mark.parametrize("part", ["mu", "sigma"])
def test_statistics_of_samples_are_those_of_pytorch_fid(ours: Gaussian, official: Official, part: str) -> None:
    found, expected = getattr(ours, part), getattr(official.first, part)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("part", ["mu", "sigma"])
def test_statistics_of_a_folder_are_those_of_pytorch_fid(theirs: Gaussian, official: Official, part: str) -> None:
    found, expected = getattr(theirs, part), getattr(official.second, part)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_distance_of_images_to_their_own_folder_is_nothing(
    ours: Gaussian, folders: tuple[Path, Path], network: Any, official: Official
) -> None:
    itself = statistics_of(folders[0], network)
    assert distance(*within_their_span(ours, itself)) == pytest.approx(0, abs=1e-4 * official.fid)


def test_the_distance_to_another_folder_is_that_of_pytorch_fid(
    ours: Gaussian, theirs: Gaussian, official: Official
) -> None:
    assert distance(*within_their_span(ours, theirs)) == pytest.approx(official.fid, rel=1e-4)


def test_a_reference_from_an_npz_is_that_of_its_folder(theirs: Gaussian, tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", mu=theirs.mu, sigma=theirs.sigma)
    found = statistics_of(tmp_path / "reference.npz", None)
    assert np.array_equal(found.mu, theirs.mu) and np.array_equal(found.sigma, theirs.sigma)


def test_one_channel_is_seen_as_three_equal_ones(network: Any) -> None:
    grey = images(0, channels=1)[:2]
    colour = grey.repeat(3, 1)
    assert torch.equal(inception_features(grey, network, CPU), inception_features(colour, network, CPU))


def test_any_split_into_batches_gives_the_same_features(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inception_features(images(0)[:3], network, CPU)
    monkeypatch.setattr(inception, "BATCH", 2)
    split = inception_features(images(0)[:3], network, CPU)
    assert whole.shape == (3, 2048)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-5 * whole.abs().max().item())


def test_a_folder_is_looked_at_in_parts_with_the_same_statistics(
    theirs: Gaussian, folders: tuple[Path, Path], network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "BATCH", 3)
    told: list[tuple[int, int]] = []
    report = lambda *progress: told.append(progress)  # noqa: E731
    found = reference_statistics(str(folders[1]), "#ffffff", lambda: network, CPU, report)
    assert told == [(3, COUNT), (COUNT, COUNT)]
    assert np.abs(found.sigma - theirs.sigma).max() < 1e-5 * np.abs(theirs.sigma).max()


# -- the other metrics, on the same network


NOISE = np.random.default_rng(0).integers(0, 256, (1, 3, SIDE, 12)).astype(np.uint8)  # no two places of one colour


@dataclass
class Shared:
    """What each metric saw in an image, and how often each group of the network's layers ran."""

    seen: dict[str, Tensor]
    passes: list[int]


@pytest.fixture(scope="module")
def shared(network: Any) -> Shared:
    metrics = ("fid", "is", "kid", "precision_recall", "sfid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_inception", lambda weights, device: network)
        judges = Judges(None, metrics, None, CPU)  # type: ignore[arg-type]  # these metrics need no step
    passes, hooks = [0] * 4, []
    for number, group in enumerate(network.blocks):

        def counted(*_: Any, number: int = number) -> None:
            passes[number] += 1

        hooks.append(group[0].register_forward_hook(counted))
    seen: dict[str, Tensor] = {}
    for metric, one in judges.look(NOISE, torch.zeros(1)).by_metric.items():
        (seen[metric],) = (part for part in (one.features, one.addends, one.rows) if part is not None)
    for hook in hooks:
        hook.remove()
    return Shared(seen, passes)


def test_images_pass_once_and_as_far_as_sfid_looks_once_more(shared: Shared) -> None:
    assert shared.passes == [2, 2, 2, 1]


def test_fid_sees_the_same_bits_with_other_metrics_beside_it(shared: Shared, network: Any) -> None:
    alone = inception_features(NOISE, network, CPU)
    assert torch.equal(shared.seen["fid"], alone)
    for metric in ("kid", "precision_recall"):
        assert torch.equal(shared.seen[metric], alone.float())


def test_the_inception_score_reads_the_classes_without_their_bias(shared: Shared, weights: Path) -> None:
    classes = torch.load(weights, weights_only=True)["fc.weight"].double().numpy()
    assert len(classes) == 1008
    logits = shared.seen["fid"].numpy() @ classes.T
    exp = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(shared.seen["is"][:, :-1], exp / exp.sum(1, keepdims=True), rtol=1e-9)


def resized_by_hand(pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """TensorFlow 1's bilinear resize to 299, a pixel at a time along each side."""

    def shares(size: int) -> NDArray[np.float64]:
        each = np.zeros((299, size))
        for pixel in range(299):
            place = pixel * size / 299
            lower = int(place)
            each[pixel, lower] += 1 - (place - lower)
            each[pixel, min(lower + 1, size - 1)] += place - lower
        return each

    height, width = pictures.shape[-2:]
    return np.asarray(shares(height) @ pictures.astype(float) @ shares(width).T)


def test_sfid_sees_seven_channels_place_by_place_as_tensorflow_orders_them(
    shared: Shared, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[NDArray[np.float32]] = []
    hook = network.blocks[2][6].branch1x1.register_forward_hook(lambda *given: outputs.append(given[2].numpy()))
    monkeypatch.setattr(network, "resize_input", False)
    monkeypatch.setattr(network, "normalize_input", False)
    with torch.no_grad():
        network(torch.from_numpy((resized_by_hand(NOISE) - 128) / 128).float())
    hook.remove()
    (maps,) = outputs
    assert maps.shape == (1, 192, 17, 17) and maps.min() == 0
    expected = np.stack([image[:7].transpose(1, 2, 0).reshape(-1) for image in maps])
    found = shared.seen["sfid"].numpy()
    assert found.shape == (1, 2023)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.max())


# -- the weights


def test_the_network_holds_the_weights_of_the_file(network: Any, weights: Path) -> None:
    state = torch.load(weights, weights_only=True)
    assert torch.equal(network.blocks[0][0].conv.weight, state["Conv2d_1a_3x3.conv.weight"])


def test_the_network_is_not_in_training(network: Any) -> None:
    assert not network.training and not any(value.requires_grad for value in network.parameters())


def test_without_a_named_file_the_weights_come_from_torchs_cache(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    inception_file(None).parent.mkdir(parents=True)
    inception_file(None).symlink_to(weights)
    assert load_inception(None, CPU).blocks


def test_loading_leaves_pytorch_fid_as_it_was(weights: Path, tmp_path: Path) -> None:
    before = pytorch_fid.inception.load_state_dict_from_url
    (tmp_path / "wrong.pth").write_bytes(b"")
    for path in (weights, tmp_path / "wrong.pth"):
        with contextlib.suppress(Exception):
            load_inception(str(path), CPU)
        assert pytorch_fid.inception.load_state_dict_from_url is before


@pytest.mark.parametrize("named", [True, False], ids=["named", "cache"])
def test_missing_weights_are_asked_for_in_one_line_that_says_where_to_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "mine.pth" if named else tmp_path / "hub" / "checkpoints" / INCEPTION_FILE
    with pytest.raises(FileNotFoundError) as caught:
        load_inception(str(path) if named else None, CPU)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "evaluate.inception" in message and "\n" not in message


def wrong_weights(how: str, path: Path) -> None:
    match how:
        case "another network":
            torch.save({"fc.weight": torch.zeros(3)}, path)
        case "no state dict":
            torch.save([torch.zeros(3)], path)
        case "text":
            path.write_text("<html>404: not found</html>")
        case "empty":
            path.touch()
        case "truncated":
            torch.save({"fc.weight": torch.zeros(3000)}, path)
            path.write_bytes(path.read_bytes()[:5000])
        case "code":
            torch.save({"fc.weight": Payload(path.with_name("marker"))}, path)


@pytest.mark.parametrize("how", ["another network", "no state dict", "text", "empty", "truncated", "code"])
def test_other_weights_are_refused_in_one_line_that_names_the_file(tmp_path: Path, how: str) -> None:
    path = tmp_path / "other.pth"
    wrong_weights(how, path)
    with pytest.raises(ValueError) as caught:
        load_inception(str(path), CPU)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"TORCH_HOME": "/cache/torch"},
        {"XDG_CACHE_HOME": "/cache"},
        {"TORCH_HOME": "~/t", "XDG_CACHE_HOME": "/cache"},
        {"TORCH_HOME": "$HOME/t"},
        {"XDG_CACHE_HOME": ""},
    ],
    ids=str,
)
def test_the_cache_is_where_torchs_hub_puts_the_file(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert inception_file(None) == Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def test_the_file_is_the_one_that_pytorch_fid_downloads() -> None:
    assert pytorch_fid.inception.FID_WEIGHTS_URL.endswith(f"/{INCEPTION_FILE}")


# -- the reference


SIZES = {f"{number:03d}.png": 8 if number < inception.BATCH else 9 for number in range(inception.BATCH + 2)}
# The images in folders that are no reference, by name, with their side; 0 is text.
CONTENTS: dict[str, dict[str, int]] = {
    "an empty folder": {},
    "a folder of text": {"README.md": 0},
    "hidden images": {"._0.png": 8, "._1.png": 8},
    "one image": {"0.png": 8},
    "a folder of class folders": {"cat/0.png": 8, "cat/1.png": 8},
    "images beside a folder of images": {"0.png": 8, "1.png": 8, "more/2.png": 8},
    "images of two sizes": SIZES,  # those of the first batch are all of one
    "a broken image": {"0.png": 8, "1.png": 0},
}


def wrong_reference(how: str, folder: Path) -> Path:
    path = folder / "reference"
    match how:
        case "an npz without mu":
            path = folder / "reference.npz"
            np.savez(path, arr_0=np.zeros(3))
        case "an npz that is none":
            path = folder / "reference.npz"
            path.write_text("<html>404: not found</html>")
        case "another file":
            path.write_text("?")
        case _:
            path.mkdir()
            for name, side in CONTENTS[how].items():
                (path / name).parent.mkdir(exist_ok=True)
                if side:
                    Image.new("RGB", (side, side)).save(path / name)
                else:
                    (path / name).write_text("<html>404: not found</html>")
    return path


FOLDERS = {
    "an empty folder": "no images directly in this folder; a covariance needs at least 2",
    "a folder of text": "no images directly in this folder; a covariance needs at least 2",
    "hidden images": "no images directly in this folder; a covariance needs at least 2",
    "one image": "1 image directly in this folder; a covariance needs at least 2",
    "a folder of class folders": "no images directly in this folder, and more in folders within it (cat), ",
    "images beside a folder of images": "2 images directly in this folder, and more in folders within it (more), ",
    "images of two sizes": "images of 2 sizes (000.png 8 x 8, 050.png 9 x 9); ",
    "a broken image": "cannot be read as an image: ",
}
FILES = ["an npz without mu", "an npz that is none", "another file"]


@pytest.mark.parametrize("how", [*FOLDERS, *FILES])
def test_a_reference_without_images_or_statistics_is_refused_in_one_line_that_names_it(
    tmp_path: Path, network: Any, how: str
) -> None:
    path = wrong_reference(how, tmp_path)
    with pytest.raises(ValueError) as caught:
        statistics_of(path, network)
    message = str(caught.value)
    assert message.startswith((f"{path}: ", f"{path} with ", f"{path}/")) and "\n" not in message


@pytest.mark.parametrize("how", FOLDERS)
def test_a_folder_that_is_no_reference_is_refused_by_a_plan(tmp_path: Path, weights: Path, how: str) -> None:
    path = wrong_reference(how, tmp_path)
    evaluate = f"evaluate={{samples: 8, metrics: [fid], reference: {path}, inception: {weights}}}"
    with pytest.raises(SpecError) as caught:
        api.plan(TINY, [evaluate])
    (line,) = caught.value.lines
    assert line.startswith(f"evaluate.reference: got {path}") and FOLDERS[how] in line and "; accepted: " in line


def test_sizes_of_many_images_are_looked_at_before_the_run(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "PLANNED_HEADERS", 10)
    path = wrong_reference("images of two sizes", tmp_path)
    job = load(TINY, [f"evaluate={{samples: 8, metrics: [fid], reference: {path}, inception: {weights}}}"])
    (note,) = preflight.check_files(job, ["reference/fid"], preflight.PLANNED_HEADERS)
    assert note == "evaluate.reference: whether its 52 images are all of one size is looked at before a run"
    with pytest.raises(SpecError, match="images of 2 sizes"):
        preflight.check_files(job, ["reference/fid"])


def test_files_that_a_reference_leaves_out_are_counted(tmp_path: Path, weights: Path) -> None:
    as_folder(images(0), tmp_path / "reference")
    for name in ("a.heic", "b.HEIC", "c.txt", ".hidden"):
        (tmp_path / "reference" / name).touch()
    evaluate = f"evaluate={{samples: 8, metrics: [fid], reference: {tmp_path}/reference, inception: {weights}}}"
    (note,) = preflight.check_files(load(TINY, [evaluate]), ["reference/fid"])
    assert note == "evaluate.reference: left out, by suffix: 2 .heic, 1 .txt"


def test_the_reference_is_read_as_the_training_images_are(tmp_path: Path, network: Any) -> None:
    """Deep grey, transparency and pictures on their side: the features are those of what a job would be trained on."""
    folder = tmp_path / "reference"
    folder.mkdir()
    ramp = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(ramp).save(folder / "deep.png")
    Image.fromarray(ramp).save(folder / "deep.tif")
    Image.new("RGBA", (32, 32), (200, 0, 0, 100)).save(folder / "glass.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((ramp // 257).astype(np.uint8)).save(folder / "turned.png", exif=exif)
    (folder / "._deep.png").write_bytes(b"\0\5\x16\7")
    data = ImageFolderData(path=str(tmp_path), image_size=32)
    names = ["deep.png", "deep.tif", "glass.png", "turned.png"]
    expected = np.stack([read_pixels(data, f"reference/{name}") for name in names])
    assert 120 < expected[0].mean() < 136  # half of white
    found = statistics_of(folder, network)
    exact = Moments.of(inception_features(expected, network, CPU)).gaussian()
    assert np.array_equal(found.mu, exact.mu) and np.array_equal(found.sigma, exact.sigma)
