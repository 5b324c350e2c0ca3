"""Configuration of a Video-Ma²mba model, and its form in `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self, TypeVar

from magc.errors import InputError
from magc.nn import Mamba2Config
from video_ma2mba.data.chat import ChatSchema
from video_ma2mba.data.transform import Fit, FrameTransform
from video_ma2mba.errors import ConfigError

VisionKind = Literal["clip", "siglip"]
MODEL_TYPE = "video_ma2mba"
AUTHORS_MODEL_TYPES = ("llava_mamba", "mamba2")
"""Those of the authors' own checkpoints (`model/authors.py`)."""

# Those of openai/clip-vit-large-patch14-336 and google/siglip-so400m-patch14-384, where they differ from the defaults of
# transformers' configurations.
_CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_SIGLIP_SO400M_384 = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
_MEAN_STD: dict[VisionKind, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_NAMED = {"0.7B": ("mamba2-370m", True), "1.8B": ("mamba2-1.3b", False), "3.1B": ("mamba2-2.7b", False)}


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and what is made of its features.

    Attributes:
        kind: "clip" or "siglip".
        tower: fields of transformers' `CLIPVisionConfig` or `SiglipVisionConfig`.
        layer: which hidden state gives the features; -1 is the last layer's, -2 the one's before.
        pool: patches per side that become one token.
        fit: how frames become square.
        mean, std: of each colour, for pixels from 0 to 1.
    """

    kind: VisionKind = "clip"
    tower: Mapping[str, Any] = field(default_factory=lambda: dict(_CLIP_L_336))
    layer: int = -2
    pool: int = 2
    fit: Fit = "crop"
    mean: tuple[float, ...] = _MEAN_STD["clip"][0]
    std: tuple[float, ...] = _MEAN_STD["clip"][1]

    def __post_init__(self) -> None:
        if self.kind not in _MEAN_STD:
            raise ConfigError(f"vision.kind={self.kind!r}: choose one of {', '.join(_MEAN_STD)}")
        if missing := {"image_size", "patch_size", "num_hidden_layers", "hidden_size"} - set(self.tower):
            raise ConfigError(f"vision.tower lacks {', '.join(sorted(missing))}")
        if self.image_size % self.patch_size and self.kind == "clip":
            raise ConfigError(f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}")
        if not -self.tower["num_hidden_layers"] <= self.layer <= -1:
            raise ConfigError(f"vision.layer={self.layer}: choose -1 to -{self.tower['num_hidden_layers']}")
        if self.pool < 1:
            raise ConfigError(f"vision.pool={self.pool} must be at least 1")

    @classmethod
    def clip_l_336(cls) -> Self:
        """The paper's: CLIP-ViT-L/14 at 336 pixels, penultimate layer, 24 x 24 patches pooled to 12 x 12."""
        return cls()

    @classmethod
    def siglip_so400m_384(cls) -> Self:
        """SigLIP-so400m/14 at 384 pixels, which the authors' later code uses: 27 x 27 patches pooled to 14 x 14."""
        return cls.of("siglip", _SIGLIP_SO400M_384)

    @classmethod
    def of(cls, kind: VisionKind, tower: Mapping[str, Any]) -> Self:
        """A tower of some kind, with the pixels' mean, deviation and fit of that kind."""
        if kind not in _MEAN_STD:
            raise ConfigError(f"{kind!r} is no kind of vision tower; choose one of {', '.join(_MEAN_STD)}")
        mean, std = _MEAN_STD[kind]
        return cls(kind, dict(tower), fit="crop" if kind == "clip" else "stretch", mean=mean, std=std)

    @property
    def image_size(self) -> int:
        """Side of a frame in pixels."""
        return int(self.tower["image_size"])

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.tower["patch_size"])

    @property
    def width(self) -> int:
        """Size of a feature."""
        return int(self.tower["hidden_size"])

    @property
    def side(self) -> int:
        """Patches of a frame's side, before pooling."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a frame."""
        return (-(-self.side // self.pool)) ** 2

    @property
    def transform(self) -> FrameTransform:
        """Makes frames of any size the tower's."""
        return FrameTransform(self.image_size, self.fit)


@dataclass(frozen=True)
class VideoMa2mbaConfig:
    """A whole model.

    Attributes:
        language: the language model.
        vision: the vision tower.
        chat: the text around frames, questions and answers.
        fps: frames a second that it is trained on.
    """

    language: Mamba2Config
    vision: VisionConfig = field(default_factory=VisionConfig)
    chat: ChatSchema = field(default_factory=ChatSchema)
    fps: float = 1.0

    @classmethod
    def named(cls, size: str) -> Self:
        """One of the paper's sizes, "0.7B", "1.8B" or "3.1B".

        The head of the larger two has a weight of its own: only so do the published sizes come out.

        Raises:
            ConfigError: there is no such size.
        """
        if size not in _NAMED:
            raise ConfigError(f"no model is named {size!r}; choose one of {', '.join(_NAMED)}")
        name, tied = _NAMED[size]
        return cls(replace(Mamba2Config.named(name), tie_embeddings=tied))

    def to_json(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        return {
            "model_type": MODEL_TYPE,
            "language": self.language.to_mamba_ssm(),
            "vision": {**asdict(self.vision), "tower": dict(self.vision.tower)},
            "chat": asdict(self.chat),
            "fps": self.fps,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the contents of `config.json`.

        Raises:
            ConfigError: it is of another kind of model, or has missing, unknown or wrong entries.
        """
        if data.get("model_type") != MODEL_TYPE:
            kind = data.get("model_type")
            hint = ""
            if kind in AUTHORS_MODEL_TYPES:
                hint = "; load the authors' checkpoints with model.authors.load_authors, and save them with save_pretrained"
            raise ConfigError(f"model_type must be {MODEL_TYPE!r}, got {kind!r}{hint}")
        try:
            vision = dict(data["vision"])
            for name in ("mean", "std"):
                vision[name] = tuple(float(value) for value in vision[name])
            return cls(
                Mamba2Config.from_mamba_ssm(data["language"]),
                _made(VisionConfig, vision),
                _made(ChatSchema, data["chat"]),
                float(data["fps"]),
            )
        except (KeyError, TypeError, InputError) as error:
            raise ConfigError(f"the configuration of a {MODEL_TYPE} model is incomplete or wrong: {error!r}") from error


T = TypeVar("T", VisionConfig, ChatSchema)


def _made(kind: type[T], values: Mapping[str, Any]) -> T:
    known = {each.name for each in fields(kind)}
    if unknown := set(values) - known:
        raise ConfigError(f"{kind.__name__} has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    return kind(**values)
