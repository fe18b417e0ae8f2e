"""Shards on the disk: only what was hashed is there, whatever happens to the files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from petals.node import shard_store
from petals.node.shard_store import ShardStore, kept_manifest, shard_filename
from petals.protocol.errors import ConfigError, ModelError
from petals.protocol.manifest import FILES, FIRST_BLOCK, MAX_MANIFEST, MIN_CHUNK
from safetensors import safe_open
from support.models import RandomModel

MODEL = RandomModel()
BLOCK = FIRST_BLOCK
ALL = range(len(MODEL.manifest.shards))


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    return opened(tmp_path)


def opened(folder: Path, *numbers: int, model: RandomModel = MODEL) -> ShardStore:
    """A store as after a start."""
    store = ShardStore(folder, model.manifest)
    for number in numbers:
        store.open(number)
    return store


def fill(store: ShardStore, *numbers: int, model: RandomModel = MODEL) -> None:
    for number in numbers:
        store.open(number)
        for chunk in range(model.manifest.shards[number].num_chunks):
            data = model.read(number, chunk)
            assert data is not None
            assert store.write(number, chunk, data)


def path_of(store: ShardStore, number: int) -> Path:
    return store.shards / shard_filename(store.manifest.shards[number])


def test_a_whole_shard_is_a_safetensors_file(store: ShardStore) -> None:
    fill(store, BLOCK)
    with safe_open(path_of(store, BLOCK), framework="numpy") as file:
        assert file.keys() == ["h.0.w"]
        assert file.get_tensor("h.0.w").tobytes() == MODEL.contents[BLOCK]
    assert store.has(BLOCK)
    assert [store.read(BLOCK, chunk) for chunk in range(4)] == [
        MODEL.read(BLOCK, chunk) for chunk in range(4)
    ]


def test_a_shard_has_its_name_only_when_it_is_whole(store: ShardStore) -> None:
    store.open(BLOCK)
    for chunk in (3, 0, 2):
        assert store.write(BLOCK, chunk, MODEL.read(BLOCK, chunk) or b"")
        assert not path_of(store, BLOCK).exists()
    assert not store.has(BLOCK)
    assert store.bits(BLOCK) == bytes([0b1101])
    assert store.read(BLOCK, 1) is None
    assert store.read(BLOCK, 3) == MODEL.read(BLOCK, 3)
    assert store.write(BLOCK, 1, MODEL.read(BLOCK, 1) or b"")
    assert store.write(BLOCK, 1, MODEL.read(BLOCK, 1) or b""), "twice"
    assert path_of(store, BLOCK).exists()


@pytest.mark.parametrize("wrong", [b"", b"short", bytes(MIN_CHUNK), bytes(3 * MIN_CHUNK)])
def test_what_is_wrong_is_not_written(store: ShardStore, wrong: bytes) -> None:
    store.open(BLOCK)
    assert not store.write(BLOCK, 0, wrong)
    assert not list(store.shards.iterdir())
    assert store.bits(BLOCK) == bytes([0])


def test_nothing_is_known_of_what_was_not_opened(store: ShardStore) -> None:
    assert store.bits(BLOCK) == b""
    assert not store.has(BLOCK)
    assert store.read(BLOCK, 0) is None


def test_a_start_finds_the_chunks_that_were_there(tmp_path: Path, store: ShardStore) -> None:
    fill(store, BLOCK)
    store.open(BLOCK + 1)
    store.write(BLOCK + 1, 2, MODEL.read(BLOCK + 1, 2) or b"")
    again = opened(tmp_path)
    assert again.open(BLOCK) == {0, 1, 2, 3}
    assert again.open(BLOCK + 1) == {2}
    assert again.open(BLOCK + 2) == set()


def test_a_start_finds_what_has_gone_bad(tmp_path: Path, store: ShardStore) -> None:
    fill(store, BLOCK)
    path = path_of(store, BLOCK)
    data = bytearray(path.read_bytes())
    data[-MIN_CHUNK - 7] ^= 1
    path.write_bytes(data)
    again = opened(tmp_path)
    assert again.open(BLOCK) == {0, 1, 3}
    assert not path.exists()
    assert again.write(BLOCK, 2, MODEL.read(BLOCK, 2) or b"")
    assert opened(tmp_path).open(BLOCK) == {0, 1, 2, 3}


@pytest.mark.parametrize("size", [0, 5, 1000, MIN_CHUNK + 500])
def test_a_start_finds_what_was_cut_off(tmp_path: Path, store: ShardStore, size: int) -> None:
    fill(store, BLOCK)
    os.truncate(path_of(store, BLOCK), size)
    again = opened(tmp_path)
    assert again.open(BLOCK) == ({0} if size > MIN_CHUNK else set())
    fill(again, BLOCK)
    assert again.has(BLOCK)
    assert path_of(store, BLOCK).exists()


def test_a_crash_before_the_last_step_costs_nothing(tmp_path: Path, store: ShardStore) -> None:
    fill(store, BLOCK)
    path = path_of(store, BLOCK)
    path.rename(path.with_name(path.name + ".partial"))
    assert opened(tmp_path, BLOCK).has(BLOCK)
    assert path.exists()


def test_small_files_are_unpacked_beside_an_index(store: ShardStore) -> None:
    fill(store, FILES)
    folder = store.unpack_files()
    assert (folder / "config.json").read_bytes() == MODEL.contents[FILES][:500]
    assert (folder / "tokenizer.json").read_bytes() == MODEL.contents[FILES][500:]
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"]["h.1.w"] == path_of(store, BLOCK + 1).name


def test_the_manifest_is_kept_and_checked(tmp_path: Path, store: ShardStore) -> None:
    fingerprint = store.manifest.fingerprint
    assert kept_manifest(tmp_path, fingerprint) == store.manifest
    assert kept_manifest(tmp_path, "0" * 64) is None
    (kept,) = tmp_path.glob("models/*/manifest")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert kept_manifest(tmp_path, fingerprint) is None
    kept.write_bytes(bytes(MAX_MANIFEST + 1))
    assert kept_manifest(tmp_path, fingerprint) is None


def test_models_share_the_shards_that_they_have_in_common(
    tmp_path: Path, store: ShardStore
) -> None:
    fill(store, *ALL)
    larger = RandomModel(num_blocks=4)
    assert larger.contents[:5] == MODEL.contents
    other = opened(tmp_path, *range(6), model=larger)
    assert [other.has(number) for number in range(6)] == [True] * 5 + [False]


# --- room -----------------------------------------------------------------------------------------


def age(store: ShardStore, *numbers: int) -> None:
    """Make it long ago that these were used, the first ones longest."""
    for place, number in enumerate(numbers):
        os.utime(path_of(store, number), (1000.0 + place, 1000.0 + place))


def test_what_was_not_used_for_longest_gives_way(tmp_path: Path, store: ShardStore) -> None:
    fill(store, *ALL)
    age(store, BLOCK + 1, BLOCK, BLOCK + 2)
    other = RandomModel(num_blocks=1, seed=1)
    limited = ShardStore(tmp_path, other.manifest, max_bytes=5 * 4 * MIN_CHUNK // 2)
    limited.use([BLOCK])
    limited.open(BLOCK)
    limited.make_room([BLOCK])
    there = [path_of(store, number).exists() for number in ALL]
    assert there == [True, True, False, False, True]
    assert store.read(BLOCK + 1, 0) is None, "gone behind its back"
    fill(limited, BLOCK, model=other)


def test_what_is_used_stays_even_for_other_processes(tmp_path: Path, store: ShardStore) -> None:
    fill(store, *ALL)
    age(store, *range(1, 5))
    store.use([BLOCK])
    script = (
        "import sys, pathlib; sys.path[:0] = sys.argv[2:];"
        "from petals.node.shard_store import ShardStore; from support.models import RandomModel;"
        "model = RandomModel(num_blocks=1, seed=1);"
        "store = ShardStore(pathlib.Path(sys.argv[1]), model.manifest, max_bytes=8 * 65536);"
        "store.use([2]); store.open(2); store.make_room([2])"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path, *sys.path], check=True)
    assert path_of(store, BLOCK).exists()
    assert not path_of(store, BLOCK + 1).exists()
    store.use([])
    subprocess.run([sys.executable, "-c", script, tmp_path, *sys.path], check=True)
    assert path_of(store, BLOCK).exists(), "there is room for it already"
    store.close()


def test_too_little_room_is_told_in_words(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, MODEL.manifest, max_bytes=3 * MIN_CHUNK)
    store.use(ALL)
    for number in ALL:
        store.open(number)
    with pytest.raises(ConfigError, match=r"max_disk_space: the weights need .*--max-disk-space"):
        store.make_room(ALL)


def test_a_full_disk_is_told_in_words(
    tmp_path: Path, store: ShardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_store, "KEPT_FREE", 1 << 60)
    with pytest.raises(ConfigError, match=r"data_dir: .*--data-dir"):
        store.make_room([])
    monkeypatch.undo()
    store.open(BLOCK)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ModelError, match="the disk is full"):
        store.write(BLOCK, 0, MODEL.read(BLOCK, 0) or b"")


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="data_dir: cannot write to"):
        ShardStore(tmp_path / "file", MODEL.manifest)
