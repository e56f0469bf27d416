"""What this machine's GPU makes of Graftwork, in one command and a few minutes: `make gpu`.

    python -m benchmarks.gpu [--json FILE]                         DiT-XL/2 and PixArt-Sigma-XL/2, on an NVIDIA GPU
    python -m benchmarks.gpu --device cpu --small [--json FILE]    the same code at toy sizes, anywhere

Measured are the peak of matrix products; every operator against its definition in plain PyTorch, forward and back, by
whatever kernel is installed; and, against the public way in the same run, a training step, the distillation of one site
and sampling of DiT at 256 px, and PixArt-Sigma with its published graft at 2048 px. Weights are random: nothing is
downloaded.

It needs torch, with the Triton that comes with it, and pydantic; all but operators and sampling also numpy,
safetensors, PyYAML and psutil. A part is skipped, and said to be, if its package is absent, or if memory or time do not
suffice. Neither Ray nor DeepSpeed, MLflow or diffusers is imported. `of peak` is over a large matrix product measured
here in the same precision, `of data sheet` over the vendor's figure for the SXM card. Times on a GPU are by its own
clock, after a warm-up, and medians.

Exit status: 0; 1 if some kernel or loop does not come to what its counterpart does; 2 if there is nothing to run on.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.command_line import parser

if TYPE_CHECKING:
    from graftwork.specs.training import Precision

BEGIN_SECONDS = 330.0  # after which no further part is begun, so that all is over within eight minutes
STATE_BYTES = 14e9  # of DiT-XL/2's weights, gradients, moments and averages
FULL_BYTES, FULL_BATCH = 75e9, 32  # of a GPU's memory, and the samples of a training step that fit it, with the state
NO_GPU = 2
DIFFER = 1
APART = 5e-3  # that a kernel may be, beside a few times what rounding makes of the definition
DISTILLED_APART = 0.02  # that the first epoch's held-out errors of both ways may be
SAMPLED_APART = 1e-3  # that a pixel of a latent may be after a few steps in fp32, over the largest

# Of a run on a GPU, and of a small one: what the scripts of those names are told.
DISTILLATION = (
    "--width 1152 --depth 28 --heads 16 --samples 1024 --epochs 4 --sites 1 --one-task",
    "--width 32 --depth 2 --heads 2 --side 8 --samples 16 --epochs 2 --batch 8 --sites 1 --one-task --precision fp32",
)
TRAINING = (
    "--rounds 1 --no-deepspeed",
    "--width 32 --depth 2 --heads 2 --side 8 --samples 16 --batch 4 --warmup 1 --points 3 --rounds 1 "
    "--loader-workers 0 --no-compile --no-deepspeed",
)
PIXART = (
    "--no-diffusers --rounds 2",
    "--no-diffusers --rounds 1 --pixels 32 --layers 2 --width 32 --heads 2 --caption-channels 16 --text-tokens 8 "
    "--steps 2 --precision fp32",
)


@dataclass(frozen=True)
class Sizes:
    """What operators and samplers are measured at."""

    depth: int
    width: int
    heads: int
    tokens: int
    batch: int  # of an operator
    samples: int  # that are drawn together
    steps: int  # of the sampler
    runs: int  # that a median is of


SIZES = (Sizes(28, 1152, 16, 256, 64, 16, 50, 10), Sizes(2, 32, 2, 16, 2, 2, 3, 2))


@dataclass
class Session:
    """The machine, and what was measured on it so far."""

    device: Any
    small: bool
    began: float = field(default_factory=time.monotonic)
    parts: list[dict[str, Any]] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)  # FLOP/s of a matrix product, by precision

    @property
    def sizes(self) -> Sizes:
        return SIZES[self.small]

    @property
    def precision(self) -> Precision:
        return "fp32" if self.small else "bf16"

    @property
    def compiles(self) -> bool:
        return not self.small and not self.late

    @property
    def late(self) -> bool:
        return time.monotonic() - self.began > BEGIN_SECONDS

    def line(self, arguments: tuple[str, str]) -> list[str]:
        return arguments[self.small].split()

    def require(self, what: str, agrees: bool) -> bool:
        if not agrees:
            self.differing.append(what)
        return agrees

    def of_data_sheet(self, of_peak: float) -> dict[str, float]:
        """Of a row in the run's precision; empty for a card whose data sheet is not known here."""
        known = data_sheet().get(self.precision)
        return {"of data sheet": of_peak * self.peaks[self.precision] / known} if known else {}


def main() -> None:
    options = arguments()
    if find_spec("torch") is None or find_spec("pydantic") is None:
        refuse("torch and pydantic are needed: pip install torch pydantic")
    if options.device == "cpu" and not options.small:
        refuse("--device cpu: accepted only with --small: DiT-XL/2 would take hours on a CPU")
    session = started(usable_device(options.device), options.small)
    for title, measure in PARTS.items():
        part = attempt(session, title, measure)
        session.parts.append({"title": title, **part})
        if options.json is not None:  # after each part, so that a run that is ended early leaves what it had
            options.json.write_text(json.dumps(whole(session), indent=1) + "\n")
    print(f"\nall: {time.monotonic() - session.began:.0f} s" + (f"; {options.json}" if options.json else ""))
    if session.differing:
        print("DIFFERS: " + "; ".join(session.differing))
        raise SystemExit(DIFFER)


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--small", action="store_true", help="toy sizes, which show that all runs, and no speed")
    return made.parse_args()


def started(device: Any, small: bool) -> Session:
    from benchmarks import report

    if small:
        report.LARGE["cpu"] = (256, 2**20)
    return Session(device, small)


def refuse(line: str) -> None:
    print(line, file=sys.stderr)
    raise SystemExit(NO_GPU)


def usable_device(kind: str) -> Any:
    """The device; ends the process in one line if torch cannot compute on it."""
    import torch

    from graftwork.cluster.drivers import gpu_problem

    if kind == "cuda" and (problem := gpu_problem()) is not None:
        refuse(f"no GPU here, or one that {problem}; or --device cpu --small")
    return torch.device(kind)


def attempt(session: Session, title: str, measure: Callable[[Session], dict[str, Any]]) -> dict[str, Any]:
    """A part's rows and facts, printed; or why it was skipped."""
    import torch

    from benchmarks.report import show_table

    gc.collect()  # what the part before held on the GPU
    began = time.monotonic()
    if session.late:
        skipped = f"{BEGIN_SECONDS:.0f} s had passed"
    else:
        try:
            part = measure(session)
            part["facts"]["seconds of this part"] = time.monotonic() - began
            show_table(title, part["rows"], part["facts"])
            return part
        except ModuleNotFoundError as error:
            skipped = f"{error.name} is not installed"
        except torch.cuda.OutOfMemoryError as error:
            skipped = f"the GPU's memory does not suffice: {str(error).splitlines()[0]}"
            torch.cuda.empty_cache()
    print(f"\n{title}: skipped: {skipped}", flush=True)
    return {"skipped": skipped}


def whole(session: Session) -> dict[str, Any]:
    from benchmarks.report import machine
    from graftwork.cluster.drivers import driver_version

    facts = {**machine(), "driver": driver_version() or "none", "small": session.small}
    took = {"seconds": time.monotonic() - session.began}
    return {"title": "GPU", **facts, **took, "parts": session.parts, "differing": session.differing}


# -- the machine


def measure_machine(session: Session) -> dict[str, Any]:
    import torch

    from benchmarks import report
    from graftwork.cluster.drivers import driver_version
    from graftwork.models.numerics.precision import products

    rows = []
    precisions: tuple[Precision, ...] = ("bf16", "tf32", "fp32")
    for precision in precisions:
        if session.small and precision != session.precision:
            continue
        with products(precision):
            limits = report.limits(session.device, precision)
        session.peaks[precision] = limits.flops
        known = data_sheet().get(precision)
        sheet = {"data sheet": known / 1e12, "of data sheet": limits.flops / known} if known else {}
        rows.append({"precision": precision, "TFLOP/s of a matrix product": limits.flops / 1e12, **sheet})
    facts = {**report.machine(), "driver": driver_version() or "none", "GB/s of a copy": limits.bandwidth / 1e9}
    if session.device.type == "cuda":
        card = torch.cuda.get_device_properties(session.device)
        facts |= {"memory, GB": card.total_memory / 1e9, "compute capability": f"{card.major}.{card.minor}"}
    return {"rows": rows, "facts": facts}


def data_sheet() -> Mapping[Precision, float]:
    """The card's dense peak by the vendor, FLOP/s by precision; empty for one that is not known here."""
    import torch

    if not torch.cuda.is_available() or find_spec("yaml") is None:  # without which the plan's estimates do not load
        return {}
    from graftwork.pipeline.estimates.speeds import PEAKS

    name = torch.cuda.get_device_name()
    return next((peaks for card, peaks in PEAKS.items() if card in name), {})


# -- operators


def measure_operators(session: Session) -> dict[str, Any]:
    from benchmarks.operators import OPERATORS
    from graftwork.models.operators import kernels
    from graftwork.specs.operators import Place

    sizes = session.sizes
    place = Place(sizes.width, sizes.heads, sizes.tokens)
    kernels.DECISIONS.clear()
    rows = [operator_row(session, spec, place) for spec in OPERATORS]
    passed_over = {
        f"{decision.operator}, why not {decision.kernel}": decision.obstacle
        for decision in kernels.DECISIONS
        if decision.obstacle is not None
    }
    facts = {"width, tokens, batch": f"{sizes.width}, {sizes.tokens}, {sizes.batch}", "precision": session.precision}
    return {"rows": rows, "facts": facts | passed_over}


def operator_row(session: Session, spec: Any, place: Any) -> dict[str, Any]:
    """An operator by its kernels, and by its definition alone; both against the definition in fp64."""
    import torch

    from benchmarks import report
    from benchmarks.operators import TRAINING as PASSES
    from benchmarks.operators import pass_of
    from graftwork.models.operators import build_operator
    from graftwork.specs.costs import operator_cost

    device, sizes = session.device, session.sizes
    dtype = torch.bfloat16 if session.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    operator = build_operator(spec, place).to(device)
    plain = build_operator(defined(spec), place).to(device)
    plain.load_state_dict(operator.state_dict())
    x, gradient = torch.randn(2, sizes.batch, place.num_tokens, place.width, device=device, dtype=dtype)
    ours = answers(operator, x[:2], gradient[:2], session.precision)
    with definitions_only():
        rounded = answers(plain, x[:2], gradient[:2], session.precision)
        exact = answers(build_like(plain, defined(spec), place).double(), x[:2].double(), gradient[:2].double(), "fp32")
    apart = {name: distance(ours[name], value) for name, value in exact.items()}
    allowed = {name: 4 * distance(rounded[name], value) + APART for name, value in exact.items()}
    worst = max(apart, key=lambda name: apart[name] - allowed[name])
    agrees = session.require(f"{spec.kind}: {worst} is {apart[worst]:.2g} apart", apart[worst] <= allowed[worst])
    x.requires_grad_()
    ours_seconds = report.median_seconds(pass_of(operator, x, gradient, session.precision), device, sizes.runs)
    with definitions_only():
        plain_seconds = report.median_seconds(pass_of(plain, x, gradient, session.precision), device, sizes.runs)
    floor = PASSES * operator_cost(spec, place).flops * sizes.batch / session.peaks[session.precision]
    return {
        "operator": spec.kind,
        "computed by": ", ".join(kernels_of(spec.kind)) or "PyTorch",
        "ms": ours_seconds * 1e3,
        "of the definition, ms": plain_seconds * 1e3,
        "times faster": plain_seconds / ours_seconds,
        "of peak": floor / ours_seconds,
        **session.of_data_sheet(floor / ours_seconds),
        "furthest apart": f"{worst} {apart[worst]:.2g}",
        "agrees": "yes" if agrees else "NO",
    }


def kernels_of(operator: str) -> list[str]:
    """The kernels to which its calls went."""
    from graftwork.models.operators import kernels

    return sorted({one.kernel for one in kernels.DECISIONS if one.operator == operator and one.obstacle is None})


def defined(spec: Any) -> Any:
    return spec.model_copy(update={"backend": "torch"}) if "backend" in type(spec).model_fields else spec


def build_like(operator: Any, spec: Any, place: Any) -> Any:
    """Another one with the same weights."""
    from graftwork.models.operators import build_operator

    made = build_operator(spec, place).to(next(operator.parameters()).device)
    made.load_state_dict(operator.state_dict())
    return made


def answers(operator: Any, x: Any, gradient: Any, precision: Any) -> dict[str, Any]:
    """The output's gradients by name: of the input, and of every weight; and the output."""
    import torch

    from benchmarks.operators import pass_of
    from graftwork.models.numerics.precision import computing

    x = x.detach().clone().requires_grad_()
    with torch.no_grad(), computing(precision, x.device):
        output = operator(x)
    names = ["input", *(name for name, _ in operator.named_parameters())]
    return {"output": output, **dict(zip(names, pass_of(operator, x, gradient, precision)(), strict=True))}


def distance(one: Any, other: Any) -> float:
    """Relative, by the norm."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


@contextmanager
def definitions_only() -> Iterator[None]:
    """Have a sliding window computed by its definition: on a GPU, FlexAttention stands in for that."""
    from graftwork.models.operators import attention

    with patch.object(attention, "on_gpu", lambda x: False):
        yield


# -- against the public way


def measure_training(session: Session) -> dict[str, Any]:
    from benchmarks import finetuning

    chosen = finetuning.options(not session.small).parse_args(session.line(TRAINING))
    chosen.compile = chosen.compile and session.compiles
    chosen.batch = fitting(session, chosen.batch)
    with tempfile.TemporaryDirectory() as folder:
        rows, facts = finetuning.one_device(finetuning.work_of(chosen), chosen, session.device, Path(folder))
    rows = [row | session.of_data_sheet(row["of_peak"]) for row in rows]
    facts["not measured"] = "DeepSpeed's engine: benchmarks/finetuning.py"
    return {"rows": rows, "facts": facts}


def fitting(session: Session, batch: int) -> int:
    """As large a power of two, up to the batch, as a smaller card has the memory for."""
    import torch

    if session.device.type != "cuda":
        return batch
    room = torch.cuda.get_device_properties(0).total_memory - STATE_BYTES
    while batch > 1 and batch * (FULL_BYTES - STATE_BYTES) > FULL_BATCH * room:
        batch //= 2
    return batch


def measure_distillation(session: Session) -> dict[str, Any]:
    from statistics import fmean

    from benchmarks import distillation, report
    from graftwork.models.surgery import new_scion
    from graftwork.stages.distillation import distill
    from graftwork.stages.distillation.sources import choose_source, task_state

    options = distillation.arguments(session.line(DISTILLATION))
    with tempfile.TemporaryDirectory() as folder:
        work = distillation.prepared(options, Path(folder), session.device)
        public, public_errors, written = distillation.public_way(work)
        (edit,) = work.edits
        context = distillation.context_of(work, edit, (), {})

        def ours() -> list[tuple[float, float, float]]:
            task = task_state(context)
            train, heldout = choose_source(task, context)
            scion = new_scion(task.teacher.model, edit, 0).to(session.device)
            return distill.fit(scion, train, heldout, "l1", context)

        history: list[tuple[float, float, float]] = []
        with report.peak_memory(session.device) as peak:
            seconds = report.timed(lambda: history.extend(ours()), session.device)
            memory = peak()
        flops = distillation.floor_flops(options, work)
    errors = [heldout for _, _, heldout in history]
    apart = abs(errors[0] / public_errors[edit.site][0] - 1)
    session.require(f"distillation: held-out errors are {apart:.2g} apart", apart <= DISTILLED_APART)
    floor = flops / session.peaks[session.precision]
    rows = [
        {"way": name, "s": took, "times faster": public["all"] / took, "of peak": floor / took,
         **session.of_data_sheet(floor / took)}
        for name, took in (("public, through files", public["all"]), ("ours, in memory", seconds))
    ]  # fmt: skip
    facts = {
        "site, samples, epochs": f"{edit.site}, {options.samples}, {options.epochs}",
        "operator": options.operator,
        "of the public way, recording": public["extracting"],
        "of the public way, GB written": written / 1e9,
        "peak memory of ours, GB": memory or "not measured on a CPU",
        "held-out errors apart, first epoch": apart,
        "held-out errors apart, mean": abs(fmean(errors) / fmean(public_errors[edit.site]) - 1),
    }
    return {"rows": rows, "facts": facts}


def measure_sampling(session: Session) -> dict[str, Any]:
    import torch

    from benchmarks import report
    from benchmarks.public_sampling import public_sample
    from graftwork.models.condition import Condition
    from graftwork.models.numerics.precision import computing
    from graftwork.models.numerics.streams import SampleNoise
    from graftwork.models.rootstocks.dit import DiT, DiTConfig
    from graftwork.models.sampling import sample
    from graftwork.specs.costs import rootstock_cost
    from graftwork.specs.sampler import AncestralSampler

    device, sizes = session.device, session.sizes
    config = DiTConfig(
        input_size=2 * math.isqrt(sizes.tokens),
        in_channels=4,
        patch=2,
        depth=sizes.depth,
        width=sizes.width,
        heads=sizes.heads,
        num_classes=1000,
    )
    with device:
        model = report.random_weights(DiT(config).eval())
    condition = Condition(labels=torch.arange(sizes.samples, device=device) % config.num_classes)
    shape, conditioner = config.latent_shape, config.conditioner

    def ours(network: Any, precision: Any, steps: int) -> Any:
        noise = SampleNoise(0, range(sizes.samples), shape, device)
        with computing(precision, device):
            return sample(
                network,
                condition,
                noise,
                sampler=AncestralSampler(steps=steps),
                conditioner=conditioner,
                objective=config.objective,
                bounded=False,
            )

    def public(steps: int, reduced: bool) -> Any:
        return public_sample(
            model,
            condition,
            iter(noise),
            sampler=AncestralSampler(steps=steps),
            conditioner=conditioner,
            bounded=False,
            tf32=reduced,
        )

    draw = SampleNoise(0, range(sizes.samples), shape, device)
    noise = [draw() for _ in range(sizes.steps)]  # the public way is given its noise for nothing
    few = min(4, sizes.steps)
    one, other = ours(model, "fp32", few), public(few, reduced=False)
    apart = float((one - other).abs().max() / other.abs().max())
    session.require(f"sampling: latents are {apart:.2g} apart in fp32", apart <= SAMPLED_APART)
    precision = session.precision
    ways: dict[str, Callable[[], Any]] = {
        "public, tf32": partial(public, sizes.steps, reduced=True),
        "ours, tf32": partial(ours, model, "tf32", sizes.steps),
        f"ours, {precision}": partial(ours, model, precision, sizes.steps),
    }
    if session.compiles:
        ways[f"ours, {precision}, compiled"] = partial(ours, torch.compile(model), precision, sizes.steps)
    passes = sizes.samples * sizes.steps * (1 if AncestralSampler().guidance == 1.0 else 2)
    flops = passes * rootstock_cost(config, config.place, config.in_channels, config.num_classes).flops
    rows: list[dict[str, Any]] = []
    for name, way in ways.items():
        with report.peak_memory(device) as peak:
            took = report.median_seconds(way, device, runs=2, warmup=1)
            memory = {"peak GB": peak()} if device.type == "cuda" else {}
        faster = {"times faster": rows[0]["s"] / took if rows else 1.0}
        of_peak = flops / session.peaks[precision] / took
        rows.append({"way": name, "s": took, **faster, f"of peak, {precision}": of_peak,
                     **session.of_data_sheet(of_peak), **memory})  # fmt: skip
    facts = {
        "samples, steps": f"{sizes.samples}, {sizes.steps} ancestral, guided",
        "latents apart in fp32": apart,
        "not measured": "the VAE and the scores, which want diffusers and pytorch-fid: benchmarks/sampling.py",
    }
    return {"rows": rows, "facts": facts}


def measure_pixart(session: Session) -> dict[str, Any]:
    from benchmarks import pixart

    options = pixart.arguments().parse_args(session.line(PIXART))
    rows, facts = pixart.measured(options, session.device)
    for line in pixart.disagreements(facts):
        session.require(f"PixArt: {line}", False)
    facts["not measured"] = "diffusers' model and pipeline, and the VAE, which want diffusers: benchmarks/pixart.py"
    return {"rows": rows, "facts": facts}


PARTS: dict[str, Callable[[Session], dict[str, Any]]] = {
    "Machine": measure_machine,
    "Operators, forward and back": measure_operators,
    "A training step of DiT": measure_training,
    "Distillation of a site": measure_distillation,
    "Sampling": measure_sampling,
    "A pass and an image of PixArt": measure_pixart,
}


if __name__ == "__main__":
    main()
