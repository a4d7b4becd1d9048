"""The jobs of a family: one model and one budget each, with a criterion and a seed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

from onnxcop._base.records import file_record
from onnxcop._version import __version__
from onnxcop.criteria.base import Criterion
from onnxcop.data.input_files import weight_files
from onnxcop.data.paths import file_of
from onnxcop.data.sources.remote import is_url
from onnxcop.errors import BudgetError, ModelError, OnnxcopError
from onnxcop.graph.serialize import file_size
from onnxcop.pipeline.options import PruneOptions
from onnxcop.pipeline.prune import prune_with
from onnxcop.report.curve import CurveRow, Point, original_row
from onnxcop.runtime.session import LARGEST_IN_MEMORY

_NOT_OF_RESULT = {"progress", "executor", "data", "macs"}  # fields that no result depends on, and those told apart
_SINGLE = ("latency", "divergence", "max_drop", "stats_out", "checkpoint")  # options of a single run


@dataclass(frozen=True, slots=True)
class Variant:
    """What jobs of one model and one budget differ in.

    Attributes:
        criterion: The criterion, or "auto".
        seed: Random seed.
        figures: Those of both that the table shows, by column: what all jobs have in common is left out.
    """

    criterion: str | Criterion = "auto"
    seed: int = 0
    figures: tuple[tuple[str, str | int], ...] = ()

    def of(self, options: PruneOptions) -> PruneOptions:
        """Options of a job."""
        return replace(options, criterion=self.criterion, seed=self.seed)

    @property
    def suffix(self) -> str:
        """The part of a result's name that tells it from those of other variants."""
        return "".join(f".{value}" if name == "criterion" else f".{name}-{value}" for name, value in self.figures)


def variants_of(criteria: Mapping[str, str | Criterion], seeds: Sequence[int]) -> list[Variant]:
    """All pairs of a criterion, by its name in the table, and a seed."""
    return [
        Variant(
            criterion, seed, ((("criterion", name),) if len(criteria) > 1 else ())
            + ((("seed", seed),) if len(seeds) > 1 else ()),
        )
        for name, criterion in criteria.items() for seed in seeds
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class FamilyJob:
    """One model, and one budget.

    Attributes:
        model: The original's file.
        macs: Fraction of the multiply-accumulates to keep.
        key: Digest of everything that the result depends on.
        file: The result's file, None to write none.
        variant: Criterion and seed, None for those of the options.
    """

    model: Path
    macs: float
    key: str
    file: Path | None = None
    variant: Variant | None = None


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What became of a job.

    Attributes:
        job: The key of the job.
        model: The original's file.
        original: Figures of the original, by name; empty if it failed.
        row: Figures of the result, by name; empty if it failed.
        error: Why there is no result, in one line; empty if there is one.
    """

    job: str
    model: str
    original: CurveRow
    row: CurveRow
    error: str = ""


def jobs_of(
    models: Sequence[Path], macs: Sequence[float], options: PruneOptions, folder: Path | None = None,
    variants: Sequence[Variant] = (),
) -> list[FamilyJob]:  # fmt: skip
    """List the jobs, model by model and variant by variant, from the loosest budget to the tightest.

    Args:
        models: Files of the originals.
        macs: Fractions of the multiply-accumulates to keep.
        options: Options of all jobs; their other budgets hold in each.
        folder: The folder for the results, None to write none.
        variants: Criteria and seeds; by default those of the options.

    Raises:
        BudgetError: There is no model or no budget, or an option belongs to a single run.
        ModelError: A model does not exist, or two results would have one name.
    """
    if not models or not macs:
        raise BudgetError("a sweep needs models and budgets; give MODEL… and --macs 0.9,0.8")
    for name in _SINGLE:
        if getattr(options, name):
            raise BudgetError(f"--{name.replace('_', '-')} is for a single run; leave it out of a sweep over models")
    if folder is not None:
        names = [model.name for model in models]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise BudgetError(f"two models are called {twice}; rename one, because results are named after them")
    ways = [(one, _digest_of(options if one is None else one.of(options))) for one in variants or (None,)]
    lacking = next((model for model in models if not model.is_file()), None)
    if lacking is not None:
        raise ModelError(f"{lacking} does not exist; check the path")
    jobs = []
    for model in dict.fromkeys(models):
        own = _digest_of_model(model)
        for (variant, about), share in product(ways, sorted(set(macs), reverse=True)):
            key = hashlib.sha256(f"{own} {share!r} {about}".encode()).hexdigest()[:32]
            stem = model.name.removesuffix(".onnx") + ("" if variant is None else variant.suffix)
            file = None if folder is None else folder / f"{stem}.macs-{share:g}.onnx"
            jobs.append(FamilyJob(model, share, key, file=file, variant=variant))
    return jobs


def _digest_of_model(model: Path) -> str:
    """Digest of a model's file and of the files beside it that hold its weights."""
    beside = sorted(path for path in weight_files(model) if path.is_file())
    return " ".join(str(file_record(path)["sha256"]) for path in (model, *beside))


def _digest_of(options: PruneOptions) -> str:
    """Digest of what all jobs share: version, options, and names, sizes and times of the files of the data."""
    plain = {field.name: getattr(options, field.name) for field in fields(options) if field.name not in _NOT_OF_RESULT}
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(sorted(plain.items(), key=lambda item: item[0])))
    return hashlib.sha256(f"{__version__} {text} {_described(options.data)}".encode()).hexdigest()


def _described(data: object) -> str:
    if not isinstance(data, str | os.PathLike):
        return type(data).__name__
    if is_url(os.fspath(data)):
        return os.fspath(data)
    path = file_of(data)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return f"{os.fspath(data)} {found}"


@dataclass(frozen=True, slots=True)
class JobResult:
    """A finished job on its way from a worker.

    Attributes:
        job: The job.
        record: Its figures.
        model: The result as bytes, None if it failed or is not asked for.
    """

    job: FamilyJob
    record: JobRecord
    model: bytes | None = None


def carry_out(job: FamilyJob, options: PruneOptions) -> JobResult:
    """Carry out a job, as `onnxcop.prune` does for this model, budget, criterion and seed.

    Args:
        job: The job.
        options: The options of all jobs.

    Returns:
        The result, or the reason why there is none.

    Raises:
        ModelError: The model or the data are not on this machine.
    """
    local = isinstance(options.data, str | os.PathLike) and not is_url(os.fspath(options.data))
    data = options.data if local else None
    for path in (job.model, *([] if data is None else [file_of(data)])):
        if not path.exists():
            raise ModelError(f"{path} does not exist; workers read it at the same path")
    own, shown = (options, {}) if job.variant is None else (job.variant.of(options), dict(job.variant.figures))
    try:
        result = prune_with(job.model, replace(own, macs=job.macs))
        if job.file is not None and file_size(result.model) > LARGEST_IN_MEMORY:
            raise ModelError(f"{job.model} is too large for --save-models; prune it by itself")
    except OnnxcopError as error:
        line = " ".join(str(error).split())
        failed = JobRecord(job.key, str(job.model), original={}, row={"budget": job.macs, **shown}, error=line)
        return JobResult(job, failed)
    point = Point(job.macs, result, job.file)
    record = JobRecord(job.key, str(job.model), original_row(point), {**point.row(), **shown})
    return JobResult(job, record, None if job.file is None else result.model.SerializeToString())
