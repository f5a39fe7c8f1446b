"""Figures of the report, each a PNG file.

No subject ID is shown: training subjects are numbered within a figure.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from adni_ldm.data.slices import evenly_spaced
from adni_ldm.evaluation.anatomy import MEASURES
from adni_ldm.evaluation.estimates import Estimate
from adni_ldm.evaluation.image_sets import ImageSet
from adni_ldm.evaluation.nearest_neighbors import NEXT_SUBJECTS
from adni_ldm.evaluation.privacy import CopyRule, Pair
from adni_ldm.evaluation.spectrum import BANDS, radial_power
from adni_ldm.figures import hide_frame, save_rows

COLOURS = ("#d1495b", "#30638e", "#edae49", "#5b8e7d", "#7d5ba6")  # of the classes, in order
GREY = "#888888"  # of real slices
DPI = 110


def save_real_beside_samples(path: str | Path, real: ImageSet, samples: ImageSet, count: int = 10) -> None:
    """A row of real slices and a row of samples for each class, `count` each, evenly spaced."""
    rows = {}
    for name in real.class_names:
        for title, images in (("real", real.of_class(name)), ("synthetic", samples.of_class(name))):
            chosen = evenly_spaced(len(images), count)
            if len(chosen):
                rows[f"{name} {title}"] = images.images[chosen].float() / 255
    save_rows(path, rows, columns=count)


def save_pairs(
    path: str | Path, pairs: Sequence[Pair], samples: ImageSet, train: ImageSet, columns: int = 5
) -> None:
    """The nearest pairs, at least one: sample, training slice, and their difference after alignment.

    Alignment shifts the training slice by the pair's shift and fits gain and offset.
    """
    bands = -(-len(pairs) // columns)
    figure = Figure(figsize=(2.1 * columns + 1.2, 6.9 * bands), facecolor="black", layout="constrained")
    axes = figure.subplots(3 * bands, columns, squeeze=False)
    for axis in axes.flat:
        hide_frame(axis)
    for index, pair in enumerate(pairs):
        band, column = divmod(index, columns)
        sample, training = samples.images[pair.sample, 0], train.images[pair.training, 0]
        difference = _aligned_difference(sample.float().numpy(), training.float().numpy(), pair.shift)
        column_axes = axes[3 * band : 3 * band + 3, column]
        for axis, image in zip(column_axes, (sample, training)):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        shown = column_axes[2].imshow(difference / 255 * 100, cmap="RdBu_r", vmin=-40, vmax=40)
        verdict, colour = ("copy", "#ff6b6b") if pair.is_copy else ("not a copy", "white")
        name = samples.class_names[pair.label]
        titles = {
            f"{index + 1}. {name} sample\n{verdict}, ratio {pair.ratio:.2f}": colour,
            f"training subject {pair.subject_number}\nslice {pair.slice_number}": "white",
            "difference": "white",
        }
        for axis, (title, colour) in zip(column_axes, titles.items()):
            axis.set_title(title, color=colour, fontsize=10)
    _bar(figure, shown, axes, "sample − training slice, aligned (% of full brightness)", colour="white")
    figure.savefig(path, dpi=DPI)


def save_nearest_histogram(
    path: str | Path, samples: np.ndarray, held_out: np.ndarray, rule: CopyRule | None
) -> None:
    """Histograms of the ratios of samples (N,) and of held-out real slices (M,), with the threshold."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    edges = np.linspace(0, np.concatenate([samples, held_out, [1.0]]).max(), 51)
    shown = ((held_out, "held-out real slices", GREY), (samples, "samples", COLOURS[0]))
    for ratios, title, colour in shown:
        if len(ratios):
            shares = np.histogram(ratios, edges)[0] / len(ratios) * 100
            axis.stairs(shares, edges, label=f"{title} ({len(ratios)})", color=colour, linewidth=1.8)
    if rule is not None:
        axis.axvline(rule.threshold, color="black", linestyle="--", linewidth=1.2)
        axis.axvspan(0, rule.threshold, color="#ff6b6b", alpha=0.12, label="classified as a copy")
    axis.set(
        title="Distance to the nearest training slice",
        xlabel="distance to the nearest training slice ÷ mean distance to the nearest slices of the next "
        f"{NEXT_SUBJECTS} subjects\n(0: identical, 1: no nearer to one subject than to others)",
        ylabel="share of slices (%)",
        xlim=(0, edges[-1]),
    )
    axis.legend(frameon=False, loc="upper left")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=DPI)


def save_spectrum(path: str | Path, sets: Mapping[str, torch.Tensor]) -> None:
    """Mean power by spatial frequency of sets of slices (N, 1, H, H) in [-1, 1], with the bands compared."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for (title, images), colour in zip(sets.items(), (GREY, *COLOURS), strict=False):
        frequencies, power = radial_power(images)
        axis.plot(frequencies, power.mean(0), label=title, color=colour, linewidth=1.8)
    for low, _ in BANDS.values():
        axis.axvline(low, color="black", linestyle=":", linewidth=1)
    axis.set(
        title="Power spectrum, radially averaged",
        xlabel="spatial frequency ÷ Nyquist frequency (dotted: the bands compared)",
        ylabel="power",
        yscale="log",
    )
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=DPI)


def save_class_difference(path: str | Path, real: ImageSet, samples: ImageSet) -> None:
    """Mean slice of the first class minus that of the last, real and synthetic, on one color scale."""
    first, last = real.class_names[0], real.class_names[-1]
    differences = {"real": _difference(real, first, last), "synthetic": _difference(samples, first, last)}
    known = [np.abs(one).max() for one in differences.values() if one is not None]
    limit = max([*known, 1.0])
    figure = Figure(figsize=(8.4, 4.1), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (title, difference), images in zip(axes, differences.items(), (real, samples)):
        hide_frame(axis)
        counts = ", ".join(f"{len(images.of_class(name))} {name}" for name in (first, last))
        axis.set_title(f"{title} ({counts})")
        if difference is None:
            axis.text(0.5, 0.5, "a class is missing", transform=axis.transAxes, ha="center")
        else:
            shown = axis.imshow(difference, cmap="RdBu_r", vmin=-limit, vmax=limit)
    if known:
        _bar(figure, shown, axes, f"{first} − {last} (% of full brightness)", colour="black")
    figure.suptitle(f"Where {first} is brighter (red) or darker (blue) than {last}, on average")
    figure.savefig(path, dpi=DPI)


def save_anatomy(
    path: str | Path,
    real: ImageSet,
    real_values: Mapping[str, np.ndarray],
    samples: ImageSet,
    sample_values: Mapping[str, np.ndarray],
) -> None:
    """Distribution of each measure {name: (N,)} by class: real slices on the left, samples on the right."""
    figure = Figure(figsize=(3.1 * len(real_values), 3.9), layout="constrained")
    for axis, measure in zip(figure.subplots(1, len(real_values), squeeze=False)[0], real_values):
        for label in range(len(real.class_names)):
            sides = ((real, real_values, "low", GREY), (samples, sample_values, "high", COLOURS[0]))
            for images, values, side, colour in sides:
                shown = values[measure][images.labels == label]
                shown = shown[np.isfinite(shown)]
                if not len(shown):
                    continue
                if len(np.unique(shown)) > 1:  # a density needs two values
                    violin = axis.violinplot(shown, [label], side=side, showextrema=False, widths=0.9)
                    violin["bodies"][0].set(facecolor=colour, edgecolor=colour, alpha=0.6)
                low, middle, high = np.quantile(shown, [0.25, 0.5, 0.75])
                place = label + (0.04 if side == "high" else -0.04)
                axis.plot([place, place], [low, high], color=colour, linewidth=3)
                axis.plot(place, middle, "o", color="white", markeredgecolor=colour, markersize=5)
        axis.set_title(MEASURES[measure], fontsize=10)
        axis.set_xticks(range(len(real.class_names)), real.class_names)
        axis.set_xlim(-0.6, len(real.class_names) - 0.4)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3, axis="y")
    patches = [Patch(color=colour, alpha=0.6) for colour in (GREY, COLOURS[0])]
    titles = ["held-out real slices", "samples"]
    figure.legend(patches, titles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=DPI)


def save_guidance_curve(path: str | Path, curve: Mapping[float, Estimate]) -> None:
    """Class-conditioning accuracy by guidance scale, with the classifier's accuracy on real slices."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    known = {scale: one for scale, one in curve.items() if one.value is not None}
    if known:
        y, low, high = 100 * np.array([(one.value, one.low, one.high) for one in known.values()]).T
        spread = np.maximum([y - low, high - y], 0)
        axis.errorbar(list(known), y, spread, color=COLOURS[0], marker="o", capsize=4, label="samples")
        reference = next(iter(known.values())).reference
        if reference is not None:
            axis.axhline(100 * reference, color=GREY, linestyle="--", label="held-out real slices")
    axis.set(xlabel="guidance scale", ylabel="class-conditioning accuracy (%)", ylim=(0, 103))
    axis.legend(frameon=False, loc="lower right")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=DPI)


def save_reconstructions(
    path: str | Path, images: ImageSet, reconstructions: torch.Tensor, count: int = 8
) -> None:
    """Slices, their reconstructions (N, 1, H, W) in [-1, 1], and the absolute error."""
    chosen = evenly_spaced(len(images), count)
    originals, decoded = images.floats(chosen)[:, 0], reconstructions[chosen, 0]
    errors = (decoded - originals).abs() / 2 * 100  # % of the range
    figure = Figure(figsize=(1.5 * len(chosen) + 1.6, 5.2), facecolor="black", layout="constrained")
    axes = figure.subplots(3, len(chosen), squeeze=False)
    for column in range(len(chosen)):
        axes[0, column].imshow(originals[column], cmap="gray", vmin=-1, vmax=1)
        axes[1, column].imshow(decoded[column], cmap="gray", vmin=-1, vmax=1)
        shown = axes[2, column].imshow(errors[column], cmap="inferno", vmin=0, vmax=20)
        axes[2, column].set_xlabel(f"mean {errors[column].mean():.1f} %", color="white", fontsize=9)
    for axis, title in zip(axes[:, 0], ("held-out\nslice", "recon-\nstruction", "error")):
        axis.set_ylabel(title, color="white", rotation=0, ha="right", va="center", fontsize=11)
    for axis in axes.flat:
        hide_frame(axis)
    _bar(figure, shown, axes[2], "% of full\nbrightness", colour="white")
    figure.savefig(path, dpi=DPI)


def save_umap(
    path: str | Path,
    title: str,
    real: tuple[np.ndarray, ImageSet],
    samples: tuple[np.ndarray, ImageSet],
    most: int = 500,
    seed: int = 0,
) -> None:
    """UMAP (McInnes et al. 2018, arXiv:1802.03426) of features (N, D), coloured by class.

    Real slices are rings, samples are dots. At most `most` of each are shown, chosen by `seed`.
    """
    from umap import UMAP  # seconds to import

    rng = np.random.default_rng(seed)
    features, labels = [], []
    for values, images in (real, samples):
        rows = np.sort(rng.permutation(len(values))[:most])
        features.append(values[rows])
        labels.append(images.labels[rows])
    together = np.concatenate(features)
    neighbours, init = max(2, min(15, len(together) - 1)), "random" if len(together) < 10 else "pca"
    threads = torch.get_num_threads()
    # With a seed UMAP uses one job in any case, and warns unless it is set.
    mapping = UMAP(n_neighbors=neighbours, init=init, random_state=seed, n_jobs=1)
    mapped = mapping.fit_transform(together)
    torch.set_num_threads(threads)  # UMAP changes it, which would change the rounding of later results
    places = np.split(mapped, [len(features[0])])

    figure = Figure(figsize=(8, 6), layout="constrained")
    axis = figure.subplots()
    for place, of_rows, style in zip(places, labels, ("real", "synthetic")):
        for label, name in enumerate(real[1].class_names):
            colour = COLOURS[label % len(COLOURS)]
            ring, dot = {"facecolors": "none", "edgecolors": colour, "s": 26}, {"color": colour, "s": 9}
            options = {"linewidths": 0.9, "alpha": 0.75, "label": f"{name} {style}"}
            options |= ring if style == "real" else dot
            axis.scatter(*place[of_rows == label].T, **options)
    axis.set(title=title, xticks=[], yticks=[])
    axis.set_xlabel("neighboring points have similar features; the axes have no unit")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=1.4)
    figure.savefig(path, dpi=DPI)


def _difference(images: ImageSet, first: str, last: str) -> np.ndarray | None:
    """Mean of one class minus that of another, (H, W), % of the range; None if a class is missing."""
    means = [images.of_class(name).images.float().mean(dim=(0, 1)) for name in (first, last)]
    difference = ((means[0] - means[1]) / 255 * 100).numpy()
    return difference if np.isfinite(difference).all() else None


def _aligned_difference(sample: np.ndarray, training: np.ndarray, shift: tuple[int, int]) -> np.ndarray:
    moved = np.roll(training, shift, axis=(0, 1))
    columns = np.stack([moved.ravel(), np.ones(moved.size)], axis=1)
    fitted = columns @ np.linalg.lstsq(columns, sample.ravel(), rcond=None)[0]
    return sample - fitted.reshape(sample.shape)


def _bar(figure: Figure, shown, axes, title: str, colour: str) -> None:
    bar = figure.colorbar(shown, ax=axes, shrink=0.6, aspect=25)
    bar.set_label(title, color=colour)
    bar.ax.tick_params(colors=colour)
