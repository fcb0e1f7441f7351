"""Places under the sky, and one under water.

Each place is one function of a Canvas. It draws its details from the pictures' own generators and paints all pictures of the batch at once;
colours are in [0, 1], planes are (B, 3, N, N), masks and positions (B, 1, N, N). `scenes.SCENES` lists them.
"""

import torch

from dreambooth.lab.canvas import NOWHERE, Canvas, Layers, Rng
from dreambooth.lab.textures import mix, noise_bank, sample, smoothstep


def beach(c: Canvas) -> Layers:
    """Sand, a line of foam, the sea, clouds."""
    sky = c.sky(c.rgb(0.78, 0.9, 0.98), c.rgb(0.25, 0.55, 0.92), 0.8)
    sand = mix(c.rgb(0.93, 0.83, 0.6), c.rgb(0.8, 0.67, 0.42), c.ground_noise() * 0.6 + c.ground_grain() * 0.4)
    shore = c.draw(lambda rng: -3.2 - rng.random() * 1.5) + 0.5 * torch.sin(c.x * 0.5 + c.offset[0] * 6)
    sea = mix(c.rgb(0.1, 0.45, 0.68), c.rgb(0.25, 0.68, 0.8), c.noise(c.x * 0.05 + c.offset[0], c.z * 0.3))
    wet = mix(sand, sea, smoothstep(c.z, shore + 0.15, shore - 0.15))
    foam = torch.exp(-(((c.z - shore) / 0.22) ** 2)) * 0.9
    return Layers(sky, mix(wet, c.rgb(0.97, 0.98, 1.0), foam), c.is_ground)


def snow(c: Canvas) -> Layers:
    """White ground, a row of snowy firs, a pale sky; flakes fall in front of all (see `weather`)."""
    sky = c.sky(c.rgb(0.85, 0.89, 0.94), c.rgb(0.62, 0.72, 0.85), 0.5)
    shade = smoothstep(c.ground_noise(), 0.35, 0.75) * 0.8 + c.ground_grain() * 0.12
    ground = mix(c.rgb(0.97, 0.98, 1.0), c.rgb(0.76, 0.83, 0.94), shade)
    firs = c.draw(lambda rng: [(-1 + 2.2 * (i + rng.random() * 0.8) / 9, rng.uniform(0.18, 0.42)) for i in range(9)])
    needles = sample(noise_bank(True, str(c.u.device)), 1, c.u * 1.5 + c.offset[0], c.v * 1.5)
    fir_color = mix(c.rgb(0.1, 0.28, 0.2), c.rgb(0.9, 0.94, 0.97), smoothstep(needles, 0.45, 0.6) * 0.8)
    branches = 0.28 * (1 + 0.35 * torch.sin(c.v * 60))
    is_fir = torch.zeros_like(c.is_ground)
    for center, height in firs:
        is_fir |= (c.v < height) & ((c.u - center).abs() < (height - c.v) * branches)
    return Layers(torch.where(is_fir, fir_color, sky), ground, c.is_ground)


def jungle(c: Canvas) -> Layers:
    """Walls of leaves, brown trunks, seven large leaves in front, dark mossy ground."""
    leaves = c.rough(c.u * 0.45 + c.offset[0], c.v * 0.45 + c.offset[1])
    wall = mix(c.rgb(0.02, 0.16, 0.06), c.rgb(0.28, 0.58, 0.16), smoothstep(leaves, 0.3, 0.72))
    trunks = c.draw(lambda rng: [(-1 + 2 * (i + rng.random()) / 5, rng.uniform(0.025, 0.06)) for i in range(5)])
    for index, (center, width) in enumerate(trunks):
        across = c.u - center
        bark = mix(c.rgb(0.2, 0.13, 0.07), c.rgb(0.42, 0.3, 0.17), 0.5 + 0.5 * across / width)
        wall = torch.where((across - 0.05 * torch.sin(c.v * 5 + index)).abs() < width, bark, wall)
    big = c.draw(lambda rng: [(rng.uniform(-0.8, 0.8), rng.uniform(0.0, 0.6), rng.uniform(0, 6.28)) for _ in range(7)])
    for center_u, center_v, angle in big:
        du, dv = c.u - center_u, c.v - center_v
        along, across = du * angle.cos() + dv * angle.sin(), dv * angle.cos() - du * angle.sin()
        inside = (along / 0.24) ** 2 + (across / (0.055 * (1.05 + along / 0.24))) ** 2 < 1
        vein = (across.abs() < 0.012) * 0.7 + 0.15 * torch.sin(along * 90)
        wall = torch.where(inside, mix(c.rgb(0.12, 0.45, 0.1), c.rgb(0.4, 0.75, 0.2), vein), wall)
    moss = smoothstep(c.ground_grain() * 0.6 + c.ground_noise() * 0.4, 0.35, 0.6)
    return Layers(wall, mix(c.rgb(0.2, 0.14, 0.07), c.rgb(0.16, 0.4, 0.1), moss), c.is_ground)


def draw_street(rng: Rng) -> list[list[tuple[float, ...]]]:
    """Returns two rows of buildings, each (left, width, height, wall RGB, lit), padded to a common count with buildings out of sight."""
    walls = ((0.62, 0.5, 0.45), (0.5, 0.53, 0.6), (0.7, 0.66, 0.58), (0.42, 0.42, 0.48))
    rows = []
    for stretch, brightness in ((1.25, 1.05), (1.0, 0.75)):  # the far row first: higher and brighter
        left, row = -1.2, []
        while left < 1.2:
            width, height = rng.uniform(0.14, 0.3), rng.uniform(0.2, 0.62) * stretch
            wall = walls[int(rng.integers(4))]
            lit = float(rng.random() < 0.4)
            row.append((left, width, height, *(channel * brightness for channel in wall), lit))
            left += width + rng.uniform(0, 0.05)
        rows.append(row + [(NOWHERE, 0, 0, 0, 0, 0, 0)] * (18 - len(row)))  # 2.4 / 0.14: at most 18 a row
    return rows


def city(c: Canvas) -> Layers:
    """Two rows of buildings with windows, asphalt with a dashed line, a pavement."""
    view = c.sky(c.rgb(0.85, 0.88, 0.9), c.rgb(0.5, 0.66, 0.85), 0.5)
    for row in c.draw(draw_street):  # (18, 7, B, 1, 1, 1)
        lefts = row[:, 0, :, 0, 0, 0].T.contiguous()  # (B, 18), increasing
        nearest = torch.searchsorted(lefts, c.u.flatten(1), right=True).sub(1).clamp(min=0).view(c.u.shape)  # (B, 1, N, N)
        numbers = row[..., 0, 0, 0].permute(2, 0, 1)  # (B, 18, 7)
        own = numbers[torch.arange(len(lefts), device=c.u.device).view(-1, 1, 1), nearest[:, 0]].movedim(-1, 1)  # (B, 7, N, N)
        left, width, height, wall, lit = own[:, 0:1], own[:, 1:2], own[:, 2:3], own[:, 3:6], own[:, 6:7]
        columns = ((c.u - left) * 22).frac() > 0.4
        floors = ((c.v * 18).abs() + 0.3).frac() > 0.45
        glass = torch.where(lit > 0, c.rgb(0.98, 0.88, 0.5), c.rgb(0.18, 0.25, 0.35))
        front = torch.where(columns & floors & (c.v < height - 0.03), glass, wall)
        view = torch.where((c.u > left) & (c.u < left + width) & (c.v < height), front, view)
    road = mix(c.rgb(0.36, 0.36, 0.38), c.rgb(0.5, 0.5, 0.52), c.ground_grain())
    dashes = ((c.z + 1.9).abs() < 0.09) & ((c.x * 0.5 + 50 + c.offset[0]).abs().frac() < 0.6)
    road = mix(road, c.rgb(0.95, 0.9, 0.6), dashes * 0.9)
    return Layers(view, mix(road, c.rgb(0.68, 0.67, 0.65), smoothstep(c.z, -3.0, -3.1)), c.is_ground)


def night(c: Canvas) -> Layers:
    """Dark blue: stars, a moon with its glow, black hills."""
    sky = c.sky(c.rgb(0.09, 0.1, 0.25), c.rgb(0.015, 0.02, 0.09))
    sky = torch.where(c.draw_stars(0.0075), c.rgb(0.9, 0.9, 1.0), sky)
    moon_u, moon_v = c.draw(lambda rng: (rng.uniform(-0.35, 0.35), rng.uniform(0.25, 0.5)))
    radius = torch.hypot(c.u - moon_u, c.v - moon_v)
    sky = mix(sky, c.rgb(0.98, 0.96, 0.82), smoothstep(radius, 0.078, 0.066)) + torch.exp(-radius * 9) * 0.22
    sky = torch.where(c.below_hills(0.03, 0.2), c.rgb(0.03, 0.05, 0.1), sky)
    ground = mix(c.rgb(0.06, 0.1, 0.17), c.rgb(0.12, 0.17, 0.26), c.ground_noise() * 0.6 + c.ground_grain() * 0.4)
    return Layers(sky, ground, c.is_ground)


def draw_cacti(rng: Rng) -> list[tuple[float, float]]:
    """Returns one to three cacti (position, height), padded to three."""
    cacti = [(rng.choice([-1, 1]) * rng.uniform(0.25, 0.7), rng.uniform(0.22, 0.4)) for _ in range(int(rng.integers(1, 4)))]
    return cacti + [(NOWHERE, 0.0)] * (3 - len(cacti))


def desert(c: Canvas) -> Layers:
    """Rippled sand, dunes at the horizon, one to three cacti that stand in front of the ground."""
    sky = c.sky(c.rgb(0.98, 0.87, 0.68), c.rgb(0.35, 0.62, 0.9))
    dunes = mix(c.rgb(0.82, 0.52, 0.28), c.rgb(0.95, 0.7, 0.42), (c.sky_noise() * 1.2).clamp(0, 1))
    sky = torch.where(c.below_hills(0.02, 0.28), dunes, sky)
    is_cactus = torch.zeros_like(c.is_ground)
    for center, height in c.draw(draw_cacti):
        side = (c.u - center).abs()
        stem = (side < 0.035) & (c.v < height)
        arms = ((c.v - height * 0.5).abs() < 0.022) & (side < 0.13)
        hands = ((side - 0.12).abs() < 0.024) & (c.v > height * 0.47) & (c.v < height * 0.8)
        is_cactus |= (stem | arms | hands) & (c.v > -0.03)
    green = mix(c.rgb(0.12, 0.38, 0.17), c.rgb(0.25, 0.55, 0.25), 0.5 + 0.5 * torch.sin(c.u * 130))
    ripples = smoothstep(torch.sin(c.z * 4 + c.x * 0.8 + c.ground_noise() * 5) * 0.5 + 0.5, 0.2, 0.9)
    sand = mix(c.rgb(0.95, 0.7, 0.4), c.rgb(0.8, 0.5, 0.26), ripples * 0.6 + c.ground_grain() * 0.2)
    return Layers(torch.where(is_cactus, green, sky), sand, c.is_ground & ~is_cactus)


def moon(c: Canvas) -> Layers:
    """Grey dust with nine craters, a black sky with stars, the Earth."""
    sky = torch.where(c.draw_stars(0.008), c.rgb(0.95, 0.95, 0.95), c.rgb(0.01, 0.01, 0.02))
    earth_u, earth_v = c.draw(lambda rng: (rng.uniform(-0.4, 0.4), rng.uniform(0.28, 0.5)))
    radius = torch.hypot(c.u - earth_u, c.v - earth_v)
    earth = mix(c.rgb(0.1, 0.3, 0.75), c.rgb(0.85, 0.95, 0.9), smoothstep(c.sky_noise(), 0.45, 0.65))
    lit_side = (1.1 - 2.5 * (c.u - earth_u + 0.05)).clamp(0.25, 1.1)
    sky = mix(sky, earth * lit_side, smoothstep(radius, 0.135, 0.12))
    dust = mix(c.rgb(0.42, 0.42, 0.44), c.rgb(0.68, 0.68, 0.69), c.ground_noise() * 0.6 + c.ground_grain() * 0.5)
    craters = c.draw(lambda rng: [(rng.uniform(-4, 4), rng.uniform(-6, 1.8), rng.uniform(0.2, 0.6)) for _ in range(9)])
    for center_x, center_z, size in craters:
        q = torch.hypot(c.x - center_x, c.z - center_z) / size
        dust = dust * (1 - 0.5 * smoothstep(q, 0.95, 0.5) + 0.25 * torch.exp(-(((q - 1.05) / 0.15) ** 2)))
    return Layers(sky, dust, c.is_ground)


def grass(c: Canvas) -> Layers:
    """A meadow with small flowers, green hills, clouds."""
    sky = c.sky(c.rgb(0.75, 0.9, 1.0), c.rgb(0.3, 0.6, 0.95), 1.0)
    sky = torch.where(c.below_hills(0.03, 0.22), mix(c.rgb(0.25, 0.5, 0.25), c.rgb(0.4, 0.66, 0.3), c.sky_noise()), sky)
    blades = c.rough(c.x * 0.9 + c.offset[0], c.z * 0.22)
    meadow = mix(c.rgb(0.16, 0.45, 0.1), c.rgb(0.5, 0.78, 0.22), blades * 0.75 + c.ground_noise() * 0.35)
    petals = c.draw_color(lambda rng: ((1, 0.95, 0.3), (1, 1, 1), (1, 0.5, 0.7))[int(rng.integers(3))])
    is_flower = c.rough(c.x * 0.5, c.z * 0.5 + c.offset[2], shift=1) > 0.885
    return Layers(sky, torch.where(is_flower, petals, meadow), c.is_ground)


def sunset(c: Canvas) -> Layers:
    """A low sun with its glow in an orange to purple sky, dark hills, reddish ground."""
    up = (c.v / 0.6).clamp(0, 1)
    sky = mix(c.rgb(1.0, 0.72, 0.3), c.rgb(0.93, 0.36, 0.32), smoothstep(up, 0, 0.45))
    sky = mix(sky, c.rgb(0.33, 0.16, 0.45), smoothstep(up, 0.35, 1))
    sky = mix(sky, c.rgb(0.98, 0.55, 0.45), ((c.sky_noise() - 0.5) * 4).clamp(0, 1) * 0.5)
    sun_u, sun_v = c.draw(lambda rng: (rng.uniform(-0.35, 0.35), rng.uniform(0.04, 0.14)))
    radius = torch.hypot(c.u - sun_u, c.v - sun_v)
    sky = mix(sky, c.rgb(1.0, 0.96, 0.7), smoothstep(radius, 0.125, 0.11)) + torch.exp(-radius * 5) * 0.25 * c.rgb(1.0, 0.6, 0.2)
    sky = torch.where(c.below_hills(0.01, 0.14), c.rgb(0.28, 0.1, 0.2), sky)
    ground = mix(c.rgb(0.35, 0.18, 0.2), c.rgb(0.6, 0.32, 0.24), c.ground_noise() * 0.6 + c.ground_grain() * 0.4)
    return Layers(sky, ground, c.is_ground)


def under_water(c: Canvas) -> Layers:
    """Blue-green water with beams of light from above, swaying weeds, bubbles, pale sand with a net of light."""
    far = c.rgb(0.08, 0.42, 0.55)
    beams = smoothstep(torch.sin((c.u + c.v * 0.45) * 17 + c.offset[0] * 6 + torch.sin(c.u * 5)), 0.35, 1.0) * (c.v / 0.5).clamp(0, 1)
    water = mix(mix(far, c.rgb(0.2, 0.72, 0.8), (c.v / 0.5).clamp(0, 1)), c.rgb(0.75, 0.97, 0.95), beams * 0.55)
    weeds = c.draw(lambda rng: [(rng.choice([-1, 1]) * rng.uniform(0.16, 0.7), rng.uniform(0.14, 0.42), rng.uniform(0, 6.28)) for _ in range(8)])
    is_weed = torch.zeros_like(c.is_ground)
    for center, height, phase in weeds:
        sway = center + 0.03 * torch.sin(c.v * 22 + phase)
        is_weed |= ((c.u - sway).abs() < 0.022 * (1.15 - c.v / height)) & (c.v < height)
    water = torch.where(is_weed, mix(c.rgb(0.05, 0.3, 0.16), c.rgb(0.2, 0.55, 0.2), (c.v * 2.5).clamp(0, 1)), water)
    bubbles = c.draw(lambda rng: [(rng.uniform(-0.6, 0.6), rng.uniform(0.02, 0.45), rng.uniform(0.012, 0.03)) for _ in range(12)])
    for bubble_u, bubble_v, size in bubbles:
        q = torch.hypot(c.u - bubble_u, c.v - bubble_v) / size
        water = mix(water, c.rgb(0.85, 0.98, 1.0), (q < 1) * (0.25 + 0.6 * (q > 0.6)))
    net = smoothstep((c.noise(c.x * 0.3 + c.offset[1], c.z * 0.3) - 0.5).abs(), 0.06, 0.0)
    sand = mix(c.rgb(0.42, 0.66, 0.6), c.rgb(0.58, 0.76, 0.64), c.ground_grain()) + net * 0.2
    return Layers(water, mix(sand, far, (c.distance / 11).clamp(0, 1)), c.is_ground)


def flower_field(c: Canvas) -> Layers:
    """Rows of tulips towards the horizon, each row in one colour with green between, a blue sky, trees far away."""
    sky = c.sky(c.rgb(0.8, 0.92, 1.0), c.rgb(0.35, 0.62, 0.95), 0.9)
    sky = torch.where(c.below_hills(0.0, 0.09), c.rgb(0.13, 0.36, 0.2), sky)
    across = c.x * 0.9 + c.offset[0] * 5 + 40
    row = across.floor()
    petals = torch.tensor([(0.9, 0.08, 0.12), (1.0, 0.82, 0.1), (0.95, 0.35, 0.65), (0.55, 0.2, 0.7), (1.0, 0.5, 0.1)], device=c.u.device)
    color = petals[(row.long() * 2 + c.bank) % 5][:, 0].movedim(-1, 1)  # (B, 3, N, N)
    heads = c.rough(c.x * 0.55 + c.offset[1], c.z * 0.3 + c.offset[2])
    leaves = mix(c.rgb(0.1, 0.35, 0.08), c.rgb(0.3, 0.6, 0.15), heads)
    is_head = (heads > 0.36) & ((across - row - 0.5).abs() < 0.36)
    return Layers(sky, torch.where(is_head, color * (0.55 + 0.6 * heads), leaves), c.is_ground)


def rain(c: Canvas) -> Layers:
    """Dark clouds over grey hills, wet slate with bright puddles; drops fall in front of all (see `weather`)."""
    clouds = smoothstep(c.sky_noise(), 0.3, 0.75)
    sky = mix(c.sky(c.rgb(0.56, 0.6, 0.65), c.rgb(0.3, 0.34, 0.4)), c.rgb(0.2, 0.23, 0.29), clouds * 0.8)
    sky = torch.where(c.below_hills(0.02, 0.16), c.rgb(0.23, 0.3, 0.31), sky)
    slate = mix(c.rgb(0.2, 0.23, 0.26), c.rgb(0.33, 0.36, 0.38), c.ground_grain())
    puddle = smoothstep(c.noise(c.x * 0.05 + c.offset[0], c.z * 0.05 + c.offset[1]), 0.46, 0.54)
    mirror = mix(c.rgb(0.46, 0.53, 0.62), c.rgb(0.72, 0.78, 0.84), 0.5 + 0.5 * torch.sin(c.z * 7 + torch.sin(c.x * 3) * 1.5))
    return Layers(sky, mix(slate, mirror, puddle * 0.85), c.is_ground)
