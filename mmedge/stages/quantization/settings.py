"""What a recipe may say about ranges. It stands alone: reading a recipe loads neither torchao nor what calibrates."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmedge.stages.base import StageConfig


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
