"""Models as files: what is read, what is refused, what others can read of ours."""

from __future__ import annotations

import argparse
import collections
import copy
import json
import os
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path, PosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graftwork import models
from graftwork.models import checkpoints
from graftwork.models.checkpoints import Card, ExportRefused, UnfitCheckpoint, export
from graftwork.models.checkpoints.files import Tensors, read_tensors
from graftwork.models.checkpoints.fit import shapes_of, weightless
from graftwork.models.checkpoints.layouts.diffusers import rootstock_transformer, wrapped
from graftwork.models.checkpoints.recognition import Found, recognised
from graftwork.models.operators import REGISTRY
from graftwork.models.rootstocks import Rootstock
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.models.rootstocks.sit import SiT, SiTConfig
from graftwork.models.surgery import graft
from graftwork.specs.edits import Edit, Parallel, Site
from graftwork.specs.operators import (
    HyenaSE,
    HyenaX,
    HyenaY,
    Mamba2,
    Mha,
    Mlp,
    MlpHyenaX,
    NoOperator,
    OperatorSpec,
    Swa,
)
from graftwork.specs.rootstock import SIZES
from tests.small import TINY, Batch, lively

pytestmark = pytest.mark.usefixtures("one_thread")


def edits(*pairs: tuple[int, OperatorSpec]) -> tuple[Edit, ...]:
    """Operators in blocks, in the first target that each may stand in."""
    return tuple(Edit(site=Site(block=block, target=min(op.targets)), operator=op) for block, op in pairs)


GRAFTS = edits((1, HyenaSE(kernel=3)), (2, Mlp(ratio=1.5)))
DROPPED = (
    Edit(site=Site(block=1, target="mha"), operator=NoOperator()),
    Edit(site=Site(block=1, target="mlp"), operator=NoOperator()),
    Edit(site=Site(block=3, target="mlp"), operator=Mlp(ratio=1.5)),
)
PAIR = (*GRAFTS, Edit(site=Site(block=0, target="pair"), operator=Parallel()))


@pytest.fixture
def grafted(model: DiT) -> DiT:
    return lively(graft(model, GRAFTS, seed=0), seed=1)


def same(found: nn.Module, expected: nn.Module) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    ours, theirs = found.state_dict(), expected.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def refusal(source: str | Path, **settings: Any) -> str:
    """The message, one line that begins with what was read."""
    with pytest.raises(UnfitCheckpoint) as caught:
        checkpoints.read(source, **settings)
    message = str(caught.value)
    assert message.startswith(str(source)) and "\n" not in message and len(message) < 2000
    assert "pydantic" not in message
    return message


# -- ours


@pytest.mark.parametrize("made", [(), GRAFTS, PAIR], ids=["rootstock", "graft", "parallel"])
def test_a_model_comes_back_from_its_folder_bit_for_bit(batch: Batch, tmp_path: Path, made: tuple[Edit, ...]) -> None:
    model = lively(graft(DiT(TINY), made, seed=0), seed=1)
    checkpoints.save(model, made, tmp_path)
    for found, found_edits in (checkpoints.load(tmp_path), checkpoints.read(tmp_path)):
        assert found_edits == made and found.config == TINY
        assert torch.equal(found(*batch), model(*batch))


def test_the_weights_alone_are_read_with_the_config_beside_them(grafted: DiT, tmp_path: Path) -> None:
    checkpoints.save(grafted, GRAFTS, tmp_path)
    found, found_edits = checkpoints.read(tmp_path / "model.safetensors")
    assert found_edits == GRAFTS and same(found, grafted)


def test_a_model_folder_holds_tensors_and_json_only(grafted: DiT, tmp_path: Path) -> None:
    checkpoints.save(grafted, GRAFTS, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["format"] == "graftwork.dit/1"


def test_a_model_folder_does_not_tell_where_its_scions_lay(grafted: DiT, tmp_path: Path) -> None:
    checkpoints.save(grafted, [edit.model_copy(update={"scions": "/home/me/graft.pt"}) for edit in GRAFTS], tmp_path)
    assert "/home/me" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("kind", REGISTRY, ids=lambda kind: kind.__name__)
def test_any_operator_comes_back_whole(kind: type[OperatorSpec], batch: Batch, tmp_path: Path) -> None:
    # Models are made without memory and then take the file's tensors: what is not among those must not be lost.
    made = edits((1, kind()))  # type: ignore[call-arg]
    model = lively(graft(DiT(TINY), made, seed=0))
    checkpoints.save(model, made, tmp_path)
    assert torch.equal(checkpoints.load(tmp_path)[0](*batch), model(*batch))


def test_a_model_that_was_read_can_be_trained(grafted: DiT, batch: Batch, tmp_path: Path) -> None:
    export_published(grafted, tmp_path / "model.pt", "ema")
    before = (tmp_path / "model.pt").read_bytes()
    model, _ = checkpoints.read(tmp_path / "model.pt", heads=2)
    model(*batch).square().sum().backward()
    with torch.no_grad():
        for value in model.parameters():
            assert value.grad is not None
            value.sub_(value.grad)
    name = "final_layer.linear.weight"
    assert not torch.equal(model.get_parameter(name), grafted.get_parameter(name))
    assert (tmp_path / "model.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_weights_lie_in_memory_as_torch_allocates_them(grafted: DiT, tmp_path: Path, name: str) -> None:
    # A matrix product rounds by how its weights are aligned: read or made, a model has to put out the same bits.
    checkpoints.save(grafted, GRAFTS, tmp_path)
    torch.save(grafted.state_dict(), tmp_path / "model.pt")
    model, _ = checkpoints.read(tmp_path / name, heads=2)
    assert all(value.data_ptr() % 64 == 0 for value in model.parameters())


def test_weights_of_another_precision_become_the_models(model: DiT, tmp_path: Path) -> None:
    torch.save({name: value.half() for name, value in model.state_dict().items()}, tmp_path / "half.pt")
    found, _ = checkpoints.read(tmp_path / "half.pt", heads=2)
    assert {value.dtype for value in found.state_dict().values()} == {torch.float32}


def test_the_package_loads_a_model_ready_to_be_called(grafted: DiT, batch: Batch, tmp_path: Path) -> None:
    checkpoints.save(grafted, GRAFTS, tmp_path)
    found = models.load(tmp_path)
    assert not found.training and torch.equal(found(*batch), grafted(*batch))


def test_the_package_takes_the_heads_that_its_own_error_asks_for(grafted: DiT, batch: Batch, tmp_path: Path) -> None:
    torch.save(grafted.state_dict(), tmp_path / "model.pt")
    with pytest.raises(UnfitCheckpoint, match=r"name their number$"):
        models.load(tmp_path / "model.pt")
    assert torch.equal(models.load(tmp_path / "model.pt", heads=2)(*batch), grafted(*batch))


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parent.parent).returncode == 0


# -- what does not fit


def test_a_tensor_of_another_shape_is_named_with_both_shapes(model: DiT) -> None:
    state = model.state_dict()
    state["final_layer.linear.bias"] = torch.zeros(7)
    with pytest.raises(UnfitCheckpoint) as caught:
        checkpoints.fill(model, state, "other.pt")
    assert str(caught.value) == "other.pt: does not fit the model: final_layer.linear.bias: (7,), expected (24,)"


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_tensor_too_few_or_too_many_is_named(model: DiT, change: str) -> None:
    state = model.state_dict()
    if change == "missing":
        del state["pos_embed"]
    else:
        state["unknown"] = torch.zeros(1)
    with pytest.raises(UnfitCheckpoint, match="pos_embed" if change == "missing" else "unknown"):
        checkpoints.fill(model, state, "other.pt")


def test_an_unfit_checkpoint_leaves_the_model_as_it_was(model: DiT) -> None:
    before = copy.deepcopy(model.state_dict())
    state = {name: value + 1 for name, value in before.items()}
    state["pos_embed"] = torch.zeros(3)
    with pytest.raises(UnfitCheckpoint):
        checkpoints.fill(model, state, "other.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_of_another_rootstock_names_three_tensors_and_counts_the_rest(model: DiT, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "other.pt")
    wide = DiTConfig(**{**TINY.__dict__, "width": 32})
    message = refusal(tmp_path / "other.pt", config=wide)
    wanted = DiT(wide).state_dict()
    differing = sum(value.shape != wanted[name].shape for name, value in model.state_dict().items())
    assert message.count("expected") == 3 and message.endswith(f"and {differing - 3} more")


def test_a_model_of_another_kind_is_no_dit(tmp_path: Path) -> None:
    torch.save({f"layer{n}.weight": torch.zeros(2) for n in range(30)}, tmp_path / "resnet.pt")
    message = refusal(tmp_path / "resnet.pt")
    assert "is no DiT, has no x_embedder.proj.weight" in message
    assert message.endswith("; holds layer0.weight, layer1.weight, layer10.weight, and 27 more")


def test_a_damaged_block_names_its_tensor(model: DiT, tmp_path: Path) -> None:
    state = model.state_dict()
    state["blocks.2.attn.qkv.weight"] = torch.zeros(40, 16)
    torch.save(state, tmp_path / "model.pt")
    assert refusal(tmp_path / "model.pt", heads=2).endswith("blocks.2.attn.qkv.weight: (40, 16), expected (48, 16)")


def test_an_operator_that_nobody_registered_is_named_with_those_that_are(model: DiT, tmp_path: Path) -> None:
    state = {
        name.replace("blocks.1.attn.qkv", "blocks.1.attn.to_qkv"): value for name, value in model.state_dict().items()
    }
    torch.save(state, tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt", heads=2)
    assert "blocks.1.attn.to_qkv.weight: (48, 16)" in message
    known = message.rpartition("expected the tensors of one of ")[2].split(", ")
    assert set(known) == {"mha", "swa", "hyena_se", "hyena_x", "hyena_y", "mamba2"}  # not none, which has no tensors


# -- what training tools wrap around a model


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def lit_ema(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Averages as latent diffusion's LitEma keeps them: without the dots in a name, and of what is trained alone."""
    trained = {name: value for name, value in state.items() if name != "pos_embed"}
    averages = {f"model_ema.diffusion_model{name.replace('.', '')}": value for name, value in trained.items()}
    buffers = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)}
    plain = prefixed(zeros(trained) | {"pos_embed": state["pos_embed"]}, "model.diffusion_model.")
    return plain | averages | buffers


def inside_blocks(state: Mapping[str, Tensor], wrapper: str) -> dict[str, Tensor]:
    """Each block in a module of its own, as torch.compile or FSDP, called block by block, puts it."""
    return {re.sub(r"(blocks\.\d+)\.", rf"\1.{wrapper}.", name): value for name, value in state.items()}


WRAPPERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "DDP": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "DDP of a compiled model": lambda s: prefixed(s, "module._orig_mod."),
    "a compiled DDP": lambda s: prefixed(s, "_orig_mod.module."),
    "a prefix that nobody listed": lambda s: prefixed(s, "my_trainer.nets.student."),
    "averages of a DDP": lambda s: {"ema": prefixed(s, "module."), "model": prefixed(zeros(s), "module."), "opt": {}},
    "averages within one state dict": lambda s: prefixed(zeros(s), "net.") | prefixed(s, "ema_model.module."),
    "AveragedModel": lambda s: {**prefixed(s, "module."), "n_averaged": torch.tensor(3)},
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "epoch": 1, "hyper_parameters": {"lr": 1e-4}},
    "Lightning with averages": lambda s: {"state_dict": prefixed(zeros(s), "net.") | prefixed(s, "net_ema.")},
    "latent diffusion": lambda s: {"state_dict": prefixed(s, "model.diffusion_model.")},
    "latent diffusion with averages": lambda s: {"state_dict": lit_ema(s)},
    "DeepSpeed": lambda s: {"module": s, "ds_version": "0.19", "optimizer": None, "global_steps": 7},
    "dicts in dicts": lambda s: {"state": {"weights": {"model": s}}, "step": 5},
    "blocks compiled one by one": lambda s: inside_blocks(s, "_orig_mod"),
    "blocks of FSDP": lambda s: prefixed(inside_blocks(s, "_fsdp_wrapped_module"), "_fsdp_wrapped_module."),
    "counters beside the tensors": lambda s: {**s, "epoch": 3, "best_fid": 2.25},
}


def zeros(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in state.items()}


@pytest.mark.parametrize("how", WRAPPERS)
def test_what_a_training_tool_wraps_around_a_model_is_taken_off(grafted: DiT, tmp_path: Path, how: str) -> None:
    content = WRAPPERS[how](grafted.state_dict())
    torch.save(content, tmp_path / "model.pt")
    found, found_edits = checkpoints.read(tmp_path / "model.pt", heads=2)
    assert same(found, grafted) and found_edits == GRAFTS
    if all(isinstance(value, Tensor) for value in content.values()):
        save_file({name: value.clone() for name, value in content.items()}, tmp_path / "model.safetensors")
        assert same(checkpoints.read(tmp_path / "model.safetensors", heads=2)[0], grafted)


def test_of_several_models_it_is_said_which_is_read(model: DiT, tmp_path: Path) -> None:
    state = model.state_dict()
    wrapped = prefixed(state, "net.") | prefixed(state, "net_ema.") | {"vae.conv.weight": torch.ones(2)}
    torch.save({"state_dict": wrapped}, tmp_path / "last.ckpt")
    assert checkpoints.check(tmp_path / "last.ckpt", TINY) == (
        f"{tmp_path}/last.ckpt: state_dict.net_ema is read, not state_dict.net",
        f"{tmp_path}/last.ckpt: 1 tensor beside state_dict.net_ema left out: vae.conv.weight",
    )
    torch.save(state, tmp_path / "plain.pt")
    assert checkpoints.check(tmp_path / "plain.pt", TINY) == ()


def test_of_several_models_of_equal_right_none_is_guessed(model: DiT, tmp_path: Path) -> None:
    torch.save({"teacher": model.state_dict(), "student": model.state_dict()}, tmp_path / "model.pt")
    assert refusal(tmp_path / "model.pt", heads=2).endswith(
        "holds several models: teacher, student; accepted: one of them, in a file of its own"
    )


def test_an_optimizer_that_knows_tensors_by_name_is_no_model(model: DiT, tmp_path: Path) -> None:
    state = model.state_dict()
    torch.save({"model": state, "optimizer": {"exp_avg": zeros(state)}}, tmp_path / "model.pt")
    assert same(checkpoints.read(tmp_path / "model.pt", heads=2)[0], model)


def test_a_wrapped_model_of_diffusers_is_read(theirs: Any, batch: Batch, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(prefixed(load_file(file), "_orig_mod."), file)
    model, _ = checkpoints.read(tmp_path)
    torch.testing.assert_close(model(*batch), outputs(as_dit(theirs), batch), rtol=1e-5, atol=1e-5)


def test_a_refusal_shows_the_names_that_a_file_has_beside_those_expected(model: DiT, tmp_path: Path) -> None:
    state = {name.replace("x_embedder", "patch_embed"): value for name, value in model.state_dict().items()}
    torch.save(prefixed(state, "module."), tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt", heads=2)
    assert "has no x_embedder.proj.weight" in message and "holds module.blocks.0.adaLN_modulation.1.bias, " in message


def test_names_that_do_not_fit_stand_beside_those_that_are_missing(model: DiT, tmp_path: Path) -> None:
    state = {name.replace("final_layer.adaLN", "final_layer.ada_ln"): v for name, v in model.state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    assert refusal(tmp_path / "model.pt", heads=2).endswith(
        "does not fit the model: missing final_layer.adaLN_modulation.1.bias, final_layer.adaLN_modulation.1.weight; "
        "has final_layer.ada_ln_modulation.1.bias, final_layer.ada_ln_modulation.1.weight, expected none of that name"
    )


# -- folders, and files in parts


def in_parts(state: Mapping[str, Tensor], folder: Path, suffix: str = ".safetensors") -> list[Path]:
    """Two files with half of the tensors each; returns them."""
    folder.mkdir(exist_ok=True)
    names, files = sorted(state), []
    for number, some in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        files.append(folder / f"model-{number:05d}-of-00002{suffix}")
        save = save_file if suffix == ".safetensors" else torch.save
        save({name: state[name].clone() for name in some}, files[-1])
    return files


def write_index(files: list[Path], **changed: str) -> Path:
    """The index beside files of tensors. changed: other files for tensors."""
    weight_map = {name: file.name for file in files for name in read_tensors(file).shapes}
    suffix = files[0].suffix
    index = files[0].with_name(f"{files[0].name.split('-')[0]}{suffix}.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map | changed}))
    return index


@pytest.mark.parametrize("by", ["folder", "index", "one of its parts"])
@pytest.mark.parametrize("indexed", [True, False], ids=["with an index", "without"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_checkpoint_in_parts_is_read(model: DiT, tmp_path: Path, suffix: str, indexed: bool, by: str) -> None:
    files = in_parts(prefixed(model.state_dict(), "module."), tmp_path, suffix)
    index = write_index(files) if indexed else None
    source = {"folder": tmp_path, "index": index, "one of its parts": files[1]}[by]
    if source is not None:
        assert same(checkpoints.read(source, heads=2)[0], model)


@pytest.mark.parametrize("indexed", [True, False], ids=["with an index", "without"])
def test_a_missing_part_is_named(model: DiT, tmp_path: Path, indexed: bool) -> None:
    files = in_parts(model.state_dict(), tmp_path)
    if indexed:
        write_index(files)
    files[1].unlink()
    assert "model-00002-of-00002.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "..", "a/../../b.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(model: DiT, tmp_path: Path, name: str) -> None:
    files = in_parts(model.state_dict(), tmp_path / "parts")
    save_file(model.state_dict(), tmp_path / "elsewhere.safetensors")
    index = write_index(files, pos_embed=name)
    assert refusal(index) == f"{index}: names {name}, expected files beside it"


def test_parts_that_hold_a_tensor_twice_are_refused(model: DiT, tmp_path: Path) -> None:
    _, second = in_parts(model.state_dict(), tmp_path)
    save_file(load_file(second) | {"blocks.0.attn.proj.bias": torch.zeros(16)}, second)
    assert refusal(tmp_path).endswith("has blocks.0.attn.proj.bias, as another part of its checkpoint has")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "in parts"])
def test_what_accelerate_saves_is_read(model: DiT, tmp_path: Path, file: str) -> None:
    for other in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "scaler.pt"):
        torch.save({"state": {0: torch.zeros(2)}}, tmp_path / other)
    if file == "in parts":
        write_index(in_parts(model.state_dict(), tmp_path))
    else:
        (save_file if file.endswith("safetensors") else torch.save)(model.state_dict(), tmp_path / file)
    assert same(checkpoints.read(tmp_path, heads=2)[0], model)


def test_of_a_folder_of_several_it_is_said_which_is_read(model: DiT, tmp_path: Path) -> None:
    for name in ("model.safetensors", "model_1.safetensors"):
        save_file(model.state_dict(), tmp_path / name)
    assert checkpoints.check(tmp_path, TINY) == (f"{tmp_path}: model.safetensors is read, not model_1.safetensors",)
    (tmp_path / "model_1.safetensors").rename(tmp_path / "model_ema.safetensors")
    assert checkpoints.check(tmp_path, TINY) == (f"{tmp_path}: model_ema.safetensors is read, not model.safetensors",)


@pytest.mark.parametrize("given", ["the folder", "a step in it"])
def test_parts_of_zero_are_refused_with_the_tool_that_joins_them(model: DiT, tmp_path: Path, given: str) -> None:
    step = tmp_path / "global_step10"
    step.mkdir()
    (tmp_path / "latest").write_text("global_step10")
    torch.save({"module": model.state_dict(), "ds_version": "0.19"}, step / "mp_rank_00_model_states.pt")
    for rank in (0, 1):
        torch.save({}, step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    source = tmp_path if given == "the folder" else step
    assert f"zero_to_fp32.py joins them in: python {tmp_path}/zero_to_fp32.py {tmp_path} OUT" in refusal(source)
    assert same(checkpoints.read(step / "mp_rank_00_model_states.pt", heads=2)[0], model)


def test_a_file_of_zero_3_holds_no_weights(model: DiT, tmp_path: Path) -> None:
    empty = {name: torch.zeros(0) for name in model.state_dict()}
    torch.save({"module": empty, "ds_version": "0.19"}, tmp_path / "mp_rank_00_model_states.pt")
    assert "zero_to_fp32.py" in refusal(tmp_path / "mp_rank_00_model_states.pt")


def test_a_link_to_the_latest_checkpoint_is_not_deepspeeds(model: DiT, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "0050000.pt")
    (tmp_path / "latest").symlink_to("0050000.pt")
    assert same(checkpoints.read(tmp_path, heads=2)[0], model)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_what_git_lfs_left_of_a_file_is_told_from_a_checkpoint(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2700000000\n"
    (tmp_path / name).write_text(pointer)
    assert refusal(tmp_path / name).endswith("accepted: the file, which git lfs pull fetches")


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "MODEL.SAFETENSORS"])
def test_a_files_format_is_known_by_its_content(model: DiT, tmp_path: Path, name: str) -> None:
    save_file(model.state_dict(), tmp_path / name)
    assert same(checkpoints.read(tmp_path / name, heads=2)[0], model)


def test_a_file_of_torchs_in_another_formats_name_is_told_from_it(model: DiT, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "model.safetensors")
    assert refusal(tmp_path / "model.safetensors").endswith(
        "is torch's, by its content; accepted: a file of torch's with a name in .pt"
    )


def test_a_distributed_checkpoint_of_torch_is_refused_with_the_tool_that_joins_it(tmp_path: Path) -> None:
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / name).touch()
    assert f"dcp_to_torch {tmp_path} OUT.pt" in refusal(tmp_path)


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnfitCheckpoint, match="pipe: neither a file nor a folder"):
        checkpoints.read(tmp_path / "pipe")


def test_a_folder_without_a_checkpoint_names_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "events.log").touch()
    assert refusal(tmp_path).startswith(f"{tmp_path}: no checkpoint in it, but events.log; accepted: a .pt or ")


# -- what a file says of itself


def save_with(state: dict[str, Tensor], folder: Path, where: str, said: dict[str, Any]) -> Path:
    """A checkpoint that says this of itself; returns it."""
    path = folder / ("model.safetensors" if where == "metadata" else "model.pt")
    content: dict[str, Any] = {"ema": state}
    match where:
        case "a Namespace":
            content["args"] = argparse.Namespace(global_seed=0, **said)
        case "a dict in a dict":
            content["config"] = {"trainer": {"loss": said}}
        case "hyper_parameters":
            content = {"state_dict": prefixed(state, "model."), "hyper_parameters": {"cfg": said}}
        case "a config.json beside":
            (folder / "config.json").write_text(json.dumps(said))
        case "a hparams.yaml beside":
            (folder / "hparams.yaml").write_text(yaml.safe_dump({"model": said}))
        case "metadata":
            text = {
                f"modelspec.{name}": value if isinstance(value, str) else json.dumps(value)
                for name, value in said.items()
            }
            save_file(state, path, text)
            return path
    torch.save(content, path)
    return path


PLACES = [
    "a Namespace",
    "a dict in a dict",
    "hyper_parameters",
    "a config.json beside",
    "a hparams.yaml beside",
    "metadata",
]
OTHERS: list[dict[str, Any]] = [
    {"path-type": "linear", "prediction": "v", "proj_coeff": 0.5},  # REPA
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"parameterization": "x0"},
    {"objective": "pred_v"},
    {"objective": "flow matching"},
    {"predict_xstart": True},
    {"use_flow_matching": True},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"model_type": "LightningDiT-XL/1"},
    {"model": "U-ViT-L/2"},
]


@pytest.mark.parametrize("said", OTHERS, ids=str)
def test_a_file_of_another_objective_is_refused_in_its_own_words(model: DiT, tmp_path: Path, said: Any) -> None:
    message = refusal(save_with(model.state_dict(), tmp_path, "a Namespace", said), heads=2)
    for name, value in said.items():
        assert f"args.{name} {value!r}" in message or name == "proj_coeff"
    assert message.endswith("of 1000 steps with linear betas; or a SiT: velocity, linear path")


@pytest.mark.parametrize("where", PLACES)
def test_what_a_file_says_is_read_wherever_it_says_it(model: DiT, tmp_path: Path, where: str) -> None:
    path = save_with(model.state_dict(), tmp_path, where, {"path_type": "GVP", "prediction": "score"})
    message = refusal(path, heads=2)
    assert "path_type 'GVP'" in message and "prediction 'score'" in message


SIT: list[dict[str, Any]] = [
    {"path_type": "Linear", "prediction": "velocity", "loss_weight": None, "sample_eps": None},
    {"model": "SiT-T/2", "image_size": 256},
    {"prediction": "velocity"},
]


@pytest.mark.parametrize("said", SIT, ids=str)
@pytest.mark.parametrize("where", PLACES)
def test_a_file_that_says_that_it_is_a_sit_is_read_as_one(model: DiT, tmp_path: Path, where: str, said: Any) -> None:
    path = save_with(model.state_dict(), tmp_path, where, said)
    found, _ = checkpoints.read(path, heads=2)
    assert isinstance(found, SiT) and found.config.objective.kind == "velocity"
    torch.testing.assert_close(found.state_dict(), model.state_dict())
    with pytest.raises(UnfitCheckpoint, match=r"says that it is a sit, expected a dit; accepted: model\.kind sit"):
        checkpoints.check(path, TINY)
    assert checkpoints.check(path, SiTConfig(**asdict(TINY))) is not None


@pytest.mark.parametrize("said", [{"model": "SiT-T/2", "prediction": "noise"}, {"path_type": "Linear", "pred": "eps"}])
def test_a_flow_model_that_predicts_noise_is_neither(model: DiT, tmp_path: Path, said: Any) -> None:
    torch.save({"ema": model.state_dict(), "args": said}, tmp_path / "file.pt")
    for config in (TINY, SiTConfig(**asdict(TINY))):
        with pytest.raises(UnfitCheckpoint, match=r"is of another objective or model, as it says: .*(noise|eps)"):
            checkpoints.check(tmp_path / "file.pt", config)


def test_what_a_bare_file_leaves_unsaid_is_said(model: DiT, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "file.pt")
    (note,) = checkpoints.check(tmp_path / "file.pt", SiTConfig(**asdict(TINY)))
    assert "does not say what it predicts" in note and "taken for a sit, as model.kind says" in note
    assert checkpoints.check(tmp_path / "file.pt", TINY) == ()


def test_a_dit_is_not_taken_for_a_sit(model: DiT, tmp_path: Path) -> None:
    path = save_with(model.state_dict(), tmp_path, "a Namespace", {"model": "DiT-T/2"})
    with pytest.raises(UnfitCheckpoint, match="says that it is a dit, expected a sit"):
        checkpoints.check(path, SiTConfig(**asdict(TINY)))


def test_a_file_that_says_nothing_is_what_the_job_says(model: DiT, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert type(checkpoints.read(tmp_path / "model.pt", config=SiTConfig(**asdict(TINY)))[0]) is SiT
    assert type(checkpoints.read(tmp_path / "model.pt", config=TINY)[0]) is DiT


@pytest.mark.parametrize("layout", ["graftwork", "published"])
def test_a_sit_is_exported_and_stays_one(model: DiT, tmp_path: Path, layout: Any) -> None:
    torch.save({"ema": model.state_dict(), "args": {"model": "SiT-S/2"}}, tmp_path / "sit.pt")
    export(tmp_path / "sit.pt", tmp_path / "out", layout, heads=2)
    found, _ = checkpoints.read(tmp_path / "out")
    assert type(found) is SiT and found.config == SiTConfig(**asdict(TINY))
    with pytest.raises(ExportRefused, match="is a sit, for which diffusers has no class"):
        export(tmp_path / "sit.pt", tmp_path / "other", "diffusers", heads=2)


OURS: list[dict[str, Any]] = [
    {"model": "DiT-T/2", "image_size": 256, "num_classes": 1000, "vae": "ema", "ckpt": None, "lr": 1e-4},
    {"prediction": "noise", "path_type": None, "use_flow_matching": False},
    {"prediction_type": "epsilon", "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"objective": "pred_noise", "loss_type": "l2", "parameterization": "eps", "num_train_timesteps": 1000},
    {"beta_start": "1e-4", "type": "x", "loss_type": "mse"},  # YAML reads 1e-4 as text
    {"name": "sit-down", "vae": "stabilityai/sd-vae-ft-mse", "sampler": "ddim", "results_dir": "flow/velocity"},
]


@pytest.mark.parametrize("said", OURS, ids=str)
@pytest.mark.parametrize("where", PLACES)
def test_a_file_that_says_that_it_is_a_dit_is_read(model: DiT, tmp_path: Path, where: str, said: Any) -> None:
    path = save_with(model.state_dict(), tmp_path, where, said)
    assert same(checkpoints.read(path, config=TINY)[0], model)


@pytest.mark.parametrize("name", ["LightningDiT-XL-1.pt", "MDTv2-S-2.safetensors"])
def test_a_published_file_of_another_family_is_known_by_its_name(model: DiT, tmp_path: Path, name: str) -> None:
    (save_file if name.endswith("safetensors") else torch.save)(model.state_dict(), tmp_path / name)
    assert "is of another model, by its name" in refusal(tmp_path / name, heads=2)
    (tmp_path / name).rename(tmp_path / "DiT-XL-2-256x256.pt")
    assert same(checkpoints.read(tmp_path / "DiT-XL-2-256x256.pt", heads=2)[0], model)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}),
        ("model_index.json", {"_class_name": "SiTPipeline"}),
        ("transformer/config.json", {"_class_name": "SiTTransformer2DModel"}),
        ("transformer/config.json", {"_class_name": "Lumina2Transformer2DModel"}),
    ],
    ids=str,
)
def test_a_pipeline_of_another_objective_is_refused(
    theirs: Any, tmp_path: Path, file: str, said: dict[str, Any]
) -> None:
    theirs.save_pretrained(tmp_path / "transformer")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    before = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps(before | said))
    assert list(said.values())[-1] in refusal(tmp_path)


FAMILIES: dict[str, dict[str, tuple[int, ...]]] = {
    "LightningDiT": {"blocks.0.attn.q_norm.weight": (8,), "blocks.0.mlp.w12.weight": (64, 16)},
    "SwiGLU": {"blocks.0.mlp.w12.weight": (64, 16), "blocks.0.mlp.w3.weight": (16, 32)},
    "MDT": {"mask_token": (1, 1, 16), "en_inblocks.0.attn.qkv.weight": (48, 16), "decoder_pos_embed": (1, 16, 16)},
    "MaskDiT": {"mask_token": (1, 1, 16), "decoder_blocks.0.attn.qkv.weight": (48, 16)},
    "U-DiT": {"encoder_level_1.0.attn.qkv.weight": (48, 16)},
    "REPA": {"projectors.0.0.weight": (32, 16)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_another_family_with_a_dits_names_is_refused_by_what_it_has_of_its_own(
    model: DiT, tmp_path: Path, family: str
) -> None:
    own = {name: torch.zeros(shape) for name, shape in FAMILIES[family].items()}
    torch.save(model.state_dict() | own, tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt", heads=2)
    assert "is no DiT but a model " in message and any(name in message for name in own)


# -- what else a file holds


class Setting:
    """A class of somebody's own, which nothing here may call."""


def plain_values() -> dict[str, Any]:
    return {
        "best_fid": np.float64(2.5),
        "losses": np.arange(3, dtype=np.float32),
        "rng": np.random.default_rng(0).bit_generator.state["bit_generator"],
        "args": argparse.Namespace(model="DiT-T/2", results_dir=PosixPath("results"), home=PureWindowsPath("C:/runs")),
        "meters": collections.OrderedDict(loss=1.0),
        "counts": collections.Counter("aab"),
        "groups": collections.defaultdict(list, {"a": [1]}),
        "recent": collections.deque([1, 2], maxlen=5),
        "began": datetime(2026, 1, 1, tzinfo=UTC),
        "took": timedelta(hours=1),
        "tags": {"a", "b"},
        "kinds": frozenset({1}),
        "dtype": torch.float32,
        "version": torch.__version__,
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", plain_values())
def test_values_that_mean_nothing_but_themselves_are_allowed(
    model: DiT, tmp_path: Path, name: str, legacy: bool
) -> None:
    content = {"ema": model.state_dict(), name: plain_values()[name]}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    assert same(checkpoints.read(tmp_path / "model.pt", config=TINY)[0], model)


def test_names_of_other_versions_of_numpy_and_python_are_allowed(model: DiT, tmp_path: Path) -> None:
    content = {"ema": model.state_dict(), "fid": np.float64(2.5), "out": PosixPath("results")}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    old = (tmp_path / "model.pt").read_bytes()
    for new, other in ((b"numpy._core.multiarray", b"numpy.core.multiarray"), (b"cpathlib\n", b"cpathlib._local\n")):
        assert new in old
        old = old.replace(new, other)
    (tmp_path / "model.pt").write_bytes(old)
    assert same(checkpoints.read(tmp_path / "model.pt", heads=2)[0], model)


def test_a_class_of_somebodys_own_is_refused_with_a_way_to_convert_the_file(model: DiT, tmp_path: Path) -> None:
    torch.save({"ema": model.state_dict(), "settings": Setting()}, tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt")
    assert f"refused, unpickling it would call {__name__}.Setting; accepted: tensors" in message
    assert "torch.save(torch.load(FILE, weights_only=False)[NAME], NEW_FILE)" in message


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": lambda x: x.to(torch.int8),
    "uint8": lambda x: x.to(torch.uint8),
    "bool": lambda x: x > 0,
    "float8_e4m3fn": lambda x: x.to(torch.float8_e4m3fn),
    "complex64": lambda x: x.to(torch.complex64),
    "sparse_coo float32": lambda x: x.to_sparse(),
    "quint8": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "float32 without values (meta)": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_cannot_be_computed_with_are_named_before_any_is_read(
    model: DiT, tmp_path: Path, suffix: str, kind: str
) -> None:
    state = dict(model.state_dict())
    state["blocks.0.mlp.fc1.weight"] = ODD[kind](state["blocks.0.mlp.fc1.weight"])
    if suffix == ".safetensors" and kind.startswith(("sparse", "quint", "float32")):
        pytest.skip("safetensors hold none")
    (torch.save if suffix == ".pt" else save_file)(state, tmp_path / f"model{suffix}")
    for problem in (refusal(tmp_path / f"model{suffix}", heads=2), unfit(tmp_path / f"model{suffix}")):
        assert problem.endswith(f"blocks.0.mlp.fc1.weight: holds {kind}, expected float32")


def unfit(path: Path) -> str:
    """What is said before any tensor is read."""
    with pytest.raises(UnfitCheckpoint) as caught:
        checkpoints.check(path, TINY)
    return str(caught.value)


def test_weights_in_four_bits_are_refused_by_what_they_are(model: DiT, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    name = "blocks.0.mlp.fc1.weight"
    state[name] = torch.zeros(state[name].numel() // 2, 1, dtype=torch.uint8)
    state |= {f"{name}.absmax": torch.zeros(16), f"{name}.quant_map": torch.zeros(16)}
    save_file(state, tmp_path / "model.safetensors")
    assert refusal(tmp_path / "model.safetensors", heads=2).endswith(f"{name}: holds uint8, expected float32")


# -- published files


def export_published(model: DiT, path: Path, *parts: str, name: str = "DiT-T/2") -> dict[str, dict[str, Tensor]]:
    """Write a file as DiT's training script does; returns the state dicts in it."""
    states = {part: {name: value + n for name, value in model.state_dict().items()} for n, part in enumerate(parts)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    args = argparse.Namespace(model=name, image_size=256, lr=1e-4, data_path="/data", ckpt=None, flags=[1, 2.5])
    torch.save({**states, "opt": optimizer.state_dict(), "args": args}, path)
    return states


@pytest.mark.parametrize("parts", [("model", "ema"), ("model",)], ids=["with averages", "without"])
def test_of_a_published_file_the_averaged_weights_are_read_if_there(
    model: DiT, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    states = export_published(model, tmp_path / "model.pt", *parts)
    found, found_edits = checkpoints.read(tmp_path / "model.pt", heads=2)
    assert found.config == TINY and found_edits == ()
    assert all(torch.equal(value, states[parts[-1]][name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_bare_state_dict_is_read(model: DiT, tmp_path: Path, legacy: bool) -> None:
    torch.save(model.state_dict(), tmp_path / "dit.pt", _use_new_zipfile_serialization=not legacy)
    assert same(checkpoints.read(tmp_path / "dit.pt", heads=2)[0], model)


def test_safetensors_without_a_config_are_read_by_their_names(grafted: DiT, tmp_path: Path) -> None:
    save_file(grafted.state_dict(), tmp_path / "graft.safetensors")
    found, _ = checkpoints.read(tmp_path / "graft.safetensors", heads=2)
    assert same(found, grafted)


@pytest.mark.parametrize("how", ["the only file", "model.pt among others"])
def test_a_folder_is_read_by_its_checkpoint(model: DiT, tmp_path: Path, how: str) -> None:
    torch.save(model.state_dict(), tmp_path / "model.pt")
    if how == "the only file":
        (tmp_path / "model.pt").rename(tmp_path / "DiT.pt")
    else:
        torch.save({}, tmp_path / "another.pt")
    assert same(checkpoints.read(tmp_path, heads=2)[0], model)


def of_shapes(model: Rootstock) -> Found:
    """The model as a file of which only names and shapes can be seen."""

    def unread(name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    return Found(Tensors("model.pt", shapes_of(model.state_dict()), unread))


@pytest.mark.parametrize("letter", SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_a_published_size_is_known_by_its_shapes(letter: str, patch: int) -> None:
    depth, width, heads = SIZES[letter]
    config = DiTConfig(
        input_size=32,
        in_channels=4,
        patch=patch,
        depth=depth,
        width=width,
        heads=heads,
        num_classes=1000,
        learn_sigma=patch == 2,
    )
    assert recognised(of_shapes(weightless(config, ())), None, None) == (config, ())


def test_heads_that_no_file_and_no_size_tells_are_asked_for(model: DiT, tmp_path: Path) -> None:
    export_published(model, tmp_path / "model.pt", "ema")
    assert "4 blocks of width 16 are no published size" in refusal(tmp_path / "model.pt")
    assert checkpoints.read(tmp_path / "model.pt", heads=4)[0].config.heads == 4


def test_heads_are_those_of_the_model_that_was_trained(tmp_path: Path) -> None:
    config = DiTConfig(input_size=4, in_channels=1, patch=2, depth=1, width=24, heads=6, num_classes=2)
    export_published(DiT(config), tmp_path / "model.pt", "ema", name="DiT-S/2")
    assert checkpoints.read(tmp_path / "model.pt")[0].config == config
    assert refusal(tmp_path / "model.pt", heads=3).endswith("has 6 attention heads, expected 3")


SETTINGS = [
    Swa(),
    HyenaSE(),
    HyenaSE(kernel=7),
    HyenaX(),
    HyenaX(kernel=2),
    HyenaY(),
    HyenaY(kernel=16),
    Mamba2(),
    Mamba2(d_state=16, d_conv=3, expand=3, headdim=8),
    Mlp(ratio=3),
    Mlp(ratio=6),
    Mlp(ratio=1.5),
    MlpHyenaX(),
    MlpHyenaX(ratio=3, kernel=5),
]


@pytest.mark.parametrize("scion", SETTINGS, ids=repr)
def test_a_scion_and_its_settings_are_known_by_its_tensors(scion: OperatorSpec, batch: Batch, tmp_path: Path) -> None:
    made = edits((0, scion), (3, scion))
    model = lively(graft(DiT(TINY), made, seed=0))
    export_published(model, tmp_path / "model.pt", "ema")
    found, found_edits = checkpoints.read(tmp_path / "model.pt", heads=2)
    assert found_edits == made
    assert torch.equal(found(*batch), model(*batch))


PUBLISHED = [Mlp(ratio=3), Mlp(ratio=6), MlpHyenaX(), HyenaSE(), HyenaX(), HyenaY(), Swa(), Mamba2()]


@pytest.mark.parametrize("ratio", [0.5, 0.75])
@pytest.mark.parametrize("scion", PUBLISHED, ids=repr)
def test_the_published_grafts_are_known_block_by_block(scion: OperatorSpec, ratio: float) -> None:
    depth, width, heads = SIZES["XL"]
    config = DiTConfig(input_size=32, in_channels=4, patch=2, depth=depth, width=width, heads=heads, num_classes=1000)
    made = edits(*((block, scion) for block in range(depth) if (block % 2 if ratio == 0.5 else block % 4)))
    assert recognised(of_shapes(weightless(config, made)), None, None) == (config, made)


def test_a_self_graft_is_the_rootstock(model: DiT, tmp_path: Path) -> None:
    made = edits(*((block, op) for block in range(4) for op in (Mha(), Mlp(ratio=4))))
    torch.save(lively(graft(model, made, seed=0)).state_dict(), tmp_path / "model.pt")
    assert checkpoints.read(tmp_path / "model.pt", heads=2)[1] == ()


def test_missing_tensors_are_no_dropped_operator_unless_the_file_says_so(model: DiT, tmp_path: Path) -> None:
    grafted = graft(model, DROPPED, seed=0)
    torch.save(grafted.state_dict(), tmp_path / "model.pt")
    missing = "blocks.1.attn.proj.bias, blocks.1.attn.proj.weight, blocks.1.attn.qkv.bias, and 5 more"
    assert refusal(tmp_path / "model.pt", heads=2).endswith(f": does not fit the model: missing {missing}")
    folder = ours_in(tmp_path, grafted, DROPPED)
    assert checkpoints.read(folder)[1] == DROPPED
    tensors = load_file(folder / "model.safetensors")
    del tensors["blocks.0.attn.proj.bias"]
    save_file(tensors, folder / "model.safetensors")
    assert refusal(folder).endswith("missing blocks.0.attn.proj.bias")


# -- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, without a network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)

    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("Got: ConnectError\nPlease check your internet connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    return tmp_path / "hf" / "hub"


def test_a_hub_id_in_the_cache_is_read_without_a_network(hub: Path, grafted: DiT) -> None:
    repository = hub / "models--grafting--dit-xl2-mha-hyena_y-50p-fid2.72"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    export_published(grafted, repository / "snapshots" / "abc" / "model.pt", "ema")
    found, found_edits = checkpoints.read("grafting/dit-xl2-mha-hyena_y-50p-fid2.72", heads=2)
    assert found_edits == GRAFTS and same(found, grafted)


def test_a_hub_id_that_cannot_be_had_is_refused(hub: Path) -> None:
    assert "cannot be fetched: Got: ConnectError" in refusal("grafting/dit-xl2")


# -- refused


class Payload:
    """Unpickling one touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [None, 2, 4, 5], ids=str)
def test_a_checkpoint_that_would_run_code_is_refused_by_the_name_of_it(tmp_path: Path, protocol: int | None) -> None:
    path, marker = tmp_path / "model.pt", tmp_path / "marker"
    content = {"ema": {"weight": torch.zeros(1)}, "args": Payload(marker)}
    if protocol is None:
        torch.save(content, path)
    else:
        # A name that stands in the pickle before is not written again.
        path.write_bytes(pickle.dumps({"posix": "system", "args": content["args"]}, protocol))
    assert refusal(path) == f"{path}: refused, unpickling it would call posix.system"
    assert not marker.exists()


def spoil(path: Path, how: str, model: DiT) -> None:
    match how:
        case "missing":
            pass
        case "a folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "text":
            path.write_text("<html>404: not found</html>\n" * 10)
        case "a letter":
            path.write_text("hello, this is no checkpoint")  # 'h' is the opcode of a look-up: KeyError, 101
        case "a list":
            path.write_text("checkpoints of\nthis week\n")  # 'c' is that of a global
        case "IndexError" | "struct.error" | "KeyError" | "UnicodeDecodeError":
            path.write_bytes(NOISE[how])
        case "truncated":
            (torch.save if path.suffix == ".pt" else save_file)(model.state_dict(), path)
            content = path.read_bytes()
            path.write_bytes(content[: len(content) * 2 // 3])


# Bytes that raise it where torch takes them for a pickle.
NOISE = {"IndexError": b"0", "struct.error": b"J\x01", "KeyError": b"h\x05.", "UnicodeDecodeError": b"X\x01\0\0\0\xff."}


@pytest.mark.parametrize("how", ["missing", "a folder", "empty", "text", "a letter", "a list", "truncated", *NOISE])
@pytest.mark.parametrize("name", ["other.pt", "other.safetensors"])
def test_what_is_no_checkpoint_is_refused(model: DiT, tmp_path: Path, name: str, how: str) -> None:
    spoil(tmp_path / name, how, model)
    assert len(refusal(tmp_path / name)) < 500


@pytest.mark.parametrize("how", ["empty", "text", "a letter", "a list", *NOISE])
def test_text_and_noise_hold_no_tensors(model: DiT, tmp_path: Path, how: str) -> None:
    path = tmp_path / "other.pt"
    spoil(path, how, model)
    assert refusal(path) == f"{path}: holds no tensors in torch's format"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_noise_of_any_kind_is_refused(tmp_path: Path) -> None:
    draws = random.Random(0)
    for _ in range(300):
        (tmp_path / "other.pt").write_bytes(draws.randbytes(draws.randint(1, 60)))
        refusal(tmp_path / "other.pt")


@pytest.mark.parametrize("part", [None, "ema"])
def test_tensors_under_numbers_are_no_state_dict(tmp_path: Path, part: str | None) -> None:
    state = {0: torch.zeros(2), "x_embedder.proj.weight": torch.zeros(2)}
    torch.save({part: state} if part else state, tmp_path / "other.pt")
    assert refusal(tmp_path / "other.pt").endswith("holds no state dict")


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "other.pt")
    assert refusal(tmp_path / "other.pt").endswith("holds no state dict")


@pytest.mark.parametrize("wrong", [{"edits": [{"site": "1.mha"}]}, {"rootstock": {"layers": 3}}], ids=str)
def test_a_config_that_names_what_nobody_knows_is_refused(model: DiT, tmp_path: Path, wrong: dict[str, Any]) -> None:
    folder = ours_in(tmp_path, model, ())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | wrong))
    assert "names no rootstock or edits that are known here" in refusal(folder)


def told(folder: Path, **settings: Any) -> Path:
    """The folder, with other settings in its config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


ROOTSTOCKS = [
    ({"depth": "4"}, "depth: '4', expected an integer of at least 1"),
    ({"depth": True}, "depth: True, expected an integer of at least 1"),
    ({"input_size": None}, "input_size: nothing, expected an integer of at least 1"),
    ({"patch": 0}, "patch: 0, expected an integer of at least 1"),
    ({"heads": 0}, "heads: 0, expected an integer of at least 1"),
    ({"heads": -2}, "heads: -2, expected an integer of at least 1"),
    ({"heads": 3}, "3 attention heads do not divide its width, 16"),
    ({"width": 18}, "width: 18, expected a multiple of 4, for the 2-D position embedding"),
    ({"input_size": 9}, "input_size: 9, expected a multiple of patch, 2"),
    ({"learn_sigma": 1}, "learn_sigma: 1, expected true or false"),
    ({"layers": 3}, "layers: expected none of that name"),
]


@pytest.mark.parametrize(("wrong", "problem"), ROOTSTOCKS, ids=str)
def test_a_rootstock_that_cannot_be_is_refused(model: DiT, tmp_path: Path, wrong: dict[str, Any], problem: str) -> None:
    folder = told(ours_in(tmp_path, model, ()), rootstock={**asdict(TINY), **wrong})
    expected = f"{folder}/config.json: names no rootstock or edits that are known here: rootstock: {problem}"
    assert refusal(folder) == expected
    with pytest.raises(UnfitCheckpoint):
        checkpoints.load(folder)


@pytest.mark.parametrize("rootstock", [None, [4], "DiT-S/2", {}], ids=str)
def test_a_rootstock_of_no_fields_is_refused(model: DiT, tmp_path: Path, rootstock: Any) -> None:
    assert ": rootstock: " in refusal(told(ours_in(tmp_path, model, ()), rootstock=rootstock))


@pytest.mark.parametrize("heads", [0, -2, 3])
def test_heads_that_cannot_be_are_refused(model: DiT, tmp_path: Path, heads: int) -> None:
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert "heads" in refusal(tmp_path / "model.pt", heads=heads)
    assert f"has 2 attention heads, expected {heads}" in refusal(ours_in(tmp_path, model, ()), heads=heads)


def listed(block: int, target: str, kind: str, **settings: Any) -> dict[str, Any]:
    return {"site": {"block": block, "target": target}, "operator": {"kind": kind, **settings}}


EDITS = [
    ([listed(99, "mha", "swa")], "99.mha: a site past the last block, 3"),
    ([listed(3, "pair", "parallel")], "03.pair: a pair past the last block, 3"),
    ([listed(1, "mha", "parallel")], "01.mha: parallel, expected an operator for mha"),
    ([listed(1, "pair", "mha")], "01.pair: mha, expected parallel"),
    ([listed(1, "mha", "mlp")], "01.mha: mlp, expected an operator for mha"),
    ([listed(1, "mha", "mamba2", headdim=5)], "01.mha: headdim: 5, expected a number that divides"),
    ([listed(1, "mha", "swa")] * 2, "01.mha: edited twice"),
    ([listed(0, "pair", "parallel"), listed(1, "pair", "parallel")], "01.pair: shares a block with another pair"),
]


@pytest.mark.parametrize(("wrong", "problem"), EDITS, ids=str)
@pytest.mark.parametrize("layout", ["graftwork", "published"])
def test_edits_that_cannot_be_made_are_refused(
    model: DiT, tmp_path: Path, wrong: list[dict[str, Any]], problem: str, layout: str
) -> None:
    folder = ours_in(tmp_path, model, ())
    if layout == "published":
        args = {"graftwork": {"rootstock": asdict(TINY), "edits": wrong}}
        torch.save({"ema": model.state_dict(), "args": args}, tmp_path / "model.pt")
    source = told(folder, edits=wrong) if layout == "graftwork" else tmp_path / "model.pt"
    assert f": names no rootstock or edits that are known here: edits: {problem}" in refusal(source)


def test_edits_past_the_blocks_of_the_rootstock_expected_are_refused(grafted: DiT, tmp_path: Path) -> None:
    folder = ours_in(tmp_path, grafted, GRAFTS)
    message = refusal(folder, config=DiTConfig(**{**asdict(TINY), "depth": 2}))
    assert message.endswith("does not fit the model: 02.mlp: a site past the last block, 1")


@pytest.mark.parametrize("edits", [None, 7, "all", {"site": 1}], ids=str)
def test_edits_that_are_no_list_are_refused(model: DiT, tmp_path: Path, edits: Any) -> None:
    assert ": edits: " in refusal(told(ours_in(tmp_path, model, ()), edits=edits))


def test_what_is_wrong_with_an_edit_is_said_in_one_line_of_fields(model: DiT, tmp_path: Path) -> None:
    wrong = [listed(0, "mha", "swa"), listed(1, "mha", "swa", window="wide\n")]
    message = refusal(told(ours_in(tmp_path, model, ()), edits=wrong))
    assert ": edits.1.operator.swa.window: 'wide\\n', Input should be a valid integer" in message
    assert "http" not in message


def test_of_several_checkpoints_none_is_guessed(model: DiT, tmp_path: Path) -> None:
    for name in ("0050000.pt", "0100000.pt"):
        torch.save(model.state_dict(), tmp_path / name)
    assert "several checkpoints, 0050000.pt, 0100000.pt" in refusal(tmp_path)


# -- memory

MEASURE = """
import sys, torch
from pathlib import Path
from graftwork.models import checkpoints

def resident(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

def peak(path, **settings):
    "Bytes above what was resident before, while a model is read and all of its weights are used."
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    model, _ = checkpoints.read(path, heads=16, **settings)
    if not settings:
        assert sum(float(value.detach().sum()) for value in model.parameters()) > 0
    return resident("VmHWM") - before

file, folder = Path(sys.argv[1]), Path(sys.argv[2])
slow = {"diffusers", "sympy", "torch._dynamo"}
print(peak(file), peak(folder), peak(folder, device="meta"), *slow & sys.modules.keys())
"""


def test_a_large_checkpoint_is_never_in_memory_twice(tmp_path: Path) -> None:
    config = DiTConfig(input_size=32, in_channels=4, patch=2, depth=3, width=1024, heads=16, num_classes=1000)
    large = weightless(config, ()).to_empty(device="cpu")
    for value in large.state_dict().values():  # buffers, too, are of memory as it was found
        value.fill_(0.5)
    size = sum(value.nbytes for value in large.state_dict().values())
    assert size > 240e6  # and the file of two state dicts is twice that
    torch.save(
        {"model": {n: v.clone() for n, v in large.state_dict().items()}, "ema": large.state_dict()}, tmp_path / "a.pt"
    )
    (tmp_path / "ours").mkdir()
    checkpoints.save(large, (), tmp_path / "ours")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "a.pt", tmp_path / "ours"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = done.stdout.split()
    for file in (tmp_path / "a.pt", tmp_path / "ours" / "model.safetensors"):
        file.unlink()
    of_file, of_folder, elsewhere = (int(number) / size for number in measured[:3])
    assert of_file < 1.3  # one of its two state dicts, once
    assert of_folder < 1.3
    assert elsewhere < 0.3  # a tensor at a time on its way to another device
    assert measured[3:] == []  # nothing was imported that takes seconds


# -- diffusers


@pytest.fixture
def theirs(model: DiT) -> Any:
    """A DiT of diffusers' own with random weights, one embedder in all blocks."""
    from diffusers import DiTTransformer2DModel

    transformer = lively(DiTTransformer2DModel(**THEIR_CONFIG))
    first = transformer.transformer_blocks[0].norm1.emb
    for block in transformer.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
    return transformer.eval()


THEIR_CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 4,
    "sample_size": 8,
    "num_embeds_ada_norm": 5,
}


def outputs(transformer: Any, batch: Batch) -> Tensor:
    x, t, y = batch
    return transformer(x, timestep=t, class_labels=y).sample.detach()


def as_dit(transformer: Any, frequencies: bool = True, eps: bool = True) -> Any:
    """A copy in which the two things that diffusers computes differently are as in DiT."""
    transformer = copy.deepcopy(transformer)
    for block in transformer.transformer_blocks:
        if frequencies:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        if eps:
            block.norm3.eps = 1e-6
    return transformer


@pytest.mark.parametrize("how", ["safetensors", "bin", "shards", "bin shards", "the file", "of old", "pipeline"])
def test_a_diffusers_dit_is_read(theirs: Any, batch: Batch, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "transformer" if how == "pipeline" else tmp_path
    size = "20KB" if "shards" in how else "1GB"
    theirs.save_pretrained(folder, safe_serialization="bin" not in how, max_shard_size=size)
    if how == "of old":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    assert len(list(folder.glob("diffusion*"))) > 2 or "shards" not in how
    model, made = checkpoints.read(folder / "diffusion_pytorch_model.safetensors" if how == "the file" else tmp_path)
    assert model.config == TINY and made == ()
    torch.testing.assert_close(model(*batch), outputs(as_dit(theirs), batch), rtol=1e-5, atol=1e-5)


def test_diffusers_differs_from_dit_in_the_sinusoids_and_an_eps_alone(theirs: Any, batch: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    model, _ = checkpoints.read(tmp_path)
    # An eps shows in the sixth digit: in float32 that is what processors differ by.
    model, theirs, batch = model.double(), theirs.double(), (batch[0].double(), *batch[1:])
    ours = model(*batch).detach()
    off = {
        (frequencies, eps): float((outputs(as_dit(theirs, frequencies, eps), batch) - ours).abs().max() / ours.std())
        for frequencies in (False, True)
        for eps in (False, True)
    }
    assert off[True, True] < 1e-7
    assert 1e-6 < off[True, False] < 1e-3
    assert off[False, True] > 1e-2


def test_embedders_that_differ_from_block_to_block_are_refused(theirs: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        theirs.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight[1] += 1
    theirs.save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert "transformer_blocks.2.norm1.emb.class_embedder" in message and "one embedder for all blocks" in message


def test_a_diffusers_dit_of_another_activation_is_refused(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    DiTTransformer2DModel(**THEIR_CONFIG, activation_fn="gelu").save_pretrained(tmp_path)
    assert "activation_fn is 'gelu', expected 'gelu-approximate'" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sample_size", None), ("sample_size", 0), ("num_attention_heads", "x"), ("num_attention_heads", None)],
)
def test_a_diffusers_dit_of_no_size_is_refused(theirs: Any, tmp_path: Path, name: str, value: Any) -> None:
    theirs.save_pretrained(tmp_path)
    shown = "nothing" if value is None else repr(value)
    assert refusal(told(tmp_path, **{name: value})).endswith(f"{name} is {shown}, expected an integer of at least 1")


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        ("transformer_blocks.1.attn1.to_k.weight", (16, 8)),
        ("transformer_blocks.1.attn1.to_k.bias", ()),
        ("pos_embed.proj.bias", ()),
        ("pos_embed.proj.weight", (16, 3, 0, 0)),
        ("transformer_blocks.last.attn1.to_k.bias", (16,)),
    ],
)
def test_a_tensor_of_diffusers_that_fits_nothing_is_refused(
    theirs: Any, tmp_path: Path, tensor: str, shape: tuple[int, ...]
) -> None:
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), tensor: torch.zeros(shape)}, file)
    assert refusal(tmp_path)


@pytest.mark.parametrize("index", [[], {"a": 1}, {"a": "../elsewhere.safetensors"}], ids=str)
def test_an_index_that_names_no_files_beside_it_is_refused(theirs: Any, tmp_path: Path, index: Any) -> None:
    theirs.save_config(tmp_path)
    name = "diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / name).write_text(json.dumps({"weight_map": index}))
    assert refusal(tmp_path)


def test_a_shard_that_lacks_a_tensor_is_named(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = tmp_path / "diffusion_pytorch_model-00001-of-00003.safetensors"
    shard = shard if shard.exists() else sorted(tmp_path.glob("*.safetensors"))[0]
    name, *_ = tensors = load_file(shard)
    save_file({other: tensors[other] for other in tensors if other != name}, shard)
    with pytest.raises(UnfitCheckpoint, match=f"{shard.name}: has no {name}"):
        checkpoints.read(tmp_path)


def ours_in(tmp_path: Path, model: DiT, made: tuple[Edit, ...]) -> Path:
    folder = tmp_path / "ours"
    folder.mkdir()
    checkpoints.save(model, made, folder)
    return folder


IMAGENET = DiTConfig(**{**asdict(TINY), "num_classes": 1000})


def test_a_rootstock_goes_to_diffusers_and_back(batch: Batch, tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    model = lively(DiT(IMAGENET))
    export(ours_in(tmp_path, model, ()), tmp_path / "out", "diffusers")
    transformer = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(outputs(as_dit(transformer, eps=False), batch), model(*batch), rtol=1e-5, atol=1e-5)
    assert same(checkpoints.read(tmp_path / "out")[0], model)
    assert torch.equal(outputs(transformer, batch), outputs(rootstock_transformer(model), batch))


@pytest.mark.parametrize(
    "made", [GRAFTS, DROPPED, PAIR, ()], ids=["graft", "without operators", "parallel", "rootstock of few classes"]
)
def test_a_graft_goes_to_diffusers_and_back(batch: Batch, tmp_path: Path, made: tuple[Edit, ...]) -> None:
    from graftwork.models.checkpoints.layouts.transformer import GraftTransformer2DModel

    model = lively(graft(DiT(TINY), made, seed=0))
    export(ours_in(tmp_path, model, made), tmp_path / "out", "diffusers")
    transformer = GraftTransformer2DModel.from_pretrained(tmp_path / "out")
    assert torch.equal(outputs(transformer, batch), model(*batch))
    found, found_edits = checkpoints.read(tmp_path / "out")
    assert found_edits == made and same(found, model)


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """A small autoencoder of images into 3 channels of half their side."""
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=3,
        norm_num_groups=2,
        sample_size=16,
    )
    autoencoder.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize(
    ("config", "made"),
    [(IMAGENET, ()), (TINY, ()), (IMAGENET, GRAFTS), (TINY, GRAFTS)],
    ids=["rootstock", "rootstock of few classes", "graft", "graft of few classes"],
)
def test_a_pipeline_of_diffusers_samples_from_an_export(
    vae: Path, tmp_path: Path, config: DiTConfig, made: tuple[Edit, ...]
) -> None:
    from diffusers import DDIMScheduler, DiTPipeline

    # The pipeline's null class is 1000; a model of diffusers' own has to have that many classes.
    own = config == IMAGENET and not made
    model = lively(graft(DiT(config), made, seed=0))
    export(ours_in(tmp_path, model, made), tmp_path / "out", "diffusers", vae=vae)
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert type(pipeline.transformer).__name__ == ("DiTTransformer2DModel" if own else "GraftTransformer2DModel")

    def drawn(labels: list[int], guidance: float) -> Tensor:
        draws = torch.Generator().manual_seed(0)
        return pipeline(labels, guidance, draws, num_inference_steps=3, output_type="pt").images

    guided, plain, other = drawn([1, 2], 4.0), drawn([1, 2], 1.0), drawn([3, 2], 4.0)
    assert guided.shape == (2, 3, 16, 16) and guided.isfinite().all()
    assert not torch.equal(guided, plain) and not torch.equal(guided[0], other[0])
    assert torch.equal(guided[1], other[1])
    assert same(checkpoints.read(tmp_path / "out")[0], model)


def test_the_null_class_of_the_pipeline_is_the_models(grafted: DiT, batch: Batch) -> None:
    x, t, _ = batch
    transformer = wrapped(grafted, GRAFTS)
    null = transformer(x, t, torch.full((4,), 1000), return_dict=False)[0]
    assert torch.equal(null, grafted(x, t, torch.full((4,), TINY.num_classes)))


# -- the published layout, and the card


def skeleton(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Modules with just these parameters: of DiT's own code, all that a strict load sees."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        at = root
        for part in path:
            if part not in dict(at.named_children()):
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
    return root


def authors_shapes() -> dict[str, tuple[int, ...]]:
    """REFERENCE sections 1 and 3: the tensors of a DiT as GRAFTS make it."""
    width, tokens, patches = 16, 16, 2 * 2
    weights: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (width, 3, 2, 2),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patches * 6, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(4):
        weights[f"blocks.{i}.adaLN_modulation.1"] = (6 * width, width)
        hidden = 24 if i == 2 else 64
        weights |= {f"blocks.{i}.mlp.fc1": (hidden, width), f"blocks.{i}.mlp.fc2": (width, hidden)}
        if i == 1:
            filters = {"short_filter": (3 * width, 1, 3), "inner_filter": (width, 1, 3)}
            names = {"in_proj": (3 * width, width), **filters, "out_proj": (width, width)}
        else:
            names = {"qkv": (3 * width, width), "proj": (width, width)}
        weights |= {f"blocks.{i}.attn.{name}": shape for name, shape in names.items()}
    shapes = {f"{name}.weight": shape for name, shape in weights.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    return shapes | {"pos_embed": (1, tokens, width), "y_embedder.embedding_table.weight": (6, width)}


def test_the_authors_sampling_script_takes_an_exported_graft(grafted: DiT, tmp_path: Path) -> None:
    export(ours_in(tmp_path, grafted, GRAFTS), tmp_path / "out", "published")
    checkpoint = torch.load(tmp_path / "out" / "model.pt")
    theirs = skeleton(authors_shapes())
    theirs.load_state_dict(checkpoint["ema"], strict=True)
    assert all(torch.equal(value, checkpoint["ema"][name]) for name, value in grafted.state_dict().items())
    assert checkpoint["args"]["num_classes"] == 5


@pytest.mark.parametrize("args", [dict, argparse.Namespace])
def test_an_exported_graft_comes_back_with_what_shapes_do_not_tell(model: DiT, tmp_path: Path, args: Any) -> None:
    made = edits((1, Swa(window=2)), (2, NoOperator()), (3, HyenaY()))
    graft(model, made, seed=0)
    export(ours_in(tmp_path, model, made), tmp_path / "out", "published")
    content = torch.load(tmp_path / "out" / "model.pt")
    torch.save({**content, "args": args(**content["args"])}, tmp_path / "out" / "model.pt")
    found, found_edits = checkpoints.read(tmp_path / "out")
    assert found_edits == made and found.config == TINY and same(found, model)


def test_the_trained_models_name_is_read_from_a_dict_too(tmp_path: Path) -> None:
    model = DiT(DiTConfig(input_size=4, in_channels=1, patch=2, depth=1, width=24, heads=6, num_classes=2))
    torch.save({"ema": model.state_dict(), "args": {"model": "DiT-S/2"}}, tmp_path / "model.pt")
    assert checkpoints.read(tmp_path / "model.pt")[0].config == model.config


def test_an_export_holds_one_state_dict_and_no_more(grafted: DiT, tmp_path: Path) -> None:
    export_published(grafted, tmp_path / "theirs.pt", "model", "ema")
    for layout in ("published", "graftwork"):
        export(tmp_path / "theirs.pt", tmp_path / layout, layout, heads=2)
        size = sum(path.stat().st_size for path in (tmp_path / layout).iterdir())
        assert size < 1.5 * sum(value.nbytes for value in grafted.state_dict().values())


def test_parallel_blocks_have_no_place_in_the_published_layout(tmp_path: Path) -> None:
    folder = ours_in(tmp_path, graft(DiT(TINY), PAIR, seed=0), PAIR)
    with pytest.raises(ExportRefused, match=r"parallel blocks, for which the published layout has no names$"):
        export(folder, tmp_path / "out", "published")
    assert not (tmp_path / "out").exists()


def test_an_export_writes_over_nothing(model: DiT, tmp_path: Path) -> None:
    folder = ours_in(tmp_path, model, ())
    with pytest.raises(ExportRefused, match="is there already; accepted: a new or empty folder"):
        export(folder, folder, "published")


def test_an_unknown_layout_is_refused_with_those_there_are(model: DiT, tmp_path: Path) -> None:
    with pytest.raises(ExportRefused, match=r"onnx: no such layout; accepted: graftwork, diffusers, published$"):
        export(tmp_path, tmp_path / "out", "onnx")  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["graftwork", "published"])
def test_an_autoencoder_goes_with_diffusers_layout_alone(model: DiT, tmp_path: Path, layout: Any) -> None:
    with pytest.raises(ExportRefused) as caught:
        export(ours_in(tmp_path, model, ()), tmp_path / "out", layout, vae=tmp_path / "vae")
    message = f"vae: got '{tmp_path}/vae' with layout {layout}; accepted: with layout diffusers only"
    assert str(caught.value) == message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["missing", "a hub id", "empty", "a file", "no weights", "torn", "no json", "a DiT"])
def test_an_autoencoder_that_cannot_be_read_is_named_before_anything_is_written(
    vae: Path, hub: Path, model: DiT, theirs: Any, tmp_path: Path, how: str
) -> None:
    weights = vae / "diffusion_pytorch_model.safetensors"
    given = vae
    match how:
        case "missing":
            given = tmp_path / "elsewhere"
        case "a hub id":
            given = Path("someone/vae")
        case "empty":
            given = tmp_path / "nothing"
            given.mkdir()
        case "a file":
            given = weights
        case "no weights":
            weights.unlink()
        case "torn":
            weights.write_bytes(weights.read_bytes()[:100])
        case "no json":
            (vae / "config.json").write_text("{")
        case "a DiT":
            theirs.save_pretrained(given := tmp_path / "dit")
    with pytest.raises(ExportRefused) as caught:
        export(ours_in(tmp_path, model, ()), tmp_path / "out", "diffusers", vae=given)
    message = str(caught.value)
    assert message.startswith(f"vae: {given}: ") and "\n" not in message and len(message) < 1000
    assert not (tmp_path / "out").exists()


CARD = Card(
    title="DiT-T/2, half of it Hyena",
    rootstock="DiT-T/2, trained on digits.",
    recipe={"finetune": {"steps": 50, "lr": 1e-4}},
    results={"rootstock": {"fid": 2.27, "parameters": 675_129_632}, "graft": {"fid": 2.7215}},
    keys={"finetune": "abc123"},
)


@pytest.mark.parametrize("layout", ["graftwork", "diffusers", "published"])
def test_a_card_says_what_the_model_is_and_how_it_was_made(grafted: DiT, tmp_path: Path, layout: Any) -> None:
    export(ours_in(tmp_path, grafted, GRAFTS), tmp_path / "out", layout, card=CARD)
    _, front, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "graftwork"
    assert text.strip().startswith(f"# {CARD.title}") and CARD.rootstock in text
    assert "| attention | hyena_se (kernel 3) | 1 |" in text
    assert "| feed-forward | mlp (ratio 1.5) | 2 |" in text
    assert "| rootstock | 2.27 | 675,129,632 |\n| graft | 2.721 |  |" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == CARD.recipe
    assert "| finetune | abc123 |" in text


def test_a_card_tells_no_place_on_the_machine_that_made_it(tmp_path: Path) -> None:
    recipe = {
        "data": {"path": "/home/me/images", "val": {"path": "/home/me/more/"}},
        "graft": [{"scions": "/home/me/graft.pt"}, {"scions": "grafting/dit-xl2"}, {"scions": None}],
        "evaluate": {"reference": "/home/me/stats.npz", "inception": "~/me/pt_inception.pth", "metrics": ["a/b/c"]},
    }
    checkpoints.write_card(tmp_path, Card("title", "rootstock", recipe=recipe), ())
    text = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == {
        "data": {"path": "images", "val": {"path": "more"}},
        "graft": [{"scions": "graft.pt"}, {"scions": "grafting/dit-xl2"}, {"scions": None}],
        "evaluate": {"reference": "stats.npz", "inception": "pt_inception.pth", "metrics": ["a/b/c"]},
    }


@pytest.mark.parametrize("pipeline", [False, True], ids=["transformer", "pipeline"])
@pytest.mark.parametrize(("config", "made"), [(IMAGENET, ()), (IMAGENET, GRAFTS), (TINY, ())], ids=str)
def test_a_card_says_where_diffusers_computes_otherwise(
    vae: Path, tmp_path: Path, config: DiTConfig, made: tuple[Edit, ...], pipeline: bool
) -> None:
    folder = ours_in(tmp_path, graft(DiT(config), made, seed=0), made)
    export(folder, tmp_path / "out", "diffusers", card=CARD, vae=vae if pipeline else None)
    text = (tmp_path / "out" / "README.md").read_text()
    assert ("`downscale_freq_shift` is 1" in text) == (config == IMAGENET and not made)


@pytest.mark.parametrize(
    ("config", "made"), [(IMAGENET, ()), (TINY, ()), (TINY, GRAFTS)], ids=["rootstock", "of few classes", "graft"]
)
@pytest.mark.parametrize("layout", ["graftwork", "diffusers", "pipeline", "published"])
def test_what_a_card_says_to_run_loads_the_model(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, config: DiTConfig, made: tuple[Edit, ...]
) -> None:
    folder = ours_in(tmp_path, graft(DiT(config), made, seed=0), made)
    written: Any = "diffusers" if layout == "pipeline" else layout
    export(folder, tmp_path / "out", written, card=CARD, vae=vae if layout == "pipeline" else None)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec((tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0], scope)
    assert callable(scope["model"])
