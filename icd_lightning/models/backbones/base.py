"""What distillation must know of an architecture; `unet.py` is the first, and every other is a file like it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer, Qwen2Tokenizer, Qwen3Model, T5EncoderModel, T5Tokenizer

from icd_lightning.diffusion import guidance_embedding
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.sources import Source
from icd_lightning.models.text import Conditioner, TextSide
from icd_lightning.models.weights import check_fit, read_weights

TOKENIZERS = {T5EncoderModel: T5Tokenizer, Qwen3Model: Qwen2Tokenizer}
"""Of text encoders but CLIP."""
WIDTH = "_guidance_dim"
"""Of a guidance embedding, in the config; diffusers keeps what begins with _ and asks nothing of it."""


class Backbone(ABC):
    """One architecture of networks. Has no state: `DiffusionModel` holds a network beside its backbone.

    A subclass sets:
        network_class: the class in diffusers, with `from_config`, `from_pretrained`, `save_pretrained` and `config`.
        part: the folder that holds the network in diffusers' layout, which is also the prefix of LoRA files.
        blocks: the classes of layers that are gathered one at a time where weights are spread over devices.
        lora_targets: endings of the names of the layers that students adapt, as peft takes them.
        guidance_weight: the name of the weight that takes the guidance embedding.
        sample_size: side of the latents that networks were trained on whose config does not say it.
    """

    network_class: ClassVar[type[nn.Module]]
    part: ClassVar[str]
    blocks: ClassVar[tuple[type[nn.Module], ...]]
    lora_targets: ClassVar[tuple[str, ...]]
    guidance_weight: ClassVar[str]
    sample_size: ClassVar[int | None] = None

    @abstractmethod
    def predict(self, network: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
        """The network's output (B, C, H, W) for x (B, C, H, W) at t (B,) as `Process.network_time` tells it.

        w (B,) is for the guidance embedding, and None for a network without one.
        """

    @abstractmethod
    def guidance_width(self, network: nn.Module) -> int | None:
        """Width of the network's guidance embedding, or None."""

    @abstractmethod
    def add_guidance_embedding(self, network: nn.Module, width: int = 512) -> nn.Module:
        """A copy with a guidance embedding that starts at zero: the same output at every w."""

    @abstractmethod
    def config_with_guidance(self, config: dict[str, Any], width: int) -> dict[str, Any]:
        """The config of a network like that of `config`, with a guidance embedding of this width."""

    @abstractmethod
    def conditioner(self, source: Source, dtype: torch.dtype) -> Conditioner:
        """The frozen text side that networks of this architecture are conditioned by."""

    @abstractmethod
    def weight(self, network: nn.Module) -> Tensor:
        """A weight of the network's own, never an adapter's: its type and device are the network's."""

    def is_guided(self, config: dict[str, Any]) -> bool:
        """Whether a model's own network, of this config, obeys w as it comes, and so needs no stage 1."""
        return False

    def check_teacher(self, config: dict[str, Any]) -> None:  # noqa: B027  (most configs say nothing of it)
        """ValueError for the config of a network that follows no probability flow, and so is no teacher."""

    def require_guidance(self, network: nn.Module) -> None:  # noqa: B027  (most libraries complain themselves)
        """Make it an error that the network is called without its guidance embedding, where a library runs on."""

    def merge_lora(self, network: nn.Module, file: Path, scale: float) -> None:
        """Merge a style's LoRA, `scale` times, into the network for good; ValueError for a file that fits no layer."""
        raise ValueError(f"style {file} cannot be merged: styles are of UNets, this is a {type(network).__name__}")

    def scheduler(self, config: dict[str, Any], tokens: int) -> dict[str, Any]:
        """The config of a scheduler whose shift depends on a picture's tokens, as `Process.from_config` reads it."""
        return config

    def latent_channels(self, network: nn.Module) -> int:
        """C of the latents that the network takes; another number than its input's where it packs them."""
        return int(network.config["in_channels"])

    def width_in(self, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> int:
        """Width of the guidance embedding of the network that these weights are of, 0 without one; see `config`."""
        return weights[self.guidance_weight].shape[1] if self.guidance_weight in weights else 0

    def bare(self, network: nn.Module) -> nn.Module:
        """The network without adapters; it shares the weights."""
        named = network.state_dict().items()
        return self.with_weights(network, {n.replace(".base_layer.", "."): w for n, w in named if ".lora_" not in n})

    def with_weights(self, network: nn.Module, weights: dict[str, Tensor], **changes: Any) -> nn.Module:
        """A network like this one, but for its weights and these values of its config."""
        # diffusers would drop a value again that it noted as "default, since the file did not say"
        config = {key: value for key, value in network.config.items() if key != "_use_default_values"}
        other = self.from_weights({**config, **changes}, weights)
        return other.train(network.training)

    def from_weights(self, config: dict[str, Any], weights: dict[str, Tensor], file: Path = Path()) -> nn.Module:
        """The network of this config with these weights; ValueError, with their file's name, unless all of them fit."""
        with torch.device("meta"):  # every weight is replaced below, so none is drawn
            network = self.network_class.from_config(config)
        check_fit(weights, network.state_dict(), file, f"this model's {self.part}")
        network.load_state_dict(weights, assign=True)
        if any(buffer.is_meta for buffer in network.buffers()):
            self._compute_buffers(network, config)
        return network

    def _compute_buffers(self, network: nn.Module, config: dict[str, Any]) -> None:
        """Give a network the buffers that no file holds, such as PixArt's positions; random numbers go on as before."""
        with torch.random.fork_rng(devices=[]):
            computed = dict(self.network_class.from_config(config).named_buffers())
        for name, buffer in list(network.named_buffers()):
            if buffer.is_meta:
                module, _, last = name.rpartition(".")
                network.get_submodule(module).register_buffer(last, computed[name], persistent=False)

    def guided_from_file(self, file: Path, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        """The guidance-distilled network of this plain network's config, from the state dict that a file holds.

        Raises ValueError, with the file's name, for another network's weights, or those of one without embedding.
        """
        weights = read_weights(file, dtype)
        width = self.width_in(weights, config)
        if width <= 0:
            raise ValueError(
                f"{file} holds {len(weights)} weights and no guidance embedding in {self.guidance_weight}, so it is "
                f"not the state dict of a guidance-distilled {self.part}"
            )
        return self.from_weights(self.config_with_guidance(config, width), weights, file)


class Widened(Backbone):
    """One whose guidance embedding enters by a layer made wider for it: the class stays diffusers' own.

    A subclass sets `width_key`, what its config calls the layer's usual input; `guidance_weight` is that layer's, and
    `scale_weight` that of a norm before it.
    """

    width_key: ClassVar[str]
    scale_weight: ClassVar[str | None] = None

    def entering(self, network: nn.Module, w: Tensor) -> Tensor:
        """What the layer is given of w (B,) beside its usual input, (B, W)."""
        return guidance_embedding(w, dim=network.config[WIDTH]).to(self.weight(network).dtype)

    def guidance_width(self, network: nn.Module) -> int | None:
        """As its config says."""
        return network.config.get(WIDTH)

    def is_guided(self, config: Mapping[str, Any]) -> bool:
        """Whether the embedding is there, as in what stage 1 left."""
        return bool(config.get(WIDTH))

    def width_in(self, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> int:
        """By how much the layer is wider than in the plain network."""
        layer = weights.get(self.guidance_weight)
        return 0 if layer is None else layer.shape[1] - config[self.width_key]

    def config_with_guidance(self, config: dict[str, Any], width: int) -> dict[str, Any]:
        """With a wider layer."""
        return {**config, self.width_key: config[self.width_key] + width, WIDTH: width}

    def add_guidance_embedding(self, network: nn.Module, width: int = 512) -> nn.Module:
        """With columns of zeros beside those of the layer's usual input."""
        weights = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
        layer = weights[self.guidance_weight]
        weights[self.guidance_weight] = torch.cat([layer, layer.new_zeros(len(layer), width)], dim=1)
        if self.scale_weight:
            weights[self.scale_weight] = torch.cat([weights[self.scale_weight], layer.new_ones(width)])
        return self.with_weights(network, weights, **self.config_with_guidance(network.config, width))

    def fold_guidance_embedding(self, network: nn.Module, w: float) -> nn.Module:
        """A copy without guidance embedding that is what the network was at this w: w becomes part of a bias."""
        weights = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
        width, layer = network.config[WIDTH], weights[self.guidance_weight]
        told = self.entering(network, layer.new_full((1,), w))[0]
        if self.scale_weight:
            told = told * weights[self.scale_weight][-width:]
            weights[self.scale_weight] = weights[self.scale_weight][:-width].clone()
        weights[self.guidance_weight.replace("weight", "bias")] += layer[:, -width:] @ told
        weights[self.guidance_weight] = layer[:, :-width].contiguous()
        plain = network.config[self.width_key] - width
        return self.with_weights(network, weights, **{self.width_key: plain, WIDTH: None})


def check_patches(x: Tensor, side: int) -> None:
    """ValueError for latents (B, C, H, W) that are not whole patches with this side."""
    height, width = x.shape[2:]
    if height % side or width % side:
        raise ValueError(f"latents of {height} x {width}: this network takes sides that are multiples of {side}")


def text_side(
    source: Source, number: str, cls: type[nn.Module], dtype: torch.dtype, max_length: int | None = None
) -> TextSide:
    """The frozen text encoder of this class in `text_encoder{number}`, see `TextSide`."""
    encoder = source.network(f"text_encoder{number}", cls, dtype).requires_grad_(False).eval()
    tokenizer = source.tokenizer(f"tokenizer{number}", TOKENIZERS.get(cls, CLIPTokenizer))
    return TextSide(tokenizer, encoder, max_length)
