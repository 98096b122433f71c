"""git, rsync, tar, cp, dd and tail: programs that know nothing of modelfs."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest

from tests.mount.mount_parts import MIB, Dirs, run, wait_until

needs_git = pytest.mark.skipif(
    shutil.which("git") is None and os.environ.get("CI") != "true", reason="git is not installed"
)
needs_rsync = pytest.mark.skipif(
    shutil.which("rsync") is None and os.environ.get("CI") != "true", reason="no rsync here"
)


NANOSECONDS = "--modify-window=-1"  # else rsync takes times within one second for equal


@pytest.fixture
def tree(tmp_path: Path, rng: random.Random) -> Path:
    """A local directory with files of many sizes, modes and times, and links."""
    root = tmp_path / "tree"
    for number in range(24):
        path = root / f"dir {number % 4}" / f"{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.choice([0, 1, 4095, 4097, 70_000])))
        path.chmod(rng.choice([0o644, 0o600, 0o755, 0o444]))
        os.utime(path, ns=(10**18, 10**18 + rng.randrange(10**17)))
    (root / "large.bin").write_bytes(rng.randbytes(9 * MIB + 1))
    (root / "link").symlink_to("dir 0/0.bin")
    (root / "dangling").symlink_to("/nowhere/at all")
    (root / "hard").hardlink_to(root / "large.bin")
    (root / "empty").mkdir(mode=0o700)
    os.utime(root / "dir 1", ns=(10**18, 10**18))
    return root


def listing(root: Path) -> dict[str, tuple[object, ...]]:
    """path -> type, mode, size, mtime, contents."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        size = -1 if path.is_dir() and not path.is_symlink() else status.st_size
        contents: object = None
        if path.is_symlink():
            contents = path.readlink()
        elif path.is_file():
            contents = path.read_bytes()
        detail = (status.st_mode, size, status.st_mtime_ns, contents)
        found[str(path.relative_to(root))] = detail
    return found


@needs_rsync
def test_a_second_rsync_transfers_nothing_on_any_node(dirs: Dirs, tree: Path) -> None:
    run("rsync", "-aH", NANOSECONDS, "--delete", f"{tree}/", f"{dirs[0]}/copy/")
    for directory in dirs:
        assert run("rsync", "-aHi", NANOSECONDS, "--delete", f"{tree}/", f"{directory}/copy/") == ""
        assert (
            run("rsync", "-aHic", NANOSECONDS, "--delete", f"{tree}/", f"{directory}/copy/") == ""
        )
        assert listing(directory / "copy") == listing(tree)
    (tree / "dir 0/0.bin").unlink()
    (tree / "dir 2/2.bin").unlink()
    (tree / "dir 2/2.bin").write_bytes(b"changed")
    with (tree / "large.bin").open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"in the middle")
    itemized = run(
        "rsync", "-aHi", NANOSECONDS, "--delete", "--inplace", f"{tree}/", f"{dirs[1]}/copy/"
    )
    assert "*deleting   dir 0/0.bin" in itemized
    assert run("rsync", "-aHi", NANOSECONDS, "--delete", f"{tree}/", f"{dirs[2]}/copy/") == ""
    assert listing(dirs[0] / "copy") == listing(tree)
    run("rsync", "-aH", NANOSECONDS, f"{dirs[2]}/copy/", f"{tree.parent}/back/")
    assert listing(tree.parent / "back") == listing(tree)


def test_tar_unpacks_what_it_packed(dirs: Dirs, tree: Path) -> None:
    unpacked = dirs[0] / "out"
    unpacked.mkdir()
    pipe = f"tar -C '{tree}' --format=posix -c . | tar -C '{unpacked}' -xp"
    run("sh", "-c", pipe)
    assert listing(dirs[1] / "out") == listing(tree)
    run("tar", "-C", dirs[1] / "out", "--format=posix", "-cf", dirs[1] / "a.tar", ".")
    run("tar", "-C", tree, "--compare", "-f", dirs[2] / "a.tar")
    run("tar", "-C", dirs[0] / "out", "--compare", "-f", dirs[0] / "a.tar")


def test_cp_copies_trees_from_node_to_node(dirs: Dirs, tree: Path) -> None:
    run("cp", "-a", tree, dirs[0] / "a")
    run("cp", "-a", dirs[1] / "a", dirs[1] / "b")
    run("cp", "-a", dirs[1] / "b", dirs[2] / "c")
    for name in "abc":
        assert listing(dirs[2] / name) == listing(tree)
    assert (dirs[0] / "c/hard").stat().st_nlink == 2
    run("mv", dirs[2] / "c", tree.parent / "moved")
    assert listing(tree.parent / "moved") == listing(tree)
    wait_until(lambda: not (dirs[0] / "c").exists(), "the removed tree to be gone there too")
    run("rm", "-rf", dirs[1] / "a")
    wait_until(lambda: not (dirs[0] / "a").exists(), "the removed tree to be gone there too")


def test_cp_makes_and_reads_sparse_files(dirs: Dirs, tmp_path: Path, rng: random.Random) -> None:
    local = tmp_path / "sparse"
    with local.open("wb") as file:
        file.truncate(60 * MIB + 5)
        for offset in (0, 4 * MIB - 3, 33 * MIB + 7, 60 * MIB):
            file.seek(offset)
            file.write(rng.randbytes(5))
    run("cp", "--sparse=always", local, dirs[0] / "sparse")
    run("cp", "--sparse=always", dirs[1] / "sparse", dirs[1] / "again")
    run("cp", "--sparse=never", dirs[2] / "again", dirs[2] / "full")
    for name in ("sparse", "again", "full"):
        run("cmp", local, dirs[2] / name)
        run("cmp", local, dirs[0] / name)


DD = {
    "odd blocks": ["bs=4097"],
    "odd large blocks": ["bs=1000003"],
    "direct": ["bs=4096", "oflag=direct"],
    "direct, large blocks": ["bs=1M", "oflag=direct"],
    "sync": ["bs=1M", "oflag=sync"],
    "fsync": ["bs=64K", "conv=fsync"],
    "sparse": ["bs=64K", "conv=sparse"],
}


@pytest.mark.parametrize("way", DD)
def test_dd_writes_what_others_read(
    dirs: Dirs, tmp_path: Path, rng: random.Random, way: str
) -> None:
    size = 6 * MIB if "direct" in way else 6 * MIB + 4321
    source = tmp_path / "source"
    source.write_bytes(rng.randbytes(size // 2) + bytes(size - size // 2))
    run("dd", f"if={source}", f"of={dirs[0]}/a", *DD[way])
    run("cmp", source, dirs[1] / "a")
    for flags in (["bs=4097"], ["bs=4096", "iflag=direct"], ["bs=1M", "iflag=direct"]):
        run("dd", f"if={dirs[2]}/a", f"of={tmp_path}/back", *flags)
        run("cmp", source, tmp_path / "back")


@pytest.mark.parametrize("flags", [[], ["oflag=direct"], ["oflag=sync"]], ids=str)
def test_dd_changes_a_file_in_place(
    dirs: Dirs, tmp_path: Path, rng: random.Random, flags: list[str]
) -> None:
    data = bytearray(rng.randbytes(9 * MIB + 100))
    (dirs[0] / "a").write_bytes(data)
    patch = tmp_path / "patch"
    patch.write_bytes(rng.randbytes(3 * 4096))
    for block, directory in ((0, dirs[1]), (1023, dirs[2]), (2303, dirs[0])):
        run(
            "dd",
            f"if={patch}",
            f"of={directory}/a",
            "bs=4096",
            f"seek={block}",
            "conv=notrunc",
            *flags,
        )
        data[block * 4096 : (block + 3) * 4096] = patch.read_bytes()
        assert (dirs[1] / "a").read_bytes() == data
    run("dd", f"if={patch}", f"of={dirs[1]}/a", "bs=777", "oflag=append", "conv=notrunc")
    assert (dirs[2] / "a").read_bytes() == data + patch.read_bytes()


def git(directory: Path, *words: str) -> str:
    return run("git", "-C", directory, "-c", "gc.auto=0", *words, seconds=120)


@needs_git
def test_a_repository_is_cloned_committed_to_and_checked(
    dirs: Dirs, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".gitconfig").write_text("[user]\n\tname = Test\n\temail = test@example.org\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    git(tree, "init", "-q", "-b", "main")
    git(tree, "add", "-A")
    git(tree, "commit", "-q", "-m", "first")
    git(tree.parent, "clone", "-q", f"file://{tree}", f"{dirs[0]}/clone")
    assert git(dirs[1] / "clone", "status", "--porcelain") == ""
    (dirs[1] / "clone/new.txt").write_text("from the second node\n")
    (dirs[1] / "clone/dir 1/1.bin").unlink()
    git(dirs[1] / "clone", "add", "-A")
    git(dirs[1] / "clone", "commit", "-q", "-m", "second")
    git(dirs[2] / "clone", "fsck", "--full", "--strict")
    assert git(dirs[2] / "clone", "log", "--format=%s").split() == ["second", "first"]
    git(dirs[2] / "clone", "repack", "-adq")
    git(dirs[2], "clone", "-q", f"{dirs[2]}/clone", f"{dirs[2]}/linked")  # with hard links
    git(dirs[0] / "linked", "checkout", "-q", "-b", "branch", "HEAD~1")
    assert git(dirs[1] / "linked", "status", "--porcelain", "--branch") == "## branch\n"
    git(dirs[1] / "linked", "merge", "-q", "main")
    git(dirs[0] / "linked", "gc", "-q", "--prune=now")
    git(dirs[2] / "linked", "fsck", "--full", "--strict")
    assert git(dirs[1] / "linked", "rev-parse", "branch") == git(
        dirs[2] / "clone", "rev-parse", "main"
    )


def test_tail_follows_a_name_and_starts_again_with_each_version(dirs: Dirs) -> None:
    """Another node's version is another st_ino: for `tail -F` the file has been replaced."""
    (dirs[0] / "log").write_text("line 0\n")
    command = ["tail", "-n", "+1", "-s", "0.05", "-F", str(dirs[1] / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as tail:
        assert tail.stdout is not None
        os.set_blocking(tail.stdout.fileno(), False)
        seen = b""

        def has_seen(text: bytes) -> bool:
            nonlocal seen
            assert tail.stdout is not None
            seen += tail.stdout.read() or b""
            return seen.endswith(text)

        try:
            wait_until(lambda: has_seen(b"line 0\n"), "the first line")
            for number in range(1, 4):
                with (dirs[0] / "log").open("a") as log:
                    log.write(f"line {number}\n")
                text = (dirs[0] / "log").read_bytes()
                wait_until(partial(has_seen, text), "the whole text again, in tail")
        finally:
            tail.terminate()
        assert tail.stderr is not None
        assert b"has been replaced" in tail.stderr.read()
