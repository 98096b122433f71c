"""Large directories: every name once, whatever comes and goes meanwhile; and quickly enough."""

from __future__ import annotations

import os
import shutil

from modelfsd.lab.cluster import Lab
from tests.many_files import empty, fill, inode_of
from tests.mount.mount_parts import Dirs, run


def test_a_large_directory_is_listed_whole_while_others_change_it(lab: Lab, dirs: Dirs) -> None:
    count = 8000
    one, two, _ = dirs
    parent = inode_of(one)
    fill(lab.nodes[0], parent, range(count))
    names = {f"file-{number:06d}" for number in range(count)}
    for directory in dirs:
        assert sorted(os.listdir(directory)) == sorted(names)
    seen = []
    with os.scandir(two) as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            if number % 500 == 0:
                (one / f"new-{number}").touch()
                (one / f"file-{number + 200:06d}").rename(one / f"moved-{number}")
    moved = {f"file-{number + 200:06d}" for number in range(0, count, 500)}
    kept = [name for name in seen if name in names - moved]
    assert len(kept) == len(set(kept)) == count - len(moved)
    assert len(seen) == len(set(seen))
    listed = run("ls", "-l", one).splitlines()[1:]
    assert len(listed) == count + len(moved)
    assert run("find", two, "-name", "moved-*", "-newermt", "2000-01-01").count("\n") == len(moved)
    for path in [*one.glob("new-*"), *one.glob("moved-*")]:
        path.unlink()
    empty(lab.nodes[0], parent, range(count))
    assert os.listdir(one) == []


def test_an_open_directory_shows_what_is_new_when_it_is_read_again(dirs: Dirs) -> None:
    here, there, _ = dirs
    descriptor = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert os.listdir(descriptor) == []
        (here / "ours").touch()
        assert os.listdir(descriptor) == ["ours"]
        (there / "theirs").touch()
        (there / "ours").unlink()
        assert os.listdir(descriptor) == ["theirs"]
    finally:
        os.close(descriptor)


def test_a_tree_is_removed_and_measured_by_the_usual_tools(dirs: Dirs) -> None:
    here, there, _ = dirs
    for number in range(20):
        (here / f"{number}" / "below").mkdir(parents=True)
        (here / f"{number}" / "below" / "file").write_bytes(b"x" * 10_000)
    assert int(run("du", "-s", "--apparent-size", "-B1", there).split()[0]) >= 200_000
    assert run("find", there, "-type", "f", "-size", "+9k").count("\n") == 20
    total, used, free = shutil.disk_usage(there)
    assert 0 <= used <= total and 0 < free <= total
    assert run("df", "--output=fstype", there).split() == ["Type", "fuse.modelfs"]
    run("rm", "-rf", *there.iterdir())
    assert os.listdir(here) == []
