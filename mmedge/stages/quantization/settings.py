"""What a recipe may say about ranges. It stands alone: reading a recipe loads neither torchao nor what calibrates."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmedge.errors import StageError
from mmedge.stages.base import StageConfig
from mmedge.task import Task


class Calibration(StageConfig):
    """How ranges of activations are found; only the calibration split is ever used.

    Attributes:
        samples: so many of the first calibration samples are run.
        observer: where values are clipped.
            ``mse`` where the expected squared error of rounding and clipping is least (the criterion of Banner et al.
            2019, "Post training 4-bit quantization", on the measured distribution);
            ``entropy`` where the clipped and rounded distribution has the least Kullback-Leibler divergence from the
            true one (Migacz 2017, "8-bit Inference with TensorRT");
            ``percentile`` at a percentile of the magnitudes (McKinstry et al. 2018; Wu et al. 2020, "Integer
            Quantization for Deep Learning Inference");
            ``minmax`` nowhere: the largest magnitude is the range (Jacob et al. 2018).
        percentile: of the magnitudes, zeros included, for ``percentile``; above 50, at most 100.
    """

    samples: int = Field(256, ge=1)
    observer: Literal["mse", "entropy", "percentile", "minmax"] = "mse"
    percentile: float = Field(99.99, gt=50, le=100)

    def expect_samples(self, task: Task) -> None:
        """Count the calibration split, as far as it is needed.

        Raises:
            StageError: it is too small.
        """
        count = 0
        for batch in task.stream("calibration"):
            count += len(batch)
            if count >= self.samples:
                return
        raise too_few(task, count, self.samples)


def too_few(task: Task, count: int, samples: int) -> StageError:
    """What a calibration split of ``count`` samples is told that should have more."""
    return StageError(
        f"the calibration split has {count} samples, the recipe asks for {samples}",
        where=f"task {task.name}: quantize.calibration.samples",
        fix=f"set calibration.samples to {count} or less, or give the task more calibration data",
    )
