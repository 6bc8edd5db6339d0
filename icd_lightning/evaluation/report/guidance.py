"""Guidance as figures: the error over the turn-on threshold, quality against that, both ends of an inversion guided."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from icd_lightning.evaluation.benchmarks.guidance import GUIDANCES, TABLE_1, TABLE_1_NLL
from icd_lightning.evaluation.report.figures import LOOKS, PRINTED, Axes, Sheet, points, sheet
from icd_lightning.evaluation.results import Results
from icd_lightning.evaluation.scoring import RECORDED
from icd_lightning.evaluation.statistics import bootstrap
from icd_lightning.metrics.registry import label_of

LATENT_MSE = "latent MSE, to noise and back"
NORMAL_NLL = 0.5 * (1 + np.log(2 * np.pi))  # of noise that really is drawn from N(0, I), per dimension
TICKS = [name.removeprefix("tau ") for name in GUIDANCES]


@PRINTED
def threshold_plot(results: Sequence[Results]) -> Sheet:
    """Fig. 4: what comes back of an unguided inversion, over the threshold below which the decoder is guided."""
    figure, (axes,) = sheet(height=2.8, width=4.6)
    for result, look in zip(results, LOOKS, strict=False):
        taus = {result.options[decoding]["tau"]: decoding for decoding in result.decodings}
        errors = [bootstrap(result.values("latent_mse", taus[tau])) for tau in sorted(taus)]
        points(axes, sorted(taus), errors, look, label=result.name)
    axes.set(xlabel="turn-on threshold, tau (guided at t ≤ tau T)", ylabel=LATENT_MSE)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


@PRINTED
def trade_off_plot(generated: Results, inverted: Results) -> Sheet:
    """Fig. 5: quality of generated pictures against the error of inversion, for dynamic guidance over tau1 and tau2.

    A line joins the settings of one tau2, where guidance is off above; the number at each point is tau1, where it is
    full below; rings are the step form, tau1 = tau2.
    """
    quality = next(name for name in generated.columns if name not in RECORDED)  # the first that was asked for
    settings = {name: options for name, options in generated.options.items() if "tau2" in options}
    places = {}
    for decoding in generated.decodings:
        value = bootstrap(generated.values(quality, decoding)) * generated.styles[quality].factor
        places[decoding] = (bootstrap(inverted.values("latent_mse", decoding)), value)
    figure, (axes,) = sheet(height=3.6, width=5.6)
    for tau2, look in zip(sorted({options["tau2"] for options in settings.values()}), LOOKS, strict=False):
        line = {options["tau1"]: places[name] for name, options in settings.items() if options["tau2"] == tau2}
        points(axes, *zip(*(line[tau1] for tau1 in sorted(line)), strict=True), look, label=f"tau2 = {tau2:g}")
        for tau1, place in line.items():
            axes.annotate(f"{tau1:g}", place, xytext=(4, -9), textcoords="offset points", fontsize=7)
            if tau1 == tau2:
                axes.plot(*place, "o", markersize=9, markerfacecolor="none", markeredgecolor=look.color)
    if "w 1" in places:
        points(axes, *zip(places["w 1"], strict=True), LOOKS[5]._replace(line="", marker="*"), label="unguided")
    axes.set(xlabel=LATENT_MSE, ylabel=label_of(quality))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="numbers: tau1\nrings: tau1 = tau2", alignment="left")
    return figure


@PRINTED
def table_1_plot(result: Results, quality: str) -> Sheet:
    """Table 1: a distance by both ends' guidance, ours and the paper's, and the likelihood of what encoders give."""
    figure, (ours, paper, likelihood) = sheet(3, height=2.5)
    values = [[result.mean(quality, f"encoder {e}, decoder {d}") for e in GUIDANCES] for d in GUIDANCES]
    _heat(ours, np.array(values, dtype=float), label_of(quality))
    _heat(paper, np.array([TABLE_1[d] for d in GUIDANCES]), "FID, the paper's")
    ours.set_ylabel("decoder's guidance, tau")
    places = range(len(GUIDANCES))
    nll = [bootstrap(result.values("nll", f"encoder {e}, decoder none")) for e in GUIDANCES]
    points(likelihood, places, nll, LOOKS[0], label="ours")
    points(likelihood, places, TABLE_1_NLL, LOOKS[5]._replace(marker="D", line="--"), label="the paper's")
    likelihood.axhline(NORMAL_NLL, color="black", linewidth=0.8, linestyle=":", label="N(0, I)")
    likelihood.set_title("Latent NLL", fontsize=8)
    likelihood.set_ylabel("nats per dimension")
    likelihood.legend()
    for axes in (ours, paper, likelihood):
        axes.set_xticks(places, TICKS)
        axes.set_xlabel("encoder's guidance, tau")
    return figure


def _heat(axes: Axes, values: np.ndarray, title: str) -> None:
    """A square for each pair of guidances with its value, darker where it is larger."""
    axes.imshow(values, cmap="Purples", vmin=0, vmax=1.3 * np.nanmax(values), aspect="auto")
    middle = 0.8 * np.nanmax(values)
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        text = f"{value:.3g}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
        axes.text(column, row, text, ha="center", va="center", color="white" if value > middle else "black")
    axes.set_yticks(range(len(TICKS)), TICKS)
    axes.set_title(title, fontsize=8)
    axes.grid(False)
