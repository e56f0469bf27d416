"""DeepSpeed's engine on two real workers over gloo: ZeRO 1, 2 and 3, fp32 and bf16, resumed from whole tensors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import json, os, sys
import torch, torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
torch.set_num_threads(1)
dist.init_process_group("gloo")
from graftwork.cluster.training.deepspeed_engine import ShardedEngine
from graftwork.models.condition import Condition
from graftwork.models.lora import add_lora
from graftwork.models.operators import build_operator
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.models.numerics.streams import generator, initialising
from graftwork.specs.operators import NoOperator
from graftwork.specs.training import FinetuneSpec
from graftwork.stages.training.batches import Batch, share_of
from graftwork.stages.training.microbatches import parts
from graftwork.stages.training.engine import PlainEngine
from graftwork.stages.training.loop import set_up_blocks

def model():
    with initialising(0, "test"):
        made = DiT(DiTConfig(input_size=8, in_channels=1, patch=2, depth=2, width=12, heads=3, num_classes=3))
        made.blocks[0].mlp = build_operator(NoOperator(), made.config.place)  # a module without parameters
        made.initialise()
        torch.nn.init.normal_(made.final_layer.linear.weight, std=0.1)
    return made

def partly():  # LoRA, and one operator whole
    made = model()
    with initialising(0, "lora"):
        add_lora(made, 2, 4.0, ["attn.qkv", "mlp.fc1"], [made.blocks[1].attn])
    return made

def steps(engine, first, last, batch=4, passes=1):
    places = share_of(batch, dist.get_rank(), 2)
    mine = slice(places.start, places.stop)
    for step in range(first, last):
        draws = generator(0, "step", step)
        x, t, y = torch.randn(4, 1, 8, 8, generator=draws), torch.tensor([1, 9, 99, 999]), torch.tensor([0, 1, 2, 3])

        def loss_of(part):
            loss = engine(*part.batch[:3]).float().square().mean() * (part.samples * 2 / batch)
            return loss * 5 ** (step % 3)  # some gradients are longer than `clip` and some are not

        *others, end = parts(Batch(x[mine], t[mine], Condition(labels=y[mine]), x[mine]), passes)
        for part in others:
            engine.accumulate(loss_of(part))
        engine.step(loss_of(end), 1e-3)
    return engine

def state_of(engine):  # for all workers, of what the first one is given
    states = [engine.state()]
    global kept
    kept = sum(value.numel() for value in states[0].values())
    dist.broadcast_object_list(states, 0)
    return states[0]

def train(*args, **kwargs):
    return state_of(steps(*args, **kwargs))

class Asked(TorchDispatchMode):  # counts how often the host asks for a tensor's value
    times = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.times += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*args, **(kwargs or {}))

def asked(engine):
    steps(engine, 0, 2)
    with Asked() as mode:
        steps(engine, 2, 4)
    return mode.times / 2

def furthest(a, b):
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)

found = {}
plain = train(PlainEngine(model(), clip=1.0, ema=0.9, state=None), 0, 6)
uneven = train(PlainEngine(model(), clip=1.0, ema=0.9, state=None), 0, 6, batch=3)
frozen_plain = train(PlainEngine(partly(), clip=1.0, ema=0.9, state=None), 0, 6)
in_parts = train(PlainEngine(model(), clip=1.0, ema=0.9, state=None), 0, 6, batch=3, passes=2)
found["plain"] = {"parts_to_whole": furthest(uneven, in_parts)}
for zero in (1, 2, 3):
    for precision in ("fp32", "bf16"):
        recipe = FinetuneSpec(steps=6, batch=4, lr=1e-3, clip=1.0, ema=0.9, workers=2, precision=precision,
                              deepspeed={"zero": zero})
        straight = train(ShardedEngine(model(), recipe, None), 0, 6)
        half = train(ShardedEngine(model(), recipe, None), 0, 3)
        resumed = train(ShardedEngine(model(), recipe, half), 3, 6)
        saving = FinetuneSpec(**recipe.model_dump() | {"checkpointing": True})
        sparing = model()
        set_up_blocks(sparing, saving)
        keeps = kept
        parted = FinetuneSpec(**recipe.model_dump() | {"micro_batch": 1})
        whole = uneven if precision == "fp32" else train(ShardedEngine(model(), parted, None), 0, 6, batch=3)
        lora = [partly() for _ in range(3)]
        learned = train(ShardedEngine(lora[0], recipe, None), 0, 6)
        halfway = train(ShardedEngine(lora[1], recipe, None), 0, 3)
        found[f"zero{zero} {precision} lora"] = {
            "names": sorted(learned) == sorted(frozen_plain),
            "to_plain": furthest(learned, frozen_plain),
            "to_resumed": furthest(learned, train(ShardedEngine(lora[2], recipe, halfway), 3, 6)),
            "moved": furthest(learned, halfway),
        }
        found[f"zero{zero} {precision}"] = {
            "parts_to_whole": furthest(whole, train(ShardedEngine(model(), parted, None), 0, 6, batch=3, passes=2)),
            "kept": keeps,
            "to_sparing": furthest(straight, train(ShardedEngine(sparing, saving, None), 0, 6)),
            "names": sorted(straight) == sorted(plain),
            "to_plain": furthest(straight, plain),
            "to_resumed": furthest(straight, resumed),
            "fp32_weights": any(
                (value != value.bfloat16().float()).any().item()
                for name, value in straight.items() if name.startswith("weights/")
            ),
            "asked": asked(ShardedEngine(model(), recipe, None)),
            "moved": furthest(straight, half),
        }
open(f"{sys.argv[1]}{dist.get_rank()}", "w").write(json.dumps(found))
dist.barrier()
"""

FROZEN = [f"zero{zero} {precision} lora" for zero in (1, 2, 3) for precision in ("fp32", "bf16")]
ENGINES = [f"zero{zero} {precision}" for zero in (1, 2, 3) for precision in ("fp32", "bf16")]
Found = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two workers found for every engine."""
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder / "found")],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"{rank}.log").open("w"),
            cwd=Path(__file__).parent.parent,
        )
        for rank in (0, 1)
    ]
    codes = [worker.wait(240) for worker in workers]
    assert codes == [0, 0], (folder / "0.log").read_text()[-3000:]
    outcome, other = (json.loads((folder / f"found{rank}").read_text()) for rank in (0, 1))
    for engine in ENGINES:
        outcome[engine]["kept_by_other"] = other[engine]["kept"]
    return outcome


@pytest.mark.parametrize("engine", ENGINES + FROZEN)
def test_a_resumed_engine_ends_in_the_same_bits(found: Found, engine: str) -> None:
    assert found[engine]["moved"] > 0
    assert found[engine]["to_resumed"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_blocks_that_keep_no_activations_end_in_the_same_bits(found: Found, engine: str) -> None:
    assert found[engine]["to_sparing"] == 0


@pytest.mark.parametrize("engine", ENGINES + FROZEN)
def test_its_state_has_the_names_of_the_plain_engine(found: Found, engine: str) -> None:
    assert found[engine]["names"]


@pytest.mark.parametrize("trained", ["", " lora"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_in_fp32_it_does_what_the_plain_engine_does(found: Found, zero: int, trained: str) -> None:
    assert found[f"zero{zero} fp32{trained}"]["to_plain"] < 1e-4


@pytest.mark.parametrize("engine", ["plain", *ENGINES])
def test_a_batch_in_parts_of_unlike_size_makes_the_step_of_the_whole_batch(found: Found, engine: str) -> None:
    assert found[engine]["parts_to_whole"] < (2e-3 if "bf16" in engine else 1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_first_worker_alone_keeps_what_is_gathered(found: Found, engine: str) -> None:
    assert found[engine]["kept"] > 0 and found[engine]["kept_by_other"] == 0


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_in_bf16_the_weights_it_keeps_are_full_precision(found: Found, zero: int) -> None:
    assert found[f"zero{zero} bf16"]["fp32_weights"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_asks_the_device_for_nothing_but_what_zero_3_insists_on(found: Found, engine: str) -> None:
    assert found[engine]["asked"] == (1 if "zero3" in engine else 0)
