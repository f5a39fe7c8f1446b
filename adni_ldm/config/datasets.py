"""Settings of the commands that read data: columns and splits of data sets of the datasets library."""

from dataclasses import dataclass
from typing import Annotated, TypeVar

from transformers.hf_argparser import HfArg

# A resumed run must repeat every setting of its first part, but for these: where files are and how often to
# report, or what a hash of data and weights identifies better ...
T = TypeVar("T")
MayChange = Annotated[T, "free"]
DATA_HELP = (
    "Folder of slices, {train,val,test}/{AD,NC}/SUBJECT_SLICE.png, an AD_NC folder or its zip; or a data "
    "set of the datasets library: a Hub name ME/SLICES, a folder of save_to_disk, Parquet."
)


@dataclass(frozen=True)
class DatasetConfig:
    """Columns and splits of a data set; a folder of slices has none of them."""

    dataset_config_name: MayChange[str | None] = HfArg(
        default=None, help="Configuration of a data set on the Hub that has several."
    )
    image_column: MayChange[str] = HfArg(default="image", help="Column of a data set that holds the images.")
    label_column: MayChange[str] = HfArg(
        default="label", help="Column of a data set that holds the classes: names, or numbers of --classes."
    )
    subject_column: MayChange[str] = HfArg(
        default="subject", help="Column of a data set that holds the subjects."
    )
    train_split: MayChange[str] = HfArg(default="train", help="Split of a data set that is trained on.")
    val_split: MayChange[str | None] = HfArg(
        default=None,
        help="Split of a data set for validation. Default: val or validation, else subjects of the first.",
    )
    test_split: MayChange[str | None] = HfArg(
        default=None, help="Split of a data set for testing. Default: test, if there is one."
    )
    no_subjects: MayChange[bool] = HfArg(
        default=False,
        help="The data set has no column of subjects: splits may then share a subject, which every record, "
        "card and report says.",
    )

    @property
    def dataset_options(self) -> dict:
        """What `as_folder` takes."""
        return {name: getattr(self, name) for name in DatasetConfig.__dataclass_fields__}
