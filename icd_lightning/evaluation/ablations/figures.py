"""The study of ablations as figures: rows, verdicts, distributions, dynamics, and each picture by itself."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from icd_lightning.evaluation.ablations.study import ORDERINGS, ROWS, TAU, UNGUIDED_ROWS, AblationStudy, Comparison
from icd_lightning.evaluation.benchmarks.inversion import TABLE_2
from icd_lightning.evaluation.curves import read_scalars
from icd_lightning.evaluation.decodings import UNGUIDED, Decoding
from icd_lightning.evaluation.report.figures import LOOKS, PRINTED, Axes, Look, Sheet, points, sheet
from icd_lightning.evaluation.statistics import bootstrap, percentiles

LOOK_OF = dict(zip("GFCBAE", LOOKS, strict=True))  # by students: H and I are C's, J is F's, K is G's
PAPER = LOOKS[5]._replace(line="")
PSNR = "PSNR (dB)"
CURVES = {
    "reconstruction/psnr": "to noise and back: PSNR (dB)",
    "reconstruction/latent_mse": "to noise and back: latent MSE",
    "val/reverse_cd": "consistency, reverse",
    "val/forward_cd": "consistency, forward",
    "val/forward_preservation": r"forward preservation, $L_f$",
    "val/reverse_preservation": r"reverse preservation, $L_r$",
}
"""Scalars of a training and what they are."""


@PRINTED
def rows_plot(study: AblationStudy, *, guided: bool) -> Sheet:
    """Table 2 to look at: PSNR of every row with its interval, a dot for each training; the paper's beside it."""
    letters = [row.letter for row in study.ablations.values() if row.guided == guided]
    figure, (ours, paper) = sheet(2, height=0.9 + 0.3 * len(letters), sharey=True, width_ratios=(3, 2))
    scales = study.guidance_scales if guided else (1.0,)
    for index, w in enumerate(scales):
        places = np.arange(len(letters)) + 0.22 * (index - (len(scales) - 1) / 2)
        _draw_rows(ours, study, letters, w, places, LOOKS[index]._replace(line=""))
    ddim = "DDIM-50 + d.CFG" if guided else "DDIM-50"
    points(paper, [TABLE_2[letter][2] for letter in letters], range(len(letters)), PAPER)
    paper.axvline(TABLE_2[ddim][2], color=PAPER.color, linestyle=":")
    ours.set_yticks(range(len(letters)), [f"{letter}: {_mathematics(ROWS[letter][0])}" for letter in letters])
    ours.invert_yaxis()
    ours.set(title="Ours", xlabel=PSNR)
    paper.set(title=f"The paper's{', w 8' if guided else ''}", xlabel=PSNR)
    figure.legend(*ours.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _draw_rows(
    axes: Axes, study: AblationStudy, letters: Sequence[str], w: float, places: np.ndarray, look: Look
) -> None:
    """Each row's mean at its place, its trainings below, the untrained students and the teacher's own DDIM-50."""
    guided = study.ablations[letters[0]].guided
    rows = [study.row(letter, w) for letter in letters]
    points(axes, [row.mean() for row in rows], places, look, label=f"w {w:g}")
    for place, row in zip(places, rows, strict=True):
        axes.plot(row.values().mean(1), [place + 0.16] * len(row.runs), ".", color=look.color, markersize=2.5)
    untrained = [study.untrained(len(study.ablations[row.name].boundaries), row.decoding) for row in rows]
    means = [row.pictures().mean() for row in untrained]
    points(axes, means, places, look._replace(marker="x"), label=f"untrained, w {w:g}")
    ddim = study.runs["ddim"].values("psnr", Decoding.step(w, TAU).name if guided else UNGUIDED.name).mean()
    axes.axvline(ddim, color=look.color, linestyle=":", label=f"DDIM-50{' + d.CFG' * guided}, w {w:g}")


@PRINTED
def verdict_plot(study: AblationStudy) -> Sheet:
    """Differences of neighbouring rows with their intervals, and the paper's."""
    verdicts = list(enumerate(study.verdicts()))
    figure, (axes,) = sheet(height=0.8 + 0.24 * len(verdicts))
    for verdict, look in {"found": LOOKS[0], "undecided": LOOKS[5], "reversed": LOOKS[1]}.items():
        chosen = [(one.difference, place) for place, one in verdicts if one.verdict == verdict]
        if chosen:
            points(axes, *zip(*chosen, strict=True), look._replace(line=""), label=verdict)
    places, papers = zip(*((place, one.papers) for place, one in verdicts), strict=True)
    axes.plot(papers, places, "D", color="none", markeredgecolor=PAPER.color, label="the paper's")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [f"{one.worse.name} < {one.better.name}, {one.where}" for _, one in verdicts])
    axes.invert_yaxis()
    axes.set_xlabel("difference in PSNR over the same pictures (dB)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@PRINTED
def distribution_plot(study: AblationStudy) -> Sheet:
    """Share of pictures below a PSNR, by row, with the limits that resampling pictures gives."""
    shares = np.linspace(0, 100, 41)
    figure, panels = sheet(2, height=2.7, sharey=True)
    for axes, (guided, letters) in zip(panels, ORDERINGS.items(), strict=True):
        w = study.guidance_scales[0] if guided else 1.0
        for letter in letters if guided else UNGUIDED_ROWS:
            ablation = study.ablations[letter]
            look = LOOK_OF[ablation.students]
            line = "--" if ablation.tau == 1.0 else look.line  # the same students, guided throughout
            values = percentiles(study.row(letter, w).pictures(), shares)
            axes.plot(list(map(float, values)), shares, color=look.color, linestyle=line, label=letter)
            limits = [value.low for value in values], [value.high for value in values]
            axes.fill_betweenx(shares, *limits, color=look.color, alpha=0.12, linewidth=0)
        axes.set(title=f"Guided, w {w:g}" if guided else "Unguided", xlabel=PSNR, ylim=(0, 100))
        axes.legend(loc="lower right")
    panels[0].set_ylabel("pictures below (%)")
    return figure


@PRINTED
def dynamics_plot(study: AblationStudy) -> Sheet:
    """What every training's validations saw, in the course of training: means over seeds.

    What came back of the same pictures and noise is shaded from the least to the most; losses are not: each seed draws
    its own noise for them.
    """
    logs = defaultdict(list)
    for name, folder in study.trainings.items():
        logs[name.partition("-")[0]].append(read_scalars(folder))
    figure, panels = sheet(3, 2, height=4.2, sharex=True)
    for axes, (name, title) in zip(panels, CURVES.items(), strict=True):
        for students, runs in logs.items():
            if any(name not in run for run in runs):  # a loss without weight is not computed
                continue
            by_step = [dict(zip(*run[name], strict=True)) for run in runs]
            steps = sorted(set.intersection(*map(set, by_step)))
            values = np.array([[found[step] for step in steps] for found in by_step])
            look = LOOK_OF[students]
            axes.plot(steps, values.mean(0), color=look.color, linestyle=look.line, label=students)
            if name.startswith("reconstruction/"):
                axes.fill_between(steps, values.min(0), values.max(0), color=look.color, alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize=8)
        if not name.endswith("psnr"):
            axes.set_yscale("log", subs=(2, 3, 5, 7))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
    for axes in panels[3:]:
        axes.set_xlabel("training step")
        axes.locator_params(axis="x", integer=True)
    panels[0].set_ylabel(PSNR)
    panels[3].set_ylabel("loss")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    return figure


@PRINTED
def scatter_plot(comparisons: Sequence[Comparison]) -> Sheet:
    """Each picture without a part and with it; above the diagonal the part helped."""
    figure, panels = sheet(len(comparisons), height=0.5 + 6.2 / len(comparisons))
    for axes, one in zip(panels, comparisons, strict=True):
        before, after = one.worse.pictures(), one.better.pictures()
        both = np.concatenate([before, after])
        limits = (both.min() - 0.5, both.max() + 0.5)
        axes.plot(before, after, ".", color=LOOKS[0].color, markersize=3.5, alpha=0.55, markeredgewidth=0)
        axes.plot(limits, limits, color="black", linewidth=0.8)
        gain = f"{bootstrap(one.gain):.2f} dB\n{100 * (one.gain > 0).mean():.0f} % gain"
        axes.text(0.97, 0.03, gain, transform=axes.transAxes, ha="right", va="bottom", fontsize=7.5)
        axes.set_title(_name(one), fontsize=8)
        labels = {"xlabel": f"{one.worse.name}: {PSNR}", "ylabel": f"{one.better.name}: {PSNR}"}
        axes.set(**labels, xlim=limits, ylim=limits, aspect="equal")
        axes.locator_params(nbins=4)
    return figure


@PRINTED
def gain_plot(study: AblationStudy, comparisons: Sequence[Comparison]) -> Sheet:
    """What each part adds to each picture, sorted; and by how hard a picture is for the teacher's own DDIM-50."""
    figure, (each, groups) = sheet(2, height=2.7)
    hardness = study.runs["ddim"].values("psnr", UNGUIDED.name)
    for one, look in zip(comparisons, LOOKS, strict=False):
        gains = np.sort(one.gain)
        each.plot(100 * (np.arange(len(gains)) + 0.5) / len(gains), gains, color=look.color, linestyle=look.line)
        points(groups, *zip(*one.by_hardness(hardness), strict=True), look, label=_name(one))
    for axes in (each, groups):
        axes.axhline(0, color="black", linewidth=0.8)
    each.set(title="Picture by picture", xlabel="pictures, by gain (%)", ylabel="gain in PSNR (dB)")
    groups.set(
        title="In quarters, by hardness", xlabel="PSNR of DDIM-50 in a quarter (dB)", ylabel="mean gain in PSNR (dB)"
    )
    figure.legend(*groups.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _name(comparison: Comparison) -> str:
    return f"{comparison.worse.name} + {_mathematics(comparison.better.part)}"


def _mathematics(text: str) -> str:
    return re.sub(r"L_(\w)", r"$L_\1$", text)
