"""What can be known to be wrong before anything starts: files that are not there, places that cannot be reached."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.store import Store
from specs.data import ImageFolderData
from specs.evaluate import inception_file
from specs.job import JobSpec
from specs.load import SpecError
from specs.model import CheckpointWeights
from stages.sources import class_folders, class_sizes, training_size


def check(job: JobSpec) -> None:
    """Raise SpecError, one line a problem, for all that the job names and that is not there."""
    lines = [*_files(job)]
    if not any(line.startswith("data.") for line in lines):
        lines += _sizes(job)
    if lines:
        raise SpecError(lines)


def check_places(job: JobSpec, store: Store, tracking_uri: str) -> None:
    """Raise SpecError where the store cannot be written or the MLflow server does not answer."""
    try:
        store.check_writable()
    except OSError as error:
        reason = error.strerror or str(error)
        raise SpecError(
            [f"store: got {job.store!r}, which cannot be written: {reason}; accepted: a writable path"]
        ) from None
    parts = urlsplit(tracking_uri)
    if parts.scheme in ("http", "https") and parts.hostname:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname, port), timeout=5).close()
        except OSError as error:
            raise SpecError(
                [
                    f"tracking.uri: got {parts.scheme}://{parts.hostname}:{port}, which does not answer "
                    f"({error.strerror or error}); accepted: a running MLflow server, or sqlite:///file"
                ]
            ) from None


def _files(job: JobSpec) -> list[str]:
    lines = []
    if isinstance(job.data, ImageFolderData):
        if not Path(job.data.path).is_dir():
            lines.append(
                f"data.path: got {job.data.path!r}, no such folder; accepted: a folder with one folder a class"
            )
        elif not class_folders(job.data):
            lines.append(
                f"data.path: got {job.data.path!r}, no images in it; accepted: a folder with one folder a class"
            )
    if isinstance(job.weights, CheckpointWeights) and not Path(job.weights.path).is_file():
        lines.append(
            f"weights.path: got {job.weights.path!r}, no such file; accepted: a .pt or .safetensors checkpoint"
        )
    for name, path in (("reference", job.evaluate.reference), ("inception", job.evaluate.inception)):
        if path is not None and not Path(path).exists():
            lines.append(f"evaluate.{name}: got {path!r}, which does not exist; accepted: a path on this machine")
    hub = inception_file(None)
    if "fid" in job.evaluate.metrics and job.evaluate.inception is None and not hub.is_file():
        lines.append(
            f"evaluate.inception: got nothing; accepted: pytorch-fid's Inception weights ({hub.name}), named here or "
            f"placed at {hub}"
        )
    return lines


def _sizes(job: JobSpec) -> list[str]:
    total = training_size(job.data)
    lines = []
    if job.distill.samples > total:
        lines.append(
            f"distill.samples: got {job.distill.samples}; accepted: at most {total}, the training images there are"
        )
    kept = sum(class_sizes(job.data)) - total
    if job.distill.heldout is not None and job.distill.heldout > kept:
        lines.append(
            f"distill.heldout: got {job.distill.heldout}; accepted: at most {kept}, the held-out images there are"
        )
    return lines
