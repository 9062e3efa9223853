"""Manifests: no change of a folder's files goes unseen, and `sha256sum` agrees."""

import hashlib

import pytest

from jaxmp.run import manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "data").write_bytes(b"\x00\x01" * 50)
    (tmp_path / "a" / "empty").write_bytes(b"")
    (tmp_path / "top").write_bytes(b"words")
    manifest.write(tmp_path)
    return tmp_path


def test_is_in_the_format_of_sha256sum(folder):
    digest = lambda data: hashlib.sha256(data).hexdigest()
    assert (folder / manifest.NAME).read_text().splitlines() == [
        f"{digest(bytes([0, 1]) * 50)}  a/b/data",
        f"{digest(b'')}  a/empty",
        f"{digest(b'words')}  top",
    ]
    assert manifest.difference(folder) is None


def test_every_bit_of_every_file_counts_those_of_the_manifest_too(folder):
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for index in range(len(whole)):
            for bit in range(8):
                flipped = bytearray(whole)
                flipped[index] ^= 1 << bit
                path.write_bytes(flipped)
                assert manifest.difference(folder), (path, index, bit)
        path.write_bytes(whole)
    assert manifest.difference(folder) is None


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda f: (f / "top").unlink(), "file top is missing"),
        (lambda f: (f / "a" / "new").touch(), "file a/new is not in its MANIFEST.sha256"),
        (lambda f: (f / "a" / "empty").write_text("x"), "file a/empty differs from its SHA-256"),
        (lambda f: (f / "top").rename(f / "pot"), "file pot is not in its MANIFEST.sha256"),
        (lambda f: (f / manifest.NAME).unlink(), "its MANIFEST.sha256 is missing"),
        (lambda f: (f / manifest.NAME).write_text("{"), "its MANIFEST.sha256 is not readable"),
        (lambda f: (f / manifest.NAME).write_bytes(b"\xff"), "its MANIFEST.sha256 is not readable"),
        (lambda f: (f / manifest.NAME).write_text(""), "file a/b/data is not in its"),
    ],
)
def test_names_what_differs(folder, change, told):
    change(folder)
    assert told in manifest.difference(folder)


def test_files_are_put_in_place_whole(tmp_path):
    manifest.write_atomically(tmp_path / "note", "first")
    manifest.write_atomically(tmp_path / "note", "second")
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
    assert (tmp_path / "note").read_text() == "second"
