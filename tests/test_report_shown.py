"""A report in the terminal and as a page."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from command import mmedge
from reports import NO_RAILS, ROWS, TOO_FEW, final, only, report, sample
from rich.console import Console

from mmedge.report.gates import GatesConfig, evaluate
from mmedge.report.html import render, write_html
from mmedge.report.model import Outlier, Parity, Quantization, Report, Twin
from mmedge.report.terminal import show
from mmedge.report.verdict import verdict
from mmedge.report.words import findings


def gated() -> Report:
    found = report()
    limits = {"max_drop": 0.01, "min_speedup": 9, "max_latency_ms": {"p99": 3}, "max_modality_drop": {"image": 0.05}}
    found.gates = evaluate(GatesConfig.model_validate({**limits, "after": {"distill": {"max_drop": 0.005}}}), found)
    found.verdict = verdict(found.gates)
    return found


# the terminal


def shown(found: Report, width: int, run: Path = Path("runs/x"), color: bool = False) -> str:
    out = io.StringIO()
    show(found, run, Console(file=out, width=width, highlight=False, force_terminal=color, no_color=not color))
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_table_cuts_nothing_off(width: int) -> None:
    found = gated()
    text = shown(found, width)
    tables = text[: text.index("\nnext")]  # commands are never folded: they are there to be copied
    assert max(len(line) for line in tables.splitlines()) <= width
    assert "…" not in text
    assert "\x1b" not in text
    figures = "96.87 0.71 1.67 1.77 5.88 0.725 18.2 70.0 93.8 0.99998 57.80 90.20"
    assert not [figure for figure in figures.split() if figure not in text]
    assert f"mmedge build {Path('runs/x')} --target tensorrt-rtx" in text
    assert found.command in text
    for part in ("✗ 5.88", "✓ 0.71", "av_digits: FAIL", "95 % CI 5.65–6.12", "drop 0.71 points (95 % CI 0.50 to 0.92)"):
        assert part in " ".join(text.split())


def test_a_float_engine_that_answers_otherwise_than_pytorch_is_told() -> None:
    found = report()
    wrong = found.stages[0].results[0]
    assert "answers differently" not in shown(found, 400) + render(found)
    wrong.parity = Parity(max_abs=2.0, cosine=0.998)
    for text in (shown(found, 400), render(found)):
        assert (
            f"baseline on {wrong.target}: the float32 engine answers differently than PyTorch (cosine 0.9980)" in text
        )


def test_an_error_beyond_measure_has_no_long_figure() -> None:
    found = Quantization(layers=2, sensitivity={"head": 0.0123, "mel": 1e4, "all": 1e4})
    assert findings(found)[1:] == [
        "output error when one group alone rounds (root mean square, of the standard deviation): "
        "mel more than 1,000 %, head 11.1 %; all more than 1,000 %"
    ]


def test_what_was_not_counted_is_not_called_none() -> None:
    assert findings(Quantization(layers=0)) == []
    assert findings(Quantization(layers=2)) == ["2 layers can run in INT8"]


def test_one_wide_table_holds_every_column() -> None:
    line = next(line for line in shown(report(), 140).splitlines() if line.startswith("quantize"))
    assert " ".join(line.split()) == "quantize int8 96.87 0.71 1.67 1.77 –¹ 5.88 0.725 18.2 70.0 93.8 0.99998"


@pytest.mark.parametrize(
    ("shipped", "told"),
    [("mixed", "in floating point: head: too slow"), ("twin", "tried in floating point: head: too slow")],
)
def test_groups_are_in_floating_point_only_where_the_whole_is_not(shipped: str, told: str) -> None:
    found = report()
    twin = {"precision": "fp32", "speedup": 1.1, "ci95": None, "shipped": shipped, "reason": "INT8 did not pay"}
    final(found).twin = Twin.model_validate({**twin, "backed_off": {"head": "too slow"}})
    assert told in [line.strip() for line in shown(found, 140).splitlines()]
    assert f"<li>{told}</li>" in render(found)


def test_findings_tell_errors_as_people_read_them_and_a_layer_once() -> None:
    outliers = [Outlier(layer=name, ratio=ratio) for name, ratio in (("eye", 40), ("ear", 30), ("eye", 20))]
    squares = {"eye": 0.0001, "head": 0.01, "all": 0.0144}  # squared errors over the variance
    told = findings(Quantization(layers=3, outliers=outliers, sensitivity=squares))
    assert [line.split(" times")[0] for line in told if "largest" in line] == [
        "eye: its largest activation is 40.0",
        "ear: its largest activation is 30.0",
    ]
    assert told[-1].endswith("(root mean square, of the standard deviation): head 10.0 %, eye 1.00 %; all 12.0 %")


def test_reasons_are_footnotes_given_once() -> None:
    text = shown(report(), 140)
    assert text.count(TOO_FEW) == 1
    assert f"¹ {TOO_FEW}" in text
    assert "² no NVIDIA GPU here" in text
    assert "–²" in text
    assert NO_RAILS not in text  # energy was measured nowhere, so there is no such column
    found = report()
    final(found).energy_mj = 12.5
    assert NO_RAILS in shown(found, 140)
    assert "12.5" in shown(found, 140)


def test_colour_only_on_terminals() -> None:
    assert "\x1b[" in shown(gated(), 100, color=True)


def test_names_are_not_markup(tmp_path: Path) -> None:
    data = sample()
    data["task"]["name"] = "[red]task[/red]"
    data["stages"][3]["name"] = "[bold]q[/bold]"
    run = tmp_path / "my run"
    run.mkdir()
    (run / "report.json").touch()
    text = shown(Report.model_validate(data), 140, run)
    assert "[red]task[/red]" in text
    assert [line for line in text.splitlines() if line.startswith("[bold]q[/bold]")]
    assert f"'{run}'" in text
    assert str(run / "report.json") in text


def test_a_metric_in_its_own_unit() -> None:
    found = report()
    found.task.metric.name, found.task.metric.higher_is_better = "range_error_m", False
    text = shown(found, 140)
    assert "0.9687" in text
    assert "points" not in text
    assert "Down and to the left" in render(found)


@pytest.mark.parametrize("strict_at", ["top", "after"])
def test_two_limits_on_one_figure_of_the_last_stage_are_both_shown(strict_at: str) -> None:
    found = only(report(), "onnxruntime")
    limits = {"top": 0.01, "after": 0.01, strict_at: 0.005}
    config = {"max_drop": limits["top"], "after": {"quantize": {"max_drop": limits["after"]}}}
    found.gates = evaluate(GatesConfig.model_validate(config), found)
    found.verdict = verdict(found.gates)
    lines = [" ".join(line.split()) for line in shown(found, 140).splitlines()]
    assert "stage gate limit onnxruntime" in lines
    rows = [line for line in lines if line.startswith("quantize max_drop")]
    assert sorted(re.sub("[¹²³⁴]", "", row) for row in rows) == [
        "quantize max_drop ≤ 0.5 points ✗ 0.71",
        "quantize max_drop ≤ 1 points ✓ 0.71",
    ]
    page = render(found)
    assert page.count('<span class="badge fail">✗ 0.71') == page.count('<span class="badge pass">✓ 0.71') == 1


def test_reformats_are_counted() -> None:
    found = only(report(), "onnxruntime")
    coverage = final(found).coverage
    assert coverage is not None
    coverage.reformats = ["a → b", "b → c", "c → d"]
    found.gates = evaluate(GatesConfig(max_reformats=5), found)
    found.verdict = verdict(found.gates)
    assert "quantize max_reformats ≤ 5 ✓ 3" in [" ".join(line.split()) for line in shown(found, 140).splitlines()]
    assert '<span class="badge pass">✓ 3</span>' in render(found)


def test_a_modality_health_that_was_not_measured_is_shown_with_the_reason_and_fails_its_gate() -> None:
    found, why = only(report(), "onnxruntime"), "with image missing, the metric returned nan"
    for stage in found.stages:
        stage.modalities["image"].missing = None
        stage.modalities["image"].reasons = {"missing": why}
    found.gates = evaluate(GatesConfig(max_modality_drop={"image": 0.1}), found)
    found.verdict = verdict(found.gates)
    assert [gate.verdict for gate in found.gates] == ["not_measured"]
    assert found.verdict == "fail"
    text, page = shown(found, 140), render(found)
    assert re.search(rf"^[¹²³⁴] {why}$", text, re.MULTILINE)
    assert f'title="{why}">missing –' in page
    for shown_in in (text, page):
        assert f"was not measured: {why}. It was measured on no target" in " ".join(shown_in.split())


# the page


def test_page_is_self_contained_and_complete(tmp_path: Path) -> None:
    found = gated()
    write_html(found, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page == render(Report.model_validate_json(found.model_dump_json(by_alias=True)))
    assert "://" not in page
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b|@import|url\((?!#)", page)
    assert page.count("<svg") == 2  # nothing to plot where nothing ran
    ids = re.findall(r'\bid="(note-\d+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#(note-\d+)"', page)) == set(ids)
    for text in (
        "5.88×",
        "95 % CI 5.65–6.12",
        "95 % CI 0.50 to 0.92; 97.58 % to 96.87 %",
        "1 CPU thread, timed in 3 processes",
        "9.81",
        TOO_FEW,
        "not measured",
        "fp32: faster in float here",
        found.command,
    ):
        assert text in page
    for name in ROWS:
        assert re.search(rf"<text[^>]*>{name}</text>", page)
    assert "Why it fails" in page


def test_latencies_far_apart_are_plotted_on_a_logarithmic_axis() -> None:
    found = report()
    assert render(found).count("p50 latency, ms, logarithmic") == 2
    for stage in found.stages:
        for result in stage.results:
            if result.latency_ms:
                result.latency_ms.p50 = 1.0 + result.latency_ms.p50 / 100
    page = render(found)
    assert page.count("p50 latency, ms<") == 2
    assert "logarithmic" not in page


def test_page_escapes_what_users_name() -> None:
    evil = "<script>alert(1)</script>$x_1$"
    data = sample(command=evil, recipe={"task": evil})
    data["task"]["name"] = data["task"]["metric"]["name"] = data["stages"][3]["name"] = evil
    for stage in data["stages"]:
        stage["modalities"][evil] = stage["modalities"].pop("image")
        for row in stage["results"]:
            row["target"] = evil if row["target"] == "openvino" else row["target"]
            row["reasons"] = dict.fromkeys(row["reasons"], evil)
            row["coverage"] = row["coverage"] and {"int8": [evil], "other": {evil + "2": evil}}
    found = Report.model_validate(data)
    found.gates = evaluate(GatesConfig(max_drop=0.0, max_modality_drop={evil: 0.0}), found)
    page = render(found)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") > 20
    labels = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", page) if "script" in text]
    assert len(labels) == 4  # stage and metric in two plots
    assert all("$x_1$" in text for text in labels)  # and not as a formula


def test_page_without_modalities_gates_and_measurements() -> None:
    found = only(report(), "tensorrt-rtx")
    for stage in found.stages:
        stage.modalities = {}
    page = render(found)
    assert "<svg" not in page
    assert "Nothing to plot" in page
    assert "Modality health" not in page
    assert "The recipe sets none" in page
    assert "no NVIDIA GPU here" in page


def test_page_takes_names_in_any_script(recwarn: pytest.WarningsRecorder) -> None:
    data = sample()
    data["stages"][3]["name"] = "量化"
    assert "量化" in render(Report.model_validate(data))
    assert not recwarn.list


@pytest.mark.parametrize("name", ["", "nowhere/page.html"])
def test_page_needs_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    report().save(tmp_path / "report.json")
    outcome = mmedge(monkeypatch, capsys, "report", tmp_path, "--html", name)
    assert outcome.status == 2
    assert "no file can be written there\n  name a file in a folder that exists" in outcome.err
