"""Both students on one UNet give the reference's losses and gradients, which it computed with three UNets."""

import pytest
from golden_case import GoldenCase, GoldenNetworks, golden_path, load_cases, load_json, load_tensors
from often_case import often
from students_case import tiny_model, tiny_unet

from icd_lightning.diffusion import Process
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.student_file import StudentFile
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents

each_case = pytest.mark.parametrize("case", load_cases(), ids=lambda case: case.name)


@pytest.fixture(scope="module", params=often([False, True], False), ids=["plain", "checkpointed"])
def networks(request) -> GoldenNetworks:
    meta = load_json("meta.json")
    unet = tiny_unet(**meta["unet_config"])
    unet.load_state_dict(load_tensors("unet.safetensors"))
    lora = LoraSettings(rank=meta["lora"]["r"], alpha=meta["lora"]["lora_alpha"])
    model = tiny_model(unet, Process.from_config(meta["schedule"]))
    students = LoraStudents(model, lora=lora, gradient_checkpointing=request.param).train()
    for direction in DIRECTIONS:
        file = StudentFile.read(golden_path(f"lora_{direction}.safetensors"), alpha=lora.alpha)
        students.load(direction, file)

    def bind(role):
        return lambda embeds, guidance: students.denoiser(role, Conditioning(prompt_embeds=embeds), guidance)

    def named(direction):
        return {name.removesuffix(".weight"): p for name, p in students.named_parameters_of(direction).items()}

    return GoldenNetworks(bind("teacher"), bind("forward"), bind("reverse"), named("forward"), named("reverse"))


@each_case
def test_losses_and_gradients(case: GoldenCase, networks: GoldenNetworks):
    case.check_losses(networks)


@pytest.mark.parametrize("networks", [False], ids=["plain"], indirect=True)  # without gradients nothing is checkpointed
@each_case
def test_every_latent_of_encoding_and_decoding(case: GoldenCase, networks: GoldenNetworks):
    case.check_sampling(networks)
