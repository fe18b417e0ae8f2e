"""Weights from peers, on this machine's disk: shards filed by what they contain.

A shard is a safetensors file of its own, ``DIGEST.safetensors`` (the small files of a model are one,
too, of another ending). While chunks are missing it is ``DIGEST.….partial``, as long as it will be,
with each chunk in its place; it gets its good name when it is whole. There is no list of the chunks
that are there: whoever opens a shard hashes what it finds, so that after a crash, or when the disk has
gone bad, exactly what is right counts.

Rules of this file:

* Nothing is written that was not hashed, and nothing is read that was not: neither a peer nor a bad
  sector can put wrong bytes under a good name.
* Several processes may use one folder. What one of them uses it has locked, and no other removes it.
* Everything here blocks; it runs in worker threads, several at once.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Collection
from pathlib import Path

from ..protocol.errors import ConfigError, ModelError, RemoteProtocolError
from ..protocol.holdings import everything, pack
from ..protocol.manifest import FILES, MAX_MANIFEST, File, Manifest, Shard, decode_manifest

KEPT_FREE = 256 * 1024 * 1024
"""Bytes of the disk that are left to others."""
_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_PARTIAL = ".partial"


def safetensors_header(shard: Shard) -> bytes:
    """What stands before the bytes of a shard in its file; nothing before those of small files."""
    header: dict[str, object] = {}
    offset = 0
    for entry in shard.entries:
        if isinstance(entry, File):
            return b""
        end = offset + entry.size
        header[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_filename(shard: Shard) -> str:
    """What the file of a whole shard is called."""
    kind = "files" if isinstance(shard.entries[0], File) else "safetensors"
    return f"{shard.digest}.{kind}"


class _Opened:
    """A shard of which we know what is there."""

    def __init__(self, path: Path, shard: Shard) -> None:
        self.path = path
        self.header = safetensors_header(shard)
        self.chunks: set[int] = set()

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + _PARTIAL)

    @property
    def present(self) -> Path:
        return self.path if self.path.exists() else self.partial


class ShardStore:
    """The shards of one model in a folder that other models share."""

    def __init__(self, folder: Path, manifest: Manifest, *, max_bytes: int | None = None) -> None:
        """``max_bytes``: what all models in the folder may take together. Raises ConfigError."""
        self.manifest = manifest
        self.shards = folder / "shards"
        self.model = folder / "models" / manifest.fingerprint
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._opened: dict[int, _Opened] = {}
        self._locks: dict[Path, int] = {}
        try:
            self.shards.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.model.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_atomically(_manifest_path(folder, manifest.fingerprint), manifest.encoded)
        except OSError as error:
            raise ConfigError(f"data_dir: cannot write to {folder}: {error.strerror}") from error

    def __repr__(self) -> str:
        return f"<ShardStore {self.shards} of {self.manifest!r}>"

    def open(self, number: int) -> set[int]:
        """Hash what is there of a shard, unless that was done; the chunks that are right."""
        with self._lock:
            if number in self._opened:
                return set(self._opened[number].chunks)
        shard = self.manifest.shards[number]
        opened = _Opened(self.shards / shard_filename(shard), shard)
        try:
            whole = opened.path.exists()
            opened.chunks = self._right_chunks(number, opened)
            if whole and len(opened.chunks) < shard.num_chunks:  # the disk, or somebody, changed it
                opened.path.replace(opened.partial)
            elif not whole and opened.partial.exists() and len(opened.chunks) == shard.num_chunks:
                _name(opened)
        except OSError as error:
            raise ModelError(f"{opened.path} cannot be read: {error.strerror}") from error
        with self._lock:
            return set(self._opened.setdefault(number, opened).chunks)

    def bits(self, number: int) -> bytes:
        """The chunks of a shard that are there, as far as it was opened."""
        count = self.manifest.shards[number].num_chunks
        with self._lock:
            opened = self._opened.get(number)
            if opened is None:
                return b""
            return everything(count) if len(opened.chunks) == count else pack(opened.chunks, count)

    def has(self, number: int) -> bool:
        """Whether a shard was opened and is whole."""
        bits = self.bits(number)
        return bool(bits) and bits == everything(self.manifest.shards[number].num_chunks)

    def write(self, number: int, chunk: int, data: bytes | memoryview) -> bool:
        """Take in a chunk of a shard that was opened; False if it is not that. Raises ModelError."""
        shard = self.manifest.shards[number]
        if hashlib.sha256(data).digest() != shard.hash_of(chunk):
            return False
        opened = self._opened[number]
        try:
            self._write(opened, shard, chunk, data)
        except OSError as error:
            what = "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror)
            raise ModelError(f"{opened.partial} cannot be written: {what}") from error
        return True

    def read(self, number: int, chunk: int) -> bytes | None:
        """A chunk that is there; None if it is not."""
        with self._lock:
            opened = self._opened.get(number)
            if opened is None or chunk not in opened.chunks:
                return None
        return self._read(number, opened, chunk)

    def use(self, numbers: Collection[int]) -> None:
        """Lock the shards that are used from now on, and no others. Raises ModelError."""
        paths = {number: self._path(number) for number in numbers}
        for number in numbers:
            self._touch_and_lock(number, paths[number])
        for path in self._locks.keys() - set(paths.values()):
            os.close(self._locks.pop(path))

    def make_room(self, numbers: Collection[int]) -> None:
        """Remove what was not used for longest until these shards fit, which were opened.

        Raises ConfigError when they cannot.
        """
        missing = sum(
            self.manifest.shards[number].size - self._bytes_there(number) for number in numbers
        )
        files = []
        for path in self.shards.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                files.append((path, path.stat()))
        taken = sum(512 * status.st_blocks for _, status in files)
        free = shutil.disk_usage(self.shards).free - KEPT_FREE
        limit = taken + free if self._max_bytes is None else min(self._max_bytes, taken + free)
        for path, status in sorted(files, key=lambda item: item[1].st_atime):
            if taken + missing <= limit:
                return
            if self._remove(path):
                taken -= 512 * status.st_blocks
        if taken + missing > limit:
            what = "max_disk_space" if self._max_bytes == limit else "data_dir"
            raise ConfigError(
                f"{what}: the weights need {(taken + missing) / 2**30:.2f} GiB in {self.shards}, and "
                f"{max(0, limit) / 2**30:.2f} GiB may be used; allow more (--max-disk-space), serve "
                "fewer blocks (--num-blocks), or use another disk (--data-dir)"
            )

    def unpack_files(self) -> Path:
        """The folder with the model's small files and an index of its weights. Raises ModelError."""
        try:
            self._unpack_files()
        except OSError as error:
            raise ModelError(f"{self.model} cannot be written: {error.strerror}") from error
        return self.model

    def _unpack_files(self) -> None:
        data = self.shards.joinpath(shard_filename(self.manifest.files)).read_bytes()
        offset = 0
        for entry in self.manifest.files.entries:
            _write_atomically(self.model / entry.name, data[offset : offset + entry.size])
            offset += entry.size
        weight_map = {
            entry.name: shard_filename(shard)
            for shard in self.manifest.shards[FILES + 1 :]
            for entry in shard.entries
        }
        index = {"metadata": {"total_size": self.manifest.size}, "weight_map": weight_map}
        _write_atomically(self.model / "model.safetensors.index.json", json.dumps(index).encode())

    def close(self) -> None:
        """Lock nothing any more."""
        while self._locks:
            os.close(self._locks.popitem()[1])

    # --- chunks -------------------------------------------------------------------------------

    def _right_chunks(self, number: int, opened: _Opened) -> set[int]:
        shard = self.manifest.shards[number]
        try:
            with opened.present.open("rb") as file:
                if file.read(len(opened.header)) != opened.header:
                    return set()
                right = set()
                for chunk in range(shard.num_chunks):
                    data = file.read(self.manifest.chunk_size(number, chunk))
                    if hashlib.sha256(data).digest() == shard.hash_of(chunk):
                        right.add(chunk)
                return right
        except FileNotFoundError:
            return set()

    def _write(self, opened: _Opened, shard: Shard, chunk: int, data: bytes | memoryview) -> None:
        with self._lock:
            if chunk in opened.chunks:
                return
        file = os.open(opened.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = len(opened.header) + shard.size
            if os.fstat(file).st_size != size:
                os.truncate(file, size)
                os.pwrite(file, opened.header, 0)
            offset = len(opened.header) + chunk * self.manifest.chunk_bytes
            written = 0
            while written < len(data):
                written += os.pwrite(file, data[written:], offset + written)
        finally:
            os.close(file)
        with self._lock:
            opened.chunks.add(chunk)
            whole = len(opened.chunks) == shard.num_chunks
        if whole:
            _name(opened)

    def _read(self, number: int, opened: _Opened, chunk: int) -> bytes | None:
        size = self.manifest.chunk_size(number, chunk)
        offset = len(opened.header) + chunk * self.manifest.chunk_bytes
        for path in (opened.path, opened.partial, opened.path):  # it may be named in between
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                data = os.pread(file, size, offset)
            finally:
                os.close(file)
            return data if len(data) == size else None
        return None

    # --- room ---------------------------------------------------------------------------------

    def _path(self, number: int) -> Path:
        return self.shards / shard_filename(self.manifest.shards[number])

    def _bytes_there(self, number: int) -> int:
        with self._lock:
            opened = self._opened.get(number)
            return (
                0
                if opened is None
                else sum(self.manifest.chunk_size(number, chunk) for chunk in opened.chunks)
            )

    def _touch_and_lock(self, number: int, path: Path) -> None:
        """Nobody removes the file now; and it was used just now, for whoever looks for old ones."""
        while path not in self._locks:
            opened = _Opened(path, self.manifest.shards[number])
            try:
                file = os.open(opened.present, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise ModelError(f"{path} cannot be opened: {error.strerror}") from error
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file).st_nlink:
                self._locks[path] = file
            else:  # somebody has removed it meanwhile
                os.close(file)
        # Not the time of change, by which whoever has it mapped knows that it is the same.
        file = self._locks[path]
        os.utime(file, ns=(time.time_ns(), os.fstat(file).st_mtime_ns))

    def _remove(self, path: Path) -> bool:
        """Remove a file that no process has locked."""
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        except OSError:
            return False
        finally:
            os.close(file)
        self._forget(path)
        return True

    def _forget(self, path: Path) -> None:
        name = path.name.removesuffix(_PARTIAL)
        with self._lock:
            for number, opened in list(self._opened.items()):
                if opened.path.name == name:
                    del self._opened[number]


def kept_manifest(folder: Path, fingerprint: str) -> Manifest | None:
    """The manifest of a model, if this machine has it."""
    path = _manifest_path(folder, fingerprint)
    try:
        if path.stat().st_size > MAX_MANIFEST:
            return None
        return decode_manifest(path.read_bytes(), fingerprint)
    except (OSError, RemoteProtocolError):
        return None


def _manifest_path(folder: Path, fingerprint: str) -> Path:
    return folder / "models" / fingerprint / "manifest"


def _name(opened: _Opened) -> None:
    """Give a whole shard its good name, once it is on the disk."""
    try:
        file = os.open(opened.partial, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)
        opened.partial.replace(opened.path)
    except FileNotFoundError:  # another process was faster
        if not opened.path.exists():
            raise


def _write_atomically(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)
