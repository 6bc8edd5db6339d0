"""Flow baselines equal to what their authors' code produced on a small network, which the tensors hold too."""

from dataclasses import dataclass

import pytest
import torch
from baselines_case import GivenEmbeddings
from golden_case import load_tensors
from torch import Tensor

from icd_lightning.diffusion import Flow
from icd_lightning.editing.baselines.base import Inversion
from icd_lightning.editing.baselines.fireflow import FireFlow
from icd_lightning.editing.baselines.flowedit import FlowEdit
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.baselines.rf_inversion import RFInversion
from icd_lightning.editing.baselines.rf_solver_edit import RFSolverEdit
from icd_lightning.editing.baselines.uniedit_flow import UniEditFlow
from icd_lightning.models.backbones import UNet
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.diffusion_model import DiffusionModel

SOURCE, TARGET = ["source"], ["target"]


@dataclass
class Golden:
    """The tensors, and their network: two layers at every place of the latents, told the mean, sigma, prompt and w."""

    tensors: dict[str, Tensor]

    def parts(self, shift: float = 1.0, *, takes_guidance: bool = True) -> Parts:
        """A flow model of that network."""
        process = Flow(shift=shift)

        def predict(x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
            net = {name.removeprefix("net."): tensor for name, tensor in self.tensors.items()}
            tokens = x.flatten(2).mT
            hidden = tokens @ net["mix"] + tokens.mean(1, keepdim=True) @ net["mean"] + net["place"]
            told = process.sigmas[t][:, None] * net["time"] + conditioning.tensors["prompt_embeds"] @ net["prompt"]
            if w is not None:
                told = told + w[:, None] * net["w"]
            return ((hidden + told[:, None]).tanh() @ net["out"]).mT.unflatten(2, x.shape[2:])

        embeds = {"": "empty", "source": "source", "target": "target"}
        conditioner = GivenEmbeddings({prompt: self[f"prompt.{name}"] for prompt, name in embeds.items()})
        return Parts(DiffusionModel(None, process, UNet()), None, conditioner, predict, takes_guidance)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden(load_tensors("flow_baselines.safetensors"))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [RFSolverEdit, FireFlow])
def test_solvers_up_and_down(golden, cls):
    name = "rf_solver" if cls is RFSolverEdit else "fireflow"
    method = cls(golden.parts(), num_inference_steps=5)
    inversion = method.invert_latents(golden["x0"], SOURCE)
    close(inversion.noise, golden[f"{name}.noise"])
    close(method.generate_latents(TARGET, inversion), golden[f"{name}.edited"])


def test_uniedit_flow(golden):
    method = UniEditFlow(golden.parts(3.0), num_inference_steps=10)
    inversion = method.invert_latents(golden["x0"], SOURCE)
    close(inversion.noise, golden["uniedit_flow.noise"])
    close(method.generate_latents(TARGET, inversion), golden["uniedit_flow.edited"])


def test_flowedit(golden):
    """As for FLUX.1, told w, and as for SD3, by classifier-free guidance of both prompts."""
    first, *rest = golden["flowedit.noise"]
    for takes_guidance, source_scale, scale, name in ((True, 1.5, 5.5, "edited"), (False, 3.5, 13.5, "edited_cfg")):
        parts = golden.parts(3.0, takes_guidance=takes_guidance)
        scales = {"source_guidance_scale": source_scale, "guidance_scale": scale}
        method = FlowEdit(parts, num_inference_steps=10, skip=2, **scales)
        begin = parts.model.process.add_noise(golden["x0"], first, method.steps[0][0])
        inversion = Inversion(SOURCE, golden["x0"], begin, rest)
        close(method.generate_latents(TARGET, inversion), golden[f"flowedit.{name}"])


def test_flowedit_averages_over_noises(golden):
    """As for FLUX.1 with n_avg 2: the noises of two steps are those of one."""
    method = FlowEdit(golden.parts(3.0), num_inference_steps=10, skip=6, num_noises=2)
    first, *rest = golden["flowedit.noise"].unflatten(0, (4, 2)).flatten(1, 2)
    begin = method.noised(golden["x0"], first, method.steps[0][0])
    inversion = Inversion(SOURCE, golden["x0"], begin, rest)
    close(method.generate_latents(TARGET, inversion), golden["flowedit.averaged"])


def test_rf_inversion(golden, monkeypatch):
    """Up to the last step but one, for which the published loop takes other times; down from a noise of its own."""
    drawn = "icd_lightning.editing.baselines.rf_inversion.seeded_noise"
    monkeypatch.setattr(drawn, lambda *_: golden["flowedit.noise"][0])
    method, steps = RFInversion(golden.parts(), num_inference_steps=10), []
    method.invert_latents(golden["x0"], SOURCE, on_step=steps.append)
    close(steps[-2].x, golden["rf_inversion.before_noise"])
    method = RFInversion(golden.parts(3.0), num_inference_steps=10, controlled=0.35)
    inversion = Inversion(SOURCE, golden["x0"], golden["rf_inversion.start"])
    close(method.generate_latents(TARGET, inversion), golden["rf_inversion.edited"])
