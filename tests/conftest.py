"""What holds for every test: one thread, no network, a cache folder of its own.

pytest loads this file before it collects from any of the test paths, so it holds for doctests, too.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

# Before torch, transformers or numpy are imported: they read these once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_CBWR"] = "COMPATIBLE"  # on some processors MKL rounds by where in memory a matrix begins
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_configure(config: pytest.Config) -> None:
    folder = tempfile.TemporaryDirectory(prefix="fxsight-tests-")
    os.environ["FXSIGHT_CACHE_DIR"] = folder.name
    config.add_cleanup(folder.cleanup)


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """The fxsight cache folder of this test run; each xdist worker has its own."""
    return Path(os.environ["FXSIGHT_CACHE_DIR"])


@pytest.fixture(scope="module")
def module() -> Any:
    """The small model of the tests of generation."""
    from tests.generating import gpt2

    return gpt2()


@pytest.fixture(scope="module")
def model(module: Any) -> Any:
    """The same, to be traced."""
    from fxsight import LanguageModel

    return LanguageModel(module)
