"""`icd tiny ...`: the family that ships with the package, packed and measured."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


def report(
    *,
    model: str = "tiny",
    count: int = 512,
    seed: int = 1_000_003,
    out: str = "outputs/tiny-report",
    card: bool = False,
) -> None:
    """Measure a tiny family against its bars on held-out scenes; writes bars.json.

    Args:
        model: "tiny" (shipped) or a folder, e.g. outputs/tiny-weights/model.
        count: scenes to measure on.
        seed: which world they come from; trainings used the seeds 0 to 6.
        out: folder for bars.json.
        card: also write the model card, README.md in the family's folder.
    """
    from dataclasses import asdict
    from pathlib import Path

    from icd_lightning.evaluation.report import Style, Table, print_tables
    from icd_lightning.files import write_json
    from icd_lightning.models.family import Family
    from icd_lightning.tiny.bars import measure_family
    from icd_lightning.tiny.card import write_card
    from icd_lightning.tiny.scenes import check_held_out

    if count < 1:
        raise ValueError(f"count {count} must be 1 or more")
    check_held_out(seed)
    family = Family(model)
    bars = measure_family(family, count=count, seed=seed)
    rows = tuple((bar.name, bar.value, bar.rule, _verdict(bar)) for bar in bars)
    table = Table(
        f"{model} on {count} held-out scenes (seed {seed})",
        "",
        ("what", "measured", "bar", ""),
        rows,
        styles={"measured": Style(4)},
    )
    print_tables([table])
    file = Path(out) / "bars.json"
    write_json(file, {"model": model, "count": count, "seed": seed, "bars": [asdict(bar) for bar in bars]})
    log.info("%s", file)
    if card:
        log.info("%s", write_card(family.root, bars, count=count, seed=seed))


def package(
    *, source: str = "outputs/tiny-weights", out: str = "icd_lightning/weights/tiny", max_megabytes: float = 30.0
) -> None:
    """Turn the parts that `make tiny-weights` trained into the family that ships: half precision, with their records.

    Args:
        source: folder of the trainings.
        out: folder of the family.
        max_megabytes: refuse to write more than this.
    """
    from pathlib import Path

    from icd_lightning.tiny.packaging import package_family

    size = package_family(Path(source), Path(out), max_megabytes)
    log.info("%s: %.1f MB", out, size)


def _verdict(bar) -> str:
    return "" if bar.limit is None else "ok" if bar.passed else "MISSED"
