"""A torchvision built for CUDA can be imported beside a CPU torch, after icd_lightning, in a process of its own."""

import subprocess
import sys

FINDERS = "sum(type(finder).__name__ == '_DeclareOpsBeforeImport' for finder in sys.meta_path)"


def python(*lines: str) -> list[str]:
    """Run lines in a fresh interpreter; the lines that they print."""
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_the_package_is_light():
    """No torch, no torchvision: the operators are declared at the first import of torchvision."""
    assert python(
        "import sys, icd_lightning",
        f"print({FINDERS}, {{'torch', 'torchvision', 'diffusers', 'lightning'}} & set(sys.modules))",
    ) == ["1 set()"]


def test_torchvision_works_after_icd_lightning_however_often_it_is_installed():
    """Also where another library has asked whether torchvision is there without importing it, as transformers does."""
    assert python(
        "import importlib.util, sys",
        "from pathlib import Path",
        "from icd_lightning import _torchvision",
        "_torchvision.install()",
        f"print({FINDERS})",
        "importlib.util.find_spec('torchvision')",
        "_torchvision.install()",
        "import torch, torchvision",
        "_torchvision.install()",
        f"print({FINDERS})",
        "_torchvision.declare_missing_ops(Path(torchvision.__file__).parent)",
        "from torchvision.transforms.functional import resize",
        "print(tuple(resize(torch.zeros(3, 8, 8), [4, 4]).shape), hasattr(torch.ops.torchvision, 'nms'))",
    ) == ["1", "0", "(3, 4, 4) True"]
