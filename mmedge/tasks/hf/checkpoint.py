"""A model's folder: where it is, what it holds, and the model and processors that are made of it.

Nothing here touches the network unless the user asked for a download, runs code that came with a model, or unpickles.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedge.errors import TaskError, UsageError, needs_extra

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # of a model on the hub: no code, no pickle
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_OWN_CODE = "code that comes with a model is never run: write a task of your own around it (mmedge task new)"
_COUNTED = ("position_ids", "inv_freq", "masked_bias")  # older versions saved what newer ones compute
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the libraries log and warn of while they load from the user's terminal, and show no bars."""
    import datasets
    from transformers.utils import logging as talk

    level = logging.root.manager.disable
    bars, more_bars = talk.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    logging.disable(logging.WARNING)
    talk.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if bars:
            talk.enable_progress_bar()
        if more_bars:
            datasets.enable_progress_bars()


def need_packages() -> None:
    """Find out early whether the extra is installed.

    Raises:
        UsageError: it is not.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # importing them makes other packages talk
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in ("transformers", "datasets", "optimum.exporters.onnx.model_configs", "PIL.Image"):
                _import(name)
    finally:
        logging.disable(level)


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as err:
        missing = (err.name or name).partition(".")[0]
        problem, fix = needs_extra({"PIL": "pillow"}.get(missing, missing), "hf").split(": ", 1)
        raise UsageError(problem, where="task hf", fix=fix) from err


def folder_of(place: str, download: bool) -> Path:
    """The local folder of a model.

    Args:
        place: a directory, or the id of a model on the hub that the local cache holds.
        download: whether an id may be fetched from there.

    Raises:
        UsageError: there is no such directory, and no such model in the cache or, where it may be fetched, on the hub.
    """
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UsageError("is a file", where=place, fix="give the directory that save_pretrained() wrote")
    if not _ID.fullmatch(place) or place.startswith("."):
        raise UsageError("no such directory", where=place, fix="give the directory that save_pretrained() wrote")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with quiet():
            return Path(snapshot_download(place, local_files_only=not download, allow_patterns=_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as err:
        if download:
            problem = f"no such directory, and the download failed: {_first_line(err)}"
            raise UsageError(problem, where=place, fix="check the name and the network") from err
        fix = f"give a local directory, or allow the download: hf:{place}:download=yes"
        raise UsageError("no such directory, and no such model in the local cache", where=place, fix=fix) from err


@dataclass(frozen=True)
class Checkpoint:
    """A folder that ``save_pretrained`` wrote.

    Attributes:
        folder: where it is.
        config: transformers' configuration of the model.
        architecture: transformers' class of the model.
    """

    folder: Path
    config: Any
    architecture: Any

    @property
    def model_type(self) -> str:
        """transformers' name for the family (``vit``, ``vision-encoder-decoder``)."""
        return str(self.config.model_type)

    def model(self) -> Any:
        """The model with its weights, float32, in eval mode.

        Raises:
            TaskError: the weights are missing, incomplete, damaged, or pickled only.
        """
        where = str(self.folder)
        self._check_files()
        try:
            with quiet():
                model, found = self._loaded()
        except Exception as err:  # what a damaged or foreign file makes of the loader has no common type
            fix = "copy config.json and the weights again from where the model was trained: both must be of one model"
            raise TaskError(f"the weights cannot be loaded: {_first_line(err)}", where=where, fix=fix) from err
        if missing := sorted(found["missing_keys"]):
            raise TaskError(
                f"the checkpoint has no weights for {_listed(missing)}: they would be random",
                where=where,
                fix=f"give a checkpoint that was trained as {self.architecture.__name__}",
            )
        if spare := sorted(name for name in found["unexpected_keys"] if _belongs(name, model)):
            name = self.architecture.__name__
            raise TaskError(
                f"the checkpoint has weights that config.json gives no place: {_listed(spare)}",
                where=where,
                fix=f"make config.json that of the trained model; where they belong to another head, save it without "
                f"them: transformers.{name}.from_pretrained(HERE).save_pretrained(DIRECTORY)",
            )
        return model.eval()

    def _loaded(self) -> tuple[Any, dict[str, Any]]:
        """The model, and what was and was not in its files."""
        import torch

        options = {
            "config": self.config,
            "dtype": torch.float32,
            "use_safetensors": True,
            "local_files_only": True,
            "trust_remote_code": False,
            "output_loading_info": True,
        }
        try:  # one operator in the exported graph; where a part of the model lacks it, "eager" is the only form
            return self.architecture.from_pretrained(self.folder, attn_implementation="sdpa", **options)
        except ValueError as err:
            if "scaled_dot_product_attention" not in str(err):
                raise
            return self.architecture.from_pretrained(self.folder, attn_implementation="eager", **options)

    def _check_files(self) -> None:
        if any((self.folder / name).is_file() for name in _WEIGHTS):
            return
        if any((self.folder / name).is_file() for name in _PICKLED):
            raise TaskError(
                "holds pickled weights only (pytorch_model.bin): refused, because they could run anything here",
                where=str(self.folder),
                fix="convert them where you trust them: model.save_pretrained(DIRECTORY, safe_serialization=True)",
            )
        fix = "copy the weights there, or save the trained model again: model.save_pretrained(DIRECTORY)"
        raise TaskError("no weights (model.safetensors)", where=str(self.folder), fix=fix)

    def processor(self, kind: str) -> Any:
        """What turns raw samples into the model's inputs.

        Args:
            kind: ``AutoImageProcessor``, ``AutoTokenizer`` or ``AutoFeatureExtractor``.

        Raises:
            TaskError: it is not in the model's folder, or damaged.
        """
        import transformers

        # The fast image processors need torchvision, and answer a little differently.
        options = {"use_fast": False} if kind == "AutoImageProcessor" else {}
        try:
            with quiet():
                return getattr(transformers, kind).from_pretrained(
                    self.folder, local_files_only=True, trust_remote_code=False, **options
                )
        except Exception as err:  # a missing file, a damaged one and an unknown class come as many types
            what = {"AutoTokenizer": "tokenizer", "AutoImageProcessor": "image processor"}.get(
                kind, "feature extractor"
            )
            raise TaskError(
                f"the model's {what} cannot be loaded: {_first_line(err)}",
                where=str(self.folder),
                fix=f"save it beside the model: transformers.{kind}.from_pretrained(ORIGIN).save_pretrained(DIRECTORY)",
            ) from err


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a model's configuration.

    Raises:
        TaskError: it is missing or damaged, or names no class of transformers.
    """
    import transformers

    path = folder / "config.json"
    if not path.is_file():
        fix = "give the directory that save_pretrained() wrote"
        raise TaskError("no transformers model: it has no config.json", where=str(folder), fix=fix)
    names = _architectures(path)
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as err:  # wrong values in the file surface as whatever they break
        raise TaskError(
            f"config.json is damaged or of an unknown model: {_first_line(err)}", where=str(folder), fix=_OWN_CODE
        ) from err
    architecture = getattr(transformers, names[0], None)
    if not isinstance(architecture, type):
        problem = f"{names[0]} is no class of transformers {transformers.__version__}"
        raise TaskError(problem, where=str(path), fix=_OWN_CODE)
    return Checkpoint(folder, config, architecture)


def _architectures(path: Path) -> list[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        fix = "copy it again from where the model was trained"
        raise TaskError(f"config.json is damaged: {_first_line(err)}", where=str(path), fix=fix) from err
    names = content.get("architectures") if isinstance(content, Mapping) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        fix = 'add the class that was trained, as in "architectures": ["ViTForImageClassification"]'
        raise TaskError("config.json names no architecture", where=str(path), fix=fix)
    return names


def _first_line(err: BaseException) -> str:
    """What an error says first; of ``Error(s) in …:`` the first error too."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    if not lines:
        return type(err).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def _belongs(name: str, model: Any) -> bool:
    """Whether a weight that found no place is one of a layer the model has, or of a further layer in a row of them.

    Whole modules that it has not, a head for another task or a pooler, are left out by transformers for good reason.
    """
    from torch import nn

    path = name.rpartition(".")[0]
    if name.endswith(_COUNTED):
        return False
    known = dict(model.named_modules())
    inside = next((part for part in _above(path) if part in known), "")
    return path in known or isinstance(known[inside], nn.ModuleList)


def _above(path: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a``."""
    while path:
        yield path
        path = path.rpartition(".")[0]
