"""What lives: duck, dog, mushroom, fish, tree, penguin. One function a class; `shapes.BUILDERS` lists them."""

import numpy as np

from dreambooth.lab.identities import Identity
from dreambooth.lab.primitives import (
    DARK,
    GLOSSY,
    MATT,
    SIDES,
    WHITE,
    Primitive,
    ball,
    pattern_of,
    tube,
    turn_x,
    turn_z,
)


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


def fish(me: Identity) -> list[Primitive]:
    """Flat oval body that stands on its fins, forked tail, dorsal fin, big eyes and lips; sometimes a stripe behind the head."""
    body, second, fin, lip = me.colors
    length, height, depth, y = me.between(0, 0.58, 0.74), me.between(1, 0.36, 0.5), me.between(2, 0.18, 0.25), me.between(3, 0.5, 0.58)
    tail = me.between(4, 0.26, 0.36)
    parts = [
        ball((0, y, 0), (length, height, depth), body, pattern=pattern_of(me), gloss=GLOSSY),
        ball((length * 0.95, y - 0.06, 0), (0.1, 0.09, 0.1), lip),
        ball((-0.05, y + height * 0.95, 0), (length * 0.5, me.between(5, 0.16, 0.26), 0.05), fin, rotation=turn_z(0.15)),
        ball((-0.02, y - height * 0.95, 0), (length * 0.3, 0.16, 0.05), fin, rotation=turn_z(0.3)),
    ]
    for side in SIDES:
        parts += [
            ball((-length - tail * 0.55, y + side * tail * 0.6, 0), (tail, tail * 0.42, 0.05), fin, rotation=turn_z(-side * 0.75)),
            ball((length * 0.62, y + height * 0.25, side * depth * 0.68), (0.12, 0.12, 0.07), WHITE),
            ball((length * 0.65, y + height * 0.26, side * (depth * 0.68 + 0.05)), (0.07, 0.07, 0.05), DARK),
            ball((length * 0.1, y - height * 0.2, side * depth), (0.17, 0.09, 0.04), fin, rotation=turn_z(0.5)),
        ]
    if me.has(6, 0.4):
        parts.append(ball((length * 0.34, y, 0), (0.06, height * 0.95, depth * 0.99), second))
    return parts


def tree(me: Identity) -> list[Primitive]:
    """Trunk with a crown of three cones, or of round clumps, in the main colour; fruit in the third; sometimes roots."""
    crown, second, fruit, bark = me.colors
    radius, height, stem, girth = me.between(0, 0.42, 0.56), me.between(1, 0.5, 0.66), me.between(2, 0.2, 0.34), me.between(3, 0.09, 0.15)
    foot, paint = 2 * stem, pattern_of(me)
    if me.has(5):
        y = foot + height * 0.4
        parts = [
            tube((0, y + height * 0.62 * level, 0), radius * (1 - 0.24 * level), height * 0.46, crown, 1, 0.1, pattern=paint, gloss=MATT)
            for level in (2, 1, 0)
        ]
    else:
        y = foot + height * 0.8
        parts = [ball((0, y + height * 0.1, 0), (radius, height * 0.8, radius), crown, pattern=paint, gloss=MATT)]
        for index in range(6):
            angle, lift = np.pi * index / 3 + me.between(6, 0, 1), (-0.32, 0.12)[index % 2]
            center = (np.cos(angle) * radius * 0.66, y + height * lift, np.sin(angle) * radius * 0.66)
            parts.append(ball(center, radius * 0.56, crown, pattern=paint, gloss=MATT))
    parts.append(tube((0, stem + 0.1, 0), girth, stem + 0.1, bark, me.between(4, 1, 1.5), 0.8, gloss=MATT))
    for index in range(7 if me.has(7, 0.65) else 0):
        angle, y = 2.4 * index + 0.5, foot + height * (0.3 + 0.13 * index)
        reach = radius * ((1.0 if me.has(5) else 1.15) - 0.085 * index)
        parts.append(ball((np.cos(angle) * reach, y, np.sin(angle) * reach), 0.085, fruit, gloss=GLOSSY))
    if me.has(8, 0.4):
        parts.append(tube((0, 0.04, 0), girth * 2.6, 0.05, second, 1, 0.7))
    return parts


def penguin(me: Identity) -> list[Primitive]:
    """Upright egg with a white belly (on a white coat: in the second colour), flippers, ball head, small beak, flat feet; sometimes a crest."""
    coat, second, flipper, beak = me.colors
    belly = second if me.main_color == "white" else WHITE
    radius, height, skull = me.between(0, 0.36, 0.48), me.between(1, 0.52, 0.64), me.between(2, 0.25, 0.32)
    y, spread = height + 0.08, me.between(3, 0.2, 0.5)
    face = 2 * height + skull * 0.5
    parts = [
        ball((0, y, 0), (radius, height, radius * 0.92), coat, pattern=pattern_of(me)),
        ball((0, y - height * 0.12, radius * 0.36), (radius * 0.72, height * 0.78, radius * 0.72), belly, gloss=MATT),
        ball((0, face, 0), skull, coat),
        tube((0, face - 0.04, skull + 0.07), 0.09, 0.13, beak, 1, 0.15, rotation=turn_x(np.pi / 2)),
    ]
    for side in SIDES:
        parts += [
            ball((side * (radius + 0.06), y + height * 0.1, 0), (0.08, height * 0.62, 0.19), flipper, rotation=turn_z(side * spread)),
            ball((side * radius * 0.45, 0.06, radius * 0.6), (0.16, 0.07, 0.24), beak),
            ball((side * skull * 0.45, face + 0.07, skull * 0.72), (0.11, 0.12, 0.1), WHITE),
            ball((side * skull * 0.45, face + 0.08, skull * 0.72 + 0.08), (0.055, 0.06, 0.05), DARK),
        ]
    if me.has(5, 0.4):
        parts += [ball((side * 0.09, face + skull * 1.1, 0), (0.05, 0.16, 0.05), second, rotation=turn_z(-side * 0.5)) for side in SIDES]
    if me.has(6, 0.4):
        parts.append(tube((0, 2 * height - 0.03, 0), skull * 0.85, 0.06, second))
    return parts
