import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from family_case import BOUNDARIES, TEXT_ENCODER, UNET
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import icd_lightning
from icd_lightning.data.images import to_images
from icd_lightning.diffusion import Boundaries, Flow, IntervalGuidance, StepGuidance
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.editing.defaults import suitable_tau
from icd_lightning.editing.method import seeded_noise
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt
from icd_lightning.models.family import Family
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents

SOURCES = ["a large red circle", "a small blue square", "a green ring on a plain white background", "a star"]
TARGETS = ["a large blue circle", "a small blue star", "a red ring on a plain white background", "a yellow star"]
CONTROL = PromptToPrompt(cross_replace=0.5, self_replace=0.5, blend_threshold=0.6)
CONTROLS = pytest.mark.parametrize("control", [None, CONTROL], ids=["swap", "attention"])


def loaded(family: Path, **options) -> InvertibleConsistencyPipeline:
    pipe = InvertibleConsistencyPipeline.from_pretrained(str(family), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(random_family: Path) -> InvertibleConsistencyPipeline:
    return loaded(random_family)


@pytest.fixture
def own_pipe(pipe) -> InvertibleConsistencyPipeline:
    """Another one, to be changed."""
    return loaded(pipe.config._name_or_path)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """(4, 3, 64, 64) in [0, 1], of values that 8 bits hold."""
    return torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0)) / 255


@pytest.fixture(scope="module")
def noise(pipe, images) -> Tensor:
    return pipe.invert(images, SOURCES)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def edited(pipe, images, sources=SOURCES, targets=TARGETS, **options) -> Tensor:
    return pipe.edit(images, sources, targets, output_type="pt", **options).images


def batches(unet, act: Callable) -> list[int]:
    """Batch sizes of all evaluations of a UNet."""
    sizes: list[int] = []
    hook = unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    act()
    hook.remove()
    return sizes


# What it gives


@CONTROLS
def test_a_batch_equals_its_samples_alone(pipe, images, control):
    together = edited(pipe, images, control=control)
    for i in (0, 3):
        close(edited(pipe, images[i : i + 1], SOURCES[i], TARGETS[i], control=control), together[i : i + 1])


def test_it_gives_what_the_method_and_prompt_to_prompt_give(pipe, random_family, images, noise):
    method = InvertibleConsistency.from_pretrained(Family(str(random_family)))
    guidance, seeds = StepGuidance(3.0, 0.8), [0] * 4
    inverted = method.invert(images * 2 - 1, SOURCES, seed=seeds)
    torch.testing.assert_close(noise, inverted, rtol=0, atol=0)
    swapped = method.edit(None, SOURCES, TARGETS, noise=inverted, guidance=guidance, swap_tau=0.8)
    close(edited(pipe, images) * 2 - 1, swapped)
    borrowed = method.decode_pairs(inverted, SOURCES, TARGETS, guidance=guidance, control=CONTROL)[4:]
    close(edited(pipe, images, control=CONTROL) * 2 - 1, method.autoencoder.decode(borrowed))
    back = pipe.reconstruct(images, SOURCES, output_type="pt").images
    close(back * 2 - 1, method.generate(SOURCES, inverted))
    drawn = seeded_noise(method.latent_shape(4, 64, 64), 5)
    made = pipe(SOURCES, seed=5, output_type="pt").images
    close(made * 2 - 1, method.generate(SOURCES, drawn, guidance=guidance))


def test_every_evaluation_is_counted_and_none_is_wasted(pipe, images, noise):
    assert batches(pipe.unet, lambda: pipe.invert(images, SOURCES)) == [4] * 4
    assert pipe.nfe == 4
    assert batches(pipe.unet, lambda: edited(pipe, images)) == [4] * 8
    assert pipe.nfe == 8
    assert batches(pipe.unet, lambda: edited(pipe, images, control=CONTROL)) == [4] * 4 + [8] * 4
    assert pipe.nfe == 12
    assert batches(pipe.unet, lambda: edited(pipe, None, latents=noise)) == [4] * 4
    assert pipe.nfe == 4
    assert batches(pipe.unet, lambda: edited(pipe, images[:1], SOURCES[0], TARGETS[:3])) == [1] * 4 + [3] * 4
    assert pipe.nfe == 8


def test_an_edit_goes_on_from_noise_that_was_inverted_before(pipe, images, noise):
    torch.testing.assert_close(edited(pipe, None, latents=noise), edited(pipe, images), rtol=0, atol=0)


def test_one_picture_with_several_prompts(pipe, images):
    several = edited(pipe, images[:1], SOURCES[0], TARGETS[:2])
    for i in range(2):
        close(edited(pipe, images[:1], SOURCES[0], TARGETS[i]), several[i : i + 1])


def test_settings_matter_and_defaults_are_the_family_s(pipe, images, noise):
    usual = edited(pipe, None, latents=noise)
    same = edited(pipe, None, latents=noise, guidance_scale=3.0, tau=0.8, swap_tau=0.8)
    assert torch.equal(usual, same)
    assert torch.equal(usual, edited(pipe, None, latents=noise, guidance=StepGuidance(3.0, 0.8)))
    others = (
        {"guidance_scale": 6.0},
        {"tau": 0.5},
        {"swap_tau": 0.4},
        {"guidance": IntervalGuidance(6.0, lo=0.5, hi=1.0)},
    )
    for other in others:
        assert not torch.allclose(usual, edited(pipe, None, latents=noise, **other))


def test_an_edit_by_attention_control_can_be_the_default(own_pipe, images):
    usual = edited(own_pipe, images)
    own_pipe.register_to_config(attention_control=True, edit_guidance_scale=6.0)
    assert torch.equal(edited(own_pipe, images), edited(own_pipe, images, control=PromptToPrompt(), guidance_scale=6.0))
    assert torch.equal(edited(own_pipe, images, control=None), usual)
    assert torch.equal(edited(own_pipe, images, swap_tau=0.8), usual)  # asks for a swap


# Seeds


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_pictures_are_reproducible_alone_and_in_a_batch(pipe):
    for together, alone in (
        ({"generator": generators(7, 8)}, {"generator": generators(8)}),
        ({"seed": [7, 8]}, {"seed": 8}),
    ):
        both = pipe(SOURCES[:2], output_type="pt", **together).images
        close(pipe(SOURCES[1], output_type="pt", **alone).images, both[1:])
    by_number = pipe(SOURCES[:2], seed=7, output_type="pt").images
    assert torch.equal(by_number, pipe(SOURCES[:2], seed=[7, 8], output_type="pt").images)
    first, again = (pipe(SOURCES[:2], generator=generators(3)[0], output_type="pt").images for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, by_number)


def test_inversion_starts_from_one_seed_for_all_or_one_for_each(pipe, images):
    noise = pipe.invert(images[:2], SOURCES[:2], seed=[3, 4])
    close(pipe.invert(images[1:2], SOURCES[1], seed=4), noise[1:])
    close(pipe.invert(images[1:2], SOURCES[1], generator=generators(4)[0]), noise[1:])
    state = torch.get_rng_state()
    assert torch.equal(pipe.invert(images, SOURCES), pipe.invert(images, SOURCES, seed=0))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(pipe.invert(images[:1], SOURCES[0], seed=1), pipe.invert(images[:1], SOURCES[0]))


# Pictures in and out


def test_pictures_come_out_in_every_form(pipe):
    made = {kind: pipe(SOURCES[:2], seed=0, output_type=kind).images for kind in ("pil", "np", "pt", "latent")}
    unit = made["pt"]
    assert made["latent"].shape == (2, 16, 8, 8)
    close(pipe.method.autoencoder.decode(made["latent"]) / 2 + 0.5, unit)
    np.testing.assert_allclose(made["np"], unit.permute(0, 2, 3, 1).numpy())
    for picture, image in zip(made["pil"], unit, strict=True):
        close(to_images([np.asarray(picture)])[0] / 2 + 0.5, (image * 255).round() / 255)
    assert len(pipe(SOURCES[0], num_images_per_prompt=3, seed=0).images) == 3


def test_pictures_go_in_in_every_form(pipe, images, tmp_path):
    expected = pipe.invert(images[:1], SOURCES[0])
    array = (images[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    picture, path = Image.fromarray(array), tmp_path / "a.png"
    picture.save(path)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    clear = picture.convert("RGBA")
    for one in (
        path,
        str(path),
        picture,
        array,
        array[None],
        clear,
        [picture],
        images[0],
        images[0].permute(1, 2, 0).numpy(),
    ):
        close(pipe.invert(one, SOURCES[0]), expected)
    close(pipe.invert(tmp_path / "turned.png", SOURCES[0]), expected)
    several = pipe.invert([path, picture], SOURCES[0])
    close(several, expected.repeat(2, 1, 1, 1))
    clear.putalpha(0)
    white = pipe.invert(Image.new("L", (64, 64), 255), SOURCES[0])
    close(pipe.invert(clear, SOURCES[0]), white)
    deep = Image.fromarray(np.full((64, 64), 65535, dtype=np.uint16))
    assert deep.mode == "I;16"
    close(pipe.invert(deep, SOURCES[0]), white)
    close(pipe.invert(Image.new("RGB", (1, 1), "white"), SOURCES[0]), white)


def test_any_size_that_the_autoencoder_takes(pipe):
    wide = Image.new("RGB", (300, 200), "red")
    for height, width in ((64, 96), (72, 64), (8, 128)):
        noise = pipe.invert(wide, "a", height=height, width=width)
        assert noise.shape == (1, 16, height // 8, width // 8)
        assert pipe.edit(wide, "a", "b", height=height, width=width).images[0].size == (width, height)
    assert pipe("a", height=64, width=96).images[0].size == (96, 64)
    for control in (None, CONTROL):
        assert pipe.edit(wide, SOURCES[0], TARGETS[0], height=64, width=96, control=control).images[0].size == (96, 64)


# As a pipeline of diffusers


def test_parts_can_be_shared(pipe, images):
    assert isinstance(pipe, DiffusionPipeline)
    parts = {"vae", "text_encoder", "tokenizer", "unet", "scheduler"}
    assert {name for name, part in pipe.components.items() if part is not None} == parts
    for other in (
        InvertibleConsistencyPipeline(**pipe.components, **pipe.parameters),
        InvertibleConsistencyPipeline.from_pipe(pipe),
    ):
        other.set_progress_bar_config(disable=True)
        assert other.students is pipe.students
        assert torch.equal(edited(other, images), edited(pipe, images))
    three = {**pipe.parameters, "boundaries": [0, 339, 699, 999]}
    assert (
        batches(pipe.unet, lambda: InvertibleConsistencyPipeline(**pipe.components, **three).invert(images, SOURCES))
        == [4] * 3
    )


def test_a_bare_unet_gets_students_that_begin_as_itself(pipe, random_family, images):
    unet = Family(str(random_family)).load_model(guided=True).network
    new = InvertibleConsistencyPipeline(**{**pipe.components, "unet": unet}, **pipe.parameters)
    new.set_progress_bar_config(disable=True)
    assert new.students is not pipe.students
    assert not torch.allclose(edited(new, images), edited(pipe, images))
    plain = InvertibleConsistency(new.students, new.method.autoencoder, new.method.conditioner, new.boundaries)
    x, t = torch.zeros(1, 16, 8, 8), torch.tensor([999])
    eps = plain.denoiser(["a"], StepGuidance(3.0))(x, t).eps
    teacher = new.students.denoiser("teacher", new.method.conditioner(["a"]), StepGuidance(3.0))
    assert torch.equal(eps, teacher(x, t).eps)


def test_what_is_saved_loads_again(pipe, random_family, images, tmp_path):
    folder = tmp_path / "saved"
    for _ in range(2):  # the second time over the first
        pipe.save_pretrained(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert {path.name for path in folder.iterdir()} == {
        *("vae", "text_encoder", "tokenizer", "scheduler", "unet", "unet_guided", "students"),
        *("icd.json", "model_index.json"),
    }
    again = loaded(folder)
    assert torch.equal(edited(again, images), edited(pipe, images))
    names = ("boundaries", "guidance_scale", "tau", "edit_guidance_scale", "attention_control", "closed_vocabulary")
    assert all(again.config[name] == pipe.config[name] for name in names)
    name = "unet_guided/diffusion_pytorch_model.safetensors"
    saved, original = load_file(folder / name), load_file(random_family / name)
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)
    below = InvertibleConsistency.from_pretrained(Family(str(folder)))
    assert below.boundaries.boundary_timesteps == tuple(BOUNDARIES)
    assert Family(str(folder)).load_defaults() == Family(str(random_family)).load_defaults()


def test_a_save_that_fails_leaves_nothing(pipe, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(pipe, "save_config", fail)
    with pytest.raises(OSError, match="disk full"):
        pipe.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="that is a file"):
        pipe.save_pretrained(tmp_path / "file")


def test_the_shipped_family_is_the_default():
    assert icd_lightning.InvertibleConsistencyPipeline is InvertibleConsistencyPipeline
    pipe = InvertibleConsistencyPipeline.from_pretrained()
    assert (pipe.config.guidance_scale, pipe.config.tau, pipe.config.attention_control) == (3.0, 0.8, False)
    assert pipe.resolution == 64
    assert pipe.unknown_words("a Red star", "a red dog") == ["dog"]
    assert pipe.boundaries.num_segments == 4


def test_students_of_the_released_formats(pipe, random_family, images, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(random_family, model, ignore=shutil.ignore_patterns("unet_guided", "students", "icd.json"))
    torch.save(Family(str(random_family)).load_model(guided=True).network.state_dict(), tmp_path / "cfg_distill.pt")
    paths = {"forward": "iCD-SD15-forward_19_259_519_779", "reverse": "iCD-SD15-reverse_259_519_779_999"}
    paths = {name: str(tmp_path / f"{stem}.safetensors") for name, stem in paths.items()}
    for direction, path in paths.items():
        weights = pipe.students.file(direction, {}).weights
        save_file({f"unet.base_model.model.{name}": weight for name, weight in weights.items()}, path)
    released = loaded(model, guided_unet=str(tmp_path / "cfg_distill.pt"), **paths)
    assert released.boundaries == dataclasses.replace(pipe.boundaries)
    assert (released.config.guidance_scale, released.config.edit_guidance_scale, released.config.tau) == (
        8.0,
        20.0,
        0.8,
    )
    assert released.config.attention_control  # the paper's way with SD1.5
    options = {"control": None, "guidance_scale": 3.0}
    assert torch.equal(edited(released, images, **options), edited(pipe, images, **options))


@pytest.mark.parametrize(
    ("ends", "tau"),
    [("259,519,779,999", 0.8), ("249,499,699,999", 0.7), ("339,679,999", 0.7), ("499,999", 0.5), ("999", 1)],
)
def test_tau_guides_all_steps_but_the_first(ends, tau):
    assert suitable_tau(Boundaries.parse(ends, allow_off_grid=True)) == tau


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(random_family, images, dtype):
    half = loaded(random_family, torch_dtype=dtype)
    assert half.dtype == half.unet.dtype == half.vae.dtype == dtype
    noise = half.invert(images[:1], SOURCES[0])
    result = edited(half, None, SOURCES[:1], TARGETS[:1], latents=noise, control=CONTROL)
    assert noise.dtype == result.dtype == torch.float32
    assert result.isfinite().all()


def test_a_pipeline_can_be_cast(own_pipe, images):
    expected = edited(own_pipe, images)
    own_pipe.to(torch.bfloat16)
    assert next(own_pipe.unet.parameters()).dtype == torch.bfloat16
    assert own_pipe.students.process.alphas.dtype == torch.float32
    assert (edited(own_pipe, images) - expected).abs().mean() < 0.05


def test_offloading_gives_the_same_pictures(own_pipe, images):
    expected = edited(own_pipe, images)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="requires accelerator"):
            own_pipe.enable_model_cpu_offload()
    own_pipe.enable_model_cpu_offload(device="cpu")
    assert all(hasattr(part, "_hf_hook") for part in (own_pipe.vae, own_pipe.text_encoder, own_pipe.unet))
    for _ in range(2):
        assert torch.equal(edited(own_pipe, images), expected)
    own_pipe.remove_all_hooks()


def test_a_callback_follows_every_step_and_may_change_latents(pipe, images, noise):
    seen = []

    def look(caller, index, t, kwargs):
        assert caller is pipe
        seen.append((index, t, tuple(kwargs["latents"].shape)))

    plain = edited(pipe, images, callback_on_step_end=look)
    times = [19, 259, 519, 779, 999, 779, 519, 259]
    assert seen == [(index, t, (4, 16, 8, 8)) for index, t in enumerate(times)]
    assert torch.equal(plain, edited(pipe, images))
    restart = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(9))
    changed = edited(
        pipe, images, callback_on_step_end=lambda p, i, t, kwargs: {"latents": restart} if i == 3 else kwargs
    )
    assert torch.equal(changed, edited(pipe, None, latents=restart))


def test_a_progress_bar_counts_the_steps(pipe, images, capsys):
    pipe.set_progress_bar_config()
    edited(pipe, images)
    pipe.set_progress_bar_config(disable=True)
    assert "8/8" in capsys.readouterr().err


def test_nothing_is_left_behind(pipe, images):
    processors = dict(pipe.unet.attn_processors)
    result = edited(pipe, images.clone().requires_grad_(), control=CONTROL)
    assert not result.requires_grad
    assert pipe.students.active == "teacher"
    assert pipe.unet.attn_processors == processors


def test_two_text_encoders_and_the_size_of_the_pictures(pipe, tmp_path):
    """As in SDXL: embeddings side by side, pooled ones, and sizes that the network is told of."""
    torch.manual_seed(0)
    config = CLIPTextConfig(**{**pipe.text_encoder.config.to_dict(), **TEXT_ENCODER})
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    added |= {"projection_class_embeddings_input_dim": 16 + 6 * 8, "time_cond_proj_dim": 32}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    two = InvertibleConsistencyPipeline(
        **{
            **pipe.components,
            "vae": AutoencoderKL(latent_channels=16, block_out_channels=[8] * 4, norm_num_groups=8, **blocks),
            "unet": UNet2DConditionModel.from_config({**UNET, "cross_attention_dim": 32, **added}),
            "text_encoder_2": CLIPTextModelWithProjection(config),
            "tokenizer_2": pipe.tokenizer,
        }
    )
    two.set_progress_bar_config(disable=True)
    told = []
    two.unet.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"].tolist()), with_kwargs=True
    )
    two.edit(Image.new("RGB", (96, 64)), SOURCES[0], TARGETS[0], height=64, width=96)
    assert told == [[[64, 96, 0, 0, 64, 96]]] * 8
    two.save_pretrained(tmp_path / "two")
    again, picture = loaded(tmp_path / "two"), Image.new("RGB", (64, 64), "red")
    noises = (pipe.invert(picture, SOURCES[0]) for pipe in (again, two))
    torch.testing.assert_close(*noises, rtol=0, atol=1e-5)  # weights of a file lie elsewhere, which moves rounding


# Mistakes


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda p, x: p(SOURCES, guidance_scale=0.5), "guidance_scale 0.5 must be 1"),
        (lambda p, x: p(SOURCES, guidance_scale=float("nan")), "guidance_scale nan must be 1"),
        (lambda p, x: p(SOURCES, tau=1.5), "tau 1.5 is no fraction"),
        (lambda p, x: p(SOURCES, tau=0.5, guidance=StepGuidance(2.0)), "leave out guidance_scale and tau"),
        (lambda p, x: p([]), r"prompt \[\] must be text"),
        (lambda p, x: p([1]), r"prompt \[1\] must be text"),
        (lambda p, x: p("a", output_type="jpg"), "output_type 'jpg' is none of pil"),
        (lambda p, x: p("a", height=60), "height 60 must be a multiple of 8, for example 64"),
        (lambda p, x: p("a", width=0), "width 0 must be a multiple of 8, for example 8"),
        (lambda p, x: p("a", seed=1, generator=generators(1)[0]), "give one of them"),
        (lambda p, x: p("a", generator=generators(1, 2)), "2 generators for 1 pictures"),
        (lambda p, x: p("a", seed=[1, 2]), "2 seeds for 1 samples"),
        (lambda p, x: p("a", latents=torch.zeros(1, 4, 8, 8)), r"shape \(1, 4, 8, 8\); this model's are \(B, 16"),
        (lambda p, x: p(["a", "b"], latents=torch.zeros(3, 16, 8, 8)), "2 of prompt, 3 of latents do not go together"),
        (lambda p, x: p.invert(x, SOURCES[:2]), "4 of image, 2 of prompt do not go together"),
        (lambda p, x: p.invert(x * 2 - 1, SOURCES), r"images lie between -1 and 1: bring them to \[0, 1\]"),
        (lambda p, x: p.invert(x[..., :56], SOURCES), "images are 3 x 64 x 56, not 3 x 64 x 64"),
        (lambda p, x: p.invert([], "a"), "there is no picture"),
        (lambda p, x: p.invert(None, "a"), "NoneType is no picture"),
        (lambda p, x: p.invert(np.zeros((64, 64, 3), np.int64), "a"), "an array of int64 is no picture"),
        (lambda p, x: p.invert("none.png", "a"), "there is no picture at none.png"),
        (lambda p, x: p.edit(None, "a", "b"), "give either an image to edit, or latents"),
        (lambda p, x: p.edit(x, "a", "b", swap_tau=2.0), "swap_tau 2.0 is no fraction"),
        (lambda p, x: p.edit(x, "a", "b", control="p2p"), "control 'p2p' is none of"),
        (lambda p, x: p.edit(x, "a", "b", control=CONTROL, swap_tau=0.5), "swap_tau is of edits without control"),
        (lambda p, x: p.edit(x, "a", "b", control={"cross_replace": 0.3}), "is none of: auto, None, a PromptToPrompt"),
        (lambda p, x: p("a", num_images_per_prompt=0), "num_images_per_prompt 0 must be 1 or more"),
        (lambda p, x: p("a", guidance=IntervalGuidance(0.2, lo=0.0, hi=1.0)), "guidance_scale 0.2 must be 1"),
        (lambda p, x: p("a", generator=tuple(generators(1, 2))), "2 generators for 1 pictures"),
        (
            lambda p, x: p("a", callback_on_step_end=lambda *args: {"latents": torch.zeros(1)}),
            r"the callback returned latents of shape \(1,\) for those of \(1, 16, 8, 8\)",
        ),
    ],
)
def test_a_mistake_is_named(pipe, images, act, message):
    with pytest.raises(ValueError, match=message):
        act(pipe, images)


def test_a_truncated_picture_is_named(pipe, images, tmp_path):
    path = tmp_path / "half.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"half\.jpg cannot be read as a picture"):
        pipe.invert(path, "a")


def test_a_model_that_is_not_there_and_a_type_that_is_none(random_family):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        InvertibleConsistencyPipeline.from_pretrained("nowhere")
    with pytest.raises(ValueError, match="is none of float32"):
        InvertibleConsistencyPipeline.from_pretrained(str(random_family), torch_dtype=torch.int8)


def test_defaults_follow_the_folder(random_family, tmp_path):
    folder = tmp_path / "family"
    shutil.copytree(random_family, folder)
    (folder / "icd.json").write_text(json.dumps({"guidance_scale": 5.0, "tau": 0.7}))
    pipe = loaded(folder)
    assert (pipe.config.guidance_scale, pipe.config.tau, pipe.config.edit_guidance_scale) == (5.0, 0.7, 5.0)


def test_the_pipeline_takes_a_family_of_a_flow(random_family, tmp_path):
    folder = tmp_path / "flow"
    shutil.copytree(random_family, folder)
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    family = Family(str(folder))
    with pytest.raises(ValueError, match=r"trained for the process .*v_prediction.*, and this network's is .*shift"):
        InvertibleConsistency.from_pretrained(family)
    students = LoraStudents(family.load_model(guided=True), lora=LoraSettings(rank=4))
    for direction in DIRECTIONS:
        students.export(direction, folder / "students", {"boundaries": [0, 259, 519, 779, 999]})
    pipe = loaded(folder)
    assert isinstance(pipe.method.process, Flow)
    assert pipe.method.process.settings == {"shift": 3.0}
    picture = pipe("a red star", seed=0, output_type="pt").images
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(tmp_path / "saved")("a red star", seed=0, output_type="pt").images, picture)
