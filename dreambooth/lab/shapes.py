"""From a subject to its solids: one function a class. The numbers are the look of the world; the shipped weights were trained on it."""

from collections.abc import Callable

import numpy as np

from dreambooth.lab.identities import Identity
from dreambooth.lab.primitives import (
    DARK,
    GLASS,
    GLOSSY,
    MATT,
    METAL,
    MIRROR,
    SATIN,
    WHITE,
    Kind,
    Pattern,
    Primitive,
    arc,
    ball,
    box,
    pattern_of,
    tube,
    turn_x,
    turn_y,
    turn_z,
)

SIDES = (-1, 1)


def build(subject: Identity) -> list[Primitive]:
    """Returns the solids of a subject in its own space, with the hat on top if it wears one."""
    parts = BUILDERS[subject.class_noun](subject)
    return parts + hat_on(parts) if subject.hat else parts


def hat_on(parts: list[Primitive]) -> list[Primitive]:
    """Returns a black top hat with a red band, on the highest part."""
    tallest = max(parts, key=lambda part: (round(part.highest, 5), tuple(part.center)))  # rounded: a gable's two slopes are equally high
    x, top = tallest.center[0], tallest.highest
    return [
        tube((x, top, 0), 0.34, 0.03, DARK),
        tube((x, top + 0.2, 0), 0.22, 0.2, DARK),
        tube((x, top + 0.07, 0), 0.23, 0.05, (0.8, 0.08, 0.1)),
    ]


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


def car(me: Identity) -> list[Primitive]:
    """Box body, tapered or square glass cabin with a roof, four wheels, lamps, sometimes a wing."""
    body, _, roof, trim = me.colors
    length, height, wheel, width = me.between(0, 0.75, 0.95), me.between(1, 0.15, 0.21), me.between(2, 0.16, 0.22), 0.4
    cabin, x, cabin_height = me.between(3, 0.36, 0.55), me.between(4, -0.2, 0.1), me.between(5, 0.15, 0.21)
    y = wheel + height * 0.9
    deck = y + height
    parts = [box((0, y, 0), (length, height, width), body, pattern=pattern_of(me), gloss=GLOSSY)]
    if me.has(6):
        parts += [
            tube((x, deck + cabin_height, 0), (cabin, width * 0.85), cabin_height, GLASS, 1.1, 0.75, gloss=MIRROR),
            box((x, deck + 2 * cabin_height, 0), (cabin * 0.72, 0.035, width * 0.6), roof),
        ]
    else:
        parts += [
            box((x, deck + cabin_height, 0), (cabin, cabin_height, width * 0.88), GLASS, gloss=MIRROR),
            box((x, deck + 2 * cabin_height, 0), (cabin * 1.05, 0.05, width * 0.92), roof),
        ]
    axle = turn_x(np.pi / 2)
    for end in SIDES:
        for side in SIDES:
            parts += [
                tube((end * length * 0.6, wheel, side * width), wheel, 0.08, DARK, rotation=axle),
                tube((end * length * 0.6, wheel, side * (width + 0.04)), wheel * 0.55, 0.06, trim, rotation=axle),
            ]
    parts += [ball((length, y, side * 0.24), 0.075, (1.0, 0.95, 0.7)) for side in SIDES]
    if me.has(7, 0.4):
        parts += [
            box((-length * 0.85, deck + 0.14, 0), (0.05, 0.12, 0.03), DARK),
            box((-length * 0.88, deck + 0.25, 0), (0.13, 0.03, width), trim),
        ]
    return parts


def duck(me: Identity) -> list[Primitive]:
    """Egg body, ball head, beak, wings, tail, eyes; sometimes a collar or a tuft."""
    body, second, head, beak = me.colors
    length, height, skull = me.between(0, 0.5, 0.65), me.between(1, 0.32, 0.42), me.between(2, 0.22, 0.3)
    back = 2 * height
    parts = [
        ball((0, height, 0), (length, height, height * 0.95), body, pattern=pattern_of(me)),
        ball((length * 0.7, back + skull * 0.75, 0), skull, head),
        tube((length * 0.7 + skull * 1.15, back + skull * 0.65, 0), 0.14, 0.13, beak, 1, 0.35, rotation=turn_z(-np.pi / 2)),
        ball((-length * 0.95, height + 0.16, 0), (0.2, 0.12, 0.15), body, rotation=turn_z(-0.6)),
    ]
    for side in SIDES:
        parts += [
            ball((-0.1, height + 0.06, side * height * 0.85), (length * 0.55, height * 0.5, 0.1), second, rotation=turn_z(0.2)),
            ball((length * 0.7 + skull * 0.62, back + skull * 0.95, side * skull * 0.6), 0.075, WHITE),
            ball((length * 0.7 + skull * 0.7, back + skull * 0.97, side * skull * 0.66), 0.05, DARK),
        ]
    if me.has(5, 0.4):
        parts.append(tube((length * 0.62, height + height * 0.93, 0), skull * 0.8, 0.06, beak))
    if me.has(6, 0.4):
        parts.append(tube((length * 0.68, back + skull * 1.8, 0), 0.05, 0.12, second, top=0.2))
    return parts


def dog(me: Identity) -> list[Primitive]:
    """Long body on four legs, head with muzzle and hanging or pricked ears, tail; sometimes a collar."""
    coat, second, head, trim = me.colors
    length, girth, leg, skull = me.between(0, 0.42, 0.6), me.between(1, 0.23, 0.32), me.between(2, 0.16, 0.3), me.between(3, 0.24, 0.31)
    y = 2 * leg + girth * 0.7
    x_head, y_head = length * 0.95, y + girth + skull * 0.35
    hanging = me.has(4)
    parts = [
        ball((0, y, 0), (length, girth, girth * 0.95), coat, pattern=pattern_of(me), gloss=MATT),
        ball((x_head, y_head, 0), skull, head if me.has(7) else coat, gloss=MATT),
        ball((x_head + skull * 0.95, y_head - 0.07, 0), (0.19, 0.12, 0.13), second if me.has(8) else WHITE, gloss=MATT),
        ball((x_head + skull * 0.95 + 0.17, y_head - 0.02, 0), 0.065, DARK),
    ]
    for side in SIDES:
        ear = y_head + (0.02 if hanging else skull * 0.95)
        tilt = turn_x(side * (-0.35 if hanging else 0.3))
        parts += [
            ball((x_head - 0.04, ear, side * skull * 0.85), (0.1, 0.22, 0.07), trim, rotation=tilt, gloss=MATT),
            ball((x_head + skull * 0.75, y_head + 0.1, side * skull * 0.5), 0.06, WHITE),
            ball((x_head + skull * 0.82, y_head + 0.1, side * skull * 0.5), 0.042, DARK),
        ]
        for end in SIDES:
            parts += [
                tube((end * length * 0.62, leg, side * girth * 0.6), 0.085, leg, coat, gloss=MATT),
                ball((end * length * 0.62 + 0.03, 0.06, side * girth * 0.6), (0.12, 0.07, 0.1), trim, gloss=MATT),
            ]
    parts.append(tube((-length - 0.1, y + girth * 0.7, 0), 0.06, 0.24, trim, top=0.5, rotation=turn_z(0.7 if me.has(5) else 0.25)))
    if me.has(6):
        parts.append(tube((x_head - 0.12, y + girth * 0.85, 0), skull * 0.8, 0.05, trim, rotation=turn_z(-0.5)))
    return parts


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


def boat(me: Identity) -> list[Primitive]:
    """Hull that widens upwards, deck, mast with a sail or a cabin and a square sail, a flag; sometimes portholes."""
    hull, second, sail, trim = me.colors
    length, height, mast = me.between(0, 0.6, 0.8), me.between(1, 0.17, 0.24), me.between(2, 0.5, 0.68)
    deck = 2 * height
    parts = [
        tube((0, height, 0), (length, 0.36), height, hull, 0.66, 1, pattern=pattern_of(me), gloss=0.5),
        tube((0, deck, 0), (length * 0.96, 0.34), 0.03, second),
        tube((0, deck + mast, 0), 0.04, mast, (0.4, 0.27, 0.15)),
    ]
    if me.has(5, 0.7):
        stripes = Pattern("stripes", trim, 2) if me.has(6) else None
        parts.append(tube((0.26, deck + mast * 1.05, 0), (0.36, 0.03), mast * 0.82, sail, 1, 0.04, pattern=stripes))
    else:
        parts += [
            box((-0.3, deck + 0.16, 0), (0.24, 0.16, 0.2), sail),
            box((0.25, deck + mast * 1.2, 0), (0.24, mast * 0.4, 0.02), trim),
        ]
    parts.append(box((-0.14, deck + 2 * mast - 0.08, 0), (0.13, 0.075, 0.015), trim))
    if me.has(7, 0.4):
        parts += [ball((side * length * 0.45, height * 1.3, 0.34), 0.085, trim) for side in SIDES]
    return parts


def mushroom(me: Identity) -> list[Primitive]:
    """Stalk, round or pointed cap with gills; sometimes a small one beside it, or a ring."""
    cap, second, stalk, gills = me.colors
    radius, height, stem, girth = me.between(0, 0.42, 0.68), me.between(1, 0.22, 0.42), me.between(2, 0.25, 0.45), me.between(3, 0.15, 0.25)
    top = 2 * stem
    parts = [tube((0, stem, 0), girth, stem, stalk, me.between(4, 1, 1.5), 0.85, gloss=0.1)]
    if me.has(5, 0.65):
        parts.append(ball((0, top + height * 0.2, 0), (radius, height, radius), cap, pattern=pattern_of(me)))
    else:
        parts.append(tube((0, top + height * 0.5, 0), radius, height * 0.9, cap, 1, me.between(6, 0.05, 0.3), pattern=pattern_of(me)))
    parts.append(tube((0, top - 0.02, 0), radius * 0.86, 0.05, gills))
    if me.has(7, 0.4):
        parts += [tube((girth + 0.25, 0.14, 0.12), 0.07, 0.14, stalk), ball((girth + 0.25, 0.3, 0.12), (0.19, 0.13, 0.19), cap)]
    if me.has(8, 0.35):
        parts.append(tube((0, stem * 1.1, 0), girth * 1.35, 0.04, second))
    return parts


def rocket(me: Identity) -> list[Primitive]:
    """Standing tube with a nose cone, nozzle, porthole and three or four fins; sometimes a ring."""
    hull, second, nose, fin = me.colors
    radius, height, tip = me.between(0, 0.24, 0.36), me.between(1, 0.42, 0.6), me.between(2, 0.2, 0.34)
    y = 0.25 + height
    parts = [
        tube((0, y, 0), radius, height, hull, me.between(3, 0.75, 1), 1, pattern=pattern_of(me), gloss=SATIN),
        tube((0, y + height + tip, 0), radius, tip, nose, 1, 0.08, gloss=SATIN),
        tube((0, 0.18, 0), radius * 0.6, 0.1, METAL, 1.3, 0.8),
        ball((0, y + height * 0.45, radius * 0.86), (0.14, 0.14, 0.08), METAL),
        ball((0, y + height * 0.45, radius * 0.93), (0.1, 0.1, 0.06), GLASS),
    ]
    fins = 3 if me.has(4) else 4
    for index in range(fins):
        angle = 2 * np.pi * index / fins + 0.5
        foot = (np.cos(angle) * radius * 1.15, 0.32, np.sin(angle) * radius * 1.15)
        parts.append(Primitive(Kind.FRUSTUM, foot, (0.26, 0.32, 0.05), fin, turn_y(-angle), 1, 0.2))
    if me.has(5, 0.4):
        parts.append(tube((0, y - height * 0.6, 0), radius * 1.06, 0.07, second))
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


BUILDERS: dict[str, Callable[[Identity], list[Primitive]]] = {
    "robot": robot, "teapot": teapot, "car": car, "duck": duck, "dog": dog,
    "house": house, "boat": boat, "mushroom": mushroom, "rocket": rocket, "backpack": backpack,
}  # fmt: skip
