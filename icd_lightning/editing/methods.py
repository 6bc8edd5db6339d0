"""The methods by name: iCD's own and the baselines. Importing this is light: a method's module waits for its making.

A name stands for a class and the settings in which it differs from the class's defaults, which are those of the paper
(arXiv:2406.14539) or else of the method's authors; `*_pie` is as PIE-Bench (arXiv:2310.01506) runs a method.
`conf/method/<name>.yaml` says a baseline's settings in full, to be changed; a class's path is a name too:

    method = build("nti", Family("tiny"))
    method = build("conf/method/nti.yaml", Family("tiny"))
    method = build("my_package.MyBaseline", Family("tiny"), guidance_scale=3.0)
    method = build("icd_p2p", Family("tiny"), students={"forward": "mine/forward", "reverse": "mine/reverse"})
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from icd_lightning.registry import Entry, Registry, typed

if TYPE_CHECKING:
    from icd_lightning.editing.method import PictureMethod, StudentPaths
    from icd_lightning.models.family import Family

ICD, BASELINES = "icd_lightning.editing.consistency", "icd_lightning.editing.baselines"
DDIM, NPI = f"{BASELINES}.ddim", f"{BASELINES}.negative_prompt.NegativePromptInversion"
NTI, RENOISE = f"{BASELINES}.null_text.NullTextInversion", f"{BASELINES}.renoise.ReNoise"
PIE_CONTROL = {"cross_replace": 0.4, "self_replace": 0.6, "alignment": "refine", "amplify": 2.0}
PIE_CONTROL |= {"amplified": "blended", "blend_from": 0.2}
"""As PIE-Bench (arXiv:2310.01506) sets Prompt-to-Prompt."""
PIE = {"guidance_scale": 7.5, "control": PIE_CONTROL}
UNCORRECTED = {"regularization": None, "correction": 0.0}

OURS = {
    "icd": Entry(f"{ICD}.InvertibleConsistency", "iCD as the model is edited best, by one of the next two"),
    "icd_p2p": Entry(f"{ICD}.AttentionControlled", "Prompt-to-Prompt: borrow attention from the picture; half slower"),
    "icd_swap": Entry(f"{ICD}.InvertibleConsistency", "follow the source prompt while t > swap_tau T"),
    "untrained": Entry(f"{ICD}.Untrained", "the teacher through the students' jumps"),
}
OTHERS = {
    "ddim": Entry(f"{DDIM}.DDIMInversion", "DDIM inversion, 50 steps each way"),
    "ddim_dynamic": Entry(f"{DDIM}.DDIMInversion", "the same, guided for t <= 0.7 T only", {"tau": 0.7}),
    "ddim_p2p": Entry(f"{DDIM}.DDIMPromptToPrompt", "DDIM inversion with Prompt-to-Prompt, as in PIE-Bench"),
    "nti": Entry(NTI, "null-text inversion: fits an empty prompt for each step"),
    "nti_pie": Entry(NTI, "the same as in PIE-Bench", PIE),
    "npi": Entry(NPI, "the source prompt as negative prompt"),
    "npi_pie": Entry(NPI, "the same as in PIE-Bench", PIE),
    "pnp_inversion": Entry(f"{BASELINES}.pnp_inversion.PnPInversion", "direct inversion: the source kept on its path"),
    "edit_friendly": Entry(f"{BASELINES}.edit_friendly.EditFriendlyInversion", "edit-friendly DDPM noise"),
    "infedit": Entry(f"{BASELINES}.infedit.InfEdit", "virtual inversion with an LCM, 12 steps"),
    "renoise_turbo": Entry(RENOISE, "fixed-point inversion of SDXL-Turbo, 4 steps each way"),
    "renoise_sdxl": Entry(
        RENOISE,
        "fixed-point inversion of SDXL, 50 steps each way",
        {"sampler": {"kind": "ddim", "num_inference_steps": 50}, "renoising": {"count": 1}, "correction": 0.0},
    ),
    "renoise_lcm": Entry(
        RENOISE,
        "fixed-point inversion of an LCM, 5 steps each way",
        {"sampler": {"kind": "lcm", "num_inference_steps": 5}, "renoising": {"count": 5}, **UNCORRECTED},
    ),
    "sdedit": Entry(f"{BASELINES}.sdedit.SDEdit", "noise half-way, decode with the target prompt"),
    "flowedit": Entry(f"{BASELINES}.flowedit.FlowEdit", "of flow models: differences of velocities, no inversion"),
    "rf_solver_edit": Entry(
        f"{BASELINES}.rf_solver_edit.RFSolverEdit", "of flow models: a second-order solver, values shared"
    ),
    "fireflow": Entry(f"{BASELINES}.fireflow.FireFlow", "of flow models: the same with velocities used twice, 8 steps"),
    "rf_inversion": Entry(
        f"{BASELINES}.rf_inversion.RFInversion", "of flow models: steered to noise and to the picture"
    ),
    "uniedit_flow": Entry(
        f"{BASELINES}.uniedit_flow.UniEditFlow", "of flow models: guided by where source and target differ"
    ),
}
METHODS = Registry("method", "icd_lightning.methods", OURS | OTHERS)
LOADED = {"parts", "family", "students", "autoencoder", "conditioner", "boundaries", "merge"}
"""What a method's constructor takes that is no setting: loaded from the family."""


def build(name: str, family: Family, *, students: StudentPaths = None, **settings: Any) -> PictureMethod:
    """Load a method for a family; settings go before those of its entry.

    students: {"forward": ..., "reverse": ..., "boundaries": ...}, all or some, for methods that use iCD's students; by
    default they are the family's own. Whether a method does, its `uses_students` says.

    Raises ValueError for an unknown method, and for settings that it does not have.
    """
    cls = class_of(name, family)
    try:
        chosen = typed(cls, {**METHODS.find(name).init_args, **settings}, skip=LOADED)
    except ValueError as error:
        raise ValueError(f"method {name}: {error}") from error
    return cls.from_family(family, students=students, **chosen)


def class_of(name: str, family: Family | None = None) -> type[PictureMethod]:
    """The class of a method; ValueError, with the method's name, if there is none. No weights are loaded.

    `icd` is one of two classes, as suits the family; ValueError, too, for one that its process does not suit.
    """
    from icd_lightning.editing.defaults import edits_by_attention
    from icd_lightning.editing.method import PictureMethod

    if name == "icd" and family is not None and edits_by_attention(family):
        name = "icd_p2p"
    entry = METHODS.find(name)
    try:
        cls = entry.load()
    except ValueError as error:
        raise ValueError(f"method {name}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, PictureMethod)):
        raise ValueError(f"method {name}: {entry.class_path} is no PictureMethod: derive it from Baseline")
    if family is not None:
        cls.check_process(family.load_process())
    return cls


def says_guidance(name: str) -> bool:
    """Whether whoever wrote a method's file chose its guidance: then it is no default, which a family may lower."""
    return name not in METHODS and "guidance_scale" in METHODS.find(name).init_args
