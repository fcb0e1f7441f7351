"""From a subject to its solids. The numbers in the builders are the look of the world; the shipped weights were trained on it."""

from collections.abc import Callable

from dreambooth.lab.accessories import put_on
from dreambooth.lab.identities import Identity
from dreambooth.lab.primitives import Primitive
from dreambooth.lab.shapes_living import dog, duck, fish, mushroom, penguin, tree
from dreambooth.lab.shapes_things import backpack, chair, house, lamp, robot, teapot
from dreambooth.lab.shapes_vehicles import boat, car, rocket, train

BUILDERS: dict[str, Callable[[Identity], list[Primitive]]] = {
    "robot": robot, "teapot": teapot, "car": car, "duck": duck, "dog": dog,
    "house": house, "boat": boat, "mushroom": mushroom, "rocket": rocket, "backpack": backpack,
    "chair": chair, "fish": fish, "lamp": lamp, "tree": tree, "penguin": penguin, "train": train,
}  # fmt: skip


def build(subject: Identity) -> list[Primitive]:
    """Returns the solids of a subject in its own space, with its accessory if it has one."""
    parts = BUILDERS[subject.class_noun](subject)
    return parts + put_on(subject.accessory, parts) if subject.accessory is not None else parts
