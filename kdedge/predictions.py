"""predictions.npz: what each artifact said of each image; read by report, compare and paired intervals.

Keys: `<split>_id`, `<split>_label` and `<split>_logits__<artifact>` for the splits test and gate.
"""

import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kdedge.errors import RunError
from kdedge.runs import Run, write_bytes

__all__ = ["add_predictions", "read_predictions"]


def read_predictions(run: Run) -> dict[str, npt.NDArray[Any]]:
    """All arrays of the run's predictions.npz; empty where there is none."""
    if not run.predictions_path.is_file():
        return {}
    try:
        with run.predictions_path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{run.predictions_path} cannot be read: {error}.") from error


def add_predictions(
    run: Run,
    split: str,
    ids: Sequence[str],
    labels: npt.NDArray[np.int64],
    logits: Mapping[str, npt.NDArray[np.float32]],
) -> None:
    """Add logits [N, K] of artifacts on `split`, atomically; what other artifacts said of the same images stays."""
    arrays = read_predictions(run)
    id_array = np.asarray(ids, dtype=np.str_)
    if f"{split}_id" in arrays and not np.array_equal(arrays[f"{split}_id"], id_array):
        arrays = {name: array for name, array in arrays.items() if not name.startswith(f"{split}_")}
    arrays |= {f"{split}_id": id_array, f"{split}_label": np.asarray(labels, dtype=np.int64)}
    arrays |= {f"{split}_logits__{name}": np.asarray(values, dtype=np.float32) for name, values in logits.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(run.predictions_path, buffer.getvalue())
