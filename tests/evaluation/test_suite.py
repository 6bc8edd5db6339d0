"""Benchmarks by name: what is tried on which examples, and whole ones from the command's settings to their tables."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from icd_lightning.diffusion import CADSGuidance, IntervalGuidance, StepGuidance
from icd_lightning.editing.baselines import registry
from icd_lightning.editing.baselines.base import Baseline
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.editing.method import UNGUIDED
from icd_lightning.evaluation import benchmarks, summaries
from icd_lightning.evaluation import suite as suites
from icd_lightning.evaluation.benchmarks import step_guidances
from icd_lightning.evaluation.examples import scene_edits, scene_examples, stack
from icd_lightning.evaluation.methods import AttentionControlled, Models, all_methods, teacher_hash
from icd_lightning.evaluation.rows import read_rows
from icd_lightning.evaluation.runs import read_results
from icd_lightning.evaluation.suite import Settings, Suite, check_options, edits_of, guidances_of, parse_grid
from icd_lightning.metrics.reconstruction import psnr
from icd_lightning.models.family import Family

DEFAULT = StepGuidance(3.0, 0.8)


def run(family, out, benchmark, **settings):
    suite = Suite(Settings(benchmark, batch_size=8, **settings), Models(Family(str(family))), out)
    return suite.run()


# Settings


def test_a_grid_is_every_combination():
    assert parse_grid("tau=0.6,0.8 w=3") == ({"tau": 0.6, "w": 3.0}, {"tau": 0.8, "w": 3.0})
    assert parse_grid("") == ({},)


@pytest.mark.parametrize("text", ["tau", "tau=", "tau=x", "=1", "tau=1;2"])
def test_a_broken_grid_is_named(text):
    with pytest.raises(ValueError, match="is not as in tau="):
        parse_grid(text)


def test_without_a_grid_decoding_is_unguided_guided_and_dynamic():
    assert guidances_of(Settings("inversion"), DEFAULT) == {
        "w 1": UNGUIDED,
        "w 3": StepGuidance(3.0),
        "w 3, tau 0.8": DEFAULT,
    }


def test_a_grid_tries_each_kind_of_guidance_and_leaves_out_what_is_none():
    cads = guidances_of(Settings("inversion", grid=parse_grid("tau1=0.5,0.7 tau2=0.6")), DEFAULT)
    assert cads == {"w 1": UNGUIDED, "tau1 0.5, tau2 0.6": CADSGuidance(3.0, 0.5, 0.6)}
    interval = guidances_of(Settings("inversion", grid=parse_grid("lo=0.2 hi=0.6 w=5")), DEFAULT)
    assert interval["lo 0.2, hi 0.6, w 5"] == IntervalGuidance(5.0, 0.2, 0.6)
    with pytest.raises(ValueError, match="grid option 'taw' is none of w, tau"):
        guidances_of(Settings("inversion", grid=parse_grid("taw=1")), DEFAULT)


@pytest.mark.parametrize(
    ("text", "named"), [("tau1=0.5,0.7 tau2=0.6", "tau1 0.5, tau2 0.6"), ("lo=0.3 hi=0.2,0.4", "lo 0.3, hi 0.4")]
)
def test_edits_leave_out_the_same_settings(text, named):
    settings = Settings("tiny_edit", grid=parse_grid(text))
    assert list(edits_of(settings, DEFAULT)) == [named] == list(guidances_of(settings, DEFAULT))[1:]


def test_a_grid_takes_the_short_names_of_edits_and_each_name_once():
    assert parse_grid("cross=0.4 self=0.5") == ({"cross_replace": 0.4, "self_replace": 0.5},)
    with pytest.raises(ValueError, match="varies cross_replace twice"):
        parse_grid("cross=0.4 cross_replace=0.5")


def test_a_default_tau_above_tau2_is_lowered_to_it():
    (found,) = edits_of(Settings("tiny_edit", grid=parse_grid("tau2=0.6")), DEFAULT).values()
    assert found == {"guidance": CADSGuidance(3.0, 0.6, 0.6)}


def test_edits_take_guidance_and_their_own_options_from_a_grid():
    found = edits_of(Settings("tiny_edit", grid=parse_grid("tau=0.6 swap_tau=0.5,0.7")), DEFAULT)
    assert found == {
        "tau 0.6, swap_tau 0.5": {"guidance": StepGuidance(3.0, 0.6), "swap_tau": 0.5},
        "tau 0.6, swap_tau 0.7": {"guidance": StepGuidance(3.0, 0.6), "swap_tau": 0.7},
    }
    assert edits_of(Settings("tiny_edit"), DEFAULT) == {"w 3, tau 0.8": {"guidance": DEFAULT}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count 0 must be 1 or more"),
        ({"guidance_scale": 0.5}, "guidance_scale 0.5 must be 1"),
        ({"methods": ("icd", "magic")}, "no method 'magic'; there is: icd, icd_p2p, icd_swap, untrained, ddim"),
        ({"grid": parse_grid("w=0,3")}, "grid option w 0.0 must be 1"),
        ({"grid": parse_grid("tau1=0.7 tau2=0.6")}, "the grid leaves no setting"),
        ({"benchmark": "piebench"}, "--benchmark piebench needs PIE-Bench's folder: give --data"),
        ({"benchmark": "coco_edit"}, "--benchmark coco_edit needs a CSV of edits: give --data"),
        ({"benchmark": "tiny_edit", "data": Path("x")}, "tiny_edit does not read data"),
        ({"benchmark": "tiny_edit", "images": Path("x"), "natural": True}, "tiny_edit does not read images, natural"),
        ({"images": Path("x")}, "inversion without --data does not read images"),
        ({"benchmark": "guidance", "tau": 0.3, "grid": ({"w": 3.0},)}, "does not read tau, grid"),
        ({"grid": parse_grid("lo=0.2 tau=0.4,0.8")}, "the grid has tau and lo, of different schedules"),
        ({"grid": parse_grid("tau1=0.2 hi=0.4")}, "the grid has tau1 and hi, of different schedules"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"benchmark": "inversion", **settings})


def test_a_method_is_guided_as_told_or_no_more_than_its_family_bears(random_family, tmp_path):
    models = Models(Family(str(random_family)))  # its own: w 3, tau 0.8
    icd = models.load("icd")
    assert models.guidance("icd", icd, None, None) == StepGuidance(3.0, 0.8)
    assert models.guidance("icd", icd, 5.0, 0.6) == StepGuidance(5.0, 0.6)
    dynamic = models.load("ddim_dynamic")
    assert models.guidance("ddim_dynamic", dynamic, None, None) == StepGuidance(3.0, 0.7)
    infedit = models.load("infedit")
    assert models.guidance("infedit", infedit, None, None) == StepGuidance(infedit.guidance.guidance_scale)


@pytest.mark.parametrize(
    ("method", "known", "unknown"),
    [
        ("icd_swap", "w=3 swap_tau=0.5", "cross_replace"),
        ("icd_p2p", "tau=1 cross_replace=0.2 amplify=2", "swap_tau"),
        ("ddim", "lo=0.2 swap_tau=0.5", "cross_replace"),
        ("pnp_inversion", "cross_replace=0.2 self_replace=0.1", "swap_tau"),
        ("icd_p2p", "blend_from=0.5", "blend"),
    ],
)
def test_each_method_has_its_own_options_in_a_grid(random_family, method, known, unknown):
    cls = Models(Family(str(random_family))).method_class(method)
    check_options(Settings("tiny_edit", grid=parse_grid(known)), method, cls)
    with pytest.raises(ValueError, match=f"grid option '{unknown}' is none of w, tau, .* .of method {method}."):
        check_options(Settings("tiny_edit", grid=parse_grid(f"{unknown}=0.5")), method, cls)


def test_words_that_are_none_are_no_blend(random_family):
    method = Models(Family(str(random_family))).load("icd_p2p")
    (example,) = scene_edits(1, 0)

    def edited(**options):
        return method.edit(stack([example], 64), [example.caption], [example.target], guidance=DEFAULT, **options)

    assert torch.equal(edited(blended_words=[False]), edited(blend=False))
    assert torch.equal(edited(blended_words=[None]), edited())
    assert not torch.equal(edited(), edited(blend=False))


@pytest.mark.parametrize(("model", "by_attention", "w"), [("random:sd15", True, 20.0), ("random:sdxl", False, 8.0)])
def test_icd_edits_as_its_family_is_edited_best(random_family, model, by_attention, w):
    models, method = Models(Family(model)), Models(Family(str(random_family))).load("icd_p2p")
    assert models.method_class("icd") is (AttentionControlled if by_attention else InvertibleConsistency)
    assert models.method_class("icd_swap") is InvertibleConsistency
    assert models.method_class("icd_p2p") is AttentionControlled
    assert issubclass(models.method_class("nti"), Baseline)
    assert models.guidance("icd_p2p", method, None, None, edit=True) == StepGuidance(w, 0.8)
    assert models.guidance("icd_p2p", method, None, None) == StepGuidance(8.0, 0.8)
    assert models.guidance("icd_p2p", method, 5.0, 0.6, edit=True) == StepGuidance(5.0, 0.6)
    every = all_methods(by_attention=models.edits_by_attention)
    assert every[:3] == ["icd", "icd_swap" if by_attention else "icd_p2p", "untrained"]
    assert len(every) == len(set(every))


def test_parts_outside_of_the_model_are_hashed_with_it(random_family, tmp_path):
    unet, vae = tmp_path / "stage1", tmp_path / "vae"
    shutil.copytree(random_family / "unet_guided", unet / "unet_guided")
    shutil.copytree(random_family / "vae", vae)
    family = Family(str(random_family), guided_unet=str(unet), vae=str(vae))
    hashes = [teacher_hash(Family(str(random_family))), teacher_hash(family)]
    for folder in (unet / "unet_guided", vae):
        (weights,) = folder.glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")  # as after another training
        hashes.append(teacher_hash(family))
    file = tmp_path / "distilled.pt"
    for content in (b"1", b"2"):
        file.write_bytes(content)
        hashes.append(teacher_hash(Family("random:sd15", guided_unet=str(file))))
    assert len(set(hashes)) == 6


def test_a_baseline_on_the_students_is_given_ours_and_depends_on_them(random_family, tmp_path):
    for name in ("forward", "reverse"):
        shutil.copytree(random_family / "students" / name, tmp_path / name)
    folders = {name: str(tmp_path / name) for name in ("forward", "reverse")}
    models = Models(Family(str(random_family)), **folders)
    method = models.load("renoise_turbo")
    assert method.uses_students
    first = models.determinants("renoise_turbo", method)
    (weights,) = (tmp_path / "reverse").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    second = models.determinants("renoise_turbo", method)
    assert first.pop("students") != second.pop("students")
    assert first == second
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no student at"):
        models.load("renoise_turbo")


# Whole benchmarks


def test_edits_of_scenes_are_scored_for_every_setting_and_type(random_family, tmp_path, monkeypatch):
    settings = {"methods": ("icd", "icd_p2p"), "count": 8, "grid": parse_grid("tau=0.6,1")}
    paths = run(random_family, tmp_path, "tiny_edit", **settings)
    assert all(path.is_file() for path in paths)
    assert {"edits.png", "trade_off.png"} < {path.name for path in paths}
    found = json.loads((tmp_path / "tiny_edit.json").read_text())["methods"]
    assert set(found) == {"icd", "icd_p2p"}
    assert set(found["icd"]) == {"tau 0.6", "tau 1"}
    assert set(found["icd"]["tau 1"]) >= {"all", "color", "add", "remove"}
    assert {"changed", "kept", "psnr_edited", "psnr_outside", "nfe", "seconds"} <= set(found["icd"]["tau 1"]["all"])
    assert [found[name]["tau 1"]["all"]["nfe"]["mean"] for name in found] == [8, 12]  # P2P decodes the source as well
    text = (tmp_path / "tiny_edit.md").read_text()
    assert "by type" in text
    assert "As published" not in text  # the tiny world is no benchmark of papers
    assert "±" in text
    page = tmp_path / "tiny_edit" / "report.html"
    assert '<th scope="col" role="columnheader">true result' in page.read_text()
    monkeypatch.setattr(summaries, "SIDE_BY_SIDE", 1)
    run(random_family, tmp_path, "tiny_edit", **settings)  # of what is there
    assert '<th scope="row" role="rowheader">true result' in page.read_text()


def test_what_is_fit_to_a_guidance_is_fit_to_each(random_family):
    method = registry.build("nti", Family(str(random_family)), num_inference_steps=3, guidance_scale=5.0)
    bench, batch = benchmarks.Bench(method, 64), scene_examples(1, seed=0)
    images, prompts = bench.images(batch), [batch[0].caption]
    unfit = method.generate(prompts, method.invert(images, prompts), guidance=StepGuidance(2.0))
    made = {one.decoding: one.images for one in benchmarks.inversion(bench, batch, step_guidances(2.0, (1.0,)))}
    fit = method.guided_by(StepGuidance(2.0))
    expected = fit.generate(prompts, fit.invert(images, prompts))
    torch.testing.assert_close(made["w 2"], expected)
    assert (made["w 2"] - unfit).abs().max() > 1e-3


def test_generation_over_a_grid_is_set_against_inversion(random_family, tmp_path):
    run(random_family, tmp_path, "generation", count=2, grid=parse_grid("tau=0.6,1"), metrics=("tiny-agreement",))
    found = json.loads((tmp_path / "generation.json").read_text())["methods"]["icd"]
    assert set(found) == {"w 1", "tau 0.6", "tau 1"}
    assert "error of inversion" in (tmp_path / "generation" / "report.html").read_text()


@pytest.mark.slow
def test_guidance_of_encoder_and_decoder_is_table_1(random_family, tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "TURN_ON", (0.0, 1.0))
    run(random_family, tmp_path, "guidance", count=2)
    text = (tmp_path / "guidance.md").read_text()
    assert all(title in text for title in ("Table 1: tiny-fd", "Table 1: latent NLL"))
    found = json.loads((tmp_path / "guidance.json").read_text())["methods"]
    assert set(found["icd"]) == {"tau 0", "tau 1"}
    both = found["ddim, both ways"]
    assert len(both) == 16
    assert both["encoder none, decoder none"]["all"]["nfe"]["mean"] == 100
    assert both["encoder full, decoder full"]["all"]["nfe"]["mean"] == 200


def test_pie_bench_is_measured_inside_and_outside_its_masks(random_family, tmp_path):
    folder, entries = tmp_path / "pie", {}
    (folder / "annotation_images").mkdir(parents=True)
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (512, 512, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "annotation_images" / f"{i}.png")
        entries[f"{i}"] = {
            "image_path": f"{i}.png",
            "original_prompt": "a [red] circle",
            "editing_prompt": "a [blue] circle",
            "editing_type_id": f"{i + 5}",
            "blended_word": "red blue",
            "mask": [512 * 100, 512 * 200],
        }
    (folder / "mapping_file.json").write_text(json.dumps(entries))
    run(random_family, tmp_path, "piebench", methods=("icd_p2p",), data=folder, metrics=("psnr-unedited", "mse-edited"))
    found = json.loads((tmp_path / "piebench.json").read_text())["methods"]["icd_p2p"]
    (means,) = found.values()
    assert set(means) == {"all", "change attribute pose", "change attribute color"}
    assert means["all"]["psnr-unedited"]["mean"] > 0
    assert "As published: arXiv:2310.01506" in (tmp_path / "piebench.md").read_text()


def test_a_wrong_option_ends_a_benchmark_before_anything_is_measured(random_family, tmp_path):
    settings = {"methods": ("icd_p2p", "icd_swap"), "count": 1, "grid": parse_grid("cross_replace=0.2")}
    with pytest.raises(ValueError, match=r"grid option 'cross_replace' is none of .* \(of method icd_swap\)"):
        run(random_family, tmp_path / "out", "tiny_edit", **settings)
    assert not (tmp_path / "out").exists()


def test_pretrained_networks_that_are_missing_end_a_benchmark_early(random_family, tmp_path, monkeypatch):
    monkeypatch.setenv("ICD_METRICS_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("image,caption\na.png,a cat\n")
    with pytest.raises(FileNotFoundError, match="lpips"):
        run(random_family, tmp_path / "out", "inversion", data=tmp_path / "a.csv")
    assert not (tmp_path / "out").exists()


def test_photographs_are_measured_without_networks_on_request(random_family, tmp_path):
    Image.new("RGB", (90, 64), "red").save(tmp_path / "a.jpg")
    (tmp_path / "a.csv").write_text("image,caption\na.jpg,a red picture\n")
    run(random_family, tmp_path / "out", "inversion", data=tmp_path / "a.csv", metrics=("psnr",))
    (file,) = (tmp_path / "out").glob("icd-*/rows.parquet")
    assert [row["key"] for row in read_rows(file)] == ["a.jpg"] * 3


def test_photographs_are_scored_at_one_size_however_large_the_results_are(random_family, tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "PHOTOGRAPH_SIDE", 32)  # of results of 64
    pixels = np.random.default_rng(0).integers(0, 255, (96, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("image,caption\na.png,a red circle\n")
    settings = {"data": tmp_path / "a.csv", "grid": parse_grid("tau=1")}
    run(random_family, tmp_path / "out", "inversion", metrics=("psnr",), **settings)
    (folder,) = (tmp_path / "out").glob("icd-*/")
    examples = Settings("inversion", **settings).examples()
    for row in read_rows(folder / "rows.parquet"):
        made = read_results(folder, row["decoding"], examples, 32)
        assert made.shape[-1] == 32
        assert row["psnr"] == pytest.approx(float(psnr(made, stack(examples, 32))), abs=1e-3)
        assert Image.open(folder / row["image"]).size == (64, 64)


def test_all_methods_are_known():
    assert {"icd", "icd_p2p", "untrained", "ddim", "nti", "npi", "pnp_inversion", "edit_friendly"} <= set(all_methods())
