"""A manifest of a folder: the SHA-256 of every file in it, so that no bit can change unseen.

It lies in the folder itself as `MANIFEST.sha256`, in the format of `sha256sum`, so `sha256sum -c`
checks it too. `difference` writes the manifest anew and compares the two texts; a change in the
manifest itself no longer agrees with the files, so it needs no guard of its own.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

NAME = "MANIFEST.sha256"


def write(folder: Path) -> None:
    """Writes the folder's manifest, whole or not at all."""
    write_atomically(folder / NAME, _text(_digests(folder)))


def difference(folder: Path) -> str | None:
    """The first difference between the folder and its manifest, in words, or None."""
    try:
        stored = (folder / NAME).read_bytes()
    except OSError:
        return f"its {NAME} is missing"
    try:
        found = _digests(folder)
    except PermissionError:
        raise  # The user's to mend: no bit is known to be wrong.
    except OSError as error:
        return f"file {error.filename} cannot be read ({error.strerror})"
    if stored == _text(found).encode():
        return None
    try:
        expected = {path: digest for digest, path in map(_parse, stored.decode().splitlines())}
    except ValueError:
        return f"its {NAME} is not readable"
    for path in sorted(expected.keys() | found.keys()):
        if path not in found:
            return f"file {path} is missing"
        if path not in expected:
            return f"file {path} is not in its {NAME}"
        if expected[path] != found[path]:
            return f"file {path} differs from its SHA-256"
    return f"its {NAME} is not as it was written"


def write_atomically(path: Path, text: str) -> None:
    """Puts a text file in place: after a crash or a power cut all of it is there, or none."""
    draft = path.with_name(path.name + ".draft")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digests(folder: Path) -> dict[str, str]:
    own = {folder / NAME, folder / (NAME + ".draft")}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in own)
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(digests: dict[str, str]) -> str:
    return "".join(f"{digest}  {path}\n" for path, digest in digests.items())


def _parse(line: str) -> tuple[str, str]:
    digest, path = line.split("  ", 1)
    return digest, path
