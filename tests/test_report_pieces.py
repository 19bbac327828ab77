"""Pieces of the report page: axes, smoothing, numbers as words, the choice of pictures, failing to write."""

import math
from pathlib import Path

import pytest

from sdxl_trainer import report
from sdxl_trainer.errors import UserError
from sdxl_trainer.report import charts, pictures, records, words


@pytest.mark.parametrize(
    ("low", "high", "whole", "ticks"),
    [
        (0.0, 1.0, False, (0, 0.5, 1)),
        (0.12, 0.31, False, (0.1, 0.15, 0.2, 0.25, 0.3, 0.35)),
        (0.0, 1e-6, False, (0, 5e-7, 1e-6)),
        (1, 400, True, (100, 200, 300, 400)),
        (1, 3, True, (1, 2, 3)),
        (5, 5, True, (5,)),
    ],
)
def test_axes_have_round_ticks_that_cover(low: float, high: float, whole: bool, ticks: tuple[float, ...]) -> None:
    axis = charts.axis(low, high, 4, whole)
    assert axis.ticks == pytest.approx(ticks)
    assert axis.low <= low
    assert axis.high >= high


@pytest.mark.parametrize("largest", [2.0000000000000003e-06, 0.1 + 0.2])
def test_the_largest_value_is_not_above_its_own_frame(largest: float) -> None:
    chart = charts.Chart("learning_rate", "Learning rate")
    assert charts.vertical(chart, [0.0, largest])[1] == 0


@pytest.mark.parametrize("value", [0.0, 1e-12, 0.5, 123456.0, -3.0, 1e299])
def test_axes_of_flat_lines(value: float) -> None:
    for high in (value, math.nextafter(value, math.inf)):
        axis = charts.axis(value, high, 4)
        assert axis.low < axis.high
        assert 0 <= axis.place(value) <= 1000


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.004, 3.0], (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)),
        ([0.11, 0.14], (0.11, 0.12, 0.13, 0.14)),
        ([1e-9, 1e3], tuple(10.0**power for power in range(-9, 4, 2))),
    ],
)
def test_a_logarithmic_axis(values: list[float], ticks: tuple[float, ...]) -> None:
    (axis,) = charts.logarithmic(values)
    assert axis.ticks == pytest.approx(ticks)
    assert (axis.place(values[0]), axis.place(values[1])) == (0, 1000)
    assert axis.place(math.sqrt(values[0] * values[1])) == pytest.approx(500)


@pytest.mark.parametrize("values", [[0.0, 1.0], [-1.0, 1.0], [0.5, 0.5]])
def test_some_values_have_no_logarithmic_axis(values: list[float]) -> None:
    assert charts.logarithmic(values) == ()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (0.12344, "0.1234"),
        (1e-6, "1e-6"),
        (2.5e-5, "2.5e-5"),
        (12340.0, "12,340"),
        (1e8, "1e8"),
        (-0.5, "-0.5"),
    ],
)
def test_numbers_as_words(value: float, said: str) -> None:
    assert words.short(value) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.5, "0.5 s"),
        (42.125, "42.12 s"),
        (59.999, "60 s"),
        (372.4, "6 min 12 s"),
        (7384, "2 h 3 min"),
        (90061, "1 d 1 h"),
    ],
)
def test_durations_as_words(seconds: float, said: str) -> None:
    assert words.duration(seconds) == said


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert charts.smoothed([(1, 3.0)]) == [(1, 3.0)]
    assert [value for _, value in charts.smoothed([(i, 2.0) for i in range(50)])] == pytest.approx([2.0] * 50)


def test_many_prompts_each_get_their_first_seed(tmp_path: Path) -> None:
    file = tmp_path / "samples.png"
    samples = [
        records.Sample(step, file, f"prompt {p}", str(seed), "raw")
        for step in range(0, 1000, 50)
        for p in range(15)
        for seed in range(4)
    ]
    gallery = pictures.chosen(samples)
    assert len(gallery.rows) == pictures.MOST_ROWS
    assert {row[0] for row in gallery.rows if row[1] == "0"} == {f"prompt {p}" for p in range(15)}
    assert gallery.steps == (0, 500, 950)
    assert len(gallery.cells) <= pictures.MOST


def test_thinning_keeps_ends_and_peaks_in_order() -> None:
    points = [(step, math.sin(step) + 100 * (step == 7777)) for step in range(20_000)]
    kept = charts.kept(points)
    assert kept == sorted(set(kept))
    assert {0, 7777, 19_999} <= set(kept)
    assert len(kept) <= charts.LIMIT + 2


def test_no_run_is_the_users_to_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run in"):
        report.write(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        report.write(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 1}\n', encoding="utf-8")
    before = report.write(tmp_path).read_bytes()
    metrics.write_text('{"step": 2, "loss": 2}\n', encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(UserError, match="no space"):
            report.write(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]
