"""Prunes the same models by every method, side by side, and compares what accuracy is left.

    python tools/bench_accuracy.py --out results --ablation --peers-python peers/bin/python

Every method gets the same calibration samples and budgets of MACs and nothing is trained. The
results are OUT/accuracy.csv, to which a row is appended as soon as it is known and whose rows are
not measured again unless `--force` says so, OUT/accuracy.md, and OUT/accuracy.png and .svg (with
`pip install ".[bench]"`). MACs and parameters are counted in the files by one counter for all.

The methods are those of tools/peers.py, run by the Python of the environment described there
(left out without `--peers-python`, or taken from an earlier table of that script by `--peers-csv`),
deletion by COP and by the L1 norm (`cop-delete`, `l1-delete`), and this package as it is with data
(`ours`). `--ablation` adds its parts: which units go (`cop`, `measured`) with how the rest makes up
for them (`+merge`, `+full`), and `data-free`, the default without data.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import bench_data
import bench_report
import peers
from bench_methods import ABLATION, COLUMNS, DELETION, METHODS, OURS, OWN, Bench, Key, Row, earlier, key


class Results:
    """The rows of a CSV file, which grows with them.

    Attributes:
        rows: By key.
        fresh: Keys of the rows that were added now.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.fresh = path, dict[Key, Row](), set[Key]()
        if path.exists():
            with path.open(newline="", encoding="utf-8") as stream:
                for row in csv.DictReader(stream):
                    if set(COLUMNS) - row.keys():
                        raise SystemExit(f"{path} has other columns; move it away or give another --out")
                    self.rows[key(row)] = row

    def add(self, row: Row) -> None:
        """Take a row in, in the place of an earlier one about the same, and write it at once."""
        new = not self.path.exists()
        self.rows[key(row)] = row
        self.fresh.add(key(row))
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def tidy(self) -> list[Row]:
        """Write the file anew in the table's order, without rows that others replace; all rows."""
        models = list(bench_data.cases())
        rows = sorted(
            self.rows.values(),
            key=lambda r: (
                models.index(r["model"]), r["seed"], -float(r["macs_target"]), METHODS.index(r["method"])
            ),
        )  # fmt: skip
        part = self.path.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        part.replace(self.path)
        return rows


def twin(results: Results, row: Row) -> Row | None:
    """The row of a method that comes down to the same run, where this process has measured one."""
    if row["method"] not in OWN:
        return None
    for method, how in OWN.items():
        other = row | {"method": method}
        same = method != row["method"] and how.settled() == OWN[row["method"]].settled()
        if same and key(other) in results.fresh:
            return results.rows[key(other)] | {
                "method": row["method"],
                "note": f"the same run as {method}",
            }
    return None


def run(args: argparse.Namespace, results: Results) -> None:
    """Fill in the requested rows that are not known yet."""
    known = bench_data.cases()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            if not known[name].path.exists():
                print(f"{name}: skipped, {known[name].path} does not exist", file=sys.stderr)
                continue
            bench = Bench(known[name], args.samples, args.seed, Path(folder))
            past = earlier(args.peers_csv, [bench]) if args.peers_csv else {}
            for macs in args.macs:
                for method in args.methods:
                    row = bench.blank(method, macs)
                    if key(row) in results.rows and not args.force:
                        continue
                    if key(row) not in past and method not in OWN and args.peers_python is None:
                        print(f"{name} {macs:g} {method}: skipped, no --peers-python", file=sys.stderr)
                        continue
                    found = past.get(key(row)) or twin(results, row) or bench.row(method, macs, args.peers_python)
                    results.add(found)
                    score = found["error"] or f"{found['accuracy']} at {found['macs_kept']} of the MACs"
                    print(
                        f"{name} {macs:g} {method}: {score}, {found['seconds'] or '?'} s",
                        flush=True,
                    )


def chosen(known: Sequence[str], **groups: Sequence[str]) -> Callable[[str], list[str]]:
    """Read comma-separated names; a group stands for its members."""

    def read(text: str) -> list[str]:
        names = [name for part in text.split(",") for name in groups.get(part, [part]) if name]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join((*known, *groups))}")
        return list(dict.fromkeys(names))

    return read


def budgets(text: str) -> list[float]:
    """Shares of the MACs, separated by commas."""
    found = [float(part) for part in text.split(",")]
    if not all(0 < share < 1 for share in found):
        raise argparse.ArgumentTypeError("give shares between 0 and 1")
    return sorted(set(found), reverse=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models, standard = list(bench_data.cases()), [*peers.TOOLS, *DELETION, *OURS]
    top.add_argument("--models", type=chosen(models), default=models, help=f"default: {','.join(models)}")
    top.add_argument(
        "--methods", type=chosen(METHODS, peers=peers.TOOLS), default=standard,
        help="names separated by commas, `peers` for all of theirs; default: all but the ablation's",
    )  # fmt: skip
    top.add_argument("--ablation", action="store_true", help=f"and {', '.join(ABLATION)}")
    top.add_argument("--macs", type=budgets, default=[0.9, 0.8, 0.7, 0.5], help="default: 0.9,0.8,0.7,0.5")
    top.add_argument("--out", type=Path, required=True, help="folder of the results")
    top.add_argument("--samples", type=int, default=512, help="most calibration samples (default 512)")
    top.add_argument("--seed", type=int, default=0, help="of this package's methods (default 0)")
    top.add_argument("--peers-python", type=Path, help="the Python of the peers' environment")
    top.add_argument("--peers-csv", type=Path, help="table of tools/peers.py whose rows are used again")
    top.add_argument("--force", action="store_true", help="measure rows again that are there already")
    return top


def main() -> None:
    """Measure the requested rows and write the reports, partial ones too if stopped early."""
    args = parser().parse_args()
    logging.getLogger("onnxcop").setLevel(logging.ERROR)  # that there are no data is meant so
    if args.peers_python is not None and not args.peers_python.exists():
        print(f"{args.peers_python} does not exist: peers are skipped", file=sys.stderr)
        args.peers_python = None
    if args.ablation:
        args.methods = list(dict.fromkeys([*args.methods, *ABLATION]))
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "accuracy.csv")
    try:
        run(args, results)
    finally:
        bench_report.write(results.tidy(), args.out / "accuracy", list(METHODS))


if __name__ == "__main__":
    main()
