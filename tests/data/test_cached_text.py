"""Captions encoded once: training on what was kept is training on the captions."""

import gc
import json
import shutil
from io import BytesIO
from pathlib import Path

import icd_lightning  # noqa: F401 (before diffusers: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from shards_case import samples_of, skips_damaged
from training_case import FEW, Losses, distillation, scenes_data, trainer_for, write_scenes

from icd_lightning.commands.data import cache_latents as command
from icd_lightning.data.decoding import SampleDecoder
from icd_lightning.data.latents import Caching, Encoders, cache_latents
from icd_lightning.data.manifest import Manifest
from icd_lightning.data.shards import write_shards
from icd_lightning.data.tally import NothingToReadError
from icd_lightning.data.tars import MOMENTS, TEXT
from icd_lightning.models.family import Family
from icd_lightning.models.text import TextSide
from icd_lightning.models.weights import fingerprint
from icd_lightning.tasks.base import OptimizerSettings
from icd_lightning.tasks.guidance_distillation import GuidanceDistillation

CLOSE = 5e-3  # what keeping embeddings as float16 may change of a loss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """16 captioned pictures in 2 shards."""
    return write_scenes(tmp_path_factory.mktemp("pictures"), 16)


@pytest.fixture(scope="module")
def families(random_family, layouts, flow_layouts) -> dict[str, Path]:
    """One with one text encoder, SDXL's two, FLUX's CLIP and T5, and SD3's three."""
    return {"tiny": random_family, "sdxl": layouts["sdxl"], **flow_layouts}


def cache(pictures: Path, out: Path, family: Path, **options) -> Path:
    command(
        str(pictures),
        out=str(out),
        vae=str(family / "vae"),
        device="cpu",
        **{"text": str(family), "batch_size": 5} | options,
    )
    return out


@pytest.fixture(scope="module")
def sets(pictures, families, tmp_path_factory) -> dict[str, dict[str, Path]]:
    """For each family its latents alone, and with embeddings."""
    folder = tmp_path_factory.mktemp("sets")
    return {
        name: {
            kind: cache(pictures, folder / f"{name}-{kind}", family, text=text)
            for kind, text in (("latents", None), ("text", str(family)))
        }
        for name, family in families.items()
    }


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "sdxl", "flux", "sd3"])
def test_beside_each_samples_latents_lie_its_captions_embeddings(sets, families, name):
    conditioner = Family(str(families[name])).load_conditioner()
    for bare, raw in zip(*(samples_of(sets[name][kind]) for kind in ("latents", "text")), strict=True):
        assert raw.keys() - bare.keys() == {TEXT}
        expected = {
            part: values[0].half().numpy() for part, values in conditioner([raw["txt"].decode()]).embeds().items()
        }
        found = load(raw[TEXT])
        assert found.keys() == expected.keys()
        assert len(found) == (1 if name == "tiny" else 2)
        for part, values in found.items():
            assert values.dtype == np.float16
            np.testing.assert_allclose(values, expected[part], rtol=2e-3, atol=2e-3)
        made = json.loads(raw["json"])["moments"]
        assert made == json.loads(bare["json"])["moments"] | {"text_encoder": conditioner.fingerprint}


class KilledError(Exception):
    pass


def test_a_killed_caching_goes_on_shard_by_shard(pictures, random_family, sets, tmp_path):
    family = Family(str(random_family))
    autoencoder, conditioner = family.load_autoencoder(), family.load_conditioner()
    encoded = []

    def run(limit: int) -> Manifest:
        def encode(captions):
            if len(encoded) + len(captions) > limit:
                raise KilledError
            encoded.extend(captions)
            return conditioner(captions).embeds()

        encoders = Encoders(autoencoder.fingerprint, autoencoder.moments, conditioner.fingerprint, encode)
        return cache_latents(str(pictures), tmp_path, Caching(encoders, SampleDecoder(64), batch_size=5))

    with pytest.raises(KilledError):
        run(14)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["00000.tar"]
    encoded.clear()
    assert run(8).complete
    assert len(encoded) == 8
    for path in sets["tiny"]["text"].iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_set_has_embeddings_of_all_captions_or_of_none(pictures, families, sets, tmp_path):
    for kind, text in (("latents", str(families["tiny"])), ("text", None)):
        shutil.copytree(sets["tiny"][kind], tmp_path / kind)
        with pytest.raises(ValueError, match=r"holds another set .*text_encoder.* pass --overwrite"):
            cache(pictures, tmp_path / kind, families["tiny"], text=text)
    cache(pictures, tmp_path / "latents", families["tiny"], overwrite=True)
    assert all(TEXT in raw for raw in samples_of(tmp_path / "latents"))


def test_embeddings_that_float16_cannot_hold_are_refused(pictures, tmp_path):
    large = lambda captions: {"prompt_embeds": torch.full((len(captions), 2, 2), 1e5)}  # noqa: E731
    encoders = Encoders("a", lambda images: images[:, :, ::8, ::8], "t", large)
    with pytest.raises(ValueError, match=r"embeddings that are too large for float16.* near 00000"):
        cache_latents(str(pictures), tmp_path, Caching(encoders, SampleDecoder(64)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fingerprint_is_of_the_encoders_whatever_their_precision(families, dtype):
    conditioners = {name: Family(str(family)).load_conditioner() for name, family in families.items()}
    prints = {name: conditioner.fingerprint for name, conditioner in conditioners.items()}
    assert len({*prints.values(), fingerprint(conditioners["sdxl"].first)}) == 5
    for name, family in families.items():
        assert Family(str(family)).load_conditioner().to(dtype).fingerprint == prints[name]
    tiny = torch.nn.Linear(2, 2)
    tiny.weight.data = torch.tensor([[1e-30, -1e-30], [1.0, -1.0]])  # float16 rounds the first two to 0 and -0
    before = fingerprint(tiny)
    assert fingerprint(tiny.to(dtype)) == before


# --- training ---------------------------------------------------------------------------------------------------------


def stage_one(family: Path) -> GuidanceDistillation:
    torch.manual_seed(0)
    return GuidanceDistillation(Family(str(family)), (3.0, 5.0), optimizer=OptimizerSettings(lr=1e-6))


def stage_two(family: Path, dropout: float = 0.5):
    return distillation(family, students=FEW, caption_dropout=dropout)


def trained(task, folder: Path, tmp_path: Path) -> tuple[list[float], set[str]]:
    """The losses of four steps, and every prompt that was encoded."""
    prompts, losses, load_conditioner = set(), Losses(), Family.load_conditioner

    def heard(family):
        conditioner = load_conditioner(family)
        conditioner.register_forward_pre_hook(lambda module, args: prompts.update(args[0]))
        return conditioner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Family, "load_conditioner", heard)
        trainer_for(tmp_path, callbacks=[losses], max_steps=4).fit(task, datamodule=scenes_data(folder))
    return losses.values, prompts


def text_encoders() -> int:
    """How many are in memory."""
    gc.collect()
    return sum(isinstance(one, TextSide) for one in gc.get_objects())


@pytest.mark.parametrize(
    ("name", "task"),
    [(name, stage_two) for name in ("tiny", "sdxl", "flux")]
    + [pytest.param(name, stage_one, marks=pytest.mark.slow) for name in ("tiny", "sdxl", "sd3")],
)
def test_training_on_kept_embeddings_is_training_on_captions(sets, families, tmp_path, name, task):
    """And no text encoder stays in memory for it; one that a callback asks for afterwards is read again."""
    before, tasks = text_encoders(), [task(families[name]) for _ in range(2)]
    kept, again = trained(tasks[0], sets[name]["text"], tmp_path)
    assert text_encoders() == before
    live, encoded = trained(tasks[1], sets[name]["latents"], tmp_path)
    assert text_encoders() > before
    assert kept == pytest.approx(live, rel=CLOSE)
    assert len(set(kept)) == 4
    assert len(encoded) > 2
    assert again <= {""}
    told = [task.conditioner(["a star"]).tensors["prompt_embeds"] for task in tasks]
    assert torch.equal(*told)


def test_a_text_side_that_captions_need_is_read_before_the_training_begins(sets, families, tmp_path):
    family = shutil.copytree(families["tiny"], tmp_path / "family")
    shutil.rmtree(family / "text_encoder")
    trainer, data = trainer_for(tmp_path, max_steps=0), scenes_data(sets["tiny"]["latents"])
    with pytest.raises((ValueError, OSError), match="text_encoder"):
        trainer.fit(stage_two(family), datamodule=data)


def test_a_text_side_that_a_validation_asks_for_first_is_as_good_to_train_with(families, monkeypatch):
    task = stage_two(families["tiny"])
    monkeypatch.setattr(type(task), "device", torch.device("meta"))  # whichever it is moved to
    with torch.inference_mode():
        encoder = task.conditioner
    assert all(weight.is_meta and not weight.is_inference() for weight in encoder.parameters())


def test_dropped_captions_matter(sets, families, tmp_path):
    told, untold = (
        trained(stage_two(families["tiny"], dropout), sets["tiny"]["text"], tmp_path)[0] for dropout in (0.0, 0.9)
    )
    assert told != pytest.approx(untold, rel=1e-5)


def test_a_family_in_bfloat16_trains_on_the_same_set(sets, families, tmp_path):
    task = GuidanceDistillation(Family(str(families["sdxl"]), precision="bfloat16"), (3.0, 5.0))
    losses = Losses()
    trainer = trainer_for(tmp_path, callbacks=[losses], max_steps=1, precision="bf16-mixed")
    trainer.fit(task, datamodule=scenes_data(sets["sdxl"]["text"]))
    live = trained(stage_one(families["sdxl"]), sets["sdxl"]["latents"], tmp_path)[0]
    assert losses.values[0] == pytest.approx(live[0], rel=0.1)


def test_embeddings_of_another_familys_encoders_are_refused(sets, families, tmp_path):
    shutil.copytree(families["tiny"], tmp_path / "family")
    encoder = Family(str(families["tiny"])).load_conditioner().text_encoder
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    encoder.save_pretrained(tmp_path / "family" / "text_encoder")
    with pytest.raises(ValueError, match=r"captions were encoded by text_encoder \w{16}, but this family's is \w{16}"):
        trained(stage_two(tmp_path / "family"), sets["tiny"]["text"], tmp_path)


def reshaped(sample: dict, name: str, cut) -> dict:
    """The sample with its moments, or its embeddings of this name, cut to another shape (None: without them)."""
    if name == "moments":
        stream = BytesIO()
        np.save(stream, np.ascontiguousarray(cut(np.load(BytesIO(sample[MOMENTS])))))
        return sample | {MOMENTS: stream.getvalue()}
    embeds = load(sample[TEXT])
    changed = cut(embeds.pop(name))
    return sample | {TEXT: save(embeds if changed is None else embeds | {name: np.ascontiguousarray(changed)})}


@pytest.mark.parametrize(
    ("family", "name", "cut", "told"),
    [
        ("tiny", "moments", lambda v: v[:3], r"latents are \[3, 8, 8\].* have 16 or 32 channels"),
        ("sdxl", "moments", lambda v: np.tile(v, (2, 1, 1)), r"latents are \[16, 8, 8\].* have 4 or 8 channels"),
        (
            "tiny",
            "prompt_embeds",
            lambda v: v[:-1],
            r"'prompt_embeds': \[23, 16\].* gives .*'prompt_embeds': \[24, 16\]",
        ),
        ("tiny", "prompt_embeds", lambda v: v[:, :8], r"'prompt_embeds': \[24, 8\].* gives .*\[24, 16\]"),
        ("sdxl", "pooled_prompt_embeds", lambda v: v[:9], r"'pooled_prompt_embeds': \[9\].* gives .*\[24\]"),
        ("sdxl", "pooled_prompt_embeds", lambda v: None, r"gives .*'pooled_prompt_embeds': \[24\]"),
    ],
)
@pytest.mark.parametrize("validated", [False, True])
def test_what_the_model_does_not_take_is_refused_before_the_first_step(
    sets, families, tmp_path, family, name, cut, told, validated
):
    samples = [{k: v for k, v in raw.items() if k != "__url__"} for raw in samples_of(sets[family]["text"])]
    write_shards([reshaped(sample, name, cut) for sample in samples], tmp_path, shard_size=8, parameters={})
    whole, losses = sets[family]["text"], Losses()
    data = scenes_data(whole, val_urls=str(tmp_path)) if validated else scenes_data(tmp_path, val_urls=str(whole))
    with pytest.raises(ValueError, match=rf"00000 of {tmp_path}/00000.tar: .*{told}.*again with `icd data cache-lat"):
        trainer_for(tmp_path, callbacks=[losses], max_steps=1).fit(stage_one(families[family]), datamodule=data)
    assert losses.values == []


def test_shards_with_and_without_embeddings_do_not_mix(sets):
    data = scenes_data(sets["tiny"]["text"])
    data.urls = [str(sets["tiny"][kind]) for kind in ("latents", "text")]
    with pytest.raises(NothingToReadError, match="some hold text embeddings and some none"):
        data.setup("fit")


def test_embeddings_of_other_captions_are_refused(sets, tmp_path):
    samples = [{k: v for k, v in raw.items() if k != "__url__"} for raw in samples_of(sets["tiny"]["text"])]
    for sample in samples:
        sample["json"] = json.dumps(
            json.loads(sample["json"]) | {"alt": "else", "same": sample["txt"].decode()}
        ).encode()
    write_shards(samples, tmp_path, shard_size=8, parameters={})
    with pytest.raises(ValueError, match=r"embeddings of 'a .*', not of 'else' as caption_field 'alt' has it: leave"):
        scenes_data(tmp_path, caption_field="alt").setup("fit")
    for options in ({"caption_field": "same"}, {}):
        scenes_data(tmp_path, **options).setup("fit")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s | {TEXT: s[TEXT][:90]},
        lambda s: s | {TEXT: b""},
        lambda s: s | {TEXT: save({"other": np.zeros(2, np.float16)})},
        lambda s: s | {"json": s["json"].replace(b"text_encoder", b"text")},
    ],
)
def test_damaged_embeddings_are_skipped_and_counted(sets, tmp_path, change):
    assert skips_damaged(sets["tiny"]["text"], tmp_path, change, "corrupt_latents")
