"""The benchmark's models: as numpy, safetensors and PyTorch read them, mapped, and in strides.

Everything is read client-cold, beside a plain read of the same size. PyTorch is large and takes
part only where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from tests.bench_places import MIB, Clock, Place
from tests.bench_work import Figures, Step, Work, read_file

TENSOR_BYTES = 4 * MIB
PAGES = 200  # random ones, of a mapped file
STRIDE_BYTES = 8 * MIB
STRIDE_READ_BYTES = 256 << 10
TORCH_ROWS = ("torch_load_client_cold", "torch_load_mmap_client_cold")
NO_TORCH = "not installed; ./run bench --torch"


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def loading(work: Work) -> Iterator[Step]:
    """np.load, safetensors, torch.load, maps in order and at random, strides: client-cold."""

    def prepare(place: Place, repetition: int) -> Figures:
        if repetition == 0:
            np.save(place.a / "array.npy", _numbers(3000, work.size_mib * MIB))
            _write_safetensors(place.a / "model.safetensors", work.size_mib)
        return {}

    def timed(figure: str, load: Callable[[Path], object], place: Place, _: int) -> Figures:
        place.drop_client()
        with Clock(work.size_mib) as clock:
            load(place.b)
        return work.speed(f"{figure}_client_cold", clock)

    def safetensors(directory: Path) -> None:
        from safetensors.numpy import load_file

        load_file(directory / "model.safetensors")

    yield prepare
    yield partial(timed, "raw", lambda directory: read_file(directory / "array.npy"))
    yield partial(timed, "np_load", lambda directory: np.load(directory / "array.npy"))
    yield partial(timed, "safetensors", safetensors)
    if has_torch():
        yield partial(_prepare_torch, work)
        yield partial(timed, "torch_load", partial(_load_torch, False))
        yield partial(timed, "torch_load_mmap", partial(_load_torch, True))
    yield partial(timed, "mmap_in_order", _touch_in_order)
    yield _touch_at_random
    yield _read_strides


def _numbers(seed: int, size_bytes: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Numbers that were never written before."""
    return np.frombuffer(np.random.default_rng([seed, os.getpid()]).bytes(size_bytes), np.float32)


def _write_safetensors(path: Path, size_mib: int) -> None:
    """The length of a header, the header, and tensors one after the other."""
    count = max(1, size_mib * MIB // TENSOR_BYTES)
    header = json.dumps(
        {
            f"layer{i}": {
                "dtype": "F32",
                "shape": [TENSOR_BYTES // 4],
                "data_offsets": [i * TENSOR_BYTES, (i + 1) * TENSOR_BYTES],
            }
            for i in range(count)
        }
    ).encode()
    data = np.random.default_rng([2000, os.getpid()])
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(count):
            file.write(data.bytes(TENSOR_BYTES))
        os.fsync(file.fileno())


# ---------------------------------------------------------------- PyTorch


def _prepare_torch(work: Work, place: Place, repetition: int) -> Figures:
    """A state dict as `torch.save` writes it. What is imported late is imported by now."""
    import torch

    if repetition == 0:
        count = max(1, work.size_mib * MIB // TENSOR_BYTES)
        numbers = _numbers(6000, count * TENSOR_BYTES).reshape(count, -1)
        layers = enumerate(torch.from_numpy(numbers.copy()))
        state = {f"layer{index}": tensor.clone() for index, tensor in layers}
        torch.save(state, place.a / "checkpoint.pt")
        warm = {"layer": torch.zeros(1)}
        torch.save(warm, place.a / "warm.pt")
        torch.load(place.a / "warm.pt", weights_only=True)
    return {}


def _load_torch(is_mapped: bool, directory: Path) -> None:
    """Load a state dict; one that is mapped is copied out of the map, as to a device."""
    import torch

    state = torch.load(directory / "checkpoint.pt", mmap=is_mapped, weights_only=True)
    if is_mapped:
        copies = [tensor.clone() for tensor in state.values()]
        assert len(copies) == len(state)


# ---------------------------------------------------------------- other patterns


def _touch_in_order(directory: Path) -> None:
    """Touch every page of a map, as tensors that are used in file order do."""
    with (directory / "model.safetensors").open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            for start in range(0, len(memory), mmap.PAGESIZE):
                memory[start]


def _touch_at_random(place: Place, repetition: int) -> Figures:
    """Touch pages anywhere in a map: ms each."""
    place.drop_client()
    chance = random.Random(repetition)
    with (place.b / "array.npy").open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            memory.madvise(mmap.MADV_RANDOM)
            last = len(memory) // mmap.PAGESIZE - 1
            with Clock() as clock:
                for _ in range(PAGES):
                    memory[chance.randint(0, last) * mmap.PAGESIZE]
    figure = "mmap_page_client_cold"
    each = {figure: clock.seconds, f"{figure}_cpu": clock.cpu_seconds}
    return {name: seconds * 1e3 / PAGES for name, seconds in each.items()}


def _read_strides(place: Place, repetition: int) -> Figures:
    """Read a little of every few megabytes of two files; only what was read counts."""
    place.drop_client()
    read_bytes = 0
    with Clock() as clock:
        for name in ("array.npy", "model.safetensors"):
            with (place.b / name).open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                for offset in range(0, size, STRIDE_BYTES):
                    read_bytes += len(os.pread(file.fileno(), STRIDE_READ_BYTES, offset))
    figure = "strided_client_cold"
    cpu = clock.cpu_seconds / (read_bytes / (1024 * MIB))
    return {figure: read_bytes / 1e9 / clock.seconds, f"{figure}_cpu": cpu}
