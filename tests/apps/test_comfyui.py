"""The nodes, called as ComfyUI calls them: imported from custom_nodes, filled by INPUT_TYPES, in inference mode."""

import importlib.util
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path
from weakref import ref

import pytest
import torch
from torch import Tensor

from icd_lightning.apps import comfyui
from icd_lightning.apps.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, load
from icd_lightning.editing.limits import Injection
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt

SOURCES = ["a large red circle", "a small blue square"]
TARGETS = ["a large blue circle", "a small blue star"]
INSTALL = re.search(r"\n\n((?:    .*\n|\n)+)\n", comfyui.__doc__)[1]
BASIC = {"STRING": str, "INT": int, "FLOAT": float, "BOOLEAN": bool}


def widgets(name: str) -> dict[str, tuple]:
    """All inputs of a node, by name."""
    inputs = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    assert inputs.keys() <= {"required", "optional"}
    return {key: spec for kind in inputs.values() for key, spec in kind.items()}


def call(name: str, **given) -> tuple:
    """What a node returns: links and changed widgets are given, the other widgets say their defaults."""
    node = NODE_CLASS_MAPPINGS[name]()
    defaults = {key: spec[1]["default"] for key, spec in widgets(name).items() if spec[1:]}
    with torch.inference_mode():
        returned = getattr(node, node.FUNCTION)(**{**defaults, **given})
    assert isinstance(returned, tuple)
    assert len(returned) == len(node.RETURN_TYPES)
    return returned


@pytest.fixture(scope="module")
def images() -> Tensor:
    """(2, 64, 64, 3) in [0, 1], of values that 8 bits hold."""
    return torch.randint(0, 256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(0)) / 255


@pytest.fixture(scope="module")
def pipe(random_family) -> InvertibleConsistencyPipeline:
    return InvertibleConsistencyPipeline.from_pretrained(str(random_family))


@pytest.fixture(scope="module")
def inverted(random_family, images):
    return call("ICDInvert", image=images, source_prompt="\n".join(SOURCES), model=str(random_family))


def test_the_file_that_installs_them_is_what_comfyui_imports(tmp_path):
    code = "\n".join(line[4:] for line in INSTALL.splitlines()) + "\n"
    assert code in (Path(__file__).parents[2] / "docs" / "comfyui.md").read_text()
    assert len([line for line in code.splitlines() if line]) <= 3
    file = tmp_path / "icd.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("custom_nodes.icd", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS == NODE_CLASS_MAPPINGS
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == NODE_CLASS_MAPPINGS.keys() == {"ICDInvert", "ICDEdit"}
    assert NODE_DISPLAY_NAME_MAPPINGS["ICDEdit"] == "iCD Edit"


def test_comfyui_starts_without_loading_a_network_library():
    code = "import sys, icd_lightning.apps.comfyui; sys.exit(bool({'diffusers', 'lightning'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_a_node_keeps_the_contract(name):
    node = NODE_CLASS_MAPPINGS[name]
    signature(getattr(node(), node.FUNCTION)).bind(**widgets(name))
    assert isinstance(node.CATEGORY, str)
    assert all(isinstance(kind, str) for kind in node.RETURN_TYPES)
    assert len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)) == len(node.RETURN_TYPES)
    for kind, *options in widgets(name).values():
        if isinstance(kind, list):
            assert options[0]["default"] in kind
        elif kind in BASIC:
            assert type(options[0]["default"]) is BASIC[kind]
            if kind in ("INT", "FLOAT"):
                assert options[0]["min"] <= options[0]["default"] <= options[0]["max"]
        else:
            assert kind in ("IMAGE", "ICD_INVERSION")
            assert not options


def test_what_comes_back_is_the_pipelines(pipe, images, inverted):
    inversion, back = inverted
    expected = pipe.reconstruct(images.movedim(-1, 1), SOURCES, output_type="np").images
    assert back.shape == (2, 64, 64, 3)
    torch.testing.assert_close(back, torch.from_numpy(expected).clamp(0, 1))
    torch.testing.assert_close(inversion.noise, pipe.invert(images.movedim(-1, 1), SOURCES))


CONTROL = PromptToPrompt(cross_replace=0.5, self_replace=1.0, amplify=1.0, alignment="refine", blend=False)
EDITS = {
    "as the model says": ({}, {}),
    "guided": ({"guidance_scale": 2.0, "tau": 0.5}, {"guidance_scale": 2.0, "tau": 0.5}),
    "by swap": ({"edit_by": "swap", "swap_tau": 0.3}, {"control": None, "swap_tau": 0.3}),
    "unguided in time": ({"tau": 0.0}, {"tau": 0.0}),
    "by attention": ({"edit_by": "prompt_to_prompt", **vars(CONTROL)}, {"control": CONTROL}),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_the_pipelines(pipe, inverted, name):
    inversion, _ = inverted
    given, options = EDITS[name]
    given = {key: value for key, value in given.items() if key in widgets("ICDEdit")}
    (edited,) = call("ICDEdit", inversion=inversion, target_prompt="\n".join(TARGETS), **given)
    expected = pipe.edit(None, SOURCES, TARGETS, latents=inversion.noise.clone(), output_type="np", **options).images
    torch.testing.assert_close(edited, torch.from_numpy(expected).clamp(0, 1))


def test_the_edits_differ(inverted):
    """Else the test above would not see a setting that is lost on the way."""
    inversion, _ = inverted
    made = [
        call("ICDEdit", inversion=inversion, target_prompt="\n".join(TARGETS), **given)[0]
        for given, _ in EDITS.values()
    ]
    assert all(not torch.equal(one, other) for i, one in enumerate(made) for other in made[:i])


def test_a_transformer_is_edited_by_injection_and_by_nothing_that_it_has_not(flow_layouts, images):
    inversion, _ = call("ICDInvert", image=images, source_prompt="red star", model=str(flow_layouts["sd3"]))
    pipe, asked = load(inversion.model), {"inversion": inversion, "target_prompt": "star"}
    given = {"inject": 1.0, "blocks_from": 0.25, "blocks_to": 0.75, "blend": False}
    (edited,) = call(
        "ICDEdit", **asked, edit_by="injection", **given, amplify=-1.0
    )  # what is of another way is not read
    options = {"latents": inversion.noise.clone(), "output_type": "np", "control": Injection(**given)}
    expected = pipe.edit(None, "red star", "star", **options).images
    torch.testing.assert_close(edited, torch.from_numpy(expected).clamp(0, 1))
    with pytest.raises(ValueError, match=r"SD3Transformer2DModel does not have: borrow by an Injection on"):
        call("ICDEdit", **asked, edit_by="prompt_to_prompt")


def test_auto_edits_by_attention_where_the_model_is_edited_so(inverted, monkeypatch):
    inversion, _ = inverted
    pipe = load(inversion.model)
    asked = {"inversion": inversion, "target_prompt": "\n".join(TARGETS)}
    monkeypatch.setattr(pipe, "_internal_dict", type(pipe.config)({**pipe.config, "attention_control": True}))
    torch.testing.assert_close(call("ICDEdit", **asked), call("ICDEdit", **asked, edit_by="prompt_to_prompt"))
    with pytest.raises(ValueError, match=r"\(FLUX, SD3\), which UNet2DConditionModel has not: borrow by Prompt"):
        call("ICDEdit", **asked, edit_by="injection")


def test_pictures_of_any_size_are_cut_and_made_as_asked(random_family):
    image, prompt = torch.rand(1, 70, 90, 4), {"source_prompt": SOURCES[0], "model": str(random_family)}
    inversion, back = call("ICDInvert", image=image, **prompt)
    assert back.shape == (1, 64, 64, 3)
    assert call("ICDInvert", image=image, **prompt, width=96, height=72)[1].shape == (1, 72, 96, 3)
    (three,) = call("ICDEdit", inversion=inversion, target_prompt="\n".join([*TARGETS, "a star"]))
    assert three.shape == (3, 64, 64, 3)  # one picture, edited in three ways
    assert 0 <= three.min() < three.max() <= 1


def test_another_seed_is_another_inversion(random_family, images, inverted):
    other, _ = call("ICDInvert", image=images, source_prompt=SOURCES[0], model=str(random_family), seed=1)
    assert not torch.equal(other.noise[:1], inverted[0].noise[:1])


def test_one_model_is_loaded_once_and_the_latest_alone_is_kept(random_family, images, monkeypatch):
    load.cache_clear()
    asked = {"image": images, "source_prompt": SOURCES[0], "model": str(random_family)}
    inversion, _ = call("ICDInvert", **asked)
    call("ICDEdit", inversion=inversion, target_prompt=TARGETS[0])
    assert load.cache_info().hits == 1
    first, loading = ref(load(inversion.model)), InvertibleConsistencyPipeline.from_pretrained

    def from_pretrained(*args, **options):
        assert first() is None, "gone before another takes memory"
        return loading(*args, **options)

    monkeypatch.setattr(InvertibleConsistencyPipeline, "from_pretrained", from_pretrained)
    call("ICDInvert", **asked, precision="bfloat16")
    assert load.cache_info().currsize == 1
    (edited,) = call("ICDEdit", inversion=inversion, target_prompt=TARGETS[0])  # loads its own model again
    assert edited.shape == (2, 64, 64, 3)


WRONG = {
    "no model": ({"model": "nowhere"}, "no model 'nowhere'"),
    "no student": ({"forward": "nowhere"}, "no student at nowhere"),
    "prompts": ({"source_prompt": "a\nb\nc"}, "2 of image, 3 of prompt do not go together"),
    "a mask": ({"image": torch.rand(2, 64, 64)}, "image (2, 64, 64) is no batch of pictures: give (B, H, W, 3)"),
    "no numbers": ({"image": torch.full((1, 64, 64, 3), torch.nan)}, "no batch of pictures"),
    "a side": ({"width": 60}, "width 60 must be a multiple of 8, for example 64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_inverted_is_told_in_one_line(random_family, images, name):
    given, message = WRONG[name]
    asked = {"image": images, "source_prompt": SOURCES[0], "model": str(random_family), **given}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call("ICDInvert", **asked)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance_scale": 0.5}, "guidance_scale 0.5 must be 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan must be 1"),
        ({"tau": -0.5}, "tau -0.5 is no fraction"),
        ({"edit_by": "prompt_to_prompt", "cross_replace": 2.0}, "cross_replace 2.0 is no fraction"),
        ({"target_prompt": "a\nb\nc"}, "3 of target_prompt do not go together"),
    ],
)
def test_what_cannot_be_edited_is_told_in_one_line(inverted, given, message):
    asked = {"inversion": inverted[0], "target_prompt": TARGETS[0], **given}
    with pytest.raises(ValueError, match=re.escape(message)):
        call("ICDEdit", **asked)
