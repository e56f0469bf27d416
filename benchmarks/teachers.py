"""What a teacher in stage 2 is worth: distance against steps, without one, with its output, and with its features too.

    python benchmarks/teachers.py [examples/digits.yaml] [--seeds 3] [--out docs/teachers]

One job a teacher, number of steps and seed, sharing rootstock and scions in the store: a quarter, half and the whole of
the job's finetune, each with its own schedule to the end. Writes OUT.json, OUT.md and OUT.png: means over the seeds,
and their standard deviation. `distance` is the job's own Frechet distance on its classifier's features, over that of
the same seed's rootstock.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import matplotlib

from benchmarks.command_line import add_job, bare_parser
from benchmarks.layer_choice import mean_and_spread
from graftwork import run
from graftwork.pipeline.cli.plain import PlainView
from graftwork.specs.reading.load import load

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TEACHERS = {"none": "null", "output": "{features: 0}", "output and features": "{}"}
SHARES = (0.25, 0.5, 1.0)  # of the job's steps
SETTINGS = ("finetune.control=false", "evaluate.rows=[rootstock, stage2]")

Found = dict[str, dict[int, list[float]]]  # teacher -> steps -> the distance over the rootstock's, seed by seed


def main() -> None:
    arguments = bare_parser(__doc__)
    add_job(arguments)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--out", type=Path, default=Path("docs/teachers"))
    chosen = arguments.parse_args()
    whole = load(chosen.job).finetune.steps
    found: Found = {name: {} for name in TEACHERS}
    for seed in range(chosen.seeds):
        for share in SHARES:
            for name, teacher in TEACHERS.items():
                steps = round(share * whole)
                found[name].setdefault(steps, []).append(_distance(chosen.job, seed, steps, teacher))
        chosen.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
        chosen.out.with_suffix(".md").write_text(table(found))
        plot(found, chosen.out.with_suffix(".png"))
        print(table(found), flush=True)


def _distance(job: str, seed: int, steps: int, teacher: str) -> float:
    """Return the distance after stage 2 over the rootstock's."""
    asked = (f"seed={seed}", f"finetune.steps={steps}", f"finetune.teacher={teacher}", *SETTINGS)
    results = run(job, ("name=teachers", *asked), PlainView()).results
    assert results is not None
    return float(results["stage2"]["distance"] / results["rootstock"]["distance"])


def table(found: Found) -> str:
    counts = list(next(iter(found.values())))
    lines = [f"| teacher | {' | '.join(f'{steps} steps' for steps in counts)} |", f"|---|{'---|' * len(counts)}"]
    for name, by_steps in found.items():
        lines.append(f"| {name} | {' | '.join(mean_and_spread(values) for values in by_steps.values())} |")
    return "\n".join(lines) + "\n"


def plot(found: Found, path: Path) -> None:
    """Each seed a dot, the means a line, one for each teacher."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for number, (name, by_steps) in enumerate(found.items()):
        colour = f"C{number}"
        for steps, values in by_steps.items():
            axes.plot([steps * (1 + 0.02 * (number - 1))] * len(values), values, "o", color=colour, markersize=3)
        axes.plot(list(by_steps), [mean(values) for values in by_steps.values()], color=colour, label=name)
    axes.axhline(1, color="0.8", linestyle="--")
    axes.set(xlabel="steps of stage 2", ylabel="distance over the rootstock's")
    axes.legend(frameon=False, title="teacher")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
