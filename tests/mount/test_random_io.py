"""Random operations on one file against a model in memory, as fsx does.

The model is a bytearray. Every read is compared, and at the end the whole file, from every node
and with no page of it cached. The last operations are shown if something differs.
"""

from __future__ import annotations

import mmap
import os
import random
from collections import deque
from pathlib import Path

import pytest

from tests.mount.mount_parts import MIB, Dirs, forget_pages

pytestmark = pytest.mark.fuse

OPERATIONS = 220
SIZES_MAX = (1, 100, 4096, 65536, 300_000, MIB)
WEIGHTS = {
    "write": 4,
    "append": 1,
    "read": 4,
    "truncate": 2,
    "truncate by path": 1,
    "map and write": 1,
    "map and read": 1,
    "reopen": 1,
    "fsync": 1,
    "forget pages": 1,
    "rename": 1,
}


class Exerciser:
    """One file, its model, and what was done to them."""

    def __init__(self, path: Path, size_max: int, chance: random.Random) -> None:
        self.path, self.size_max, self.chance = path, size_max, chance
        self.model = bytearray()
        self.done: deque[str] = deque(maxlen=20)
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT)

    def step(self) -> None:
        """Do one random operation."""
        chance = self.chance
        name = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        offset = chance.randrange(self.size_max if chance.random() < 0.7 else 8192)
        size = chance.randrange(1, chance.choice(SIZES_MAX) + 1)
        self.done.append(f"{name} offset {offset} size {size} of {len(self.model)}")
        getattr(self, name.replace(" ", "_"))(offset, min(size, self.size_max - offset))
        assert os.fstat(self.descriptor).st_size == len(self.model), self.told()

    def told(self) -> str:
        """The last operations, for a failure."""
        return "after\n" + "\n".join(self.done)

    def check(self, offset: int, data: bytes) -> None:
        """Compare what was read with the model."""
        wanted = self.model[offset : offset + len(data)]
        if data != wanted:
            at = next(i for i in range(len(data)) if data[i : i + 1] != wanted[i : i + 1])
            found = f"{data[at : at + 16].hex()}, not {wanted[at : at + 16].hex()}"
            pytest.fail(f"at {offset + at}: {found}, {self.told()}", pytrace=False)

    def resize(self, size: int) -> None:
        """Truncate the model."""
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def write(self, offset: int, size: int) -> None:
        data = self.chance.randbytes(size)
        assert os.pwrite(self.descriptor, data, offset) == size
        self.resize(max(len(self.model), offset + size))
        self.model[offset : offset + size] = data

    def append(self, offset: int, size: int) -> None:
        self.write(len(self.model), min(size, self.size_max - len(self.model)))

    def read(self, offset: int, size: int) -> None:
        data = os.pread(self.descriptor, size, offset)
        assert len(data) == max(0, min(size, len(self.model) - offset)), self.told()
        self.check(offset, data)

    def truncate(self, offset: int, size: int) -> None:
        os.ftruncate(self.descriptor, offset)
        self.resize(offset)

    def truncate_by_path(self, offset: int, size: int) -> None:
        os.truncate(self.path, offset)
        self.resize(offset)

    def map_and_write(self, offset: int, size: int) -> None:
        if self.model:
            start = offset % len(self.model)
            data = self.chance.randbytes(min(size, len(self.model) - start))
            with mmap.mmap(self.descriptor, len(self.model)) as mapped:
                mapped[start : start + len(data)] = data
                if self.chance.random() < 0.5:
                    mapped.flush()
            self.model[start : start + len(data)] = data

    def map_and_read(self, offset: int, size: int) -> None:
        if self.model:
            start = offset % len(self.model)
            with mmap.mmap(self.descriptor, len(self.model)) as mapped:
                self.check(start, mapped[start : start + size])

    def reopen(self, offset: int, size: int) -> None:
        os.close(self.descriptor)
        self.descriptor = os.open(self.path, os.O_RDWR)

    def fsync(self, offset: int, size: int) -> None:
        os.fsync(self.descriptor)

    def forget_pages(self, offset: int, size: int) -> None:
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def rename(self, offset: int, size: int) -> None:
        other = self.path.with_name(f"{self.path.name}'")
        os.rename(self.path, other)
        self.path = other


@pytest.mark.parametrize("size_max", [20_000, 5 * MIB, 12 * MIB])
@pytest.mark.parametrize("seed", range(4))
def test_random_operations_do_what_they_do_in_memory(
    dirs: Dirs, seed: int, size_max: int, rng: random.Random
) -> None:
    exerciser = Exerciser(dirs[0] / "file", size_max, rng)
    try:
        for _ in range(OPERATIONS):
            exerciser.step()
    finally:
        os.close(exerciser.descriptor)
    for directory in reversed(dirs):
        path = directory / exerciser.path.name
        forget_pages(path)
        contents = path.read_bytes()
        assert len(contents) == len(exerciser.model), exerciser.told()
        exerciser.check(0, contents)


@pytest.mark.parametrize("seed", range(3))
def test_nodes_that_take_turns_at_one_file_do_what_they_do_in_memory(
    dirs: Dirs, seed: int, rng: random.Random
) -> None:
    """Close-to-open, at random: each turn opens what the last one closed."""
    model = bytearray()
    name = "file"
    for turn in range(25):
        exerciser = Exerciser(rng.choice(dirs) / name, 6 * MIB, rng)
        exerciser.model = model
        exerciser.done.append(f"turn {turn} at {exerciser.path}")
        try:
            exerciser.read(0, len(model) + 1)
            for _ in range(rng.randrange(8)):
                exerciser.step()
        finally:
            os.close(exerciser.descriptor)
        name = exerciser.path.name
    for directory in dirs:
        forget_pages(directory / name)
        assert (directory / name).read_bytes() == model


def test_many_files_written_at_once_stay_apart(dirs: Dirs, rng: random.Random) -> None:
    """Handles of 30 files, written in random order and pieces, some larger than a chunk."""
    models = {f"{number}": bytearray() for number in range(30)}
    files = {name: (dirs[0] / name).open("wb", buffering=0) for name in models}
    for _ in range(600):
        name = rng.choice(list(models))
        data = rng.randbytes(rng.randrange(1, 400_000 if int(name) < 5 else 5000))
        files[name].write(data)
        models[name] += data
    for file in files.values():
        file.close()
    for name, model in models.items():
        assert (dirs[1] / name).read_bytes() == model
