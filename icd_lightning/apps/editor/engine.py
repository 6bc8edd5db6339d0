"""What the web editor does, without the web: one pipeline that edits for everybody, and the ways to noise it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from icd_lightning.data.images import resize_and_crop
from icd_lightning.editing.injection import usual_control
from icd_lightning.editing.limits import Control
from icd_lightning.editing.method import UNGUIDED, Clock
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.evaluation.report.sheet import contact_sheet
from icd_lightning.models.released import SHIPPED
from icd_lightning.models.text import END_OF_WORD
from icd_lightning.texts import check_prompt

MAX_PIXELS = 40_000_000
"""Of a picture that somebody sends: as many as a large camera's, 120 MB once it is read."""
MAX_CHARACTERS = 2000  # of a prompt; how many tokens it may have, the model says
SAYS = {"source": "shows", "target": "shall show"}
MAX_CELLS = 36  # of a contact sheet
MAX_PICTURES = 8  # of one prompt


@dataclass(frozen=True)
class Cost:
    """Network evaluations of one picture, and the seconds of all."""

    nfe: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.nfe} evaluations, {self.seconds:.2f} s"

    def of_many(self) -> str:
        return f"{self.nfe} evaluations each, {self.seconds:.2f} s in all"


@dataclass(frozen=True)
class Inversion:
    """A picture as large as the model's, its noise (1, C, h, w), what comes back from it unguided, and the cost."""

    original: Image.Image
    noise: Tensor
    reconstruction: Image.Image
    cost: Cost


@dataclass(frozen=True)
class Wish:
    """What a picture shows, what it shall show, and how to get there; without control the prompt is swapped."""

    source: str
    target: str
    guidance_scale: float
    tau: float
    control: Control | None = None
    swap_tau: float | None = None  # as in `edit` of the pipeline


class Editor:
    """Edits by one pipeline, for one caller at a time.

    The latest `kept` pairs of picture and source prompt stay inverted. They are found by the picture's own pixels, so
    that nobody can be given what another picture became.
    """

    def __init__(self, pipe: InvertibleConsistencyPipeline, *, kept: int = 32) -> None:
        self.pipe = pipe
        pipe.set_progress_bar_config(disable=True)  # a server's log is no place for bars
        self._inverted = lru_cache(kept)(self._invert)

    def usual(self, source: str, target: str) -> Wish:
        """As the family is edited where nobody says how."""
        config = self.pipe.config
        if config.attention_control:
            return Wish(source, target, config.edit_guidance_scale, config.tau, usual_control(self.pipe.students))
        return Wish(source, target, config.guidance_scale, config.tau)

    def invert(self, picture: Image.Image, source: str) -> Inversion:
        """Take an RGB picture to noise and back; ValueError for a prompt that cannot be used."""
        self._check_prompts(source=source)
        original, _ = resize_and_crop(picture, self.pipe.resolution)
        return self._inverted(original.tobytes(), source)

    def edit(self, inversion: Inversion, wish: Wish) -> tuple[Image.Image, Cost]:
        """Decode the noise as wished; ValueError for a wish that cannot be met."""
        self._check_prompts(source=wish.source, target=wish.target)
        return self._decoded(inversion, wish)

    def sheet(
        self, inversion: Inversion, wish: Wish, taus: Sequence[float], scales: Sequence[float]
    ) -> tuple[Image.Image, Cost]:
        """The edit under every tau (columns) and every w (rows), as one picture; what a cell cost, and all seconds."""
        if not 0 < len(taus) * len(scales) <= MAX_CELLS:
            raise ValueError(
                f"{len(taus)} values of tau and {len(scales)} of w make no sheet: choose at least one of each, and at "
                f"most {MAX_CELLS} pairs"
            )
        self._check_prompts(source=wish.source, target=wish.target)
        wishes = [replace(wish, guidance_scale=w, tau=tau) for w in scales for tau in taus]
        cells, costs = zip(*(self._decoded(inversion, one) for one in wishes), strict=True)
        grid = {"tau": taus, "guidance_scale": scales}
        whole = Cost(costs[0].nfe, sum(cost.seconds for cost in costs))
        return contact_sheet(inversion.original, (wish.source, wish.target), grid, cells), whole

    def generate(self, prompt: str, count: int, seed: int, guidance: dict[str, float]) -> tuple[list, Cost]:
        """Pictures of a prompt, of the seeds from `seed` on; guidance: guidance_scale and tau."""
        self._check_prompts(target=prompt)
        if not 1 <= count <= MAX_PICTURES:
            raise ValueError(f"{count} pictures are not made at once: ask for 1 to {MAX_PICTURES}")
        return self._timed(lambda: self.pipe.generate([prompt] * count, seed=seed, **guidance).images)

    def _invert(self, pixels: bytes, source: str) -> Inversion:
        side = self.pipe.resolution
        original = Image.frombytes("RGB", (side, side), pixels)
        noise, there = self._timed(lambda: self.pipe.invert(original, source))
        pictures, back = self._timed(lambda: self.pipe.generate(source, latents=noise, guidance=UNGUIDED).images)
        return Inversion(original, noise, pictures[0], Cost(there.nfe + back.nfe, there.seconds + back.seconds))

    def _decoded(self, inversion: Inversion, wish: Wish) -> tuple[Image.Image, Cost]:
        guidance = {"guidance_scale": wish.guidance_scale, "tau": wish.tau}
        options = {"latents": inversion.noise, "control": wish.control, "swap_tau": wish.swap_tau, **guidance}
        pictures, cost = self._timed(lambda: self.pipe.edit(None, wish.source, wish.target, **options).images)
        return pictures[0], cost

    def _timed(self, call: Callable) -> tuple:
        clock = Clock(self.pipe.device)
        result = call()
        return result, Cost(self.pipe.nfe, clock.seconds())

    def _check_prompts(self, **prompts: str) -> None:
        """ValueError for prompts that the model would cut, or that say nothing to it."""
        for name, prompt in prompts.items():
            if not prompt.strip():
                raise ValueError(f"the {name} prompt is empty: say what the picture {SAYS[name]}")
            if len(prompt) > MAX_CHARACTERS:
                raise ValueError(
                    f"the {name} prompt has {len(prompt)} characters: shorten it to {MAX_CHARACTERS} or fewer"
                )
            check_prompt(prompt)
        if unknown := self.pipe.unknown_words(*prompts.values()):
            raise ValueError(f"this model does not know {', '.join(unknown)}: write with {', '.join(self.words)}")
        reader = self.pipe.method.conditioner.sides[-1].tokenizer  # T5's, where there is one: it reads on
        marks = reader.num_special_tokens_to_add()  # of begin and end
        most = reader.model_max_length - marks
        for name, prompt in prompts.items():
            if (count := len(reader(prompt, verbose=False).input_ids) - marks) > most:
                raise ValueError(f"the {name} prompt has {count} tokens, and the model reads {most}: shorten it")

    @property
    def words(self) -> list[str]:
        """All words of a model with a closed vocabulary; of others, none."""
        if not self.pipe.config.closed_vocabulary:
            return []
        whole = (token.removesuffix(END_OF_WORD) for token in self.pipe.tokenizer.get_vocab() if END_OF_WORD in token)
        return sorted(word for word in whole if word == "a" or len(word) > 1)


class Example(NamedTuple):
    """A picture, what it shows, and what it may show instead."""

    picture: Image.Image
    source: str
    target: str


def examples_of(model: str, count: int = 8) -> list[Example]:
    """Held-out scenes of the picture world, an edit of each kind in turn, for its families; for others, none."""
    if model not in SHIPPED:
        return []
    from icd_lightning.tiny.benchmarks import scene_edits
    from icd_lightning.tiny.scenes import HELD_OUT_SEED

    edits = scene_edits(count, HELD_OUT_SEED)
    return [Example(Image.fromarray(edit.picture.draw()), edit.caption, edit.target) for edit in edits]
