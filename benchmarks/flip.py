"""What FLIP costs: many triggers inverted as one batch against one pair after another, and a hardening round.

    python benchmarks/flip.py [--model "mnist_net()"] [--classes 10] [--samples 6] [--steps 20] [--rounds 2]

Four ways invert the triggers of all pairs of classes, both directions, with the same steps and starts: as one batch,
of the model as it is and of the model rounded to bfloat16; the same code pair by pair; and a plain loop as one writes
it down, with `torch.optim.Adam`, autograd through the stamping and gradients of all parameters, which PyTorch computes
unless told otherwise. Their sizes are compared. Then one client trains a plain round and rounds of hardening. CPU time
of one thread, so that other work on the machine disturbs little; inputs are random numbers of MNIST's shape, since the
arithmetic does not depend on them.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.flip.inversion import invert
from client.flip.triggers import HALF, NOISE, InversionSettings, Precision, Search, Triggers, random_start
from client.trainer import LocalJob, honest
from tasks.dataset import Dataset
from tasks.model import build
from tasks.params import Layout, bind, model_vector
from tasks.rng import generator
from tasks.spec import resolve

SHAPE = (1, 28, 28)
PLAIN = "sgd(lr=0.1, momentum=0.9, weight_decay=0.0005, batch_size=64)"
HARDENING = {
    "paper, pairs by fives": "flip(epochs=2)",
    "released, pairs by fives": "flip(variant='released', epochs=2)",
    "as in flip-table2, 5 epochs": (
        "flip(lr=0.03, epochs=5, order='closest', warm_each_round=True, samples=4, alpha=0.05,"
        " warm_steps=80, first_steps=60, second_steps=15, precision='bfloat16')"
    ),
    "released, one pair at a time": "flip(variant='released', epochs=2, pairs_at_once=1)",
}


def plain_pair(
    model: nn.Module, pair: list[Search], start: tuple[Tensor, Tensor], steps: int, draw: torch.Generator
) -> list[float]:
    """Invert both directions of one pair step by step and return the sizes; 0 where none was found."""
    s, half = InversionSettings(), HALF
    raw = [torch.atanh((v - 0.5) * half).requires_grad_(True) for v in start]
    optimizer = torch.optim.Adam(raw, lr=s.lr, betas=s.betas)
    alpha, up, down, best = [search.alpha for search in pair], [0, 0], [0, 0], [float("inf")] * 2
    for _ in range(steps):
        masks, patterns = (torch.tanh(u) / half + 0.5 for u in raw)
        optimizer.zero_grad()
        loss, hits = torch.zeros(()), []
        for way, search in enumerate(pair):
            logits = model((1 - masks[way]) * search.inputs + masks[way] * patterns[way])
            targets = torch.full((len(search.inputs),), search.target)
            loss = loss + functional.cross_entropy(logits, targets, reduction="sum") + alpha[way] * masks[way].sum()
            hits.append((logits.argmax(1) == targets).float().mean().item())
        loss.backward()
        optimizer.step()
        noise = torch.rand(*masks.shape[-2:], 2, generator=draw).permute(2, 0, 1)[:, None]
        for way in range(2):
            success, size = hits[way] >= s.threshold, masks[way].sum().item()
            up[way], down[way] = (up[way] + 1, 0) if success else (0, down[way] + 1)
            if up[way] == s.patience:
                alpha[way], up[way] = alpha[way] * s.factor, 0
            if down[way] == s.patience:
                alpha[way], down[way] = alpha[way] / s.factor**1.5, 0
            if success and size < best[way]:
                best[way] = size
                with torch.no_grad():
                    for u, v, n in zip(raw, (masks, patterns), noise, strict=True):
                        u[way] = torch.atanh(((v[way] + (2 * n - 1) * NOISE).clamp(0, 1) - 0.5) * half)
    return [0.0 if b == float("inf") else b for b in best]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="mnist_net()")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--samples", type=int, default=6, help="of each source class, as a batch of 64 has them")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2, help="of hardening, the first with the warm-up; 0: none")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = build(resolve("model", given.model), SHAPE, given.classes, generator(1, "model"))
    compare_inversions(model, given.classes, given.samples, given.steps)
    if given.rounds:
        compare_rounds(model, given.classes, given.rounds)


def compare_inversions(model: nn.Module, classes: int, samples: int, steps: int) -> None:
    """Print the CPU time of the three ways to invert all pairs."""
    draw = generator(1, "benchmark")
    images = [torch.rand(samples, *SHAPE, generator=draw) for _ in range(classes)]
    pairs = [(a, b) for a in range(classes) for b in range(a)]
    ways = [way for a, b in pairs for way in ((a, b), (b, a))]
    searches = [Search(images[source], target, summed=True) for source, target in ways]
    masks, patterns = random_start(len(ways), SHAPE, draw)
    halves = [slice(i, i + 2) for i in range(0, len(ways), 2)]

    def batched(precision: Precision = "float32") -> list[float]:
        settings = InversionSettings(precision=precision)
        return invert(model, searches, (masks, patterns), steps, generator(2), settings).sizes.tolist()

    def rounded() -> list[float]:
        return batched("bfloat16")

    def by_pairs() -> list[float]:
        parts: list[Triggers] = [
            invert(model, searches[h], (masks[h], patterns[h]), steps, generator(2)) for h in halves
        ]
        return [size for part in parts for size in part.sizes.tolist()]

    def plain() -> list[float]:
        model.eval()
        parts = [plain_pair(model, searches[h], (masks[h], patterns[h]), steps, generator(2)) for h in halves]
        return [size for part in parts for size in part]

    print(f"{len(ways)} triggers, {samples} samples each, {steps} steps, CPU seconds:")
    first = measure("  all as one batch", batched, None)
    others = {"all as one batch, bfloat16": rounded, "the same code, pair by pair": by_pairs}
    for name, way in {**others, "a plain loop over the pairs": plain}.items():
        measure("  " + name, way, first)


def measure(
    name: str, way: Callable[[], list[float]], beside: tuple[float, list[float]] | None
) -> tuple[float, list[float]]:
    """Run a way, print its time and, beside another's result, the ratio and the largest difference of sizes."""
    begin = time.process_time()
    sizes = way()
    seconds = time.process_time() - begin
    note = f"   {sum(size > 0 for size in sizes)} found"
    if beside is not None:
        apart = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(sizes, beside[1], strict=True))
        note += f", {seconds / beside[0]:.2f} times the batch, sizes apart by {apart:.1e} at most"
    print(f"{name:34}{seconds:9.3f}{note}", flush=True)
    return seconds, sizes


def compare_rounds(model: nn.Module, classes: int, rounds: int) -> None:
    """Print the CPU time of a plain round of one client with 500 samples, and of rounds of hardening."""
    draw = generator(1, "client")
    inputs = torch.randint(0, 256, (500, *SHAPE), generator=draw, dtype=torch.uint8)
    labels = torch.randint(0, classes, (500,), generator=draw)
    dataset = Dataset("made", inputs, labels, inputs, labels, classes, scale=1 / 255)
    layout, vector = Layout.of(model), model_vector(model)
    bind(model, layout, vector)
    start = vector.clone()
    job = LocalJob(dataset, torch.arange(500), model, layout, start, vector, client=0, round=1, seed=1)
    print("one client, 500 samples, CPU seconds of each round:")
    for name, text in {"plain SGD, one epoch": PLAIN, **HARDENING}.items():
        state: dict[str, Tensor] = {}
        spent = []
        for number in range(1, rounds + 1):
            vector.copy_(start)
            begin = time.process_time()
            honest(resolve("training", text))(dataclasses.replace(job, round=number, state=state))
            spent.append(time.process_time() - begin)
        print(f"  {name:32}" + "".join(f"{seconds:9.3f}" for seconds in spent), flush=True)


if __name__ == "__main__":
    main()
