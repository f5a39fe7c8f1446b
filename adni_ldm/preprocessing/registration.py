"""Affine registration of a head to the MNI152 template, with SimpleITK.

The template is nilearn's (ICBM 2009a, skull-stripped) at 2 mm. Mattes' mutual information (Mattes et al.
2003, doi:10.1109/TMI.2003.809072) is computed over its brain and a rim about it, where T1 scans have dark
fluid and bone; scalp, neck and jaw do not count. The result is deterministic: one thread, a fixed seed.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from adni_ldm.preprocessing.slicing import CENTRE_MM
from adni_ldm.preprocessing.volumes import Volume, VolumeError

GRID_MM = 2  # of both images; the affine map is accurate to a fraction of that
RIM_VOXELS = 3
# The initial poses: heads are pitched, seldom rotated otherwise, and the distance from the vertex of the
# scalp to the brain is unknown.
PITCHES = (-0.3, -0.15, 0.0, 0.15, 0.3)  # radians
LIFTS_MM = (-20.0, -10.0, 0.0, 10.0, 20.0)
START_SIZES = (0.88, 0.95, 1.03)  # ratio of the lengths of head and template
DESCENTS = 4
HALF_BOX_MM = 130.0  # about the centre of the brain: the part of the scan that is used
SIZES = (0.75, 1.35)  # ratio of the lengths of template and head, along any axis
LEAST_CORRELATION = 0.5  # of template and registered scan within the brain; usually 0.8


@dataclass(frozen=True)
class Template:
    """MNI152 at 2 mm: `t1` in [0, 1]; `brain`, `rim` (with the brain) boolean; `mask`: the brain at 1 mm."""

    t1: Volume
    brain: np.ndarray
    rim: np.ndarray
    mask: Volume


def load_template() -> Template:
    """Load the template that ships with nilearn (2 s). Raises ImportError without nilearn."""
    from nilearn import datasets

    t1 = datasets.load_mni152_template(resolution=GRID_MM)
    mask = datasets.load_mni152_brain_mask(resolution=1)
    fine = ndimage.binary_fill_holes(np.asarray(mask.dataobj) > 0).astype(np.float32)
    t1_voxels = np.asarray(t1.dataobj, np.float32)
    brain = ndimage.binary_fill_holes(t1_voxels > 0.05)
    rim = ndimage.binary_dilation(brain, iterations=RIM_VOXELS)
    return Template(
        Volume(t1_voxels * brain, t1.affine), brain, rim, Volume(fine, mask.affine.astype(np.float64))
    )


def register(volume: Volume, centre_mm: np.ndarray, template: Template) -> np.ndarray:
    """Return the affine map (4, 4) from the template's mm to the scan's, RAS.

    `centre_mm` (3,) is the centre of the brain in the scan, to within 20 mm. Raises VolumeError if the
    registered scan does not resemble the template.
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    head = _head_on_grid(volume, centre_mm)
    rim = Volume(template.rim.astype(np.uint8), template.t1.affine)
    fixed, rim, moving = (_to_image(v) for v in (template.t1, rim, head))
    try:
        # Coarse descents from the best poses, a finer one from the best result, then all 12 parameters.
        poses = _initial_poses(fixed, rim, moving, centre_mm)
        poses = [_descend(fixed, rim, moving, pose, shrinks=(4,), sampled=1.0, step_mm=2.0) for pose in poses]
        pose = min(poses, key=lambda found: found[1])[0]
        pose, _ = _descend(fixed, rim, moving, pose, shrinks=(2,), sampled=0.3, step_mm=1.0)
        affine = sitk.AffineTransform(pose.GetMatrix(), pose.GetTranslation(), pose.GetCenter())
        affine, _ = _descend(fixed, rim, moving, affine, shrinks=(2, 1), sampled=0.2, step_mm=0.5)
    except RuntimeError as error:  # ITK: too little overlap of template and scan
        raise VolumeError("not registered: too little of the brain is in the scan") from error
    to_scan = _to_matrix(affine)
    _check_result(to_scan, head, template)
    return to_scan


def _initial_poses(fixed, rim, moving, centre_mm: np.ndarray) -> list:
    """The best DESCENTS similarities of a grid of pitches, heights and sizes, evaluated at 8 mm."""
    coarse = [sitk.BinShrink(image, [4, 4, 4]) for image in (fixed, moving)]
    mask = sitk.Resample(rim, coarse[0], sitk.Transform(), sitk.sitkNearestNeighbor)
    values = []
    for pitch, lift, size in itertools.product(PITCHES, LIFTS_MM, START_SIZES):
        pose = sitk.Similarity3DTransform()
        pose.SetCenter(CENTRE_MM.tolist())
        pose.SetTranslation((centre_mm + [0.0, 0.0, lift] - CENTRE_MM).tolist())
        pose.SetRotation([1.0, 0.0, 0.0], pitch)
        pose.SetScale(size)
        method = _metric(mask)
        method.SetInitialTransform(pose)
        values.append((method.MetricEvaluate(*coarse), len(values), pose))
    return [pose for _, _, pose in sorted(values, key=lambda found: found[:2])[:DESCENTS]]


def _metric(rim) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=32)
    method.SetMetricFixedMask(rim)
    method.SetInterpolator(sitk.sitkLinear)
    return method


def _descend(fixed, rim, moving, start, shrinks, sampled: float, step_mm: float) -> tuple:
    """Return the transform after descents at the levels `shrinks`, and minus its mutual information."""
    method = _metric(rim)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(sampled, seed=1)
    method.SetShrinkFactorsPerLevel(list(shrinks))
    method.SetSmoothingSigmasPerLevel([shrink * 0.5 for shrink in shrinks])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=step_mm, minStep=0.01, numberOfIterations=100, relaxationFactor=0.6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    moved = type(start)(start)  # a copy, which the descent changes in place
    method.SetInitialTransform(moved, inPlace=True)
    method.Execute(fixed, moving)
    return moved, method.GetMetricValue()


def _head_on_grid(volume: Volume, centre_mm: np.ndarray) -> Volume:
    """The scan about its brain, averaged to about GRID_MM, clipped at the 99.5th percentile."""
    voxel = np.linalg.solve(volume.affine[:3, :3], centre_mm - volume.affine[:3, 3])
    reach = HALF_BOX_MM / volume.spacing_mm
    low = np.clip(np.floor(voxel - reach), 0, None).astype(int)
    high = np.minimum(np.ceil(voxel + reach).astype(int), volume.voxels.shape)
    boxes = np.maximum(1, np.round(GRID_MM / volume.spacing_mm)).astype(int)
    counts = (high - low) // boxes
    if counts.min() < 8:
        raise VolumeError("the brain is outside the scan")
    part = volume.voxels[tuple(slice(a, a + n * b) for a, n, b in zip(low, counts, boxes, strict=True))]
    split = [size for pair in zip(counts, boxes, strict=True) for size in pair]
    coarse = part.reshape(split).mean((1, 3, 5), dtype=np.float32)
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ (low + (boxes - 1) / 2)
    affine[:3, :3] = affine[:3, :3] * boxes
    return Volume(np.minimum(coarse, np.percentile(coarse, 99.5)), affine)


def _check_result(to_scan: np.ndarray, head: Volume, template: Template) -> None:
    """Raise VolumeError for an implausible scale, or a low correlation with the template."""
    sizes = np.linalg.svd(to_scan[:3, :3], compute_uv=False)
    if sizes.min() < SIZES[0] or sizes.max() > SIZES[1] or np.linalg.det(to_scan[:3, :3]) < 0:
        raise VolumeError(
            f"not registered: the head would be scaled by {sizes.min():.2f} to {sizes.max():.2f}"
        )
    to_voxel = np.linalg.inv(head.affine) @ to_scan @ template.t1.affine
    shape = template.t1.voxels.shape
    moved = ndimage.affine_transform(head.voxels, to_voxel[:3, :3], to_voxel[:3, 3], shape, order=1)
    correlation = np.corrcoef(moved[template.brain], template.t1.voxels[template.brain])[0, 1]
    if not correlation > LEAST_CORRELATION:
        raise VolumeError(
            f"not registered: its correlation with the template is {correlation:.2f}, below "
            f"{LEAST_CORRELATION}; not a T1 scan of a head, or an unusual pose"
        )


def _to_image(volume: Volume) -> sitk.Image:
    """The volume as a SimpleITK image in RAS mm; as both images are in RAS, no axis is flipped to LPS."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.voxels.T))
    image.SetSpacing(volume.spacing_mm.tolist())
    image.SetDirection((volume.affine[:3, :3] / volume.spacing_mm).ravel().tolist())
    image.SetOrigin(volume.affine[:3, 3].tolist())
    return image


def _to_matrix(transform) -> np.ndarray:
    """SimpleITK's y = A (x - c) + c + t as one matrix (4, 4)."""
    matrix, centre = np.eye(4), np.array(transform.GetCenter())
    matrix[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = centre + transform.GetTranslation() - matrix[:3, :3] @ centre
    return matrix
