"""`icd app`: the web editor; `icd study create | serve | report`: which of two edits people prefer."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any

from icd_lightning.apps.listening import listen
from icd_lightning.commands.weights import Weights, find_device

log = logging.getLogger(__name__)


def app(*, host: str = "127.0.0.1", port: int | None = None, **options: Any) -> None:
    """Edit pictures in a browser, with any model: a server that goes on until Ctrl-C.

    icd app
    icd app --port 7870 --model SD15_FOLDER --guided_unet sd15_cfg_distill.pt \\
      --forward iCD-SD15-forward_19_259_519_779.safetensors --reverse iCD-SD15-reverse_259_519_779_999.safetensors

    Nobody signs in: whoever reaches the address uses this machine. It sends nothing to anybody else.

    Args:
        host: Address to listen at; 127.0.0.1 is for this machine alone, 0.0.0.0 for all that reach it.
        port: Port to listen at; by default, or with 0, the first free one from 7860 on.
    """
    weights = Weights(**options)
    listen(host, port or 0).close()
    if find_spec("gradio") is None:
        raise ValueError("icd app needs gradio, which is not installed: pip install '.[app]' in the repository")
    from icd_lightning.apps.editor.page import EditorPage
    from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline

    students = {name: getattr(weights, name) for name in ("forward", "reverse", "boundaries", "lora_alpha")}
    pipe = InvertibleConsistencyPipeline.from_pretrained(weights.family(), **students)
    page = EditorPage(pipe.to(find_device(weights.device)))
    _, address, _ = page.launch(server_name=host, server_port=port or None, prevent_thread_lock=True)
    log.info("%s (Ctrl-C ends it)", address)
    try:
        wait()
    finally:
        page.close(verbose=False)  # which removes the pictures that were sent


def wait() -> None:
    Event().wait()


def create(
    *results: str,
    out: str = "outputs/study",
    folders: list[str] | None = None,
    methods: str | None = None,
    votes: int = 3,
    check_share: float = 0.1,
    seed: int = 0,
    title: str = "Which edit is better?",
    overwrite: bool = False,
) -> None:
    """Make a study of edits by several methods: blinded tasks, two edits of a picture side by side, in a folder.

    icd study create outputs/eval-piebench outputs/eval-coco_edit --methods icd_p2p,nti_pie,ddim_p2p
    icd study create edits.csv --folders ours=results/icd theirs=results/nti

    Of results of icd eval --benchmark piebench, coco_edit or tiny_edit the edits of each method's first setting are
    compared; run it where icd eval ran, whose data are read again. A table has columns image and target, and if you
    like source, reference (the right result), kind and output (the edit's name in each folder, by default that of the
    picture, or as icd edit calls it). The centre of each picture is cut out, a square. With several methods each two of
    them are compared. Checks are tasks with an obvious answer: an edit beside noise, or beside another picture.

    Args:
        results: Folders of icd eval, or their summaries (.json); or tables of edits (.csv), with --folders.
        out: Folder of the study: study.sqlite and pictures/, which is all that icd study serve needs.
        folders: A NAME=FOLDER for each method whose pictures the tables' edits are.
        methods: Comma-separated names of the methods to compare; by default all.
        votes: Votes wanted for each two edits, of as many assessors.
        check_share: Share of checks among the tasks of an assessor, 0 for none.
        seed: Of the order of tasks, of sides and of checks.
        title: What the pages are called.
        overwrite: Replace a study that has no votes.
    """
    from icd_lightning.apps.study.create import check_free, create_study
    from icd_lightning.apps.study.edits import read_edits
    from icd_lightning.apps.study.store import Plan
    from icd_lightning.commands.evaluate import names

    plan, folder = Plan(votes, check_share, seed, title), Path(out)
    check_free(folder, overwrite=overwrite)
    pairs, checks = create_study(read_edits(results, folders or [], names(methods)), plan, folder, overwrite=overwrite)
    log.info("%s: %d pairs of edits, %d checks; icd study serve %s", folder, pairs, checks, folder)


def serve(study: str, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a study to any number of assessors at once; votes are on the disk before they are answered.

    icd study serve outputs/study                                       on this machine alone
    icd study serve outputs/study --host 0.0.0.0 --port 8080            to whoever reaches this machine

    Whoever opens the address and begins gets a link of their own, to go on later. Each pair of edits gets its votes
    evenly, and nobody sees one twice. Keys: left, right, down for no difference. Started again after any end, it goes
    on with all votes. Before the open internet put a server with HTTPS and a limit of requests.

    Args:
        study: Folder that icd study create wrote.
        host: Address to listen at.
        port: Port to listen at, 0 for any that is free.
    """
    try:
        from icd_lightning.apps.study.server import serve
    except ImportError as error:
        raise ValueError(f"icd study serve needs more ({error}): pip install '.[app]' in the repository") from error

    serve(Path(study), host, port)


def report(study: str, *, out: str | None = None, min_passed: float = 0.75) -> None:
    """Count a study's votes: preferences with 95 % intervals, by benchmark and type of edit, and agreement.

    icd study report outputs/study

    Writes preferences.md, .csv and .png, report.html and report.png. May be run while the study is served.

    Args:
        study: Folder that icd study create wrote.
        out: Folder to write to, by default report in the study's.
        min_passed: Leave out assessors who passed a smaller share of the checks that they answered, and, if the study
            has checks, those who answered none.
    """
    from icd_lightning.apps.study.report import evaluate, write_outcome

    outcome, folder = evaluate(Path(study), min_passed), Path(out) if out else Path(study) / "report"
    facts = {
        "study": study,
        "min_passed": f"{min_passed:g}",
        **{name: str(value) for name, value in vars(outcome.plan).items() if name != "title"},
    }
    for path in write_outcome(outcome, folder, facts):
        log.info("%s", path)
