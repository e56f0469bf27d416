"""What can be known to be wrong with the networks that judge samples, before a run starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from graftwork.specs.hub import is_hub_id, local_snapshot
from graftwork.specs.job import JobSpec
from graftwork.specs.metrics import METRICS, Networks
from graftwork.specs.problems import shown


def network_paths(job: JobSpec) -> Iterator[tuple[str, str]]:
    """Yield the field and path of each folder with a network that `evaluate` names for any metric."""
    for metric in METRICS.values():
        for section, networks in metric.networks(job.evaluate).items():
            yield from ((f"evaluate.{section}.{field}", path) for field, path in networks.weights().items())


def network_shortages(job: JobSpec) -> Iterator[str]:
    """Yield a line for each folder, where it is on this machine, that has another network than a metric needs."""
    for metric in dict.fromkeys(job.evaluate.metrics):
        for section, networks in METRICS[metric].networks(job.evaluate).items():
            yield from _shortages(f"evaluate.{section}", networks)


def _shortages(section: str, networks: Networks) -> Iterator[str]:
    for name, path in networks.weights().items():
        folder = local_snapshot(path) if is_hub_id(path) else Path(path)
        if folder is None or not folder.exists():
            continue  # `absent` says so
        wanted, kind = networks.model_types[name], _model_type(folder)
        if kind not in wanted:
            names = " or ".join(wanted)
            got = f"without a config.json of a {names}" if kind is None else f"whose config.json says {shown(kind)}"
            accepted = f"a folder or hub id of a {names}, as transformers reads it"
            yield f"{section}.{name}: got {path!r}, {got}; accepted: {accepted}"


def _model_type(folder: Path) -> str | None:
    """Return what the config.json of a model says that it is; None if there is none, or it does not say."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else None
