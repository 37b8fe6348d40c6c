"""What stands behind ``hf:``: a model, and how its data is found."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from mmedge.errors import UsageError, unknown

FORM = "hf:DIRECTORY_OR_ID:option=value,option=value"
_PARTS = re.compile(r"(?P<place>.*?)(?::(?P<options>\w+=.*))?", re.DOTALL)
_NEXT_OPTION = re.compile(r",(?=\w+=)")  # a comma within a path separates nothing


class Options(BaseModel):
    """Options of ``hf:``.

    Attributes:
        data: a folder of ``datasets`` (``save_to_disk``), or of parquet, image or audio files.
        loader: ``path/to/file.py:function``; ``function(split, seed)`` yields batches: lists of samples (dicts of raw
            values), or ``mmedge.task.Batch`` where the inputs are ready.
        image: the column of images; likewise ``text``, ``text_pair``, ``audio`` and ``label``. Without it the column
            is found by its name and the type of its values.
        train: the split of ``data`` that calibration is taken from too; likewise ``test``.
        length: tokens per text, all texts are padded or cut to it.
        batch: samples per batch.
        samples: at most so many for calibration, and so many for the test.
        cache: whether a decoder also gets a graph that reads one token at a time (``Component.cache``).
        download: whether a model that is not in the local cache may be fetched.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | None = None
    loader: str | None = None
    image: str | None = None
    text: str | None = None
    text_pair: str | None = None
    audio: str | None = None
    label: str | None = None
    train: str | None = None
    test: str | None = None
    length: int | None = Field(None, ge=2)
    batch: int = Field(32, ge=1)
    samples: int | None = Field(None, ge=1)
    cache: bool = True
    download: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.data and self.loader:
            raise ValueError("data and loader exclude each other: give one of them")
        return self

    @property
    def columns(self) -> dict[str, str]:
        """The columns that were named, by kind."""
        kinds = ("image", "text", "text_pair", "audio", "label")
        return {kind: name for kind in kinds if (name := getattr(self, kind)) is not None}


def parse(about: str) -> tuple[str, Options]:
    """The model's place and the options behind it.

    Args:
        about: what follows ``hf:``.

    Raises:
        UsageError: no model is named, or an option does not exist, comes twice or has a value it does not take.
    """
    match = _PARTS.fullmatch(about)
    place, text = (match["place"], match["options"] or "") if match else ("", "")
    where = f"task 'hf:{about}'"
    if not place:
        raise UsageError("no model is named", where=where, fix=f"write {FORM}")
    given: dict[str, Any] = {}
    for part in _NEXT_OPTION.split(text) if text else ():
        name, _, value = part.partition("=")
        if name not in Options.model_fields:
            problem, fix = unknown("option", name, Options.model_fields)
            raise UsageError(problem, where=where, fix=fix)
        if name in given:
            raise UsageError(f"option {name} is given twice", where=where)
        given[name] = value
    try:
        return place, Options.model_validate(given)
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        about_option = f"option {first['loc'][0]}: " if first["loc"] else ""
        problem = about_option + first["msg"].removeprefix("Value error, ")
        raise UsageError(problem, where=where, fix=f"write {FORM}") from err
