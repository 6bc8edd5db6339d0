"""A style merged into a network is what its LoRA is beside it."""

import pytest
import torch
from safetensors.torch import save_file

from icd_lightning.models.family import Family, parse_style
from icd_lightning.models.student_file import WEIGHTS_NAME, StudentFile, write_kohya
from icd_lightning.models.students import LoraSettings, LoraStudents

T, W = torch.tensor([259, 999]), torch.tensor([1.0, 3.0])


@pytest.fixture(scope="module")
def told(random_family):
    """x, t, conditioning and w."""
    conditioning = Family(str(random_family)).load_conditioner()(["a large red circle", "a star"])
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)), T, conditioning, W


@pytest.mark.parametrize("written", ["diffusers", pytest.param("kohya", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_merged_style_is_the_adapter(random_family, told, tmp_path, written):
    """A student's file serves as a style: alpha 8 of rank 4, so that an alpha that is lost shows."""
    folder = random_family / "students/reverse"
    students = LoraStudents(Family(str(random_family)).load_model(guided=True), lora=LoraSettings(rank=4))
    students.load("reverse", StudentFile.read(folder))
    base, expected = (students.predict(role, *told) for role in ("teacher", "reverse"))
    file = folder / WEIGHTS_NAME
    if written == "kohya":
        file = write_kohya(students.file("reverse", {}), tmp_path / "style.safetensors")
    styled = {scale: Family(str(random_family), style=f"{file}{scale}").load_model(guided=True) for scale in ("", ":0")}
    torch.testing.assert_close(styled[""].predict(*told), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(styled[":0"].predict(*told), base, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-2)
    LoraStudents(styled[""], lora=LoraSettings(rank=4))  # no adapter is left on it


@pytest.mark.parametrize("scale", ["a", "nan"])
def test_a_style_that_cannot_be_is_named(random_family, tmp_path, scale):
    file = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"other\.safetensors is no LoRA of this network"):
        Family(str(random_family), style=str(file)).load_model(guided=True)
    with pytest.raises(ValueError, match=r"must be FILE or FILE:SCALE|is not finite"):
        parse_style(f"{file}:{scale}")
    with pytest.raises(ValueError, match=r"there is no \.safetensors file .*none\.safetensors"):
        parse_style(str(tmp_path / "none.safetensors"))
