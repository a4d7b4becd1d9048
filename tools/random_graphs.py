"""Random networks without end: pruned, each must equal its masked original, whatever is combined with what.

A seed draws an opset, a way to store weights, a chain of blocks with joins, heads, and units to remove (see
tests/coupling/ops). What the tests do on a hundred networks, this does on as many as are asked for, and goes on after
a fault. A fault is printed with its seed, which makes the network again.

    python tools/random_graphs.py --seeds 1000
    python tools/random_graphs.py --first 417 --seeds 1   # one again
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "coupling")]

import test_random_graphs as networks  # noqa: E402
from ops.blocks import BLOCKS, FORMS  # noqa: E402
from ops.builder import Builder  # noqa: E402
from ops.oracle import prune_and_verify  # noqa: E402

from onnxcop.analysis.analyze import analyze  # noqa: E402
from onnxcop.runtime.session import EngineOptions  # noqa: E402

CPU = EngineOptions(provider="cpu", threads=1)
POLICIES = ("finest", "coarsest")


def network(rng: np.random.Generator) -> tuple[Builder, list[str], Counter[str]]:
    """A network of usual blocks, its outputs, and which blocks it has."""
    opset, style = int(rng.choice(networks.OPSETS)), str(rng.choice(networks.STYLES))
    b = Builder(opset, int(rng.integers(1 << 16)), dynamic=bool(rng.integers(2)), style=style)
    x = networks._stem(b, int(rng.integers(4, 10)))
    trunk, used = [x], Counter[str]()
    for _ in range(int(rng.integers(1, 9))):
        name, form = str(rng.choice(sorted(BLOCKS))), str(rng.choice(FORMS))
        b.story.append(f"{name}({x}, {form})")
        x = BLOCKS[name](b, x, form)
        used[name] += 1
        for _ in range(int(rng.choice([0, 0, 0, 1, 2]))):
            x = b.add("Concat", [x, str(rng.choice(trunk))], axis=1)
            used["Concat"] += 1
        trunk.append(x)
    kinds = rng.choice(["pool", "mean", "flatten", "reshape"], int(rng.integers(1, 4)))
    heads = [networks._head(b, b.conv(x, int(rng.integers(2, 7))), str(kind), str(rng.choice(FORMS))) for kind in kinds]
    return b, heads, used


def check(seed: int) -> tuple[Counter[str], str]:
    """The blocks of a seed's network, and what went wrong with it."""
    rng = np.random.default_rng(seed)
    b, outputs, used = network(rng)
    try:
        model = b.model(outputs)
        structure = analyze(model, policy=str(rng.choice(POLICIES)), options=CPU).structure
        if structure.coupling.declined:
            return used, f"declined: {structure.coupling.declined[0][1]}"
        prune_and_verify(model, structure, seed)
        if b.dynamic:
            networks._check_batch(model, structure, seed)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return (
            used,
            f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error).splitlines()[:1]}",
        )
    return used, ""


def main() -> int:
    """Check seeds one after the other and sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    options = parser.parse_args()
    used, faults, start = Counter[str](), Counter[str](), time.process_time()
    for number, seed in enumerate(range(options.first, options.first + options.seeds), start=1):
        blocks, fault = check(seed)
        used += blocks
        if fault:
            faults[fault] += 1
            print(f"seed {seed}: {fault}", flush=True)
        if number % 100 == 0:
            print(f"{number} networks, {faults.total()} faults, {time.process_time() - start:.0f} s of CPU", flush=True)
    print(f"{options.seeds} networks, {faults.total()} faults; blocks: "
          f"{', '.join(f'{name} {count}' for name, count in used.most_common())}")  # fmt: skip
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
