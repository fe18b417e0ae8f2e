"""Our own code in C: compiled once, and what happens where it cannot be."""

import stat
from pathlib import Path

import pytest
from petals.inference import native_library as module
from petals.inference.native import native
from petals.inference.native_library import NativeError


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "petals-node" / "native"


@pytest.mark.skipif(native() is None, reason="our kernels cannot be had on this machine")
def test_it_is_compiled_once(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "small.c"  # the whole takes half a minute
    source.write_text("int answer(void) { return 42; }")
    monkeypatch.setattr(module, "_SOURCES", [source])
    made = module._library()
    assert list(empty_cache.iterdir()) == [made], "nothing is left of the making"
    assert stat.S_IMODE(empty_cache.stat().st_mode) == 0o700, "nobody else can put a library there"
    before = made.stat().st_mtime_ns
    assert module._library() == made
    assert made.stat().st_mtime_ns == before
    monkeypatch.setattr(module, "_processor", lambda: b"another one")
    assert module._library() != made


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_there_is_none(
    compiler: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(NativeError, match=compiler):
        module._library()
    native.cache_clear()
    try:
        assert native() is None
    finally:
        native.cache_clear()
    assert not list(empty_cache.glob("*"))
