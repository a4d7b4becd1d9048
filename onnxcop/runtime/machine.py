"""The machine that times were measured on: processor, ONNX Runtime, provider, threads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from onnxcop.runtime import kernel_times
from onnxcop.runtime.session import EngineOptions, resolve_provider


@dataclass(frozen=True, slots=True)
class Machine:
    """Machine of a measurement.

    Attributes:
        processor: Name of the processor, with the instruction sets that select its kernels; with devices for providers
            other than the CPU.
        runtime: Version of ONNX Runtime.
        provider: The first execution provider.
        threads: Threads of one operator, None for ONNX Runtime's own choice.
    """

    processor: str
    runtime: str
    provider: str
    threads: int | None

    @classmethod
    def of(cls, options: EngineOptions) -> Machine:
        """This machine, with a provider and its threads.

        Raises:
            EngineError: The provider cannot be used.
        """
        return cls(**kernel_times.machine(resolve_provider(options.provider)[0], options.threads))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
