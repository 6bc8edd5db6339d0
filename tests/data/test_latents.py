"""Latents made once: what training draws from them is what it would have encoded."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import icd_lightning  # noqa: F401 (before diffusers: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import lightning
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from family_case import VAE
from lightning.pytorch.callbacks import ModelCheckpoint
from running_case import running
from shards_case import corrupt, samples_of, skips_damaged
from training_case import FEW, Losses, distillation, scenes_data, trainer_for, write_scenes

from icd_lightning.commands.data import cache_latents as command
from icd_lightning.commands.data import describe
from icd_lightning.data.decoding import SampleDecoder
from icd_lightning.data.images import to_images
from icd_lightning.data.latents import Caching, Encoders, cache_latents
from icd_lightning.data.manifest import MANIFEST, PROGRESS, Manifest
from icd_lightning.data.shards import encode_sample, open_shards, write_shards
from icd_lightning.data.tally import NothingToReadError
from icd_lightning.data.tars import MOMENTS
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.tasks.base import Draws

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.5,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """24 captioned pictures in 3 shards."""
    return write_scenes(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def deterministic() -> LatentAutoencoder:
    torch.manual_seed(0)
    return LatentAutoencoder(AutoencoderDC.from_config(VAE))


@pytest.fixture(scope="module")
def with_posterior() -> LatentAutoencoder:
    torch.manual_seed(0)
    return LatentAutoencoder(AutoencoderKL.from_config(KL))


def cache(urls, out, autoencoder: LatentAutoencoder, *, encode=None, decoder=SampleDecoder(64), **options) -> Manifest:  # noqa: B008
    encoders = Encoders(autoencoder.fingerprint, encode or autoencoder.moments)
    return cache_latents(str(urls), out, Caching(encoders, decoder, options.pop("batch_size", 5)), **options)


def images_of(folder: Path, count: int) -> torch.Tensor:
    data = scenes_data(folder, val_urls=str(folder), val_batch_size=count)
    data.setup("fit")
    return next(iter(data.val_dataloader())).images


def moments_of(folder: Path, count: int) -> torch.Tensor:
    data = scenes_data(folder, val_urls=str(folder), val_batch_size=count)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch.images is None
    return batch.moments


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_each_sample_keeps_its_moments_caption_and_place(pictures, deterministic, tmp_path):
    manifest = cache(pictures, tmp_path, deterministic)
    assert manifest == Manifest.load(tmp_path)
    assert manifest.complete
    assert {name: record.samples for name, record in manifest.shards.items()} == dict.fromkeys(
        ("00000.tar", "00001.tar", "00002.tar"), 8
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [*manifest.shards, MANIFEST]
    for old, new in zip(samples_of(pictures), samples_of(tmp_path), strict=True):
        assert new.keys() == {"__key__", "__url__", MOMENTS, "txt", "json"}
        assert (new["__key__"], new["txt"]) == (old["__key__"], old["txt"])
        made = {"resolution": 64, "autoencoder": deterministic.fingerprint}
        place = {"original_size": [64, 64], "crop_top_left": [0, 0]}
        assert json.loads(new["json"]) == json.loads(old["json"]) | place | {"moments": made}
        assert np.load(BytesIO(new[MOMENTS])).dtype == np.float16


def test_original_size_and_crop_survive(deterministic, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (80, 128, 3), dtype=np.uint8)
    write_shards([encode_sample("a", pixels, "noise", {})], tmp_path / "a", shard_size=1, parameters={})
    cache(tmp_path / "a", tmp_path / "b", deterministic)
    (raw,) = samples_of(tmp_path / "b")
    before = SampleDecoder(64).decode(samples_of(tmp_path / "a")[0]).metadata
    after = SampleDecoder(64).decode(raw).metadata
    assert before == {"original_size": (80, 128), "crop_top_left": (0, 19)}
    assert {name: after[name] for name in before} == before


def test_a_latent_without_posterior_is_the_encoded_one(pictures, deterministic, tmp_path):
    cache(pictures, tmp_path, deterministic)
    encoded = deterministic.encode(images_of(pictures, 24))
    drawn = deterministic.sample(moments_of(tmp_path, 24), normal=None)
    assert torch.equal(drawn, deterministic.sample(moments_of(tmp_path, 24), normal=torch.randn))
    torch.testing.assert_close(drawn, encoded, rtol=2**-11, atol=1e-6)


def test_a_posterior_is_drawn_from_anew_each_time(pictures, with_posterior, tmp_path):
    cache(pictures, tmp_path, with_posterior)
    moments = moments_of(tmp_path, 24)
    assert moments.shape == (24, 8, 32, 32)
    draws = [Draws(0, step) for step in (0, 0, 1)]
    first, again, other = (with_posterior.sample(moments, normal=draw.normal) for draw in draws)
    assert torch.equal(first, again)
    images = images_of(pictures, 24)
    mean, std = with_posterior.encode(images), moments[:, 4:].mul(0.5).exp() * 0.5
    torch.testing.assert_close(with_posterior.sample(moments), mean, rtol=1e-3, atol=1e-3)
    for drawn in (first, other):
        assert ((drawn - mean) / std).std() == pytest.approx(1, abs=0.02)
    assert ((first - other) / std).std() == pytest.approx(2**0.5, abs=0.03)
    torch.testing.assert_close(first, with_posterior.encode(images, normal=Draws(0, 0).normal), rtol=2e-3, atol=2e-3)


def test_the_batch_size_changes_nothing_but_rounding(pictures, with_posterior, tmp_path):
    for size in (1, 8):
        cache(pictures, tmp_path / str(size), with_posterior, batch_size=size)
    one, eight = (moments_of(tmp_path / str(size), 24) for size in (1, 8))
    torch.testing.assert_close(one, eight, rtol=2e-3, atol=2e-3)


def test_pictures_that_cannot_be_used_are_left_out_and_counted(pictures, deterministic, tmp_path, caplog):
    samples = samples_of(pictures)
    bad = [{k: v for k, v in sample.items() if k != "__url__"} for sample in samples]
    bad[2], bad[9]["txt"] = corrupt(bad[2]), b""
    write_shards(bad, tmp_path / "bad", shard_size=8, parameters={})
    with caplog.at_level(logging.WARNING):
        manifest = cache(tmp_path / "bad", tmp_path / "out", deterministic)
    assert [record.samples for record in manifest.shards.values()] == [7, 7, 8]
    assert "left out: no_caption 1, corrupt_image 1" in caplog.text
    kept = [sample["__key__"] for sample in samples_of(tmp_path / "out")]
    assert kept == [sample["__key__"] for n, sample in enumerate(samples) if n not in (2, 9)]


def test_buckets_keep_the_form_of_pictures(deterministic, tmp_path):
    sizes = [(64, 64), (96, 40), (64, 64), (40, 96), (100, 100)]
    samples = [encode_sample(f"{n}", np.full((*s, 3), 9 * n, np.uint8), "a", {"n": n}) for n, s in enumerate(sizes * 4)]
    write_shards(samples, tmp_path / "pictures", shard_size=8, parameters={})
    decoder = SampleDecoder(64, buckets=True)
    cache(tmp_path / "pictures", tmp_path / "latents", deterministic, decoder=decoder)
    raws = samples_of(tmp_path / "latents")
    assert [raw["__key__"] for raw in raws] == [str(n) for n in range(20)]
    for raw, size in zip(raws, sizes * 4, strict=True):
        moments = decoder.decode(raw).moments
        assert (
            decoder.admit(raw).size
            == moments.shape[1:]
            == tuple(min(side, 96 if max(size) < 100 else 64) // 8 for side in size)
        )
        picture = next(
            decoder.decode(old) for old in samples_of(tmp_path / "pictures") if old["__key__"] == raw["__key__"]
        )
        image = to_images([picture.picture])
        torch.testing.assert_close(
            torch.from_numpy(moments).float()[None], deterministic.moments(image), rtol=2e-3, atol=2e-3
        )
    data = scenes_data(tmp_path / "latents", buckets=True, batches_per_epoch=8)
    data.setup("fit")
    assert {batch.moments.shape[2:] for batch in data.train_dataloader()} >= {(8, 8), (12, 5), (5, 12)}
    with pytest.raises(
        ValueError, match=r"encoded at 64 pixels in buckets, not 64 pixels\); give the resolution and buc"
    ):
        scenes_data(tmp_path / "latents").setup("fit")


# --- going on ---------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def dying(autoencoder: LatentAutoencoder, after: int):
    """An encoder that dies after so many pictures."""
    left = [after]

    def encode(images):
        left[0] -= len(images)
        if left[0] < 0:
            raise KilledError
        return autoencoder.moments(images)

    return encode


def test_a_killed_caching_goes_on_shard_by_shard(pictures, deterministic, tmp_path):
    with pytest.raises(KilledError):
        cache(pictures, tmp_path / "a", deterministic, encode=dying(deterministic, 15))
    first = (tmp_path / "a" / "00000.tar").stat()
    assert not (tmp_path / "a" / "00001.tar").exists()
    with pytest.raises(ValueError, match="holds an unfinished set: let the command that writes it finish"):
        open_shards(str(tmp_path / "a"))
    encoded = []
    cache(pictures, tmp_path / "a", deterministic, encode=lambda x: encoded.append(len(x)) or deterministic.moments(x))
    assert sum(encoded) == 16
    assert (tmp_path / "a" / "00000.tar").stat() == first
    assert cache(pictures, tmp_path / "a", deterministic, encode=dying(deterministic, 0)).complete  # nothing to do
    cache(pictures, tmp_path / "b", deterministic)
    for path in (tmp_path / "b").iterdir():
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "a").iterdir())) == 4


def test_a_damaged_shard_is_made_again(pictures, deterministic, tmp_path):
    whole = cache(pictures, tmp_path, deterministic)
    (tmp_path / "00001.tar").write_bytes(b"half")
    assert cache(pictures, tmp_path, deterministic, encode=dying(deterministic, 8)) == whole
    assert len(samples_of(tmp_path)) == 24


@pytest.mark.parametrize("count", [2, 3, 5])
def test_parts_together_make_the_set_whichever_ends_last(pictures, deterministic, tmp_path, count):
    whole = cache(pictures, tmp_path / "whole", deterministic)
    for order in (range(count), reversed(range(count))):
        shutil.rmtree(tmp_path / "parts", ignore_errors=True)
        done = [cache(pictures, tmp_path / "parts", deterministic, part=(i, count)) for i in order]
        complete = [manifest.complete for manifest in done]
        assert complete[-1]
        assert not all(complete) or count > 3  # parts without a shard may begin when all is done
        assert done[-1] == Manifest.load(tmp_path / "parts") == whole
        assert len(list((tmp_path / "parts").iterdir())) == 4


def test_parts_at_once(pictures, deterministic, tmp_path):
    whole = cache(pictures, tmp_path / "whole", deterministic)
    for attempt in range(5):
        out = tmp_path / str(attempt)
        gate = threading.Barrier(3)

        def encode(images, gate=gate):
            if len(images) == 3:  # the last of a shard: all three end together
                gate.wait(30)
            return deterministic.moments(images)

        def part(i, out=out, encode=encode):
            return cache(pictures, out, deterministic, encode=encode, part=(i, 3))

        with ThreadPoolExecutor(3) as pool:
            assert any(manifest == whole for manifest in pool.map(part, range(3)))
        assert Manifest.load(out) == whole
        assert len(samples_of(out)) == 24


@pytest.mark.slow
def test_two_ranks_of_torchrun_share_the_shards(pictures, random_family, tmp_path):
    options = [str(pictures), "--out", str(tmp_path / "out"), "--vae", str(random_family / "vae"), "--device", "cpu"]
    command = [sys.executable, "-m", "icd_lightning.commands.main", "data", "cache-latents", *options]
    with ExitStack() as both:
        ranks = [
            both.enter_context(
                running(
                    command,
                    env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in range(2)
        ]
        said = [process.communicate(timeout=200)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert any("24 pictures in 3 shards" in text for text in said)
    assert len(samples_of(tmp_path / "out")) == 24


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_other_parameters_are_refused(pictures, deterministic, with_posterior, tmp_path):
    cache(pictures, tmp_path, deterministic)
    changes = [
        {"decoder": SampleDecoder(32)},
        {"decoder": SampleDecoder(64, min_size=0)},
        {"decoder": SampleDecoder(64, "title")},
        {"decoder": SampleDecoder(64, buckets=True)},
    ]
    for options in changes:
        with pytest.raises(ValueError, match=r"holds another set .* pass --overwrite"):
            cache(pictures, tmp_path, deterministic, **options)
    with pytest.raises(ValueError, match=f"{deterministic.fingerprint}.* not .*{with_posterior.fingerprint}"):
        cache(pictures, tmp_path, with_posterior)
    other = write_scenes(tmp_path / "other", 24, seed=1)
    with pytest.raises(ValueError, match=r"00000\.tar has changed since its latents were made: .* pass --overwrite"):
        cache(other, tmp_path, deterministic)
    with pytest.raises(ValueError, match=f"remove what other parts write: remove {tmp_path} before you start them"):
        cache(pictures, tmp_path, with_posterior, overwrite=True, part=(0, 2))
    cache(pictures, tmp_path, with_posterior, overwrite=True)
    assert moments_of(tmp_path, 4).shape[1] == 8


def test_overwriting_forgets_what_an_interrupted_caching_finished(pictures, deterministic, tmp_path):
    with pytest.raises(KilledError):
        cache(pictures, tmp_path, deterministic, encode=dying(deterministic, 23))
    manifest = cache(pictures / "00000.tar", tmp_path, deterministic, overwrite=True)
    assert list(manifest.shards) == ["00000.tar"]
    assert len(samples_of(tmp_path)) == 8


def test_what_cannot_be_cached_is_refused(pictures, deterministic, tmp_path):
    caching = Caching(Encoders("", None), SampleDecoder(64))
    cache(pictures, tmp_path / "latents", deterministic)
    with pytest.raises(ValueError, match=r"00000.tar holds latents already: name shards of pictures"):
        cache(tmp_path / "latents", tmp_path / "again", deterministic)
    shutil.copytree(pictures, tmp_path / "bare")
    (tmp_path / "bare" / MANIFEST).unlink()
    with pytest.raises(ValueError, match="holds shards without a manifest"):
        cache(pictures, tmp_path / "bare", deterministic)
    shutil.copytree(pictures, tmp_path / "same")
    with pytest.raises(ValueError, match=r"two shards are named 00000.tar"):
        cache_latents([str(pictures), str(tmp_path / "same")], tmp_path / "x", caching)
    with pytest.raises(ValueError, match=r"must end with the name of a \.tar"):
        cache_latents(f"pipe:cat {pictures}/00000.tar | cat", tmp_path / "x", caching)
    for factor, what in ((1e9, "too large for float16, in which they are kept"), (float("nan"), "not finite")):
        with pytest.raises(ValueError, match=f"gives latents that are {what}, near 0000.: take another encoder, or tr"):
            cache(pictures, tmp_path / "x", deterministic, encode=lambda x, f=factor: deterministic.moments(x) * f)


def test_a_remote_shard_cut_off_is_left_for_another_time(pictures, deterministic, tmp_path):
    def urls(last: str) -> list[str]:
        return [f"pipe:true; cat {pictures}/00000.tar", f"pipe:{last} {pictures}/00001.tar"]

    def run(last: str) -> Manifest:
        return cache_latents(urls(last), tmp_path, Caching(Encoders("x", deterministic.moments), SampleDecoder(64)))

    with pytest.raises(
        ValueError, match=r"cannot be read to their end \(pipe:head -c 9000 .*00001\.tar\): write or copy"
    ):
        run("head -c 9000")
    assert not Manifest.load(tmp_path).complete
    assert [path.name for path in tmp_path.glob("*.tar")] == ["00000.tar"]
    manifest = run("cat")
    assert manifest.complete
    assert [record.samples for record in manifest.shards.values()] == [8, 8]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latents(pictures, random_family, tmp_path_factory) -> Path:
    """The pictures as latents of the random family."""
    out = tmp_path_factory.mktemp("latents")
    command(str(pictures), out=str(out), vae=str(random_family / "vae"), device="cpu")
    return out


def trained(task, folder: Path, tmp_path, **options) -> list[float]:
    losses = Losses()
    trainer_for(tmp_path, callbacks=[losses], **options).fit(task, datamodule=scenes_data(folder))
    return losses.values


def test_training_on_latents_is_training_on_pictures(pictures, latents, random_family, tmp_path):
    on_pictures, on_latents = (
        trained(distillation(random_family, students=FEW), folder, tmp_path, max_steps=3)
        for folder in (pictures, latents)
    )
    assert on_latents == pytest.approx(on_pictures, rel=2e-3)
    assert len(set(on_latents)) == 3


class Recorder(lightning.LightningModule):
    """Remembers the moments it was shown, and dies before step `stop_at`."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.stop_at, self.seen = stop_at, []

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.stop_at:
            raise KilledError
        self.seen.append(batch.moments.sum().item())
        return (batch.moments.mean() - self.weight).square()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_training_goes_on_with_the_latents_of_an_unbroken_one(latents, tmp_path, num_workers):
    def fit(module: Recorder, **options) -> Recorder:
        save = ModelCheckpoint(tmp_path, filename="died", every_n_train_steps=999, save_on_exception=True)
        trainer = trainer_for(tmp_path, callbacks=[save], max_epochs=2, enable_checkpointing=True)
        trainer.fit(module, datamodule=scenes_data(latents, num_workers=num_workers), **options)
        return module

    whole, died = fit(Recorder()), Recorder(stop_at=17)
    with pytest.raises(KilledError):
        fit(died)
    resumed = fit(Recorder(), ckpt_path=tmp_path / "died.ckpt")
    assert died.seen + resumed.seen == whole.seen
    assert len(set(whole.seen)) > 20  # two latents may meet twice


def test_latents_of_another_autoencoder_are_refused(latents, random_family, tmp_path):
    shutil.copytree(random_family, tmp_path / "family")
    torch.manual_seed(7)
    AutoencoderDC.from_config(VAE).save_pretrained(tmp_path / "family" / "vae")
    with pytest.raises(ValueError, match=r"latents were encoded by autoencoder \w{16}, but this family's is \w{16}"):
        trained(distillation(tmp_path / "family", students=FEW), latents, tmp_path, max_steps=1)


def test_another_resolution_is_refused_and_says_which(latents):
    with pytest.raises(
        ValueError, match=r"encoded at 64 pixels, not 32 pixels\); give the resolution and buckets that"
    ):
        scenes_data(latents, resolution=32).setup("fit")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_pictures_and_latents_do_not_mix(pictures, latents, num_workers):
    data = scenes_data(pictures, num_workers=num_workers)
    data.urls = [str(pictures), str(latents)]
    with pytest.raises(NothingToReadError, match="some shards hold pictures and some hold latents"):
        data.setup("fit")
    data.verify, data.batches_per_epoch = "off", 12  # without an index it is found on the way
    data.setup("fit")
    with pytest.raises(NothingToReadError, match="some shards hold pictures and some hold latents"):
        list(data.train_dataloader())
    data.teardown()
    data.teardown()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s | {MOMENTS: s[MOMENTS][:300]}, "corrupt_latents"),
        (lambda s: s | {MOMENTS: b""}, "corrupt_latents"),
        (lambda s: s | {"json": b"{}"}, "corrupt_latents"),
        (lambda s: s | {"json": s["json"].replace(b"crop_top_left", b"crop")}, "corrupt_latents"),
        (lambda s: s | {"json": s["json"].replace(b'"resolution":64', b'"resolution":32')}, "wrong_resolution"),
    ],
)
def test_damaged_latents_are_skipped_and_counted(latents, tmp_path, change, reason):
    assert skips_damaged(latents, tmp_path, change, reason)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(pictures, random_family, tmp_path, capsys):
    options = {"out": str(tmp_path / "out"), "vae": str(random_family / "vae"), "device": "cpu"}
    command(str(pictures), **options, part="1/2")
    assert f"part 1/2 is done; {tmp_path}/out holds 1 shard and is complete once" in capsys.readouterr().out
    command(str(pictures), **options, part="0/2")
    command(str(pictures), **options)
    assert capsys.readouterr().out.count("the latents of 24 pictures in 3 shards") == 2
    describe(options["out"])
    assert "24 moments.npy" in capsys.readouterr().out
    for part in ("2/2", "1", "-1/2", "a/b", "0/0"):
        with pytest.raises(ValueError, match=f"part '{part}' must be as in 0/8"):
            command(str(pictures), **options, part=part)
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        command(str(pictures), **options, batch_size=0)
    assert not (tmp_path / "out" / PROGRESS).exists()
