"""Who vouches for an engine: this machine, by a seal, or a person, by a signature.

A seal (``engine.seal``) is an HMAC-SHA256 with a key that is made on first use and stays on this machine, so that
engines built here load without a word. A signature (``engine.sig``) is ed25519 (RFC 8032), made with a private key
elsewhere and checked with public keys that the user names.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedge.errors import ArtifactError, TargetError, UsageError, needs_extra

SEAL = "engine.seal"
SIGNATURE = "engine.sig"
_KEY = "machine.key"
_KEY_BYTES = 32
_MAKE_KEY = (
    "make a pair: openssl genpkey -algorithm ed25519 -out key.pem && openssl pkey -in key.pem -pubout -out key.pub"
)


@dataclass(frozen=True)
class Trust:
    """Whose engines are loaded besides this machine's own.

    Attributes:
        public_keys: files with ed25519 public keys (PEM).
        allow_unsigned: load also what nobody vouches for. An engine can run any code.
    """

    public_keys: tuple[Path, ...] = ()
    allow_unsigned: bool = False

    def check(self, folder: Path, statement: bytes) -> None:
        """Whether somebody vouches for ``statement``.

        Raises:
            TargetError: nobody does; or the key of this machine cannot be read, or cryptography is missing.
            UsageError: a public key cannot be read.
        """
        if any(_is_signed(folder, statement, key) for key in self.public_keys) or self.allow_unsigned:
            return
        if _is_sealed(folder, statement):  # last: a robot that loads signed engines needs no home directory
            return
        seal, signature = (folder / SEAL).exists(), (folder / SIGNATURE).exists()
        if signature and self.public_keys:
            reason = "its signature is by none of the trusted keys, or of other content"
        elif signature:
            reason = "it is signed, and no trusted key is named"
        elif seal:
            reason = "its seal is of another machine or user, or of other content"
        else:
            reason = "it was not built on this machine, and it is not signed"
        raise TargetError(
            f"this engine is not trusted: {reason}",
            where=str(folder),
            fix="build it here (mmedge build), or name the signer's public key (trusted_keys=FILE); "
            "allow_unsigned=true loads any, and an engine can run any code",
        )


def sealed(folder: Path, statement: bytes) -> None:
    """Write the seal of this machine.

    Raises:
        ArtifactError: it cannot be written.
        TargetError: the key of this machine cannot be made or read.
    """
    _write(folder / SEAL, _mac(_machine_key(), statement))


def signed(folder: Path, statement: bytes, private_key_file: Path) -> None:
    """Write a signature.

    Raises:
        ArtifactError: it cannot be written.
        UsageError: the key cannot be used.
        TargetError: the package cryptography is missing.
    """
    serialization, ed25519 = _cryptography()
    content = _key_file(private_key_file)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as err:  # TypeError: it wants a password
        raise UsageError(
            f"is no private key that can be read: {err}", where=str(private_key_file), fix=_MAKE_KEY
        ) from err
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UsageError("is not an ed25519 key", where=str(private_key_file), fix=_MAKE_KEY)
    _write(folder / SIGNATURE, key.sign(statement))


def forget_seals(folder: Path) -> None:
    """Remove what vouched for an engine that is being replaced."""
    for name in (SEAL, SIGNATURE):
        (folder / name).unlink(missing_ok=True)


def _is_sealed(folder: Path, statement: bytes) -> bool:
    found = _small_file(folder / SEAL)
    key = _present_key() if found is not None else None
    return found is not None and key is not None and hmac.compare_digest(found, _mac(key, statement))


def _mac(key: bytes, statement: bytes) -> bytes:
    return hmac.new(key, statement, hashlib.sha256).hexdigest().encode()


def _is_signed(folder: Path, statement: bytes, public_key_file: Path) -> bool:
    signature = _small_file(folder / SIGNATURE)
    if signature is None:
        return False
    serialization, ed25519 = _cryptography()
    from cryptography.exceptions import InvalidSignature

    content = _key_file(public_key_file)
    try:
        key = serialization.load_pem_public_key(content)
    except ValueError as err:
        raise UsageError(
            f"is no public key that can be read: {err}", where=str(public_key_file), fix=_MAKE_KEY
        ) from err
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise UsageError("is not an ed25519 key", where=str(public_key_file), fix=_MAKE_KEY)
    try:
        key.verify(signature, statement)
    except InvalidSignature:
        return False
    return True


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as err:
        raise TargetError(
            "signatures need the Python package cryptography", fix=needs_extra("cryptography", "sign")
        ) from err
    return serialization, ed25519


def _key_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise UsageError(f"cannot be read: {err.strerror}", where=str(path), fix=_MAKE_KEY) from err


def _small_file(path: Path) -> bytes | None:
    """A seal or signature; None where there is none that could be one."""
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size <= 4096 else None
    except OSError:
        return None


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as err:
        raise ArtifactError(
            f"cannot be written: {err.strerror}", where=str(path), fix="look at the folder's permissions"
        ) from err


# --- the key of this machine


def key_file() -> Path:
    """Where the key of this machine lies: ``$XDG_CONFIG_HOME/mmedge`` or ``~/.config/mmedge``.

    Raises:
        TargetError: the user has no home directory.
    """
    given = os.environ.get("XDG_CONFIG_HOME", "")
    if given and Path(given).is_absolute():  # the XDG specification: relative paths are to be ignored
        return Path(given) / "mmedge" / _KEY
    try:
        return Path.home() / ".config" / "mmedge" / _KEY
    except RuntimeError as err:
        raise TargetError("there is no home directory for the key of this machine", fix="set XDG_CONFIG_HOME") from err


def _machine_key() -> bytes:
    present = _present_key()
    if present is not None:
        return present
    path = key_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _create(path)
    except OSError as err:
        fix = "make the folder writable, or set XDG_CONFIG_HOME to one that is"
        raise TargetError(f"the key of this machine cannot be made: {err.strerror}", where=str(path), fix=fix) from err
    made = _present_key()
    if made is None:
        raise TargetError(
            "the key of this machine vanished while it was made", where=str(path), fix="run the same command again"
        )
    return made


def _create(path: Path) -> None:
    """Make the key; of several processes at once, the first one's stays and none sees half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(draft, path)  # fails where the file exists; a rename would replace it
    finally:
        draft.unlink(missing_ok=True)


def _present_key() -> bytes | None:
    path = key_file()
    fix = f"chmod 600 {path}; if others could read it, delete it and build the engines again"
    try:
        about = path.stat()
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as err:
        raise TargetError(f"the key of this machine cannot be read: {err.strerror}", where=str(path), fix=fix) from err
    if about.st_mode & 0o077 or about.st_uid != os.geteuid():
        raise TargetError("others may read or write the key of this machine", where=str(path), fix=fix)
    if len(content) != _KEY_BYTES:
        fix = "delete it and build the engines again"
        raise TargetError(
            f"the key of this machine has {len(content)} bytes, not {_KEY_BYTES}", where=str(path), fix=fix
        )
    return content
