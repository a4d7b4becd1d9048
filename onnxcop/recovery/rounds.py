"""Rounds of measuring, cutting and compensating, without training.

A round measures sensitivity curves on the current network and spends an intermediate budget over them. The consumers of
removed channels compensate, and then layers are refined one by one. Statistics are measured again in each round,
because the network is no longer the original.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import onnx

from onnxcop._base.progress import Progress, silent
from onnxcop._base.timing import single_threaded
from onnxcop._base.types import Feed, FloatArray, IntArray
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.greedy import PruningState
from onnxcop.allocation.limits import Limits
from onnxcop.allocation.search import Alternative, CurveSearch
from onnxcop.allocation.sensitivity import NetworkCache, Samples, alive_channels, choose_ridges, measure_curves
from onnxcop.analysis.analyze import Analysis
from onnxcop.calibration.calibrate import calibrate
from onnxcop.calibration.patches import PatchStatistics, unfolded
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.criteria.base import PruningContext
from onnxcop.criteria.preference import Preference
from onnxcop.data.open import CalibrationData
from onnxcop.outputs.judgement import judge
from onnxcop.parallel.crew import HERE, Crew, Shared
from onnxcop.reconstruction.block_bases import in_block_bases, watched
from onnxcop.reconstruction.block_streams import BlockStream, block_streams
from onnxcop.reconstruction.divergence import Divergence, HeldOut, Reference, Waypoint
from onnxcop.reconstruction.linear_streams import linear_streams
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.principal import in_principal_channels
from onnxcop.reconstruction.products import products
from onnxcop.reconstruction.refine import FitStep, Refined, Refiner, RefineSet
from onnxcop.reconstruction.refine_batches import FEWEST_MACS
from onnxcop.reconstruction.ridge import merge_channels
from onnxcop.reconstruction.spread import finished_by
from onnxcop.recovery.belief import Belief
from onnxcop.recovery.methods import FULL, RecoveryMethod
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.providers import CPU, resolve_provider
from onnxcop.runtime.segments import PartialExecutor
from onnxcop.runtime.session import EngineOptions

log = logging.getLogger("onnxcop")

_POSITIONS = 64  # positions of a map per sample: fits of many channels need more observations than a ranking
_TEMPERATURE = 4.0
_JUDGED, _JUDGED_MACS = 16, 1e9  # batches to judge on, and multiply-accumulates of each, if there are enough samples
_AFFORDABLE = 1e11  # multiply-accumulates of all samples for refinement, if they are more than the fewest
_GROUP_RIDGE = 1e-2  # λ of grouped convolutions, which is not searched for
_SAME = 1e-4  # divergence of an equivalent network that sums in another order


@dataclass(frozen=True, slots=True)
class RecoverySettings:
    """How thorough recovery is.

    Attributes:
        rounds: Rounds of pruning and recovery; None chooses by the depth of the cut.
        refine: Passes of layer-by-layer least squares after each round.
        curve_passes: Largest number of curve measurements in a round, on the way to its budget.
        sharper_passes: Largest number of those measurements at intermediate budgets.
        held_out_samples: Number of held-out samples, if it is more than a quarter.
        refine_samples: Largest number of samples for refinement; up to twice as many if the network runs quickly.
        views: Crops of each image to fit on, if there are few images.
        seed: Random seed.
        method: The recovery method.
        synthetic_batch: Synthetic inputs in one run.
    """

    rounds: int | None = None
    refine: int = 1
    held_out_samples: int = 128
    curve_passes: int = 6
    sharper_passes: int = 4
    refine_samples: int = 768
    views: int = 2
    seed: int = 0
    method: RecoveryMethod = FULL
    synthetic_batch: int = 16

    def refine_samples_for(self, macs: float) -> int:
        """Largest number of samples for refinement of a network of so many multiply-accumulates."""
        return int(np.clip(_AFFORDABLE / max(macs, 1.0), self.refine_samples, 2 * self.refine_samples))

    def by(self, method: RecoveryMethod) -> RecoverySettings:
        """The same settings with another method; without refinement if the method has none."""
        return replace(self, method=method, refine=self.refine if method.refines else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """Where one of several selections ends.

    Attributes:
        divergence: Distance from the original on the held-out set.
        alternative: The selection.
        network: The recovered network.
        steps: As the attribute of :class:`Recovery`.
        way: Measurements on the way there.
    """

    divergence: float
    alternative: Alternative
    network: MaskedNetwork
    steps: Mapping[int, FitStep]
    way: list[Waypoint]


@dataclass
class Recovery:
    """The state of a recovering network.

    Attributes:
        synthetic: Whether the data are synthetic inputs.
        task: The task of the model, if the user names it (see :data:`onnxcop.outputs.tasks.TASKS`).
        crew: Carries out independent tasks.
        original: The unpruned network, up to the basis of its linear streams.
        working: The current network.
        fit: Data to fit on.
        held_out: Held-out data.
        reference: Outputs of the original on the held-out set.
        softened: The same, softened for class scores; choices are made by it.
        seen: Statistics of the original.
        rotated: Groups written in principal channels (see :mod:`onnxcop.reconstruction.principal`).
        way: Measurements after every step.
        steps: By node, how the last refinement fitted its layers.
    """

    analysis: Analysis
    fit: CalibrationData
    held_out: CalibrationData
    options: EngineOptions
    settings: RecoverySettings
    progress: Progress = silent
    synthetic: bool = False
    task: str | None = None
    crew: Crew = HERE
    original: MaskedNetwork = field(init=False)
    working: MaskedNetwork = field(init=False)
    reference: Reference = field(init=False)
    softened: Reference = field(init=False)
    held_out_feeds: list[Feed] = field(init=False)
    seen: CalibrationStats | None = None
    rotated: tuple[int, ...] = ()
    way: list[Waypoint] = field(default_factory=list)
    steps: Mapping[int, FitStep] = field(default_factory=dict)
    _held: Shared[HeldOut] | None = None

    def __post_init__(self) -> None:
        self.original = MaskedNetwork.sharing(self.analysis)
        self.working = self.original.copy()
        self.held_out_feeds = [dict(feed) for feed in self.held_out.batches(self._judged_together())]
        outputs = self._outputs_of(self.original)
        counts = [self.held_out.layout.samples_in(feed) for feed in self.held_out_feeds]
        judgements = judge(outputs, counts, self.analysis.original, self.task)
        self.reference = Reference(outputs, roots=self.synthetic, judgements=judgements, counts=counts)
        self.softened = self.reference.softened(_TEMPERATURE)

    def _judged_together(self) -> int:
        """Samples of a batch to judge on: few on the CPU, so that workers share them evenly, but enough for a task."""
        if resolve_provider(self.options.provider)[0] != CPU:
            return self.held_out.batch_size
        macs = max(float(self.analysis.cost.original()[0]), 1.0)
        even = math.ceil(self.held_out.count / _JUDGED)
        worth = 1 << (math.ceil(_JUDGED_MACS / macs) - 1).bit_length()
        return min(self.held_out.batch_size, max(even, worth))

    @property
    def few(self) -> bool:
        """Whether fewer samples than wanted are held out, because there are few."""
        return self.held_out.count < self.settings.held_out_samples

    @cached_property
    def heads(self) -> tuple[BlockStream, ...]:
        """Groups with units spread over heads, each of which may be written in another basis."""
        return tuple(block_streams(self.original))

    def restarted(self) -> Recovery:
        """The same network from the start; the record of measurements continues."""
        again = copy(self)
        again.working, again.steps = self.original.copy(), {}
        return again

    def checkpoint(self) -> Callable[[], None]:
        """Remember the current network; the function goes back to it."""
        network, steps = self.working.copy(), self.steps

        def back() -> None:
            self.working, self.steps = network, steps

        return back

    @single_threaded
    def change_basis(self, groups: Collection[int]) -> None:
        """Write those groups that are linear streams in principal channels, before anything is cut."""
        streams = [stream for stream in linear_streams(self.original) if stream.group.index in groups]
        heads = [stream for stream in self.heads if stream.group.index in groups]
        if not streams and not heads:
            return
        seen = self._calibrate(self.fit, "streams")
        rotated, known = in_principal_channels(self.original, streams, seen)
        rotated, blocks = in_block_bases(rotated, heads, seen)
        outputs = self._outputs_of(rotated)
        if self.reference.compare(outputs).value < _SAME:
            self.original, self.working = rotated, rotated.copy()
            self.rotated = (*(stream.group.index for stream in known), *(stream.group.index for stream in blocks))

    def statistics(self) -> Samples:
        """Statistics of the current network."""
        fit = self._calibrate(self.fit, "fit")
        self.seen = self.seen or fit.by_channel(self.working.layers)
        return Samples(
            fit=fit,
            held=self._calibrate(self.held_out, "held-out"),
            feeds=self.held_out_feeds,
            reference=self.softened,
            heads=self.heads,
        )

    def _calibrate(self, data: CalibrationData, what: str) -> PatchStatistics:
        unmasked, patches = unfolded(self.working.partition.light(), self.working.layers, self.working.partition.shapes)
        model = self.working.masked(unmasked)
        outer = [layer for layer in self.working.layers if layer.node < self.working.partition.count]
        factors = [layer for product in products(self.working) for layer in product.watched]
        layers = [patches.get(layer.node, layer) for layer in outer] + factors + watched(self.heads, self.working)
        return PatchStatistics(
            calibrate(
                model,
                layers,
                data,
                self.options,
                sha=self.analysis.sha256,
                positions=_POSITIONS,
                progress=self.progress,
                stage=f"statistics ({what})",
                crew=self.crew,
            ),
            patches,
        )

    def written(self) -> onnx.ModelProto:
        """The current network cut to size."""
        return apply(self.working.model, self.analysis.structure, self.working.removed())

    def belief(self, network: MaskedNetwork) -> Belief:
        """A network as an expectation to check the written file against."""
        crew = HERE if self.original.partition.shares_weights else self.crew
        return Belief(network.copy(), self.held_out_feeds, self.reference, self.options, crew=crew)

    def divergence(self) -> Divergence:
        """Distance of the current network from the original, on the held-out set."""
        return self.reference.compare(self._outputs_of(self.working))

    def _outputs_of(self, network: MaskedNetwork) -> list[Feed]:
        """Outputs of a network on the held-out set."""
        executor = PartialExecutor(network.partition, self.held_out_feeds, self.options)
        return list(finished_by(self.crew, executor, range(len(executor.states))))

    def cut(self, units: IntArray, samples: Samples, ridges: Mapping[int, float]) -> None:
        """Remove units and let their consumers compensate."""
        working = self.working
        before = {layer.node: alive_channels(working, layer) for layer in working.layers}
        working.alive[units] = False
        for layer in working.layers:
            now = alive_channels(working, layer)
            removed = before[layer.node] & ~now
            if not removed.any() or not working.is_open(layer):
                continue
            known = layer.node in ridges or layer.groups > 1
            moments = samples.fit.moments(layer) if known else None
            ridge = ridges.get(layer.node, _GROUP_RIDGE)
            working.set_weights(layer, *merge_channels(working.weights(layer), moments, ridge, now, removed))

    def refine(self) -> Refined:
        """One pass of layer-by-layer least squares."""
        return self._refiner(self.working).run(self.progress)

    @single_threaded
    def finished(self) -> MaskedNetwork:
        """The current network; if samples are few, with steps of its last refinement repeated on all of them.

        Which layers are fitted, and how, was chosen on the held-out samples, and that choice stays. They have nothing
        further to judge. Where a fit could use more samples, these make it better.
        """
        scarce = [step for step in self.steps.values() if step.scarce]
        if self.synthetic or not self.few or not scarce:
            return self.working
        network = self.working.copy()
        self._refiner(network).repeat(self.steps, self.progress)
        outputs = self._outputs_of(network)
        if not self.softened.compare(outputs).value < self.softened.compare(self._outputs_of(self.working)).value:
            return self.working
        log.info("%d layers fitted once more, on the held-out samples as well", len(scarce))
        return network

    def _refiner(self, working: MaskedNetwork) -> Refiner:
        most = self.settings.refine_samples_for(float(self.analysis.cost.original()[0]))
        return Refiner(
            original=self.original,
            working=working,
            samples=RefineSet(self.fit.take(most).batches(), self.held_out_feeds, self.softened),
            options=self.options,
            seed=self.settings.seed,
            crew=self.crew,
            shared=self._shared_for_refinement(),
        )

    def start(self, limits: Limits, preference: Preference | None = None) -> PruningState:
        """An empty selection."""
        context = PruningContext.of(self.analysis.model, self.analysis.structure, self.analysis.cost)
        return PruningState(context, limits, preference)

    @single_threaded
    def round(self, state: PruningState, budget: Budget, limits: Limits, fallback: FloatArray, name: str) -> None:
        """Cut down to a budget and compensate for it.

        Args:
            state: The selection so far; this round extends it.
            budget: The budget that must hold after this round.
            limits: Units that may not be cut.
            fallback: float64 [units], order for units without statistics.
            name: Name of the round, for progress.
        """
        samples = self.statistics()
        ridges = choose_ridges(self.working, samples, self.crew)
        alternatives = self._selector(state, samples, ridges, budget, limits, fallback, name).alternatives()
        if len(alternatives) > 1:
            state.assign(self._best(alternatives, samples, ridges, name).state)
        else:
            self.recover_cut(alternatives[0].units, samples, ridges, name)
            state.assign(alternatives[0].state)

    def _best(
        self, alternatives: Sequence[Alternative], samples: Samples, ridges: Mapping[int, float], name: str
    ) -> Alternative:
        """Carry out each on a copy of the current network, and keep the one that ends closest to the original."""
        start, begun, ends = self.working, len(self.way), list[_End]()
        for one in alternatives:
            self.working = start.copy()
            found = self.recover_cut(one.units, samples, ridges, f"{name}, {one.way}" if one.way else name)
            divergence = (found or self.divergence()).value
            end = _End(
                divergence=divergence, alternative=one, network=self.working, steps=self.steps, way=self.way[begun:]
            )
            ends.append(end)
            del self.way[begun:]
        best = min(ends, key=lambda end: end.divergence)
        self.working, self.steps = best.network, best.steps
        self.way.extend(best.way)
        if best.alternative.way:
            log.info("%s: the selection %s is kept", name, best.alternative.way)
        return best.alternative

    @single_threaded
    def recover_cut(
        self, units: IntArray, samples: Samples, ridges: Mapping[int, float], name: str
    ) -> Divergence | None:
        """Cut the chosen units, compensate, and refine; the divergence after that, if layers were refined."""
        self.steps, found = {}, None
        self.settings.method.compensate(self, units, samples, ridges, name)
        for _ in range(self.settings.refine):
            refined = self.refine()
            self.steps, found = refined.steps, self.divergence()
            self.note(f"{name}: {len(refined.steps)} of {refined.tried} layers refined", found)
        return found

    def measured_quality(self) -> dict[str, float]:
        """Divergence and, for classifiers, top-1 agreement on the held-out set."""
        divergence = self.divergence()
        quality = {"divergence": divergence.value}
        if divergence.agreement is not None:
            quality[self.reference.agreement_name] = divergence.agreement
        return quality

    def note(self, what: str, divergence: Divergence, level: int = logging.INFO) -> None:
        """Log a step with the divergence after it."""
        agreement = "" if divergence.agreement is None else f", agreement {divergence.agreement:.1%}"
        cost, removed = self.analysis.cost, self.working.removed()
        macs = float(cost.of_units(removed)[0] / max(cost.original()[0], 1.0))
        time = None if cost.times is None else cost.times.fraction(cost.kept_counts(removed))
        self.way.append(Waypoint(what, macs, divergence.value, divergence.agreement, time=time))
        log.log(level, "%s: divergence %.4g%s", what, divergence.value, agreement)

    def _shared_original(self) -> Shared[MaskedNetwork]:
        return self.crew.share(self.original, keep=True)

    def _shared_held(self) -> Shared[HeldOut]:
        if self._held is None:
            self._held = self.crew.share(HeldOut(self.held_out_feeds, self.softened))
        return self._held

    def _shared_for_refinement(self) -> tuple[Shared[MaskedNetwork], Shared[HeldOut]] | None:
        """What refinement shares with workers, if they keep batches, and take less time than sending them."""
        macs = float(self.analysis.cost.original()[0]) * self.held_out.count
        if not self.crew.keeps or self.original.partition.shares_weights or macs < FEWEST_MACS:
            return None
        return self._shared_original(), self._shared_held()

    def _selector(
        self, state: PruningState, samples: Samples, ridges: Mapping[int, float], budget: Budget, limits: Limits,
        fallback: FloatArray, name: str,
    ) -> CurveSearch:  # fmt: skip
        measured = partial(
            measure_curves, self.working, samples, limits, fallback, self.options, ridges,
            cache=NetworkCache(self.crew, self._shared_original(), self._shared_held()), may_go=state.may_empty,
            progress=self.progress, stage=f"curves, {name}",
        )  # fmt: skip
        return CurveSearch(
            measure=lambda requests, known: measured(requests=requests, known=known),
            state=state, budget=budget, group_of=self.analysis.structure.group_of,
            passes=self.settings.curve_passes, sharper=self.settings.sharper_passes, several="latency" in budget.bounds,
        )  # fmt: skip
