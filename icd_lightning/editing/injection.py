"""What edits by a transformer borrow: keys and values of the source, in joint attention of prompt and picture.

The protocol is Prompt-to-Prompt's (see there): source and target are decoded side by side, as last rows of a batch.
In chosen blocks and steps the target's tokens have the keys and values of the source's, at the same places, and so
attend to the source's picture (as MasaCtrl does in a UNet, arXiv:2304.08465) or take over its content (values alone, as
RF-Solver-Edit does, arXiv:2411.04746). A local blend looks at the attention of the picture's tokens to those of the
changed words, in blocks that have text in a stream of its own.

Shapes: R rows, S tokens of prompt and picture, N of the picture, L of the prompt, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil, isqrt
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from icd_lightning.editing.limits import Control, Injection, PromptToPrompt
from icd_lightning.editing.prompt_to_prompt.attention import Changes, StandIn, attention_layers, free_rows
from icd_lightning.editing.prompt_to_prompt.control import AttentionControl, PromptToPromptControl


class Tokens(NamedTuple):
    """Where in a joint sequence the picture's tokens are, and the prompt's."""

    picture: slice
    text: slice


Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""The keys and values (R, heads, S, d) to attend to, of queries, keys and values (R, heads, S, d)."""


def joint_layers(network: nn.Module) -> list[str]:
    """The names of a network's attention layers, from first to last; none if text and picture attend apart."""
    names = attention_layers(network)
    joint = any(getattr(network.get_submodule(name), "add_k_proj", None) is not None for name in names)
    return names if joint else []


def usual_control(network: nn.Module) -> Control:
    return Injection() if joint_layers(network) else PromptToPrompt()


def attention_control(settings: Control | Sequence[Control], *edits: Any, **options: Any) -> AttentionControl:
    one = settings if isinstance(settings, Control) else settings[0]
    return (InjectionControl if isinstance(one, Injection) else PromptToPromptControl)(settings, *edits, **options)


class JointAttention(StandIn):
    """Of a transformer: `original` runs as it is, but for the keys and values that it attends to.

    change(text) returns a `Change` or None; text counts the prompt's tokens, None where a layer is given none.
    """

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kw: Any
    ) -> Any:
        change = self.change(None if encoder_hidden_states is None else encoder_hidden_states.shape[1])
        if change is None:
            return self.original(attn, hidden_states, encoder_hidden_states, *args, **kw)
        with _Attending(change) as attending:
            result = self.original(attn, hidden_states, encoder_hidden_states, *args, **kw)
        if not attending.done:
            raise ValueError(
                "attention cannot be borrowed from this attention backend: choose torch's own, "
                "set_attention_backend('native')"
            )
        return result


class _Attending(TorchFunctionMode):
    """Where torch is asked to attend, attends to what `change` returns."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change, self.done = change, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        kwargs |= dict(zip(("query", "key", "value"), args, strict=False))
        kwargs["key"], kwargs["value"] = self.change(kwargs["query"], kwargs["key"], kwargs["value"])
        self.done = True
        return func(*args[3:], **kwargs)


class InjectionControl(AttentionControl):
    """The targets have their sources' keys and values, or values, in chosen blocks and the first steps."""

    stand_in = JointAttention
    _text = 0

    def changes(self, network: nn.Module) -> Changes:
        layers = joint_layers(network)
        if not layers or any(getattr(network.get_submodule(name), "fused_projections", False) for name in layers):
            raise ValueError(
                f"keys and values are borrowed in joint attention with projections of its own (FLUX, SD3), which "
                f"{type(network).__name__} has not: borrow by PromptToPrompt on a UNet, else swap the prompt (icd_swap)"
            )
        chosen: list[list[int]] = [[] for _ in layers]
        for edit, pair in enumerate(self.pairs):
            first, last = pair.settings.blocks_from * len(layers), pair.settings.blocks_to * len(layers)
            for index in range(int(first), ceil(last)):
                chosen[index].append(edit)
        # Diffusers' first class for joint attention, SD3's, puts the prompt last; all later ones put it first
        last_text = [isinstance(network.get_submodule(name), Attention) for name in layers]
        return {
            f"{name}.processor": partial(self._change, name, edits, last)
            for name, edits, last in zip(layers, chosen, last_text, strict=True)
        }

    def _change(self, name: str, edits: Sequence[int], text_last: bool, text: int | None) -> Change | None:
        self._note(name)
        if text is not None:
            self._text = text
        count = 0 if text_last and text is None else self._text  # single blocks of FLUX.1 hold the prompt's, too
        tokens = (
            Tokens(slice(None, -count or None), slice(-count, None))
            if text_last
            else Tokens(slice(count, None), slice(count))
        )
        borrowing = [i for i in edits if self._step < int(self.pairs[i].settings.inject * self.num_steps)]
        looks = self.blend.any and text is not None
        return partial(self._attended, tokens, borrowing, looks) if borrowing or looks else None

    def _attended(
        self, tokens: Tokens, borrowing: Sequence[int], looks: bool, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        free, count = free_rows(query, 2 * len(self.pairs)), len(self.pairs)
        if borrowing:
            key, value = key.clone(), value.clone()
        for i in borrowing:
            settings = self.pairs[i].settings
            places = slice(None) if settings.text else tokens.picture
            for x in (key, value) if settings.keys else (value,):
                x[free + count + i, :, places] = x[free + i, :, places]
        if looks:
            self._look(query[free:, :, tokens.picture], key[free:], tokens.text)
        return key, value

    def _look(self, query: Tensor, key: Tensor, text: slice) -> None:
        """Show the blend the attention of the picture's queries (2 P, heads, N, d), a head at a time: it is large."""
        scale = isqrt(self.size[0] * self.size[1] // query.shape[2])  # patches of so many latents, squared
        grid = (self.size[0] // scale, self.size[1] // scale)
        for own, others in zip(query.unbind(1), key.unbind(1), strict=True):
            seen = (own @ others.mT * own.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32)[..., text]
            self.blend.observe(pad(seen, (0, self.length - seen.shape[-1]))[:, None], grid)
