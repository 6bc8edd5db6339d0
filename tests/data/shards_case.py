"""Samples that carry their number, so that a test can tell who saw which."""

import tarfile
from io import BytesIO

import numpy as np

from icd_lightning.data.batch import Batch
from icd_lightning.data.datamodule import ShardDataModule
from icd_lightning.data.shards import encode_sample, open_shards, write_shards
from icd_lightning.data.tars import index_shard


def numbered_samples(count: int, *, first: int = 0, size: int = 8, format: str = "png") -> list[dict]:
    """Samples whose key, picture, caption and metadata all carry their number."""
    return [
        encode_sample(
            f"{number:05d}",
            np.full((size, size, 3), number % 256, dtype=np.uint8),
            f"picture {number}",
            {"number": number, "title": f"title {number}"},
            format=format,
        )
        for number in range(first, first + count)
    ]


def write_files(path, files: list[tuple[str, bytes]]):
    """Write a tar of these (name, content), in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    return path


def files_of(samples: list[dict]) -> list[tuple[str, bytes]]:
    """The (name, content) of samples' files, sample by sample."""
    return [(f"{s['__key__']}.{name}", s[name]) for s in samples for name in s if name != "__key__"]


def corrupt(sample: dict) -> dict:
    """The sample with a picture whose header is good and whose pixels are not."""
    return sample | {"png": sample["png"][:41]}


def with_corrupt(folder, bad: set[int], count: int = 60):
    """Write shards of which the samples `bad` cannot be decoded."""
    samples = [corrupt(sample) if number in bad else sample for number, sample in enumerate(numbered_samples(count))]
    write_shards(samples, folder, shard_size=10, parameters={})
    return folder


def numbers(batch: Batch) -> list[int]:
    """The numbers of a batch's samples, after checking that all its parts belong together."""
    found = [int(key) for key in batch.keys]
    assert batch.captions == [f"picture {number}" for number in found]
    assert [metadata["number"] for metadata in batch.metadata] == found
    assert ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() == found
    return found


def cut_after(path, samples: int) -> None:
    """Cut a shard between two samples and end it properly: a tar that reads without error."""
    first_lost = index_shard(path)[0][samples]
    header = min(offset for offset, _ in first_lost.files.values()) - 512
    path.write_bytes(path.read_bytes()[:header] + bytes(1024))


def samples_of(folder) -> list[dict]:
    """All samples of shards that agree with their manifest, in order."""
    return [entry.read() for shard in open_shards(str(folder), verify="sha256") for entry in index_shard(shard.url)[0]]


def skips_damaged(source, folder, change, reason: str) -> bool:
    """Whether training on source's samples, of which `change` has damaged one, leaves that out and counts it so."""
    samples = [{k: v for k, v in raw.items() if k != "__url__"} for raw in samples_of(source)]
    samples[3] = change(samples[3])
    write_shards(samples, folder, shard_size=8, parameters={})
    data = ShardDataModule(str(folder), batch_size=2, resolution=64, shuffle_buffer=8)
    data.setup("fit")
    seen = {key for batch in data.train_dataloader() for key in batch.keys}
    return samples[3]["__key__"] not in seen and data.train_tally.counts()[reason] >= 1
