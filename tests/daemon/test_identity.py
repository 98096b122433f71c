"""Who a node is: made once, kept through crashes, never guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfs.errors import UserError
from modelfs.ids import ClusterId, is_node_id
from modelfsd.trust import identity as identities


def test_the_id_is_made_once(tmp_path: Path) -> None:
    first = identities.load(tmp_path)
    assert is_node_id(first.node) and first.cluster == ""
    joined = first.in_cluster(ClusterId("c" * 16), "lab", ("one:1", "two:2"), False, 7.5)
    identities.save(tmp_path, joined)
    assert identities.load(tmp_path) == joined


def test_two_state_directories_are_two_nodes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert identities.load(tmp_path / "one").node != identities.load(tmp_path / "two").node
    assert is_node_id(identities.new_cluster_id())


def test_a_crash_while_saving_leaves_the_old_file(tmp_path: Path) -> None:
    first = identities.load(tmp_path)
    (tmp_path / "node.json.new").write_text('{"node": "half')
    assert identities.load(tmp_path) == first
    identities.save(tmp_path, first)
    assert not (tmp_path / "node.json.new").exists()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


@settings(max_examples=50)
@given(json_values | st.binary(max_size=60).map(lambda data: data.decode("latin-1")))
def test_a_damaged_file_is_a_mistake_that_the_user_is_told_of(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    directory = tmp_path_factory.mktemp("state")
    text = value if isinstance(value, str) else json.dumps(value)
    (directory / "node.json").write_text(text)
    with pytest.raises(UserError, match="move"):
        identities.load(directory)


@settings(max_examples=50)
@given(
    st.fixed_dictionaries(
        {"node": st.just("a" * 16), "format": st.just(1)},
        optional={"cluster": json_values, "cluster_name": json_values, "endpoints": json_values},
    )
)
def test_a_file_that_lacks_something_is_no_surprise(
    tmp_path_factory: pytest.TempPathFactory, value: dict[str, object]
) -> None:
    directory = tmp_path_factory.mktemp("state")
    (directory / "node.json").write_text(json.dumps(value))
    try:
        found = identities.load(directory)
    except UserError:
        return
    assert found.cluster == "" or is_node_id(found.cluster)
