"""Places with walls: rooms, a wall, a cave.

Each place is one function of a Canvas. It draws its details from the pictures' own generators and paints all pictures of the batch at once;
colours are in [0, 1], planes are (B, 3, N, N), masks and positions (B, 1, N, N). `scenes.SCENES` lists them.
"""

import torch

from dreambooth.lab.canvas import Canvas, Layers
from dreambooth.lab.identities import COLORS, shade_of
from dreambooth.lab.textures import mix, smoothstep


def wooden_table(c: Canvas) -> Layers:
    """Planks towards one of three plain walls."""
    low = ((0.85, 0.8, 0.7), (0.66, 0.74, 0.76), (0.8, 0.7, 0.68))
    high = ((0.7, 0.62, 0.5), (0.5, 0.58, 0.62), (0.65, 0.52, 0.5))
    which = c.draw_color(lambda rng: [rng.choice(3)])[:, 0, 0, 0].long()  # (B,)
    paint = [torch.tensor(colors, device=c.u.device)[which][..., None, None] for colors in (low, high)]  # 2 x (B, 3, 1, 1)
    wall = mix(c.sky(*paint), c.rgb(0.9, 0.88, 0.8), c.sky_noise() * 0.25)
    across = c.x * 1.3 + c.offset[0]
    plank = across.floor()
    grain = c.noise(c.x * 1.1 + plank * 0.37, c.z * 0.06 + plank * 0.21)
    tone = ((plank * 12.9).sin() * 43.7).abs().frac() * 0.25
    shade = (0.3 + 0.8 * (grain - 0.5) + 0.15 * torch.sin(grain * 40) + tone).clamp(0, 1)
    wood = mix(c.rgb(0.72, 0.47, 0.25), c.rgb(0.4, 0.22, 0.1), shade)
    return Layers(wall, wood * (1 - 0.55 * (across - plank < 0.05)), c.is_ground)


def checkered_floor(c: Canvas) -> Layers:
    """Black and white tiles before a striped wall of a pale colour."""
    names = list(COLORS)
    paint = c.draw_color(lambda rng: shade_of(names[int(rng.integers(7))], rng)) * 0.35 + 0.5
    wall = c.sky(paint, paint * 0.8) * (1 - 0.15 * ((c.u * 6 + 20).abs().frac() < 0.5))
    odd = ((c.x * 1.15 + c.offset[0]).floor() + (c.z * 1.15 + c.offset[1]).floor()) % 2
    tiles = mix(c.rgb(0.93, 0.93, 0.91), c.rgb(0.1, 0.1, 0.12), odd)
    return Layers(wall, mix(tiles, wall * 0.6, torch.full_like(odd, 0.12)), c.is_ground)


def red_carpet(c: Canvas) -> Layers:
    """A red runner with golden borders towards a grey curtain."""
    folds = 0.5 + 0.5 * torch.sin(c.u * 26 + c.offset[0] * 6 + 2 * torch.sin(c.u * 7))
    curtain = mix(c.rgb(0.2, 0.17, 0.2), c.rgb(0.5, 0.45, 0.47), folds)
    carpet = mix(c.rgb(0.72, 0.05, 0.1), c.rgb(0.55, 0.02, 0.07), c.ground_grain())
    across = c.x.abs()
    carpet = torch.where((across - 1.45).abs() < 0.09, c.rgb(0.93, 0.75, 0.25), carpet)
    return Layers(curtain, torch.where(across > 1.54, c.rgb(0.4, 0.37, 0.36), carpet), c.is_ground)


def cave(c: Canvas) -> Layers:
    """Brown rock all around, stone teeth from above, the bright way out behind; the light of day lies on the ground before it."""
    w = c.wall(-3.0)
    mouth = c.draw(lambda rng: rng.choice([-1, 1]) * rng.uniform(0.7, 1.5))
    rock = c.rough(w.x * 0.06 + c.offset[0], w.y * 0.06 + c.offset[1])
    layers = 0.5 + 0.5 * torch.sin(w.y * 9 + c.sky_noise() * 14)
    stone = mix(c.rgb(0.11, 0.075, 0.055), c.rgb(0.43, 0.3, 0.2), smoothstep(rock * 0.7 + layers * 0.3, 0.25, 0.85))
    radius = torch.hypot((w.x - mouth) / 0.85, w.y / 1.7) + 0.22 * (rock - 0.5)
    day = mix(c.rgb(0.95, 0.98, 1.0), c.rgb(0.6, 0.83, 1.0), (w.y / 1.5).clamp(0, 1))
    stone = mix(stone + torch.exp(-(radius - 1).clamp(min=0) * 3.5) * 0.3, day, smoothstep(radius, 1.04, 0.96))
    teeth = c.draw(lambda rng: [(-0.8 + 0.2 * (i + rng.random()), rng.uniform(0.1, 0.3), rng.uniform(0.03, 0.07)) for i in range(8)])
    for center, length, width in teeth:
        tip = 0.42 - length
        across = (c.u - center) / (width * ((c.v - tip) / length).clamp(min=0))
        tooth = mix(c.rgb(0.36, 0.26, 0.18), c.rgb(0.13, 0.09, 0.07), 0.5 + 0.5 * across)
        stone = torch.where((c.v > tip) & (across.abs() < 1), tooth, stone)
    floor = mix(c.rgb(0.16, 0.11, 0.08), c.rgb(0.42, 0.31, 0.22), c.ground_grain() * 0.6 + c.ground_noise() * 0.4)
    lit = torch.exp(-(((c.x + c.z * mouth / 3) / 0.8) ** 2)) * smoothstep(c.z, 1.0, -3.0)
    return Layers(stone, floor * (1 + 1.2 * lit), w.is_ground)


def brick_wall(c: Canvas) -> Layers:
    """Red bricks with pale mortar, a pavement of grey slabs."""
    w = c.wall(-2.2)
    course = (w.y / 0.25).floor()
    along = w.x / 0.6 + 0.5 * (course % 2) + c.offset[0] * 3
    tone = (((along.floor() * 12.9 + course * 78.2).sin() * 43.7).abs().frac() * 0.7 + c.sky_noise() * 0.3).clamp(0, 1)
    brick = mix(c.rgb(0.55, 0.2, 0.14), c.rgb(0.8, 0.4, 0.27), tone)
    is_mortar = (w.y / 0.25 - course < 0.17) | (along - along.floor() < 0.07)
    x, z = c.x * 0.8 + c.offset[1], c.z * 0.8 + c.offset[2]
    slabs = mix(c.rgb(0.56, 0.56, 0.56), c.rgb(0.74, 0.73, 0.71), c.ground_grain() * 0.7 + 0.3 * ((x.floor() + z.floor()) % 2))
    slabs = slabs * (1 - 0.35 * ((x - x.floor() < 0.05) | (z - z.floor() < 0.05)))
    return Layers(torch.where(is_mortar, c.rgb(0.8, 0.77, 0.71), brick), slabs, w.is_ground)


BOOKS = ((0.6, 0.1, 0.12), (0.13, 0.22, 0.5), (0.1, 0.38, 0.24), (0.85, 0.72, 0.45), (0.4, 0.15, 0.38), (0.9, 0.87, 0.78), (0.75, 0.4, 0.12))


def library(c: Canvas) -> Layers:
    """Wooden shelves full of books of all colours and heights, a blue carpet with pale lozenges."""
    w = c.wall(-2.2)
    shelf = (w.y / 0.62).floor()
    height, along = w.y / 0.62 - shelf, w.x / 0.16 + c.offset[0] * 50 + shelf * 7.3
    book = along.floor()
    dice = ((book * 12.9 + shelf * 78.2 + c.bank).sin() * 43.7).abs().frac()
    color = torch.tensor(BOOKS, device=c.u.device)[(dice * 6.99).long()][:, 0].movedim(-1, 1)  # (B, 3, N, N)
    is_book = (height < 0.62 + 0.3 * (dice * 17).frac()) & (height > 0.12)
    view = torch.where(is_book, color * (1.1 - 0.9 * (along - book - 0.5).abs()), c.rgb(0.1, 0.06, 0.04))
    is_wood = (height < 0.12) | ((w.x / 1.9 + c.offset[1]).abs().frac() < 0.07)
    x, z = c.x * 0.8 + c.offset[1], c.z * 0.8 + c.offset[2]
    lozenge = ((x + z).frac().abs() - 0.5).abs() + ((x - z).frac().abs() - 0.5).abs()
    carpet = mix(c.rgb(0.12, 0.17, 0.38), c.rgb(0.2, 0.26, 0.5), c.ground_grain())
    carpet = mix(carpet, c.rgb(0.75, 0.68, 0.5), smoothstep(lozenge, 0.22, 0.16) * 0.8)
    return Layers(torch.where(is_wood, c.rgb(0.5, 0.31, 0.16), view), carpet, w.is_ground)
