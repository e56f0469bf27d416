"""What a run costs when there is nothing to do: `graft run` on a finished job, against an empty Python process.

    python benchmarks/cached_run.py examples/digits.yaml      (in the folder that holds the job's store)

Prints medians, and the ratio pair by pair, so that a machine whose speed drifts does not decide the outcome. The floor
is the interpreter's own start.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 10


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(job: str) -> None:
    graft = [str(Path(sys.executable).with_name("graft")), "run", job]
    seconds(graft)  # warm the file cache; if steps were missing, they are there now
    pairs = [(seconds(graft), seconds([sys.executable, "-c", "pass"])) for _ in range(RUNS)]
    found = {
        "cached_run_s": statistics.median(ours for ours, _ in pairs),
        "empty_python_s": statistics.median(floor for _, floor in pairs),
        "ratio": statistics.median(ours / floor for ours, floor in pairs),
        "runs": RUNS,
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
