"""Anybody's samples, held against a reference as a job holds its own: for `graft score`.

The metrics are those that need nothing of a job: they look with Inception alone. The samples are judged as a row is,
and the reference is read as a step of a job reads it, each in a folder that goes when the figures are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from graftwork.specs.data import COLOURS
from graftwork.specs.metrics import Metric
from graftwork.specs.resources import StepResources
from graftwork.stages.catalog.reference import given_params, reference_steps
from graftwork.stages.contract import Context
from graftwork.stages.evaluation import reference as real_images
from graftwork.stages.evaluation.inception import images_of
from graftwork.stages.evaluation.judges import Judges, Scores, read_summary
from graftwork.stages.evaluation.metrics import JUDGES, Summary

BATCH = 50  # images
ROW = "samples"

Progress = Callable[[str, int, int], object]  # of a part of the work: its images that are done, and their number


class _NoCheckpoints:
    """The checkpoints of work that begins anew if it is killed."""

    def save(self, name: str, write: Callable[[Path], object]) -> None:
        pass

    def load(self, name: str) -> Path | None:
        return None


@dataclass(frozen=True)
class Scoring:
    """What is scored, and by what."""

    samples: str  # a folder or an .npz of images
    reference: str | None  # None if no metric holds samples against one
    metrics: Sequence[Metric]
    inception: str | None  # weights; None for those in torch's hub cache

    def figures(self, device: torch.device, report: Progress) -> dict[str, float]:
        """Return the figures of all metrics. Raise ValueError for a file whose content is not as its header says."""
        with TemporaryDirectory(prefix="graft-score-") as home:
            self._judge_samples(Path(home), device, report)
            steps = reference_steps(self.metrics)
            for name, metric in {step: metric for metric, step in steps.items()}.items():
                assert self.reference is not None
                params = given_params(metric, self.reference, None, self.inception)
                real_images.run(_context(name, params, Path(home), device, report))
            figures: dict[str, float] = {}
            for number, metric in enumerate(self.metrics):
                report("figures", number, len(self.metrics))  # a root of covariances takes a while
                given = read_summary(Path(home) / steps[metric], metric) if metric in steps else Summary(None)
                figures |= JUDGES[metric].figures(read_summary(Path(home) / ROW, metric), given)
            report("figures", len(self.metrics), len(self.metrics))
        return figures

    def _judge_samples(self, home: Path, device: torch.device, report: Progress) -> None:
        context = _context(ROW, None, home, device, report)
        judges = Judges(context, self.metrics, self.inception, device)
        images = images_of(self.samples, COLOURS["white"])
        scores, files = Scores(), real_images.FeatureFiles(context.out, len(images))
        for batch in images.batches(BATCH):
            verdict = judges.look(batch, torch.zeros(len(batch), dtype=torch.long))  # of no label
            scores.add(verdict)
            files.add(verdict)
            context.report(scores.count, len(images))
        scores.write(context.out)


def _context(name: str, params: Any, home: Path, device: torch.device, report: Progress) -> Context:
    out = home / name
    out.mkdir(parents=True)

    def report_part(done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        report(name, done, total)

    return Context(
        step=name,
        params=params,
        inputs={},
        out=out,
        partial=_NoCheckpoints(),
        report=report_part,
        resources=StepResources(),
        device=device,
    )
