"""Samplers by name: the diffusers schedulers that draw images, with the base's noise schedule and prediction type."""

from typing import Any, NamedTuple

from dreambooth.base.protocol import PREDICTION_TYPES, BaseModel
from dreambooth.errors import ConfigError


class Sampler(NamedTuple):
    """A scheduler class of diffusers, what differs from the base's scheduler config, and which predictions it can use."""

    kind: str
    settings: dict[str, Any]
    prediction_types: tuple[str, ...] = PREDICTION_TYPES


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler", {"clip_sample": False}),
    "ddpm": Sampler("DDPMScheduler", {"clip_sample": False}),
    "dpmsolver++": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True}),
    "euler": Sampler("EulerDiscreteScheduler", {}),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", {}, ("epsilon", "v_prediction")),
    "heun": Sampler("HeunDiscreteScheduler", {}),
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True}, ("epsilon", "v_prediction")),
    "unipc": Sampler("UniPCMultistepScheduler", {}),
}


def scheduler(base: BaseModel, sampler: str) -> Any:
    """Returns the diffusers scheduler of a sampler, with the base's noise schedule and prediction type.

    Raises:
        ConfigError: for an unknown sampler, or one that cannot use what the base predicts.
    """
    import diffusers

    known = [name for name, made in SAMPLERS.items() if base.prediction_type in made.prediction_types]
    if sampler not in known:
        rule = f"must be one of {', '.join(known)} for a base that predicts {base.prediction_type}"
        raise ConfigError("sampling.sampler", rule, sampler, "choose one of them")
    made = SAMPLERS[sampler]
    return base.new_scheduler(getattr(diffusers, made.kind), **made.settings)
