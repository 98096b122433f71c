"""PyTorch: state dicts, mapped loading, safetensors, and distributed checkpoints of two nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.mount.mount_parts import Dirs, finish_child, start_child, wait_until

STEPS = 3


def model() -> torch.nn.Module:
    torch.manual_seed(11)
    return torch.nn.Sequential(
        torch.nn.Embedding(3000, 512),
        torch.nn.Linear(512, 1023),
        torch.nn.LayerNorm(1023),
        torch.nn.Linear(1023, 10),
    )


def assert_same(loaded: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    assert list(loaded) == list(saved)
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("weights_only", [True, False], ids=["weights only", "any pickle"])
@pytest.mark.parametrize("way", ["zip", "zip, mapped", "legacy"])
def test_a_state_dict_is_loaded_elsewhere(dirs: Dirs, way: str, weights_only: bool) -> None:
    saved = model().state_dict()
    torch.save(saved, dirs[0] / "model.pt", _use_new_zipfile_serialization=way != "legacy")
    for directory in dirs:
        path = directory / "model.pt"
        assert_same(torch.load(path, mmap="mapped" in way, weights_only=weights_only), saved)


def test_training_goes_on_elsewhere_as_if_it_had_not_stopped(dirs: Dirs) -> None:
    """Model and optimizer are saved, in place, after every step, each step on another node."""

    def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        torch.manual_seed(number)
        optimizer.zero_grad()
        net(torch.randint(0, 3000, (8,))).square().mean().backward()
        optimizer.step()

    whole = model()
    optimizer = torch.optim.AdamW(whole.parameters())
    for number in range(STEPS):
        step(whole, optimizer, number)

    for number in range(STEPS):
        part = model()
        part_optimizer = torch.optim.AdamW(part.parameters())
        if number:
            checkpoint = torch.load(dirs[number % 3] / "last.pt")
            part.load_state_dict(checkpoint["model"])
            part_optimizer.load_state_dict(checkpoint["optimizer"])
        step(part, part_optimizer, number)
        checkpoint = {"model": part.state_dict(), "optimizer": part_optimizer.state_dict()}
        torch.save(checkpoint, dirs[number % 3] / "last.pt")
    checkpoint = torch.load(dirs[0] / "last.pt", mmap=True)
    assert_same(checkpoint["model"], dict(whole.state_dict()))


def test_a_mapped_checkpoint_stays_whole_while_a_newer_one_replaces_it(dirs: Dirs) -> None:
    saved = model().state_dict()
    torch.save(saved, dirs[0] / "model.pt")
    mapped = torch.load(dirs[1] / "model.pt", mmap=True)
    torch.save({name: -tensor for name, tensor in saved.items()}, dirs[0] / "model.pt")
    newer = torch.load(dirs[1] / "model.pt", mmap=True)
    assert_same(mapped, dict(saved))
    assert_same({name: -tensor for name, tensor in newer.items()}, dict(saved))


def test_a_tensor_in_a_shared_mapping_is_seen_elsewhere_once_unmapped(dirs: Dirs) -> None:
    count = 3_000_001
    wanted = torch.arange(count, dtype=torch.float32)

    def mapped(directory: Path, shared: bool) -> torch.Tensor:
        return torch.from_file(str(directory / "t.bin"), shared=shared, size=count)

    tensor = mapped(dirs[0], shared=True)
    tensor.copy_(wanted)
    del tensor  # the end of a mapping is a RELEASE, which munmap() does not wait for
    wait_until(
        lambda: (
            (dirs[2] / "t.bin").stat().st_size == 4 * count
            and torch.equal(mapped(dirs[2], shared=False), wanted)
        ),
        "the unmapped version",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_safetensors_of_any_type_are_loaded_elsewhere(dirs: Dirs, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    saved = {f"layer.{i}": torch.randn(700 + i, 1001).mul(9).to(dtype) for i in range(5)}
    save_file(saved, dirs[0] / "m.safetensors")
    loaded = load_file(dirs[1] / "m.safetensors")
    with safe_open(dirs[2] / "m.safetensors", framework="pt") as file:
        for name, tensor in saved.items():
            wanted = tensor.view(torch.uint8)
            assert torch.equal(loaded[name].view(torch.uint8), wanted)
            assert torch.equal(file.get_tensor(name).view(torch.uint8), wanted)
            part = file.get_slice(name)[100:333, 7:1000]
            assert torch.equal(part.view(torch.uint8), tensor[100:333, 7:1000].view(torch.uint8))


RANK = """
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(2)
whole = {f"layer.{i}": torch.randn(1000 + 2 * i, 513) for i in range(4)}
shard = Shard(dim)
if saves:
    state = {name: distribute_tensor(tensor, mesh, [shard]) for name, tensor in whole.items()}
    dcp.save({"model": state, "step": 7}, checkpoint_id=path)
else:
    empty = {
        name: distribute_tensor(torch.zeros_like(tensor), mesh, [shard])
        for name, tensor in whole.items()
    }
    state = {"model": empty, "step": 0}
    dcp.load(state, checkpoint_id=path)
    assert state["step"] == 7
    for name, tensor in whole.items():
        assert torch.equal(state["model"][name].full_tensor(), tensor), name
dist.barrier()
dist.destroy_process_group()
"""


def run_ranks(places: tuple[Path, Path], meeting: Path, dim: int, saves: bool) -> None:
    children = [
        start_child(
            RANK, path=place / "checkpoint", rank=rank, meeting=meeting, dim=dim, saves=saves
        )
        for rank, place in enumerate(places)
    ]
    for child in children:
        assert finish_child(child, 180).errno == 0


def test_a_distributed_checkpoint_of_two_nodes_is_loaded_by_two_others(
    dirs: Dirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    first, second, third = dirs
    run_ranks((first, second), tmp_path / "save", 0, saves=True)
    names = {path.name for path in (third / "checkpoint").iterdir()}
    assert names == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    run_ranks((third, first), tmp_path / "load", 0, saves=False)
    run_ranks((second, third), tmp_path / "reshard", 1, saves=False)
    run_ranks((second, third), tmp_path / "again", 1, saves=True)  # over the old checkpoint
    run_ranks((first, second), tmp_path / "reload", 0, saves=False)
