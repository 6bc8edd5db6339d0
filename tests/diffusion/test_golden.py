"""Equal to what the reference implementation produced, convention by convention."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from golden_case import UNGUIDED, GoldenCase, GoldenNetworks, guidance_of, load_cases, load_json, load_tensors

from icd_lightning.diffusion import (
    VP,
    Process,
    Step,
    StepGuidance,
    ddim_generate,
    ddim_invert,
    ddim_timesteps,
    guidance_embedding,
)
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.diffusion_model import CFGDenoiser

each_case = pytest.mark.parametrize("case", load_cases(), ids=lambda case: case.name)


@each_case
def test_boundaries_from_every_grid_point(case: GoldenCase):
    case.check_pairs()


@each_case
def test_losses_and_gradients(case: GoldenCase, golden_networks: GoldenNetworks):
    case.check_losses(golden_networks)


@each_case
def test_every_latent_of_encoding_and_decoding(case: GoldenCase, golden_networks: GoldenNetworks):
    case.check_sampling(golden_networks)


def test_noise_levels():
    process = Process.from_config(load_json("meta.json")["schedule"])
    assert torch.equal(process.alphas, load_tensors("steps.safetensors")["alphas_cumprod"].sqrt())


def test_guidance_embedding():
    golden = load_tensors("steps.safetensors")
    expected = golden["guidance_embedding.out"]
    actual = guidance_embedding(golden["guidance_embedding.w_minus_1"] + 1, expected.shape[1])
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-3)  # angles reach 19,000 rad in float32


class Baselines:
    """A UNet without guidance embedding and the latents of 50 DDIM steps with it."""

    def __init__(self):
        self.meta, self.tensors = load_json("baselines.json"), load_tensors("baselines.safetensors")
        self.process = VP()
        self.timesteps = ddim_timesteps(self.meta["num_steps"])
        self.unet = UNet2DConditionModel(**self.meta["unet_config"]).requires_grad_(False).eval()
        self.unet.load_state_dict(load_tensors("baselines_unet.safetensors"))

    def denoiser(self, prompt: str, guidance=UNGUIDED, negative: str = "uncond_embeds") -> CFGDenoiser:
        """Classifier-free guidance away from another prompt; where w is 1 the prompt alone."""

        def network(x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, w: None) -> torch.Tensor:
            return self.unet(x, t, encoder_hidden_states=conditioning.tensors["prompt_embeds"]).sample

        told = (Conditioning(prompt_embeds=self.tensors[name]) for name in (prompt, negative))
        return CFGDenoiser(network, self.process, *told, guidance)

    def expect(self, name: str, actual: torch.Tensor, guidance_scale: float = 1.0):
        # Guidance multiplies the rounding of 50 steps: the golden w 8 itself is 3e-4 from the same loop in float64.
        torch.testing.assert_close(actual, self.tensors[name], rtol=1e-4, atol=1e-4 * guidance_scale)


@pytest.fixture(scope="module")
def baselines() -> Baselines:
    return Baselines()


def test_ddim_inversion(baselines: Baselines):
    steps: list[Step] = []
    denoise = baselines.denoiser("prompt_embeds")
    x = ddim_invert(denoise, baselines.tensors["x0"], baselines.timesteps, baselines.process, on_step=steps.append)
    baselines.expect("invert_w1.x_25", steps[24].x)
    baselines.expect("invert_w1.x_T", x)
    assert sum(step.nfe for step in steps) == 50


@pytest.mark.parametrize("decoding", ["decode_w1", "decode_w8", "decode_w8_tau07"])
def test_ddim_decoding_by_classifier_free_guidance(baselines: Baselines, decoding: str):
    steps: list[Step] = []
    denoise = baselines.denoiser("prompt_embeds", guidance_of(decoding))
    x_T = baselines.tensors["invert_w1.x_T"]  # noqa: N806  the golden tensor's name
    x = ddim_generate(denoise, x_T, baselines.timesteps, baselines.process, on_step=steps.append)
    baselines.expect(f"{decoding}.x_0", x, guidance_of(decoding).guidance_scale)
    assert sum(step.nfe for step in steps) == {"decode_w1": 50, "decode_w8": 100, "decode_w8_tau07": 86}[decoding]


def test_a_prompt_as_its_own_negative_is_unguided(baselines: Baselines):
    """Negative-prompt inversion: any scale leaves the conditional prediction, so w 8 decodes as w 1 does."""
    guided = baselines.denoiser("prompt_embeds", StepGuidance(8.0), negative="prompt_embeds")
    x = ddim_generate(guided, baselines.tensors["invert_w1.x_T"], baselines.timesteps, baselines.process)
    baselines.expect("npi.decode_w8.x_0", x, 8.0)
