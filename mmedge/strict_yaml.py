"""YAML from outside: what would be misread or fill the memory is an error."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import yaml

MOST_VALUES = 100_000  # of a text, aliases written out: a page of them can stand for more than memory holds


class _Loader(yaml.SafeLoader):
    """YAML as it was meant: no key twice, keys are text, numbers are finite, ``1e-3`` is a number (as in YAML 1.2)."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is not text: put it in quotes", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_finite(self, node: Any) -> float:
        """A float that is a number."""
        value = self.construct_yaml_float(node)
        if not math.isfinite(value):
            raise yaml.constructor.ConstructorError(None, None, f"{node.value} is not a number", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_finite)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("+-0123456789")
)


def parse(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: ``problem`` says what is wrong, ``problem_mark`` where.
    """
    loader = _Loader(text)
    try:
        value = loader.get_single_data()
        if (count := _values(value, {})) > MOST_VALUES:
            raise yaml.YAMLError(f"aliases make {count:.1e} values of it, more than {MOST_VALUES:,}")
        json.dumps(value, default=str)
    except (ValueError, RecursionError) as err:  # an alias inside its own anchor, brackets a thousand deep
        raise yaml.YAMLError(f"nested too deep: {err}") from err
    finally:
        loader.dispose()
    return value


def _values(value: Any, known: dict[int, int]) -> int:
    """How many values there are once every alias is written out; what is behind an alias is counted once."""
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in known:
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(value)]


def words(err: yaml.YAMLError) -> str:
    """What is wrong, in one line."""
    return str(getattr(err, "problem", None) or err).splitlines()[0]
