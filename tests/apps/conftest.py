import shutil
import socket
from collections.abc import Iterator

import pytest
from editor_case import serving

from icd_lightning.apps.editor.page import EditorPage
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline


@pytest.fixture(scope="session")
def pipeline() -> InvertibleConsistencyPipeline:
    return InvertibleConsistencyPipeline.from_pretrained("tiny")


@pytest.fixture(scope="session")
def hosts() -> Iterator[list[str]]:
    """Every name that this process looks up, to connect to or to listen at."""
    looked_up, lookup = [], socket.getaddrinfo

    def recorded(host, *args, **options):
        looked_up.append(host)
        return lookup(host, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", recorded)
        yield looked_up


@pytest.fixture(scope="session")
def page(pipeline, hosts) -> Iterator[EditorPage]:
    """The editor of the tiny family, served."""
    with serving(EditorPage(pipeline)) as served:
        yield served


@pytest.fixture(scope="session")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"needs a browser, one of {', '.join(names)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
