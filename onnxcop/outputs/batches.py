"""Outputs of a model on batches of samples: computed here, or by workers that read the samples themselves."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from itertools import islice

import onnx

from onnxcop._base.types import Feed
from onnxcop.data.dataset import CalibrationData, Item
from onnxcop.parallel.crew import HERE, Crew
from onnxcop.runtime.session import EngineOptions, KeptSession, Session


def outputs_on(
    model: onnx.ModelProto, data: CalibrationData, options: EngineOptions, crew: Crew = HERE, most: int | None = None
) -> Generator[tuple[int, Feed]]:
    """Run a model on data.

    Args:
        model: The model.
        data: The samples.
        options: How to run it.
        crew: Runs the batches.
        most: How many batches; None for all.

    Yields:
        The number of samples and the outputs, batch by batch.
    """
    if not crew.spread:
        with Session(model, options) as session:
            for feed in islice(data.batches(), most):
                yield data.layout.samples_in(feed), session.run(dict(feed))
        return
    kept, known = crew.share(KeptSession(model, crew.engine(options))), crew.share(data, keep=True)
    with closing(crew.run(_outputs_of, islice(data.items(), most), kept, known)) as results:
        for parts in results:
            yield from parts


def _outputs_of(item: Item, kept: KeptSession, data: CalibrationData) -> list[tuple[int, Feed]]:
    return [(data.layout.samples_in(feed), kept.session.run(dict(feed))) for feed in data.feeds_of(item)]


def answers_to(
    model: onnx.ModelProto, feeds: Iterable[Feed], options: EngineOptions, crew: Crew = HERE
) -> Generator[Feed]:
    """Run a model on batches that are in memory; yields the outputs of each."""
    if not crew.spread:
        with Session(model, options) as session:
            yield from (session.run(feed) for feed in feeds)
        return
    with closing(crew.run(answer_to, feeds, crew.share(KeptSession(model, crew.engine(options))))) as results:
        yield from results


def answer_to(feed: Feed, kept: KeptSession) -> Feed:
    """Run a model on a batch in a worker."""
    return kept.session.run(feed)
