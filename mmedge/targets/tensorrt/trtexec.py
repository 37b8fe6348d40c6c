"""The same build and the same measurement with ``trtexec``: shell scripts with every flag written out.

Written to the documented options of trtexec in TensorRT 10 and 11 and to the defaults in their ``sampleOptions.h``; no
trtexec ran here. What such a build makes has no manifest and no seal: mmedge loads it only where that is allowed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmedge.errors import UsageError

_WHERE = "/usr/src/tensorrt/bin/trtexec"  # JetPack's
_QUIET_MS, _LONG_S, _MANY = 5000, 60, 1000
_PERCENTILES = "50,90,95,99,99.9"


def build_script(
    model: str,
    plan: str,
    inputs: Sequence[Mapping[str, Any]],
    batch: Mapping[str, int],
    *,
    tensorrt: str | None,
    workspace_mib: int | None,
    dla_core: int | None,
    timing_cache: str | None,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
) -> str:
    """A script that builds what ``mmedge build`` builds; file names are relative to the script's own folder.

    Args:
        model: the ONNX file.
        plan: the engine to write; it appears under its name only when it is whole.
        inputs: name and shape of each; a string for the first size stands for the batch.
        batch: ``min``, ``opt`` and ``max``.
        tensorrt: the version it is for (``10.3``), which the script then asks for; None takes any from 10 on.
        workspace_mib: memory for kernels besides weights and activations; None leaves it to TensorRT.
        dla_core: build for this DLA core, with the GPU for what it cannot run.
        timing_cache: a file of measured kernels to read and write.
        version_compatible: the engine runs on later versions.
        hardware_compatible: the engine runs on all GPUs from Ampere on.

    Raises:
        UsageError: TensorRT is older than 10, a DLA engine's version is left open, a shape may change beyond its first
            size, or trtexec cannot name an input.
    """
    flags = [
        f"--onnx={model}",
        f"--saveEngine={plan}.partial",
        *_typing(tensorrt, dla_core),
        *_shapes(inputs, batch),
        "--profilingVerbosity=detailed",
        f"--exportLayerInfo={plan}.layers.json",
        "--skipInference",
    ]
    if workspace_mib is not None:
        flags.append(f"--memPoolSize=workspace:{workspace_mib}")  # MiB in every version
    if timing_cache is not None:
        flags.append(f"--timingCacheFile={timing_cache}")
    if dla_core is not None:
        flags += [f"--useDLACore={dla_core}", "--allowGPUFallback"]
    if version_compatible:
        flags.append("--versionCompatible")
    if hardware_compatible:
        flags.append("--hardwareCompatibilityLevel=ampere+")
    keep = shlex.join(["mv", "-f", "--", f"{plan}.partial", plan])
    return f"{_head('Builds an engine', tensorrt)}\n{_call(flags)}\n{keep}\n"


def measure_script(
    plan: str,
    inputs: Sequence[Mapping[str, Any]],
    batch: int,
    *,
    tensorrt: str | None,
    dla_core: int | None = None,
    cuda_graph: bool = True,
    data_transfers: bool = False,
    spin_wait: bool = True,
) -> str:
    """A script that measures an engine, then profiles it layer by layer in a run of its own.

    CUDA graph, data transfers and spin wait have opposite defaults in TensorRT 10 and 11, and each version has only the
    flags that leave its own default. The script sets all three, whichever version it finds, so that figures compare.
    trtexec keeps one inference queued ahead: it tells how long the device is busy, not how long a result takes.

    Args:
        plan: the engine.
        inputs: name and shape of each.
        batch: that is measured.
        tensorrt: the version it is for, None takes any from 10 on.
        dla_core: that the engine was built for.
        cuda_graph: launch all kernels at once.
        data_transfers: include copies to and from the GPU.
        spin_wait: wait for the GPU without letting the processor sleep.

    Raises:
        UsageError: see ``build_script``.
    """
    _major(tensorrt)
    common = [f"--loadEngine={plan}"]
    if any(isinstance(size, str) for tensor in inputs for size in tensor["shape"]):
        common.append(f"--shapes={','.join(_shape(tensor, batch) for tensor in inputs)}")
    if dla_core is not None:
        common.append(f"--useDLACore={dla_core}")
    times = [
        *(f"--warmUp={_QUIET_MS}", f"--duration={_LONG_S}", f"--iterations={_MANY}"),
        *(f"--percentile={_PERCENTILES}", f"--exportTimes={plan}.times.json"),
    ]
    profile = ["--dumpProfile", f"--exportProfile={plan}.profile.json", f"--exportLayerInfo={plan}.layers.json"]
    wanted = (cuda_graph, data_transfers, spin_wait)
    return f"""{_head("Measures an engine", tensorrt)}
# CUDA graph {_on(cuda_graph)}, data transfers {_on(data_transfers)}, spin wait {_on(spin_wait)}.
if (( major >= 11 )); then
  settings=({shlex.join(_settings_11(*wanted))})
else
  settings=({shlex.join(_settings_10(*wanted))})
fi

{_call([*common, *times], settings=True)}

# Profiling slows the engine down: take no latency from this run.
{_call([*common, *profile], settings=True)}
"""


def _settings_10(cuda_graph: bool, data_transfers: bool, spin_wait: bool) -> tuple[str, ...]:
    """What leaves the defaults of TensorRT 10: no graph, transfers, no spin wait."""
    flags = {"--useCudaGraph": cuda_graph, "--noDataTransfers": not data_transfers, "--useSpinWait": spin_wait}
    return tuple(flag for flag, wanted in flags.items() if wanted)


def _settings_11(cuda_graph: bool, data_transfers: bool, spin_wait: bool) -> tuple[str, ...]:
    """What leaves the defaults of TensorRT 11: graph, no transfers, spin wait."""
    flags = {"--noCudaGraph": not cuda_graph, "--includeDataTransfers": data_transfers, "--noSpinWait": not spin_wait}
    return tuple(flag for flag, wanted in flags.items() if wanted)


def _on(setting: bool) -> str:
    return "on" if setting else "off"


def _major(tensorrt: str | None) -> int | None:
    if tensorrt is None:
        return None
    if not re.fullmatch(r"\d+(\.\d+)*", tensorrt):
        raise UsageError(f"{tensorrt!r} is not a version of TensorRT", fix="for example 10.3")
    major = int(tensorrt.split(".")[0])
    if major < 10:
        fix = "use a JetPack with TensorRT 10: graphs are exported for its opset"
        raise UsageError(f"TensorRT {tensorrt} builds no strongly typed networks", fix=fix)
    return major


def _typing(tensorrt: str | None, dla_core: int | None) -> Iterator[str]:
    """Strong typing: needed in 10, accepted and without effect in 11. Before 11, a DLA wants a weakly typed network."""
    major = _major(tensorrt)
    if dla_core is None or (major is not None and major >= 11):
        yield "--stronglyTyped"
    elif major is None:
        raise UsageError("which flags a DLA needs depends on the version of TensorRT", fix="name it, for example 10.3")
    else:
        yield "--fp16"


def _shapes(inputs: Sequence[Mapping[str, Any]], batch: Mapping[str, int]) -> Iterator[str]:
    """Shapes of all inputs where any of them may change; trtexec refuses shapes for a network without such an input."""
    if any(isinstance(size, str) for tensor in inputs for size in tensor["shape"]):
        for end in ("min", "opt", "max"):
            yield f"--{end}Shapes={','.join(_shape(tensor, batch[end]) for tensor in inputs)}"


def _shape(tensor: Mapping[str, Any], batch: int) -> str:
    name, sizes = str(tensor["name"]), list(tensor["shape"])
    if any(isinstance(size, str) for size in sizes[1:]):
        raise UsageError(f"input {name!r} has shape {sizes}: more than its first dimension may change")
    if re.search(r"[',]|[\x00-\x1f]", name):
        fix = "rename it in the task, or build with mmedge build"
        raise UsageError(
            f"trtexec cannot take the name of input {name!r}: quotes and commas divide its options", fix=fix
        )
    shown = "x".join(str(batch if isinstance(size, str) else size) for size in sizes) or "scalar"
    return f"'{name}':{shown}" if ":" in name else f"{name}:{shown}"


def _call(flags: Iterable[str], *, settings: bool = False) -> str:
    lines = ['"$trtexec"', *(shlex.quote(flag) for flag in flags)]
    if settings:
        lines.append('${settings[@]+"${settings[@]}"}')  # an empty list is an unset variable to bash before 4.4
    return " \\\n  ".join(lines)


def _head(purpose: str, tensorrt: str | None) -> str:
    """Find trtexec, ask it for its version, refuse another one than ``tensorrt``."""
    wanted = tensorrt or ""
    return f"""#!/usr/bin/env bash
# {purpose} with TensorRT {tensorrt or "10 or later"}. Set TRTEXEC to use another trtexec.
set -euo pipefail

trtexec="${{TRTEXEC:-$(command -v trtexec || echo {_WHERE})}}"
[[ "$trtexec" == /* ]] || trtexec="$PWD/$trtexec"
cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")"
if [[ ! -x "$trtexec" ]]; then
  echo "There is no trtexec here ($trtexec). On a Jetson: sudo apt-get install tensorrt." >&2
  echo "TensorRT's Python package does not bring it." >&2
  exit 4
fi

# "[TensorRT v100300]": major, minor and patch with two digits each, since TensorRT 10.
banner="$("$trtexec" --help 2>&1 || true)"
if [[ ! "$banner" =~ TensorRT\\ v([0-9]+) ]]; then
  echo "$trtexec does not tell its version." >&2
  exit 4
fi
number="${{BASH_REMATCH[1]}}"
if (( number < 100000 )); then
  echo "This is TensorRT ${{number:0:1}}; strongly typed networks need 10 or later." >&2
  exit 4
fi
major=$(( number / 10000 ))
found="$major.$(( number / 100 % 100 )).$(( number % 100 ))"
wanted={shlex.quote(wanted)}
if [[ -n "$wanted" && "$found." != "$wanted."* && "$wanted." != "$found."* ]]; then
  echo "This script is for TensorRT $wanted, here is $found. Make a script for it, or use mmedge build." >&2
  exit 4
fi
"""
