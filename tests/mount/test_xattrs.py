"""Extended attributes, which a mount has with `-o xattr` and does not have without."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelfs.limits import KIB, XATTRS_BYTES_MAX
from modelfsd.lab.cluster import Lab
from tests.mount.mount_parts import Dirs, ask, in_child, pass_a_tick, refused, requests, run

NOBODY = 65534


@pytest.fixture(scope="module")
def xattr_lab(test_root: Path) -> Iterator[Lab]:
    """Two nodes that keep extended attributes."""
    root = Path(tempfile.mkdtemp(prefix="xattr-", dir=test_root))
    os.chmod(test_root, 0o755)  # a test runs a child as another user
    os.chmod(root, 0o755)
    with Lab.up(root, 2, arguments=("-o", "xattr")) as lab:
        yield lab


@pytest.fixture
def pair(xattr_lab: Lab, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A fresh directory through both mounts."""
    one, two = (node.mount / request.node.name for node in xattr_lab.nodes)
    one.mkdir(mode=0o777)
    return one, two


def test_without_the_option_the_kernel_asks_once_and_never_again(lab: Lab, dirs: Dirs) -> None:
    path = dirs[0] / "file"
    path.write_bytes(b"x")
    with refused(errno.EOPNOTSUPP):
        os.setxattr(path, "user.a", b"1")
    for _ in range(3):
        with refused(errno.EOPNOTSUPP):
            os.getxattr(path, "user.a")
        path.write_bytes(b"y" * 100)
    assert requests(lab.nodes[0]).get("getxattr", 0) <= 1


def test_they_are_set_read_listed_removed_and_seen_elsewhere(pair: tuple[Path, Path]) -> None:
    one, two = pair
    (one / "file").write_bytes(b"contents")
    (one / "dir").mkdir()
    for name in ("file", "dir"):
        path, there = one / name, two / name
        values = {"user.a": b"1", "user.empty": b"", "user.binary": bytes(range(256))}
        for key, value in values.items():
            os.setxattr(path, key, value)
        assert sorted(os.listxattr(path)) == sorted(values)
        os.listdir(two)  # makes the other node fresh
        assert {key: os.getxattr(there, key) for key in os.listxattr(there)} == values
        os.removexattr(there, "user.a")
        os.listdir(one)
        with refused(errno.ENODATA):
            os.getxattr(path, "user.a")
        with refused(errno.ENODATA):
            os.removexattr(path, "user.a")
    assert (two / "file").read_bytes() == b"contents"


def test_create_and_replace_do_what_they_say(pair: tuple[Path, Path]) -> None:
    path = pair[0] / "file"
    path.touch()
    with refused(errno.ENODATA):
        os.setxattr(path, "user.a", b"1", os.XATTR_REPLACE)
    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    with refused(errno.EEXIST):
        os.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
    os.setxattr(path, "user.a", b"3", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.a") == b"3"


def test_they_move_ctime_alone_and_outlive_changes_of_the_file(pair: tuple[Path, Path]) -> None:
    one, two = pair
    path = one / "file"
    path.write_bytes(b"first")
    before = path.stat()
    pass_a_tick(path)
    os.setxattr(path, "user.a", b"1")
    after = path.stat()
    assert after.st_ctime_ns > before.st_ctime_ns
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    (two / "file").write_bytes(b"second, from the other node")
    path.chmod(0o600)
    path.rename(one / "renamed")
    os.link(one / "renamed", one / "link")
    assert os.getxattr(one / "link", "user.a") == b"1"
    assert (one / "link").read_bytes() == b"second, from the other node"


def test_what_is_set_on_a_file_that_changed_elsewhere_is_set_on_that_file(
    pair: tuple[Path, Path],
) -> None:
    one, two = pair
    (one / "file").write_bytes(b"old")
    (two / "new").write_bytes(b"new")
    (two / "new").rename(two / "file")
    os.listdir(one)
    os.setxattr(one / "file", "user.a", b"1")
    os.listdir(two)
    assert os.getxattr(two / "file", "user.a") == b"1"


def test_the_bounds_are_those_of_linux(pair: tuple[Path, Path]) -> None:
    path = pair[0] / "file"
    path.write_bytes(b"contents")
    longest = "user." + "n" * 250
    os.setxattr(path, longest, b"v" * 64 * KIB)
    assert os.getxattr(path, longest) == b"v" * 64 * KIB
    with refused(errno.ERANGE):
        os.setxattr(path, longest + "n", b"")
    with refused(errno.E2BIG):
        os.setxattr(path, "user.big", b"v" * (64 * KIB + 1))
    kept = 64 * KIB
    with refused(errno.ENOSPC):
        for number in range(100):
            os.setxattr(path, f"user.{number}", bytes(8 * KIB))
            kept += 8 * KIB
    assert XATTRS_BYTES_MAX - 10 * KIB < kept < XATTRS_BYTES_MAX
    # A record that is full of them can be changed as ever.
    path.write_bytes(b"c" * 4096)
    path.chmod(0o600)
    assert path.read_bytes() == b"c" * 4096
    os.removexattr(path, longest)
    with refused(errno.ENOSPC):
        for number in range(400):
            os.setxattr(path, f"user.{'l' * 240}-{number}", b"")
    assert len(os.listxattr(path)) > 200


def test_symlinks_acls_and_unknown_namespaces_are_refused_as_elsewhere(
    pair: tuple[Path, Path],
) -> None:
    path, link = pair[0] / "file", pair[0] / "link"
    path.touch()
    link.symlink_to("file")
    with refused(errno.EPERM):
        os.setxattr(link, "user.a", b"1", follow_symlinks=False)
    os.setxattr(link, "trusted.a", b"1", follow_symlinks=False)
    assert os.listxattr(link, follow_symlinks=False) == ["trusted.a"]
    acl = b"\2\0\0\0\1\0\6\0\xff\xff\xff\xff\4\0\4\0\xff\xff\xff\xff \0\4\0\xff\xff\xff\xff"
    for name in ("system.posix_acl_access", "system.other", "unknown.a"):
        with refused(errno.EOPNOTSUPP):
            os.setxattr(path, name, acl)


def test_others_see_what_they_may(pair: tuple[Path, Path]) -> None:
    path = pair[0] / "file"
    path.touch()
    path.chmod(0o644)
    os.setxattr(path, "trusted.secret", b"1")
    os.setxattr(path, "security.label", b"2")
    os.setxattr(path, "user.a", b"3")
    assert sorted(os.listxattr(path)) == ["security.label", "trusted.secret", "user.a"]
    listed = in_child("print(json.dumps(sorted(os.listxattr(path))))", NOBODY, path=path)
    assert listed.value == ["security.label", "user.a"]
    assert in_child("os.getxattr(path, 'trusted.secret')", NOBODY, path=path).errno == errno.ENODATA
    assert in_child("os.setxattr(path, 'user.a', b'')", NOBODY, path=path).errno == errno.EACCES


def test_cp_a_brings_them_and_a_writer_takes_capabilities_away(pair: tuple[Path, Path]) -> None:
    source, copy = pair[0] / "tree", pair[1] / "copy"
    (source / "dir").mkdir(parents=True)
    (source / "dir" / "file").write_bytes(b"contents")
    os.setxattr(source / "dir", "user.kind", b"directory")
    os.setxattr(source / "dir" / "file", "user.kind", b"file")
    os.listdir(pair[1])
    run("cp", "-a", "--preserve=xattr", pair[1] / "tree", copy)
    assert os.getxattr(copy / "dir", "user.kind") == b"directory"
    assert os.getxattr(copy / "dir" / "file", "user.kind") == b"file"
    program = pair[0] / "program"
    program.write_bytes(b"#!/bin/sh\n")
    capability = b"\1\0\0\2" + bytes(16)  # VFS_CAP_REVISION_2, effective, none
    os.setxattr(program, "security.capability", capability)
    assert os.getxattr(program, "security.capability") == capability
    program.write_bytes(b"#!/bin/false\n")
    with refused(errno.ENODATA):  # the kernel removes it with the first write
        os.getxattr(program, "security.capability")


def test_status_says_whether_a_mount_has_them(lab: Lab, xattr_lab: Lab) -> None:
    without, having = (ask(one.nodes[0], "status")["limits"] for one in (lab, xattr_lab))
    assert any("-o xattr" in limit for limit in without)
    assert not any("xattr" in limit for limit in having)
    assert any("flock" in limit for limit in having)


def test_an_unlinked_file_keeps_and_takes_them_until_its_last_close(
    pair: tuple[Path, Path],
) -> None:
    path = pair[0] / "file"
    path.touch()
    os.setxattr(path, "user.a", b"1")
    with path.open("rb") as file:
        path.unlink()
        os.setxattr(file.fileno(), "user.b", b"2")
        assert sorted(os.listxattr(file.fileno())) == ["user.a", "user.b"]
        os.removexattr(file.fileno(), "user.a")
        assert os.listxattr(file.fileno()) == ["user.b"]
        assert os.getxattr(file.fileno(), "user.b") == b"2"


def test_a_removed_directory_and_a_removed_pipe_keep_and_take_them(
    pair: tuple[Path, Path],
) -> None:
    directory, pipe = pair[0] / "directory", pair[0] / "pipe"
    directory.mkdir()
    os.mkfifo(pipe)
    for path, name in ((directory, "user.a"), (pipe, "trusted.a")):
        os.setxattr(path, name, b"1")
        descriptor = os.open(path, os.O_PATH)
        try:
            held = f"/proc/self/fd/{descriptor}"
            (path.rmdir if path is directory else path.unlink)()
            os.setxattr(held, name, b"2")
            assert os.getxattr(held, name) == b"2"
            os.removexattr(held, name)
            assert os.listxattr(held) == []
        finally:
            os.close(descriptor)


def test_a_namespace_alone_is_no_name(pair: tuple[Path, Path]) -> None:
    path = pair[0] / "file"
    path.touch()
    for name in ("user.", "trusted.", "security."):
        with refused(errno.EINVAL):
            os.setxattr(path, name, b"1")
        with refused(errno.EINVAL):
            os.getxattr(path, name)
