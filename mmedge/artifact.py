"""Artifacts: immutable folders, written atomically and found again by the hash of all that went into them.

A folder under ``artifacts/`` either has a ``manifest.json`` whose digests match its files, or it is not an artifact:
work is done in a temporary folder beside it and renamed into place when complete, so that a process killed at any
moment leaves nothing that could be taken for whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mmedge.errors import ArtifactError

MANIFEST = "manifest.json"
_DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO}
Kind = Literal["torch", "onnx", "engine", "measurement", "cache"]


def digest_of(value: Any) -> str:
    """The sha256 of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


class Manifest(BaseModel):
    """What an artifact is and how it came to be.

    Attributes:
        key: hash of everything that went in (parent, configuration, code and tool versions, seed).
        digest: hash of everything that came out (the digests of its files).
        files: file name to sha256.
        about: facts about the content, by kind (I/O specs, edits, coverage, build log summary, values).
        redo: the command that makes it again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    kind: Kind
    name: str
    key: str
    digest: str
    parent: str | None
    files: dict[str, str]
    inputs: dict[str, Any]
    about: dict[str, Any]
    redo: str
    created: str


@dataclass(frozen=True)
class Artifact:
    """A complete artifact on disk."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """The hash of its content."""
        return self.manifest.digest

    @property
    def about(self) -> dict[str, Any]:
        """Facts about the content."""
        return self.manifest.about

    def file(self, name: str) -> Path:
        """The path of one of its files.

        Raises:
            ArtifactError: the manifest lists no such file.
        """
        if name not in self.manifest.files:
            raise ArtifactError(f"no file {name!r} in the artifact", where=str(self.path))
        return self.path / name

    def size_bytes(self) -> int:
        """The size of its files on disk, manifest excluded."""
        return sum((self.path / name).stat().st_size for name in self.manifest.files)


def load_artifact(path: Path) -> Artifact:
    """Open an artifact and check every file against its digest.

    Raises:
        ArtifactError: there is no manifest, it cannot be read, or a file is missing or differs.
    """
    manifest_path = path / MANIFEST
    try:
        manifest = Manifest.model_validate_json(manifest_path.read_text())
    except FileNotFoundError as err:
        raise ArtifactError("not an artifact: no manifest.json", where=str(path)) from err
    except (OSError, ValueError, ValidationError) as err:
        raise ArtifactError("manifest.json cannot be read", where=str(path), fix=str(err).splitlines()[0]) from err
    for name, expected in manifest.files.items():
        if Path(name).name != name:
            raise ArtifactError(f"manifest names a file outside its folder: {name!r}", where=str(path))
        if not (path / name).is_file():
            raise ArtifactError(f"{name} is missing", where=str(path))
        if file_digest(path / name) != expected:
            raise ArtifactError(f"{name} does not match its digest", where=str(path))
    if _content_digest(manifest.files, manifest.about) != manifest.digest:
        raise ArtifactError("manifest.json does not match its digest", where=str(path))
    return Artifact(path, manifest)


def _content_digest(files: Mapping[str, str], about: Mapping[str, Any]) -> str:
    return digest_of({"files": dict(files), "about": dict(about)})


class Store:
    """The artifacts of one run.

    Args:
        root: the ``artifacts/`` folder of the run.
        redo: the command line that is making them.
        warn: told when a damaged artifact was found and set aside.
    """

    def __init__(self, root: Path, redo: str, warn: Callable[[str], None]) -> None:
        self.root = root
        self.redo = redo
        self.warn = warn
        try:
            root.mkdir(parents=True, exist_ok=True)
            for leftover in root.glob(".making-*"):  # of a process that was killed
                shutil.rmtree(leftover)
        except OSError as err:
            raise _disk_error(err, root, "opening the artifacts") from err

    def find(self, kind: Kind, name: str, inputs: Mapping[str, Any]) -> Artifact | None:
        """The artifact made from ``inputs``, or None; a damaged one is set aside and counts as none."""
        path = self._path(kind, name, inputs)
        if not path.exists():
            return None
        try:
            found = load_artifact(path)
            if found.manifest.key != _key(kind, name, inputs):
                raise ArtifactError("it was made from something else", where=str(path))
            return found
        except ArtifactError as err:
            aside = path.with_name(f".damaged-{path.name}-{time.time_ns()}")
            path.rename(aside)
            self.warn(f"{err}; kept as {aside.name} and made again")
            return None

    def make(
        self,
        kind: Kind,
        name: str,
        inputs: Mapping[str, Any],
        write: Callable[[Path], Mapping[str, Any]],
        parent: Artifact | None = None,
    ) -> Artifact:
        """The artifact made from ``inputs``: found, or made by ``write``.

        Args:
            kind: what it holds.
            name: a readable name, part of the folder's name.
            inputs: a JSON value of everything the content depends on.
            write: writes the files into the folder it is given and returns ``about``, a JSON object.
            parent: the artifact it was made from.

        Raises:
            ArtifactError: the files could not be written (no space, no permission).
        """
        found = self.find(kind, name, inputs) or self._make(kind, name, inputs, write, parent)
        shutil.rmtree(self.scratch(kind, name, inputs), ignore_errors=True)
        return found

    def _make(
        self,
        kind: Kind,
        name: str,
        inputs: Mapping[str, Any],
        write: Callable[[Path], Mapping[str, Any]],
        parent: Artifact | None,
    ) -> Artifact:
        path = self._path(kind, name, inputs)
        with writing(path, f"making {name}") as folder:
            about = dict(write(folder))
            files = {file.name: file_digest(file) for file in sorted(folder.iterdir())}
            manifest = Manifest(
                kind=kind,
                name=name,
                key=_key(kind, name, inputs),
                digest=_content_digest(files, about),
                parent=parent.digest if parent else None,
                files=files,
                inputs=dict(inputs),
                about=about,
                redo=self.redo,
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            )
            write_text(folder / MANIFEST, manifest.model_dump_json(indent=2))
        return Artifact(path, manifest)

    def scratch(self, kind: Kind, name: str, inputs: Mapping[str, Any]) -> Path:
        """A folder for what must outlive a killed process while an artifact is made; ``make`` removes it in the end."""
        path = self._path(kind, name, inputs)
        return path.with_name(f".unfinished-{path.name}")

    def set_aside(self, kind: Kind, name: str, inputs: Mapping[str, Any]) -> None:
        """Rename an artifact so that it is made anew; nothing is deleted."""
        path = self._path(kind, name, inputs)
        if path.exists():
            path.rename(path.with_name(f".replaced-{path.name}-{time.time_ns()}"))

    def values(self, name: str, inputs: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The JSON values measured from ``inputs``: found, or measured now."""
        return self.make("measurement", name, inputs, lambda folder: measure()).about

    def _path(self, kind: Kind, name: str, inputs: Mapping[str, Any]) -> Path:
        return self.root / f"{name}-{_key(kind, name, inputs)[:12]}"


def _key(kind: Kind, name: str, inputs: Mapping[str, Any]) -> str:
    return digest_of({"kind": kind, "name": name, "inputs": inputs})


@contextmanager
def writing(path: Path, doing: str) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and vanishes when it does not.

    Raises:
        ArtifactError: the disk is full or the place cannot be written.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=".making-", dir=path.parent))
        folder.chmod(0o755)
    except OSError as err:
        raise _disk_error(err, path, doing) from err
    try:
        yield folder
        for file in folder.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        folder.rename(path)
    except BaseException as err:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(err, OSError) and err.errno in _DISK_TROUBLE:
            raise _disk_error(err, path, doing) from err
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the new one, never half of either.

    Raises:
        ArtifactError: the disk is full or the place cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as err:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise _disk_error(err, path, f"writing {path.name}") from err


def _disk_error(err: OSError, path: Path, doing: str) -> ArtifactError:
    fix = "free some space or choose another place to write to, then run the same command: what is finished is kept"
    return ArtifactError(f"{doing} failed: {err.strerror or err}", where=str(path.parent), fix=fix)
