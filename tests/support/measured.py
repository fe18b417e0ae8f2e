"""What nodes measure of the machine they run on, measured once for all nodes of a test run.

A node that starts tries the kernels that it may compute with, and then its own speed: a second of
processor time and another one of waiting, the same for each of the hundreds of nodes that tests start.
Here the first one's answers are kept in files for the others. (``tests/inference`` measures for real.)
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from petals.inference import kernel_choice, kernels, throughput
from petals.inference.kernels import MakeKernel, WeightFormat
from petals.node import serving
from torch import device as Device


def share(folder: Path) -> None:
    """Let nodes of this process, and of its forks, keep in ``folder`` what they measure."""
    measure_kernels, measure_speed = kernel_choice._fastest, throughput.remembered

    def fastest(
        weights: WeightFormat, device: Device, *, exact: bool
    ) -> tuple[MakeKernel, float] | None:
        path = folder / f"{weights}-{device.type}-{exact}.json"
        if path.exists():
            known = json.loads(path.read_text())
            return known and (getattr(kernels, known[0]), known[1])
        found = measure_kernels(weights, device, exact=exact)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            json.dump(found and [getattr(found[0], "__name__"), found[1]], file)  # noqa: B009 - a class
        Path(file.name).replace(path)
        return found

    def remembered(*given: Any, **named: Any) -> Any:
        return measure_speed(*given, **named | {"folder": folder})

    vars(kernel_choice)["_fastest"] = fastest
    vars(serving)["remembered"] = remembered
