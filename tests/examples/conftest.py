"""The example is run from its own folder, so its tests put that folder on the path; they need the `video` extra."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "video_ma2mba"
NEEDED = ("av", "jsonargparse", "safetensors", "tokenizers", "tqdm", "transformers")

sys.path.insert(0, str(EXAMPLE))

_missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]


class _Skipped(pytest.Module):
    """A test file that cannot be imported without the extra."""

    def collect(self) -> list[pytest.Item]:
        """Nothing but the reason."""
        pytest.skip(f"needs {', '.join(_missing)}: pip install 'magc[video]'", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip the test files of this folder, and say why, where the extra is not installed."""
    return _Skipped.from_parent(parent, path=module_path) if _missing else None
