"""The end of a network on workers: batches run from a cut to the outputs, each where there is room."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import onnx

from onnxcop._base.types import Feed
from onnxcop.parallel.crew import Crew
from onnxcop.runtime.segments import PartialExecutor
from onnxcop.runtime.session import EngineOptions, Session


@dataclass
class _Rest:
    """A piece of a network, and its session once a worker has made it."""

    model: onnx.ModelProto
    options: EngineOptions
    session: Session | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"session": None}

    def run(self, feed: Feed) -> Feed:
        if self.session is None:
            self.session = Session(self.model, self.options, passing=True)
        return self.session.run(feed)


def finished_by(crew: Crew, executor: PartialExecutor, places: Sequence[int]) -> Generator[Feed]:
    """Run batches from their cut to the end.

    Args:
        crew: Runs them; without workers they run here.
        executor: The live tensors of a network.
        places: Indices of batches, in this order.

    Yields:
        The outputs, batch by batch.
    """
    piece = executor.rest(places) if crew.spread else None
    if piece is None:
        yield from executor.finishing(places=places)
        return
    inputs = [value.name for value in piece.graph.input]
    states = (executor.states[place] for place in places)
    shared = crew.share(_Rest(piece, crew.engine(executor.options)))
    with closing(crew.run(_outputs, ({name: state[name] for name in inputs} for state in states), shared)) as results:
        for place, outputs in zip(places, results, strict=True):
            early = [name for name in executor.partition.outputs if name not in outputs]
            known = executor.states[place] if early else {}
            yield {name: known[name] if name in early else outputs[name] for name in executor.partition.outputs}


def _outputs(feed: Feed, rest: _Rest) -> Feed:
    return rest.run(feed)
