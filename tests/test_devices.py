"""The device table: what it says, how others add to it, and how the command line shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command import mmedge

from mmedge import plugins
from mmedge.errors import UsageError
from mmedge.targets.devices import Device, Software, devices, find_device

JETSONS = {
    "jetson-orin-nano": ["5.1", "6.2", "7.2"],
    "jetson-orin-nx": ["5.1", "6.2", "7.2"],
    "jetson-agx-orin": ["5.1", "6.2", "7.2", "7.2.2"],
    "jetson-xavier-nx": ["5.1"],
    "jetson-agx-xavier": ["5.1"],
    "jetson-agx-thor": ["7.1", "7.2", "7.2.2"],
}
CARDS = {
    **{"rtx-2080-ti": "7.5", "rtx-3060": "8.6", "rtx-3090": "8.6", "rtx-4060": "8.9", "rtx-4090": "8.9"},
    **{"rtx-5070": "12.0", "rtx-5090": "12.0", "l4": "8.9", "a100": "8.0", "h100": "9.0", "h200": "9.0"},
}
DOUBTS = ("not read", "transcribed", "estimate", "summarised", "depends on")
DERIVED = ("ratio", "half of", "twice", "as FP16", "of the module")  # from figures that are in doubt themselves


def numbers(version: str | None) -> tuple[int, ...]:
    assert version is not None
    return tuple(map(int, version.split(".")))


def every_release() -> list[tuple[Device, Software]]:
    return [(device, software) for device in devices().values() for software in device.software]


# --- what the shipped table says


def test_every_device_is_there() -> None:
    assert set(devices()) == {*JETSONS, *CARDS, "x86-cpu"}


@pytest.mark.parametrize("name", JETSONS)
def test_jetpack_releases(name: str) -> None:
    device = find_device(name)
    assert [each.release for each in device.software] == JETSONS[name]
    assert device.backend == "tensorrt"
    assert device.shared_memory


@pytest.mark.parametrize("name", CARDS)
def test_cards(name: str) -> None:
    device = find_device(name)
    assert device.sm == CARDS[name]
    assert device.backend == ("tensorrt-rtx" if name.startswith("rtx") else "tensorrt")


def test_backends_exist() -> None:
    assert {device.backend for device in devices().values()} <= set(plugins.names("target"))


def test_the_dla_is_built_for_only_up_to_tensorrt_10_7_and_by_11_4_1() -> None:
    for device, software in every_release():
        if device.kind == "jetson" and device.dla is not None:
            tensorrt = numbers(software.tensorrt)
            assert software.dla == (tensorrt < (10, 8) or tensorrt >= (11, 4, 1)), (device.name, software.name)
    assert find_device("jetson-orin-nano").dla is None
    assert find_device("jetson-agx-thor").dla is None
    assert not any(software.dla for software in find_device("jetson-agx-thor").software)


def test_tensorrt_11_is_strongly_typed_only() -> None:
    for device, software in every_release():
        if device.backend == "tensorrt":
            assert software.typing == ("strong" if numbers(software.tensorrt) >= (11,) else "weak"), device.name


def test_rails_of_agx_orin_add_up_to_the_module() -> None:
    """VDDQ_VDD2_1V8AO hangs off VIN_SYS_5V0, which alone is not the total."""
    assert find_device("jetson-agx-orin").rails == ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
    assert find_device("jetson-orin-nx").rails == ("VDD_IN",)
    assert find_device("rtx-4090").rails == ()


def test_jetpack_5_names_what_it_cannot_do() -> None:
    notes = " ".join(find_device("jetson-xavier-nx").release("5.1").notes)
    assert "3.8" in notes
    assert "opset 20" in notes
    assert "LayerNormalization" in notes


def test_peaks_are_dense() -> None:
    """Half of NVIDIA's sparse headline, GPU and DLA together; INT8 is twice FP16 on every Tensor core."""
    orin = find_device("jetson-agx-orin")
    assert orin.dla is not None
    assert orin.peaks["int8"].value + orin.dla.peaks["int8"].value == 275 / 2
    for device in devices().values():
        if "fp16" in device.peaks:
            assert device.peaks["int8"].value / device.peaks["fp16"].value == pytest.approx(2, rel=0.03), device.name
            assert device.peaks["fp16"].value > device.peaks["fp32"].value, device.name


def test_verified_figures_carry_no_doubt_and_the_others_say_why() -> None:
    for device in devices().values():
        for name, _, figure in device.figures():
            doubted = any(word in figure.source for word in DOUBTS)
            if figure.verified:
                assert not doubted, (device.name, name)
            else:
                reason = doubted or any(word in figure.source for word in DERIVED) or "x FP32" in figure.source
                assert reason or device.kind == "cpu", (device.name, name, figure.source)


def test_bfloat16_is_not_claimed_for_volta_and_turing() -> None:
    for device in devices().values():
        if device.sm and numbers(device.sm) < (8,):
            assert "bf16" not in device.peaks, device.name


# --- choosing


def test_release_is_chosen_by_name_or_default() -> None:
    orin = find_device("jetson-agx-orin")
    assert orin.release(None).release == "6.2"
    assert orin.release("7.2").tensorrt == "10.16.2"
    assert orin.release("JetPack 5.1").python == "3.8"
    assert find_device("jetson-agx-thor").release(None).release == "7.2"
    assert find_device("rtx-5090").release(None).typing == "strong"
    with pytest.raises(UsageError, match=r"unknown release '6\.1'") as caught:
        orin.release("6.1")
    assert "did you mean '6.2'" in str(caught.value)
    assert caught.value.where == "jetson-agx-orin"


def test_unknown_device_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean 'jetson-agx-orin'"):
        find_device("jetson-agx-orn")


def test_machines_are_recognised_by_what_they_call_themselves() -> None:
    def named(name: str) -> list[str]:
        return [device.name for device in devices().values() if device.is_called(name)]

    assert named("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super") == ["jetson-orin-nano"]
    assert named("NVIDIA Jetson AGX Orin Developer Kit") == ["jetson-agx-orin"]
    assert named("Jetson-AGX") == ["jetson-agx-xavier"]
    assert named("NVIDIA GeForce RTX 3060") == ["rtx-3060"]
    assert named("NVIDIA GeForce RTX 3060 Ti") == []  # another card
    assert named("") == []


# --- devices of other packages

BOARD = """
shared:
  sheet: &sheet "the board's data sheet, page 3"
devices:
  my-board:
    title: My Board
    kind: gpu
    backend: tensorrt
    sm: "8.7"
    sm_source: *sheet
    memory_gib: {value: 8, source: *sheet}
    shared_memory: true
    peaks:
      fp32: {value: 1, source: *sheet}
      int8: {value: 8, source: *sheet, verified: false}
    bandwidth_gb_s: {value: 50, source: *sheet}
    launch_us: {value: 5, source: *sheet}
    pays: [int8, fp32]
    software:
      - {name: Board OS 1, release: "1", tensorrt: "10.3", typing: weak, opset: 20, source: *sheet}
"""
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a package that brings a device file; gives the file."""

    def add(text: str, value: str = "board_pack:board.yaml") -> Path:
        package = tmp_path / "board_pack"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('reading data must not run code')\n")
        (package / "board.yaml").write_text(text)
        about = tmp_path / "board_pack-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: board-pack\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[mmedge.devices]\nboard = {value}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        return package / "board.yaml"

    return add


def test_a_package_adds_devices(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(BOARD)
    assert find_device("my-board").peaks["int8"].value == 8
    assert "rtx-4090" in devices()
    assert "my-board" in mmedge(monkeypatch, capsys, "target", "list").out
    shown = mmedge(monkeypatch, capsys, "target", "show", "my-board").out
    assert "int8 peak 8 TOPS ? the board's data sheet, page 3" in " ".join(shown.split())


BROKEN = {
    "unknown key": ("launch_us:", "lanch_us:", "devices.my-board: unknown key 'lanch_us'\n  did you mean 'launch_us'"),
    "unknown key of a figure": (
        "verified: false",
        "verifed: false",
        "peaks.int8: unknown key 'verifed'\n  did you mean",
    ),
    "unknown key of a release": ("opset:", "opsets:", "software[0]: unknown key 'opsets'\n  did you mean 'opset'"),
    "wrong type": ("value: 50", "value: fast", "devices.my-board.bandwidth_gb_s.value: input should be a valid number"),
    "missing source": (
        "{value: 8, source: *sheet, verified: false}",
        "{value: 8}",
        "peaks.int8.source: field",
    ),
    "no real source": ("{value: 50, source: *sheet}", "{value: 50, source: memory}", "is not a source"),
    "not finite": ("value: 50", "value: .inf", "devices.my-board.bandwidth_gb_s.value"),
    "unknown precision": ("int8: {value", "int7: {value", "devices.my-board.peaks.int7"),
    "pays without a peak": ("pays: [int8, fp32]", "pays: [fp16]", "pays: peaks has no figure for fp16"),
    "rails without a source": ("pays:", "rails: [VDD_IN]\n    pays:", "rails_source must say"),
    "release twice": ("- {name", "- {name: a, release: '1', source: b}\n      - {name", "a release stands there twice"),
    "release without a source": (", opset: 20, source: *sheet", "", "devices.my-board.software[0].source"),
    "bad name": ("  my-board:", "  My_Board:", "devices.My_Board.name: string should match"),
    "unknown section": ("shared:", "sharde:", "unknown key 'sharde'"),
    "no devices": ("devices:", "device:", "must be a mapping from a device's name"),
    "a device that is no mapping": (
        BOARD[BOARD.index("    title") :],
        "    3\n",
        "my-board: must be a mapping",
    ),
    "no YAML": ("shared:", "shared: [", "cannot be read as YAML"),
    "a shipped name": ("  my-board:", "  l4:", "is already described by"),
}


@pytest.mark.parametrize(("old", "new", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_with_file_and_key(
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    said: str,
) -> None:
    assert old in BOARD
    file = install(BOARD.replace(old, new))
    outcome = mmedge(monkeypatch, capsys, "target", "show", "l4")
    assert outcome.status == 2
    assert str(file) in outcome.err
    assert said in outcome.err


@pytest.mark.parametrize("value", ["board_pack:other.yaml", "board_pack", "nobody:board.yaml"])
def test_an_entry_point_without_a_file_is_refused(install: Install, value: str) -> None:
    install(BOARD, value)
    with pytest.raises(UsageError, match="entry point 'board' of board-pack names") as caught:
        devices()
    assert value in caught.value.problem
    assert caught.value.fix is not None


# --- the command line


def test_list_shows_backends_and_devices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = mmedge(monkeypatch, capsys, "target", "list").out.splitlines()
    (orin,) = [line for line in lines if line.startswith("jetson-agx-orin")]
    assert orin.split() == ["jetson-agx-orin", "Jetson", "AGX", "Orin", "64GB", "8.7", "JetPack", "6.2", "tensorrt"]
    assert any(line.startswith("onnxruntime ") for line in lines)
    assert all(line == line.rstrip() and len(line) <= 160 for line in lines)
    found = json.loads(mmedge(monkeypatch, capsys, "target", "list", "--json").out)
    assert set(found["backends"]) == set(plugins.names("target"))
    assert found["devices"]["rtx-4090"]["sm"] == "8.9"
    assert next(iter(found["devices"])).startswith("jetson")


@pytest.mark.parametrize("name", [*JETSONS, *CARDS, "x86-cpu"])
def test_show_tells_every_figure_with_its_source(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # nothing is folded
    outcome = mmedge(monkeypatch, capsys, "target", "show", name)
    assert outcome.status == 0
    device = find_device(name)
    lines = outcome.out.splitlines()
    for label, unit, figure in device.figures():
        (line,) = [line for line in lines if line.startswith(f"{label}  ") and figure.source in line]
        assert f"{figure.value:g} {unit}" in line
        assert (" ? " in line) == (not figure.verified)
    for text in (*device.notes, *(each.source for each in device.software), " + ".join(device.rails)):
        assert text in outcome.out


def test_show_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = mmedge(monkeypatch, capsys, "target", "show", "jetson-agx-orin").out
    assert max(map(len, shown.splitlines())) <= 80
    assert all(rail in shown for rail in find_device("jetson-agx-orin").rails)
    assert "…" not in shown


def test_show_as_json_is_the_whole_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(mmedge(monkeypatch, capsys, "target", "show", "jetson-orin-nx", "--json").out)
    assert facts.pop("default_release") == "6.2"
    assert facts.pop("options")["jetpack"] is None
    assert Device.model_validate(facts) == find_device("jetson-orin-nx")


def test_show_still_tells_of_backends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(mmedge(monkeypatch, capsys, "target", "show", "onnxruntime", "--json").out)
    assert facts["problem"] is None
    assert "onnxruntime" in facts["versions"]
    assert "name: onnxruntime" in mmedge(monkeypatch, capsys, "target", "show", "onnxruntime").out


def test_unknown_target_is_refused_with_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, meant in (("rtx4090", "rtx-4090"), ("onnxruntim", "onnxruntime")):
        outcome = mmedge(monkeypatch, capsys, "target", "show", wrong)
        assert outcome.status == 2
        assert f"did you mean {meant!r}" in outcome.err
