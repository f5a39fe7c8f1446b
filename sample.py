"""Draw slices of the class asked for.

    python sample.py --class AD --num_images 64 --model runs/ldm --output_dir samples
    python sample.py --class all --steps 20 --scheduler dpm++ --guidance_scale 3
    python sample.py --from_image scan.png --from NC --to AD        # a real slice, as it would look in AD
    python sample.py --morph 9 --from NC --to AD                    # one brain from NC to AD in 9 frames

Writes samples/AD/000000.png …, metadata.csv (an `imagefolder` again), grid.png and, with --trajectory,
trajectory.png. Image k of a class starts from the same noise in every class. The other two write
counterfactual.png, difference.png, side_by_side.png and metadata.csv; or morph.png and morph.gif.
"""

from __future__ import annotations

from adni_ldm.environment import check_torch_pair

check_torch_pair()  # before diffusers and transformers meet a broken pair and say something else

from pathlib import Path

import pandas as pd
import torch
from torchvision.transforms.functional import to_pil_image
from tqdm.auto import tqdm

from adni_ldm.config import SampleConfig, parse_config
from adni_ldm.errors import UserError, run_recipe
from adni_ldm.figures import save_rows
from adni_ldm.loading import load_pipeline
from adni_ldm.pipeline import ClassConditionalLDMPipeline
from adni_ldm.precision import choose_precision
from adni_ldm.redrawing import write_counterfactual, write_morph
from adni_ldm.sampling import draw_images, draw_trajectory, image_seed, use_scheduler, weights_hash

PREVIEW = 16  # slices of each class in grid.png


def main() -> None:
    cfg = parse_config(SampleConfig, __doc__)
    output_dir = Path(cfg.output_dir)

    # ---- Model ---------------------------------------------------------------------------------------------
    precision = choose_precision(cfg.mixed_precision)
    pipeline = load_pipeline(cfg.model)
    labels = chosen_labels(pipeline, cfg.class_labels)
    use_scheduler(pipeline, cfg.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if torch.accelerator.is_available():
        pipeline.to(torch.accelerator.current_accelerator())
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"--output_dir {output_dir} is not empty: remove it or choose another")

    # ---- A real slice in another class, or a brain on its way there: that and nothing else -----------------
    options = {"num_inference_steps": cfg.steps, "guidance_scale": cfg.guidance_scale}
    if cfg.from_image:
        options["strength"] = cfg.strength
        row = write_counterfactual(output_dir, pipeline, cfg.from_image, cfg.source, cfg.target, **options)
        print(
            f"{output_dir}/side_by_side.png: mean difference {row['difference']:.4f} of the grey range, "
            f"mean round-trip error {row['round_trip_error']:.4f}; read nothing where the error reaches"
        )
        return
    if cfg.morph:
        options |= {"seed": image_seed(cfg.seed, 0), "frames": cfg.morph}
        write_morph(output_dir, pipeline, cfg.source, cfg.target, **options)
        print(f"{cfg.morph} frames in {output_dir}/morph.png and morph.gif")
        return

    # ---- Draw ----------------------------------------------------------------------------------------------
    seeds = [image_seed(cfg.seed, index) for index in range(cfg.num_images)]
    options = {"num_inference_steps": cfg.steps, "guidance_scale": cfg.guidance_scale, "eta": cfg.eta}
    model_hash = weights_hash(pipeline)
    lines, previews = [], {}
    progress = tqdm(total=len(labels) * cfg.num_images, desc="sampling", unit="slice")
    for label, name in labels.items():
        (output_dir / name).mkdir(parents=True)
        batches = draw_images(pipeline, [label] * cfg.num_images, seeds, cfg.batch_size, precision, **options)
        images = (image for batch in batches for image in batch)  # (1, H, W) each
        for index, image in enumerate(images):
            file_name = f"{name}/{index:06d}.png"
            to_pil_image(image).save(output_dir / file_name)
            lines.append({"file_name": file_name, "label": name, "seed": seeds[index]})
            if index < PREVIEW:
                previews.setdefault(name, []).append(image)
            progress.update()
    progress.close()

    # ---- What was drawn, and how ---------------------------------------------------------------------------
    settings = {"steps": cfg.steps, "guidance_scale": cfg.guidance_scale, "eta": cfg.eta}
    settings |= {
        "scheduler": cfg.scheduler,
        "precision": precision,
        "model": cfg.model,
        "model_hash": model_hash,
        "data_hash": "+".join(data["hash"] for data in pipeline.unet.config.get("_trained_on", ())),
    }
    pd.DataFrame(lines).assign(**settings).to_csv(output_dir / "metadata.csv", index=False)
    save_rows(output_dir / "grid.png", {name: torch.stack(row) for name, row in previews.items()}, columns=8)
    if cfg.trajectory:
        rows = {
            name: draw_trajectory(pipeline, label, seeds[0], frames=9, **options)
            for label, name in labels.items()
        }
        save_rows(output_dir / "trajectory.png", rows)
    print(f"{len(lines)} slices in {output_dir}; grid.png shows them")


def chosen_labels(pipeline: ClassConditionalLDMPipeline, classes: str) -> dict[int, str]:
    """{label: name} of "AD", "0", a comma list, or "all".

    Raises:
        UserError: a class that the model does not know.
    """
    names = list(pipeline.class_embedding.config.class_names)
    try:
        labels = (
            range(len(names)) if classes == "all" else pipeline.class_embedding.labels_of(classes.split(","))
        )
    except ValueError as error:
        raise UserError(f"--class {classes}: {error}") from error
    return {label: names[label] for label in labels}


if __name__ == "__main__":
    run_recipe(main)
