"""The demo's files: each way to load gives back what was saved, and a changed byte is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from modelfs.limits import MIB
from modelfsd.lab.demo import _time
from modelfsd.lab.demo_models import (
    Workload,
    architecture,
    is_same,
    model_workload,
    numpy_workload,
    torch_workload,
)

SIZE_BYTES = 24 * MIB


def workloads() -> list[Workload]:
    made = [numpy_workload("array", SIZE_BYTES, 1), model_workload(SIZE_BYTES, 2)]
    with_torch = torch_workload(SIZE_BYTES, 3)
    return made if with_torch is None else [*made, with_torch]


@pytest.mark.parametrize("workload", workloads(), ids=lambda workload: workload.save_name)
def test_every_way_to_load_agrees_and_notices_a_changed_byte(
    workload: Workload, tmp_path: Path
) -> None:
    workload.save(tmp_path)
    assert 0.5 * SIZE_BYTES < workload.size_bytes < 1.5 * SIZE_BYTES
    for load in workload.loads:
        seconds, different = _time(load, tmp_path)
        assert seconds > 0
        assert different == 0
    largest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    for load in workload.loads:
        assert _time(load, tmp_path)[1] == 1


def test_a_model_has_the_layout_of_the_hub(tmp_path: Path) -> None:
    workload = model_workload(200 * MIB, 1)
    workload.save(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert len(shards) == 3
    assert index["metadata"]["total_size"] == workload.size_bytes
    assert "model.layers.0.self_attn.q_proj.weight" in index["weight_map"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == architecture(200 * MIB).layer_count


def test_arrays_are_compared_by_type_shape_and_bytes() -> None:
    array = np.array([1.0, np.nan, 0.0], dtype=np.float16)
    assert is_same(array.copy(), array)
    assert not is_same(np.array([1.0, np.nan, -0.0], dtype=np.float16), array)
    assert not is_same(array.astype(np.float32), array)
    assert not is_same(array.reshape(3, 1), array)
