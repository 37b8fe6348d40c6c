"""Who is compared: each peer's packages, its converter, and the ways it is asked to convert."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SCRIPTS = Path(__file__).parent / "scripts"
MODELS = ("model.onnx", "model.xml")
Runtime = Literal["onnxruntime", "openvino"]
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Peer:
    """One tool.

    Attributes:
        name: of its rows and of its environment.
        packages: what pip installs into that environment.
        script: its converter in ``scripts/``.
        variants: the rows: settings that its documentation recommends.
        grid: further settings, of which only the best becomes a row.
        runtimes: what runs its models.
    """

    name: str
    packages: tuple[str, ...]
    script: str
    variants: tuple[str, ...]
    grid: tuple[str, ...] = ()
    runtimes: tuple[Runtime, ...] = RUNTIMES


# torch is held where pip takes the build for processors: others bring several GB of CUDA packages.
TORCH = "torch==2.13.0"
ORT = ("onnxruntime==1.32.0", "onnx==1.23.2")
PEERS = (
    Peer(
        "onnxruntime",
        (*ORT, "sympy==1.14.0", TORCH),
        "ort_static.py",
        (
            *("default", "s8s8", "u8s8", "s8s8-products", "u8s8-products", "u8s8-entropy", "u8s8-percentile"),
            *("transformers", "transformers-products"),
        ),
        tuple(
            f"grid-{prepared}-{kind}-{ops}-{method}"
            for prepared in ("preprocess", "transformers")
            for kind in ("QInt8", "QUInt8")
            for ops in ("all", "products")
            for method in ("MinMax", "Entropy", "Percentile")
        ),
    ),
    Peer(
        "optimum",
        ("optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.6", "datasets==5.0.1", *ORT, TORCH),
        "optimum_ort.py",
        ("avx512-vnni", "avx512-vnni-percentile"),
    ),
    Peer(
        "neural-compressor",
        ("neural-compressor-pt==3.10", "onnx==1.23.2", "onnxscript==0.7.2", TORCH),
        "inc_pt2e.py",
        ("pt2e",),
    ),
    Peer(
        "nncf", ("nncf==3.4.0", "openvino==2026.4.1"), "nncf_openvino.py", ("default", "transformer"), (), RUNTIMES[1:]
    ),
    Peer(
        "olive",
        ("olive-ai==0.13.0", "requests==2.34.2", *ORT, TORCH),
        "olive_ort.py",
        ("default", "per-channel", "uint8-per-channel"),
    ),
    Peer("modelopt", ("nvidia-modelopt[onnx]==0.47.0", "onnx==1.21.0", TORCH), "modelopt_onnx.py", ("entropy", "max")),
)


# No peer reports home, none looks for models on a network.
QUIET = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "OLIVE_DISABLE_TELEMETRY": "1"}


class PeerFailed(Exception):
    """An environment could not be made or a model not be converted; the message is the tool's own last word."""


def environment(peer: Peer, cache: Path) -> Path:
    """The Python of the peer's environment, made if it is not there.

    Raises:
        PeerFailed: pip's last error.
    """
    folder = cache / peer.name
    python, stamp = folder / "bin" / "python", folder / "installed.json"
    wanted = json.dumps(list(peer.packages))
    if not stamp.exists() or stamp.read_text() != wanted:
        try:
            venv.create(folder, with_pip=True, symlinks=os.name != "nt", clear=True)
        except (OSError, subprocess.CalledProcessError) as err:
            raise PeerFailed(f"venv: {err}") from err
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.packages]
        run(command, folder / "install.log", "pip")
        stamp.write_text(wanted)
    return python


def convert(peer: Peer, variant: str, ground: Path, cache: Path, folder: Path, memory_gib: float) -> dict[str, Any]:
    """Convert, unless the same converter has already done so from the same ground.

    Returns:
        What the converter noted: ``seconds``, ``peak_memory_mib``, ``samples``, ``versions``, perhaps a ``note``.

    Raises:
        PeerFailed: the tool's last error. It is kept as well: what failed once is not tried again.
    """
    key = _key(peer, ground)
    note, failure = folder / "conversion.json", folder / "failure.json"
    if _fresh(note, folder, key):
        return json.loads(note.read_text())
    if _fresh(failure, folder, key):
        raise PeerFailed(json.loads(failure.read_text()))
    python = environment(peer, cache)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    command = [str(python), str(SCRIPTS / peer.script), str(ground.resolve()), str(folder.resolve()), variant]
    command += ["--memory-gib", str(memory_gib)]
    try:
        run(command, folder / "log", peer.name)
        if not any((folder / name).exists() for name in MODELS):
            raise PeerFailed(f"{peer.name} wrote no model")
    except PeerFailed as err:
        failure.write_text(json.dumps(str(err)))
        raise
    finally:
        (folder / "key").write_text(key)
    return json.loads(note.read_text())


def _key(peer: Peer, ground: Path) -> str:
    digest = hashlib.sha256((ground / "ground.json").read_bytes() + repr(peer.packages).encode())
    for name in ("peer.py", peer.script):
        digest.update((SCRIPTS / name).read_bytes())
    return digest.hexdigest()


def _fresh(file: Path, folder: Path, key: str) -> bool:
    return file.exists() and (folder / "key").exists() and (folder / "key").read_text() == key


def run(command: list[str], log: Path, who: str) -> None:
    """Run a peer's process in its log's folder; nothing of this process's Python leaks into it.

    Raises:
        PeerFailed: it ended with an error; says the last line that means something.
    """
    drop = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environ = {key: value for key, value in os.environ.items() if key not in drop} | QUIET
    with log.open("w") as file:
        status = subprocess.run(
            command, cwd=log.parent, env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
        )
    if status.returncode:
        raise PeerFailed(f"{who}: {last_words(log.read_text(errors='replace').splitlines(), status.returncode)}")


def last_words(lines: Iterable[str], status: int) -> str:
    """The last line that looks like an error, else the last line at all, else the exit status."""
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if re.match(r"([\w.]*(Error|Exception|Fail|Interrupt)\w*|ERROR)\b", line)]
    words = (errors or said or [f"ended with status {status}"])[-1]
    return words.replace(sys.prefix, "")[:300]
