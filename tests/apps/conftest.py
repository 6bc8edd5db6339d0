import socket
from collections.abc import Iterator

import pytest
from editor_case import serving

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
def page(pipeline, hosts) -> Iterator:
    """The editor of the tiny family, served."""
    from icd_lightning.apps.editor.page import EditorPage  # only here: Gradio takes seconds

    with serving(EditorPage(pipeline)) as served:
        yield served
