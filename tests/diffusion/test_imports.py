import ast
import sys
from pathlib import Path

import pytest

from icd_lightning import diffusion

FOLDER = Path(diffusion.__file__).parent


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_the_mathematics_imports_torch_and_the_standard_library_only(path: Path):
    allowed = {"torch", "icd_lightning.diffusion", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] in allowed or name.startswith("icd_lightning.diffusion"), f"imports {name}"
