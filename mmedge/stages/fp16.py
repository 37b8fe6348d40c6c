"""``fp16``: the same network in float16, with float32 islands where float16 would overflow."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from pydantic import Field

from mmedge.errors import StageError, unknown
from mmedge.stages.base import Context, Network, Saved, Stage, StageConfig
from mmedge.stages.overflow import islands, magnitudes


class Fp16(Stage):
    """Nothing changes in PyTorch: precision goes into the exported graph, as casts (TensorRT 11 knows no other way).

    Norms always stay float32. What else must is found on calibration data: modules whose values float16 cannot hold.
    After ``quantize`` the INT8 layers stay INT8 and the rest becomes float16. It is the last stage: another one makes
    another network, which has other values.
    """

    name = "fp16"
    accepts = frozenset({"float", "qdq"})
    closes = True

    class Config(StageConfig):
        """Settings of ``fp16``.

        Attributes:
            samples: calibration samples on which the range of every module is looked at.
            keep_float32: more modules that stay float32, by name or pattern (``head``, ``audio.*``).
        """

        samples: int = Field(64, ge=1)
        keep_float32: tuple[str, ...] = ()

    def check(self, network: Network, context: Context) -> None:
        """``keep_float32`` names modules; that they compute something, ``run`` sees."""
        paths = [path for path, _ in network.module.named_modules() if path]
        for pattern in self.config.keep_float32:
            _check_known(pattern, paths)

    def run(self, network: Network, context: Context) -> Saved:
        """Find the islands.

        Raises:
            StageError: ``keep_float32`` names no module that computes anything.
        """
        found = magnitudes(network.module, context.task, self.config.samples, context.progress)
        for pattern in self.config.keep_float32:
            _check_known(pattern, found)
        return Saved({}, {"float16_islands": sorted({*islands(found), *self.config.keep_float32})})

    def restore(self, network: Network, saved: Saved, context: Context) -> Network:
        """The network as it was."""
        return network


def _check_known(pattern: str, modules: Collection[str]) -> None:
    if any(fnmatchcase(path, pattern) for path in modules):
        return
    problem, fix = unknown("module", pattern, modules)
    if any(path.startswith(f"{pattern}.") for path in modules):  # it holds modules that compute, and does not itself
        fix = f"use '{pattern}.*' for all that is in it"
    raise StageError(problem, where="fp16.keep_float32", fix=fix)
