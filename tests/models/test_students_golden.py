"""Both students on one UNet give the reference's losses and gradients, which it computed with three UNets."""

import pytest
from golden_case import GoldenCase, GoldenNetworks, golden_path, load_cases, load_json, load_tensors
from students_case import tiny_unet

from icd_lightning.diffusion import NoiseSchedule
from icd_lightning.models.checkpoints import load_student
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.students import LoraSettings, Students

FILES = {"fcd": "lora_forward.safetensors", "cd": "lora_reverse.safetensors"}

each_case = pytest.mark.parametrize("case", load_cases(), ids=lambda case: case.name)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "checkpointed"])
def networks(request) -> GoldenNetworks:
    meta = load_json("meta.json")
    unet = tiny_unet(**meta["unet_config"])
    unet.load_state_dict(load_tensors("unet.safetensors"))
    lora = LoraSettings(rank=meta["lora"]["r"], alpha=meta["lora"]["lora_alpha"])
    schedule = NoiseSchedule.from_config(meta["schedule"])
    students = Students(unet, schedule, lora=lora, gradient_checkpointing=request.param).train()
    for adapter, file in FILES.items():
        load_student(students, adapter, golden_path(file))

    def bind(adapter):
        return lambda prompt_embeds, guidance: students.denoiser(adapter, Conditioning(prompt_embeds), guidance)

    def named(adapter):
        return {name.removesuffix(".weight"): p for name, p in students.named_parameters_of(adapter).items()}

    return GoldenNetworks(bind(None), bind("fcd"), bind("cd"), named("fcd"), named("cd"))


@each_case
def test_losses_and_gradients(case: GoldenCase, networks: GoldenNetworks):
    case.check_losses(networks)


@pytest.mark.parametrize("networks", [False], ids=["plain"], indirect=True)  # without gradients nothing is checkpointed
@each_case
def test_every_latent_of_encoding_and_decoding(case: GoldenCase, networks: GoldenNetworks):
    case.check_sampling(networks)
