"""Figures and 8-bit images that several commands save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pandas as pd
import torch
from diffusers.image_processor import VaeImageProcessor
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from adni_ldm.files import atomic_file

if TYPE_CHECKING:
    from adni_ldm.pipeline import Counterfactual

GREY = {"cmap": "gray", "vmin": -1, "vmax": 1}


def to_pil(image: torch.Tensor) -> Image.Image:
    """Convert a slice (1, H, W) in [0, 1] to an 8-bit grey image, rounded as in the pipeline's output."""
    (converted,) = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image[None].clamp(0, 1)))
    return converted


def save_rows(
    path: str | Path | BinaryIO,
    rows: Mapping[str, torch.Tensor],
    columns: int | None = None,
    headings: Sequence[str] = (),
) -> None:
    """Save rows of slices, {title: (n, 1, H, W) in [0, 1]}; long rows wrap after `columns`.

    `headings` are those of the columns, above the first row.
    """
    columns = columns or max(len(images) for images in rows.values())
    lines = [
        (title if first == 0 else "", images[first : first + columns])
        for title, images in rows.items()
        for first in range(0, len(images), columns)
    ]
    figure = Figure(figsize=(1.2 * columns + 1.2, 1.25 * len(lines)), facecolor="black")
    axes = figure.subplots(len(lines), 1, squeeze=False)
    for axis, (title, images) in zip(axes[:, 0], lines):
        height, width = images.shape[-2:]
        strip = torch.zeros(height, width * columns)
        strip[:, : width * len(images)] = torch.cat([image[0] for image in images.float().cpu()], dim=1)
        axis.imshow(strip, cmap="gray", vmin=0, vmax=1, interpolation="lanczos")
        axis.set_ylabel(title, color="white", rotation=0, ha="right", va="center", fontsize=11)
        hide_frame(axis)
    places = [width * (column + 0.5) for column in range(len(headings))]
    axes[0, 0].set_xticks(places, headings, color="white", fontsize=9)
    axes[0, 0].tick_params(length=0, bottom=False, labelbottom=False, labeltop=True)
    save_figure(figure, path, bbox_inches="tight", pad_inches=0.05)


def save_film(path: str | Path, frames: torch.Tensor) -> None:
    """Save frames (n, 1, H, W) in [0, 1] as an endless GIF, forwards and backwards, atomically."""
    film = [to_pil(frame) for frame in frames]
    film += film[-2:0:-1]
    options = {"save_all": True, "append_images": film[1:], "duration": 120, "loop": 0}
    with atomic_file(path) as partial:
        film[0].save(partial, format="gif", **options)


def save_figure(figure: Figure, path: str | Path | BinaryIO, dpi: int = 110, **options) -> None:
    """Save a figure as a PNG file, atomically, or write it to an open one."""
    with nullcontext(path) if hasattr(path, "write") else atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi, **options)


def hide_frame(axis: Axes) -> None:
    """Hide ticks and edges, not the labels."""
    axis.set(xticks=[], yticks=[])
    for edge in axis.spines.values():
        edge.set_visible(False)


def colour_limit(difference: torch.Tensor) -> float:
    """Return the limit of a difference map's colours: the largest difference; 0.05 or more, for noise."""
    return max(0.05, float(difference.abs().max()))


def difference_image(difference: torch.Tensor, limit: float) -> Image.Image:
    """Convert a difference map (1, H, W) to colours: blue at −limit (darker), white at 0, red at limit."""
    colours = colormaps["RdBu_r"]((difference[0].float().cpu().numpy() / limit + 1) / 2, bytes=True)
    return Image.fromarray(colours[..., :3])


def save_counterfactual(path: str | Path, given: torch.Tensor, result: Counterfactual, classes: str) -> None:
    """Save a slice `given` (1, H, W) in [-1, 1], its round trip, its counterfactual and difference maps.

    `result` is a batch of one, `classes` its title, such as "NC to AD". The maps share one colour scale.
    """
    panels = {"input": given, "round trip": result.round_trip[0], classes: result.images[0]}
    error = result.round_trip[0] - given.to(result.round_trip.device)
    maps = {f"{classes} − input": result.difference[0], "round trip − input": error / 2}
    limit = colour_limit(result.difference)
    figure = Figure(figsize=(13, 3), layout="constrained")
    axes = figure.subplots(1, len(panels) + len(maps))
    for axis, (title, image) in zip(axes, (panels | maps).items()):
        options = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if title in maps else GREY
        shown = axis.imshow(image[0].float().cpu(), **options)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes[-1], label="fraction of the intensity range", shrink=0.8)
    save_figure(figure, path)


def save_curves(csv_path: str | Path, path: str | Path) -> None:
    """Plot each column of a metrics.csv over the step, one panel each."""
    table = pd.read_csv(csv_path, index_col="step").dropna(axis=1, how="all")
    figure = Figure(figsize=(3.6 * len(table.columns), 3))
    axes = figure.subplots(1, len(table.columns), squeeze=False)
    for axis, column in zip(axes[0], table.columns):
        values = table[column].dropna()
        axis.plot(values.index, values, linewidth=1.2, marker="." if len(values) < 30 else None)
        axis.set(title=column.replace("_", " "), xlabel="step")
        if column.endswith("loss") and (values > 0).all():
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, path)


def save_histograms(
    path: str | Path, panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]
) -> None:
    """Plot histograms, one panel per title and one line per class: {title: {class: (edges, fractions)}}."""
    figure = Figure(figsize=(5 * len(panels), 3.2))
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, classes) in zip(axes[0], panels.items()):
        for name, (edges, fractions) in classes.items():
            axis.stairs(fractions, edges, label=name, linewidth=1.4, fill=False)
        axis.set(xlabel=title, ylabel="fraction", ylim=(0, None))
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, path)
