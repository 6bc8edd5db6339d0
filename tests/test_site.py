"""The documentation as a site: made of the code, whole, and in need of nothing from elsewhere."""

import functools
import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from documents_case import ROOT

import icd_lightning

FILES = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "conf").rglob("*.yaml"))


@pytest.fixture(scope="module")
def configuration() -> dict[str, set[str]]:
    """The arguments by the path of their class, as the page of configurations has them."""
    spec = importlib.util.spec_from_file_location("configuration", ROOT / "docs/hooks/configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sections = module.page().split("\n### ")[1:]
    return {re.search(r"`([\w.]+)`", text)[1]: set(re.findall(r"^\| `([\w.]+)` \|", text, re.M)) for text in sections}


def named(content) -> list[tuple[str, dict]]:
    """Each class of ours that a configuration names, with the arguments it is given."""
    if isinstance(content, list):
        return [found for one in content for found in named(one)]
    if not isinstance(content, dict):
        return []
    inner = [found for one in content.values() for found in named(one)]
    ours = str(content.get("class_path")).startswith("icd_lightning.")
    return [(content["class_path"], content.get("init_args", {})), *inner] if ours else inner


@pytest.mark.parametrize("file", FILES)
def test_all_that_a_configuration_names_is_explained(file, configuration):
    for path, given in named(yaml.safe_load((ROOT / file).read_text())):
        module, _, name = path.rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        known = configuration[f"{cls.__module__}.{cls.__qualname__}"]
        assert {argument for argument in given if argument not in known} == set()


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == icd_lightning.__version__
    assert citation["preferred-citation"]["url"].endswith("2406.14539")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as `make docs` builds it; a broken link, anchor or name ends it."""
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_asks_for_nothing_from_elsewhere(site):
    fetched = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*")
    assert [found for page in site.rglob("*.html") for found in fetched.findall(page.read_text())] == []
    assert [css for css in site.rglob("*.css") if re.search(r"url\(.?(https?:)?//|@import", css.read_text())] == []


@pytest.mark.slow
def test_every_command_and_part_has_its_place(site):
    commands = (site / "commands.html").read_text()
    assert "icd data cache-latents" in commands
    assert "--resolution" in commands
    parts = {path.parent.name for path in (ROOT / "icd_lightning").glob("*/__init__.py")}
    assert {page.stem for page in (site / "api").glob("*.html")} == parts
    assert 'id="icd_lightning.diffusion.losses.pseudo_huber"' in (site / "api/diffusion.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_the_window_and_are_found(site, browser, width):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        page, asked = browser.new_page(viewport={"width": width, "height": 900}), list[str]()
        page.on("request", lambda request: asked.append(request.url))
        for path in sorted(site.glob("*.html")):
            page.goto(f"{address}{path.name}")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name
        page.goto(f"{address}index.html?q=pseudo-Huber")
        page.wait_for_selector(".md-search-result__item", timeout=20_000)
        page.close()
        server.shutdown()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
