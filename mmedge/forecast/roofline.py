"""From operators to milliseconds on a device that is not here: a roofline, with what is assumed said beside it.

Three figures for a query, in the order in which they grow:

- the **lower bound**, which nothing that computes every multiply-add of the graph can beat: all of them at the dense
  peak, or all weights once through memory, whichever takes longer (S. Williams, A. Waterman, D. Patterson: Roofline,
  CACM 52(4), 2009);
- the **fast end** of what to expect: everything is fused that can be, kernels wait in a queue and activations stay in
  a cache, and a good part of the peaks is reached;
- the **slow end**: chains of element-wise operators are kernels of their own, every kernel is started after the one
  before it and moves all it reads and writes through memory, and a lesser part of the peaks is reached. Small kernels
  do not fill a GPU: as in R. Hockney's model of a pipeline, each takes a fixed time besides that of its work, so that
  work which takes as long at the peak reaches half of it.

The parts of the peaks are assumptions, chosen with the results at hand that ``benchmarks/forecast.py`` compares with:
on GPUs NVIDIA's published MLPerf results, on this machine's processor measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from mmedge.forecast.layers import Layer, Network
from mmedge.targets.devices import Device

Precision = Literal["fp32", "fp16", "int8"]
FLOAT_BYTES = {"fp32": 4, "fp16": 2}
CACHE_MIB = 128  # taken to be more than the last-level caches of these devices hold; the table has no sizes of them
GIB = 1 << 30


@dataclass(frozen=True)
class Reach:
    """What software makes of a kind of hardware, at its best and at its worst.

    Attributes:
        compute: parts of the dense peak that products reach.
        memory: parts of the memory bandwidth that are reached.
        fill_us: time besides that of its work that a kernel takes in the slow end.
        queued: kernels are started while others run, so in the fast end a start costs only where it takes longer than
            the work.
    """

    compute: tuple[float, float]
    memory: tuple[float, float]
    fill_us: float
    queued: bool


GPU = Reach(compute=(0.8, 0.3), memory=(0.9, 0.6), fill_us=5, queued=True)
CPU = Reach(compute=(0.95, 0.4), memory=(1.0, 0.5), fill_us=0, queued=False)


@dataclass(frozen=True)
class Timed:
    """One kernel of the fast end.

    Attributes:
        layers: what it computes, the first one being its main operator.
        precision: of its products, or of its values where it has none.
        macs: multiply-adds.
        size_bytes: what it reads from memory and writes to it.
        fast_s: seconds in the fast end.
        slow_s: seconds in the slow end, of all kernels that take its place there.
        slow_kernels: how many these are.
    """

    layers: tuple[Layer, ...]
    precision: str
    macs: int
    size_bytes: int
    fast_s: float
    slow_s: float
    slow_kernels: int


def why_not(device: Device, precision: Precision) -> str | None:
    """Why nothing can be said for this precision on this device, or None."""
    if precision not in device.peaks:
        return f"the device table has no {precision} peak for {device.name}"
    return None


@dataclass(frozen=True)
class Roofline:
    """A network on a device in one precision, which ``why_not`` has nothing against.

    Attributes:
        network: of a Q/DQ graph where ``precision`` is ``int8``, else of a float graph.
        device: whose peaks and bandwidth are used.
        precision: of the INT8 layers, or of everything in a float graph.
    """

    network: Network
    device: Device
    precision: Precision

    @property
    def rest(self) -> Literal["fp32", "fp16"]:
        """The precision of what is not INT8."""
        if self.precision == "int8":
            return "fp16" if "fp16" in self.device.peaks else "fp32"
        return self.precision

    @property
    def peaks_used(self) -> list[str]:
        """By the names that the device gives its figures."""
        tf32 = ("fp16",) if self.rest == "fp32" and has_tf32(self.device) else ()
        return [f"{each} peak" for each in dict.fromkeys((self.precision, self.rest, *tf32))]

    @property
    def bound_s(self) -> tuple[float, float]:
        """Seconds of the two lower bounds: of computing, and of memory beyond what a cache may keep between queries."""
        compute = sum(self._compute_s(layer, fast=True) for layer in self.network.layers)
        moved = self.network.streamed().size(self._float_bytes) - CACHE_MIB * (1 << 20)
        return compute, max(moved, 0) / self._bandwidth

    @cached_property
    def kernels(self) -> list[Timed]:
        """Every kernel of the fast end, in the order in which they run."""
        return [self._timed(kernel) for kernel in self.network.kernels()]

    @property
    def expected_s(self) -> tuple[float, float]:
        """Seconds of a query: the fast end and the slow end."""
        fast = max(sum(kernel.fast_s for kernel in self.kernels), *self.bound_s)
        return fast, max(sum(kernel.slow_s for kernel in self.kernels), fast)

    @property
    def memory_bytes(self) -> tuple[int, int]:
        """Weights, and the largest set of activations that are alive at the same time."""
        return self.network.weights().size(self._float_bytes), self.network.live(self._float_bytes)

    def _timed(self, kernel: Sequence[Layer]) -> Timed:
        steps = self.network.steps(kernel)
        products = [layer for layer in kernel if layer.macs]
        int8 = self.precision == "int8" and any(layer.int8 for layer in products)
        return Timed(
            layers=tuple(sorted(kernel, key=lambda layer: not layer.macs)),
            precision="int8" if int8 else self.rest,
            macs=sum(layer.macs for layer in kernel),
            size_bytes=self.network.traffic(kernel).size(self._float_bytes),
            fast_s=self._fast_s(kernel),
            slow_s=sum(self._slow_s(step) for step in steps),
            slow_kernels=len(steps),
        )

    def _fast_s(self, kernel: Sequence[Layer]) -> float:
        moved = self.network.weights_of(kernel).size(self._float_bytes) / self._bandwidth
        compute = sum(self._compute_s(layer, fast=True) for layer in kernel)
        work = max(compute / self._reach.compute[0], moved / self._reach.memory[0])
        return max(work, self._start_s) if self._reach.queued else work + self._start_s

    def _slow_s(self, step: Sequence[Layer]) -> float:
        moved = self.network.traffic(step).size(self._float_bytes) / self._bandwidth
        compute = sum(self._compute_s(layer, fast=False) for layer in step)
        work = max(compute / self._reach.compute[1], moved / self._reach.memory[1])
        return self._start_s + self._reach.fill_us * 1e-6 + work

    def _compute_s(self, layer: Layer, fast: bool) -> float:
        """Seconds at the peak; one multiply-add is two operations."""
        precision = "int8" if layer.int8 and self.precision == "int8" else self.rest
        return 2 * layer.macs / (self._peak(precision, fast) * 1e12)

    def _peak(self, precision: Precision, fast: bool) -> float:
        """Tera-operations per second; where runtimes differ in the units they use, the faster or the slower ones."""
        peaks = self.device.peaks
        if precision == "fp32" and fast and has_tf32(self.device):
            return max(peaks["fp32"].value, peaks["fp16"].value / 2)
        if precision == "int8" and not fast and "int8" not in self.device.pays:
            return min(peaks["int8"].value, peaks[self.rest].value)
        return peaks[precision].value

    @property
    def _reach(self) -> Reach:
        return reach_of(self.device)

    @property
    def _bandwidth(self) -> float:
        return self.device.bandwidth_gb_s.value * 1e9

    @property
    def _start_s(self) -> float:
        return self.device.launch_us.value * 1e-6

    @property
    def _float_bytes(self) -> int:
        return FLOAT_BYTES[self.rest]


def reach_of(device: Device) -> Reach:
    """What is assumed of this kind of device."""
    return CPU if device.kind == "cpu" else GPU


def has_tf32(device: Device) -> bool:
    """Whether FP32 products may run as TF32: from Ampere on, TensorRT does so unless told not to."""
    return device.sm is not None and float(device.sm) >= 8 and "fp16" in device.peaks


def assumptions(device: Device, precisions: Sequence[str]) -> list[str]:
    """Everything that the figures rest on besides the device table, in sentences."""
    reach = reach_of(device)
    compute, memory = ([f"{part:.0%}" for part in parts] for parts in (reach.compute, reach.memory))
    start = "starting a kernel is hidden behind the one before it" if reach.queued else "every operator has its start"
    fill = f", and {reach.fill_us:g} µs more in which it does not fill the device" if reach.fill_us else ""
    said = [
        "lower bound: all multiply-adds of the graph (convolutions computed directly, no sparsity) at the dense peak, "
        f"or weights, inputs and outputs once through memory less {CACHE_MIB} MiB that a cache may keep between "
        "queries, whichever takes longer; nothing is started, waited for or copied, and the clock is that of the peak",
        f"fast end: {compute[0]} of the peaks and {memory[0]} of the bandwidth are reached; element-wise operators, "
        "normalizations, softmax and transposes are fused into the kernel before them, activations stay in caches, "
        f"and {start}",
        f"slow end: {compute[1]} of the peaks and {memory[1]} of the bandwidth are reached; only chains of "
        "element-wise operators are fused, every kernel moves what it reads and writes through memory and has its "
        f"start{fill}",
    ]
    if "fp32" in precisions and has_tf32(device):
        said.append(
            "fp32: TensorRT computes FP32 products as TF32 unless told not to, so the lower bound and the fast end "
            "take half of the fp16 peak (the ratio of the A100; less on GeForce), the slow end takes the fp32 peak"
        )
    if "int8" in precisions and "int8" not in device.pays:
        said.append(
            f"int8: by the device table it does not pay on {device.name}; the slow end computes INT8 layers no faster "
            "than floating-point ones"
        )
    if "int8" in precisions:
        rest = "float16" if "fp16" in device.peaks else "float32"
        said.append(f"int8: what is not INT8 computes in {rest}; tensors between Q/DQ pairs are moved as INT8")
    if device.kind == "cpu":
        said.append("one thread")
    else:
        said.append("copies between host and GPU are not counted, nor is a limit by power, heat or other programs")
        said.append("GPU only: the DLA is not forecast" if device.dla else "GPU only")
    said.append(
        "memory: weights, and activations that are alive at the same time if nothing is fused or computed in place; "
        "the runtime itself and the scratch space of kernels are not counted, for want of a source"
    )
    return said
