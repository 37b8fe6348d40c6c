"""``hf:DIRECTORY_OR_ID:option=value,…``: a trained model of transformers as a task.

``options`` says what may be given, ``checkpoint`` what lies in the model's folder, ``families`` which models are known,
``samples`` where data comes from and ``encode`` what is made of it. transformers, optimum and datasets are loaded when
a task is, not before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mmedge.errors import TaskError
from mmedge.task import Batch, Split, Task
from mmedge.tasks.hf.options import Options, parse
from mmedge.tensors import TensorSpec


def task(about: str) -> Task:
    """The task that ``--task hf:…`` names.

    Args:
        about: what follows ``hf:``; see ``mmedge.tasks.hf.options.Options``.

    Raises:
        UsageError: the place, an option or the data does not exist, or the extra is not installed.
        TaskError: the model or the data is not what it must be.
    """
    place, options = parse(about)
    from mmedge.tasks.hf.checkpoint import folder_of, need_packages, open_checkpoint

    need_packages()
    from mmedge.tasks.hf.encode import Encoder
    from mmedge.tasks.hf.families import MODALITIES, family_of, input_names
    from mmedge.tasks.hf.samples import source_of

    checkpoint = open_checkpoint(folder_of(place, options.download))
    family = family_of(checkpoint)
    names = input_names(checkpoint, family)
    source = source_of(options, family.columns, place)
    encoder = Encoder(checkpoint, family, names, source, options)
    example = encoder.batch(source.first())
    if missing := [name for name in names if name not in example.inputs]:
        raise TaskError(f"batches lack {', '.join(missing)}", where=source.name, fix=f"give {', '.join(names)}")
    model = checkpoint.model()

    def batches(split: Split, seed: int) -> Iterator[Batch]:
        for samples in source.batches(split, seed):
            yield encoder.batch(samples)

    arrays = {name: example.inputs[name] for name in names}
    return Task(
        name="hf_" + re.sub(r"\W+", "_", Path(place).expanduser().resolve().name),
        model=family.module(model),
        inputs=tuple(
            TensorSpec(name, str(array.dtype), ("batch", *array.shape[1:]), MODALITIES[name], encoder.fill(name))
            for name, array in arrays.items()
        ),
        outputs=family.outputs,
        batches=batches,
        loss=family.loss(model),
        metric=family.metric,
        components=tuple(part if options.cache else replace(part, cache="") for part in family.components),
        source=_digest(options, source.identity),
    )


def _digest(options: Options, data: str) -> str:
    """A hash of what results depend on besides weights and arrays: this code, the user's loader, which data it is."""
    digest = hashlib.sha256(data.encode())
    files = sorted(Path(__file__).parent.glob("*.py"))
    if options.loader is not None and (own := Path(options.loader.rpartition(":")[0])).is_file():
        files.append(own)
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
