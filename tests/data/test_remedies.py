"""What a message tells the user to do is done here, and then it works."""

import bz2
import gzip
import lzma
import re
import subprocess

import pytest
from recorder_case import Recorder, data_for, trained, trainer_for
from shards_case import cut_after, files_of, numbered_samples, write_files

from icd_lightning.commands.data import describe
from icd_lightning.data.manifest import MANIFEST, Manifest
from icd_lightning.data.shards import find_shards, open_shards, write_shards

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")
ALL = list(range(16))


def refusal(call, *args, **options) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def command_in(message: str, **words: str) -> str:
    (command,) = re.findall("`([^`]*)`", message)
    for word, value in words.items():
        command = re.sub(rf"\b{word}\b", value, command)
    return command


@pytest.fixture
def bare(tmp_path):
    """A folder for a tar without manifest, and the (name, content) of 16 samples' files to put there."""
    (tmp_path / "set").mkdir()
    return tmp_path / "set", files_of(numbered_samples(16))


# --- tars -------------------------------------------------------------------------------------------------------------


def test_an_unsorted_tar_is_sorted(bare, tmp_path):
    folder, files = bare
    tar = write_files(folder / "00000.tar", sorted(files, key=lambda file: file[0].partition(".")[2]))
    for call in (lambda: trained(folder, tmp_path), lambda: describe(str(folder))):
        message = refusal(call)
    assert str(tar) in message
    subprocess.run(command_in(message, TAR=str(tar), DIR=str(tmp_path / "unpacked")), shell=True, check=True)
    describe(str(folder))
    assert trained(folder, tmp_path, batch_size=4) == ALL


@pytest.mark.parametrize(("pack", "tool"), [(gzip, "gzip"), (bz2, "bzip2"), (lzma, "xz")])
@pytest.mark.parametrize("name", ["00000.tar.packed", "00000.tar", "a b.tar.packed"])
def test_a_compressed_tar_is_unpacked(bare, tmp_path, pack, tool, name):
    folder, files = bare
    tar = write_files(folder / name, files)
    tar.write_bytes(pack.compress(tar.read_bytes()))
    for call in (lambda: trained(folder, tmp_path), lambda: describe(str(folder))):
        message = refusal(call)
    assert f"{tar} is compressed" in message
    subprocess.run(command_in(message), shell=True, check=True)
    describe(str(folder))
    assert trained(folder, tmp_path, batch_size=4) == ALL


def test_dots_in_names_are_taken_out(bare, tmp_path):
    folder, files = bare
    write_files(folder / "00000.tar", [(f"IMG_2023.{name}", data) for name, data in files])
    rule = "a key ends at its first dot: rename the files so that only the extension follows a dot"
    assert rule in refusal(describe, str(folder))
    assert rule in refusal(trained, folder, tmp_path, batch_size=1)
    write_files(folder / "00000.tar", files)
    assert trained(folder, tmp_path, batch_size=4) == ALL


def test_a_name_twice_is_two_samples_for_all_and_described(bare, tmp_path):
    folder, files = bare
    write_files(folder / "00000.tar", [*files, *files[:3]])
    assert "00000 comes 2 times, each time as a sample of its own" in refusal(describe, str(folder))
    module, data = Recorder(), data_for(folder, batch_size=1, val_urls=str(folder), val_batch_size=17)
    trainer_for(tmp_path, max_epochs=1).fit(module, datamodule=data)
    assert (
        sorted(number for batch in module.trained for number in batch) == sorted(module.validated) == sorted([*ALL, 0])
    )


def test_describe_fails_on_samples_that_lack_a_picture_or_a_caption(bare):
    folder, files = bare
    write_files(folder / "00000.tar", [f for f in files if f[0].endswith("png")])
    write_files(folder / "00001.tar", [f for f in files if f[0].endswith("txt")][:2])
    message = refusal(describe, str(folder))
    assert "00000.tar: 16 of 16 samples have no caption (00000 has png)" in message
    assert "00001.tar: 2 of 2 samples have no picture (00000 has txt)" in message


def test_an_unreadable_manifest_is_removed_and_a_damaged_set_read_as_it_is(shards, tmp_path):
    cut_after(shards / "00002.tar", 7)
    assert "give verify=off and batches_per_epoch to read them as they are" in refusal(trained, shards, tmp_path)
    kept = [n for n in range(60) if n not in (27, 28, 29)]
    assert set(trained(shards, tmp_path, verify="off", batches_per_epoch=24)) == set(kept)
    (shards / MANIFEST).write_text("{}")
    assert "remove it" in refusal(trained, shards, tmp_path)
    (shards / MANIFEST).unlink()
    assert set(trained(shards, tmp_path, batch_size=1)) == set(kept)


def test_a_set_is_made_again_where_it_is_allowed(shards, tmp_path):
    options = {"shard_size": 5, "parameters": {"seed": 1}}
    message = refusal(write_shards, numbered_samples(5), shards, **options)
    assert message.endswith("choose another folder or pass --overwrite")
    assert write_shards(numbered_samples(5), tmp_path / "another", **options).samples == 5
    assert write_shards(numbered_samples(5), shards, **options, overwrite=True) == Manifest.load(shards)


def test_urls_are_named_once_and_locally(shards):
    names = [str(shards / "00000.tar")] * 2
    assert "name each shard once" in refusal(find_shards, names)
    assert len(open_shards(names[:1])) == 1
    assert "copy it to this machine" in refusal(describe, f"pipe:cat {names[0]}")
    assert "copy it to a local file" in refusal(data_for(shards, val_urls=f"pipe:cat {names[0]}").setup, "fit")


# --- samples ----------------------------------------------------------------------------------------------------------


def test_captions_are_found_in_the_field_that_is_named(tmp_path):
    samples = [{k: v for k, v in sample.items() if k != "txt"} for sample in numbered_samples(16)]
    write_shards(samples, tmp_path / "set", shard_size=8, parameters={})
    for options in ({}, {"caption_field": "caption"}):
        message = refusal(trained, tmp_path / "set", tmp_path, **options)
        assert message.endswith("give a caption_field that their json files have (title)")
    data = data_for(tmp_path / "set", caption_field="title")
    data.setup("fit")
    assert next(iter(data.train_dataloader())).captions[0].startswith("title ")


@pytest.mark.parametrize("extension", ["txt", "caption"])
def test_captions_are_put_beside_the_pictures(bare, tmp_path, extension):
    folder, files = bare
    pictures = [file for file in files if file[0].endswith("png")]
    write_files(folder / "00000.tar", pictures)
    assert "give each a txt or caption file of the same key, next to it" in refusal(trained, folder, tmp_path)
    captions = [(f"{name[:5]}.{extension}", f"picture {int(name[:5])}".encode()) for name, _ in pictures]
    json = [file for file in files if file[0].endswith("json")]
    write_files(folder / "00000.tar", sorted([*pictures, *captions, *json]))
    assert trained(folder, tmp_path, batch_size=4) == ALL


def test_caption_field_is_left_out(bare, tmp_path):
    folder, files = bare
    write_files(folder / "00000.tar", [(name, b'{"number": %d}' % int(name[:5]) if name.endswith("json") else data)
                                       for name, data in files])  # fmt: skip
    message = refusal(trained, folder, tmp_path, caption_field="title")
    assert "leave out caption_field to take captions from txt or caption files" in message
    assert trained(folder, tmp_path, batch_size=4) == ALL


def test_small_pictures_are_taken_as_the_message_says(shards, tmp_path):
    assert "lower resolution, or give min_size=0 to enlarge them" in refusal(trained, shards, tmp_path, resolution=16)
    assert "lower min_size, or give min_size=0" in refusal(trained, shards, tmp_path, min_size=10)
    for options in ({"resolution": 8}, {"resolution": 16, "min_size": 0}, {"min_size": 8}):
        assert trained(shards, tmp_path, **options) == list(range(60))


def test_the_limit_of_lost_samples_is_lifted(tmp_path, monkeypatch):
    monkeypatch.setattr("icd_lightning.data.tally.MIN_READ", 40)
    samples = [sample | ({"png": b"?"} if number % 3 else {}) for number, sample in enumerate(numbered_samples(60))]
    write_shards(samples, tmp_path / "set", shard_size=10, parameters={})
    assert "more than max_skipped 0.5 allows" in refusal(trained, tmp_path / "set", tmp_path)
    assert set(trained(tmp_path / "set", tmp_path, max_skipped=1.0)) <= set(range(0, 60, 3))


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_what_is_too_large_is_lowered(shards, tmp_path):
    assert "lower batch_size to at most 60" in refusal(trained, shards, tmp_path, batch_size=61)
    assert trained(shards, tmp_path, batch_size=60) == list(range(60))
    pipes = {"urls": [f"pipe:cat {shards}/{n:05d}.tar" for n in range(6)], "tmp_path": tmp_path}
    assert "give batches_per_epoch" in refusal(trained, **pipes)
    message = refusal(trained, **pipes, batches_per_epoch=12, num_workers=7)
    assert "6 uncounted shards, too few for 7 readers (1 ranks x 7 workers); give a lower num_workers" in message
    assert set(trained(**pipes, batches_per_epoch=12, num_workers=2)) == set(range(60))


def test_too_few_samples_for_the_devices_need_fewer_devices(tmp_path):
    write_shards(numbered_samples(1), tmp_path / "set", shard_size=1, parameters={})
    options = {"batch_size": 1, "num_workers": 1}
    trainer = trainer_for(tmp_path, devices=2, strategy="ddp_fork", max_epochs=1)
    with pytest.raises(
        Exception, match=r"1 samples, too few for one batch of 1 on each of 2 ranks; take fewer devices"
    ):
        trainer.fit(Recorder(), datamodule=data_for(tmp_path / "set", **options))
    assert trained(tmp_path / "set", tmp_path, **options) == [0]


def test_a_resolution_for_buckets_is_a_multiple_of_the_step():
    message = refusal(data_for, "shards", resolution=100, buckets=True)
    (step,) = re.findall(r"must be a multiple of (\d+)", message)
    data_for("shards", resolution=100 // int(step) * int(step), buckets=True)
