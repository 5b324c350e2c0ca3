"""The Python snippets of README.md and docs/ run as they are printed.

A snippet under the comment ``<!-- needs a GPU -->`` runs where there is one.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^(<!-- needs a GPU -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> list[str]:
    """What of the page's Python can run here, with empty lines in front so that line numbers are the page's."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in _FENCE.finditer(text) if match[1] is None or torch.cuda.is_available()]
    return ["\n" * text.count("\n", 0, match.start(2)) + match[2] for match in found]


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    """What the snippets are run as: a module, since classes of a page may be pickled."""
    made = types.ModuleType("magc_page")
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_snippets_run(page: Path, module: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, each going on from the one before, in an empty folder."""
    text = page.read_text(encoding="utf-8")
    for package in ("transformers", "accelerate", "lightning"):
        if package in text:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    for snippet in snippets(page):
        exec(compile(snippet, str(page), "exec"), vars(module))


def test_there_are_snippets() -> None:
    assert sum(len(snippets(page)) for page in PAGES) >= 2
