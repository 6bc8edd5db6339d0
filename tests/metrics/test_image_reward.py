"""ImageReward's arithmetic, written out from its checkpoint's tensors, beside the network built on transformers."""

import math

import pytest
import torch
from metrics_case import noisy
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, softmax
from transformers import BertTokenizer

from icd_lightning.data.images import to_pictures
from icd_lightning.metrics.image_reward import HEAD, ImageReward

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LAYERS, HEADS, SEEN, READ, WORDS = 2, 2, 24, 16, 12
VISION = {"hidden_size": SEEN, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
VISION |= {"image_size": 32, "patch_size": 16, "layer_norm_eps": 1e-6}
TEXT = {"hidden_size": READ, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
TEXT |= {"encoder_hidden_size": SEEN, "vocab_size": WORDS, "max_position_embeddings": 40}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A checkpoint of ImageReward's names, small and random."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}

    def layer(name: str, *shape: int) -> None:
        made[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        made[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)

    def norm(name: str, width: int) -> None:
        made[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        made[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

    eye, text = "blip.visual_encoder", "blip.text_encoder"
    made[f"{eye}.cls_token"] = torch.randn(1, 1, SEEN, generator=generator)
    made[f"{eye}.pos_embed"] = torch.randn(1, 5, SEEN, generator=generator)
    layer(f"{eye}.patch_embed.proj", SEEN, 3, 16, 16)
    norm(f"{eye}.norm", SEEN)
    made[f"{text}.embeddings.word_embeddings.weight"] = torch.randn(WORDS, READ, generator=generator)
    made[f"{text}.embeddings.position_embeddings.weight"] = torch.randn(40, READ, generator=generator)
    made[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    norm(f"{text}.embeddings.LayerNorm", READ)
    for i in range(LAYERS):
        block = f"{eye}.blocks.{i}"
        for name, shape in (("attn.qkv", (3 * SEEN, SEEN)), ("attn.proj", (SEEN, SEEN))):
            layer(f"{block}.{name}", *shape)
        layer(f"{block}.mlp.fc1", 48, SEEN)
        layer(f"{block}.mlp.fc2", SEEN, 48)
        for name in ("norm1", "norm2"):
            norm(f"{block}.{name}", SEEN)
        block = f"{text}.encoder.layer.{i}"
        for attention, source in (("attention", READ), ("crossattention", SEEN)):
            for name, width in (("query", READ), ("key", source), ("value", source)):
                layer(f"{block}.{attention}.self.{name}", READ, width)
            layer(f"{block}.{attention}.output.dense", READ, READ)
            norm(f"{block}.{attention}.output.LayerNorm", READ)
        layer(f"{block}.intermediate.dense", 32, READ)
        layer(f"{block}.output.dense", READ, 32)
        norm(f"{block}.output.LayerNorm", READ)
    layer("blip.vision_proj", 8, SEEN)
    layer("blip.text_proj", 8, READ)
    for index, pair in zip((0, 2, 4, 6, 7), zip((READ, *HEAD), HEAD, strict=False), strict=True):
        layer(f"mlp.layers.{index}", pair[1], pair[0])
    return made


@pytest.fixture(scope="module")
def metric(weights) -> ImageReward:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ring", "large", "##s", "on", "white"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    return ImageReward(weights, tokenizer, vision=VISION, text=TEXT)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(N, D) queries over (M, D) keys and values, in HEADS heads."""
    parts = []
    for a, b, c in zip(*(x.chunk(HEADS, -1) for x in (q, k, v)), strict=True):
        parts.append(softmax(a @ b.T / math.sqrt(a.shape[-1]), -1) @ c)
    return torch.cat(parts, -1)


def reward(weights: dict[str, Tensor], picture, tokens: list[int]) -> Tensor:
    """Of one picture uint8 (32, 32, 3) and its tokens, without padding."""

    def apply(name: str, x: Tensor) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    eye, text = "blip.visual_encoder", "blip.text_encoder"
    pixels = (torch.from_numpy(picture) / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    proj = (weights[f"{eye}.patch_embed.proj.{part}"] for part in ("weight", "bias"))
    patches = conv2d(pixels.permute(2, 0, 1)[None], *proj, stride=16).flatten(2)[0].T
    x = torch.cat([weights[f"{eye}.cls_token"][0], patches]) + weights[f"{eye}.pos_embed"][0]
    for i in range(LAYERS):
        block = f"{eye}.blocks.{i}"
        q, k, v = apply(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + apply(f"{block}.attn.proj", attend(q, k, v))
        x = x + apply(f"{block}.mlp.fc2", gelu(apply(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{eye}.norm", x, 1e-6)
    words = weights[f"{text}.embeddings.word_embeddings.weight"][tokens]
    x = words + weights[f"{text}.embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(f"{text}.embeddings.LayerNorm", x, 1e-12)
    for i in range(LAYERS):
        block = f"{text}.encoder.layer.{i}"
        for attention, source in ((f"{block}.attention", None), (f"{block}.crossattention", seen)):
            source = x if source is None else source
            q, k, v = (
                apply(f"{attention}.self.{name}", y) for name, y in (("query", x), ("key", source), ("value", source))
            )
            x = norm(f"{attention}.output.LayerNorm", x + apply(f"{attention}.output.dense", attend(q, k, v)), 1e-12)
        y = apply(f"{block}.output.dense", gelu(apply(f"{block}.intermediate.dense", x)))
        x = norm(f"{block}.output.LayerNorm", x + y, 1e-12)
    y = x[0]
    for index in (0, 2, 4, 6, 7):
        y = apply(f"mlp.layers.{index}", y)
    return (y[0] - 0.16717362830052426) / 1.0333394966054072


def test_it_is_the_arithmetic_of_its_checkpoint(weights, metric):
    images = noisy(2, size=(32, 32))[0]
    prompts, tokens = ["a red ring", "large rings on a white"], [[2, 5, 6, 7, 3], [2, 8, 7, 9, 10, 5, 11, 3]]
    found = metric.per_image(images, prompts=prompts)
    expected = [reward(weights, *pair) for pair in zip(to_pictures(images), tokens, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert found[0] != found[1]
    metric.update(images, prompts=prompts)
    torch.testing.assert_close(metric.compute(), found.mean())


def test_other_shapes_are_cut_and_long_prompts_too(metric):
    square = noisy(1, size=(32, 32))[0]
    wide = torch.cat([-torch.ones(1, 3, 32, 8), square, -torch.ones(1, 3, 32, 8)], dim=3)
    scores = [metric.per_image(x, prompts=["a red ring " * 30]) for x in (square, wide)]
    torch.testing.assert_close(*scores)


def test_a_checkpoint_that_does_not_fit_is_refused(weights, metric):
    without = {name: value for name, value in weights.items() if "blocks.1.norm2" not in name}
    with pytest.raises(RuntimeError, match=r"layers\.1\.layer_norm2"):
        ImageReward(without, metric.tokenizer, vision=VISION, text=TEXT)
