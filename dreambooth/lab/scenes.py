"""The places of the world: what each ray sees where the subject is not."""

from collections.abc import Callable

import torch
from torch import Tensor

from dreambooth.lab.canvas import Canvas, Layers
from dreambooth.lab.scenes_indoors import brick_wall, cave, checkered_floor, library, red_carpet, wooden_table
from dreambooth.lab.scenes_outdoors import beach, city, desert, flower_field, grass, jungle, moon, night, rain, snow, sunset, under_water
from dreambooth.lab.textures import mix

SCENES: dict[str, Callable[[Canvas], Layers]] = {
    "on the beach": beach, "in the snow": snow, "in the jungle": jungle, "on a wooden table": wooden_table, "in a city": city,
    "at night": night, "in the desert": desert, "on the moon": moon, "on the grass": grass, "at sunset": sunset,
    "on a checkered floor": checkered_floor, "on a red carpet": red_carpet,
    "under water": under_water, "in a cave": cave, "in a flower field": flower_field, "by a brick wall": brick_wall,
    "in the rain": rain, "in a library": library,
}  # fmt: skip
HAZY = ("on the beach", "in the snow", "on the grass", "in the desert", "in a city")  # where the far ground fades


def paint(context: str, canvas: Canvas) -> tuple[Tensor, Tensor]:
    """Returns the empty place, (B, 3, N, N) in [0, 1], and where it is ground, (B, 1, N, N)."""
    sky, ground, is_ground = SCENES[context](canvas)
    picture = torch.where(is_ground, ground, sky)
    if context in HAZY:
        haze = torch.where(is_ground, (canvas.distance / 14).clamp(0, 1) ** 2 * 0.45, 0.0)
        picture = mix(picture, canvas.rgb(0.85, 0.9, 0.95), haze)
    return picture.clamp(0, 1), is_ground
