"""The machine that times were measured on: processor, ONNX Runtime, provider, threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from onnxcop.runtime import kernel_times
from onnxcop.runtime.session import EngineOptions, providers_of


@dataclass(frozen=True, slots=True)
class Machine:
    """Machine of a measurement.

    Attributes:
        processor: Name of the processor, with the instruction sets that select its kernels; with devices for providers
            other than the CPU.
        runtime: Version of ONNX Runtime.
        provider: The first execution provider.
        threads: Threads of one operator, None for ONNX Runtime's own choice.
        settings: Settings of the provider, by ONNX Runtime's keys.
    """

    processor: str
    runtime: str
    provider: str
    threads: int | None
    settings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, options: EngineOptions) -> Machine:
        """This machine, with a provider and its threads.

        Raises:
            EngineError: The provider cannot be used.
        """
        return cls(**kernel_times.machine(providers_of(options)[0], options.threads))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
