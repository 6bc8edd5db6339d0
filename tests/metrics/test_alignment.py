"""CLIP's metrics on a CLIP of random weights, beside transformers' and torchmetrics'."""

import pytest
import torch
from metrics_case import scenes
from torchmetrics.multimodal import CLIPScore as TorchmetricsCLIPScore
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from icd_lightning.data.images import to_pictures
from icd_lightning.metrics.alignment import CLIPScore, CLIPText, ImageCosine
from icd_lightning.metrics.reconstruction import Within
from icd_lightning.models.text import build_tokenizer
from icd_lightning.tiny.scenes import vocabulary


@pytest.fixture
def clip_home(metrics_home):
    """A CLIP of random weights, under a name that only this folder gives it."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(vocabulary(), 24)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "eos_token_id": tokenizer.eos_token_id}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config={**sizes, **words}, vision_config=vision, projection_dim=8)
    folder = metrics_home / "clip-vit-large-patch14"
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**crop).save_pretrained(folder)
    return folder


def embeddings(metric, images, prompts):
    """One at a time, through the whole model."""
    for image, prompt in zip(images, prompts, strict=True):
        pixels = metric.processor(images=[to_pictures(image[None])[0]], return_tensors="pt")
        tokens = metric.tokenizer([prompt], return_tensors="pt")
        output = metric.network(**pixels, **tokens)
        yield output.image_embeds[0], output.text_embeds[0]


def test_clip_t_and_clip_i_are_plain_cosines(clip_home):
    drawn, images = scenes(3)
    prompts = [scene.caption() for scene in drawn]  # of different lengths
    expected = [torch.dot(*pair) for pair in embeddings(CLIPText(), images, prompts)]  # embeddings are of unit length
    torch.testing.assert_close(CLIPText().per_image(images, prompts=prompts), torch.stack(expected))
    pairs = zip(*(embeddings(CLIPText(), x, prompts) for x in (images, images.flip(0))), strict=True)
    expected = torch.stack([torch.dot(a[0], b[0]) for a, b in pairs])
    torch.testing.assert_close(ImageCosine().per_image(images, images.flip(0)), expected)
    torch.testing.assert_close(ImageCosine().per_image(images, images), torch.ones(3))


class OlderCLIP(CLIPModel):
    """Features as transformers 4 returned them, which torchmetrics 1.9 wants."""

    def get_image_features(self, *args, **options):
        return super().get_image_features(*args, **options).pooler_output

    def get_text_features(self, *args, **options):
        return super().get_text_features(*args, **options).pooler_output


def test_clip_score_is_torchmetrics_as_piebench_calls_it(clip_home):
    """A picture at a time: its cosine times 100, 0 where that is negative."""
    drawn, images = scenes(12)
    prompts = [scene.caption() for scene in drawn]
    network = OlderCLIP.from_pretrained(clip_home)
    by_pillow = AutoImageProcessor.from_pretrained(clip_home, backend="pil")  # transformers 4 knew no other
    processor = CLIPProcessor(by_pillow, AutoTokenizer.from_pretrained(clip_home))
    theirs = TorchmetricsCLIPScore(lambda: (network, processor))
    pictures = torch.from_numpy(to_pictures(images)).permute(0, 3, 1, 2)
    expected = torch.stack([theirs(*pair) for pair in zip(pictures, prompts, strict=True)])
    torch.testing.assert_close(CLIPScore().per_image(images, prompts=prompts), expected, rtol=1e-5, atol=1e-5)
    assert (expected == 0).any()
    assert (expected > 0).any()


def test_clip_score_inside_the_mask_sees_the_rest_black(clip_home):
    drawn, images = scenes(2)
    prompts = [scene.caption() for scene in drawn]
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, :, :, 20:] = 1
    blackened = torch.where(masks[:1].bool(), images[:1], -1.0)
    score = Within(CLIPScore(), edited=True).per_image(images, prompts=prompts, masks=masks)
    torch.testing.assert_close(score[:1], CLIPScore().per_image(blackened, prompts=prompts[:1]))
    assert score[1].isnan()  # nothing to be edited


def test_long_prompts_and_other_shapes_are_cut(clip_home):
    images = scenes(1)[1]
    long = " ".join(["red"] * 100)
    assert CLIPText().per_image(images, prompts=[long]).isfinite().all()
    wide = torch.cat([images.flip(3)[..., 32:], images, images.flip(3)[..., :32]], dim=3)  # mirrored at its sides
    scores = [CLIPText().per_image(x, prompts=["a red star"]) for x in (wide, images)]
    torch.testing.assert_close(*scores, rtol=0, atol=0.01)


def test_pictures_that_are_not_finite_have_no_cosine(clip_home):
    images = scenes(2)[1].clone()
    images[1, 0, 0, 0] = torch.nan
    assert ImageCosine().per_image(images, images).isnan().tolist() == [False, True]


def test_metrics_of_one_process_share_the_network(clip_home):
    first, second = CLIPText(), ImageCosine()
    assert first.network is second.network
