"""Decodings and grids of them: names, guidance, options of edits and of constructors."""

import pytest

from icd_lightning.diffusion import CADSGuidance, IntervalGuidance, StepGuidance
from icd_lightning.editing.baselines.sdedit import SDEdit
from icd_lightning.evaluation.benchmark import Settings
from icd_lightning.evaluation.decodings import Decoding, check_grid, constructor_options, edited, guided, parse_grid

DEFAULT = StepGuidance(3.0, 0.8)


def by_name(decodings):
    return {one.name: one for one in decodings}


def guidances(grid=""):
    found = guided(Settings("inversion", grid=parse_grid(grid)), DEFAULT, SDEdit)
    return {name: one.guidance for name, one in by_name(found).items()}


def edits(grid=""):
    return by_name(edited(Settings("tiny_edit", grid=parse_grid(grid)), DEFAULT, SDEdit))


def test_a_name_tells_every_number_from_every_other():
    assert Decoding.step(3.0, 0.8).name == "w 3, tau 0.8"
    assert Decoding.step(3.0).name == "w 3"
    assert Decoding.step(3.0, 1e-5).name == "w 3, tau 1e-05"
    assert Decoding.step(3.0, 1e-5).options == {"w": 3.0, "tau": 1e-5}
    assert Decoding.step(3.0, 0.12345678).name == "w 3, tau 0.12345678"


def test_a_grid_is_every_combination():
    assert parse_grid("tau=0.6,0.8 w=3") == ({"tau": 0.6, "w": 3.0}, {"tau": 0.8, "w": 3.0})
    assert parse_grid("cross=0.4 self=0.5") == ({"cross_replace": 0.4, "self_replace": 0.5},)
    assert parse_grid("") == ({},)
    with pytest.raises(ValueError, match="varies cross_replace twice"):
        parse_grid("cross=0.4 cross_replace=0.5")


@pytest.mark.parametrize("text", ["tau", "tau=", "tau=x", "=1", "tau=1;2"])
def test_a_broken_grid_is_named(text):
    with pytest.raises(ValueError, match="is not as in tau="):
        parse_grid(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w=0,3", "grid option w 0.0 must be 1"),
        ("w=nan", "grid option w nan must be 1"),
        ("tau1=0.7 tau2=0.6", "the grid leaves no setting"),
        ("lo=0.2 tau=0.4,0.8", "the grid has tau and lo, of different schedules"),
        ("tau1=0.2 hi=0.4", "the grid has tau1 and hi, of different schedules"),
    ],
)
def test_guidance_that_cannot_be_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        check_grid(parse_grid(text))


def test_without_a_grid_decoding_is_unguided_guided_and_dynamic():
    assert guidances() == {"w 1": StepGuidance(1.0), "w 3": StepGuidance(3.0), "w 3, tau 0.8": DEFAULT}
    assert {name: one.guidance for name, one in edits().items()} == {"w 3, tau 0.8": DEFAULT}


def test_a_grid_tries_each_kind_of_guidance_and_leaves_out_what_is_none():
    w1 = {"w 1": StepGuidance(1.0)}
    assert guidances("tau1=0.5,0.7 tau2=0.6") == w1 | {"tau1 0.5, tau2 0.6": CADSGuidance(3.0, 0.5, 0.6)}
    assert guidances("lo=0.3 hi=0.2,0.6 w=5") == w1 | {"lo 0.3, hi 0.6, w 5": IntervalGuidance(5.0, 0.3, 0.6)}
    assert guidances("tau2=0.6") == w1 | {"tau2 0.6": CADSGuidance(3.0, 0.6, 0.6)}  # a default tau is lowered to it


def test_options_go_to_guidance_to_the_edit_and_to_the_constructor():
    assert constructor_options(SDEdit) == ["num_inference_steps", "strength"]
    (one, two) = edits("tau=0.6 swap_tau=0.5 strength=0.3,0.7").values()
    assert one.name == "tau 0.6, swap_tau 0.5, strength 0.3"
    assert (one.guidance, one.edit, one.constructor) == (StepGuidance(3.0, 0.6), {"swap_tau": 0.5}, {"strength": 0.3})
    assert two.constructor == {"strength": 0.7}
