"""NumPy and safetensors: saved through one node, loaded and mapped through another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.mount.mount_parts import Dirs, wait_until

SHAPE = (1500, 1003)  # 12 MB: three chunks, and no row that ends with one


def weights(seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(SHAPE)


@pytest.mark.parametrize("mode", [None, "r", "c"])
def test_a_saved_array_is_loaded_elsewhere(dirs: Dirs, mode: Literal["r", "c"] | None) -> None:
    saved = weights(1)
    np.save(dirs[0] / "a.npy", saved)
    for directory in dirs:
        loaded = np.load(directory / "a.npy", mmap_mode=mode)
        np.testing.assert_array_equal(loaded, saved)
        np.testing.assert_array_equal(loaded[::-37], saved[::-37])


def test_fortran_order_and_structured_arrays_keep_their_layout(dirs: Dirs) -> None:
    saved = np.asfortranarray(weights(2))
    records = np.zeros(70_000, dtype=[("step", "<i8"), ("loss", "<f4"), ("tag", "S5")])
    records["step"], records["tag"] = np.arange(70_000), b"train"
    np.save(dirs[1] / "f.npy", saved)
    np.save(dirs[1] / "r.npy", records)
    loaded = np.load(dirs[2] / "f.npy", mmap_mode="r")
    assert loaded.flags.f_contiguous
    np.testing.assert_array_equal(loaded, saved)
    np.testing.assert_array_equal(np.load(dirs[0] / "r.npy"), records)


@pytest.mark.parametrize("compressed", [False, True])
def test_an_archive_of_arrays_is_loaded_elsewhere(dirs: Dirs, compressed: bool) -> None:
    saved = {"weights": weights(3), "bias": np.arange(7), "empty": np.zeros((0, 4))}
    save = np.savez_compressed if compressed else np.savez
    save(dirs[2] / "a.npz", **saved)  # type: ignore[arg-type]
    with np.load(dirs[0] / "a.npz") as archive:
        assert set(archive.files) == set(saved)
        for name, array in saved.items():
            np.testing.assert_array_equal(archive[name], array)


def test_changes_through_a_mapping_are_seen_elsewhere_once_flushed(dirs: Dirs) -> None:
    np.save(dirs[0] / "a.npy", weights(4))
    before = np.load(dirs[1] / "a.npy", mmap_mode="r")
    mapped = np.load(dirs[0] / "a.npy", mmap_mode="r+")
    mapped[700:800] = 5.0
    mapped[-1, -1] = -1.0
    mapped.flush()
    wanted = weights(4)
    wanted[700:800], wanted[-1, -1] = 5.0, -1.0
    np.testing.assert_array_equal(np.load(dirs[1] / "a.npy"), wanted)
    np.testing.assert_array_equal(np.load(dirs[2] / "a.npy", mmap_mode="r"), wanted)
    np.testing.assert_array_equal(before, weights(4))  # a mapping keeps its version
    mapped[0] = 9.0
    del mapped  # the end of a mapping is a RELEASE, which munmap() does not wait for
    wanted[0] = 9.0
    wait_until(lambda: np.array_equal(np.load(dirs[2] / "a.npy"), wanted), "the unmapped version")


def test_an_array_can_be_made_through_a_mapping(dirs: Dirs) -> None:
    saved = weights(5)
    mapped = open_memmap(dirs[1] / "a.npy", mode="w+", dtype=saved.dtype, shape=saved.shape)
    for start in range(0, len(saved), 100):
        mapped[start : start + 100] = saved[start : start + 100]
    mapped.flush()
    np.testing.assert_array_equal(np.load(dirs[2] / "a.npy"), saved)
    np.testing.assert_array_equal(mapped, saved)


def test_raw_arrays_are_appended_to_by_one_node_after_the_other(dirs: Dirs) -> None:
    parts = [weights(seed)[: 333 + seed] for seed in range(4)]
    for number, part in enumerate(parts):
        with (dirs[number % 3] / "a.bin").open("ab") as file:
            part.tofile(file)
    loaded = np.fromfile(dirs[1] / "a.bin").reshape(-1, SHAPE[1])
    np.testing.assert_array_equal(loaded, np.concatenate(parts))
    mapped: NDArray[np.float64] = np.memmap(dirs[0] / "a.bin", dtype=np.float64, mode="r")
    np.testing.assert_array_equal(mapped, loaded.ravel())


def tensors() -> dict[str, NDArray[np.generic]]:
    rng = np.random.default_rng(8)
    return {
        "embed": rng.standard_normal((4000, 300), dtype=np.float32),
        "layer.0.weight": rng.integers(0, 255, (2000, 999), dtype=np.uint8),
        "layer.0.scale": rng.standard_normal((2000, 1)).astype(np.float16),
        "scalar": np.array(3),
    }


def test_tensors_are_loaded_elsewhere_whole_and_in_slices(dirs: Dirs) -> None:
    saved, path = tensors(), Path("model.safetensors")
    save_file(saved, dirs[0] / path, metadata={"format": "np"})
    loaded = load_file(dirs[1] / path)
    with safe_open(dirs[2] / path, framework="numpy") as file:
        assert file.metadata() == {"format": "np"}
        assert set(file.keys()) == set(loaded) == set(saved)
        for name, array in saved.items():
            np.testing.assert_array_equal(loaded[name], array)
            np.testing.assert_array_equal(file.get_tensor(name), array)
        part = file.get_slice("embed")[1000:2000, 7:9]
    np.testing.assert_array_equal(part, saved["embed"][1000:2000, 7:9])


def test_a_newer_checkpoint_replaces_one_that_is_mapped(dirs: Dirs) -> None:
    """tmp + rename, and writing in place: who has the old one open reads on in it."""
    old, path = tensors(), Path("model.safetensors")
    new = {name: array[::-1].copy() if array.ndim else array for name, array in old.items()}
    save_file(old, dirs[0] / path)
    with safe_open(dirs[1] / path, framework="numpy") as file:
        first = file.get_slice("embed")[:10]
        save_file(new, dirs[0] / "model.tmp")
        (dirs[0] / "model.tmp").rename(dirs[0] / path)
        np.testing.assert_array_equal(load_file(dirs[1] / path)["embed"], new["embed"])
        save_file(old, dirs[2] / path)
        np.testing.assert_array_equal(load_file(dirs[1] / path)["embed"], old["embed"])
        np.testing.assert_array_equal(first, old["embed"][:10])
        np.testing.assert_array_equal(file.get_tensor("embed"), old["embed"])
