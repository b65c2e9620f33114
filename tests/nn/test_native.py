"""Compilation of C++ sources on first use."""

import pytest

from lightning_meta.nn import native


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 42; }')
    return source


def built(source):
    return sorted((source.parent / "cache").rglob("*.so"))


def test_a_source_is_built_once(source):
    library = native.library(source)
    if library is None:
        pytest.skip("there is no C++ compiler")
    assert library.answer() == 42
    (file,) = built(source)
    time = file.stat().st_mtime_ns
    assert native.library(source).answer() == 42
    assert file.stat().st_mtime_ns == time
    source.write_text(source.read_text().replace("42", "43"))
    assert native.library(source).answer() == 43
    assert len(built(source)) == 2
    assert {file.suffix for file in (source.parent / "cache" / "lightning_meta").iterdir()} == {".so"}


def test_what_does_not_build_is_none(source):
    source.write_text("no C++")
    assert native.library(source) is None
    assert not built(source)


@pytest.mark.parametrize("compiler", ["/nonexistent", "false"])
def test_without_a_compiler_it_is_none(source, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    assert native.library(source) is None
    assert not built(source)


def test_without_a_place_to_keep_it_it_is_none(source, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file
    assert native.library(source) is None
