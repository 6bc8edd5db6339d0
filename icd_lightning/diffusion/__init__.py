"""The mathematics of invertible consistency distillation; torch and the standard library only."""

from icd_lightning.diffusion.boundaries import Boundaries, RoundTrips, TrainingPairs
from icd_lightning.diffusion.guidance import (
    CADSGuidance,
    ConstantGuidance,
    GuidanceSchedule,
    GuidedDenoiser,
    IntervalGuidance,
    StepGuidance,
    classifier_free_guidance,
    guidance_embedding,
)
from icd_lightning.diffusion.losses import (
    consistency,
    guidance_distillation,
    preservation,
    pseudo_huber,
    squared_error,
)
from icd_lightning.diffusion.sampling import (
    OnStep,
    Step,
    ddim_generate,
    ddim_invert,
    ddim_timesteps,
    falling,
    generate,
    invert,
    lcm_timesteps,
    reconstruct,
    run_jumps,
    trailing_timesteps,
)
from icd_lightning.diffusion.schedule import Denoiser, NoisedData, NoiseSchedule

__all__ = [
    "Boundaries",
    "CADSGuidance",
    "ConstantGuidance",
    "Denoiser",
    "GuidanceSchedule",
    "GuidedDenoiser",
    "IntervalGuidance",
    "NoiseSchedule",
    "NoisedData",
    "OnStep",
    "RoundTrips",
    "Step",
    "StepGuidance",
    "TrainingPairs",
    "classifier_free_guidance",
    "consistency",
    "ddim_generate",
    "ddim_invert",
    "ddim_timesteps",
    "falling",
    "generate",
    "guidance_distillation",
    "guidance_embedding",
    "invert",
    "lcm_timesteps",
    "preservation",
    "pseudo_huber",
    "reconstruct",
    "run_jumps",
    "squared_error",
    "trailing_timesteps",
]
