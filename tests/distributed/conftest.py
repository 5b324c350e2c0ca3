"""Two ranks for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def _kept() -> Iterator[list[Ranks]]:
    kept: list[Ranks] = []
    yield kept
    for ranks in kept:
        ranks.close()


@pytest.fixture
def ranks(_kept: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Two ranks; new ones after a test that broke them."""
    if not _kept or _kept[-1].broken:
        _kept.append(Ranks(tmp_path_factory.mktemp("ranks")))
    return _kept[-1]
