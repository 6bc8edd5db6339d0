"""What each part of the method does to each picture by itself, and the pictures that show it best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from icd_lightning.data.images import read_picture
from icd_lightning.evaluation.ablations import ORDERINGS, AblationStudy
from icd_lightning.evaluation.decodings import UNGUIDED
from icd_lightning.evaluation.examples import Example
from icd_lightning.evaluation.report import Panel
from icd_lightning.evaluation.statistics import Estimate, bootstrap

PARTS = {
    "AB": "a third segment",
    "BC": "a fourth segment",
    "CF": "L_f",
    "FG": "L_r",
    "HI": "dynamic guidance",
    "IJ": "L_f",
    "JK": "L_r",
}
"""What the second row of two has and the first has not."""
LOSSES = ("CF", "FG")
UNGUIDED_ROWS = "ABCEFG"


@dataclass(frozen=True)
class Effect:
    """PSNR in dB of each picture (keys) without a part of the method and with it, means over seeds, (pictures,)."""

    rows: str
    keys: Sequence[str]
    before: np.ndarray
    after: np.ndarray

    @property
    def part(self) -> str:
        return PARTS[self.rows]

    @property
    def gain(self) -> np.ndarray:
        return self.after - self.before

    def extremes(self, count: int) -> list[str]:
        """Keys of the pictures that it helps most, and then of those that it helps least."""
        order = np.argsort(-self.gain, kind="stable")
        return [self.keys[i] for i in (*order[:count], *order[-count:])]

    def by_hardness(self, reference: np.ndarray, groups: int = 4) -> list[tuple[float, Estimate]]:
        """Mean gain of equal groups of pictures, from those whose `reference` (pictures,) is least, with its mean.

        The reference must not share noise with either side, as a row's own PSNR would: that alone would make what is
        low before gain most.
        """
        parts = np.array_split(np.argsort(reference, kind="stable"), min(groups, len(reference)))
        return [(float(reference[part].mean()), bootstrap(self.gain[part])) for part in parts]


def effects(study: AblationStudy, *, guided: bool, guidance_scale: float = 1.0) -> list[Effect]:
    """Of every neighbouring pair of the paper's orderings, in their order; guided ones at this w."""
    keys = study.ddim.of(study.ddim.decodings[0]).key.tolist()
    found = []
    for worse, better in pairwise(ORDERINGS[guided]):
        before, after = (study.values(letter, guidance_scale).mean(0) for letter in (worse, better))
        found.append(Effect(worse + better, keys, before, after))
    return found


def telling(study: AblationStudy, count: int = 2) -> list[str]:
    """Keys of the pictures that each preservation loss helps most and least."""
    losses = [effect for effect in effects(study, guided=False) if effect.rows in LOSSES]
    return list(dict.fromkeys(key for effect in losses for key in effect.extremes(count)))


def result_files(study: AblationStudy, letter: str, keys: Sequence[str]) -> list[str]:
    """Pictures that an unguided row's first training made of these, relative to its run's folder."""
    rows = study.students[letter][study.seeds[0]].of(UNGUIDED.name).set_index("key")
    return rows.image[list(keys)].tolist()


def effect_panel(study: AblationStudy, examples: Mapping[str, Example], keys: Sequence[str]) -> Panel:
    """Pictures beside what each unguided row makes of them, with what the losses add to each."""
    gains = {e.rows: dict(zip(e.keys, e.gain, strict=True)) for e in effects(study, guided=False) if e.rows in LOSSES}
    columns = {}
    for letter in UNGUIDED_ROWS:
        folder = study.students[letter][study.seeds[0]].folder
        columns[letter] = [np.asarray(read_picture(folder / file)) for file in result_files(study, letter, keys)]
    side = len(columns["G"][0])
    rows = []
    for index, key in enumerate(keys):
        added = ", ".join(f"{PARTS[rows]} {gain[key]:+.1f} dB" for rows, gain in gains.items())
        pictures = (examples[key].array(side), *(made[index] for made in columns.values()))
        rows.append((f"{examples[key].caption}\n{added}", pictures))
    note = f"To noise and back, unguided, by the training of seed {study.seeds[0]}; gains are means over all trainings."
    return Panel("Pictures that the losses help most and least", note, ("original", *columns), tuple(rows), (6,))
