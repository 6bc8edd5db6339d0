"""A frozen base in fewer bits: students are nearly those of the whole one, and get their gradients."""

import pytest
import torch

from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.models.family import Family
from icd_lightning.models.quantization import KINDS, bytes_of, quantize
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::DeprecationWarning")
pytest.importorskip("torchao")


def students_on(model: str, quantization: str | None) -> LoraStudents:
    torch.manual_seed(0)
    family = Family(model, quantization=quantization)
    students = [str(family.root / "students" / direction) for direction in DIRECTIONS]
    paths = dict(zip(DIRECTIONS, students, strict=True))
    return LoraStudents(family.load_model(guided=True), lora=LoraSettings(rank=16, alpha=16), **paths)


def outputs_and_gradients(model: str, students: LoraStudents) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    told = (
        torch.randn(4, 16, 8, 8),
        torch.tensor([259, 519, 779, 999]),
        Family(model).load_conditioner()(["a star"] * 4),
    )
    found = {}
    for direction in DIRECTIONS:
        output = students.predict(direction, *told, torch.full((4,), 3.0))
        output.square().mean().backward()
        gradients = [parameter.grad.flatten() for parameter in students.parameters_of(direction)]
        found[direction] = output.detach(), torch.cat(gradients)
    return found


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    ("model", "kind", "most"),
    [("tiny", "int8", 0.03), ("tiny", "nf4", 0.35), ("tiny_flow", "int8", 0.01), ("tiny_flow", "nf4", 0.1)],
)
def test_students_on_a_quantized_base_are_near_those_on_the_whole_one(model, kind, most):
    whole, students = students_on(model, None), students_on(model, kind)
    expected, found = outputs_and_gradients(model, whole), outputs_and_gradients(model, students)
    for direction in DIRECTIONS:
        assert all(parameter.dtype == torch.float32 for parameter in students.parameters_of(direction))
        for ours, theirs in zip(found[direction], expected[direction], strict=True):
            assert 0 < distance(ours, theirs) < most


@pytest.mark.parametrize("model", ["tiny", "tiny_flow"])
def test_pictures_of_a_quantized_family_are_near_those_of_the_whole_one(model):
    """Also where a loop would merge students into weights, which these are not."""
    pictures = [
        InvertibleConsistencyPipeline.from_pretrained(Family(model, quantization=kind))(
            "a large red star on a blue background", seed=0, output_type="pt"
        ).images
        for kind in (None, "int8", "nf4")
    ]
    psnr = [float(-10 * (one - pictures[0]).square().mean().log10()) for one in pictures[1:]]
    assert psnr[0] > 55
    assert psnr[1] > 40


def inner(weight: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a weight is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_that_are_counted_are_those_that_are_kept(kind):
    model = Family().load_model(guided=True)
    blocks, whole = model.backbone.blocks, bytes_of(model.network)
    counted = bytes_of(model.network, blocks, kind)
    quantize(model.network, blocks, kind)
    weights = [*model.network.parameters(), *model.network.buffers()]
    kept = sum(part.numel() * part.element_size() for weight in weights for part in inner(weight))
    assert counted == pytest.approx(kept, rel=0.01)
    assert counted < whole
