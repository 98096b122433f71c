"""What the daemons of a lab may say while a test runs: nothing that the test does not expect."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from modelfsd.lab.cluster import Lab


@contextmanager
def watched(lab: Lab, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail at the end if a daemon has logged a WARNING or worse meanwhile.

    A test expects some with `@pytest.mark.expected_logs("regular expression", ...)`.
    """
    starts = [node.log_path.stat().st_size for node in lab.nodes]
    yield
    expected = [text for mark in request.node.iter_markers("expected_logs") for text in mark.args]
    surprises = []
    for node, start in zip(lab.nodes, starts, strict=True):
        with node.log_path.open(errors="replace") as log:
            log.seek(start)
            lines = log.read().splitlines()
        surprises += [
            f"{node.name}: {line}"
            for line in lines
            if (" WARNING " in line or " ERROR " in line or line.startswith("    |"))
            and not any(re.search(text, line) for text in expected)
        ]
    if surprises:
        pytest.fail("unexpected in the daemons' logs:\n" + "\n".join(surprises), pytrace=False)
