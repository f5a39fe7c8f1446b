"""The classes of a data set, a setting of every command."""

from adni_ldm.errors import UserError

CLASSES_HELP = "Classes by folder name, in the order of their labels: AD,NC or AD,MCI,NC."
TABLE_HELP = "Study table (CSV) that gives the subject of each image, for files named by image ID."


def class_names(classes: str) -> tuple[str, ...]:
    """Split "AD,NC" into ("AD", "NC"); CN, the archive's name for NC, is read as NC.

    Raises UserError for fewer than two classes, duplicates, or a name that begins with = + - @.
    """
    names = tuple({"CN": "NC"}.get(name.strip(), name.strip()) for name in classes.split(","))
    if len(names) < 2 or not all(names) or len(set(names)) < len(names):
        raise UserError(f"--classes {classes}: give two or more different ones, such as AD,NC or AD,MCI,NC")
    if odd := [name for name in names if name[0] in "=+-@"]:
        raise UserError(
            f"--classes {odd[0]}: a spreadsheet would take a name that begins like this for a formula"
        )
    return names
