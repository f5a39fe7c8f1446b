"""Read the report of evaluate.py on a model, for its card, for a push and for the web page."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from adni_ldm.errors import UserError
from adni_ldm.evaluation.questions import Verdict, list_verdicts
from adni_ldm.files import read_json


@dataclass(frozen=True)
class Report:
    """The report on a model, or the reason why there is none."""

    metrics: Mapping = field(default_factory=dict)  # content of metrics.json
    missing: str = ""

    @property
    def verdicts(self) -> list[Verdict]:
        return list(list_verdicts(self.metrics))


def read_report(folder: Path, model_hash: str, data_hashes: Collection[str]) -> Report:
    """The report in a folder, if it evaluates the model whose weights have this hash on its own data.

    Args:
        data_hashes: of the data that the model was trained on. Whether it memorized them cannot be seen in a
            comparison with other data.

    Raises:
        UserError: metrics.json cannot be read.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return Report(missing="there is no report: run evaluate.py, and give its folder with --report")
    try:
        metrics = read_json(path)
        evaluated, data = metrics["model_hash"], metrics["data_hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a report of evaluate.py ({error!r}); run it again") from error
    if evaluated != model_hash:
        missing = f"the report evaluates another model ({evaluated}, this is {model_hash}): run evaluate.py"
        return Report(missing=missing)
    if data not in data_hashes:
        missing = f"the report compares with data that the model was not trained on (hash {data}): run "
        return Report(missing=missing + "evaluate.py with the training data as --real")
    return Report(metrics)


def find_report(model: str, report: str | None, model_hash: str, data_hashes: Collection[str]) -> Report:
    """The report in the folder `report`; by default in report/ of the model's folder, in the folder itself,
    in report/ beside it, or in the model's repository on the Hub.

    Raises:
        UserError: the folder `report` contains none, or metrics.json cannot be read.
    """
    folders = (
        [Path(report)] if report else [Path(model) / "report", Path(model), Path(model).parent / "report"]
    )
    if not report and not Path(model).exists():
        try:
            folders = [Path(hf_hub_download(model, "metrics.json")).parent]
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
            return Report(missing=f"the repository {model} contains no report")
    found = [folder for folder in folders if (folder / "metrics.json").is_file()]
    if report and not found:
        raise UserError(f"--report {report}: contains no metrics.json; evaluate.py writes one")
    return read_report((found or folders)[0], model_hash, data_hashes)


def check_privacy(report: Report, accept_risk: bool) -> None:
    """Check that the verdict on privacy is favourable, or that the risk is accepted.

    Raises:
        UserError: neither holds.
    """
    (verdict,) = (verdict for verdict in report.verdicts if verdict.name == "privacy")
    if verdict.good is True or accept_risk:
        return
    reason = f"the verdict on privacy is unfavourable ({verdict.text})"
    if verdict.good is None:
        reason = f"there is no verdict on privacy ({report.missing or verdict.text})"
    raise UserError(f"{reason}: memorized scans may be published; --accept_privacy_risk pushes nevertheless")


def list_figures(metrics: Mapping, section: str = "") -> Iterator[tuple[str, Mapping]]:
    """Pairs of a name, such as fidelity/fid, and its {"value", "low", "high", "reference", "note"}."""
    for name, entry in metrics.items():
        if isinstance(entry, Mapping):
            if isinstance(entry.get("value"), (int, float)) and math.isfinite(entry["value"]):
                yield section + name, entry
            elif "value" not in entry:
                yield from list_figures(entry, f"{section}{name}/")
