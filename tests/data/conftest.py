from pathlib import Path

import pytest
from shards_case import numbered_samples

from icd_lightning.data.shards import write_shards


@pytest.fixture
def shards(tmp_path) -> Path:
    """60 samples in 6 shards, with a manifest."""
    write_shards(numbered_samples(60), tmp_path / "shards", shard_size=10, parameters={"seed": 0})
    return tmp_path / "shards"
