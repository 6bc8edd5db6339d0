"""ComfyUI nodes: a picture and its prompt become an inversion, and that with another prompt an edited picture.

Install this package into ComfyUI's Python, and save these lines as `custom_nodes/icd.py` in ComfyUI's folder:

    from icd_lightning.apps.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

ComfyUI imports this at its start, so diffusers and all networks wait until a node runs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from icd_lightning.editing.limits import AlignmentKind, Injection, PromptToPrompt

if TYPE_CHECKING:
    from torch import Tensor

    from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline

CATEGORY, INVERSION = "icd_lightning", "ICD_INVERSION"
OWN = -1.0  # a number that stands for the model's own, where a widget cannot be left empty
CONTROLS = {"prompt_to_prompt": PromptToPrompt, "injection": Injection}
EDIT_BY = ("auto", *CONTROLS, "swap")

Inputs = dict[str, dict[str, tuple]]


@dataclass(frozen=True)
class Model:
    """What the nodes load; an empty text is the model's own part."""

    model: str = "tiny"
    guided_unet: str = ""
    forward: str = ""
    reverse: str = ""
    precision: str = "float32"


@dataclass(frozen=True, eq=False)
class Inversion:
    """Noise (B, C, h, w) that pictures became, their prompts, and the model that knows the way back."""

    model: Model
    noise: Tensor
    prompts: tuple[str, ...]


class Invert:
    """Take pictures to noise, each under the prompt that describes it, and back, to see what the model keeps."""

    CATEGORY, FUNCTION = CATEGORY, "invert"
    RETURN_TYPES: ClassVar = (INVERSION, "IMAGE")
    RETURN_NAMES: ClassVar = ("inversion", "reconstruction")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802  (ComfyUI's name)
        side = {"default": 0, "min": 0, "max": 4096, "step": 8, "tooltip": "0 is the model's own; pictures are cut"}
        return {
            "required": {
                "image": ("IMAGE",),
                "source_prompt": text("what the picture shows; one line, or a line for each picture", multiline=True),
                "model": text("tiny, a folder, a .safetensors file or a hub id", default=Model.model),
            },
            "optional": {
                "guided_unet": text("of stage 1, a folder or file; by default the model's own"),
                "forward": text("the forward student, a folder or file; by default the model's own"),
                "reverse": text("the reverse student, likewise"),
                "precision": (["float32", "bfloat16", "float16"], {"default": Model.precision}),
                "width": ("INT", side),
                "height": ("INT", side),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**32 - 1}),
            },
        }

    def invert(
        self, image: Tensor, source_prompt: str, *, width: int = 0, height: int = 0, seed: int = 0, **model: str
    ) -> tuple[Inversion, Tensor]:
        """Images (B, H, W, C) in [0, 1] to an inversion, and what comes back of it unguided, (B, H, W, 3)."""
        from icd_lightning.data.images import to_pictures
        from icd_lightning.editing.method import UNGUIDED

        if image.ndim != 4 or image.shape[-1] not in (3, 4) or not image.isfinite().all():
            raise ValueError(f"image {tuple(image.shape)} is no batch of pictures: give (B, H, W, 3), all finite")
        pictures, prompts = to_pictures(image.movedim(-1, 1) * 2 - 1), lines(source_prompt)
        named = Model(**model)
        pipe = load(named)
        noise = pipe.invert(pictures, prompts, width=width or None, height=height or None, seed=seed)
        back = pipe.generate(prompts, latents=noise, guidance=UNGUIDED, output_type="pt").images
        return Inversion(named, noise, tuple(prompts)), as_comfy(back)


class Edit:
    """Take an inversion back to pictures that show the target prompt instead."""

    CATEGORY, FUNCTION = CATEGORY, "edit"
    RETURN_TYPES: ClassVar = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        return {
            "required": {
                "inversion": (INVERSION,),
                "target_prompt": text("what it shall show; one line, or a line for each picture", multiline=True),
            },
            "optional": {
                "guidance_scale": number(OWN, OWN, 50.0, f"w; 1 is unguided, {OWN:g} is the model's own"),
                "tau": number(OWN, OWN, 1.0, f"guide at t <= tau T only; {OWN:g} is the model's own"),
                "edit_by": (list(EDIT_BY), {"default": EDIT_BY[0], "tooltip": "auto: as the model is edited best"}),
                "swap_tau": number(OWN, OWN, 1.0, f"swap: the source's prompt while t > swap_tau T; {OWN:g} is tau"),
                "cross_replace": number(PromptToPrompt.cross_replace, 0.0, 1.0, "more keeps more of the layout"),
                "self_replace": number(PromptToPrompt.self_replace, 0.0, 1.0, "more keeps more of the shapes"),
                "amplify": number(PromptToPrompt.amplify, 0.0, 50.0, "attention to new words, times this"),
                "alignment": (list(get_args(AlignmentKind)), {"default": PromptToPrompt.alignment}),
                "inject": number(Injection.inject, 0.0, 1.0, "injection: share of the steps, more keeps more"),
                "blocks_from": number(Injection.blocks_from, 0.0, 1.0, "injection: in blocks from this depth on"),
                "blocks_to": number(Injection.blocks_to, 0.0, 1.0, "injection: and up to this one"),
                "blend": ("BOOLEAN", {"default": PromptToPrompt.blend, "tooltip": "keep what the words are not about"}),
                "blend_threshold": number(PromptToPrompt.blend_threshold, 0.0, 1.0, "less changes a larger region"),
                "blend_from": number(PromptToPrompt.blend_from, 0.0, 1.0, "share of the steps before blending"),
            },
        }

    def edit(
        self,
        inversion: Inversion,
        target_prompt: str,
        *,
        edit_by: str = EDIT_BY[0],
        swap_tau: float = OWN,
        **settings: Any,
    ) -> tuple[Tensor]:
        """Pictures (B, H, W, 3) in [0, 1]; settings are guidance_scale, tau, and those of the controls."""
        from icd_lightning.editing.injection import usual_control

        pipe = load(inversion.model)
        guidance = {name: settings.pop(name, OWN) for name in ("guidance_scale", "tau")}
        if edit_by == "auto" and pipe.config.attention_control:
            edit_by = next(name for name, kind in CONTROLS.items() if isinstance(usual_control(pipe.students), kind))
        control = None
        if kind := CONTROLS.get(edit_by):
            control = kind(**{field.name: settings[field.name] for field in fields(kind) if field.name in settings})
        else:
            guidance["swap_tau"] = swap_tau
        told = {name: value for name, value in guidance.items() if value != OWN}
        prompts = list(inversion.prompts), lines(target_prompt)
        result = pipe.edit(None, *prompts, control=control, latents=inversion.noise, output_type="pt", **told)
        return (as_comfy(result.images),)


NODE_CLASS_MAPPINGS = {"ICDInvert": Invert, "ICDEdit": Edit}
NODE_DISPLAY_NAME_MAPPINGS = {"ICDInvert": "iCD Invert", "ICDEdit": "iCD Edit"}


@lru_cache(maxsize=1)
def load(model: Model) -> InvertibleConsistencyPipeline:
    """The pipeline on the accelerator, if there is one; the latest alone is kept. ValueError if it cannot be loaded."""
    import torch

    from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline

    load.cache_clear()  # else memory would hold two while this one is loaded
    parts = {name: getattr(model, name) or None for name in ("forward", "reverse", "guided_unet")}
    try:
        dtype = getattr(torch, model.precision)
        pipe = InvertibleConsistencyPipeline.from_pretrained(model.model, torch_dtype=dtype, **parts)
    except OSError as error:
        raise ValueError(str(error)) from error
    return pipe.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def lines(prompt: str) -> list[str]:
    """The prompts of a text, a line each; none is one that is empty."""
    return [line.strip() for line in prompt.splitlines() if line.strip()] or [""]


def as_comfy(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], about, as ComfyUI's (B, H, W, 3) on the processor."""
    return images.clamp(0, 1).movedim(1, -1).cpu()


def text(tooltip: str, *, default: str = "", multiline: bool = False) -> tuple:
    return "STRING", {"default": default, "multiline": multiline, "tooltip": tooltip}


def number(default: float, least: float, most: float, tooltip: str) -> tuple:
    return "FLOAT", {"default": default, "min": least, "max": most, "step": 0.05, "tooltip": tooltip}
