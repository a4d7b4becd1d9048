"""What a measurement of time depends on, besides the model: processor, ONNX Runtime, provider, threads."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from onnxcop.runtime.session import EngineOptions, resolve_provider

_KERNELS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")  # sets that kernels are for


@dataclass(frozen=True, slots=True)
class Machine:
    """Where times were measured.

    Attributes:
        processor: Name of the processor, with the instruction sets that kernels are chosen by; for other
            providers than the CPU also the devices.
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
        import onnxruntime

        provider = resolve_provider(options.provider)[0]
        processor = _processor() if provider == "CPUExecutionProvider" else f"{_processor()}, {_devices()}"
        return cls(processor, onnxruntime.__version__, provider, options.threads)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def differences(self, other: Machine) -> list[str]:
        """What differs from another machine, as "what: this, not that"."""
        mine, its = self.to_dict(), other.to_dict()
        return [f"{name}: {mine[name]}, not {its[name]}" for name in mine if mine[name] != its[name]]


@cache
def _processor() -> str:
    name, flags = platform.processor() or platform.machine(), ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = [line.partition(":")[::2] for line in file]
    except OSError:
        return name
    found = {key.strip().lower(): value.strip() for key, value in lines if value.strip()}
    flags = f" {found.get('flags', found.get('features', ''))} "
    sets = [one for one in _KERNELS if f" {one} " in flags]
    return " ".join([found.get("model name") or name, *sets])


@cache
def _devices() -> str:
    import onnxruntime

    try:
        devices = {entry.device for entry in onnxruntime.get_ep_devices()}
        return ", ".join(sorted({f"{one.vendor} {one.device_id:#x}" for one in devices if "GPU" in str(one.type)}))
    except Exception:  # older releases know of no devices
        return "unknown device"
