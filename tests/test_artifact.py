"""Artifacts are whole or not there, are found by what went into them, and are never lost silently."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mmedge.artifact import Artifact, Store, digest_of, load_artifact, write_text
from mmedge.errors import ArtifactError

INPUTS = {"parent": "abc", "settings": {"width": 0.5, "depth": 1.0}, "seed": 0}


def store(root: Path, said: list[str] | None = None) -> Store:
    return Store(root, "mmedge compress …", (said if said is not None else []).append)


def weights(text: str = "weights") -> Callable[[Path], Mapping[str, Any]]:
    def write(folder: Path) -> Mapping[str, Any]:
        (folder / "weights.bin").write_text(text)
        return {"parameters": 7}

    return write


def refuses(folder: Path) -> Mapping[str, Any]:
    raise AssertionError("made again")


def made(root: Path, inputs: Mapping[str, Any] = INPUTS) -> Artifact:
    return store(root).make("torch", "prune", inputs, weights())


def test_found_again_with_all_that_was_kept(tmp_path: Path) -> None:
    first = made(tmp_path)
    again = store(tmp_path).make("torch", "prune", dict(reversed(INPUTS.items())), refuses)
    assert again == first == load_artifact(first.path)
    assert again.about == {"parameters": 7}
    assert again.file("weights.bin").read_text() == "weights"
    assert again.size_bytes() == len("weights")
    assert again.manifest.inputs == INPUTS
    assert again.manifest.redo == "mmedge compress …"
    with pytest.raises(ArtifactError, match=r"no file 'wieghts\.bin'"):
        again.file("wieghts.bin")


CHANGES: dict[str, Mapping[str, Any]] = {
    "settings": {**INPUTS, "settings": {"width": 0.4, "depth": 1.0}},
    "seed": {**INPUTS, "seed": 1},
    "parent": {**INPUTS, "parent": "abd"},
    "more": {**INPUTS, "versions": {"torch": "2.13.0"}},
    "type": {**INPUTS, "seed": "0"},
}


@pytest.mark.parametrize("inputs", CHANGES.values(), ids=CHANGES)
def test_key_depends_on_every_input(tmp_path: Path, inputs: Mapping[str, Any]) -> None:
    first = made(tmp_path)
    assert store(tmp_path).find("torch", "prune", inputs) is None
    other = made(tmp_path, inputs)
    assert other.manifest.key != first.manifest.key
    assert other.path != first.path
    assert other.digest == first.digest  # the content is the same


def test_key_depends_on_kind_and_name(tmp_path: Path) -> None:
    made(tmp_path)
    assert store(tmp_path).find("onnx", "prune", INPUTS) is None
    assert store(tmp_path).find("torch", "prune-2", INPUTS) is None


def test_digest_takes_no_number_that_is_none() -> None:
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 2, "b": 1})
    with pytest.raises(ValueError, match="float"):
        digest_of(float("nan"))


@pytest.mark.parametrize("failure", [RuntimeError("out of luck"), KeyboardInterrupt(), SystemExit(1)])
def test_writer_that_fails_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    def write(folder: Path) -> Mapping[str, Any]:
        (folder / "half.bin").write_text("half")
        raise failure

    with pytest.raises(type(failure)):
        store(tmp_path).make("torch", "prune", INPUTS, write)
    assert list(tmp_path.iterdir()) == []
    assert made(tmp_path).about == {"parameters": 7}


def test_killed_writer_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    """A process that dies in the middle of writing: its folder is no artifact, and the next store sweeps it."""
    code = (
        "import os, sys; from pathlib import Path; from mmedge.artifact import Store\n"
        "Store(Path(sys.argv[1]), '', print).make('torch', 'prune', {}, lambda folder: os._exit(9))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".making-")
    again = store(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert again.find("torch", "prune", {}) is None


def flip_content(artifact: Artifact) -> None:
    artifact.file("weights.bin").write_text("Weights")


def cut_content(artifact: Artifact) -> None:
    artifact.file("weights.bin").write_text("weigh")


def lose_content(artifact: Artifact) -> None:
    artifact.file("weights.bin").unlink()


def lose_manifest(artifact: Artifact) -> None:
    (artifact.path / "manifest.json").unlink()


def cut_manifest(artifact: Artifact) -> None:
    manifest = artifact.path / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])


def change(artifact: Artifact, **values: Any) -> None:
    manifest = artifact.path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | values))


def change_about(artifact: Artifact) -> None:
    change(artifact, about={"parameters": 8})


def change_key(artifact: Artifact) -> None:
    change(artifact, key="of something else")


def add_key(artifact: Artifact) -> None:
    change(artifact, more=1)


DAMAGE = [flip_content, cut_content, lose_content, lose_manifest, cut_manifest, change_about, change_key, add_key]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_artifact_is_kept_aside_and_made_again(tmp_path: Path, damage: Callable[[Artifact], None]) -> None:
    damage(made(tmp_path))
    said: list[str] = []
    again = store(tmp_path, said).make("torch", "prune", INPUTS, weights("new weights"))
    assert again.file("weights.bin").read_text() == "new weights"
    (aside,) = tmp_path.glob(".damaged-*")
    assert any(aside.iterdir())
    assert len(said) == 1
    assert aside.name in said[0]
    assert store(tmp_path).find("torch", "prune", INPUTS) == again


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", ".", "", "sub/weights.bin"])
def test_manifest_that_points_outside_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    artifact = made(tmp_path / "artifacts")
    (tmp_path / "artifacts" / "secret").write_text("secret")
    (artifact.path / "sub").mkdir()
    (artifact.path / "sub" / "weights.bin").write_text("weights")
    files = {name: next(iter(artifact.manifest.files.values()))}
    change(artifact, files=files, digest=digest_of({"files": files, "about": artifact.about}))
    with pytest.raises(ArtifactError, match=r"outside its folder|is missing"):
        load_artifact(artifact.path)


def test_folder_that_is_no_artifact(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match=r"not an artifact: no manifest\.json") as caught:
            load_artifact(path)
        assert str(path) in str(caught.value)


def test_set_aside_deletes_nothing(tmp_path: Path) -> None:
    first = made(tmp_path)
    store(tmp_path).set_aside("torch", "prune", INPUTS)
    store(tmp_path).set_aside("torch", "prune", INPUTS)
    assert store(tmp_path).find("torch", "prune", INPUTS) is None
    (aside,) = tmp_path.glob(".replaced-*")
    assert (aside / "weights.bin").read_text() == "weights"
    assert made(tmp_path).digest == first.digest


def test_values_are_measured_once(tmp_path: Path) -> None:
    assert store(tmp_path).values("check", INPUTS, lambda: {"samples": 3}) == {"samples": 3}
    assert store(tmp_path).values("check", INPUTS, lambda: {"samples": 4}) == {"samples": 3}


# --- no space, no permission


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=24", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_says_the_way_out_and_loses_nothing(small_disk: Path) -> None:
    root = small_disk / "artifacts"
    first = made(root)
    with pytest.raises(ArtifactError, match="No space left on device") as caught:
        store(root).make("torch", "distill", INPUTS, weights("x" * 1_000_000))
    assert "making distill failed" in str(caught.value)
    assert "free some space" in str(caught.value)
    assert caught.value.exit_status == 2
    assert [path.name for path in root.iterdir()] == [first.path.name]
    assert load_artifact(first.path) == first
    assert store(root).make("torch", "distill", INPUTS, weights("small")).about == {"parameters": 7}


def test_disk_that_takes_no_more_files(small_disk: Path) -> None:
    """Not even the folder can be made."""
    root = small_disk / "artifacts"
    root.mkdir()
    whole = store(root)
    for index in range(os.statvfs(small_disk).f_ffree):
        (small_disk / f"file {index}").touch()
    with pytest.raises(ArtifactError, match="making prune failed: No space left on device"):
        whole.make("torch", "prune", INPUTS, weights())
    with pytest.raises(ArtifactError, match="opening the artifacts failed: No space left"):
        store(small_disk / "other")


def test_text_file_is_the_old_one_or_the_new_one(small_disk: Path) -> None:
    """After a failure nothing half-written stays, under no name."""
    report = small_disk / "report.json"
    write_text(report, "old")
    with pytest.raises(ArtifactError, match=r"writing report\.json failed: No space left on device"):
        write_text(report, "x" * 1_000_000)
    assert [path.name for path in small_disk.iterdir()] == ["report.json"]
    assert report.read_text() == "old"
    write_text(report, "new")
    assert report.read_text() == "new"


def test_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("mine")
    with pytest.raises(ArtifactError, match="choose another place"):
        store(tmp_path / "artifacts")
    assert (tmp_path / "artifacts").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_trouble_of_the_disk_is_told_from_trouble_of_the_writer(tmp_path: Path, number: int) -> None:
    def write(folder: Path) -> Mapping[str, Any]:
        raise OSError(number, os.strerror(number))

    with pytest.raises(ArtifactError, match="free some space or choose another place"):
        store(tmp_path).make("torch", "prune", INPUTS, write)

    def wrong(folder: Path) -> Mapping[str, Any]:
        raise FileNotFoundError("a bug")

    with pytest.raises(FileNotFoundError, match="a bug"):
        store(tmp_path).make("torch", "prune", INPUTS, wrong)
    assert list(tmp_path.iterdir()) == []
