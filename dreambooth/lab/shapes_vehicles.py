"""What drives, floats and flies: car, boat, rocket, train. One function a class; `shapes.BUILDERS` lists them."""

import numpy as np

from dreambooth.lab.identities import Identity
from dreambooth.lab.primitives import (
    DARK,
    GLASS,
    GLOSSY,
    METAL,
    MIRROR,
    SATIN,
    SIDES,
    Kind,
    Pattern,
    Primitive,
    ball,
    box,
    pattern_of,
    tube,
    turn_x,
    turn_y,
    turn_z,
)


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


def train(me: Identity) -> list[Primitive]:
    """Locomotive: lying boiler with a dome and a chimney, a tall cab with windows and a roof behind, a row of wheels, a bumper."""
    boiler, second, cab, trim = me.colors
    length, radius, wheel = me.between(0, 0.5, 0.64), me.between(1, 0.24, 0.31), me.between(2, 0.17, 0.22)
    y, height, chimney = 1.6 * wheel + radius, me.between(3, 0.42, 0.55), me.between(4, 0.16, 0.26)
    front, back, lying = length, -length * 0.75, turn_z(-np.pi / 2)
    parts = [
        tube((length * 0.3, y, 0), radius, length * 0.7, boiler, rotation=lying, pattern=pattern_of(me), gloss=SATIN),
        tube((front + 0.02, y, 0), radius * 0.8, 0.04, second, rotation=lying),
        box((back, y - radius + height, 0), (0.3, height, 0.36), cab),
        box((back, y - radius + 2 * height, 0), (0.38, 0.05, 0.44), second),
        box((0, 1.5 * wheel, 0), (length * 1.1, 0.06, 0.3), DARK),
        box((front * 1.12, wheel, 0), (0.1, wheel * 0.75, 0.32), trim, rotation=turn_z(0.4)),
        tube((front * 0.75, y + radius + chimney, 0), 0.11, chimney + 0.05, second, 0.8, 1.5 if me.has(5) else 0.9),
        ball((front * 0.22, y + radius, 0), (0.14, 0.16, 0.14), trim, gloss=GLOSSY),
        ball((front + 0.05, y, 0), 0.09, (1.0, 0.95, 0.7)),
        box((back - 0.46, 1.5 * wheel, 0), (0.1, 0.05, 0.06), DARK),
    ]
    axle = turn_x(np.pi / 2)
    for side in SIDES:
        parts.append(box((back, y - radius + height * 1.45, side * 0.35), (0.17, height * 0.3, 0.03), GLASS))
        for place in range(3):
            x = back + (front - back) * (0.06 + 0.4 * place)
            parts += [
                tube((x, wheel, side * 0.3), wheel, 0.06, DARK, rotation=axle),
                tube((x, wheel, side * 0.34), wheel * 0.6, 0.05, trim, rotation=axle),
            ]
    return parts
