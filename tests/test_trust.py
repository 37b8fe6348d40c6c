"""Who vouches for an engine: seals of this machine and signatures, on a real engine."""

from __future__ import annotations

import multiprocessing
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_engine import HERE, NOBODY, SMS, manifest_of, sealed_engine, small_plan

from mmedge.errors import MmedgeError, TargetError, UsageError
from mmedge.targets.tensorrt import plan, trust
from mmedge.targets.tensorrt.plan import Trust, admit, seal, sign, write_manifest


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_plan(tmp_path_factory.mktemp("rtx"), SMS)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration directory of its own, so that no test sees the user's key."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "mmedge"


@pytest.fixture
def engine(tmp_path: Path, real: Path) -> Path:
    """A sealed engine folder."""
    return sealed_engine(tmp_path / "engine", real)


def unsealed(engine: Path) -> Path:
    (engine / trust.SEAL).unlink()
    return engine


def test_what_nobody_vouches_for_is_refused(engine: Path) -> None:
    with pytest.raises(TargetError, match="not built on this machine, and it is not signed") as caught:
        admit(unsealed(engine), HERE, NOBODY)
    assert "trusted_keys" in str(caught.value)
    assert admit(engine, HERE, Trust(allow_unsigned=True))


def test_seal_of_another_machine_is_refused(engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(TargetError, match="seal is of another machine"):
        admit(engine, HERE, NOBODY)
    assert not (tmp_path / "elsewhere").exists()  # looking makes no key
    seal(engine)
    assert admit(engine, HERE, NOBODY)


def test_seal_does_not_outlive_the_manifest(engine: Path) -> None:
    write_manifest(engine, manifest_of(engine / plan.PLAN))
    assert not (engine / trust.SEAL).exists()


def test_key_is_made_once_and_private(engine: Path, home: Path) -> None:
    key = home / "machine.key"
    first = key.read_bytes()
    assert len(first) == 32
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    seal(engine)
    assert key.read_bytes() == first
    assert [file.name for file in home.iterdir()] == ["machine.key"]


SPOILED_KEYS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "others may read it": (lambda key: key.chmod(0o640), "others may read or write the key"),
    "cut off": (lambda key: key.write_bytes(b"short"), "has 5 bytes, not 32"),
    "a folder": (lambda key: (key.unlink(), key.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("case", SPOILED_KEYS)
def test_spoiled_key_is_told(case: str, engine: Path, home: Path) -> None:
    spoil, reason = SPOILED_KEYS[case]
    spoil(home / "machine.key")
    for use in (lambda: seal(engine), lambda: admit(engine, HERE, NOBODY)):
        with pytest.raises(TargetError, match=reason) as caught:
            use()
        assert caught.value.fix


def test_unwritable_configuration_is_told(engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    with pytest.raises(TargetError, match="key of this machine cannot be"):
        seal(engine)
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trust.key_file() == tmp_path / ".config" / "mmedge" / "machine.key"


def _key_of_this_process(_: int) -> bytes:
    return trust._machine_key()


def test_processes_agree_on_the_key() -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert len(set(pool.map(_key_of_this_process, range(16), chunksize=1))) == 1


def test_the_first_key_stays(engine: Path, home: Path) -> None:
    """As for the process that comes second."""
    first = (home / "machine.key").read_bytes()
    trust._create(home / "machine.key")
    assert (home / "machine.key").read_bytes() == first


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return key_pair(tmp_path, "signer")


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    kinds = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, *kinds))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    return private, public


def test_signed_engine_is_admitted_by_its_key_alone(engine: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    sign(unsealed(engine), private)
    _, other = key_pair(tmp_path, "other")
    assert admit(engine, HERE, Trust((public,)))
    assert admit(engine, HERE, Trust((other, public)))
    with pytest.raises(TargetError, match="by none of the trusted keys"):
        admit(engine, HERE, Trust((other,)))
    with pytest.raises(TargetError, match="no trusted key is named"):
        admit(engine, HERE, NOBODY)


def test_signature_covers_manifest_and_itself(engine: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    sign(unsealed(engine), private)
    for name in (trust.SIGNATURE, plan.MANIFEST):
        content = (engine / name).read_bytes()
        for position in range(0, len(content), max(1, len(content) // 40)):
            (engine / name).write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            with pytest.raises(MmedgeError):
                admit(engine, HERE, Trust((public,)))
        (engine / name).write_bytes(content)
    assert admit(engine, HERE, Trust((public,)))


def test_keys_that_are_none_are_told(engine: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    sign(engine, private)
    with pytest.raises(UsageError, match="no private key") as caught:
        sign(engine, public)
    assert "openssl genpkey" in str(caught.value)
    with pytest.raises(UsageError, match="no public key"):
        admit(engine, HERE, Trust((private,)))
    with pytest.raises(UsageError, match="cannot be read"):
        admit(engine, HERE, Trust((tmp_path / "nowhere.pub",)))


def test_missing_cryptography_names_the_extra(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(TargetError, match="need the Python package cryptography") as caught:
        sign(engine, Path("key.pem"))
    assert "mmedge[sign]" in str(caught.value)
