"""A sample of the architectures of ``docs/coverage.md``; the whole is ``python -m tests.coverage``."""

from __future__ import annotations

import warnings

import pytest

from tests.coverage.probe import probe
from tests.coverage.table import table

FAST = ("gpt2", "llama", "mistral")
SAMPLE = (
    *FAST,
    *("bert", "bloom", "cohere", "falcon", "gemma2", "gemma3_text", "gpt_neox", "gpt_bigcode", "mamba", "mixtral"),
    *("mpt", "olmo2", "olmoe", "opt", "phi", "qwen3", "qwen3_5_text", "starcoder2"),  # qwen3_5 asks of exports
)


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in SAMPLE])
def test_reads_and_writes_equal_hooks_bit_for_bit(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of transformers about small configs
        report = probe(kind)
    assert not report["fails"], report
    assert report["blocks"] == report["mixers"] == 2


def test_pieces_of_a_run_make_one_page() -> None:
    done = {"blocks": 2, "mixers": 2, "operations": 2, "seconds": 1.5, "captures": 1, "fails": "", "cause": ""}
    page = table([{**done, "kind": "gpt2"}, {**done, "kind": "zaya", "fails": "config", "cause": "ValueError: no"}])
    assert "**1 of 2 work.** Of the others, 1 could not" in page
    page = table(
        [{**done, "kind": "zaya", "captures": 2}, {**done, "kind": "mamba", "fails": "capture", "cause": "no"}], page
    )
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| gpt2 | 2 | 2 | 2 | 1.5 s | works |",
        "| mamba | 2 | 2 | 2 | 1.5 s | capture: no |",
        "| zaya | 2 | 2 | 2 | 1.5 s | works, again |",
    ]
    assert "**2 of 3 work.** Of the others, 0 could not" in page and "1 cannot be captured" in page
