"""Images in GenEval's layout: ROOT/00000/metadata.jsonl and ROOT/00000/samples/0000.png, for each prompt and sample.

A file is there whole or not at all, so that a run that was interrupted goes on with the samples that are missing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.specs.problems import SpecError, first_few, shown
from graftwork.stages.evaluation.geneval.files import raise_problems, read_jsonl, write_whole
from graftwork.stages.evaluation.geneval.prompts import Prompt

if TYPE_CHECKING:
    from PIL import Image

METADATA = "metadata.jsonl"
MAX_NAMED_SAMPLES = 3  # missing ones, in a note
PNG_BEGIN, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class SamplePlace:
    """A sample's file, the index of its prompt, and its own among that prompt's samples."""

    prompt: int
    sample: int
    file: Path


@dataclass(frozen=True)
class FolderContent:
    """The samples of a folder that are there whole, and those that are missing or torn, in the order of the prompts."""

    present: tuple[SamplePlace, ...]
    missing: tuple[SamplePlace, ...]

    @property
    def note(self) -> str | None:
        """One line about what is missing; None if nothing is."""
        if not self.missing:
            return None
        total = len(self.present) + len(self.missing)
        names = [str(Path(*place.file.parts[-3:])) for place in self.missing]
        return f"{len(self.missing):,} of {total:,} images are missing: {first_few(names, MAX_NAMED_SAMPLES)}"


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images for prompts, `num_samples` for each. Other files in it are left alone and not read."""

    root: Path
    prompts: Sequence[Prompt]
    num_samples: int

    def content(self) -> FolderContent:
        """Return which samples are there. Raise SpecError if the folder has another prompt in the place of one."""
        self._require_same_prompts()
        indices = product(range(len(self.prompts)), range(self.num_samples))
        places = [SamplePlace(prompt, sample, self.sample_file(prompt, sample)) for prompt, sample in indices]
        whole = {place: _is_whole(place.file) for place in places}
        present = tuple(place for place in places if whole[place])
        return FolderContent(present, tuple(place for place in places if not whole[place]))

    def write(self, prompt: int, sample: int, image: Image.Image) -> None:
        """Write a sample, and its prompt's line if that is not there."""
        metadata, line = self.prompt_folder(prompt) / METADATA, json.dumps(self.prompts[prompt].document())
        if not metadata.exists():
            write_whole(metadata, lambda file: file.write(f"{line}\n".encode()))
        write_whole(self.sample_file(prompt, sample), lambda file: image.save(file, "PNG"))

    def prompt_folder(self, prompt: int) -> Path:
        return self.root / f"{prompt:05d}"

    def sample_file(self, prompt: int, sample: int) -> Path:
        return self.prompt_folder(prompt) / "samples" / f"{sample:04d}.png"

    def _require_same_prompts(self) -> None:
        names = sorted(path.name for path in self.root.iterdir() if path.is_dir()) if self.root.is_dir() else []
        problems = [problem for name in names if name.isdecimal() for problem in self._misplaced(name)]
        if problems:
            raise_problems(problems)

    def _misplaced(self, name: str) -> Iterator[str]:
        """Yield what is wrong with the prompt in a folder of that name; nothing if it has no files yet."""
        folder, index = self.root / name, int(name)
        if index >= len(self.prompts) or folder != self.prompt_folder(index):
            yield f"{folder}: got a folder of another prompt; accepted: 00000 to {len(self.prompts) - 1:05d}"
        elif (folder / METADATA).exists() or any((folder / "samples").glob("*.png")):
            yield from _differences(folder / METADATA, self.prompts[index])


def write_samples(root: Path, prompts: Sequence[Prompt], samples: Iterable[tuple[int, Image.Image]]) -> None:
    """Write samples, each with the index of its prompt; those of a prompt are numbered in their order."""
    seen = Counter[int]()
    for prompt, image in samples:
        ImageFolder(root, prompts, seen[prompt] + 1).write(prompt, seen[prompt], image)
        seen[prompt] += 1


def _differences(file: Path, expected: Prompt) -> Iterator[str]:
    """Yield a line for the first field in which a prompt's file has another prompt, or for why it cannot be read."""
    try:
        lines = read_jsonl(file, Prompt)
    except SpecError as error:
        yield from error.lines
        return
    if len(lines) > 1:
        yield f"{file}: got {len(lines)} lines; accepted: that of the prompt"
    elif lines[0] != expected:
        got, wanted = ({**dict.fromkeys(Prompt.model_fields), **prompt.document()} for prompt in (lines[0], expected))
        field = next(name for name in Prompt.model_fields if got[name] != wanted[name])
        yield f"{file}: {field}: got {shown(got[field])}; accepted: {shown(wanted[field])}, as in the prompts"


def _is_whole(file: Path) -> bool:
    """Return whether a file begins and ends as a PNG; its pixels are not read."""
    try:
        with file.open("rb") as png:
            begin = png.read(len(PNG_BEGIN))
            png.seek(-len(PNG_END), 2)
            return begin == PNG_BEGIN and png.read() == PNG_END
    except OSError:  # not there, or too short
        return False
