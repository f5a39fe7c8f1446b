"""The phantom cohort: sagittal brain slices with a known AD-NC difference, made without a download.

Each subject is the MNI152 T1 template (1 mm, skull-stripped, shipped inside nilearn) under a deformation of
its own. A point p of the subject, in mm, is mapped to the template in three steps:

1. rotation and scale about the centre of the brain;
2. a sum of plane waves of 35 to 120 mm: the smooth variation between healthy subjects;
3. disease: the flow of a velocity field built from distance maps. The walls of the lateral ventricles move
   outward along their normal by a * exp(-d / 12 mm), d the distance to the wall; the surface of the brain
   moves inward by b * exp(-depth / 12 mm) and the sulci open; the hippocampi contract about their centres.

The ground truth of a slice, the areas of ventricle and brain, comes from the template's masks at the points
that the slice is sampled at. a, b and the contraction are sampled from `SEVERITY`, and the groups overlap.

Age and sex are without effect, unless `covariate_effects` is set: then each year above 65 adds `PER_YEAR` to
a and b, and sex scales the brain. The truth then includes the areas that the same subject would have without
the disease, and at the mean age of both groups.

Axes: RAS, mm, MNI152 space (x right, y anterior, z superior). Slices: superior is up; anterior is left in the
sagittal plane, the subject's right is left in the coronal plane.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage
from tqdm.auto import tqdm

from adni_ldm.data.manifest import write_manifest
from adni_ldm.data.splits import SPLITS
from adni_ldm.errors import UserError
from adni_ldm.files import atomic_folder, check_empty_dir
from adni_ldm.preprocessing import slicing
from adni_ldm.preprocessing.phantom_atlas import Atlas, load_atlas
from adni_ldm.preprocessing.workers import run_tasks

CLASSES = ("AD", "NC")
NORMAL_AXIS = {plane: slicing.PLANES[plane][0] for plane in slicing.PLANES}
CONTRASTS = ("t1", "t2")
FIELD_OF_VIEW_MM = 208.0  # side of a slice; the template's brain is 180 x 154 mm
CENTRE_MM = slicing.CENTRE_MM.astype(np.float32)
HALF_SPAN_MM = 24.0  # slices are evenly spaced over this distance on either side of the centre
LATTICE = 129  # nodes per side at which a slice's deformation is evaluated
FLOW_STEPS = 4  # one long step would cross the thin horns of the ventricles
HIPPOCAMPI_MM = np.array([[-26.0, -22.0, -14.0], [26.0, -22.0, -14.0]], np.float32)
HIPPOCAMPUS_RADII_MM = np.array([8.0, 18.0, 8.0], np.float32)

SEVERITY = {  # mean and standard deviation over the subjects of a class
    "AD": {"ventricle": (4.5, 1.2), "atrophy": (1.8, 0.5), "hippocampus": (0.25, 0.08)},
    "NC": {"ventricle": (1.0, 1.2), "atrophy": (0.4, 0.5), "hippocampus": (0.04, 0.08)},
}
MEAN_AGE, AGE_SD = 74.5, 7.0  # years; the mean is that of both groups, which lie at equal distance from it
AGE_GAP = 3.0  # years from NC to AD

# With covariate_effects:
PER_YEAR = {"ventricle": 0.15, "atrophy": 0.03}  # mm for each year above NO_EFFECT_AGE
NO_EFFECT_AGE = 65
SEX_SCALE = {"F": 0.975, "M": 1.025}  # of lengths, so that brains of men are 10 % larger in area


@dataclasses.dataclass(frozen=True)
class Subject:
    """The demographics and the anatomical parameters of one subject.

    `ventricle` and `atrophy` are displacements in mm, `hippocampus` a relative contraction, `x_offset` mm;
    `to_template` (3, 3); `waves` = wave vectors (K, 3) in 1/mm, phases (K,), amplitudes (K, 3) in mm; `bias`
    likewise with amplitudes (K,) of the log intensity; `noise` is in units of white matter's intensity.
    """

    index: int
    label: str
    age: int
    sex: str
    ventricle: float
    atrophy: float
    hippocampus: float
    x_offset: float
    to_template: np.ndarray
    waves: tuple[np.ndarray, np.ndarray, np.ndarray]
    bias: tuple[np.ndarray, np.ndarray, np.ndarray]
    gamma: float
    noise: float


def sample_subject(
    seed: int, index: int, covariate_effects: bool = False, age_gap: float = AGE_GAP
) -> Subject:
    """Sample subject `index` of cohort `seed`, whatever the cohort's size. Even is AD, odd is NC."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    label = CLASSES[index % 2]
    severity = {name: rng.normal(*moments) for name, moments in SEVERITY[label].items()}
    age = rng.normal(MEAN_AGE + (age_gap / 2 if label == "AD" else -age_gap / 2), AGE_SD)

    scale = np.clip(rng.normal(1, 0.035), 0.93, 1.06) * rng.normal(1, 0.012, size=3)
    pitch, roll, yaw = np.radians(rng.normal(0, [3.0, 1.0, 1.0]))
    rotation = np.array([[1, -yaw, roll], [yaw, 1, -pitch], [-roll, pitch, 1]])
    rotation, _ = np.linalg.qr(rotation)  # small angles, made orthogonal
    rotation *= np.sign(np.diag(rotation))  # qr may mirror an axis

    vectors, phases = _sample_waves(rng, 24, shortest=35, longest=120)
    amplitude = rng.normal(size=(24, 3)) / np.linalg.norm(vectors, axis=1, keepdims=True)  # all equally steep
    amplitude *= np.array([1.0, 2.0, 2.0]) / np.sqrt((amplitude**2).sum(0) / 2)  # rms in x, y, z, mm
    bias = (*_sample_waves(rng, 4, shortest=150, longest=300), rng.normal(0, 0.05, size=4))
    subject = Subject(
        index=index,
        label=label,
        age=int(np.clip(round(age), 55, 92)),
        sex=str(rng.choice(["F", "M"])),
        ventricle=float(np.clip(severity["ventricle"], -2, 9)),
        atrophy=float(np.clip(severity["atrophy"], -1, 4)),
        hippocampus=float(np.clip(severity["hippocampus"], -0.2, 0.6)),
        x_offset=float(rng.uniform(-1.5, 1.5)),
        to_template=(rotation / scale).astype(np.float32),
        waves=tuple(part.astype(np.float32) for part in (vectors, phases, amplitude)),
        bias=tuple(part.astype(np.float32) for part in bias),
        gamma=float(np.exp(rng.normal(0, 0.1))),
        noise=float(rng.uniform(0.015, 0.035)),
    )
    if not covariate_effects:
        return subject
    subject = dataclasses.replace(subject, to_template=subject.to_template / SEX_SCALE[subject.sex])
    return aged(subject, subject.age - NO_EFFECT_AGE)


def cohort_subject(settings: Mapping, index: int) -> Subject:
    """Subject `index` of the cohort whose manifest.json has these settings."""
    covariates = {name: settings[name] for name in ("covariate_effects", "age_gap") if name in settings}
    return sample_subject(settings["seed"], index, **covariates)


def aged(subject: Subject, years: float) -> Subject:
    """The subject with the ventricles and the cortex of so many years more."""
    added = {name: getattr(subject, name) + years * slope for name, slope in PER_YEAR.items()}
    return dataclasses.replace(subject, **added)


def without_disease(subject: Subject) -> Subject:
    """The subject without what AD adds on average; a subject of NC as it is."""
    if subject.label == "NC":
        return subject
    ad, nc = SEVERITY["AD"], SEVERITY["NC"]
    less = {name: getattr(subject, name) - (ad[name][0] - nc[name][0]) for name in ad}
    return dataclasses.replace(subject, **less)


def _sample_waves(rng: np.random.Generator, count: int, shortest: float, longest: float) -> tuple:
    """Wave vectors (count, 3) in 1/mm, uniform over the sphere and the lengths in mm; phases (count,)."""
    vectors = rng.normal(size=(count, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors *= 2 * np.pi / rng.uniform(shortest, longest, size=(count, 1))
    return vectors, rng.uniform(0, 2 * np.pi, size=count)


def _wave_sum(points: np.ndarray, waves: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """Sum of plane waves at points (..., 3): (...) or (..., 3), as the amplitudes are (K,) or (K, 3)."""
    vectors, phases, amplitudes = waves
    return np.cos(points @ vectors.T + phases) @ amplitudes


def _sample(volume: np.ndarray, points: np.ndarray, atlas: Atlas, spacing: int, mode: str) -> np.ndarray:
    """Trilinear values (...) of a volume at points (..., 3) in mm."""
    voxels = np.moveaxis((points - atlas.origin_mm) / spacing, -1, 0)
    return ndimage.map_coordinates(volume, voxels, output=np.float32, order=1, mode=mode)


def disease_field(subject: Subject, atlas: Atlas) -> np.ndarray:
    """Velocity (3, X/2, Y/2, Z/2), mm, of the flow that opens the ventricles and shrinks the brain."""
    return subject.ventricle * atlas.ventricle_field + subject.atrophy * atlas.atrophy_field


def template_points(points: np.ndarray, subject: Subject, field: np.ndarray, atlas: Atlas) -> np.ndarray:
    """Map a subject's points (..., 3) float32, mm, to the template, mm."""
    points = CENTRE_MM + (points - CENTRE_MM) @ subject.to_template.T
    points = points + _wave_sum(points, subject.waves)
    for _ in range(FLOW_STEPS):
        velocity = [_sample(along, points, atlas, spacing=2, mode="nearest") for along in field]
        points = points + np.stack(velocity, axis=-1) / FLOW_STEPS
    for centre in HIPPOCAMPI_MM:
        offset = points - centre
        reach = np.exp(-0.5 * ((offset / HIPPOCAMPUS_RADII_MM) ** 2).sum(-1, keepdims=True))
        points = points + subject.hippocampus * reach * offset
    return points


def render_slice(
    subject: Subject,
    field: np.ndarray,  # its disease_field
    position_mm: float,
    image_size: int,
    rng: np.random.Generator,
    atlas: Atlas,
    plane: str = "sagittal",
    contrast: str = "t1",
) -> tuple[np.ndarray, float, float]:
    """Render a slice (H, W) uint8 at x (y, z) = position_mm, 0 outside the brain.

    Pixels wider than about 1.5 mm are averages over finer points, as a scanner averages over a voxel.

    Returns:
        the slice, and the areas of ventricle and brain, mm².
    """
    lattice, to_centres = _slice_lattice(position_mm, image_size, plane)
    finer = len(to_centres) // image_size
    points, brain, ventricle = _slice_masks(lattice, to_centres, subject, field, atlas)

    # Fluid is 0.25 and white matter 0.86 in the template; single scans have darker fluid.
    intensity = _sample(atlas.intensity, points, atlas, spacing=1, mode="constant")
    intensity = np.clip((intensity - 0.12) / 0.78, 0, None) ** subject.gamma
    if contrast == "t2":  # fluid bright, white matter dark; the template has no T2 contrast
        intensity = np.clip(1.12 - intensity, 0.05, None)
    intensity *= np.exp(to_centres @ _wave_sum(lattice, subject.bias) @ to_centres.T)

    def pixels(fine):
        return fine.reshape(image_size, finer, image_size, finer).mean((1, 3), dtype=np.float32)

    real, imaginary = subject.noise * rng.standard_normal((2, image_size, image_size), dtype=np.float32)
    noisy = np.hypot(pixels(intensity * brain) + real, imaginary)  # Rician, as in magnitude images
    grey = np.where(pixels(brain) > 0.5, np.clip(noisy * 215, 1, 255), 0).astype(np.uint8)
    return grey, *_areas_mm2(ventricle, brain)


def measure_slice(
    subject: Subject, position_mm: float, image_size: int, atlas: Atlas, plane: str = "sagittal"
) -> tuple[float, float]:
    """The areas of ventricle and brain, mm², of a slice as `render_slice` renders it, without its image."""
    lattice, to_centres = _slice_lattice(position_mm, image_size, plane)
    _, brain, ventricle = _slice_masks(lattice, to_centres, subject, disease_field(subject, atlas), atlas)
    return _areas_mm2(ventricle, brain)


def _slice_lattice(position_mm: float, image_size: int, plane: str) -> tuple[np.ndarray, np.ndarray]:
    """Points (LATTICE, LATTICE, 3) of a subject, mm, and weights (side, LATTICE) of its nodes in fine pixels,
    side a multiple of image_size."""
    side = image_size * max(1, round(FIELD_OF_VIEW_MM / image_size))
    half = FIELD_OF_VIEW_MM / 2
    nodes = np.linspace(-half, half, LATTICE)
    centres = (np.arange(side) + 0.5) * FIELD_OF_VIEW_MM / side - half
    to_centres = np.stack([np.interp(centres, nodes, node) for node in np.eye(LATTICE)], axis=1)
    row, column = np.meshgrid(nodes, nodes, indexing="ij")  # down, and to the right
    lattice = np.stack([CENTRE_MM[0] - column, CENTRE_MM[1] - column, CENTRE_MM[2] - row], axis=-1)
    if plane == "axial":  # anterior is up
        lattice[..., 1] = CENTRE_MM[1] - row
    lattice[..., NORMAL_AXIS[plane]] = position_mm
    return lattice.astype(np.float32), to_centres.astype(np.float32)


def _slice_masks(
    lattice: np.ndarray, to_centres: np.ndarray, subject: Subject, field: np.ndarray, atlas: Atlas
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Template points (side, side, 3) of a slice's pixels, mm, and masks (side, side) of brain, ventricle."""
    # The lattice is mapped to the template; between its nodes, 1.6 mm apart, the map is linear.
    mapped = np.moveaxis(template_points(lattice, subject, field, atlas), -1, 0)  # (3, LATTICE, LATTICE)
    points = np.moveaxis(to_centres @ mapped @ to_centres.T, 0, -1)  # (side, side, 3)
    brain = _sample(atlas.brain, points, atlas, spacing=1, mode="constant") > 0.5
    ventricle = brain & (_sample(atlas.ventricle, points, atlas, spacing=1, mode="constant") > 0.5)
    return points, brain, ventricle


def _areas_mm2(*masks: np.ndarray) -> tuple[float, ...]:
    """The areas of masks (side, side) that cover the field of view, mm²."""
    return tuple(float(mask.sum() * (FIELD_OF_VIEW_MM / len(mask)) ** 2) for mask in masks)


def slice_positions(slices: int) -> np.ndarray:
    """Positions (slices,), mm: the centres of equal parts of -HALF_SPAN_MM to HALF_SPAN_MM."""
    return ((np.arange(slices) + 0.5) / slices * 2 - 1) * HALF_SPAN_MM


def _write_subject(task: tuple[int, str], root: Path, settings: Mapping, atlas: Atlas) -> list[dict]:
    """Write the slices of subject `index` in `split`. Returns rows of metadata.csv, with the split added."""
    index, split = task
    seed, plane, image_size = settings["seed"], settings["plane"], settings["image_size"]
    subject = cohort_subject(settings, index)
    known = {}  # the truth in other circumstances, where age and disease both have an effect
    if settings.get("covariate_effects"):
        at_mean_age = aged(subject, MEAN_AGE - subject.age)
        known = {"no_disease": without_disease(subject), "mean_age": at_mean_age}
    field = disease_field(subject, atlas)
    digits = max(4, len(str(settings["subjects"] - 1)))
    name = f"s{seed}p{index:0{digits}d}"  # unique across cohorts
    rows = []
    for number, position in enumerate(slice_positions(settings["slices"])):
        rng = np.random.default_rng(np.random.SeedSequence([seed, index, number]))
        position_mm = float(CENTRE_MM[NORMAL_AXIS[plane]] + position) + subject.x_offset
        pixels, ventricle, brain = render_slice(
            subject, field, position_mm, image_size, rng, atlas, plane, settings["contrast"]
        )
        file_name = f"{subject.label}/{name}_{number:02d}.png"
        Image.fromarray(pixels).save(root / split / file_name, compress_level=1)
        rows.append(
            {
                "file_name": file_name,
                "label": subject.label,
                "subject": name,
                "slice": number,
                "slice_mm": round(position_mm, 2),
                "age": subject.age,
                "sex": subject.sex,
                "pixel_mm": FIELD_OF_VIEW_MM / image_size,
                "ventricle_mm2": round(ventricle, 1),
                "brain_mm2": round(brain, 1),
                "split": split,
            }
        )
        for circumstance, other in known.items():
            areas = measure_slice(other, position_mm, image_size, atlas, plane)
            for part, area in zip(("ventricle", "brain"), areas, strict=True):
                rows[-1][f"{part}_mm2_{circumstance}"] = round(area, 1)
    return rows


def split_subjects(subjects: int, seed: int) -> list[str]:
    """Split the subjects of each class at random: 70 % train, 15 % val, 15 % test, none of them empty.

    A permutation of the seed, not `data.splits.assign_splits`: with that, all cohorts made so far, and every
    figure reported on them, would change.
    """
    splits = [""] * subjects
    rng = np.random.default_rng(np.random.SeedSequence([seed, subjects]))  # an index that no subject has
    for first in range(len(CLASSES)):
        members = rng.permutation(np.arange(first, subjects, len(CLASSES)))
        train = min(round(0.7 * len(members)), len(members) - 2)
        val = max(1, min(round(0.15 * len(members)), len(members) - train - 1))
        for place, member in enumerate(members):
            splits[member] = SPLITS[0 if place < train else 1 if place < train + val else 2]
    return splits


LIMITS = {
    "subjects": (6, math.inf),  # three splits of two classes
    "slices": (1, 100),  # two digits in a file's name
    "image_size": (16, 1024),
    "seed": (0, math.inf),
    "age_gap": (-15, 15),  # beyond, the groups hardly overlap, and ages are clipped
    "workers": (1, math.inf),
}


def _check_settings(settings: Mapping[str, int | str]) -> None:
    for name, (low, high) in LIMITS.items():
        if not low <= settings[name] <= high:
            most = f", at most {high}" if high < math.inf else ""
            raise UserError(f"{name}={settings[name]}: choose {low} or more{most}")
    for name, choices in (("plane", NORMAL_AXIS), ("contrast", CONTRASTS)):
        if settings[name] not in choices:
            raise UserError(f"{name}={settings[name]}: choose from {', '.join(choices)}")


def write_phantom_cohort(
    output_dir: Path,
    subjects: int = 200,
    slices: int = 10,
    image_size: int = 64,
    seed: int = 0,
    workers: int | None = None,
    plane: str = "sagittal",
    contrast: str = "t1",
    covariate_effects: bool = False,
    age_gap: float = AGE_GAP,
) -> pd.DataFrame:
    """Write a cohort as output_dir/{train,val,test}/{AD,NC}/SUBJECT_SLICE.png with metadata.csv and manifest.

    Slices are 8-bit, image_size pixels and 208 mm per side, 0 outside the brain. Subjects alternate AD, NC.
    metadata.csv of each split: file_name (relative to its folder), label, subject, slice, slice_mm (x;
    coronal: y), age, sex, pixel_mm, and the ground truth ventricle_mm2 and brain_mm2. AD is `age_gap` years
    older than NC on average. With `covariate_effects` age and sex change the anatomy, and the truth has
    further columns: ventricle_mm2_no_disease, brain_mm2_no_disease and ventricle_mm2_mean_age,
    brain_mm2_mean_age, the same slice without the disease and at MEAN_AGE.

    The bytes depend on the seed and the settings, not on `workers` (None: one per CPU). A killed run leaves
    .NAME.partial, which the next one removes.

    Returns the rows of all splits, with a column `split`. Raises UserError if a size is out of range, or
    output_dir is not empty; nothing is written then.
    """
    workers = os.cpu_count() if workers is None else workers
    settings = {"subjects": subjects, "slices": slices, "image_size": image_size}
    settings |= {"plane": plane, "contrast": contrast, "seed": seed}
    _check_settings(settings | {"workers": workers, "age_gap": age_gap})
    if covariate_effects or age_gap != AGE_GAP:  # else the manifest stays that of cohorts made before
        settings |= {"covariate_effects": covariate_effects, "age_gap": age_gap}
    output_dir = Path(output_dir)
    check_empty_dir(output_dir)
    atlas = load_atlas()
    with atomic_folder(output_dir) as building:
        for split in SPLITS:
            for label in CLASSES:
                (building / split / label).mkdir(parents=True)
        tasks = list(enumerate(split_subjects(subjects, seed)))
        write = functools.partial(_write_subject, root=building, settings=settings, atlas=atlas)
        written = run_tasks(write, tasks, workers)
        progress = tqdm(written, total=subjects, desc="phantom", unit="subject")
        table = pd.DataFrame([row for rows in progress for row in rows])
        for split in SPLITS:
            rows_of_split = table[table.split == split].drop(columns="split")
            rows_of_split.to_csv(building / split / "metadata.csv", index=False)
        write_manifest(building, {"source": "phantom", **settings})
    return table
