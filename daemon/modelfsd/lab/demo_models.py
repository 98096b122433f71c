"""The files of the demo: what people keep in modelfs, made on the spot, saved and loaded as usual.

A *workload* is one thing that is saved: an array (`np.save`), a state dict (`torch.save`), or a
model in the layout of the Hugging Face hub (JSON files, an index, safetensors shards). It can be
loaded in several ways. Each way yields pairs (what was loaded, what was saved), to be compared
byte by byte with the original, which stays in memory.

Numbers are random with the spread of real weights (sigma 0.02), so nothing gets smaller by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from modelfs.limits import MIB

Array = npt.NDArray[Any]
Pairs = Iterator[tuple[Array, Array]]

SHARD_BYTES_MAX = 64 * MIB
COMPARED_BYTES = 8 * MIB  # at a time
SIGMA = 0.02
HEADS_PER_KEY_HEAD = 4  # grouped-query attention


@dataclass(frozen=True, slots=True)
class Load:
    """One way to load a workload from a directory."""

    name: str
    pairs: Callable[[Path], Pairs]
    lazy: bool  # the bytes are read while they are compared (mmap), not before


@dataclass(frozen=True, slots=True)
class Workload:
    """Something to save into a directory of its own."""

    name: str
    save_name: str
    size_bytes: int
    save: Callable[[Path], None]
    loads: tuple[Load, ...]


def is_same(found: Array, original: Array) -> bool:
    """Whether two arrays have the same type, shape and bytes (so NaN equals NaN)."""
    if found.dtype != original.dtype or found.shape != original.shape:
        return False
    if found.nbytes == 0:
        return True
    flat, expected = found.reshape(-1).view(np.uint8), original.reshape(-1).view(np.uint8)
    return all(
        np.array_equal(flat[i : i + COMPARED_BYTES], expected[i : i + COMPARED_BYTES])
        for i in range(0, len(flat), COMPARED_BYTES)
    )


def random_weights(shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float16]:
    """Weights of a layer, half precision; the same for the same seed."""
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(shape, dtype=np.float32) * SIGMA).astype(np.float16)


# ---------------------------------------------------------------- numpy


def numpy_workload(name: str, size_bytes: int, seed: int) -> Workload:
    """One array of half-precision numbers in `array.npy`."""
    columns = 1024
    array = random_weights((max(1, size_bytes // 2 // columns), columns), seed)

    def load(mmap_mode: Literal["r"] | None, directory: Path) -> Pairs:
        yield np.load(directory / "array.npy", mmap_mode=mmap_mode), array

    return Workload(
        name,
        "np.save",
        array.nbytes,
        lambda directory: np.save(directory / "array.npy", array),
        (
            Load("np.load", partial(load, None), lazy=False),
            Load("np.load mmap", partial(load, "r"), lazy=True),
        ),
    )


# ---------------------------------------------------------------- torch


def torch_workload(size_bytes: int, seed: int) -> Workload | None:
    """A state dict in `checkpoint.pt`; None if torch is not installed."""
    try:
        import torch
    except ImportError:
        return None
    tensors = dict(layers(size_bytes, seed))

    def save(directory: Path) -> None:
        state = {name: torch.from_numpy(array) for name, array in tensors.items()}
        torch.save(state, directory / "checkpoint.pt")

    def load(mmap: bool, directory: Path) -> Pairs:
        path = directory / "checkpoint.pt"
        state = torch.load(path, mmap=mmap, weights_only=True, map_location="cpu")
        assert state.keys() == tensors.keys()
        for name, tensor in state.items():
            yield tensor.numpy(), tensors[name]

    return Workload(
        "torch state dict",
        "torch.save",
        sum(array.nbytes for array in tensors.values()),
        save,
        (
            Load("torch.load", partial(load, False), lazy=False),
            Load("torch.load mmap", partial(load, True), lazy=True),
        ),
    )


# ---------------------------------------------------------------- a model of the hub


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of a transformer."""

    hidden: int
    intermediate: int
    layer_count: int
    vocabulary: int

    @property
    def key_width(self) -> int:
        """The width of keys and values."""
        return self.hidden // HEADS_PER_KEY_HEAD

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer, named as in Llama's checkpoints."""
        return {
            "input_layernorm.weight": (self.hidden,),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "post_attention_layernorm.weight": (self.hidden,),
            "self_attn.k_proj.weight": (self.key_width, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, self.hidden),
            "self_attn.q_proj.weight": (self.hidden, self.hidden),
            "self_attn.v_proj.weight": (self.key_width, self.hidden),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors, in the order of the file."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden)
        }
        for layer in range(self.layer_count):
            for name, shape in self.layer_shapes().items():
                shapes[f"model.layers.{layer}.{name}"] = shape
        shapes["model.norm.weight"] = (self.hidden,)
        shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes


def architecture(size_bytes: int) -> Architecture:
    """A transformer of about this size in half precision."""
    hidden = 512 if size_bytes < 100 * MIB else 1024 if size_bytes < 2048 * MIB else 4096
    base = Architecture(hidden, hidden * 11 // 4, 1, hidden * 8)
    layer_bytes = 2 * sum(int(np.prod(shape)) for shape in base.layer_shapes().values())
    layer_count = max(1, (size_bytes - 4 * base.vocabulary * hidden) // layer_bytes)
    return Architecture(hidden, base.intermediate, layer_count, base.vocabulary)


def layers(size_bytes: int, seed: int) -> Iterator[tuple[str, Array]]:
    """The named tensors of a transformer of about this size."""
    for index, (name, shape) in enumerate(architecture(size_bytes).shapes().items()):
        yield name, random_weights(shape, seed * 10_000 + index)


def model_workload(size_bytes: int, seed: int) -> Workload:
    """A sharded safetensors model with its JSON files."""
    shards = _cut_into_shards(dict(layers(size_bytes, seed)))
    documents = _documents(architecture(size_bytes), shards)

    def save(directory: Path) -> None:
        for name, text in documents.items():
            (directory / name).write_text(text, encoding="utf-8")
        for name, tensors in shards.items():
            save_file(tensors, directory / name, metadata={"format": "pt"})

    def load_whole(directory: Path) -> Pairs:
        yield from _document_pairs(directory, documents)
        for name, tensors in shards.items():
            loaded = load_file(directory / name)
            assert loaded.keys() == tensors.keys()
            for key, tensor in loaded.items():
                yield tensor, tensors[key]

    def load_slices(directory: Path) -> Pairs:
        """As a rank of a tensor-parallel group does: part of each tensor, then the other part."""
        yield from _document_pairs(directory, documents)
        for name, tensors in shards.items():
            with safe_open(directory / name, framework="numpy") as opened:
                for key, tensor in tensors.items():
                    middle = len(tensor) // 2
                    part = opened.get_slice(key)
                    yield part[:middle], tensor[:middle]
                    yield part[middle:], tensor[middle:]

    return Workload(
        f"model, {len(shards)} shards",
        "safetensors save",
        sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values()),
        save,
        (
            Load("safetensors load", load_whole, lazy=False),
            Load("safetensors slices", load_slices, lazy=True),
        ),
    )


def _cut_into_shards(tensors: dict[str, Array]) -> dict[str, dict[str, Array]]:
    groups: list[dict[str, Array]] = [{}]
    room_bytes = SHARD_BYTES_MAX
    for name, tensor in tensors.items():
        if groups[-1] and tensor.nbytes > room_bytes:
            groups.append({})
            room_bytes = SHARD_BYTES_MAX
        groups[-1][name] = tensor
        room_bytes -= tensor.nbytes
    return {
        f"model-{index:05}-of-{len(groups):05}.safetensors": group
        for index, group in enumerate(groups, 1)
    }


def _documents(shape: Architecture, shards: dict[str, dict[str, Array]]) -> dict[str, str]:
    """The JSON files beside the shards."""
    size_bytes = sum(array.nbytes for group in shards.values() for array in group.values())
    heads = shape.hidden // 64
    vocabulary = {f"token{number}": number for number in range(shape.vocabulary)}
    documents: dict[str, Any] = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": heads,
            "num_hidden_layers": shape.layer_count,
            "num_key_value_heads": heads // HEADS_PER_KEY_HEAD,
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": shape.vocabulary,
        },
        "generation_config.json": {"bos_token_id": 0, "do_sample": True, "eos_token_id": 1},
        "tokenizer.json": {"version": "1.0", "model": {"type": "BPE", "vocab": vocabulary}},
        "tokenizer_config.json": {"model_max_length": 8192, "tokenizer_class": "LlamaTokenizer"},
        "model.safetensors.index.json": {
            "metadata": {"total_size": size_bytes},
            "weight_map": {key: name for name, group in shards.items() for key in group},
        },
    }
    return {name: json.dumps(content, indent=2) + "\n" for name, content in documents.items()}


def _document_pairs(directory: Path, documents: dict[str, str]) -> Pairs:
    for name, text in documents.items():
        found = np.frombuffer((directory / name).read_bytes(), dtype=np.uint8)
        yield found, np.frombuffer(text.encode(), dtype=np.uint8)
