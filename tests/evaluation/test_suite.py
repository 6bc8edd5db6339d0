"""Benchmarks by name, and whole ones from the command's settings to their tables, on a random family."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from icd_lightning.diffusion import StepGuidance
from icd_lightning.editing.baselines.base import Baseline
from icd_lightning.editing.consistency import AttentionControlled, InvertibleConsistency
from icd_lightning.editing.methods import class_of
from icd_lightning.evaluation import summaries
from icd_lightning.evaluation.benchmark import Benchmark, Outcome, Settings, Task
from icd_lightning.evaluation.benchmarks import guidance as guidance_benchmark
from icd_lightning.evaluation.decodings import parse_grid
from icd_lightning.evaluation.examples import stack
from icd_lightning.evaluation.methods import Models, all_methods, guided_as_told, teacher_hash
from icd_lightning.evaluation.results import read_results
from icd_lightning.evaluation.suite import Suite, labels_of
from icd_lightning.metrics.reconstruction import psnr
from icd_lightning.models.family import Family
from icd_lightning.tiny.benchmarks import scene_edits

DEFAULT = StepGuidance(3.0, 0.8)


def suite(family, out, benchmark, **settings):
    return Suite(Settings(benchmark, **{"batch_size": 8, **settings}), Models(Family(str(family))), out)


def run(family, out, benchmark, **settings):
    return suite(family, out, benchmark, **settings).run()


def methods_in(file):
    return json.loads(file.read_text())["methods"]


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count 0 must be from 1 to 1,000,000"),
        ({"count": 10**30}, "count 1000000000000000000000000000000 must be from 1"),
        ({"batch_size": 0}, "batch_size 0 must be from 1 to 1,000,000"),
        ({"guidance_scale": 0.5}, "guidance_scale 0.5 must be 1"),
        ({"methods": ("icd", "magic")}, "no method 'magic'; there is: icd, icd_p2p, icd_swap, untrained, ddim"),
        ({"benchmark": "magic"}, "no benchmark 'magic'; there is: inversion, generation"),
        ({"benchmark": "icd_lightning.evaluation.suite.Suite"}, "and no Benchmark of"),
        ({"benchmark": "piebench"}, "--benchmark piebench needs PIE-Bench's folder: give --data"),
        ({"benchmark": "coco_edit"}, "--benchmark coco_edit needs a CSV of edits: give --data"),
        ({"benchmark": "tiny_edit", "data": Path("x")}, "tiny_edit does not read data"),
        ({"benchmark": "tiny_edit", "images": Path("x"), "natural": True}, "tiny_edit does not read images, natural"),
        ({"benchmark": "scenes", "grid": parse_grid("tau=1")}, "scenes does not read grid"),
        ({"images": Path("x")}, "inversion without --data does not read images"),
        ({"benchmark": "guidance", "tau": 0.3, "grid": ({"w": 3.0},)}, "does not read tau, grid"),
        ({"data": Path("nowhere.csv")}, "there is no nowhere.csv"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(random_family, tmp_path, settings, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(random_family, tmp_path / "out", **{"benchmark": "inversion", **settings})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "known", "unknown"),
    [
        ("icd_swap", "w=3 swap_tau=0.5", "cross_replace"),
        ("icd_p2p", "tau=1 cross_replace=0.2 amplify=2 blend_from=0.5", "swap_tau"),
        ("ddim", "lo=0.2 swap_tau=0.5 num_inference_steps=5", "cross_replace"),
        ("pnp_inversion", "cross_replace=0.2 self_replace=0.1", "swap_tau"),
        ("sdedit", "strength=0.2", "stength"),
    ],
)
def test_each_method_has_its_own_options_in_a_grid(random_family, tmp_path, method, known, unknown):
    suite(random_family, tmp_path, "tiny_edit", methods=(method,), grid=parse_grid(known))
    with pytest.raises(ValueError, match=f"grid option '{unknown}' is none of w, tau, .* .of method {method}."):
        suite(random_family, tmp_path, "tiny_edit", methods=(method,), grid=parse_grid(f"{unknown}=0.5"))
    with pytest.raises(ValueError, match=r"grid option 'swap_tau' is none of w, .*hi.* \(of method"):
        suite(random_family, tmp_path, "inversion", methods=(method,), grid=parse_grid("swap_tau=0.5"))


def test_files_of_one_stem_have_rows_of_their_own():
    names = ["icd", "a/sdedit.yaml", "b/sdedit.yaml", "my.package.Method", "c/mine.yaml"]
    assert list(labels_of(names).values()) == ["icd", "a/sdedit.yaml", "b/sdedit.yaml", "Method", "mine"]


# Methods over a family


def test_a_method_is_guided_as_told_or_no_more_than_its_family_bears(random_family, tmp_path):
    models = Models(Family(str(random_family)))  # its own: w 3, tau 0.8
    icd = models.load("icd")
    assert models.guidance("icd", icd) == DEFAULT
    assert guided_as_told(DEFAULT, 5.0, None) == StepGuidance(5.0, 0.8)
    assert guided_as_told(DEFAULT, None, 0.6) == StepGuidance(3.0, 0.6)
    dynamic = models.load("ddim_dynamic")
    assert models.guidance("ddim_dynamic", dynamic) == StepGuidance(3.0, 0.7)
    infedit = models.load("infedit")
    assert models.guidance("infedit", infedit) == StepGuidance(infedit.guidance.guidance_scale)
    file = tmp_path / "mine.yaml"
    file.write_text(
        "class_path: icd_lightning.editing.baselines.sdedit.SDEdit\ninit_args: {guidance_scale: 12, strength: 0.3}\n"
    )
    assert models.guidance(str(file), models.load(str(file))) == StepGuidance(12.0)  # whoever wrote it says so


@pytest.mark.parametrize(("model", "by_attention", "w"), [("random:sd15", True, 20.0), ("random:sdxl", False, 8.0)])
def test_icd_edits_as_its_family_is_edited_best(random_family, model, by_attention, w):
    models, method = Models(Family(model)), Models(Family(str(random_family))).load("icd_p2p")
    assert class_of("icd", models.family) is (AttentionControlled if by_attention else InvertibleConsistency)
    assert class_of("icd_swap", models.family) is InvertibleConsistency
    assert issubclass(class_of("nti", models.family), Baseline)
    assert models.guidance("icd_p2p", method, edit=True) == StepGuidance(w, 0.8)
    assert models.guidance("icd_p2p", method) == StepGuidance(8.0, 0.8)
    every = all_methods(models.family)
    assert every[:3] == ["icd", "icd_swap" if by_attention else "icd_p2p", "untrained"]
    assert {"ddim", "nti", "npi", "pnp_inversion", "edit_friendly", "sdedit"} <= set(every)


def test_words_that_are_none_are_no_blend(random_family):
    method = Models(Family(str(random_family))).load("icd_p2p")
    (example,) = scene_edits(1, 0)

    def edited(**options):
        return method.edit(stack([example], 64), [example.caption], [example.target], guidance=DEFAULT, **options)

    assert torch.equal(edited(blended_words=[False]), edited(blend=False))
    assert torch.equal(edited(blended_words=[None]), edited())
    assert not torch.equal(edited(), edited(blend=False))


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


def test_figures_depend_on_the_students_of_methods_that_use_them_and_on_a_methods_version(
    random_family, tmp_path, monkeypatch
):
    for name in ("forward", "reverse"):
        shutil.copytree(random_family / "students" / name, tmp_path / name)
    folders = {name: str(tmp_path / name) for name in ("forward", "reverse")}
    models = Models(Family(str(random_family)), **folders)
    loaded = {name: models.load(name) for name in ("renoise_turbo", "icd", "ddim")}
    first = {name: models.determinants(name, method) for name, method in loaded.items()}
    (weights,) = (tmp_path / "reverse").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    second = {name: models.determinants(name, method) for name, method in loaded.items()}
    assert {name for name in first if first[name] != second[name]} == {"renoise_turbo", "icd"}
    monkeypatch.setattr(type(loaded["ddim"]), "version", 99, raising=False)
    assert models.determinants("ddim", loaded["ddim"]) != second["ddim"]


def test_figures_do_not_depend_on_how_a_place_is_spelt(random_family, monkeypatch):
    monkeypatch.chdir(random_family.parent)
    name, students = random_family.name, {part: f"{random_family}/students/{part}" for part in ("forward", "reverse")}
    spellings = (str(random_family), name, f"./{name}/", f"{name}/../{name}")
    models = [Models(Family(spelling, guided_unet=f"{spelling}/unet_guided"), **students) for spelling in spellings]
    method = models[0].load("ddim")
    assert len({repr(one.determinants("ddim", method)) for one in models}) == 1


# Whole benchmarks


def test_edits_of_scenes_are_scored_for_every_setting_and_type(random_family, tmp_path, monkeypatch):
    settings = {"methods": ("icd", "icd_p2p"), "count": 4, "grid": parse_grid("tau=0.6,1")}
    paths = run(random_family, tmp_path, "tiny_edit", **settings)
    assert all(path.is_file() for path in paths)
    assert {"edits.png", "trade_off.png"} < {path.name for path in paths}
    results = methods_in(tmp_path / "tiny_edit.json")
    assert {name: set(decodings) for name, decodings in results.items()} == {
        key: {"tau 0.6", "tau 1"} for key in ("icd", "icd_p2p")
    }
    assert set(results["icd"]["tau 1"]) == {"all", "color", "shape", "texture", "size"}
    assert {"changed", "kept", "psnr_edited", "psnr_outside", "nfe", "seconds"} <= set(results["icd"]["tau 1"]["all"])
    assert [results[name]["tau 1"]["all"]["nfe"]["mean"] for name in results] == [8, 12]  # P2P decodes the source too
    text = (tmp_path / "tiny_edit.md").read_text()
    assert "by type" in text
    assert "As published" not in text  # the tiny world is no benchmark of papers
    again = suite(random_family, tmp_path, "tiny_edit", **settings).measure()  # of what is there
    shown = summaries.panel(again.results["editing"], again.data.examples)
    assert shown.columns == ("original", "icd\ntau 0.6", "icd_p2p\ntau 0.6", "true result")
    monkeypatch.setattr(summaries, "SIDE_BY_SIDE", 1)
    rows = summaries.panel(again.results["editing"], again.data.examples).rows
    assert [label for label, _ in rows] == list(shown.columns)


def test_a_grid_varies_a_constructor(random_family, tmp_path):
    settings = {"methods": ("sdedit",), "count": 2, "metrics": ("edits",)}
    run(random_family, tmp_path, "tiny_edit", grid=parse_grid("strength=0.02,0.1 w=1"), **settings)
    results = methods_in(tmp_path / "tiny_edit.json")["sdedit"]
    assert {name: means["all"]["nfe"]["mean"] for name, means in results.items()} == {
        "strength 0.02, w 1": 1,
        "strength 0.1, w 1": 5,
    }
    with pytest.raises(ValueError, match=r"strength 2\.0 must lie between 0"):
        run(random_family, tmp_path / "other", "tiny_edit", grid=parse_grid("strength=0.02,2"), **settings)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_generation_over_a_grid_is_set_against_inversion(random_family, tmp_path):
    run(random_family, tmp_path, "generation", count=2, grid=parse_grid("tau=0.6,1"), metrics=("tiny-agreement",))
    results = methods_in(tmp_path / "generation.json")
    assert list(results) == ["icd", "icd, to noise and back"]
    assert set(results["icd"]) == {"w 1", "tau 0.6", "tau 1"}
    assert "error of inversion" in (tmp_path / "generation" / "report.html").read_text()


def test_guidance_of_encoder_and_decoder_is_table_1(random_family, tmp_path, monkeypatch):
    monkeypatch.setattr(guidance_benchmark, "TURN_ON", (0.0, 1.0))
    ddim = Models.load
    monkeypatch.setattr(
        Models, "load", lambda self, name: ddim(self, name, **({"num_inference_steps": 2} if name == "ddim" else {}))
    )
    run(random_family, tmp_path, "guidance", count=2)
    text = (tmp_path / "guidance.md").read_text()
    assert all(title in text for title in ("Table 1: tiny-fd", "Table 1: latent NLL"))
    results = methods_in(tmp_path / "guidance.json")
    assert list(results) == ["ddim, both ways", "icd"]
    assert set(results["icd"]) == {"tau 0", "tau 1"}
    both = results["ddim, both ways"]
    assert len(both) == 16
    assert both["encoder none, decoder none"]["all"]["nfe"]["mean"] == 4
    assert both["encoder full, decoder full"]["all"]["nfe"]["mean"] == 8


def write_pie_bench(folder):
    (folder / "annotation_images").mkdir(parents=True)
    entries = {}
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (512, 512, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "annotation_images" / f"{i}.png")
        entries[f"{i}"] = {
            "image_path": f"{i}.png",
            "original_prompt": "a [red] circle",
            "editing_prompt": "a [blue] circle",
            "editing_type_id": f"{i + 5}",
            "blended_word": "red blue",
            "mask": [512 * 100, 512 * 500 * i + 512 * 200],  # the second leaves the picture
        }
    (folder / "mapping_file.json").write_text(json.dumps(entries))
    return folder


def test_pie_bench_is_measured_inside_and_outside_its_masks(random_family, tmp_path):
    settings = {"methods": ("icd_p2p",), "data": write_pie_bench(tmp_path / "pie")}
    run(random_family, tmp_path, "piebench", metrics=("psnr-unedited", "mse-edited"), **settings)
    (means,) = methods_in(tmp_path / "piebench.json")["icd_p2p"].values()
    assert set(means) == {"all", "change attribute pose", "change attribute color"}
    assert means["all"]["psnr-unedited"]["mean"] > 0
    assert "As published: arXiv:2310.01506" in (tmp_path / "piebench.md").read_text()


def write_picture(folder, name="a.png", size=(80, 96)):
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)


def test_coco_edits_are_measured(random_family, tmp_path):
    write_picture(tmp_path)
    (tmp_path / "edits.csv").write_text(
        "file_name,old_caption,edited_caption,blended_words\n"
        "a.png,a red circle,a blue circle,\"('red', 'blue')\"\na.png,a red circle,a red star,\n"
    )
    settings = {"methods": ("icd_p2p",), "data": tmp_path / "edits.csv", "metrics": ("psnr",)}
    run(random_family, tmp_path / "out", "coco_edit", **settings)
    (file,) = (tmp_path / "out").glob("icd_p2p-*/rows.parquet")
    assert pd.read_parquet(file).key.tolist() == ["00000-a", "00001-a"]


def test_photographs_are_scored_at_one_size_however_large_the_results_are(random_family, tmp_path, monkeypatch):
    monkeypatch.setattr("icd_lightning.evaluation.examples.PHOTOGRAPH_SIDE", 32)  # of results of 64
    write_picture(tmp_path)
    (tmp_path / "a.csv").write_text("image,caption\na.png,a red circle\n")
    settings = {"data": tmp_path / "a.csv", "grid": parse_grid("tau=1"), "metrics": ("psnr",)}
    run(random_family, tmp_path / "out", "inversion", **settings)
    (folder,) = (tmp_path / "out").glob("icd-*/")
    examples = suite(random_family, tmp_path / "out", "inversion", **settings).data.examples
    for row in pd.read_parquet(folder / "rows.parquet").to_dict("records"):
        made = read_results(folder, row["decoding"], examples, 32)
        assert made.shape[-1] == 32
        assert row["psnr"] == pytest.approx(float(psnr(made, stack(examples, 32))), abs=1e-3)
        assert Image.open(folder / row["image"]).size == (64, 64)


def test_pretrained_networks_that_are_missing_end_a_benchmark_early(random_family, tmp_path, monkeypatch):
    for name in ("ICD_METRICS_HOME", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_picture(tmp_path)
    (tmp_path / "a.csv").write_text("image,caption\na.png,a cat\n")
    with pytest.raises(FileNotFoundError, match="lpips"):
        run(random_family, tmp_path / "out", "inversion", data=tmp_path / "a.csv")
    assert not (tmp_path / "out").exists()


def invert_colors(bench, batch, decodings):
    for decoding in decodings:
        yield Outcome(decoding.name, -bench.images(batch), 0, 0.0)


NEGATIVES = Benchmark(
    (Task("negatives", invert_colors, ("psnr",)),),
    lambda measured: [summaries.table("Negatives", "", measured.results["negatives"])],
)
"""A benchmark from outside of the package."""


def test_a_benchmark_from_outside_is_a_name_as_any(random_family, tmp_path, capsys):
    run(random_family, tmp_path, "test_suite.NEGATIVES", count=2, methods=("sdedit",))
    assert "Negatives" in capsys.readouterr().out
    results = methods_in(tmp_path / "test_suite.NEGATIVES.json")["sdedit"]
    assert 0 < results["w 1"]["all"]["psnr"]["mean"] < 20
