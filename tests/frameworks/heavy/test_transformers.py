"""transformers and the Hugging Face cache: tiny random models and tokenizers, made offline."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mount.mount_parts import Dirs, finish_child, start_child

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the packages are imported

import torch
from filelock import FileLock, SoftFileLock, Timeout
from huggingface_hub import snapshot_download, try_to_load_from_cache
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TEXTS = ["the disks of all machines are one directory", "every byte is checked", "one writer"] * 9
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "test/tiny"


def tiny_model() -> PreTrainedModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def assert_same_model(directory: Path | str, saved: PreTrainedModel, **options: object) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(directory, **options)
    wanted = saved.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    tokens = torch.arange(12).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, saved.eval()(tokens).logits)


def test_a_sharded_model_and_its_tokenizer_are_loaded_elsewhere(dirs: Dirs) -> None:
    saved, tokenizer = tiny_model(), tiny_tokenizer()
    saved.save_pretrained(dirs[0] / "model", max_shard_size="2MB")
    tokenizer.save_pretrained(dirs[0] / "model")
    assert len(list((dirs[1] / "model").glob("*.safetensors"))) > 3
    for directory in dirs:
        assert_same_model(directory / "model", saved)
        loaded = AutoTokenizer.from_pretrained(directory / "model")
        assert loaded(TEXTS[:3]) == tokenizer(TEXTS[:3])
    assert_same_model(dirs[2] / "model", saved, device_map=None, low_cpu_mem_usage=True)


def test_a_model_saved_over_another_is_the_new_one_elsewhere(dirs: Dirs) -> None:
    saved = tiny_model()
    saved.save_pretrained(dirs[0] / "model", max_shard_size="2MB")
    assert_same_model(dirs[1] / "model", saved)
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.mul_(-0.5)
    saved.save_pretrained(dirs[2] / "model", max_shard_size="3MB")  # fewer, larger shards
    assert_same_model(dirs[1] / "model", saved)
    assert_same_model(dirs[0] / "model", saved)


def fill_cache(cache: Path, model: PreTrainedModel, local: Path) -> Path:
    """The layout of the hub's cache, as a download makes it; returns the snapshot."""
    model.save_pretrained(local, max_shard_size="2MB")
    tiny_tokenizer().save_pretrained(local)
    root = cache / "models--test--tiny"
    locks = cache / ".locks" / root.name
    snapshot = root / "snapshots" / COMMIT
    for directory in (root / "blobs", root / "refs", snapshot, locks):
        directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(local.iterdir()):
        data = path.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        blob = root / "blobs" / etag
        with FileLock(locks / f"{etag}.lock"):
            if not blob.exists():
                partial = blob.with_suffix(".incomplete")
                with partial.open("ab") as file:  # downloads are resumed, hence appended to
                    file.truncate(0)
                    for start in range(0, len(data), 300_000):
                        file.write(data[start : start + 300_000])
                os.replace(partial, blob)
            link = snapshot / path.name
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(blob, snapshot))
    (root / "refs/main").write_text(COMMIT)
    return snapshot


def test_the_hub_s_cache_of_one_node_serves_the_others(dirs: Dirs, tmp_path: Path) -> None:
    saved = tiny_model()
    snapshot = fill_cache(dirs[0] / "hub", saved, tmp_path / "local").relative_to(dirs[0])
    for directory in dirs:
        found = try_to_load_from_cache(REPOSITORY, "config.json", directory / "hub")
        assert found == str(directory / snapshot / "config.json")
        assert snapshot_download(REPOSITORY, cache_dir=directory / "hub") == str(
            directory / snapshot
        )
        assert_same_model(directory / snapshot, saved)
        assert_same_model(REPOSITORY, saved, cache_dir=directory / "hub")
    assert os.readlink(dirs[1] / snapshot / "config.json").startswith("../../blobs/")


DOWNLOADER = """
import os, sys
sys.path[:0] = paths
from pathlib import Path
from tests.frameworks.heavy.test_transformers import fill_cache, tiny_model
for round in range(2):
    fill_cache(Path(cache), tiny_model(), Path(local))
"""


@pytest.mark.parametrize(
    "places",
    [
        pytest.param((0, 0), id="one node"),
        pytest.param(
            (0, 1),
            id="two nodes",
            marks=pytest.mark.expected_logs("another node wrote it first"),
        ),
    ],
)
def test_two_processes_that_fill_one_cache_at_once_leave_it_whole(
    dirs: Dirs, tmp_path: Path, places: tuple[int, int]
) -> None:
    """Locks do not reach from node to node: there, whichever blob is renamed last stays.

    Who had opened a partial file when the other node completed it cannot write it any more (G5).
    He hears so, or that its name is gone or a link there already, as on any file system where two
    hold the same lock, and finds everything when he begins again.
    """
    root = str(Path(__file__).parents[3])

    def start(number: int) -> subprocess.Popen[str]:
        return start_child(
            DOWNLOADER,
            cache=dirs[places[number]] / "hub",
            local=tmp_path / str(number),
            paths=[root, f"{root}/daemon"],
        )

    children = [start(number) for number in range(len(places))]
    ends = [finish_child(child, 180).errno for child in children]
    if places == (0, 1):
        came_second = (errno.EIO, errno.ENOENT, errno.EEXIST)
        for number in [number for number, end in enumerate(ends) if end in came_second]:
            ends[number] = finish_child(start(number), 180).errno
    assert ends == [0, 0]
    snapshot = Path("hub/models--test--tiny/snapshots") / COMMIT
    assert_same_model(dirs[2] / snapshot, tiny_model())
    for path in (dirs[2] / "hub/models--test--tiny/blobs").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def test_a_lock_file_can_be_held_open_by_two_nodes_at_once(dirs: Dirs) -> None:
    """It locks within a node only, but it neither fails nor blocks on the other."""
    with FileLock(dirs[0] / "a.lock", timeout=20):
        with pytest.raises(Timeout):
            FileLock(dirs[0] / "a.lock", timeout=0).acquire()
        with FileLock(dirs[1] / "a.lock", timeout=20):
            assert (dirs[2] / "a.lock").exists()
    with FileLock(dirs[2] / "a.lock", timeout=20):
        pass


def test_a_soft_lock_excludes_across_nodes(dirs: Dirs, pool: ThreadPoolExecutor) -> None:
    """O_EXCL is atomic for the cluster, so locks that rest on it work between nodes."""

    def count(number: int) -> None:
        directory = dirs[number % 3]
        for _ in range(5):
            with SoftFileLock(directory / "count.lock", timeout=60, poll_interval=0.005):
                path = directory / "count"
                value = int(path.read_text()) if path.exists() else 0
                path.write_text(str(value + 1))

    list(pool.map(count, range(4)))
    assert (dirs[0] / "count").read_text() == "20"
