"""What people make and use: robot, teapot, house, backpack, chair, lamp. One function a class; `shapes.BUILDERS` lists them."""

import numpy as np

from dreambooth.lab.identities import Identity
from dreambooth.lab.primitives import (
    DARK,
    GLASS,
    GLOSSY,
    MATT,
    METAL,
    SATIN,
    SIDES,
    WHITE,
    Primitive,
    arc,
    ball,
    box,
    pattern_of,
    tube,
    turn_z,
)


def robot(me: Identity) -> list[Primitive]:
    """Box or barrel body, box or ball head with eyes, jointed limbs, an antenna or ears."""
    body, second, head, limb = me.colors
    width, height, leg, skull = me.between(0, 0.3, 0.5), me.between(1, 0.3, 0.45), me.between(2, 0.14, 0.3), me.between(3, 0.2, 0.32)
    hip = leg * 2
    neck = hip + 2 * height + 0.06
    face = neck + skull * 1.1
    if me.has(6):
        parts = [box((0, hip + height, 0), (width, height, width * 0.7), body, pattern=pattern_of(me))]
    else:
        ends = me.between(7, 0.75, 1.1), me.between(8, 0.7, 1.1)
        parts = [tube((0, hip + height, 0), (width, width * 0.8), height, body, *ends, pattern=pattern_of(me))]
    middle = (0, neck + skull, 0)
    parts.append(box(middle, (skull * 1.15, skull, skull), head) if me.has(4) else ball(middle, skull * 1.15, head))
    for side in SIDES:
        parts += [
            tube((side * width * 0.5, leg, 0), 0.11, leg, limb),
            box((side * width * 0.5, 0.05, 0.06), (0.14, 0.06, 0.2), limb),
            tube((side * (width + 0.1), hip + height * 1.15, 0), 0.085, height * 0.85, limb, rotation=turn_z(side * 0.25)),
            ball((side * (width + 0.19), hip + height * 0.35, 0), 0.12, head),
            ball((side * skull * 0.5, face, skull * 0.95), 0.085, WHITE),
            ball((side * skull * 0.5, face, skull * 0.95 + 0.06), 0.05, DARK),
        ]
    if me.has(5):
        crown = neck + 2 * skull
        return [*parts, tube((0, crown + 0.12, 0), 0.03, 0.14, METAL), ball((0, crown + 0.28, 0), 0.08, second)]
    return parts + [ball((side * skull * 1.2, neck + skull, 0), (0.07, 0.12, 0.12), second) for side in SIDES]


def teapot(me: Identity) -> list[Primitive]:
    """Round pot on a foot, lid with a knob, spout, beaded handle."""
    pot, _, lid, trim = me.colors
    radius, height = me.between(0, 0.48, 0.62), me.between(1, 0.36, 0.55)
    y = height + 0.06
    return [
        ball((0, y, 0), (radius, height, radius), pot, pattern=pattern_of(me), gloss=GLOSSY),
        tube((0, 0.06, 0), radius * 0.55, 0.06, trim),
        ball((0, y + height * 0.9, 0), (radius * 0.5, 0.1, radius * 0.5), lid),
        ball((0, y + height * 0.9 + 0.15, 0), me.between(2, 0.07, 0.12), trim),
        tube((radius * 1.15, y + 0.12, 0), 0.1, 0.34, lid, 1.35, 0.6, rotation=turn_z(-me.between(3, 0.6, 0.95)), gloss=SATIN),
        *arc((-radius, y + 0.04, 0), me.between(4, 0.2, 0.28), 0.065, trim, 8, np.pi * 0.5, np.pi * 1.5),
    ]


def house(me: Identity) -> list[Primitive]:
    """Box with a cone or gable roof, a door, windows; sometimes a chimney."""
    wall, second, roof, door = me.colors
    width, height, depth, rise = me.between(0, 0.45, 0.65), me.between(1, 0.3, 0.5), me.between(2, 0.4, 0.55), me.between(3, 0.2, 0.34)
    eaves = 2 * height
    parts = [box((0, height, 0), (width, height, depth), wall, pattern=pattern_of(me), gloss=0.05)]
    if me.has(6, 0.6):
        parts.append(tube((0, eaves + rise, 0), (width * 1.55, depth * 1.55), rise, roof, 1, 0.03, gloss=0.1))
    else:
        slope, run = np.arctan2(rise * 2.2, width), np.hypot(rise * 2.2, width)
        for side in SIDES:
            panel = (width * side * 0.52, eaves + rise * 1.05, 0), (run * 0.56, 0.05, depth * 1.12)
            parts.append(box(*panel, roof, rotation=turn_z(-side * slope), gloss=0.1))
        parts.append(ball((0, eaves, 0), (width * 0.9, rise * 1.9, depth * 0.98), wall))
    parts.append(box((me.between(4, -0.2, 0.2) * width, 0.22, depth), (0.12, 0.22, 0.03), door))
    for side in SIDES:
        parts += [
            box((side * width * 0.62, height * 1.3, depth), (0.11, 0.12, 0.025), GLASS),
            box((width * side, height * 1.2, 0), (0.025, 0.13, 0.16), GLASS),
        ]
    if me.has(5):
        parts.append(box((width * 0.5, eaves + rise * 1.5, -0.1), (0.09, 0.28, 0.09), second))
    return parts


def backpack(me: Identity) -> list[Primitive]:
    """Box with a rounded top, a front pocket with flap and buckle, side pockets, a handle; sometimes straps."""
    cloth, second, pocket, trim = me.colors
    width, height, depth, y = me.between(0, 0.38, 0.52), me.between(1, 0.48, 0.6), me.between(2, 0.22, 0.3), me.between(3, 0.2, 0.3)
    parts = [
        box((0, height * 0.93, 0), (width, height * 0.9, depth), cloth, pattern=pattern_of(me), gloss=MATT),
        ball((0, height * 1.7, 0), (width * 1.02, height * 0.36, depth * 1.05), pocket if me.has(5) else cloth, gloss=MATT),
        box((0, y + 0.08, depth + 0.08), (width * 0.72, y, 0.1), pocket, gloss=MATT),
        box((0, 2 * y + 0.06, depth + 0.17), (width * 0.74, 0.05, 0.03), trim),
        ball((me.between(6, -0.2, 0.2) * width, y + 0.05, depth + 0.18), (0.09, 0.09, 0.03), second),
    ]
    parts += [tube((side * (width + 0.05), 0.32, 0), 0.12, 0.26, trim, gloss=MATT) for side in SIDES]
    parts += arc((0, height * 2.0, 0), 0.15, 0.045, trim, 6, 0, np.pi)
    if me.has(7):
        parts += [box((side * width * 0.5, height * 1.25, depth * 1.02), (0.05, height * 0.5, 0.025), trim) for side in SIDES]
    return parts


def chair(me: Identity) -> list[Primitive]:
    """Seat on four legs, a back of one panel or of three slats under a rail; sometimes arms or a cushion."""
    back, second, seat, leg = me.colors
    width, height, rise, thickness = me.between(0, 0.42, 0.56), me.between(1, 0.24, 0.34), me.between(2, 0.38, 0.52), me.between(3, 0.05, 0.08)
    y = 2 * height
    top = y + 2 * rise
    if me.has(5, 0.6):
        parts = [box((0, y + rise + 0.06, -width * 0.92), (width, rise * 0.9, 0.06), back, pattern=pattern_of(me))]
    else:
        parts = [box((0, top - 0.1, -width * 0.92), (width, 0.14, 0.065), second)]
        parts += [box((x * width * 0.78, y + rise, -width * 0.92), (width * 0.2, rise, 0.05), back, pattern=pattern_of(me)) for x in (-1, 0, 1)]
    parts.append(box((0, y, 0), (width, thickness, width), seat))
    for side in SIDES:
        parts += [tube((side * width * 0.85, height, end * width * 0.85), 0.07, height, leg, me.between(4, 0.6, 1), 1) for end in SIDES]
    if me.has(6, 0.35):
        for side in SIDES:
            parts += [
                box((side * width * 0.95, y + rise * 0.75, 0), (0.07, 0.05, width * 0.95), second),
                tube((side * width * 0.95, y + rise * 0.38, width * 0.75), 0.05, rise * 0.38, leg),
            ]
    if me.has(7, 0.45):
        parts.append(ball((0, y + 0.1, 0.05), (width * 0.82, 0.12, width * 0.8), second, gloss=MATT))
    return parts


def lamp(me: Identity) -> list[Primitive]:
    """Foot, thin stem or round vase, a wide cone for a shade with the bulb below it; sometimes a chain."""
    shade, second, stem, foot = me.colors
    radius, height, rise = me.between(0, 0.44, 0.6), me.between(1, 0.26, 0.4), me.between(2, 0.36, 0.55)
    collar = 2 * rise
    parts = [
        tube((0, collar + height, 0), radius, height, shade, 1, me.between(6, 0.35, 0.7), pattern=pattern_of(me), gloss=MATT),
        tube((0, 0.05, 0), me.between(3, 0.28, 0.4), 0.05, foot),
        tube((0, rise, 0), 0.065, rise, stem, gloss=SATIN),
        ball((0, collar - 0.02, 0), 0.15, (1.6, 1.5, 1.0), gloss=0.0),
        tube((0, collar + 0.025, 0), radius * 1.03, 0.04, second),
    ]
    if me.has(5):
        girth = me.between(4, 0.18, 0.28)
        parts.append(ball((0, rise * 0.75, 0), (girth, rise * 0.6, girth), stem, gloss=GLOSSY))
    if me.has(7, 0.4):
        parts += [tube((radius * 0.6, collar - 0.14, 0.1), 0.02, 0.14, DARK), ball((radius * 0.6, collar - 0.3, 0.1), 0.055, second)]
    return parts
