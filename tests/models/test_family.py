"""A model in whatever form it lies on a disk is the same model, and a form that lacks something says what."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL
from families_case import NAMES, NETWORKS, put_on_hub, single_file, states, write_configs
from often_case import often
from outside_case import SmallSD3
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from icd_lightning.models.family import Family, load_autoencoder
from icd_lightning.models.sources import architecture
from icd_lightning.models.students import DIRECTIONS, LoraStudents

HUB_NAME = "someone/some-model"
COND = "time_embedding.cond_proj.weight"
NO_MODEL = r"MODEL=\.\.\. of make, or --model\.init_args\.family\.model .*`make demo` needs none"


@pytest.fixture
def sd15(layouts) -> Path:
    return layouts["sd15"]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, which itself is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def weights(family: Family, part: str = "unet") -> dict:
    return family.source.network(part, NETWORKS[part], torch.float32).state_dict()


# The same model in every form


@pytest.mark.parametrize(("form", "name"), [("one.safetensors", "sdxl"), ("one.ckpt", "sd15"), ("hub", "sdxl")])
def test_every_form_of_a_model_has_the_same_weights(layouts, cache, tmp_path, name, form):
    folder = layouts[name]
    if form == "hub":
        put_on_hub(cache, HUB_NAME, folder)
        family = Family(HUB_NAME)
    else:
        tensors = single_file(folder)
        save_file(tensors, tmp_path / form) if form.endswith("rs") else torch.save(
            {"state_dict": tensors}, tmp_path / form
        )
        family = Family(str(tmp_path / form), config=str(folder))
    expected = states(folder)
    assert all(same(weights(family, part), state) for part, state in expected.items())
    assert family.source.has("text_encoder_2") == (name == "sdxl")
    ours, theirs = (of.load_conditioner()(["a red star"]) for of in (family, Family(str(folder))))
    assert torch.equal(ours.tensors["prompt_embeds"], theirs.tensors["prompt_embeds"])
    assert family.load_autoencoder().scaling_factor == {"sd15": 0.18215, "sdxl": 0.13025}[name]
    assert torch.equal(family.load_process().alphas, Family(str(folder)).load_process().alphas)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_file_tells_its_own_architecture(layouts, cache, tmp_path, name):
    save_file(single_file(layouts[name]), tmp_path / "one.safetensors")
    family = Family(str(tmp_path / "one.safetensors"))
    assert family.source.config("unet") == json.loads((architecture(name) / "unet" / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer, .* is not in the hub's cache .*family\.config"):
        family.source.tokenizer("tokenizer")
    put_on_hub(cache, "openai/clip-vit-large-patch14", layouts[name] / "tokenizer")
    assert family.source.tokenizer("tokenizer")("a").input_ids[0] == family.source.tokenizer("tokenizer").bos_token_id
    assert family.source.tokenizer("tokenizer_2").pad_token == "!"


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_are_the_same_each_time(layouts, name):
    family = Family(f"random:{layouts[name]}")
    assert all(same(weights(family, part), state) for part, state in states(layouts[name]).items())
    guided = family.load_model(guided=True)
    assert guided.network.config.time_cond_proj_dim == 512
    with torch.no_grad():
        told = torch.randn(1, 4, 8, 8), torch.tensor([500]), family.load_conditioner()(["a red star"])
        outputs = [guided.predict(*told, torch.tensor([w])) for w in (1.0, 8.0)]
    assert torch.isfinite(outputs[0]).all()
    assert not torch.allclose(*outputs)


def test_frozen_parts_have_the_precision_asked_for(sd15):
    for model in (str(sd15), f"random:{sd15}"):
        family = Family(model, precision="bfloat16")
        networks = [family.load_model(guided=guided).network for guided in (False, True)]
        parts = (*networks, family.load_conditioner())
        assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.bfloat16}
        assert not any(weight.requires_grad for part in parts for weight in part.parameters())


# The true shapes: what is known of the released models, and of the released students


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("sd15", (859_520_964, 83_653_863, 123_060_480)),
        ("sdxl", (2_567_463_684, 83_653_863, 123_060_480 + 694_659_840)),
        ("sd3", (2_028_328_000, 83_819_683, 123_650_304 + 694_659_840 + 4_762_310_656)),
        ("sd35_large", (8_056_627_520, 83_819_683, 123_650_304 + 694_659_840 + 4_762_310_656)),
        ("flux_dev", (11_901_408_320, 83_819_683, 123_060_480 + 4_762_310_656)),
        ("flux2_klein", (3_875_544_576, 84_046_115, 4_022_468_096)),
        ("z_image", (6_154_908_736, 83_819_683, 4_022_468_096)),
    ],
)
def test_architectures_have_the_sizes_of_the_released_models(name, counts):
    """Of the network, the autoencoder and the text encoders."""
    family = Family(f"random:{name}")
    with torch.device("meta"):
        network = family.load_model(guided=name == "flux_dev").network
        parts = network, family.load_autoencoder(), family.load_conditioner()
    assert tuple(sum(weight.numel() for weight in part.parameters()) for part in parts) == counts


STUDENTS = [("sd15", 278, 67_252_224), ("sdxl", 788, 196_751_360)]


@pytest.mark.parametrize(("name", "modules", "lora"), often(STUDENTS, STUDENTS[0]))
def test_students_have_the_sizes_of_the_released_ones(name, modules, lora):
    with torch.device("meta"):
        students = LoraStudents(Family(f"random:{name}").load_model(guided=True))
    for direction in DIRECTIONS:
        parameters = students.parameters_of(direction)
        assert (len(parameters), sum(p.numel() for p in parameters)) == (2 * modules, lora)


def test_two_encoders_are_told_the_size_of_the_pictures_of_either_autoencoder(layouts, random_family, tmp_path):
    """SDXL's and the tiny one call their stages by different names."""
    shutil.copytree(layouts["sdxl"], tmp_path / "model", ignore=shutil.ignore_patterns("vae"))
    (tmp_path / "model" / "vae").symlink_to(random_family / "vae")
    for model in (layouts["sdxl"], tmp_path / "model"):
        family = Family(str(model))
        assert family.load_conditioner().size[0] == 8 * family.load_autoencoder().downsampling == 64


# Variants, overrides


def test_a_variant_is_taken_when_asked_for_and_named_when_not(sd15, tmp_path):
    write_configs("sd15", tmp_path)
    for part, cls in (("unet", NETWORKS["unet"]), ("text_encoder", CLIPTextModel)):
        network = Family(str(sd15)).source.network(part, cls, torch.float16)
        network.save_pretrained(tmp_path / part, variant="fp16")
        assert same(
            Family(str(tmp_path), variant="fp16").source.network(part, cls, torch.float16).state_dict(),
            network.state_dict(),
        )
        with pytest.raises(FileNotFoundError, match=r"has no weights that can be read; it holds \w+.fp16.safetensors"):
            Family(str(tmp_path)).source.network(part, cls, torch.float32)
    with pytest.raises(FileNotFoundError, match="has no weights of variant fp16"):
        Family(str(sd15), variant="fp16").load_model(guided=False)


@pytest.mark.parametrize("variants", [["fp16"], [None], ["fp16", None]])
def test_a_variant_holds_for_the_guided_unet_where_there_is_such_a_file(sd15, tmp_path, variants):
    """A model downloaded in fp16 beside a stage 1 that was trained here has no such file."""
    family = Family(str(sd15), variant="fp16", precision="float16", guided_unet=str(tmp_path))
    unet = Family(str(sd15), precision="float16").load_model(guided=True).network
    for value, variant in enumerate(variants):
        torch.nn.init.constant_(unet.conv_in.bias, value)
        unet.save_pretrained(tmp_path, variant=variant)
    assert family.load_model(guided=True).network.conv_in.bias[0] == 0


def test_a_unet_that_takes_more_than_latents_is_one_error(sd15, tmp_path):
    shutil.copytree(sd15, tmp_path / "model")
    config = json.loads((sd15 / "unet" / "config.json").read_text())
    inpainting = NETWORKS["unet"].from_config({**config, "in_channels": 9})
    inpainting.save_pretrained(tmp_path / "model" / "unet")
    with pytest.raises(ValueError, match=r"the unet of .* takes 9 channels, and its latents have 4: .*inpainting"):
        Family(str(tmp_path / "model")).load_model(guided=False)


def test_an_autoencoder_given_apart_is_looked_at(layouts, random_family, tmp_path):
    """Its channels must be the network's, and its downsampling tells how large pictures are."""
    with pytest.raises(ValueError, match=r"the unet of .* takes 4 channels, and its latents have 16"):
        Family(str(layouts["sd15"]), vae=str(random_family / "vae")).load_model(guided=False)
    config = json.loads((layouts["sdxl"] / "vae" / "config.json").read_text())
    stages = {name: config[name][:3] for name in ("down_block_types", "up_block_types", "block_out_channels")}
    AutoencoderKL.from_config({**config, **stages}).save_pretrained(tmp_path)
    family = Family(str(layouts["sdxl"]), vae=str(tmp_path))
    assert family.resolution == 8 * family.load_autoencoder().downsampling == 32
    assert family.load_conditioner().size == (32, 32)


def test_a_shipped_family_that_is_not_there_says_how_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("icd_lightning.models.sources.shipped", lambda name: tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"tiny_flow is not in this package: .*`make tiny-flow-weights`"):
        Family("tiny_flow").check()
    assert "\ntiny-flow-weights:" in (Path(__file__).parents[2] / "Makefile").read_text()


def test_the_network_goes_by_its_backbones_name(sd15, tmp_path):
    """A model of another architecture has no unet/, and here no autoencoder of its own either."""
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    shutil.copy(sd15 / "unet" / "config.json", tmp_path / "model" / "transformer")
    for model in (tmp_path / "model", f"random:{tmp_path / 'model'}"):
        assert Family(str(model), backbone=SmallSD3()).source.config("transformer")["sample_size"] == 8
        with pytest.raises(ValueError, match=r"class 'UNet2DConditionModel', for which there is no backbone here"):
            Family(str(model)).check()


def test_an_autoencoder_that_overflows_stays_in_float32_and_says_so(layouts, tmp_path, caplog):
    sdxl = layouts["sdxl"]
    half = Family(str(sdxl), precision="float16").load_autoencoder()
    assert half.vae.dtype == torch.float32
    assert [r.levelno for r in caplog.records if "gives NaN in float16" in r.getMessage()] == [logging.WARNING]
    caplog.clear()
    assert Family(str(sdxl), precision="bfloat16").load_autoencoder().vae.dtype == torch.bfloat16
    fixed = AutoencoderKL.from_pretrained(sdxl / "vae")
    fixed.register_to_config(force_upcast=False)
    fixed.save_pretrained(tmp_path / "fixed")
    assert (
        Family(str(sdxl), vae=str(tmp_path / "fixed"), precision="float16").load_autoencoder().vae.dtype
        == torch.float16
    )
    assert "gives NaN" not in caplog.text


def test_another_autoencoder_takes_the_models_place(sd15, cache, tmp_path):
    vae = AutoencoderKL.from_pretrained(sd15 / "vae")
    torch.nn.init.ones_(vae.encoder.conv_in.weight)
    vae.save_pretrained(tmp_path / "other")
    put_on_hub(cache, HUB_NAME, tmp_path / "other")
    for location in (str(tmp_path / "other"), HUB_NAME):
        found = Family(str(sd15), vae=location).load_autoencoder()
        assert same(found.vae.state_dict(), vae.state_dict())
        assert found.fingerprint == load_autoencoder(location).fingerprint
    with pytest.raises(FileNotFoundError, match=r"no autoencoder at .*nowhere"):
        Family(str(sd15), vae=str(tmp_path / "nowhere")).load_autoencoder()
    with pytest.raises(FileNotFoundError, match=r"no-such/vae is not in the hub's cache"):
        Family(str(sd15), vae="no-such/vae").load_autoencoder()
    with pytest.raises(ValueError, match="is of class 'UNet2DConditionModel'; known autoencoders: AutoencoderKL"):
        load_autoencoder(sd15 / "unet")


def test_the_prediction_type_can_be_set_right(sd15):
    assert Family(str(sd15)).load_process().prediction_type == "epsilon"
    assert Family(str(sd15), prediction_type="v_prediction").load_process().prediction_type == "v_prediction"


# The UNet of stage 1


@pytest.mark.parametrize("form", ["folder", "run", "sd15_cfg_distill.pt", "old.pt", "state.safetensors", "inside"])
def test_the_guided_unet_is_found_in_every_form(sd15, tmp_path, form):
    expected = Family(str(sd15)).load_model(guided=True).network.state_dict()
    (tmp_path / "unet_guided").symlink_to(sd15 / "unet_guided")
    location = {"folder": str(sd15 / "unet_guided"), "run": str(tmp_path), "inside": "unet_guided"}.get(form)
    if location is None:
        location = str(tmp_path / form)
        if form.endswith(".pt"):
            torch.save(expected, location, _use_new_zipfile_serialization=form != "old.pt")
        else:
            save_file(expected, location)
    family = Family(str(sd15), guided_unet=location, precision="bfloat16")
    family.check()
    unet = family.load_model(guided=True).network
    assert same(unet.state_dict(), {name: weight.bfloat16() for name, weight in expected.items()})
    assert unet.config.time_cond_proj_dim == 512
    assert not unet.training


BROKEN = {
    rf"no guidance embedding in {COND}": lambda state: state.pop(COND),
    "1 weights missing, 0 unknown, 0 of another shape or type, for example conv_in.bias": lambda state: state.pop(
        "conv_in.bias"
    ),
    "0 weights missing, 1 unknown": lambda state: state.update(extra=torch.ones(1)),
    "0 unknown, 1 of another shape or type, for example conv_in.bias": lambda state: state.update(
        {"conv_in.bias": torch.ones(1)}
    ),
    r"broken.pt: conv_in.bias is not finite": lambda state: state["conv_in.bias"].fill_(float("nan")),
    "something else than one network's state dict": lambda state: state.update(epoch=3),
}


@pytest.mark.parametrize("complaint", BROKEN)
def test_a_state_dict_that_does_not_fit_is_one_error(sd15, tmp_path, complaint):
    state = Family(str(sd15)).load_model(guided=True).network.state_dict()
    BROKEN[complaint](state)
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=complaint):
        Family(str(sd15), guided_unet=str(tmp_path / "broken.pt")).load_model(guided=True)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_pickle_runs_nothing(sd15, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, write in (
        ("plain.pt", lambda f: f.write_bytes(pickle.dumps(Malicious()))),
        ("zip.pt", lambda f: torch.save(Malicious(), f)),
    ):
        write(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a file of weights"):
            Family(str(sd15), guided_unet=str(tmp_path / name)).load_model(guided=True)
    assert not (tmp_path / "ran").exists()


def test_a_missing_guided_unet_is_one_message(sd15, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"looked for a file .*GUIDED=.*family\.guided_unet .*`make demo`"
    ) as error:
        Family(str(sd15), guided_unet=str(tmp_path / "nothing")).check()
    assert str(sd15) in str(error.value)


# What is missing


@pytest.mark.parametrize(
    ("model", "tried"),
    [
        ("/no/such/place", "there is no /no/such/place"),
        ("here", "has none of transformer, unet, vae"),
        ("no-such/model", "no-such/model is not in the hub's cache here and cannot be downloaded"),
        ("random:sd17", "there is no architecture sd17"),
    ],
)
def test_a_missing_model_is_one_message_at_once(cache, tmp_path, monkeypatch, model, tried):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match=f"no model '{model}': .*{tried}.*{NO_MODEL}"):
        Family(model).check()


def test_a_folder_that_lacks_weights_is_refused(sd15, tmp_path):
    unet = load_file(sd15 / "unet" / "diffusion_pytorch_model.safetensors")
    del unet["conv_in.bias"]
    write_configs("sd15", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"unet has no weights that can be read; it holds no file of weights"):
        Family(str(tmp_path)).load_model(guided=False)
    save_file(unet, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 of the network's weights, for example conv_in.bias"):
        Family(str(tmp_path)).load_model(guided=False)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer: there is neither tokenizer\.json nor"):
        Family(str(tmp_path)).source.tokenizer("tokenizer")


def test_a_single_file_that_is_something_else_is_refused(sd15, tmp_path):
    family = Family(str(tmp_path / "one.safetensors"), config=str(sd15))
    (tmp_path / "one.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read as a file of weights"):
        family.load_model(guided=False)
    save_file({"weight": torch.ones(1)}, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="is neither Stable Diffusion"):
        Family(str(tmp_path / "one.safetensors")).load_process()
    tensors = single_file(sd15)
    del tensors["model.diffusion_model.middle_block.1.norm.bias"]
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"one.safetensors lacks weights of its unet"):
        family.load_model(guided=False)


def test_a_model_that_is_no_folder_brings_no_students(sd15, tmp_path):
    assert Family(str(sd15)).root == sd15
    with pytest.raises(ValueError, match="brings no students: name both"):
        _ = Family(f"random:{sd15}").root
    assert Family(f"random:{sd15}").load_defaults().guidance_scale == 8.0


def test_a_guided_unet_that_happens_to_lie_here_is_not_taken(random_family, tmp_path, monkeypatch):
    """Stage 1 writes ./unet_guided of whatever model: another family's own goes before it, unless it is named."""
    stray = tmp_path / "unet_guided"
    shutil.copytree(random_family / "unet_guided", stray)
    file = stray / "diffusion_pytorch_model.safetensors"
    save_file({name: weight + 1 for name, weight in load_file(file).items()}, file)
    monkeypatch.chdir(tmp_path)
    own = load_file(random_family / "unet_guided" / "diffusion_pytorch_model.safetensors")
    loaded = Family(str(random_family)).load_model(guided=True).network.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in own.items())
    named = Family(str(random_family), guided_unet="unet_guided").load_model(guided=True).network.state_dict()
    assert all(torch.equal(named[name], weight + 1) for name, weight in own.items())
