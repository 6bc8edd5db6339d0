from pathlib import Path

import pytest


@pytest.fixture
def metrics_home(tmp_path, monkeypatch) -> Path:
    """An ICD_METRICS_HOME, and caches with nothing in them."""
    monkeypatch.setenv("ICD_METRICS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"
