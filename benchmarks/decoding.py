"""What a decoder's cache buys: python benchmarks/decoding.py [--only captions|whisper] [--output FILE].

``captions`` is the trained task: time of a step beside that of the whole decoder, and whether both write the same
captions for images of the test split. ``whisper`` has the sizes of Whisper tiny's decoder (Radford et al., 2022:
4 layers, width 384, 6 heads, 1500 positions of memory, 51,865 tokens) with random weights and random inputs: its times
mean something, what it writes does not. The first goes through the line with INT8 quantization, the second is in float
alone. On ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "decoding.json"
CAPTIONS = 1024
PLACES, POSITIONS, WIDTH, TOKENS = 128, 1500, 384, 51_865
RECIPE: dict[str, Any] = {
    "schema": 1,
    "name": "captions",
    "task": "captions",
    "targets": ["onnxruntime"],
    "stages": [{"quantize": {"sensitivity_samples": 0}}],
    "twin": {"min_speedup": 0.0, "max_drop": 1.0, "queries": 64},
    "profile": {"queries": 700, "health_samples": 32},
}


def whisper() -> Any:
    """A decoder of Whisper tiny's sizes that reads what an encoder would have made."""
    import torch
    import transformers as tf

    from mmedge.task import Batch, Component, Metric, Task
    from mmedge.tasks.hf.families import token_cross_entropy
    from mmedge.tasks.hf.modules import EncoderDecoder
    from mmedge.tensors import TensorSpec

    class Decoder(EncoderDecoder):
        def forward(self, decoder_input_ids: torch.Tensor, encoder_hidden: torch.Tensor) -> torch.Tensor:
            return self.answers(encoder_hidden, decoder_input_ids)[1]

    torch.manual_seed(0)
    config = tf.WhisperConfig(
        **{"vocab_size": TOKENS, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 4},
        **{"encoder_attention_heads": 6, "decoder_attention_heads": 6, "max_source_positions": POSITIONS},
        **{"decoder_ffn_dim": 4 * WIDTH, "encoder_ffn_dim": 4 * WIDTH, "max_target_positions": 448},
    )

    def batches(split: str, seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(["train", "calibration", "test"].index(split))
        for _ in range({"calibration": 4}.get(split, 1)):
            tokens = rng.integers(0, TOKENS, (2, PLACES))
            memory = rng.standard_normal((2, POSITIONS, WIDTH), dtype=np.float32)
            yield Batch({"decoder_input_ids": tokens, "encoder_hidden": memory}, tokens)

    return Task(
        name="whisper_decoder",
        model=Decoder(tf.WhisperForConditionalGeneration(config)).eval(),
        inputs=(
            TensorSpec("decoder_input_ids", "int64", ("batch", PLACES), "text"),
            TensorSpec("encoder_hidden", "float32", ("batch", POSITIONS, WIDTH), "audio"),
        ),
        outputs=("logits",),
        batches=batches,
        loss=token_cross_entropy(None),
        metric=Metric("token_accuracy", lambda outputs, y: float((outputs["logits"].argmax(-1) == y).mean())),
        components=(
            Component("decoder", ("decoder_input_ids", "encoder_hidden"), ("logits",), cache="decoder_input_ids"),
        ),
    )


def sizes_of_whisper(folder: Path) -> dict[str, Any]:
    """Times at a real size, the three engines side by side, halfway through a sequence."""
    from mmedge.lower.export import onnx_of, write
    from mmedge.lower.shape import shape_for
    from mmedge.lower.step import piece_of
    from mmedge.profile.latency import EngineRef, interleaved
    from mmedge.stages.base import Network
    from mmedge.targets.decoding import Decoding
    from mmedge.targets.onnxruntime import OnnxRuntime

    task, target = whisper(), OnnxRuntime()
    write(onnx_of(Network(task.model), task), folder / "whole.onnx")
    refs, inputs = [], dict(task.example().inputs)
    for piece in task.components[0].pieces:
        model, cache = piece_of(folder / "whole.onnx", piece)
        write(model, folder / f"{piece.role}.onnx")
        shape_for(folder / f"{piece.role}.onnx", target.lowering, folder / f"{piece.role}-lowered.onnx")
        (folder / piece.role).mkdir()
        target.build(folder / f"{piece.role}-lowered.onnx", folder / piece.role)
        refs.append(EngineRef(piece.role, target.name, str(folder / piece.role), piece.role))
    one = {name: array[:1] for name, array in inputs.items()}
    with target.runner(folder / "memory", 1) as memory, target.runner(folder / "step", 1) as step:
        decoding = Decoding(step, cache, memory({"encoder_hidden": one["encoder_hidden"]}), 1)
        found = [decoding.next(one["decoder_input_ids"][:, place])["logits"] for place in range(PLACES // 2)]
    with target.runner(folder / "whole", 1) as decoder:
        wanted = decoder(one)["logits"][:, : PLACES // 2]
    fed = {
        "whole": one,
        "memory": {"encoder_hidden": one["encoder_hidden"]},
        "step": decoding.inputs(one["decoder_input_ids"][:, PLACES // 2]),
    }
    flat = {f"{role}/{name}": array for role, arrays in fed.items() for name, array in arrays.items()}
    series = interleaved(refs, flat, threads=1, queries=64, budget_s=120)
    times = {f"{role}_ms": float(np.median(series[role])) / 1e6 for role in ("whole", "memory", "step")}
    return {
        "places": PLACES,
        "threads": 1,
        **times,
        "speedup": times["whole_ms"] / times["step_ms"],
        "largest_difference": float(np.abs(np.stack(found, axis=1) - wanted).max()),
        "largest_logit": float(np.abs(wanted).max()),
        "rounds": len(series["step"]),
    }


def trained_captions(folder: Path) -> dict[str, Any]:
    """A row for each precision."""
    from mmedge.pipeline.compress import Job, compress
    from mmedge.progress import Progress
    from mmedge.recipe import Recipe

    recipe = Recipe.model_validate(RECIPE)
    report, _ = compress(Job(recipe, "decoding", 0, folder / "run", "decoding.py"), Progress())
    rows = {}
    for stage in report.stages:
        (result,) = stage.results
        parts = {part.name.removeprefix("decoder_"): part for part in result.components}
        engines = {part: folder / "run" / found.artifact for part, found in parts.items()}
        row = {f"{part}_ms": parts[part].latency_ms.p50 for part in ("decoder", "memory", "step")}
        row["speedup"] = row["decoder_ms"] / row["step_ms"]
        row["int8_layers"] = len(coverage.int8) if (coverage := result.coverage) else 0
        row["cosine"] = {part: parts[part].parity.cosine for part in ("decoder", "step")}
        rows[stage.name] = row | written(engines)
    return {"places": 14, "threads": result.threads, "stages": rows}


CASES = {"captions": trained_captions, "whisper": sizes_of_whisper}


def written(engines: dict[str, Path]) -> dict[str, Any]:
    """Captions of test images by the whole decoder and step by step: how far they agree, and how long they take."""
    from mmedge.artifact import load_artifact
    from mmedge.targets.decoding import Cache, Decoding, greedy
    from mmedge.targets.onnxruntime import OnnxRuntime
    from mmedge.tasks import captions
    from mmedge.tasks.captions import data

    image, meant = [], []
    for batch in captions.task().stream("test"):
        image.append(batch.inputs["image"])
        meant.append(batch.targets)
    images, right = np.concatenate(image)[:CAPTIONS], np.concatenate(meant)[:CAPTIONS]
    target = OnnxRuntime()
    cache = Cache.of_json(load_artifact(engines["step"]).about["cache"])
    with (
        target.runner(engines["encoder"], 1) as encoder,
        target.runner(engines["decoder"], 1) as decoder,
        target.runner(engines["memory"], 1) as memory,
        target.runner(engines["step"], 1) as step,
    ):
        hidden = encoder({"image": images})["encoder_hidden"]

        def by_steps(of: Any) -> Any:
            start = Decoding(step, cache, memory({"encoder_hidden": of}), len(of))
            return greedy(start, data.BEGIN, data.END, data.LENGTH)

        whole, steps = data.greedy(decoder, hidden), by_steps(hidden)
        seconds = {}
        for name, write in (("decoder", lambda of: data.greedy(decoder, of)), ("step", by_steps)):
            times = []
            for index in range(200):
                start = time.perf_counter()
                write(hidden[index : index + 1])
                times.append(time.perf_counter() - start)
            seconds[name] = 1e3 * float(np.median(times))
    counted = right != 0
    return {
        "captions": len(images),
        "same_tokens": float((whole == steps)[counted].mean()),
        "same_captions": float((whole == steps).all(axis=1).mean()),
        "right_captions": {
            "decoder": float((whole == right).all(axis=1).mean()),
            "step": float((steps == right).all(axis=1).mean()),
        },
        "caption_ms": seconds,
    }


def main() -> int:
    from mmedge.pipeline.environment import environment

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = {}
    for name in [options.only] if options.only else CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = CASES[name](Path(folder))
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    found = {"environment": environment().model_dump(), "note": options.note, "recipe": RECIPE, "cases": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
