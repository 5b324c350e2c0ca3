"""Launch configurations as a value: tuned once, kept as JSON, and passed to whoever launches the kernels.

Nothing here is global. An operator whose shape is not in the mapping runs with the shipped configuration.
Requires the package `triton`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType, UnionType
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch

from magc_kernels.conv._config import ConvConfig, conv_config
from magc_kernels.norm._config import NormConfig, norm_config
from magc_kernels.selective_scan._config import SelectiveScanConfig, selective_scan_config
from magc_kernels.ssd._config import SSDConfig, ssd_config

FORMAT = 1
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class SSDShape:
    """What chooses the scan's configuration; `dtype` is that of `x`, `B` and `C`."""

    dtype: torch.dtype
    headdim: int
    d_state: int


@dataclass(frozen=True)
class ConvShape:
    """What chooses the convolution's configuration."""

    dtype: torch.dtype
    width: int


@dataclass(frozen=True)
class NormShape:
    """What chooses a norm's configuration: the type of its output and the features normalised together."""

    dtype: torch.dtype
    group_size: int


@dataclass(frozen=True)
class SelectiveScanShape:
    """What chooses the selective scan's configuration; `dtype` is that of `x`."""

    dtype: torch.dtype
    d_state: int


Shape = SSDShape | ConvShape | NormShape | SelectiveScanShape
Config = SSDConfig | ConvConfig | NormConfig | SelectiveScanConfig
Capability = tuple[int, int]


class _Kind(NamedTuple):
    """What belongs to one operator."""

    shape: Callable[..., Shape]
    config: Callable[..., Config]
    choose: Callable[..., Config]
    """From a shape, `capability=` and `config=` to the configuration that runs."""


_KINDS = {
    "ssd": _Kind(SSDShape, SSDConfig, lambda s, **given: ssd_config(s.dtype, s.headdim, s.d_state, None, **given)),
    "conv": _Kind(ConvShape, ConvConfig, lambda s, **given: conv_config(s.dtype, s.width, **given)),
    "norm": _Kind(NormShape, NormConfig, lambda s, **given: norm_config(s.dtype, s.group_size, **given)),
    "selective_scan": _Kind(
        SelectiveScanShape, SelectiveScanConfig, lambda s, **given: selective_scan_config(s.d_state, **given)
    ),
}
"""By the operator's name, also that of its mapping in `KernelConfigs`."""


def operator_of(shape: Shape) -> str:
    """Name of the operator that a class of shapes is for; TypeError if it is none."""
    for name, kind in _KINDS.items():
        if type(shape) is kind.shape:
            return name
    raise TypeError(f"{shape!r} is no class of shapes of an operator")


def shipped_config(shape: Shape, capability: Capability | None) -> Config:
    """What an operator runs with if it is given no configuration, on a device of this compute capability."""
    return _KINDS[operator_of(shape)].choose(shape, capability=capability)


def check_config(shape: Shape, config: Config) -> None:
    """Raise ValueError or TypeError, naming the reason, unless the kernels can run `config` for `shape`."""
    kind = _KINDS[operator_of(shape)]
    if type(config) is not kind.config:
        raise TypeError(f"a {type(config).__name__} does not configure a {type(shape).__name__}")
    kind.choose(shape, config=config)


@dataclass(frozen=True)
class KernelConfigs:
    """Configurations by shape; a shape that is missing means the shipped one.

    Raises:
        ValueError, TypeError: a configuration that the kernels cannot run for its shape.
    """

    ssd: Mapping[SSDShape, SSDConfig] = field(default_factory=dict[SSDShape, SSDConfig])
    conv: Mapping[ConvShape, ConvConfig] = field(default_factory=dict[ConvShape, ConvConfig])
    norm: Mapping[NormShape, NormConfig] = field(default_factory=dict[NormShape, NormConfig])
    selective_scan: Mapping[SelectiveScanShape, SelectiveScanConfig] = field(
        default_factory=dict[SelectiveScanShape, SelectiveScanConfig]
    )
    gpu: str | None = None
    """Name of the device that they were tuned on."""
    triton: str | None = None
    """Version of Triton that they were tuned with."""

    def __post_init__(self) -> None:
        for name in _KINDS:
            mapping = dict(getattr(self, name))
            for shape, config in mapping.items():
                if operator_of(shape) != name:
                    raise TypeError(f"a {type(shape).__name__} is no shape of {name}")
                check_config(shape, config)
            object.__setattr__(self, name, MappingProxyType(mapping))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled with the layers that hold it, which the read-only mappings alone are not."""
        values = [getattr(self, f.name) for f in fields(self)]
        return type(self), tuple(dict(v) if isinstance(v, MappingProxyType) else v for v in values)

    def to_json(self) -> str:
        """Text that `from_json` reads."""
        entries = [
            {"operator": name, "shape": {**asdict(shape), "dtype": _name(shape.dtype)}, "config": asdict(config)}
            for name in _KINDS
            for shape, config in getattr(self, name).items()
        ]
        return json.dumps({"format": FORMAT, "gpu": self.gpu, "triton": self.triton, "entries": entries}, indent=1)

    @staticmethod
    def from_json(text: str) -> KernelConfigs:
        """What `to_json` wrote.

        Raises:
            ValueError: the text is no such JSON, of another format, or holds a configuration that the kernels
                cannot run; the message says where.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from error
        _keys("the file", data, {"format", "gpu", "triton", "entries"})
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r} is not the known one, {FORMAT}")
        for key in ("gpu", "triton"):
            if not isinstance(data[key], str | None):
                raise ValueError(f"{key} must be text or null, got {data[key]!r}")
        if not isinstance(data["entries"], list):
            raise ValueError("entries must be a list")
        mappings: dict[str, dict[Any, Any]] = {name: {} for name in _KINDS}
        for number, entry in enumerate(data["entries"]):
            where = f"entry {number}"
            _keys(where, entry, {"operator", "shape", "config"})
            if entry["operator"] not in _KINDS:
                raise ValueError(f"{where}: operator {entry['operator']!r} is none of {', '.join(_KINDS)}")
            kind = _KINDS[entry["operator"]]
            shape = _read(f"{where}, shape", kind.shape, entry["shape"])
            config = _read(f"{where}, config", kind.config, entry["config"])
            if shape in mappings[entry["operator"]]:
                raise ValueError(f"{where}: {shape} came before")
            try:
                check_config(shape, config)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {error}") from error
            mappings[entry["operator"]][shape] = config
        return KernelConfigs(**mappings, gpu=data["gpu"], triton=data["triton"])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _keys(where: str, data: object, expected: set[str]) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object, got {type(data).__name__}")
    if wrong := data.keys() ^ expected:
        raise ValueError(f"{where}: missing or unknown: {', '.join(sorted(map(str, wrong)))}")


def _read(where: str, kind: Callable[..., _Record], data: Any) -> _Record:
    """A dataclass of integers, texts, types of numbers and further such dataclasses."""
    hints = get_type_hints(kind)
    names = {f.name for f in fields(kind)}  # pyright: ignore[reportArgumentType]
    _keys(where, data, names)
    values: dict[str, Any] = {}
    for name in names:
        hint, value = hints[name], data[name]
        if hint is torch.dtype:
            if value not in _DTYPES:
                raise ValueError(f"{where}: {name} must be one of {', '.join(_DTYPES)}, got {value!r}")
            values[name] = _DTYPES[value]
        elif isinstance(hint, type) and hint not in (int, str):
            values[name] = _read(f"{where}, {name}", hint, value)
        elif isinstance(value, bool) or not isinstance(value, hint):
            wanted = hint if isinstance(hint, UnionType) else hint.__name__
            raise ValueError(f"{where}: {name} must be of type {wanted}, got {value!r}")
        else:
            values[name] = value
    return kind(**values)
