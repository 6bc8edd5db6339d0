"""The mathematics of invertible consistency distillation; torch and the standard library only."""

# ruff: noqa: F401  (names for others to import from here)

from icd_lightning.diffusion.boundaries import Boundaries, Direction, RoundTrips, TrainingPairs
from icd_lightning.diffusion.draws import Draws
from icd_lightning.diffusion.guidance import (
    CADSGuidance,
    GuidanceSchedule,
    IntervalGuidance,
    StepGuidance,
    classifier_free_guidance,
    guidance_balance,
    guidance_embedding,
)
from icd_lightning.diffusion.jumps import (
    DDIMJump,
    Jump,
    OnStep,
    Step,
    ddim_generate,
    ddim_invert,
    ddim_timesteps,
    falling,
    generate,
    invert,
    lcm_timesteps,
    run_jumps,
    trailing_timesteps,
)
from icd_lightning.diffusion.losses import (
    Consistency,
    Loss,
    LossInputs,
    LossValues,
    Preservation,
    guidance_distillation,
    pseudo_huber,
    squared_error,
)
from icd_lightning.diffusion.process import VP, Denoiser, Flow, NoisedData, Process, Split
