"""The threads that tell the kernel what to forget: what they tell it again."""

from __future__ import annotations

import errno
import threading
import time

import pyfuse3
import pytest

from modelfs.ids import KernelId
from modelfsd.kernel import notifier
from modelfsd.kernel.notifier import Notifier

WAIT_SECONDS = 30.0  # a guard against hangs
INODE, OTHER = KernelId(5), KernelId(5 + notifier.THREADS)  # of one thread


class Kernel:
    """Knows an inode from the nth time on that it is told about it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, known_from: dict[int, int]) -> None:
        self.told: dict[int, int] = dict.fromkeys(known_from, 0)
        self._last = 0.0
        self._known_from, self._changed = known_from, threading.Condition()
        monkeypatch.setattr(pyfuse3, "invalidate_inode", self._invalidate)

    def _invalidate(self, inode: int, attr_only: bool) -> None:
        assert attr_only
        with self._changed:
            self.told[inode] += 1
            self._last = time.monotonic()
            self._changed.notify_all()
            if self.told[inode] < self._known_from[inode]:
                raise OSError(errno.ENOENT, "not known")

    def wait_past(self, moment: float) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._last >= moment, WAIT_SECONDS)

    def wait(self, inode: KernelId, times: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.told[inode] >= times, WAIT_SECONDS)


def test_an_inode_that_the_kernel_does_not_know_yet_is_told_about_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer that makes it known is on its way, and older than what is to be forgotten."""
    kernel = Kernel(monkeypatch, {INODE: 3, OTHER: 1})
    notified = Notifier()
    notified.start()
    try:
        notified.forget_attributes(INODE)
        kernel.wait(INODE, 3)
        notified.forget_attributes(OTHER)
        kernel.wait(OTHER, 1)
    finally:
        notified.stop()
    assert kernel.told == {INODE: 3, OTHER: 1}


def test_an_inode_that_the_kernel_has_forgotten_is_told_about_a_few_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notifier, "AGAIN_SECONDS", (0.0, 0.05))
    kernel = Kernel(monkeypatch, {INODE: 1000, OTHER: 1})
    notified = Notifier()
    notified.start()
    try:
        notified.forget_attributes(INODE)
        kernel.wait(INODE, 3)
        # And of one that it knows, it is told until the answer has surely been taken.
        begun = time.monotonic()
        notified.forget_attributes(OTHER, was_answered=True)
        kernel.wait_past(begun + 0.05)
    finally:
        notified.stop()
    assert kernel.told[INODE] == 3
