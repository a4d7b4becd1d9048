"""Pruning of a family: its jobs on workers, the journal, and the files that show what is done."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from onnxcop._base.files import Writing, write_atomically
from onnxcop.data.input_files import InputFiles
from onnxcop.errors import ModelError
from onnxcop.parallel.workers import crew_for
from onnxcop.pipeline.family.jobs import JobRecord, JobResult, Variant, carry_out, jobs_of
from onnxcop.pipeline.family.journal import Journal
from onnxcop.pipeline.options import PruneOptions
from onnxcop.pipeline.sweep import as_csv
from onnxcop.report.family_page import family_page, family_rows, pareto_chart


class FamilyFiles:
    """The files of a family, complete after every job.

    Args:
        table: The table (CSV). The journal (`.journal`) and the page (`.html`) are beside it.
        plot: The Pareto plot (.svg), None for none.
        folder: The folder of the models, None for none.
        inputs: Input files, which are never overwritten.

    Raises:
        ModelError: A file cannot be written.
    """

    def __init__(self, table: Path, plot: Path | None, folder: Path | None, inputs: InputFiles) -> None:
        self.table, self.plot, self.folder, self.inputs = table, plot, folder, inputs
        self.page = table.with_suffix(".html")
        if plot is not None and plot.suffix.lower() != ".svg":
            raise ModelError(f"{plot}: the plot of several models is an SVG; give it a name that ends in .svg")
        inputs.check(table, self.page, plot)
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ModelError(f"{folder} cannot be created: {error.strerror or error}; choose another") from None
        self.journal = Journal(table.with_suffix(".journal"))

    def keep(self, result: JobResult) -> bool:
        """Write the model of a finished job, and then note the job; returns whether it is new."""
        if result.model is not None and result.job.file is not None:
            self.inputs.refuse(result.job.file)
            write_atomically(result.job.file, result.model)
        return self.journal.add(result.record)

    def write(self, keys: Sequence[str]) -> None:
        """Write the table, the page and the plot.

        Args:
            keys: The keys of all jobs, in order.
        """
        jobs = len(keys)
        rows = family_rows([self.journal.done[key] for key in keys if key in self.journal.done])
        with Writing() as files:
            files.add(self.table, as_csv(rows))
            files.add(self.page, family_page(rows, jobs).encode())
            if self.plot is not None:
                files.add(self.plot, pareto_chart(rows).encode())


def family_with(
    models: Sequence[Path], macs: Sequence[float], files: FamilyFiles, options: PruneOptions,
    variants: Sequence[Variant] = (),
) -> Iterator[JobRecord]:  # fmt: skip
    """Prune several models to several budgets; each result equals that of :func:`onnxcop.prune`.

    A job that the journal holds is not done again, so a run that was stopped continues. Jobs that failed are tried
    again.

    Args:
        models: Files of the originals.
        macs: Fractions of the multiply-accumulates to keep.
        files: The files to write.
        options: The options of all jobs. Its executor carries them out.
        variants: Criteria and seeds to try each; by default those of the options.

    Yields:
        What became of each job, first those of the journal, then the others when they are finished.

    Raises:
        OnnxcopError: The jobs cannot be listed, or workers cannot do them.
    """
    jobs = jobs_of(models, macs, options, files.folder, variants)
    keys = [job.key for job in jobs]
    files.journal.forget_failures(keys)
    missing = [job for job in jobs if job.file is not None and not job.file.is_file()]
    for job in missing:  # its result was deleted
        files.journal.done.pop(job.key, None)
    open_jobs = [job for job in jobs if job.key not in files.journal.done]
    yield from (files.journal.done[key] for key in keys if key in files.journal.done)
    crew = crew_for(options.executor)
    shared = crew.share(replace(options, executor=None, progress=None, options=crew.engine(options.engine)))
    finished: queue.SimpleQueue[JobRecord | BaseException | None] = queue.SimpleQueue()

    def note(result: JobResult) -> None:  # at once, so that nothing that is done is lost if the run is stopped
        if files.keep(result):
            finished.put(result.record)

    def work() -> None:
        try:
            for result in crew.run(carry_out, open_jobs, shared, note=note):
                note(result)  # the executor may call back later
            finished.put(None)
        except BaseException as error:
            finished.put(error)

    threading.Thread(target=work, name="onnxcop-family", daemon=True).start()
    while (entry := finished.get()) is not None:
        if isinstance(entry, BaseException):
            raise entry
        files.write(keys)
        yield entry
    files.write(keys)
