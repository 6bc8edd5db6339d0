"""`icd`: one entry point. Each command's module is imported only when it is called, so that help is instant."""

from __future__ import annotations

import importlib
import logging
import os
import re
import signal
import sys
from typing import NoReturn

from icd_lightning import trust
from icd_lightning.commands.guide import GUIDES
from icd_lightning.texts import printable

# Read when torch is imported. Where cores are busy, its threads wait for each other 100 times as long as they work,
# unless they soon stop to spin; who says otherwise is heard.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

COMMANDS: dict[str, tuple[str, str]] = {  # a function of a module beside this one, and what it is for
    "fit": ("fit:run", "train: icd fit --config conf/base.yaml --config conf/model/tiny.yaml"),
    "validate": ("fit:run", "run a task's validation"),
    "test": ("fit:run", "run a task's test"),
    "edit": ("pictures:edit", "edit a picture: icd edit photo.png --source '...' --target '...'"),
    "invert": ("pictures:invert", "encode a picture to noise, and check what comes back"),
    "generate": ("pictures:generate", "make a picture from a prompt"),
    "app": ("app:app", "edit pictures in a browser"),
    "models": ("hub:models", "list the released weights: students and UNets for SD1.5 and SDXL"),
    "memory": ("hub:memory", "count the bytes of a model's weights, whole and in fewer bits, by its configs"),
    "download": ("hub:download", "fetch released weights: icd download icd-sd15"),
    "push": ("hub:push", "upload a run's students to the Hugging Face hub"),
    "data shapes": ("data:shapes", "write shards of procedural captioned pictures"),
    "data cache-latents": ("data:cache_latents", "encode shards of pictures once, to train without an encoder"),
    "data curate": ("data:curate", "choose pairs by a recipe, and write them as shards"),
    "data report": ("data:report", "show what was kept and dropped"),
    "data index": ("data:index", "index shards, once, for training on them"),
    "data describe": ("data:describe", "count and check shards"),
    "eval": ("evaluate:evaluate", "measure methods: to noise and back, generation, edits"),
    "study create": ("app:create", "make a blinded study of which edits people prefer"),
    "study serve": ("app:serve", "let assessors vote, in their browsers"),
    "study report": ("app:report", "count the votes: preferences with intervals, agreement"),
    "ablations": ("ablations:ablations", "train and measure the paper's ablations A to K"),
    "condense": ("evaluate:condense", "of results, keep what the notebooks read"),
    "demo": ("tiny:demo", "the whole method on this machine, in minutes, with a report"),
    "tiny report": ("tiny:report", "measure the shipped tiny family against its bars"),
    "tiny jumps": ("tiny:jumps", "what distillation is for: 1 to 4 jumps, trained beside untrained"),
    "tiny package": ("tiny:package", "turn the trained parts into the family that ships"),
}
TRUSTING = ("--trust-config", "--trust_config")


def main(args: list[str] | None = None) -> None:
    """Run one command; a user's mistake ends with one line on stderr and exit code 2."""
    args = sys.argv[1:] if args is None else list(args)
    words = [word for word in args if word not in TRUSTING]
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(help_text())
        return
    if words[0] == "--version":
        from icd_lightning import __version__

        sys.stdout.write(f"icd {__version__}\n")
        return
    name, rest = _split(words)
    if name in GUIDES and {"-h", "--help"} & set(rest):
        sys.stdout.write(GUIDES[name])
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_Console()])
    for library in ("httpx", "httpx2"):  # of which the hub's library takes one; they log every request
        logging.getLogger(library).setLevel(logging.WARNING)
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        trust.begin(trusted=words != args)
        _run(name, rest)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if os.environ.get("ICD_TRACEBACK") or (message := _told(error)) is None:
            raise
        fail(message)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: object) -> NoReturn:
    """End as Ctrl-C does, what is half done being removed, with the exit code that schedulers expect."""
    raise SystemExit(128 + number)


def _told(error: Exception) -> str | None:
    """What to say of a user's mistake, or of full memory; None of a mistake of ours."""
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    text = str(error).lower()  # torch's error of a GPU has a class, its allocator's for the processor has none
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return f"memory is full ({str(error).split('. ')[0]}): take smaller pictures or batches, or half precision"
    return None


class _Console(logging.StreamHandler):
    """Writes to what sys.stderr is at the time: a progress bar, while it is drawn, puts itself there."""

    stream = property(lambda self: sys.stderr, lambda self, stream: None)

    def format(self, record: logging.LogRecord) -> str:
        """Its lines, without what would control the terminal in names and texts of others."""
        return "\n".join(map(printable, super().format(record).splitlines()))


NOISE = re.compile(
    r"Subtypes: |Errors:|Given value type|Given value: (Namespace|\{)|Does not validate against any|"
    r"Expected a <class 'NoneType'>"
)
"""Lines of jsonargparse's reports about the shape of the schema, not about what was wrong."""


def fail(message: str) -> NoReturn:
    """Say what is wrong in one line and exit with code 2."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    causes = [line for line in lines if not NOISE.match(line)] or lines
    text = "; ".join(dict.fromkeys(causes)).replace(":; ", ": ")
    text = re.sub(r'^Parser key "([^"]+)": *', r"\1: ", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    sys.stderr.write(f"icd: error: {printable(text)}\n")
    raise SystemExit(2)


def help_text() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items())
    return (
        "usage: icd COMMAND [options]\n\n"
        "Invertible Consistency Distillation: generate in 3-4 steps, invert in 3-4 steps, edit pictures by prompt.\n\n"
        f"{rows}\n\n"
        "`icd COMMAND --help` explains one. ICD_TRACEBACK=1 shows where an error came from. Configurations may name\n"
        "parts of this package and of Lightning alone; `icd --trust-config COMMAND` lets them name any, and commands.\n"
    )


def _split(args: list[str]) -> tuple[str, list[str]]:
    if args[0].startswith("-"):
        fail(f"{args[0]} comes before the command; write `icd COMMAND {args[0]} ...`")
    for words in (2, 1):
        name = " ".join(args[:words])
        if name in COMMANDS:
            return name, args[words:]
    group = {name: line for name, (_, line) in COMMANDS.items() if name.startswith(f"{args[0]} ")}
    if not group:
        fail(f"no command {args[0]!r}; there is: {', '.join(COMMANDS)}")
    if args[1:] and args[1] not in ("-h", "--help"):
        fail(f"no command 'icd {args[0]} {args[1]}'; there is: {', '.join(name.split()[1] for name in group)}")
    sys.stdout.write("".join(f"icd {name}: {line}\n" for name, line in group.items()))
    raise SystemExit(0)


def _run(name: str, args: list[str]) -> None:
    module, _, attribute = COMMANDS[name][0].partition(":")
    function = getattr(importlib.import_module(f"icd_lightning.commands.{module}"), attribute)
    if name in GUIDES:  # LightningCLI parses by itself
        function([name, *("--help" if word == "--help_all" else word for word in args)])
        return
    from icd_lightning.commands.parsing import call

    call(function, name, args)


if __name__ == "__main__":
    main()
