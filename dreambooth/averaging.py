"""An exponential moving average of what learns, beside the training: smoother weights to evaluate and to keep."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class AveragedWeights:
    """The moving average of parameters, in float32 whatever they are in, over diffusers' `EMAModel`.

    After n updates the average keeps the share min(decay, n / (9 + n)) of itself (the first update takes the weights as they are), so
    a short run is not held at its start.

    Args:
        parameters: all that learns at some step; their present values are the first average.
        decay: the largest share kept, in [0, 1).
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self.parameters = parameters
        self.ema = EMAModel([p.detach().float() for p in parameters], decay=decay)

    def update(self) -> None:
        """Takes the present weights into the average; to be called once after each optimiser step."""
        self.ema.to(self.parameters[0].device)
        # Views that say they learn: EMAModel would copy, not average, a part that has stopped, and the evaluated weights would jump there.
        self.ema.step([p.detach().requires_grad_() for p in self.parameters])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the average in place of the weights inside the context; then they are back, bit for bit."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Returns all that `load_state_dict` needs to go on as if nothing had happened."""
        return self.ema.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a state of `state_dict`."""
        self.ema.load_state_dict(state)
