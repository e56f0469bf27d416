"""The two sets of versions: what the documentation and the Makefile name is in them, and they differ in torch alone."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib

import pytest

from tests.conftest import ROOT

FOR_GPUS = "constraints-gpu.txt"
OF_TORCH = re.compile(r"torch|torchvision|triton|(cuda|nvidia)-.+|causal-conv1d")


def versions(path: str) -> dict[str, str]:
    lines = [line for line in (ROOT / path).read_text().splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    assert len(dict(pairs)) == len(lines)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_the_set_for_gpus_is_the_other_with_another_torch_and_what_is_built_for_it() -> None:
    newest, for_gpus = versions("constraints.txt"), versions("constraints-gpu.txt")
    others = [{pair for pair in found.items() if not OF_TORCH.fullmatch(pair[0])} for found in (newest, for_gpus)]
    assert others[0] == others[1]
    assert newest["torch"] != for_gpus["torch"] and "causal-conv1d" not in newest


def section() -> str:
    return (ROOT / "docs" / "performance.md").read_text().split("## Kernels on NVIDIA GPUs")[1].split("\n## ")[0]


def test_the_readme_names_the_versions_of_torch_that_are_in_the_sets() -> None:
    for path in ("constraints.txt", "constraints-gpu.txt"):
        (row,) = [line for line in section().splitlines() if line.startswith(f"| `{path}` |")]
        found = versions(path)
        cuda = found.get("cuda-toolkit") or found["nvidia-cuda-runtime-cu12"]
        assert row.split("|")[2].strip() == f"{found['torch']}, CUDA {'.'.join(cuda.split('.')[:2])}"


def commands() -> list[list[str]]:
    (block,) = re.findall(r"```\n(.*?)```", section(), flags=re.DOTALL)
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def test_the_readmes_commands_name_versions_of_the_set_and_all_that_the_extra_does() -> None:
    pinned = [word.split("==") for command in commands() for word in command if "==" in word]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name for name, _ in pinned} == set(extras["gpu"])
    for name, version in pinned:
        assert versions("constraints-gpu.txt")[name] == version
    assert [command[command.index("-c") + 1] for command in commands() if "-c" in command] == ["constraints-gpu.txt"]


@pytest.mark.parametrize("target", [".venv/ready", ".venv/kernels", ".venv-gpu/ready"])
def test_make_installs_by_a_set_that_has_all_that_it_names(target: str) -> None:
    made = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for line in made.stdout.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if "install" not in words or "--upgrade" in words:
            continue
        path = words[words.index("--constraint") + 1]
        packages = [word for word in words[words.index(path) + 1 :] if not word.startswith((".", "-"))]
        assert (path == FOR_GPUS) == (target == ".venv-gpu/ready")
        assert {name.lower() for name in packages} <= versions(path).keys()
