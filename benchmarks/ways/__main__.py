"""One measured process: ``python -m benchmarks.ways WAY DESCRIPTOR FOLDER WORKLOAD`` (the last one in JSON)."""

import json
import sys
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.ways.gate import Gate
from benchmarks.workloads import Workload


def main(way: str, descriptor: str, folder: str, workload: str) -> None:
    """Do the work one way and leave the final model in ``FOLDER/model.npy``."""
    vector = run(way, Workload(**json.loads(workload)), Gate(int(descriptor)), Path(folder))
    np.save(Path(folder) / "model.npy", vector.detach().numpy())


def run(way: str, workload: Workload, gate: Gate, folder: Path) -> Tensor:
    """Import what a way needs, and no more: memory and the first round's delay are measured too."""
    if way in ("plain", "plain-2-threads", "by-hand"):
        from benchmarks.ways import plain

        if way == "by-hand":
            return plain.by_hand(workload, gate, folder)
        return plain.plain(workload, gate, folder, threads=1 if way == "plain" else 2)
    if way in ("hawthorn-1", "hawthorn-2"):
        from benchmarks.ways.engine import engine

        return engine(workload, gate, folder, workers=int(way[-1]))
    from benchmarks.ways import simulation

    return {"flower-ray": simulation.flower, "hawthorn-ray": simulation.hawthorn}[way](workload, gate, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
