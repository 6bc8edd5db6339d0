"""One edit in many forms: by every method of ours, and by the reference's own editing code.

Each form is built from a `Setting` and called with a number, which says what to edit. All have the same weights, take
the same pictures towards the same captions, and return an `Edited`.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from icd_lightning.data.images import to_images
from icd_lightning.diffusion import Boundaries, Direction, Process
from icd_lightning.editing.consistency import InvertibleConsistency, Untrained
from icd_lightning.editing.method import Clock, PictureMethod
from icd_lightning.editing.methods import class_of
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt
from icd_lightning.editing.prompt_to_prompt.attention import Grid, choose_layers
from icd_lightning.evaluation.examples import Example, stack
from icd_lightning.evaluation.methods import Models
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.family import Family
from icd_lightning.models.students import ADAPTERS
from icd_lightning.tiny.benchmarks import scene_edits
from icd_lightning.tiny.scenes import HELD_OUT_SEED

BASE = "icd_p2p"
"""The method that all are compared with: iCD with Prompt-to-Prompt."""
REFERENCE = "reference"
NUM_EDITS = 4
SLOW_NFE = 100
"""An edit of more evaluations is slow."""


@dataclass(frozen=True)
class Setting:
    """What is edited and where: a family, latents of `latent` x `latent` (None: as it was trained), on a device."""

    family: str = "tiny"
    latent: int | None = None
    device: str = "cpu"
    precision: str = "float32"

    def models(self) -> Models:
        """All methods over the family."""
        return WithStudents(Family(self.family, precision=self.precision), device=torch.device(self.device))

    def resolution(self, models: Models, method: PictureMethod) -> int:
        """Pixels of a side of the pictures."""
        return self.latent * method.autoencoder.downsampling if self.latent else models.family.resolution


@dataclass(frozen=True)
class Edited:
    """A picture (1, 3, H, W) and what it took: evaluations of one picture, seconds, and those of the processor."""

    images: Tensor
    nfe: int
    seconds: float
    cpu_seconds: float


class WithStudents(Models):
    """Models of a family that may bring no students, as random:sd15 does: new ones, which begin as the teacher."""

    def load(self, name: str, **settings: float) -> PictureMethod:
        """With the family's own, or else new ones for the paper's four segments; they take as long."""
        cls = class_of(name, self.family)
        if self.family.source.folder is not None or not issubclass(cls, InvertibleConsistency):
            return super().load(name, **settings)
        new = Untrained.of_teacher(self.family, Boundaries.uniform(4))
        return cls(new.students, new.autoencoder, new.conditioner, new.boundaries, merge=True).to(self.device)


def recolourings() -> list[Example]:
    """Edits of one word, the colour of a held-out scene's only object, for which ours and the reference do the same."""
    edits = scene_edits(64 * NUM_EDITS, HELD_OUT_SEED)
    return [edit for edit in edits if edit.kind == "color" and len(edit.picture.things) == 1][:NUM_EDITS]


class Edit:
    """By a method of ours, with its own defaults."""

    def __init__(self, name: str, setting: Setting) -> None:
        models = setting.models()
        self.method, self.device = models.load(name), models.device
        self.guidance = models.guidance(name, self.method, edit=True)
        resolution = setting.resolution(models, self.method)
        self.examples = [(edit, stack([edit], resolution).to(self.device)) for edit in recolourings()]

    def __call__(self, number: int) -> Edited:
        example, images = self.examples[number % NUM_EDITS]
        clock, cpu = Clock(self.device), time.process_time()
        images = self.method.edit(
            images,
            [example.caption],
            [example.target],
            guidance=self.guidance,
            seed=[example.seed(0)],
            on_step=clock.count,
        )
        return Edited(images, clock.nfe, clock.seconds(), time.process_time() - cpu)

    def modules(self) -> list[nn.Module]:
        """All networks that it keeps."""
        parts = {**vars(self.method), **vars(getattr(self.method, "parts", SimpleNamespace()))}
        return [part for part in parts.values() if isinstance(part, nn.Module)]


class ReferenceEdit:
    """iCD with Prompt-to-Prompt by the reference's own code, from a checkout of it, at the settings of `BASE`.

    Its functions run unchanged: `invert`, `make_controller`, `runner`. As its loader does, it keeps three copies of all
    networks, with the students merged into two. Adapted are what it assumes of SD1.5 at 512 pixels (the picture's size,
    16 x 16 maps, 77 tokens, the autoencoder's scaling, eps prediction) and its progress bars, which are left out.
    """

    def __init__(self, setting: Setting, checkout: Path) -> None:
        if not (checkout / "utils" / "p2p.py").is_file():
            raise ValueError(f"--peer {checkout} has no utils/p2p.py: give a checkout of the reference's code")
        models = setting.models()
        if models.family.source.has("text_encoder_2"):
            raise ValueError(f"the reference has no Prompt-to-Prompt for {setting.family}, which has two text encoders")
        method = models.load(BASE)
        resolution = setting.resolution(models, method)
        self.device, self.examples = models.device, [(edit, edit.array(resolution)) for edit in recolourings()]
        self.guidance, self.settings = models.guidance(BASE, method, edit=True), PromptToPrompt()
        self.p2p, self.inversion, self.generation = reference_modules(checkout, method, setting.device)
        latents = method.latent_shape(1, resolution, resolution)
        (self.grid,) = set(choose_layers(method.students.network, latents[2:]).blend.values())
        self.width, self.rows = int(method.students.network.config.time_cond_proj_dim), 0
        self.teacher, self.reverse, self.forward = self._three_models(models, method)
        self.solver = self._solver(method.boundaries, models.family.source.config("scheduler"))

    def _three_models(self, models: Models, method: InvertibleConsistency) -> list[SimpleNamespace]:
        """What the reference's code calls a model: teacher, reverse and forward, with all that surrounds a UNet."""
        family, unet = models.family, method.students.network
        config = {**family.source.config("scheduler"), "prediction_type": "epsilon"}
        plain = family.load_model(guided=True).network.to(models.device)
        around = SimpleNamespace(
            vae=ReferenceAutoencoder(method.autoencoder),
            text_encoder=method.conditioner.text_encoder,
            tokenizer=method.conditioner.tokenizer,
            scheduler=DDIMScheduler.from_config(config),
            device=models.device,
            dtype=plain.dtype,
        )
        found = []
        for network in (plain, merged(copy.deepcopy(unet), "reverse"), merged(unet, "forward")):
            network.register_forward_hook(partial(self._as_eps, method.process), with_kwargs=True)
            found.append(SimpleNamespace(**vars(copy.deepcopy(around)), unet=network))
        return found

    def _as_eps(self, process: Process, _: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Count the evaluations of a UNet, and return what its output means as eps."""
        x, t = args
        self.rows += len(x)
        output.sample = process.split(output.sample, x, t.expand(len(x))).eps
        return output

    def _solver(self, ends: Boundaries, scheduler: Mapping[str, Any]) -> Any:
        reverse = list(ends.boundary_timesteps[1:])
        with redirect_stdout(StringIO()):
            return self.generation.Generator(
                model=self.teacher,
                n_steps=50,
                noise_scheduler=DDPMScheduler.from_config(scheduler),
                forward_cons_model=self.forward,
                reverse_cons_model=self.reverse,
                reverse_timesteps=reverse,
                forward_timesteps=[ends.start_timestep, *ends.boundary_timesteps[1:-1]],
                start_timestep=ends.start_timestep,
            )

    def __call__(self, number: int) -> Edited:
        example, picture = self.examples[number % NUM_EDITS]
        self.rows, clock, cpu = 0, Clock(self.device), time.process_time()
        _, noise, _ = self.inversion.invert(
            self.solver,
            stop_step=50,
            is_cons_inversion=True,
            inv_guidance_scale=0.0,
            w_embed_dim=self.width,
            image_path=picture,
            prompt=[example.caption],
            seed=example.seed(0),
        )
        images, _ = self.generation.runner(
            model=self.reverse,
            prompt=[example.caption, example.target],
            controller=self._controller(example),
            solver=self.solver,
            is_cons_forward=True,
            guidance_scale=self.guidance.guidance_scale - 1,
            latent=noise,
            tau1=self.guidance.tau,
            tau2=self.guidance.tau,
            w_embed_dim=self.width,
        )
        seconds, cpu_seconds = clock.seconds(), time.process_time() - cpu
        return Edited(to_images([images[1]]), self.rows, seconds, cpu_seconds)

    def _controller(self, example: Example) -> Any:
        """As its script tells Prompt-to-Prompt an edit of one word."""
        words = zip(example.caption.split(), example.target.split(), strict=True)
        ((old, new),) = [pair for pair in words if pair[0] != pair[1]]
        self.p2p.NUM_DDIM_STEPS = len(self.solver.reverse_timesteps)
        controller = self.p2p.make_controller(
            [example.caption, example.target],
            True,
            {"default_": self.settings.cross_replace},
            self.settings.self_replace,
            ((old,), (new,)),
            {"words": (new,), "values": (self.settings.amplify,)},
        )
        controller.local_blend = partial(blend_at, self.grid, controller.local_blend)
        return controller

    def modules(self) -> list[nn.Module]:
        """All networks that it keeps."""
        models = (self.teacher, self.reverse, self.forward)
        return [part for model in models for part in (model.unet, model.vae.autoencoder, model.text_encoder)]


def reference_modules(checkout: Path, method: InvertibleConsistency, device: str) -> tuple[ModuleType, ...]:
    """`utils.p2p`, `inversion` and `generation` of a checkout, told of another device, tokenizer and size."""
    tokenizer = method.conditioner.tokenizer
    length = tokenizer.model_max_length
    notebook = ModuleType("IPython.display")  # imported for notebooks, which this is not
    notebook.display = print
    sys.modules.setdefault(notebook.__name__, notebook)
    sys.path.insert(0, str(checkout))
    from utils import generation, inversion, p2p, seq_aligner

    p2p.device, p2p.tokenizer, p2p.MAX_NUM_WORDS = device, tokenizer, length
    equalizer, words_alpha = p2p.get_equalizer, p2p.get_time_words_attention_alpha
    p2p.get_equalizer = lambda *args: equalizer(*args)[:, :length]
    p2p.get_time_words_attention_alpha = partial(words_alpha, max_num_words=length)
    seq_aligner.get_replacement_mapper = partial(seq_aligner.get_replacement_mapper, max_len=length)
    inversion.load_512 = lambda picture, *offsets: picture
    generation.init_latent = lambda x, model, height, width, generator, count: (x, x.expand(count, *x.shape[1:]))
    generation.tqdm = iter
    return p2p, inversion, generation


def merged(unet: UNet2DConditionModel, direction: Direction) -> UNet2DConditionModel:
    """A UNet of `LoraStudents` with one of them added to its weights, and the other gone."""
    unet.fuse_lora(adapter_names=[ADAPTERS[direction]])
    unet.unload_lora()
    return unet


class ReferenceAutoencoder:
    """An autoencoder as the reference's code calls it, which scales latents by one number for all."""

    scaling = 0.18215

    def __init__(self, autoencoder: LatentAutoencoder) -> None:
        self.autoencoder, self.dtype = autoencoder, autoencoder.vae.dtype

    def encode(self, images: Tensor) -> dict[str, Any]:
        """Images (B, 3, H, W) to a posterior's mean (B, C, h, w)."""
        return {"latent_dist": SimpleNamespace(mean=self.autoencoder.encode(images) / self.scaling)}

    def decode(self, latents: Tensor) -> dict[str, Tensor]:
        """Latents (B, C, h, w) to images (B, 3, H, W)."""
        return {"sample": self.autoencoder.decode(latents * self.scaling)}


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """A layer's attention, which the reference's code takes for one of 16 x 16 places."""

    attention: Tensor
    grid: Grid

    def reshape(self, prompts: int, heads: int, one: int, height: int, width: int, words: int) -> Tensor:
        return self.attention.reshape(prompts, heads, one, *self.grid, words)


def blend_at(grid: Grid, blend: Any, x: Tensor, store: Mapping[str, list[Tensor]]) -> Tensor:
    """The reference's local blend of x (2, C, h, w), by the layers of this grid: it looks for two down and three up."""

    def of_grid(place: str) -> list[AttentionMap]:
        return [AttentionMap(maps, grid) for maps in store[place] if maps.shape[1] == grid[0] * grid[1]]

    return blend(x, {"down_cross": [None, None, *of_grid("down_cross")], "up_cross": of_grid("up_cross")})
