"""Random chest patients, painted from ellipsoids: no two alike, every organ on its side, no real person's data.

A patient is designed in the frame of an average adult (mm; x to the Left, y to Posterior, z to Superior, 0 in the
middle of the chest) with random sizes and places, and at the end stretched and turned as a whole. Sizes and CT numbers
are those of textbook anatomy, rounded; the aim is a plausible picture from every direction, not a model of anybody.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from drrgen.phantom import Ellipsoid, Float, Nodule, Phantom, ellipsoid

LEFT, RIGHT = 1.0, -1.0

AIR, FOAM, FAT, BLOOD, MUSCLE, LIVER, SPLEEN = -1000, -900, -100, 40, 50, 60, 48
CARTILAGE, TRABECULAR, RIB, CORTICAL = 130, 190, 780, 800

# Air is painted from 160 mm above and below the centre on, so that the body ends inside a volume 330 mm high.
_CAPS = [ellipsoid(AIR, (0, 0, up * (160 + 900)), (4000, 4000, 900)) for up in (1, -1)]


def thorax(seed: int, table: bool = False) -> Phantom:
    """The patient of this seed, less than 400 mm wide and 330 mm high, with or without the scanner's table.

    The table does not change the patient: the phantom without it is the truth for a volume whose table was removed.
    """
    rng = np.random.default_rng(seed)
    turn = np.deg2rad(rng.uniform(-3, 3))
    turned = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    stretch = np.diag(rng.uniform([0.86, 0.88, 0.95], [1.03, 1.08, 1.02]))
    isocentre_mm = np.round(rng.uniform([-15, -190, -260], [15, -130, -90]), 1)

    def placed(parts: Iterable[Ellipsoid]) -> list[Ellipsoid]:
        mm_from_average = turned @ stretch
        back = np.linalg.inv(mm_from_average)
        return [Ellipsoid(p.hu, isocentre_mm + mm_from_average @ p.centre_mm, p.ball_from_mm @ back) for p in parts]

    spine = Spine(*rng.uniform([-9, 0, 18], [9, 2 * np.pi, 34]))
    lungs = [_draw_lung(rng, side) for side in (RIGHT, LEFT)]
    viscera = [*_mediastinum(rng), *_diaphragm(rng)]
    trunk = placed(_trunk(rng))
    nodules = placed(_nodules(rng, [lung.ellipsoid for lung in lungs], viscera, stretch))
    ellipsoids = [
        *(_table(trunk, isocentre_mm) if table else []),
        *trunk,
        *placed(part for lung in lungs for part in (lung.ellipsoid, *_vessels(rng, lung))),
        *placed(viscera),
        *nodules,
        *placed([*_vertebrae(rng, spine), *_ribs(rng, spine, lungs), *_shoulder_girdle(rng), *_CAPS]),
    ]
    return Phantom(
        f"PHANTOM-{seed:04d}",
        ellipsoids,
        isocentre_mm,
        tuple(Nodule(one.centre_mm, 2 * _smallest_radius_mm(one)) for one in nodules),
    )


@dataclass(frozen=True)
class Spine:
    """The curve of the vertebral bodies' centres: light scoliosis sideways, kyphosis backwards. mm, radians, mm."""

    scoliosis_mm: float
    phase: float
    kyphosis_mm: float

    def at(self, z: float) -> Float:
        sideways = self.scoliosis_mm * np.sin(np.pi * z / 170 + self.phase)
        return np.array([sideways, 57 - self.kyphosis_mm * (z / 150) ** 2, z])


@dataclass(frozen=True)
class Lung:
    """A sheared ellipsoid: its axial sections are ellipses around an axis that leans inwards and backwards to the apex.

    side: +1 left, -1 right. lean: how far the axis moves along x and y per mm of height.
    """

    side: float
    ellipsoid: Ellipsoid
    semi_axes_mm: Float
    lean: Float

    def ring(self, z: float, angle: float, outside_mm: float) -> Float:
        """The point outside the lung's surface at height z: angle 0 is posterior, pi/2 lateral, pi anterior."""
        height = z - self.ellipsoid.centre_mm[2]
        width, depth = self.semi_axes_mm[:2] * np.sqrt(max(1 - (height / self.semi_axes_mm[2]) ** 2, 0.12))
        across = np.array([self.side * (width + outside_mm) * np.sin(angle), (depth + outside_mm) * np.cos(angle)])
        return np.append(self.ellipsoid.centre_mm[:2] + self.lean * height + across, z)


def _draw_lung(rng: np.random.Generator, side: float) -> Lung:
    width = rng.uniform(66, 71) if side == RIGHT else rng.uniform(62, 66)
    semi_axes = np.array([width, rng.uniform(84, 92), 165])
    lean = np.array([-side * 0.13, rng.uniform(0.06, 0.10)])
    upright = ellipsoid(rng.uniform(-880, -820), (side * (width + 3), 0, -42 + rng.uniform(-3, 3)), semi_axes)
    sheared = np.eye(3)
    sheared[:2, 2] = lean
    return Lung(
        side, Ellipsoid(upright.hu, upright.centre_mm, upright.ball_from_mm @ np.linalg.inv(sheared)), semi_axes, lean
    )


def _rod(
    hu: float, start: ArrayLike, end: ArrayLike, across_mm: float, up_mm: float, overlap: float = 1.0
) -> Ellipsoid:
    """A long ellipsoid from start to end, its ends `overlap` beyond them; `up_mm` is its semi-axis nearest to z."""
    first, last = np.asarray(start, dtype=np.float64), np.asarray(end, dtype=np.float64)
    length = np.linalg.norm(last - first)
    along = (last - first) / length
    # a rod that stands upright has no "up" of its own: the patient's back takes its place
    hint = np.array([0, 1, 0]) if abs(along[2]) > 0.95 else np.array([0, 0, 1])
    across = np.cross(hint, along) / np.linalg.norm(np.cross(hint, along))
    axes = np.stack([along, across, np.cross(along, across)], axis=1)
    return ellipsoid(hu, (first + last) / 2, np.array([overlap * length / 2, across_mm, up_mm]), axes)


def _chain(
    hu: float, points: Iterable[ArrayLike], across_mm: float, up_mm: float, overlap: float = 1.8
) -> list[Ellipsoid]:
    """Rods from point to point that overlap by so much that their union is nearly as thick between them as within."""
    return [_rod(hu, a, b, across_mm, up_mm, overlap) for a, b in pairwise(points)]


def _trunk(rng: np.random.Generator) -> list[Ellipsoid]:
    """Muscles and, painted before them, the same shapes thicker by the subcutaneous fat."""
    fat_mm, belly = rng.uniform([7, 0], [18, 14])
    masses = [
        ((0, -2, -40), (165, 107, 205), 0),
        ((0, -10 - belly / 2, -150), (156, 106 + belly / 2, 115), 0),
        ((0, 22, 160), (56, 56, 75), 0),
        ((0, 62, 50), (50, 48, 140), 0),
        *(((side * 48, 62, -15), (62, 50, 190), 0) for side in (LEFT, RIGHT)),
        *(((side * 98, 58, 44), (60, 50, 88), 0) for side in (LEFT, RIGHT)),
        *(((side * 104, 24, 92), (73, 50, 46), side * np.deg2rad(22)) for side in (LEFT, RIGHT)),
        *(((side * 74, -46, 56), (64, 36, 54), 0) for side in (LEFT, RIGHT)),
    ]
    breast_mm = rng.choice([0.0, 1.0]) * rng.uniform(24, 40)
    breasts = [
        ellipsoid(FAT + 40, (side * 78, -88, -20), (58, 10 + breast_mm, 55)) for side in (LEFT, RIGHT) if breast_mm > 0
    ]
    shapes = [(centre, np.array(semi_axes), _sloping(slope)) for centre, semi_axes, slope in masses]
    fat = [ellipsoid(FAT, centre, semi_axes + fat_mm, axes) for centre, semi_axes, axes in shapes]
    return [*fat, *breasts, *(ellipsoid(MUSCLE, *shape) for shape in shapes)]


def _sloping(angle: float) -> Float:
    """Axes for `ellipsoid`, turned in the coronal plane by an angle (rad); a positive one lowers the patient's left."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])


def _diaphragm(rng: np.random.Generator) -> list[Ellipsoid]:
    """Liver, spleen and stomach under the two domes, which cut the lungs off from below; the right one is higher."""
    right_top = rng.uniform(-72, -48)
    left_top = right_top - rng.uniform(8, 20)
    bubble = rng.uniform(18, 30)
    return [
        ellipsoid(MUSCLE, (0, -5, -190), (150, 100, 105)),
        ellipsoid(SPLEEN, (78, -4, left_top - 90), (80, 100, 90)),
        ellipsoid(LIVER, (-74, -6, right_top - 90), (86, 102, 90)),
        ellipsoid(FAT, (75, 20, left_top - 80), (52, 60, 42)),
        ellipsoid(SPLEEN, (104, 42, left_top - 55), (26, 44, 36)),
        ellipsoid(MUSCLE, (62, -22, left_top - 46), (44, 40, 34)),
        ellipsoid(AIR, (62, -26, left_top - 18 - bubble * 0.5), (bubble * 1.1, bubble, bubble * 0.5)),
    ]


def _mediastinum(rng: np.random.Generator) -> list[Ellipsoid]:
    """Heart to the left, great vessels, airways. Ends with the airways, which cut through the rest."""
    heart = rng.uniform(0.84, 1.18)
    tilt = np.deg2rad(rng.uniform(28, 48))
    # the heart's long axis points to the left, forward and down
    apex = np.array([np.cos(tilt), -0.55, -np.sin(tilt)])
    base = np.array([0, -12, -18])
    arch_z = rng.uniform(48, 60)
    arch = [
        (-14, -22, 0),
        (-16, -24, arch_z - 20),
        (-2, -12, arch_z),
        (20, 8, arch_z + 2),
        (25, 32, arch_z - 14),
        (22, 40, 0),
    ]
    carina = np.array([-3, 14, arch_z - 18])
    return [
        ellipsoid(FAT + 60, (0, 6, 45), (25, 52, 92)),
        ellipsoid(BLOOD, (0, 38, -40), (20, 26, 120)),
        *(ellipsoid(BLOOD, (side * 36, 8, 12), (15, 18, 20)) for side in (LEFT, RIGHT)),
        _rod(BLOOD, base - 18 * apex, base + 88 * heart * apex, 44 * heart, 44 * heart, overlap=1.05),
        ellipsoid(BLOOD, (-18, -18, -32), np.array([29, 36, 42]) * heart),
        ellipsoid(BLOOD, (26, -18, 16), (19, 24, 24)),
        ellipsoid(BLOOD, (-24, -6, 55), (11, 12, 48)),
        *_chain(BLOOD, arch, 13, 13),
        _rod(BLOOD, (22, 40, 10), (14, 40, -170), 12, 12, overlap=1.1),
        _rod(AIR, (0, 10, 175), carina, 8.5, 8.0, overlap=1.1),
        *(_rod(AIR, carina, (side * 38, 18, carina[2] - 32), 5.5, 5.5, overlap=1.1) for side in (LEFT, RIGHT)),
    ]


def _vessels(rng: np.random.Generator, lung: Lung) -> list[Ellipsoid]:
    """Arteries and veins: from the hilum outwards, each forking twice, thinner each time, as far as the lung goes."""
    hilum = np.array([lung.side * 38, 8, 10])
    vessels = []
    for latitude in np.linspace(-75, 75, 8) + rng.uniform(-8, 8, 8):
        rise, forward = np.deg2rad(latitude), rng.uniform(-1.1, 1.1)
        out = np.array([lung.side * np.cos(rise) * np.cos(forward), np.cos(rise) * np.sin(forward), np.sin(rise)])
        buds = [(hilum, out, rng.uniform(3.6, 4.6))]
        for generation in range(3):
            grown = []
            for start, direction, radius in buds:
                end = start + direction * rng.uniform(24, 36)
                if np.linalg.norm(lung.ellipsoid.ball_from_mm @ (end - lung.ellipsoid.centre_mm)) > 0.95:
                    continue
                vessels.append(_rod(BLOOD, start, end, radius, radius, overlap=1.25))
                for _ in range(1 if generation == 0 else 2):
                    bent = direction + rng.normal(0, 0.38, 3)
                    grown.append((end, bent / np.linalg.norm(bent), radius * rng.uniform(0.6, 0.75)))
            buds = grown
    return vessels


def _nodules(
    rng: np.random.Generator, lungs: list[Ellipsoid], viscera: list[Ellipsoid], stretch: Float
) -> list[Ellipsoid]:
    """Up to four balls, wholly within the lungs; here they are squeezed, such that `stretch` makes them round."""
    nodules: list[Ellipsoid] = []
    wanted = rng.integers(0, 5)
    while len(nodules) < wanted:
        lung = lungs[rng.integers(0, 2)]
        radius = rng.uniform(3, 12)
        margin = 1.25 * radius  # more than squeezing adds to it
        place = lung.centre_mm + np.linalg.inv(lung.ball_from_mm) @ rng.uniform(-1, 1, 3)
        if _clearance_mm(lung, place) < -margin and all(_clearance_mm(o, place) > margin for o in (*viscera, *nodules)):
            nodules.append(Ellipsoid(int(rng.integers(-20, 90)), place, stretch / radius))
    return nodules


def _smallest_radius_mm(one: Ellipsoid) -> float:
    return float(1 / np.linalg.norm(one.ball_from_mm, 2))


def _clearance_mm(one: Ellipsoid, point_mm: Float) -> float:
    """A point is at least this far outside an ellipsoid, or inside where negative.

    The map to the ball stretches distances by no more than the inverse of the smallest radius.
    """
    return float(np.linalg.norm(one.ball_from_mm @ (point_mm - one.centre_mm)) - 1) * _smallest_radius_mm(one)


def _vertebrae(rng: np.random.Generator, spine: Spine) -> list[Ellipsoid]:
    """C7 to L1, each with a spinous and two transverse processes: a column, cut into bodies by end plates and discs."""
    density = rng.uniform(0.75, 1.15)
    shells, marrow, plates, discs, processes = [], [], [], [], []
    for number, z in enumerate(_VERTEBRA_Z):
        body = spine.at(z)
        below = spine.at(z - _PITCH_MM[number] / 2)
        width, depth, height = 14.5 + 0.5 * number, 12 + 0.5 * number, _PITCH_MM[number] * 0.72
        shells.append(ellipsoid(CORTICAL * density, body, (width, depth, height)))
        marrow.append(ellipsoid(TRABECULAR * density, body, (width - 1.5, depth - 1.5, height - 1)))
        plates.append(ellipsoid(CORTICAL * density, below, (width, depth, 4.2)))
        discs.append(ellipsoid(90, below, (width * 1.2, depth * 1.2, 3)))
        processes.append(_rod(RIB * density, body + [0, 24, 2], body + [0, 45, -14], 3, 6))
        processes.append(_rod(RIB * density / 2, body + [-32, 26, 4], body + [32, 26, 4], 4, 5))
    return [*shells, *marrow, *plates, *discs, *processes]


# The distances from C7, T1 ... T12, L1 of the average adult to the next vertebra, and the heights of their centres.
_PITCH_MM = 17.3 + 0.62 * np.arange(14)
_VERTEBRA_Z = 139 - np.cumsum([0, *_PITCH_MM[:-1]])


def _ribs(rng: np.random.Generator, spine: Spine, lungs: list[Lung]) -> list[Ellipsoid]:
    """Twelve pairs: from the spine backwards, round the lung and down to the front; cartilage on to the sternum."""
    slope = rng.uniform(0.52, 0.74)
    density = rng.uniform(0.8, 1.15)
    thickness = rng.uniform(0.9, 1.1)
    front_angles = np.deg2rad([130, 138, 142, 142, 140, 136, 132, 126, 120, 112, 78, 52])
    sternum_z = [84, *(64 - 17.0 * np.arange(6))]
    bones = []
    for lung in lungs:
        for number, front in enumerate(front_angles):
            head = spine.at(_VERTEBRA_Z[number + 1]) + [lung.side * 17, 9, 5]
            tubercle = head + [lung.side * 20, 15, 0]
            angles = np.linspace(np.deg2rad(-8), front, max(round(np.rad2deg(front) / 16), 3))
            turn_mm = 2 * lung.semi_axes_mm[1] * (0.62 if number == 0 else 0.9)
            heights = head[2] + 2 - slope * turn_mm * (1 - np.cos(angles - angles[0])) / 2
            arc = [lung.ring(z, angle, 6) for z, angle in zip(heights, angles, strict=True)]
            bones += _chain(RIB * density, [head, tubercle, *arc], 4.2 * thickness, 6.4 * thickness)
            if number < len(sternum_z):
                z = sternum_z[number]
                attach = lung.ring(z, np.pi, 4) * [0, 1, 1] + [lung.side * 15, 0, 0]
                between = lung.ring((2 * arc[-1][2] + z) / 3, (2 * front + np.pi) / 3, 7)
                bones += _chain(CARTILAGE * density, [arc[-1], between, attach], 4, 6, overlap=1.2)
    front_of = lungs[0].ring
    return [
        *bones,
        _rod(RIB * density * 0.7, front_of(105, np.pi, 5) * [0, 1, 1], front_of(62, np.pi, 6) * [0, 1, 1], 26, 6),
        _rod(RIB * density * 0.7, front_of(64, np.pi, 6) * [0, 1, 1], front_of(-38, np.pi, 8) * [0, 1, 1], 17, 5.5),
    ]


def _shoulder_girdle(rng: np.random.Generator) -> list[Ellipsoid]:
    """Clavicles, scapulae turned outwards as with raised arms, and the heads of the humeri."""
    lift = rng.uniform(-6, 8)
    bones = []
    for side in (LEFT, RIGHT):
        mirrored = np.array([side, 1, 1])
        curve = np.array([(18, -50, 102), (50, -58, 108), (90, -32, 112), (122, -2, 114), (140, 10, 113)], float)
        curve[:, 2] += lift / 2
        blade_turn = np.deg2rad(side * rng.uniform(-42, -28))
        across = np.array([np.cos(blade_turn), np.sin(blade_turn), 0])
        axes = np.stack([across, [-across[1], across[0], 0], [0, 0, 1]], axis=1)
        blade = np.array([112, 78, 62 + lift]) * mirrored
        bones += [
            *_chain(RIB + 80, curve * mirrored, 5.0, 5.5),
            ellipsoid(RIB, blade, (36, 3.2, 58), axes),
            _rod(RIB, blade + [side * 22, -18, 30], blade + [-side * 30, 22, 22], 8, 5),
            _rod(RIB + 80, np.array([148, 4, 110]) * mirrored, blade + [side * 8, 4, 34], 6, 8, overlap=1.1),
            ellipsoid(CORTICAL, np.array([152, 20, 88 + lift]) * mirrored, (21, 21, 22)),
            ellipsoid(TRABECULAR, np.array([152, 20, 88 + lift]) * mirrored, (18.5, 18.5, 19.5)),
        ]
    return bones


def _table(trunk: list[Ellipsoid], isocentre_mm: Float) -> list[Ellipsoid]:
    """A couch of thin slabs, curved upwards at the sides, with a foam mattress on it, 3 mm below the back."""
    back_mm = max(one.centre_mm[1] + np.linalg.norm(np.linalg.inv(one.ball_from_mm)[1]) for one in trunk)
    across_mm = np.linspace(-160, 160, 9)
    foam, slabs = [], []
    for x, rise in zip(across_mm, 14 * (across_mm / 160) ** 2, strict=True):
        top = np.array([isocentre_mm[0] + x, back_mm + 3 - rise, isocentre_mm[2]])
        foam.append(ellipsoid(FOAM, top + [0, 9, 0], (40, 9, 900)))
        slabs.append(ellipsoid(-60, top + [0, 24, 0], (34, 4, 900)))
    return [*foam, *slabs]
