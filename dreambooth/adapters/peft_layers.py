"""Low-rank adapters in a network, through peft: put in, merged into the weights, taken out. All in place."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

ADAPTER = "default"  # peft's name of the one adapter that a network has here


class Place(NamedTuple):
    """An adapter layer, and where it sits."""

    path: str  # dotted name in the network
    parent: nn.Module
    layer: Any  # peft's tuner layer around the network's own


def inject(network: nn.Module, config: Any) -> list[nn.Parameter]:
    """Puts the adapter layers of a `peft.LoraConfig` into a network and returns the parameters that came with them."""
    from peft import inject_adapter_in_model

    before = {id(p) for p in network.parameters()}
    inject_adapter_in_model(config, network, ADAPTER)
    return [p for p in network.parameters() if id(p) not in before]


def adapter_layers(network: nn.Module) -> list[Place]:
    """Returns all adapter layers of a network, in its own order."""
    return [
        Place(f"{path}.{name}" if path else name, parent, layer)
        for path, parent in network.named_modules()
        for name, layer in parent.named_children()
        if hasattr(layer, "base_layer") and hasattr(layer, "lora_A")
    ]


def merge_adapters(network: nn.Module) -> None:
    """Adds every adapter to the weight under it and leaves the plain layers."""
    for place in adapter_layers(network):
        place.layer.merge(safe_merge=True)
        setattr(place.parent, place.path.rpartition(".")[2], place.layer.get_base_layer())
    _forget_config(network)


def remove_adapters(network: nn.Module) -> None:
    """Takes every adapter out and leaves the plain layers as they were."""
    for place in adapter_layers(network):
        setattr(place.parent, place.path.rpartition(".")[2], place.layer.get_base_layer())
    _forget_config(network)


def unmatched(network: nn.Module, targets: list[str]) -> Iterator[str]:
    """Yields the targets that are the end of no layer's name: peft passes over those in silence when others fit."""
    names = [name for name, _ in network.named_modules()]
    yield from (target for target in targets if not any(name == target or name.endswith(f".{target}") for name in names))


def _forget_config(network: nn.Module) -> None:
    if hasattr(network, "peft_config"):
        del network.peft_config
