"""Raw samples: from a folder of ``datasets`` or from the user's function, by split; and what their columns are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.errors import MmedgeError, TaskError, UsageError, unknown
from mmedge.loading import function_of
from mmedge.task import SPLITS, Batch, Split
from mmedge.tasks.hf.checkpoint import quiet
from mmedge.tasks.hf.options import Options

Sample = Mapping[str, Any]
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
AUDIO = (".wav", ".flac", ".mp3", ".ogg")
TEST_SPLITS = ("test", "validation", "valid", "dev", "eval")
CALIBRATION = 512  # samples, at most a quarter of the training split


@dataclass(frozen=True)
class Source:
    """Where samples come from.

    Attributes:
        name: for messages.
        batches: ``batches(split, seed)`` yields lists of samples, or finished batches.
        classes: names of the classes of a column of integers, by column.
        identity: a text that changes with the data.
    """

    name: str
    batches: Callable[[Split, int], Iterable[Sequence[Sample] | Batch]]
    classes: Mapping[str, Sequence[str]]
    identity: str

    def first(self) -> Sequence[Sample] | Batch:
        """The first batch for calibration.

        Raises:
            TaskError: there is none, or the user's function failed.
        """
        try:
            found = next(iter(self.batches("calibration", 0)), None)
        except MmedgeError:
            raise
        except Exception as err:
            raise TaskError(f"calibration data raised {type(err).__name__}: {err}", where=self.name) from err
        if found is None or not len(found):
            raise TaskError("the calibration split is empty", where=self.name)
        return found


def source_of(options: Options, columns: Sequence[str], where: str) -> Source:
    """The samples that the options name.

    Args:
        options: of the task.
        columns: kinds of data that the model needs, for the message.
        where: the model's place, for the message.

    Raises:
        UsageError: the options name none, or what they name does not exist.
        TaskError: the folder cannot be read.
    """
    if options.loader is not None:
        return _from_loader(options.loader, options)
    if options.data is not None:
        return _from_folder(Path(options.data).expanduser(), options)
    kinds = ", ".join(columns)
    raise UsageError(
        f"no data: a task is measured and calibrated on samples with {kinds}",
        where=where,
        fix="give data=DIRECTORY (datasets' save_to_disk, parquet or image files) or loader=path/to/file.py:function, "
        f"as in hf:{where}:data=DIRECTORY",
    )


def _from_loader(spec: str, options: Options) -> Source:
    function = function_of(spec)

    def batches(split: Split, seed: int) -> Iterator[Sequence[Sample] | Batch]:
        limit = None if split == "train" else options.samples
        for found in function(split, seed):
            if limit is not None and limit <= 0:
                return
            batch: Sequence[Sample] | Batch = found if isinstance(found, Batch) else _rows(found, spec)
            if limit is not None:
                batch = _shortened(batch, limit)
                limit -= len(batch)
            yield batch

    return Source(spec, batches, {}, spec)


def _shortened(batch: Sequence[Sample] | Batch, limit: int) -> Sequence[Sample] | Batch:
    if not isinstance(batch, Batch):
        return batch[:limit]
    ids = None if batch.ids is None else batch.ids[:limit]
    return Batch({name: array[:limit] for name, array in batch.inputs.items()}, batch.targets[:limit], ids)


def _rows(found: Any, where: str) -> list[Sample]:
    rows = list(found) if isinstance(found, (list, tuple)) else None
    if rows is None or not all(isinstance(row, Mapping) for row in rows):
        fix = "yield lists of samples, each a dict of raw values, or mmedge.task.Batch"
        raise TaskError(f"yielded {type(found).__name__}", where=where, fix=fix)
    return rows


def _from_folder(path: Path, options: Options) -> Source:
    parts = divided(_open(path), options, str(path))
    features = parts["test"].features

    def batches(split: Split, seed: int) -> Iterator[Sequence[Sample]]:
        data = parts[split]
        order = np.random.default_rng(seed).permutation(len(data)) if split == "train" else np.arange(len(data))
        for first in range(0, len(order), options.batch):
            rows = data[[int(index) for index in order[first : first + options.batch]]]
            yield [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]

    classes = {name: tuple(each.names) for name, each in features.items() if hasattr(each, "names")}
    identity = " ".join(f"{split} {parts[split]._fingerprint}" for split in SPLITS)
    return Source(str(path), batches, classes, identity)


def _open(path: Path) -> dict[str, Any]:
    """The folder's own splits, undecoded audio."""
    import datasets

    if not path.is_dir():
        raise UsageError("no such directory", where=f"data={path}", fix="give the folder of your data set")
    kind = _kind(path)
    try:
        with quiet():
            if kind == "arrow":
                found = datasets.load_from_disk(str(path))
            else:
                found = datasets.load_dataset(kind, data_dir=str(path))
    except Exception as err:  # damaged files surface as whatever their reader makes of them
        reason = err.__cause__ or err  # datasets' own says no more than that it failed
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        fix = "copy it again; a folder holds one data set, in files of one kind"
        raise TaskError(f"the data cannot be read: {lines[0]}", where=f"data={path}", fix=fix) from err
    splits = dict(found) if isinstance(found, Mapping) else {"all": found}
    return {name: _without_decoders(data) for name, data in splits.items()}


def _without_decoders(data: Any) -> Any:
    """``data`` with its audio as bytes: decoding it would need a package more."""
    import datasets

    for name, feature in data.features.items():
        if isinstance(feature, datasets.Audio):
            data = data.cast_column(name, datasets.Audio(decode=False))
    return data


def _kind(path: Path) -> str:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return "arrow"
    endings = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
    for kind, wanted in (("parquet", (".parquet",)), ("imagefolder", IMAGES), ("audiofolder", AUDIO)):
        if endings & set(wanted):
            return kind
    fix = "save it with datasets' save_to_disk(DIRECTORY), or give a folder of parquet, image or audio files"
    raise TaskError("holds no data set", where=f"data={path}", fix=fix)


def divided(splits: Mapping[str, Any], options: Options, where: str) -> dict[Split, Any]:
    """Train, calibration and test, disjoint: from the data's own splits where it has them, else by a fixed draw.

    Args:
        splits: the data's own.
        options: may name them, and may limit the last two.
        where: for messages.

    Raises:
        UsageError: a named split does not exist.
        TaskError: there are too few samples.
    """
    test_name = _split_name(splits, options.test, TEST_SPLITS, where)
    train_name = _split_name(splits, options.train, ("train", *(name for name in splits if name != test_name)), where)
    if train_name in (None, test_name) or test_name is None:
        whole = splits[train_name or test_name or next(iter(splits))]
        rest, test = _drawn(whole, max(1, len(whole) // 5), where)
    else:
        rest, test = splits[train_name], splits[test_name]
    train, calibration = _drawn(rest, min(CALIBRATION, max(1, len(rest) // 4)), where)
    if options.samples is not None:
        test = _drawn(test, options.samples, where)[1] if len(test) > options.samples else test
        calibration = calibration.select(range(min(options.samples, len(calibration))))
    return {"train": train, "calibration": calibration, "test": test}


def _split_name(splits: Mapping[str, Any], wanted: str | None, usual: Iterable[str], where: str) -> str | None:
    if wanted is None:
        return next((name for name in usual if name in splits), None)
    if wanted not in splits:
        problem, fix = unknown("split", wanted, splits)
        raise UsageError(problem, where=f"data={where}", fix=fix)
    return wanted


def _drawn(data: Any, count: int, where: str) -> tuple[Any, Any]:
    """What stays, and ``count`` samples drawn from it, always the same ones."""
    if len(data) <= count:
        raise TaskError(f"{len(data)} samples are too few to divide", where=f"data={where}", fix="give more data")
    order = np.random.default_rng(0).permutation(len(data))
    return data.select(np.sort(order[count:])), data.select(np.sort(order[:count]))


# --- columns


def _is_image(value: Any) -> bool:
    return hasattr(value, "convert") or (isinstance(value, np.ndarray) and value.ndim in (2, 3))


def _is_audio(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "array" in value or "bytes" in value
    flat = isinstance(value, np.ndarray) and value.ndim == 1 and np.issubdtype(value.dtype, np.floating)
    return flat or (isinstance(value, list) and bool(value) and all(isinstance(x, float) for x in islice(value, 16)))


def _is_class(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


_FITS: Mapping[str, Callable[[Any], bool]] = {
    "image": _is_image,
    "audio": _is_audio,
    "text": lambda value: isinstance(value, str),
    "label": lambda value: _is_class(value) or isinstance(value, str),
}
_USUAL = {
    "image": ("image", "img", "picture"),
    "audio": ("audio", "speech"),
    "text": ("text", "sentence", "caption", "question", "transcription"),
    "label": ("label", "labels", "answer", "class"),
}


def columns_of(sample: Sample, kinds: Sequence[str], named: Mapping[str, str], where: str) -> dict[str, str]:
    """Which column holds what: the one that was named, else the usual name, else the only one of its type.

    Raises:
        TaskError: there is no such column, or several may be meant.
    """
    found = dict(named)
    for kind, name in named.items():
        if name not in sample:
            problem, fix = unknown("column", name, sample)
            raise TaskError(problem, where=f"{where}: {kind}={name}", fix=fix)
        if not _FITS[kind.removesuffix("_pair")](sample[name]):
            fix = f"the columns are {', '.join(sample)}"
            raise TaskError(f"column {name!r} holds {type(sample[name]).__name__}, no {kind}", where=where, fix=fix)
    for kind in kinds:
        if kind not in found:
            found[kind] = _column(sample, kind, set(found.values()), where)
    return found


def _column(sample: Sample, kind: str, taken: set[str], where: str) -> str:
    fitting = [name for name, value in sample.items() if name not in taken and _FITS[kind](value)]
    usual = [name for name in _USUAL[kind] if name in fitting]
    likely = [name for name in fitting if kind != "label" or _is_class(sample[name])]
    if usual or len(likely) == 1:
        return (usual or likely)[0]
    problem = f"several columns may be the {kind}: {', '.join(likely)}" if likely else f"no column holds the {kind}"
    raise TaskError(problem, where=where, fix=f"name it: {kind}=COLUMN; the columns are {', '.join(sample)}")
