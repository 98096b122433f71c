"""The benchmark's small files: names, attributes, a few bytes, and how soon others see them."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.bench_places import Clock, Place
from tests.bench_work import Figures, Step, Work, idle

SMALL_BYTES = 4096
VISIBLE_SECONDS = 15.0


def small_files(work: Work) -> Iterator[Step]:
    """Operations each second on files of 4 KiB, by one process and by eight."""
    fork = multiprocessing.get_context("fork")
    count, several = work.small_files, work.processes
    names = [f"f{index:05}" for index in range(count)]

    def rate(act: Callable[[Path], object], directory: Path) -> float:
        with Clock() as clock:
            for name in names:
                act(directory / name)
        return count / clock.seconds

    def rate_of_several(act: Callable[[Path], object], directory: Path) -> float:
        with ProcessPoolExecutor(several, mp_context=fork) as pool:
            list(pool.map(idle, range(several)))
            shares = [[directory / name for name in names[i::several]] for i in range(several)]
            with Clock() as clock:
                list(pool.map(_Each(act), shares))
        return count / clock.seconds

    def one(place: Place, repetition: int) -> Figures:
        place_a, place_b = place.a / f"one{repetition}", place.b / f"one{repetition}"
        place_a.mkdir()
        found = {"create": rate(_create, place_a)}
        place.drop_client()
        found["open_read"] = rate(_open_and_read, place_b)
        rate(os.stat, place_b)  # FUSE's kernel asks once more for atime after a read
        found["stat_warm"] = rate(os.stat, place_b)
        found["rename"] = rate(_rename, place_a)
        for name in names:
            _rename_back(place_a / name)
        found["unlink"] = rate(os.unlink, place_a)
        return found

    def eight(place: Place, repetition: int) -> Figures:
        place_a, place_b = place.a / f"eight{repetition}", place.b / f"eight{repetition}"
        place_a.mkdir()
        found = {"create_8": rate_of_several(_create, place_a)}
        place.drop_client()
        found["open_read_8"] = rate_of_several(_open_and_read, place_b)
        found["rename_8"] = rate_of_several(_rename, place_a)
        for name in names:
            _rename_back(place_a / name)
        found["unlink_8"] = rate_of_several(os.unlink, place_a)
        return found

    def listing(place: Place, repetition: int) -> Figures:
        directory = place.b / "many"
        if repetition == 0:
            (place.a / "many").mkdir()
            with ProcessPoolExecutor(several, mp_context=fork) as pool:
                paths = [place.a / "many" / f"e{i:05}" for i in range(work.stat_files)]
                list(pool.map(_Each(_touch), [paths[i::several] for i in range(several)]))
        place.drop_client()
        found = {}
        for name in ("list_cold", "list_warm"):
            with Clock() as clock, os.scandir(directory) as entries:
                total = sum(1 for entry in entries if entry.stat(follow_symlinks=False))
            assert total == work.stat_files
            found[name] = total / clock.seconds
        return found

    yield from (one, eight, listing)


class _Each:
    """Calls a function for each path of a list; can be sent to another process."""

    def __init__(self, act: Callable[[Path], object]) -> None:
        self._act = act

    def __call__(self, paths: list[Path]) -> None:
        for path in paths:
            self._act(path)


def _create(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(descriptor, b"m" * SMALL_BYTES)
    os.close(descriptor)


def _touch(path: Path) -> None:
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644))


def _open_and_read(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    data = os.read(descriptor, 2 * SMALL_BYTES)
    os.close(descriptor)
    assert len(data) == SMALL_BYTES


def _rename(path: Path) -> None:
    path.rename(path.with_name(f"r{path.name}"))


def _rename_back(path: Path) -> None:
    path.with_name(f"r{path.name}").rename(path)


# ---------------------------------------------------------------- between nodes


def visibility(work: Work) -> Iterator[Step]:
    """From close() on one node to the bytes on the other, in ms."""

    def wait_for(path: Path, data: bytes) -> float:
        started = time.perf_counter()
        while True:
            try:
                if path.read_bytes() == data:
                    return (time.perf_counter() - started) * 1e3
            except FileNotFoundError:
                pass
            if time.perf_counter() - started > VISIBLE_SECONDS:
                raise TimeoutError(f"{path} is not what was written")

    def see(place: Place, repetition: int) -> Figures:
        times: dict[str, list[float]] = {"visible_new": [], "visible_rewritten": []}
        for number in range(20):
            for round_, name in enumerate(times):
                data = b"%d %d %d" % (repetition, number, round_)
                (place.a / f"seen{number}").write_bytes(data)
                times[name].append(wait_for(place.b / f"seen{number}", data))
        for number in range(20):
            (place.a / f"seen{number}").unlink()
        return {name: sorted(found)[len(found) // 2] for name, found in times.items()}

    yield see
