"""The benchmark's small files: names, attributes, a few bytes, and how soon others see them."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.bench_places import Clock, Place
from tests.bench_work import Figures, Step, Work, idle, rate

SMALL_BYTES = 4096
VISIBLE_SECONDS = 15.0
STAT_PASSES = 20  # one is over in a millisecond, and CPU seconds are told by the hundredth
FORK = multiprocessing.get_context("fork")


def small_files(work: Work) -> Iterator[Step]:
    """Operations each second on files of 4 KiB, by one process and by eight."""
    names = [f"f{index:05}" for index in range(work.small_files)]

    def one(place: Place, repetition: int) -> Figures:
        place_a, place_b = place.a / f"one{repetition}", place.b / f"one{repetition}"
        place_a.mkdir()
        paths_a, paths_b = ([top / name for name in names] for top in (place_a, place_b))
        found = _timed("create", _create, paths_a)
        place.drop_client()
        found |= _timed("open_read", _open_and_read, paths_b)
        _Each(os.stat)(paths_b)  # FUSE's kernel asks once more for atime after a read
        found |= _timed("stat_warm", os.stat, paths_b * STAT_PASSES)
        found |= _timed("rename", _rename, paths_a)
        return found | _timed("unlink", _unlink_renamed, paths_a)

    def eight(place: Place, repetition: int) -> Figures:
        (place.a / f"eight{repetition}").mkdir()
        tops = (top / f"eight{repetition}" for top in (place.a, place.b))
        shares_a, shares_b = (_shares(names, [top] * work.processes) for top in tops)
        found = _timed_by_all("create_8", _create, shares_a)
        place.drop_client()
        found |= _timed_by_all("open_read_8", _open_and_read, shares_b)
        found |= _timed_by_all("rename_8", _rename, shares_a)
        return found | _timed_by_all("unlink_8", _unlink_renamed, shares_a)

    def eight_apart(place: Place, repetition: int) -> Figures:
        """The kernel lets one process at a time change a directory: here each has its own."""
        own = [place.a / f"apart{repetition}-{number}" for number in range(work.processes)]
        for directory in own:
            directory.mkdir()
        shares = _shares(names, own)
        found = _timed_by_all("create_8_apart", _create, shares)
        found |= _timed_by_all("rename_8_apart", _rename, shares)
        return found | _timed_by_all("unlink_8_apart", _unlink_renamed, shares)

    def listing(place: Place, repetition: int) -> Figures:
        if repetition == 0:
            (place.a / "many").mkdir()
            listed = [f"e{index:05}" for index in range(work.stat_files)]
            _by_all(_touch, _shares(listed, [place.a / "many"] * work.processes))
        place.drop_client()
        found: Figures = {}
        for figure in ("list_cold", "list_warm"):
            with Clock() as clock, os.scandir(place.b / "many") as entries:
                total = sum(1 for entry in entries if entry.stat(follow_symlinks=False))
            assert total == work.stat_files
            found |= rate(figure, total, clock)
        return found

    yield from (one, eight, eight_apart, listing)


def _timed(figure: str, act: Callable[[Path], object], paths: list[Path]) -> Figures:
    with Clock() as clock:
        _Each(act)(paths)
    return rate(figure, len(paths), clock)


def _timed_by_all(figure: str, act: Callable[[Path], object], shares: list[list[Path]]) -> Figures:
    return rate(figure, sum(map(len, shares)), _by_all(act, shares))


def _by_all(act: Callable[[Path], object], shares: list[list[Path]]) -> Clock:
    """By a process for each share, all at once."""
    with ProcessPoolExecutor(len(shares), mp_context=FORK) as pool:
        list(pool.map(idle, range(len(shares))))  # the processes are there now
        with Clock() as clock:
            list(pool.map(_Each(act), shares))
    return clock


def _shares(names: list[str], directories: list[Path]) -> list[list[Path]]:
    """Which files each process works on, in its directory."""
    count = len(directories)
    return [[top / name for name in names[i::count]] for i, top in enumerate(directories)]


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


def _unlink_renamed(path: Path) -> None:
    path.with_name(f"r{path.name}").unlink()


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
