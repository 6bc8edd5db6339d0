from pathlib import Path

import pytest
from training_case import write_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """24 captioned pictures in 3 shards."""
    return write_scenes(tmp_path_factory.mktemp("scenes"))
