"""Figures show the figures: places, error bars, labels."""

import numpy as np
import pytest
from results_case import write_ablations, write_generation, write_guidance, write_results
from test_architecture import users_of

from icd_lightning.evaluation.ablations.figures import distribution_plot, dynamics_plot, rows_plot, verdict_plot
from icd_lightning.evaluation.benchmarks.guidance import TABLE_1
from icd_lightning.evaluation.benchmarks.inversion import TABLE_2
from icd_lightning.evaluation.report.figures import LOOKS, PRINTED, points, sheet
from icd_lightning.evaluation.report.guidance import table_1_plot, threshold_plot, trade_off_plot
from icd_lightning.evaluation.statistics import Estimate, bootstrap, percentiles
from icd_lightning.evaluation.summaries import trade_off


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_ablations(tmp_path_factory.mktemp("study"))


def series(axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Points with error bars, by label."""
    return {c.get_label(): c.lines[0].get_data() for c in axes.containers}


def test_matplotlib_has_one_home():
    assert users_of("matplotlib") == {"evaluation/report/figures.py", "evaluation/report/canvas.py"}


def test_error_bars_end_at_the_limits():
    drawn, (axes,) = sheet(height=2)
    points(axes, [0.0, 1.0], [Estimate(2.0, 1.5, 3.0), Estimate(4.0, 4.0, 4.5)], LOOKS[0])
    bars = axes.containers[0].lines[2][0].get_segments()
    assert [bar[:, 1].tolist() for bar in bars] == [[1.5, 3.0], [4.0, 4.5]]
    drawn._repr_png_()


def test_a_sheet_is_a_png_and_leaves_the_settings_of_matplotlib_alone():
    import matplotlib

    before = matplotlib.rcParams["font.size"]

    @PRINTED
    def draw():
        assert matplotlib.rcParams["font.size"] == 8.5
        return sheet(height=2)[0]

    assert draw()._repr_png_().startswith(b"\x89PNG")
    assert matplotlib.rcParams["font.size"] == before


def test_every_row_stands_at_its_mean_beside_the_papers(study):
    ours, paper = rows_plot(study, guided=False).axes
    x, _ = series(ours)["w 1"]
    assert x == pytest.approx([study.row(letter, 1.0).values().mean() for letter in "ABCEFG"])
    (papers,) = series(paper).values()
    assert papers[0].tolist() == [TABLE_2[letter][2] for letter in "ABCEFG"]
    x, _ = series(ours)["untrained, w 1"]
    assert x[2:] == pytest.approx([study.untrained(4).values().mean()] * 4)
    guided, _ = rows_plot(study, guided=True).axes
    assert series(guided)["w 5"][0] == pytest.approx([study.row(letter, 5.0).values().mean() for letter in "HIJK"])


def test_verdicts_stand_at_their_differences(study):
    (axes,) = verdict_plot(study).axes
    verdicts = study.verdicts()
    shown = {name: sorted(x) for name, (x, _) in series(axes).items()}
    assert shown == {
        word: sorted(float(v.difference) for v in verdicts if v.verdict == word)
        for word in dict.fromkeys(v.verdict for v in verdicts)
    }


def test_distributions_are_of_pictures_in_their_units(study):
    unguided, guided = distribution_plot(study).axes
    lines = {line.get_label(): line.get_data() for line in unguided.get_lines()}
    x, shares = lines["G"]
    assert x[20] == pytest.approx(np.median(study.row("G", 1.0).values().mean(0)))
    assert shares[20] == 50
    assert [line.get_label() for line in guided.get_lines()] == list("HIJK")
    assert unguided.get_xlabel() == "PSNR (dB)"


def test_dynamics_leave_out_what_a_row_has_not(study):
    panels = {axes.get_title("left"): axes for axes in dynamics_plot(study).axes}
    shown = {title: {line.get_label() for line in axes.get_lines()} for title, axes in panels.items()}
    assert shown["reverse preservation, $L_r$"] == {"G"}
    assert shown["forward preservation, $L_f$"] == set("EFG")
    assert shown["consistency, forward"] == set("ABCFG")


def test_thresholds_are_those_of_the_decodings(tmp_path):
    results = write_guidance(tmp_path)
    (axes,) = threshold_plot([results["icd"], results["ddim"]]).axes
    tau, error = series(axes)["icd"]
    assert tau == pytest.approx(np.arange(11) / 10)
    assert error[-1] == pytest.approx(results["icd"].values("latent_mse", "tau 1").mean())


def test_a_point_of_the_trade_off_joins_error_and_quality_in_percent(tmp_path):
    results = write_generation(tmp_path)
    (axes,) = trade_off_plot(results["icd"], results["icd, to noise and back"]).axes
    error, quality = series(axes)["tau2 = 0.7"]
    assert len(error) == 2  # tau1 0.4 and 0.7
    back = results["icd, to noise and back"].values("latent_mse", "tau1 0.7, tau2 0.7")
    assert error[1] == pytest.approx(back.mean())
    made = results["icd"].values("tiny-agreement", "tau1 0.7, tau2 0.7")
    assert quality[1] == pytest.approx(100 * made.mean())
    assert len(series(axes)["unguided"][0]) == 1


def trade_off_line(folder, psnr: dict[str, float]) -> np.ndarray:
    """The line's x through settings with these means: nan where it breaks."""
    results = write_results("sdedit", folder, {d: {"psnr": mean, "changed": 0.5} for d, mean in psnr.items()})
    x, _ = trade_off([results], "psnr", "changed", "Fig. 9").series["sdedit"]
    return np.asarray(x)


def test_a_line_of_the_trade_off_goes_through_the_settings_in_their_order(tmp_path):
    x = trade_off_line(tmp_path, {"w 2": 20.0, "w 3": 30.0, "w 5": 25.0})
    assert x[0] < x[2] < x[1]


def test_a_line_of_the_trade_off_breaks_where_two_options_change(tmp_path):
    x = trade_off_line(tmp_path, {"w 2, tau 0.8": 20.0, "w 2, tau 1": 21.0, "w 3, tau 0.8": 22.0, "w 3, tau 1": 23.0})
    assert np.isnan(x).tolist() == [False, False, True, False, False]


def test_table_1_is_drawn_with_the_encoders_across(tmp_path):
    result = write_guidance(tmp_path)["ddim, both ways"]
    ours, paper, _ = table_1_plot(result, "tiny-fd").axes
    values = ours.images[0].get_array()
    assert values[0, 3] == pytest.approx(result.set_scores["tiny-fd"]["encoder full, decoder none"])
    assert paper.images[0].get_array()[1].tolist() == list(TABLE_1["tau 0.6"])


def test_percentiles_hold_their_value_and_agree_with_numpy():
    values = np.random.default_rng(0).normal(size=200)
    found = percentiles(values, [10, 50, 90])
    assert list(map(float, found)) == pytest.approx(np.percentile(values, [10, 50, 90]).tolist())
    assert all(estimate.low <= estimate <= estimate.high for estimate in found)
    assert found[1].high - found[1].low == pytest.approx(
        1.25 * (bootstrap(values).high - bootstrap(values).low), rel=0.3
    )
