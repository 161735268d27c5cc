"""A sample of the architectures of ``docs/coverage.md``; the whole is ``python -m tests.coverage``."""

from __future__ import annotations

import warnings

import pytest

from tests.coverage.probe import probe

FAST = ("gpt2", "llama", "mistral")
SAMPLE = (
    *FAST,
    *("bert", "bloom", "cohere", "falcon", "gemma2", "gemma3_text", "gpt_neox", "gpt_bigcode", "mamba", "mixtral"),
    *("mpt", "olmo2", "olmoe", "opt", "phi", "qwen3", "starcoder2"),
)


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in SAMPLE])
def test_reads_and_writes_equal_hooks_bit_for_bit(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of transformers about small configs
        report = probe(kind)
    assert not report["fails"], report
    assert report["blocks"] == report["mixers"] == 2
