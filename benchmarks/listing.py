"""Plans of large folders of images: how long the listing, the first reading and a second plan take.

    python -m benchmarks.listing [--classes 1000] [--images 1300] [--bytes 0] [--per-class N]

Makes as many files as that in a temporary folder, each of so many bytes and no two alike, and removes them afterwards.
first plan: of a folder that was never read: the keys are provisional. reading: as a run does before it starts, whatever
the times of the files. second plan: lists the folder and looks at each file's times, and reads none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.command_line import bare_parser
from graftwork.pipeline.planning import contents
from graftwork.pipeline.planning.contents import Contents
from graftwork.pipeline.planning.plan import make_plan
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.data import ImageFolderData
from graftwork.specs.job import JobSpec
from graftwork.specs.reading.load import load
from graftwork.stages.data.listing import list_images, listing_once

JOB = Path(__file__).parents[1] / "examples" / "digits-tiny.yaml"


def make_images(home: Path, classes: int, images: int, size: int) -> None:
    """Make files that are listed as images; what they hold is none."""
    for label in range(classes):
        folder = home / f"n{label:08d}"
        folder.mkdir(parents=True)
        at = os.open(folder, os.O_RDONLY)
        for number in range(images):
            file = os.open(f"{folder.name}_{number}.JPEG", os.O_CREAT | os.O_WRONLY, dir_fd=at)
            if size:
                os.write(file, f"{label} {number}".encode().ljust(size, b"."))
            os.close(file)
        os.close(at)


def timed(name: str, work: Callable[[], object]) -> None:
    began, cpu = time.perf_counter(), time.process_time()
    work()
    print(f"{name:12} {time.perf_counter() - began:8.2f} s {time.process_time() - cpu:8.2f} s of CPU", flush=True)


def plan(job: JobSpec, known: Contents) -> None:
    with listing_once():
        make_plan(job, known)


def main() -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1300, help="of a class")
    parser.add_argument("--bytes", type=int, default=0, help="of an image")
    parser.add_argument("--per-class", type=int, help="data.per_class")
    asked = parser.parse_args()
    with TemporaryDirectory() as folder:
        home, store = Path(folder) / "images", Store(str(Path(folder) / "store"))
        timed("making", lambda: make_images(home, asked.classes, asked.images, asked.bytes))
        Path(store.root).mkdir()
        chosen = f", per_class: {asked.per_class}" if asked.per_class else ""
        folder_of_images = f"data={{kind: image_folder, path: {home}, image_size: 16, heldout: 0.0078{chosen}}}"
        job = load(JOB, [folder_of_images, "distill.samples=2", "distill.heldout=1"])
        contents.GRANULARITY_NS = 0  # the files are young
        data = job.data
        assert isinstance(data, ImageFolderData)
        timed("listing", lambda: list_images(data))
        timed("first plan", lambda: plan(job, Contents(store, quick=True)))
        timed("reading", lambda: plan(job, Contents(store)))
        timed("second plan", lambda: plan(job, Contents(store, quick=True)))


if __name__ == "__main__":
    main()
