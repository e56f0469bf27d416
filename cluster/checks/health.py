"""What this machine is and has, without torch and without Ray: Python, packages, CPUs, memory, disks, limits, compiler.

Each function looks at one thing and returns Checks. `PROBES` lists them for `graftwork.cluster.checks.probes`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import graftwork
from graftwork.cluster.checks.probes import Check, Probe, broken, fine, refused, warning
from graftwork.cluster.drivers import num_gpus_here
from graftwork.cluster.machine import available_memory, num_cpus
from graftwork.cluster.session.scratch import scratch_place, scratch_problem
from graftwork.specs.figures import amount

# What pyproject.toml requires, and the least version of it.
REQUIREMENTS = {
    "ray": "2.60", "torch": "2.6", "torchvision": "", "deepspeed": "0.19.8", "mlflow": "3.0", "pydantic": "2.8",
    "pytorch-fid": "0.3", "scipy": "1.11", "scikit-learn": "", "safetensors": "0.8", "fsspec": "", "tenacity": "",
    "typer": "", "rich": "", "matplotlib": "", "PyYAML": "", "pillow": "11.3", "psutil": "", "diffusers": "0.42",
    "huggingface_hub": "", "peft": "0.21", "transformers": "5.23",
}  # fmt: skip
OTHERS = ("numpy", "triton", "s3fs", "mamba-ssm", "causal-conv1d", "flash-attn")  # whose versions matter where they are

MIN_MEMORY, WARN_MEMORY = 2**29, 2**31  # bytes that are available
MIN_DISK, WARN_DISK = 2**28, 5 * 2**30  # bytes that are free
MIN_INODES = 1000  # files that can still be made
RAY_DISK_SHARE = 0.95  # of a disk that is taken, beyond which Ray stores no objects on it
WARN_SHM = 2**30  # bytes of /dev/shm; containers have 64 MiB by themselves
MIN_FILES, WARN_FILES = 1024, 4096  # soft and hard limit of open files
WARN_PROCESSES = 4096  # Ray starts hundreds of threads a process
COMPILERS = {"C": ("CC", ("gcc", "clang", "cc")), "C++": ("CXX", ("g++", "clang++", "c++"))}
NOTABLE = ("LD_LIBRARY_PATH", "PYTHONPATH", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_TMPDIR", "TMPDIR")
NOTABLE_PREFIXES = ("CUDA_", "GLOO_", "HF_", "MLFLOW_", "NCCL_", "NVIDIA_", "OMP_", "TORCH", "TRITON_")
NAME_IT = "name it in /etc/hosts, or set GLOO_SOCKET_IFNAME to a network interface: training workers look it up"
PROXIES = ("http", "https", "all")
SOURCE = "#include <Python.h>\nint graftwork_seven(void) { return 7; }\n"


def check_python() -> Check:
    finding = f"{platform.python_version()} ({sys.executable}) on {platform.platform()}"
    return fine("python", finding, version=platform.python_version())


def check_code() -> Check:
    """Tell which graftwork this is: its version, and a hash of its source."""
    package = Path(graftwork.__file__).parent
    hashed = hashlib.sha256()
    for path in sorted(_source(package)):
        hashed.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    digest, number = hashed.hexdigest()[:12], _version("graftwork") or "not installed"
    return fine("graftwork", f"{number}, source {digest}, in {package}", version=number, source=digest)


def _source(package: Path) -> Iterator[Path]:
    """Yield the package's Python files, also those of folders that are links."""
    for folder, _, names in os.walk(package, followlinks=True):
        yield from (Path(folder) / name for name in names if name.endswith(".py"))


def check_packages() -> Check:
    """Hold what is installed against what graftwork requires."""
    versions = {name: number for name in (*REQUIREMENTS, *OTHERS) if (number := _version(name)) is not None}
    lacking = [name for name in REQUIREMENTS if name not in versions]
    old = [
        f"{name} {versions[name]} (at least {least})"
        for name, least in REQUIREMENTS.items()
        if name in versions and _numbers(versions[name]) < _numbers(least)
    ]
    if lacking or old:
        missing = [f"not installed: {', '.join(lacking)}"] if lacking else []
        finding = "; ".join([*missing, *([f"too old: {', '.join(old)}"] if old else [])])
        return broken("packages", finding, "install graftwork into this Python: pip install graftwork", **versions)
    main = ", ".join(f"{name} {versions[name]}" for name in ("ray", "torch", "deepspeed", "mlflow"))
    return fine("packages", f"{main}; {len(versions)} looked at", **versions)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: (2, 15) of `2.15.0+cu132`, without zeros at the end."""
    match = re.match(r"\d+(\.\d+)*", text)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def check_cpus() -> Check:
    usable, all_of_them = num_cpus(), os.cpu_count() or 1
    busy = os.getloadavg()[0]
    values = {"cpus": float(usable), "machine_cpus": float(all_of_them), "load": round(busy, 2)}
    finding = f"{usable} of {all_of_them} may be used; load {busy:.1f}"
    if usable == 1 < all_of_them:
        advice = "ask for more: docker --cpus, Slurm's --cpus-per-task (and --cpu-bind=none), or the pod's limits"
        return warning("cpus", finding, advice, **values)
    if busy > 2 * all_of_them:
        return warning("cpus", finding, "something else keeps them busy: times measured now say little", **values)
    return fine("cpus", finding, **values)


def check_memory() -> Check:
    import psutil

    machine, usable = psutil.virtual_memory(), available_memory()
    limited = ", within the control group's limit" if usable < machine.available else ""
    finding = f"{amount(usable)} available{limited}, of {amount(machine.total)}"
    values = {"available_bytes": float(usable), "machine_bytes": float(machine.total)}
    if usable < WARN_MEMORY:
        advice = "end other work, or raise the container's memory limit"
        return (broken if usable < MIN_MEMORY else warning)("memory", finding, advice, **values)
    return fine("memory", finding, **values)


def check_scratch() -> Iterator[Check]:
    """Look at the folder for temporary files, where Ray keeps its own."""
    if (problem := scratch_problem()) is not None:
        yield refused("temporary files", problem)
        return
    yield check_disk("temporary files", Path(scratch_place()), "RAY_TMPDIR or TMPDIR names another place")


def check_disk(name: str, folder: Path, advice: str) -> Check:
    """Check the free space of a folder, or of the nearest one above it that exists, and whether it can be written."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    usage = shutil.disk_usage(there)
    finding = f"{amount(usage.free)} free of {amount(usage.total)} in {folder}"
    values = {"free_bytes": float(usage.free), "total_bytes": float(usage.total)}
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(2**20))
            file.flush()
    except OSError as error:
        return broken(name, f"{finding}; it cannot be written ({error.strerror})", advice, **values)
    if usage.free < MIN_DISK:
        return broken(name, finding, advice, **values)
    inodes = os.statvfs(there)
    if inodes.f_files and inodes.f_favail < MIN_INODES:
        return broken(name, f"{finding}, but for only {inodes.f_favail} more files", advice, **values)
    if usage.free < WARN_DISK or usage.used > RAY_DISK_SHARE * (usage.used + usage.free):
        return warning(name, finding, advice, **values)
    return fine(name, finding, **values)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """Check /dev/shm: Ray passes objects through it, and NCCL connects the GPUs of a machine through it."""
    name, advice = (
        "shared memory",
        "give the container more: docker run --shm-size=16g, or an emptyDir of medium Memory",
    )
    if not folder.is_dir():
        return warning(name, f"no {folder}", "Ray keeps objects in temporary files instead, slower")
    usage = shutil.disk_usage(folder)
    finding = f"{amount(usage.free)} free of {amount(usage.total)} in {folder}"
    values = {"free_bytes": float(usage.free), "total_bytes": float(usage.total)}
    if not os.access(folder, os.W_OK):
        return broken(name, f"{finding}, which cannot be written", "mount it writable", **values)
    if usage.free < WARN_SHM:
        several = num_gpus_here() > 1  # whose NCCL ends in bus errors
        return (broken if several else warning)(name, finding, advice, **values)
    return fine(name, finding, **values)


def check_home() -> Check:
    """Look at the home folder: caches of Triton, torch.compile and the hub lie there."""
    advice = "HOME names a folder that can be written; or set HF_HOME and TRITON_HOME to some"
    folder = Path(os.path.expanduser("~"))  # noqa: PTH111  # pathlib's fails without a home
    if not folder.is_absolute() or not folder.is_dir():
        return warning("home", f"no folder {str(folder)!r}", advice)
    if not os.access(folder, os.W_OK | os.X_OK):
        return warning("home", f"{folder} cannot be written", advice)
    return fine("home", f"{folder} can be written")


def check_limits() -> Iterator[Check]:
    """Check how many files this user may open, and how many processes it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    hard = sys.maxsize if hard == infinite else hard
    finding = f"{soft} open files, at most {'any number' if hard == sys.maxsize else hard}"
    if soft < MIN_FILES or hard < WARN_FILES:
        advice = "raise it: ulimit -n 65536, or docker run --ulimit nofile=65536"
        yield (broken if soft < MIN_FILES // 4 else warning)("open files", finding, advice, soft=float(soft))
    else:
        yield fine("open files", finding, soft=float(soft))
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if processes != infinite and processes < WARN_PROCESSES:
        yield warning("processes", f"{processes} at most, threads included", "raise it: ulimit -u 65536")


def check_compilers() -> Iterator[Check]:
    """Compile and load a library: torch.compile and Triton do that, the latter with Python's headers."""
    for language, (variable, names) in COMPILERS.items():
        yield _compiler(language, os.environ.get(variable) or next(filter(shutil.which, names), None))


def _compiler(language: str, command: str | None) -> Check:
    name = f"{language} compiler"
    verdict = broken if language == "C" and num_gpus_here() else warning  # Triton's kernels want one
    use = "Triton's kernels and `compile: true` want it"
    if command is None:
        return verdict(name, "none", f"{use}: apt-get install build-essential, or the like")
    headers = sysconfig.get_path("include")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / ("seven.c" if language == "C" else "seven.cpp"), Path(folder) / "seven.so"
        source.write_text(SOURCE if language == "C" else 'extern "C" int graftwork_seven() { return 7; }\n')
        line = [*command.split(), "-shared", "-fPIC", f"-I{headers}", str(source), "-o", str(library)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["it fails"]
            hint = (
                f"Python's headers are missing: apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev"
            )
            return verdict(name, f"{command}: {lines[0]}", hint if "Python.h" in lines[0] else use)
        try:
            works = ctypes.CDLL(str(library)).graftwork_seven() == 7
        except OSError as error:  # as of a folder from which nothing may run
            return verdict(name, f"{command}: what it makes cannot be loaded ({error})", "TMPDIR without noexec")
    return fine(name, command) if works else verdict(name, f"{command} makes what does not work", use)


def check_loopback() -> Check:
    """Look at whether ports can be opened and reached."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=2).close()
    return fine("ports", "one can be opened on 127.0.0.1, and reached")


def check_host_name() -> Check:
    """Look up what this machine's name stands for, as training workers on CPUs do."""
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
        socket.create_server((address, 0)).close()
    except OSError as error:
        return warning("host name", f"{name}: {error.strerror or error}", NAME_IT)
    return fine("host name", f"{name} is {address}", address=address)


def check_environment(variables: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """Look at variables that change what happens: threads, proxies, hidden GPUs."""
    threads = variables.get("OMP_NUM_THREADS")
    if threads is not None and not re.fullmatch(r"\s*[1-9]\d*(,\s*[1-9]\d*)*\s*", threads):
        advice = "unset it, or set it to a positive number"
        yield warning("threads", f"OMP_NUM_THREADS is {threads!r}", advice)
    yield from _proxies(variables)
    visible, num_gpus = variables.get("CUDA_VISIBLE_DEVICES"), num_gpus_here()
    if num_gpus and visible is not None and (not visible or visible == "-1"):
        finding = f"CUDA_VISIBLE_DEVICES is {visible!r}: it hides {num_gpus} GPUs"
        yield warning("visible GPUs", finding, "unset it, unless that is meant")
    notable = [name for name in sorted(variables) if name in NOTABLE or name.startswith(NOTABLE_PREFIXES)]
    yield fine("environment", f"set: {', '.join(notable)}" if notable else "nothing set that changes what happens")


def _proxies(variables: Mapping[str, str]) -> Iterator[Check]:
    """Warn of a proxy that requests to this machine would go through."""
    named = {kind: variables.get(f"{kind}_proxy") or variables.get(f"{kind.upper()}_PROXY") for kind in PROXIES}
    proxies = {f"{kind}_proxy": value for kind, value in named.items() if value}
    if not proxies:
        return
    past = variables.get("no_proxy") or variables.get("NO_PROXY") or ""
    finding = ", ".join(f"{name} is {value}" for name, value in proxies.items())
    hosts = [host for host in ("localhost", "127.0.0.1") if not _bypasses(host, past)]
    if hosts:
        yield warning("proxy", f"{finding}; {' and '.join(hosts)} go through it, too", "no_proxy=localhost,127.0.0.1")
    else:
        yield fine("proxy", finding)


def _bypasses(host: str, past: str) -> bool:
    # `proxies` is a parameter of CPython's that its documentation leaves out.
    return bool(urllib.request.proxy_bypass_environment(host, {"no": past}))  # type: ignore[attr-defined]


HERE = "graftwork.cluster.checks.health"
PROBES = (
    Probe("python", f"{HERE}:check_python"),
    Probe("graftwork", f"{HERE}:check_code"),
    Probe("packages", f"{HERE}:check_packages", advice="make the environment anew"),
    Probe("cpus", f"{HERE}:check_cpus"),
    Probe("memory", f"{HERE}:check_memory"),
    Probe("temporary files", f"{HERE}:check_scratch", advice="RAY_TMPDIR or TMPDIR names another place"),
    Probe("shared memory", f"{HERE}:check_shared_memory"),
    Probe("home", f"{HERE}:check_home", advice="HOME names a folder that can be written"),
    Probe("open files", f"{HERE}:check_limits"),
    Probe("compiler", f"{HERE}:check_compilers", seconds=20.0, advice="look at what $CC and $CXX name"),
    Probe("ports", f"{HERE}:check_loopback", advice="let processes of this machine reach each other on 127.0.0.1"),
    Probe("host name", f"{HERE}:check_host_name", seconds=5.0, advice=NAME_IT, late="warning"),
    Probe("environment", f"{HERE}:check_environment"),
)
