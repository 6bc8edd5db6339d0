"""Tables of studies: one row for each method and decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icd_lightning.evaluation.report import Style, Table

STYLES = {
    **dict.fromkeys(("PSNR (dB)", "PSNR to truth", "PSNR outside"), Style(2)),
    **dict.fromkeys(("SSIM", "latent MSE", "seconds"), Style(3)),
    **dict.fromkeys(("changed as asked", "kept"), Style(1, factor=100)),
    "evaluations": Style(0),
}


def reconstruction_table(results: Mapping[str, dict[str, Any]], count: int, *, ceiling: float, ours: str) -> Table:
    """To noise and back, by method (name -> its figures); `ceiling` is the autoencoder's own PSNR."""
    rows: list[tuple] = [("autoencoder alone", "", ceiling, None, None, None, None)]
    for name, result in results.items():
        for row in result["reconstruction"]:
            values = (row[key] for key in ("psnr", "ssim", "latent_mse", "nfe", "seconds"))
            rows.append((name, row["guidance"], *values))
    return Table(
        title="Reconstruction: to noise and back",
        note=f"{count} held-out pictures, encoded at w 1 and decoded as the second column says. The "
        "autoencoder alone is the best that latents can give. Seconds of one picture, in batches, on this machine.",
        header=("method", "decoding", "PSNR (dB)", "SSIM", "latent MSE", "evaluations", "seconds"),
        rows=tuple(rows),
        highlight_rows=tuple(i for i, row in enumerate(rows) if row[0] == ours),
        styles=STYLES,
    )


def edit_table(results: Mapping[str, dict[str, Any]], count: int, decoding: str, *, ours: str) -> Table:
    """Edits against their true results, by method."""
    keys = ("changed", "kept", "psnr_truth", "psnr_outside", "nfe", "seconds")
    rows = tuple((name, *(result["edits"][key] for key in keys)) for name, result in results.items())
    return Table(
        title="Edits by prompt, against their true results",
        note=f"{count} edits of one attribute each (colour, shape, texture or size of an object, colour or "
        f"texture of the background), {decoding}. Attributes as read by a "
        "small network made for this world; PSNR to the true edit and, outside the edited region, to the original.",
        header=("method", "changed as asked", "kept", "PSNR to truth", "PSNR outside", "evaluations", "seconds"),
        rows=rows,
        highlight_rows=tuple(i for i, row in enumerate(rows) if row[0] == ours),
        styles=STYLES,
    )


def generation_table(results: Mapping[str, dict[str, Any]], count: int, decoding: str, *, ours: str) -> Table:
    """Share of captions' attributes that generated pictures show, by method."""
    names = tuple(next(iter(results.values()))["generation"])
    rows = tuple((name, *(100 * result["generation"][key] for key in names)) for name, result in results.items())
    return Table(
        title="Generation: attributes of the caption that the picture shows (%)",
        note=f"{count} pictures from drawn noise, {decoding}, read by the same network.",
        header=("method", *names),
        rows=rows,
        highlight_rows=tuple(i for i, row in enumerate(rows) if row[0] == ours),
        styles=dict.fromkeys(names, Style(1)),
    )
