"""The reference's tensors as checks for any networks: schedule, boundaries, losses, gradients, sampling.

Everything is read from a folder of golden files: tests/golden, or the one named by ICD_GOLDEN (files that it lacks come
from tests/golden). Boundaries, networks, batch and draws there may be others. For any `GoldenNetworks`:

    for case in load_cases():
        case.check_losses(networks)
        case.check_sampling(networks)
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from icd_lightning.diffusion import (
    Boundaries,
    DDIMJump,
    Denoiser,
    NoisedData,
    Process,
    Step,
    StepGuidance,
    generate,
    invert,
)
from icd_lightning.diffusion.calls import alone
from icd_lightning.diffusion.losses import consistency_plan, preservation_plan

SHIPPED = Path(__file__).parent / "golden"
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
# A jump from t = 999 multiplies the network's own rounding by 15, so that the number of threads alone moves decoded
# latents by up to 4e-5.
DECODING_TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

Guidance = Callable[[Tensor], Tensor]
"""w (B,) = guidance(t (B,)); 1 is unguided."""
Bind = Callable[[Tensor, Guidance], Denoiser]
"""denoise = bind(prompt_embeds (B, L, D), guidance)"""

UNGUIDED = StepGuidance(1.0)


def consistency(*parts: Any, huber_c: float) -> Tensor:
    """The loss (B,) of `consistency_plan`, evaluated alone."""
    return alone(consistency_plan(*parts, huber_c=huber_c))


def preservation(*parts: Any, huber_c: float) -> Tensor:
    """The loss (B,) of `preservation_plan`, evaluated alone."""
    return alone(preservation_plan(*parts, huber_c=huber_c))


@dataclass(frozen=True)
class GoldenNetworks:
    """The networks under test: three ways to bind a denoiser, and the parameters of both students by golden name.

    The parameters' names are `<module>.lora_A` and `<module>.lora_B`; `lora_parameters` makes them.
    """

    teacher: Bind
    forward_model: Bind
    reverse_model: Bind
    forward_lora: Mapping[str, nn.Parameter]
    reverse_lora: Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class GoldenCase:
    """One case of steps.safetensors, its name stripped from the tensors' names."""

    name: str
    boundaries: Boundaries
    process: Process
    huber_c: float
    tensors: Mapping[str, Tensor]

    @property
    def data(self) -> NoisedData:
        return NoisedData(self.tensors["in.latents"], self.tensors["in.noise"], self.process)

    def check_pairs(self) -> None:
        """The boundary that training uses from every grid point, in both directions."""
        reverse, forward = self.boundaries.pairs["reverse"], self.boundaries.pairs["forward"]
        grid = self.tensors["grid.t"]
        assert torch.equal(reverse.t, grid)
        assert torch.equal(forward.t, grid[:-1])
        assert torch.equal(reverse.boundary, self.tensors["grid.reverse_boundary_of_solver_step"])
        assert torch.equal(forward.boundary, self.tensors["grid.forward_boundary_of_solver_step"])

    def losses(self, networks: GoldenNetworks) -> dict[str, Callable[[], Tensor]]:
        """The four losses (B,) by golden name, not yet evaluated."""
        prompt, w = self.tensors["in.prompt_embeds"], self.tensors["in.w_minus_1"] + 1
        data, ends, options = self.data, self.boundaries, {"huber_c": self.huber_c}
        segment = self.tensors["in.segment_index"]
        reverse_pairs = ends.pairs["reverse"][self.tensors["in.reverse_index"]]
        forward_pairs = ends.pairs["forward"][self.tensors["in.forward_index"]]
        solver = DDIMJump(networks.teacher(prompt, UNGUIDED), self.process, set_alpha_to_one=False)
        guided_solver = replace(solver, denoise=networks.teacher(prompt, lambda t: w))
        forward = DDIMJump(networks.forward_model(prompt, UNGUIDED), self.process)
        reverse = DDIMJump(networks.reverse_model(prompt, UNGUIDED), self.process)
        guided_reverse = replace(reverse, denoise=networks.reverse_model(prompt, lambda t: w))
        return {
            "reverse_consistency": lambda: consistency(guided_reverse, guided_solver, data, reverse_pairs, **options),
            "forward_consistency": lambda: consistency(forward, solver, data, forward_pairs, **options),
            "reverse_preservation": lambda: preservation(
                forward, reverse, data, ends.trips["reverse"][segment], **options
            ),
            "forward_preservation": lambda: preservation(
                reverse, forward, data, ends.trips["forward"][segment], **options
            ),
        }

    def check_losses(self, networks: GoldenNetworks) -> None:
        """Loss, gradient norm and sampled gradients of each, and that it trains its own student only."""
        lora = {"reverse": networks.reverse_lora, "forward": networks.forward_lora}
        for name, evaluate in self.losses(networks).items():
            trained, other = (lora["reverse"], lora["forward"])[:: 1 if name.startswith("reverse") else -1]
            for parameter in (*trained.values(), *other.values()):
                parameter.grad = None
            values = evaluate()
            assert values.shape == self.tensors["in.w_minus_1"].shape
            values.mean().backward()
            self._expect(f"{name}.loss", values.detach().mean())
            gradients = {key: parameter.grad for key, parameter in trained.items()}
            assert all(gradient is not None for gradient in gradients.values()), f"{name}: a parameter has no gradient"
            self._expect(f"{name}.grad_norm", torch.cat([g.flatten() for g in gradients.values()]).norm())
            for key in self._keys(f"{name}.grad."):
                self._expect(f"{name}.grad.{key}", gradients[key])
            leaked = [key for key, p in other.items() if p.grad is not None and p.grad.abs().max() > 0]
            assert not leaked, f"{self.name}: {name} reaches the other student: {leaked[:3]}"

    def check_sampling(self, networks: GoldenNetworks) -> None:
        """Every latent of the encoding and of each decoding, and one evaluation for each."""
        prompt = self.tensors["in.prompt_embeds"]
        steps: list[Step] = []
        forward = DDIMJump(networks.forward_model(prompt, UNGUIDED), self.process)
        data = self.data
        self._expect("encode.x_start", data.at(self.boundaries.start_timestep))
        encoded = invert(forward, data.x0, data.noise, self.boundaries, self.process, on_step=steps.append)
        self._check_latents("encode", steps)
        for decoding in sorted({key.split(".")[0] for key in self._keys("decode_", strip=False)}):
            steps = []
            reverse = DDIMJump(networks.reverse_model(prompt, guidance_of(decoding)), self.process)
            decoded = generate(reverse, encoded, self.boundaries, on_step=steps.append)
            assert torch.equal(decoded, steps[-1].x)
            self._check_latents(decoding, steps)

    def _check_latents(self, name: str, steps: list[Step]) -> None:
        assert {str(step.s) for step in steps} == set(self._keys(f"{name}.x_")) - {"start"}
        assert sum(step.nfe for step in steps) == self.boundaries.num_segments
        for step in steps:
            self._expect(f"{name}.x_{step.s}", step.x)

    def _keys(self, prefix: str, *, strip: bool = True) -> list[str]:
        return [key.removeprefix(prefix) if strip else key for key in self.tensors if key.startswith(prefix)]

    def _expect(self, key: str, actual: Tensor) -> None:
        tolerance = DECODING_TOLERANCE if key.startswith("decode_") else TOLERANCE
        torch.testing.assert_close(
            actual, self.tensors[key], **tolerance, msg=lambda text: f"{self.name}.{key}: {text}"
        )


def golden_path(name: str) -> Path:
    """A file of the folder ICD_GOLDEN, or of tests/golden where that folder is not given or lacks it."""
    chosen = Path(os.environ.get("ICD_GOLDEN", SHIPPED)) / name
    return chosen if chosen.exists() else SHIPPED / name


def load_tensors(name: str) -> dict[str, Tensor]:
    return load_file(golden_path(name))


def load_json(name: str) -> dict[str, Any]:
    return json.loads(golden_path(name).read_text())


def load_cases() -> list[GoldenCase]:
    """Every case of meta.json."""
    meta, tensors = load_json("meta.json"), load_tensors("steps.safetensors")
    process = Process.from_config(meta["schedule"])
    return [
        GoldenCase(
            name=case["name"],
            boundaries=Boundaries(
                boundary_timesteps=(0, *map(int, case["fwd"].split(","))),
                start_timestep=meta["start_forward_timestep"],
                num_solver_steps=meta["num_ddim_timesteps"],
                num_train_timesteps=process.num_train_timesteps,
                allow_off_grid=True,
            ),
            process=process,
            huber_c=meta["huber_c"],
            tensors={
                key.removeprefix(f"{case['name']}."): value
                for key, value in tensors.items()
                if key.startswith(f"{case['name']}.")
            },
        )
        for case in meta["cases"]
    ]


def guidance_of(decoding: str) -> StepGuidance:
    """The guidance that a name tells: decode_w1, decode_w8, decode_w8_tau07 (guided for t / 1000 <= 0.7)."""
    match = re.fullmatch(r"decode_w(\d+(?:\.\d+)?)(?:_tau(\d)(\d*))?", decoding)
    assert match, f"no guidance can be read from {decoding!r}"
    scale, whole, decimals = match.groups()
    return StepGuidance(float(scale), tau=float(f"{whole}.{decimals or 0}") if whole else 1.0)


def lora_parameters(unet: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters under golden names: `<module>.lora_A`, `<module>.lora_B`."""
    suffix = f".{adapter}.weight"
    return {
        name.removesuffix(suffix).removeprefix("base_model.model."): parameter
        for name, parameter in unet.named_parameters()
        if name.endswith((f".lora_A{suffix}", f".lora_B{suffix}"))
    }
