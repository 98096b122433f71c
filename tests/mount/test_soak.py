"""The soak, for 20 seconds on a healthy lab, and what its readers would notice."""

from __future__ import annotations

import itertools

import pytest

from modelfsd.lab.cluster import Lab
from tests.soak import Soak
from tests.soak_workers import Torn, appended, half_of, number_in, version_of

pytestmark = pytest.mark.fuse

SECONDS = 20.0


def test_readers_and_writers_on_three_nodes_find_nothing_wrong(lab: Lab) -> None:
    findings = Soak(lab, SECONDS, seed=0, with_faults=False).run()
    assert findings.problems == []
    for what in ("write rewrite", "write replace", "write append", "read", "mmap"):
        assert findings.done[what], f"no {what} in {findings.done}"
    assert findings.versions


@pytest.mark.parametrize("name", ["rewrite-0", "replace-0", "append-0"])
def test_each_version_is_known_and_nothing_else_passes_for_one(name: str) -> None:
    if name == "append-0":
        wholes = [appended(24 * count) for count in (1, 7, 300)]
    else:
        wholes = [version_of(number, length) for number, length in ((1, 24), (2, 999), (3, 7000))]
        wholes.append(wholes[2][: half_of(7000)])
    ranks = [number_in(whole, name) for whole in wholes]
    assert len(set(ranks)) == len(ranks)
    for one, other in itertools.combinations(sorted(wholes, key=len), 2):
        mixture = one[: len(one) // 2] + other[len(one) // 2 :]
        if mixture not in wholes:
            with pytest.raises(Torn):
                number_in(mixture, name)
    for whole in wholes[1:]:
        for torn in (b"", whole[:-1], whole + b"\0", whole[:30] + bytes(24) + whole[54:]):
            with pytest.raises(Torn):
                number_in(torn, name)


def test_a_cut_version_comes_after_the_whole_one_and_before_the_next() -> None:
    whole, following = version_of(5, 7000), version_of(6, 100)
    ranks = [number_in(data, "rewrite-0") for data in (whole, whole[: half_of(7000)], following)]
    assert ranks == sorted(set(ranks))
