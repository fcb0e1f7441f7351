"""Samplers by name: the diffusers schedulers that draw images, with the base's noise schedule and prediction type."""

from typing import Any, NamedTuple

from dreambooth.base.protocol import PREDICTION_TYPES, BaseModel
from dreambooth.errors import ConfigError


class Sampler(NamedTuple):
    """A scheduler class of diffusers, what differs from the base's scheduler config, and which predictions and schedules it can use."""

    kind: str
    settings: dict[str, Any]
    prediction_types: tuple[str, ...] = PREDICTION_TYPES
    zero_terminal_snr: bool = True  # knows a schedule that ends in pure noise; one that does not would draw with another, in silence


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler", {"clip_sample": False}),
    "ddpm": Sampler("DDPMScheduler", {"clip_sample": False}),
    "dpmsolver++": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True}),
    "euler": Sampler("EulerDiscreteScheduler", {}),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", {}, ("epsilon", "v_prediction")),
    "heun": Sampler("HeunDiscreteScheduler", {}, zero_terminal_snr=False),
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True}, ("epsilon", "v_prediction"), zero_terminal_snr=False),
    "unipc": Sampler("UniPCMultistepScheduler", {}),
}


def check_sampler(sampler: str, base: BaseModel, zero_terminal_snr: bool = False) -> None:
    """Refuses a sampler that cannot draw from a base.

    Args:
        sampler: a name.
        base: its prediction type and schedule count.
        zero_terminal_snr: whether the base will be given a schedule that ends in pure noise; one that has it already counts too.

    Raises:
        ConfigError: an unknown sampler, or one that cannot use what the base predicts or its schedule.
    """
    zero_snr = zero_terminal_snr or bool(base.scheduler.config.get("rescale_betas_zero_snr"))
    known = [name for name, made in SAMPLERS.items() if base.prediction_type in made.prediction_types and (made.zero_terminal_snr or not zero_snr)]
    if sampler not in known:
        schedule = " over a schedule that ends in pure noise" if zero_snr else ""
        rule = f"must be one of {', '.join(known)} for a base that predicts {base.prediction_type}{schedule}"
        raise ConfigError("sampling.sampler", rule, sampler, "choose one of them")


def scheduler(base: BaseModel, sampler: str) -> Any:
    """Returns the diffusers scheduler of a sampler, with the base's noise schedule and prediction type.

    Raises:
        ConfigError: as `check_sampler`.
    """
    import diffusers

    check_sampler(sampler, base)
    made = SAMPLERS[sampler]
    return base.new_scheduler(getattr(diffusers, made.kind), **made.settings)
