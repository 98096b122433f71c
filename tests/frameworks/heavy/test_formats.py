"""joblib, HDF5, ONNX and GGUF: saved through one node, loaded through another."""

from __future__ import annotations

from pathlib import Path

import gguf
import h5py
import joblib
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.mount.mount_parts import Dirs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Arrays = dict[str, NDArray[np.float32]]


@pytest.fixture
def arrays() -> Arrays:
    rng = np.random.default_rng(21)
    return {
        f"block.{i}.weight": rng.standard_normal((500 + i, 768), dtype=np.float32) for i in range(5)
    }


def assert_equal(loaded: Arrays, saved: Arrays) -> None:
    assert loaded.keys() == saved.keys()
    for name, array in saved.items():
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize("mmap_mode", [None, "r", "c"])
def test_joblib_dumps_are_loaded_and_mapped_elsewhere(
    dirs: Dirs, arrays: Arrays, mmap_mode: str | None
) -> None:
    joblib.dump(arrays, dirs[0] / "a.joblib")
    for directory in dirs:
        assert_equal(joblib.load(directory / "a.joblib", mmap_mode=mmap_mode), arrays)


@pytest.mark.parametrize("compress", ["zlib", ("lzma", 1)], ids=str)
def test_compressed_joblib_dumps_are_loaded_elsewhere(
    dirs: Dirs, arrays: Arrays, compress: object
) -> None:
    joblib.dump(arrays, dirs[1] / "a.joblib", compress=compress)
    assert_equal(joblib.load(dirs[2] / "a.joblib"), arrays)


def test_joblib_s_memory_of_one_node_serves_the_others(dirs: Dirs) -> None:
    calls: list[int] = []

    def costly(number: int) -> NDArray[np.int64]:
        calls.append(number)
        return np.arange(number)

    for directory in dirs:
        memory = joblib.Memory(directory / "memory", verbose=0)
        cached = memory.cache(costly, ignore=[])
        np.testing.assert_array_equal(cached(200_000), np.arange(200_000))
    assert calls == [200_000]


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_hdf5_files_are_written_extended_and_read_by_three_nodes(
    dirs: Dirs, arrays: Arrays, libver: str
) -> None:
    names = list(arrays)
    with h5py.File(dirs[0] / "a.h5", "w", libver=libver) as file:
        for name in names[:3]:
            file.create_dataset(name, data=arrays[name], chunks=(64, 768), compression="gzip")
        file.create_dataset("log", (0,), maxshape=(None,), dtype="i8", chunks=(1000,))
        file.attrs["step"] = 1
    with h5py.File(dirs[1] / "a.h5", "a", libver=libver) as file:
        for name in names[3:]:
            file[name] = arrays[name]
        for start in range(0, 50_000, 5000):
            file["log"].resize((start + 5000,))
            file["log"][start:] = np.arange(start, start + 5000)
            file.flush()
        file.attrs["step"] = 2
        del file[names[0]]
        file[names[0]] = arrays[names[0]][::-1]
    with h5py.File(dirs[2] / "a.h5", "r+", libver=libver) as file:
        file[names[0]][...] = arrays[names[0]]
        file["log"][::7] = -1
    log = np.arange(50_000)
    log[::7] = -1
    for directory in dirs:
        with h5py.File(directory / "a.h5", "r") as file:
            assert_equal({name: file[name][...] for name in names}, arrays)
            np.testing.assert_array_equal(file["log"][...], log)
            np.testing.assert_array_equal(file[names[1]][77:99, 5:9], arrays[names[1]][77:99, 5:9])
            assert file.attrs["step"] == 2


@pytest.mark.parametrize("one_file", [True, False], ids=["one file", "a file each"])
def test_onnx_models_with_external_data_are_loaded_elsewhere(
    dirs: Dirs, arrays: Arrays, one_file: bool
) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", [next(iter(arrays))], ["out"])],
        "graph",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [500, 768])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph)
    onnx.save(
        model,
        dirs[0] / "model.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=one_file,
        location="model.data" if one_file else None,
        size_threshold=1024,
    )
    expected = 2 if one_file else 1 + len(arrays)
    assert len(list(dirs[1].iterdir())) == expected
    for directory in dirs[1:]:
        onnx.checker.check_model(str(directory / "model.onnx"))
        loaded = onnx.load(directory / "model.onnx")
        found = {tensor.name: numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer}
        assert_equal(found, arrays)


def test_gguf_files_are_mapped_elsewhere(dirs: Dirs, arrays: Arrays) -> None:
    path = Path("model.gguf")
    writer = gguf.GGUFWriter(dirs[0] / path, "llama")
    writer.add_block_count(len(arrays))
    writer.add_array("tokens", [f"token {i}" for i in range(5000)])
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    quantized = gguf.quants.quantize(arrays["block.0.weight"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("quantized", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for directory in dirs:
        reader = gguf.GGUFReader(directory / path)
        found = {tensor.name: tensor for tensor in reader.tensors}
        np.testing.assert_array_equal(found.pop("quantized").data, quantized)
        assert_equal({name: tensor.data for name, tensor in found.items()}, arrays)
        tokens = reader.fields["tokens"]
        assert bytes(tokens.parts[tokens.data[4999]]).decode() == "token 4999"


def test_gguf_metadata_is_changed_in_place(dirs: Dirs, arrays: Arrays) -> None:
    """As gguf_set_metadata does: a writable mapping of the whole file."""
    path = Path("model.gguf")
    writer = gguf.GGUFWriter(dirs[0] / path, "llama")
    writer.add_block_count(3)
    writer.add_tensor("w", arrays["block.1.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    editor = gguf.GGUFReader(dirs[1] / path, "r+")
    field = editor.fields["llama.block_count"]
    field.parts[field.data[0]][0] = 42
    editor.data.flush()
    for directory in dirs:
        reader = gguf.GGUFReader(directory / path)
        field = reader.fields["llama.block_count"]
        assert field.parts[field.data[0]][0] == 42
        np.testing.assert_array_equal(reader.tensors[0].data, arrays["block.1.weight"])
