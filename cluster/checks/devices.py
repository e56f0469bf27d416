"""What torch can do on this machine: its GPUs, how fast they are, operators and kernels, processes that train together.

Each function looks at one thing and returns Checks. `PROBES` lists them for `graftwork.cluster.checks.probes`.
Knows nothing of Ray; torch loads when the first is called.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.cluster.checks.probes import Check, Probe, broken, fine, refused, warning
from graftwork.cluster.drivers import (
    built_for,
    driver_cuda,
    driver_version,
    gpu_problem,
    num_gpus_here,
    num_gpus_of_machine,
)
from graftwork.cluster.session.imports import code_folders
from graftwork.specs.figures import amount, flops
from graftwork.specs.operators import Accelerated, Place

if TYPE_CHECKING:
    import torch

    from graftwork.specs.operators import OperatorSpec

GET_TORCH = "a torch of one installation: pip install --force-reinstall torch torchvision (https://pytorch.org)"
MIN_FREE_SHARE = 0.9  # of a GPU's memory, when nothing of ours runs
MEASURE_SECONDS = 0.2  # of a speed
GPU_SIDE, CPU_SIDE = 8192, 768  # of the matrices that are multiplied
GPU_BYTES, CPU_BYTES = 2**30, 2**27  # that are copied
HOST_BYTES = 2**28  # that go from the host to a GPU
ALL_REDUCED = 2**24  # numbers, of 4 bytes, that two processes add
PEERS_SECONDS = 40
GPU_PLACE, CPU_PLACE = Place(width=1152, heads=16, num_tokens=256), Place(width=64, heads=4, num_tokens=64)
TOLERANCE = 0.05  # of a kernel in bf16, over the largest number of the definition


def check_torch() -> Iterator[Check]:
    """Load torch, and what is built for one version of it."""
    import torch

    torch.zeros(2).numpy()  # which a NumPy that torch was not built for refuses
    yield fine("torch", f"{torch.__version__}, built for {built_for()}", version=torch.__version__)
    if torch.version.cuda is None and num_gpus_here():
        advice = "a torch with CUDA: https://pytorch.org/get-started"
        yield broken("torch's CUDA", "this torch computes on CPUs only, and there are GPUs", advice)


def check_imports() -> Iterator[Check]:
    """Import what breaks where it was built for another torch, or looks for a compiler of CUDA."""
    for module, advice in (("torchvision", GET_TORCH), ("deepspeed", "pip install --force-reinstall deepspeed")):
        began = time.monotonic()
        try:
            if not num_gpus_here():
                os.environ["DS_ACCELERATOR"] = "cpu"
            __import__(module)
        except Exception as error:  # whatever its own code raises
            yield broken(f"import {module}", f"{type(error).__name__}: {error}", advice)
        else:
            yield fine(f"import {module}", f"in {time.monotonic() - began:.1f} s")


def check_gpus() -> Iterator[Check]:
    """Look at the driver, and at each GPU that torch sees."""
    import torch

    in_machine, here = num_gpus_of_machine(), num_gpus_here()
    if not here and not torch.cuda.is_available():
        yield _without_gpus(in_machine)
        return
    supported = driver_cuda()
    newest = f", for CUDA up to {supported[0]}.{supported[1]}" if supported else ""
    finding = f"NVIDIA {driver_version() or 'driver of an unknown version'}{newest}"
    if torch.version.hip:
        finding = f"AMD, for ROCm {torch.version.hip}"
    if (problem := gpu_problem()) is not None:
        yield refused("driver", f"{finding}; there is a GPU that {problem}")
        return
    yield fine("driver", finding, version=driver_version() or "unknown")
    yield from (_gpu(index) for index in range(torch.cuda.device_count()))


def _without_gpus(in_machine: int) -> Check:
    if in_machine:
        finding = f"the machine has {in_machine}, this container none"
        return warning(
            "GPU", finding, "docker run --gpus all, a pod's nvidia.com/gpu, or Slurm's --gres=gpu", count=0.0
        )
    return fine("GPU", "none: steps run on CPUs", count=0.0)


def _gpu(index: int) -> Check:
    import torch

    name, of = f"GPU {index}", torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    finding = f"{of.name}, {amount(free)} free of {amount(total)}, compute capability {of.major}.{of.minor}"
    values: dict[str, float | str] = {"model": of.name, "free_bytes": float(free), "total_bytes": float(total)}
    if free < MIN_FREE_SHARE * total:
        return warning(name, finding, "others use it: nvidia-smi shows who", **values)
    if (of.major, of.minor) < (8, 0):
        return warning(name, finding, "it has no fast bf16: set precision: fp32", **values)
    return fine(name, finding, **values)


# -- speeds


def check_matmul() -> Iterator[Check]:
    """Measure matrix products: on each GPU, or on one core, as a task on a CPU computes."""
    import torch

    torch.set_num_threads(1)
    for device, name in _devices():
        kinds = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
        speeds: dict[str, float | str] = {}
        for kind, dtype in kinds.items():
            if kind == "tf32" and device.type == "cpu":
                continue
            torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
            speeds[f"{kind}_flop_per_s"] = _matmul_speed(device, dtype)
        torch.set_float32_matmul_precision("highest")
        finding = ", ".join(f"{kind.partition('_')[0]} {flops(float(speed))}/s" for kind, speed in speeds.items())
        if device.type == "cuda":
            speeds["model"] = torch.cuda.get_device_name(device)
        yield fine(f"matmul{name}", finding, **speeds)


def _matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of the product of two square matrices."""
    import torch

    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _shortest(lambda: a @ b, device)


def check_bandwidth() -> Iterator[Check]:
    """Measure how fast memory is copied: bytes read plus bytes written."""
    import torch

    torch.set_num_threads(1)
    for device, name in _devices():
        speed = _copy_speed(device)
        values, finding = {"bytes_per_s": speed}, f"{amount(speed)}/s"
        if device.type == "cuda":
            values["host_bytes_per_s"] = _host_speed(device)
            finding += f"; from the host {amount(values['host_bytes_per_s'])}/s"
        yield fine(f"memory speed{name}", finding, **values)


def _copy_speed(device: torch.device) -> float:
    import torch

    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / _shortest(lambda: target.copy_(source), device)


def _host_speed(device: torch.device) -> float:
    import torch

    source = torch.ones(HOST_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return HOST_BYTES / _shortest(lambda: target.copy_(source, non_blocking=True), device)


def _devices() -> Iterator[tuple[torch.device, str]]:
    """Yield the devices to measure, each with the end of its check's name."""
    import torch

    if not torch.cuda.is_available():
        yield torch.device("cpu"), " (one core)"
        return
    for index in range(torch.cuda.device_count()):
        torch.cuda.set_device(index)
        yield torch.device("cuda", index), f" on GPU {index}"


def _shortest(work: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds that the work took, of several times."""
    import torch

    def timed() -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    timed(), timed()
    best, until = timed(), time.monotonic() + MEASURE_SECONDS
    while time.monotonic() < until:
        best = min(best, timed())
    return best


# -- operators and kernels


def check_operators() -> Iterator[Check]:
    """Run each operator's definition forward and back."""
    import torch

    from graftwork.models.operators import REGISTRY

    gpu = torch.cuda.is_available()
    place = GPU_PLACE if gpu else CPU_PLACE
    device = torch.device("cuda" if gpu else "cpu")
    specs = [_defined(kind.model_validate({})) for kind in REGISTRY]
    unfit = [spec.kind for spec in specs if not _is_finite(_run(spec, place, device, torch.float32))]
    if unfit:
        yield broken("operators", f"not finite: {', '.join(unfit)}", "another torch: these are plain PyTorch")
    else:
        yield fine("operators", f"{len(specs)} definitions run forward and back")
    if not gpu:
        yield fine("kernels", "none wanted: they run on GPUs only")


def check_kernel(kind: str) -> Iterator[Check]:
    """Hold the fused kernel of one kind of operator against its definition, on a GPU."""
    import torch

    from graftwork.models.operators import REGISTRY

    if torch.cuda.is_available():
        os.environ.setdefault("MAMBA_DETERMINISTIC", "1")  # one way to run its kernels, instead of trying dozens
        spec = next(spec for spec in (one.model_validate({}) for one in REGISTRY) if spec.kind == kind)
        yield _kernel(spec, GPU_PLACE, torch.device("cuda"))


def _defined(spec: OperatorSpec) -> OperatorSpec:
    """Return an operator's spec with its definition in plain PyTorch for a backend."""
    return spec.model_copy(update={"backend": "torch"}) if isinstance(spec, Accelerated) else spec


def _kernel(spec: OperatorSpec, place: Place, device: torch.device) -> Check:
    """Hold an operator's kernel against its definition, in bf16."""
    import torch

    from graftwork.models.operators.kernels import KernelUnavailable

    name, dtype = f"kernel of {spec.kind}", torch.bfloat16
    try:
        ours = _run(spec.model_copy(update={"backend": "kernel"}), place, device, dtype)
    except KernelUnavailable as reason:
        if "flash-attn" in str(reason):  # PyTorch's own attention is as fast
            return fine(name, f"none: {reason}")
        return warning(name, str(reason), "steps run its definition; faster kernels: docs/performance.md")
    except Exception as error:  # of a package built for another torch
        advice = "set backend: torch for this operator, and reinstall the kernel's package"
        return broken(name, f"{type(error).__name__}: {error}", advice)
    expected = _run(_defined(spec), place, device, dtype)
    # As tensors, whose largest is no number where one is none.
    worst = float(torch.stack([_distance(*pair) for pair in zip(ours, expected, strict=True)]).max())
    finding, values = f"off its definition by at most {worst:.1e}, with gradients", {"error": worst}
    if not worst <= TOLERANCE:
        return broken(
            name, finding, "set backend: torch for this operator: the kernel computes something else", **values
        )
    return fine(name, finding, **values)


def _distance(ours: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the largest difference, over the largest number that was expected."""
    return (ours.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-6)


def _run(spec: OperatorSpec, place: Place, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return an operator's output and all gradients, on inputs and weights that are always the same."""
    import torch

    from graftwork.models.operators import build_operator

    torch.manual_seed(0)
    operator = build_operator(spec, place).to(device)
    x = torch.randn(2, place.num_tokens, place.width).to(device).requires_grad_()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        y = operator(x)
    if y.requires_grad:  # else it depends on nothing
        y.float().square().mean().backward()
    gradients = [x.grad, *(value.grad for value in operator.parameters())]
    return [y.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _is_finite(tensors: list[torch.Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


# -- processes that train together


def check_peers() -> Check:
    """Have two processes add up numbers as training workers do: by NCCL on two GPUs, by gloo on CPUs."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 1:
        return fine("NCCL", "one GPU: nothing to talk to")
    backend, name = ("nccl", "NCCL") if count else ("gloo", "gloo")
    with tempfile.TemporaryDirectory() as folder:
        workers = [_start_peer(backend, rank, Path(folder) / "rendezvous") for rank in range(2)]
        ends = [_end_of(worker) for worker in workers]
    lost = next((text for code, text in ends if code), None)
    if lost is not None:
        advice = "shared memory, and NCCL_DEBUG=INFO says more" if count else "set GLOO_SOCKET_IFNAME=lo"
        return broken(name, f"two processes cannot add up numbers: {lost}", advice)
    speed = min(float(text) for _, text in ends)
    of = "two GPUs" if count else "two processes"
    return fine(name, f"{of} add up numbers, at {amount(speed)}/s", bytes_per_s=speed)


def _start_peer(backend: str, rank: int, rendezvous: Path) -> subprocess.Popen[str]:
    searched = [*code_folders(), *filter(None, [os.environ.get("PYTHONPATH")])]
    line = "import sys\nfrom graftwork.cluster.checks.devices import join\n"
    line += "join(sys.argv[1], int(sys.argv[2]), sys.argv[3])"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", line, backend, str(rank), str(rendezvous)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(searched)},
    )


def _end_of(worker: subprocess.Popen[str]) -> tuple[int, str]:
    """Return a peer's exit code, and the last line that it wrote."""
    try:
        out, errors = worker.communicate(timeout=PEERS_SECONDS)
    except subprocess.TimeoutExpired:
        worker.kill()
        return 1, f"no answer within {PEERS_SECONDS} s"
    lines = [line for line in (errors if worker.returncode else out).splitlines() if line.strip()]
    return worker.returncode, lines[-1] if lines else f"exit code {worker.returncode}"


def join(backend: str, rank: int, rendezvous: str) -> None:
    """Be one of two processes that add up numbers; print the bytes per second that each has added."""
    import torch
    import torch.distributed as dist
    from torch.distributed import FileStore  # type: ignore[attr-defined]  # handed on without saying so

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, store=FileStore(rendezvous, 2), rank=rank, world_size=2, timeout=timedelta(seconds=PEERS_SECONDS)
    )
    numbers = torch.full([ALL_REDUCED], float(rank + 1), device=device)
    dist.all_reduce(numbers)
    if not bool((numbers == 3).all()):
        raise ArithmeticError("their sum is wrong")

    def add() -> Any:
        return dist.all_reduce(numbers)

    began = time.perf_counter()
    add()
    if backend == "nccl":
        torch.cuda.synchronize()
    speed = 4 * ALL_REDUCED / (time.perf_counter() - began)
    dist.destroy_process_group()
    sys.stdout.write(f"{speed}\n")


def accelerated_kinds(of: type[Accelerated] = Accelerated) -> list[str]:
    """Return the kinds of operators that have kernels."""
    kinds = [kind for other in of.__subclasses__() for kind in accelerated_kinds(other)]
    return kinds or [str(of.model_fields["kind"].default)]


HERE = "graftwork.cluster.checks.devices"
LOST = "nvidia-smi says whether a GPU is lost"
COMPILING = "look again: what was compiled by then is kept; else set backend: torch for this operator"
PROBES = (
    Probe("torch", f"{HERE}:check_torch", seconds=40.0, advice=GET_TORCH),
    Probe("GPU", f"{HERE}:check_gpus", seconds=20.0, advice="nvidia-smi must answer; else restart the machine"),
    Probe("matmul", f"{HERE}:check_matmul", seconds=30.0, advice=LOST),
    Probe("memory speed", f"{HERE}:check_bandwidth", seconds=20.0, advice=LOST),
    Probe("operators", f"{HERE}:check_operators", seconds=30.0, advice=GET_TORCH),
    Probe("peers", f"{HERE}:check_peers", seconds=PEERS_SECONDS + 5.0, advice="NCCL_DEBUG=INFO says more"),
    *(
        Probe(f"kernel of {kind}", f"{HERE}:check_kernel", kind, 25.0, COMPILING, late="warning")
        for kind in accelerated_kinds()
    ),
)
IMPORTS = Probe("imports", f"{HERE}:check_imports", seconds=40.0, advice=GET_TORCH)
