"""PyTorch itself, on the CPU: what the network does before any engine is built of it."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmedge.errors import TargetError, needs_extra
from mmedge.targets.base import Build, Coverage, Lowering, Runner, Target
from mmedge.targets.checked import checked, reported
from mmedge.targets.lowered import described
from mmedge.tensors import Array

MODEL = "model.pt2"
DESCRIPTION = "model.json"  # see mmedge.targets.lowered: inputs in the order of the call, outputs in that of return
# Where an archive of plain tensors keeps its parts; compiled code, which others hold, has a place of its own.
_KNOWN = (
    *("data/weights/", "data/constants/", "data/sample_inputs/", "models/", "extra/", ".data/"),
    *("archive_format", "archive_version", "byteorder", "version"),
)
_EXPORT_AGAIN = "export again with torch.export.save, plain tensors and a current PyTorch"


class Torch(Target):
    """Runs a ``torch.export`` archive. Quantized layers are computed as the float layers they simulate."""

    name = "torch"
    version = 3
    lowering = Lowering(format="pt2")

    def check(self) -> dict[str, str]:
        """See ``Target.check``."""
        return {"torch": str(_torch().__version__)}

    def build(self, model: Path, folder: Path) -> Build:
        """Keep the archive and its description, once both can be loaded."""
        versions = self.check()
        shutil.copyfile(model, folder / MODEL)
        with reported("reading the names of inputs and outputs", str(model.with_name(DESCRIPTION))):
            shutil.copyfile(model.with_name(DESCRIPTION), folder / DESCRIPTION)
        return Build(_coverage(_load(folder)), {"versions": versions, "engine_bytes": (folder / MODEL).stat().st_size})

    @contextmanager
    def runner(self, folder: Path, threads: int) -> Iterator[Runner]:
        """See ``Target.runner``. The number of threads is PyTorch's own, restored when the context closes."""
        torch = _torch()
        about = described(folder / MODEL) or {}
        names = [each["name"] for each in about["inputs"]]
        program = _load(folder)
        args, kwargs = program.example_inputs  # exported with positional arguments, with named ones, or with both
        module = program.module()
        by_position = names[: len(args)]
        examples = {**dict(zip(by_position, args, strict=True)), **kwargs}
        dtypes = {name: str(example.dtype).removeprefix("torch.") for name, example in examples.items()}

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            with torch.inference_mode():
                tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
                positional = [tensors.pop(name) for name in by_position]
                outputs = module(*positional, **tensors)
            return _named(outputs, about["outputs"])

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield checked(run, dtypes, self.name)
        finally:
            torch.set_num_threads(before)


def _torch() -> Any:
    try:
        import torch
    except ImportError as err:
        raise TargetError("PyTorch is missing", fix=needs_extra("torch", "compress")) from err
    return torch


def _load(folder: Path) -> Any:
    torch = _torch()
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers the operators of Q/DQ archives
    refuse_pickle(folder / MODEL)
    with reported("loading the archive", str(folder / MODEL)):
        return torch.export.load(folder / MODEL)


def _coverage(program: Any) -> Coverage | None:
    """That nothing runs in INT8 where something is rounded; of a network in floating point nothing is said."""
    rounds = any("dequantize" in str(node.target) for node in program.graph.nodes)
    return (
        Coverage((), {"all layers": "PyTorch computes INT8 layers as the float layers they simulate"})
        if rounds
        else None
    )


def _named(outputs: Any, names: list[str]) -> dict[str, Array]:
    if isinstance(outputs, Mapping):
        return {name: outputs[name].numpy() for name in names}
    listed = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return {name: each.numpy() for name, each in zip(names, listed, strict=True)}


def refuse_pickle(archive: Path) -> None:
    """Refuse an archive from which ``torch.export.load`` would unpickle more than plain tensors.

    Weights and constants are raw bytes listed in JSON, unless an entry says ``use_pickle``, is a custom object or is
    in the format of old releases. The example inputs are always pickled; PyTorch reads them with ``weights_only=True``
    and, where that fails, without.

    This does not make an archive of unknown origin safe: PyTorch also evaluates expressions about shapes that it
    finds in the JSON. Load such files only where their digest or signature vouches for them.

    Raises:
        TargetError: it holds such an entry or an unknown one, or is no archive.
    """
    torch = _torch()
    with reported("reading the archive", str(archive)), zipfile.ZipFile(archive) as file:
        for entry in file.namelist():
            _, _, path = entry.partition("/")
            if not path.startswith(_KNOWN) or file.namelist().count(entry) > 1:
                raise TargetError(f"{entry} has no place in such an archive", where=str(archive), fix=_EXPORT_AGAIN)
            if path.startswith("data/sample_inputs/"):
                with reported(f"{entry}: loading without arbitrary code", str(archive)):
                    torch.load(io.BytesIO(file.read(entry)), weights_only=True)
            elif path.startswith(("data/weights/", "data/constants/")) and _is_pickled(file, entry):
                raise TargetError(f"{entry} is pickled: it could run any code", where=str(archive), fix=_EXPORT_AGAIN)


def _is_pickled(file: zipfile.ZipFile, entry: str) -> bool:
    if entry.endswith(".json"):
        listed = json.loads(file.read(entry))["config"].values()
        return any(each["use_pickle"] or not _is_plain(each["path_name"]) for each in listed)
    return not _is_plain(entry.rpartition("/")[2])


def _is_plain(name: str) -> bool:
    return name.startswith(("weight_", "tensor_")) and not name.endswith(".pt")
