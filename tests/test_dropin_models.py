"""``edited.compile()`` in code of others: pipelines, evaluation loops and the Trainer of transformers."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from fxsight import Model

WORDS = ["[PAD]", "[UNK]", "the", "cat", "sat", "on", "mat", "dog", "ran", "far", "good", "bad"]
VECTOR = torch.linspace(-4, 4, 16)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[PAD]")


def _writer() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(WORDS), "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    net = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    net.eval().requires_grad_(False)
    return net


def _judge() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32}
    config = BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)
    net = BertForSequenceClassification(config)
    net.eval().requires_grad_(False)
    return net


@contextmanager
def _hook(block: nn.Module) -> Generator[None]:
    handle = block.register_forward_hook(lambda m, args, out: out + VECTOR)
    try:
        yield
    finally:
        handle.remove()


def _steered_judge(net: Any, tokenizer: Any) -> Any:
    model = Model(net, cache=False)
    given = dict(tokenizer(["the cat sat", "dog ran"], padding=True, return_tensors="pt"))
    with model.edit(**given) as edited:
        model.bert.encoder.layer[0].output[:] += VECTOR
    return edited.compile(backend="eager")


def test_text_classification() -> None:
    net, tokenizer = _judge(), _tokenizer()
    module = _steered_judge(net, tokenizer)
    texts = ["the cat sat on the mat", "dog ran far", "good"]
    ask = pipeline("text-classification", model=module, tokenizer=tokenizer, device="cpu")
    got = [ask(texts, top_k=None), ask(texts, top_k=None, batch_size=3)]
    bare = pipeline("text-classification", model=net, tokenizer=tokenizer, device="cpu")
    plain = bare(texts, top_k=None)
    with _hook(net.bert.encoder.layer[0]):
        assert got == [bare(texts, top_k=None), bare(texts, top_k=None, batch_size=3)]
    assert got[0] != plain


def test_text_generation() -> None:
    net, tokenizer = _writer(), _tokenizer()
    model = Model(net, cache=False)
    with model.edit(torch.tensor([[2, 3, 4]])) as edited:
        model.transformer.h[1].output[:] += VECTOR
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "return_full_text": False}
    module = edited.compile(backend="eager")
    write = pipeline("text-generation", model=module, tokenizer=tokenizer, device="cpu")
    got = write(["the cat sat", "dog"], **options)
    bare = pipeline("text-generation", model=net, tokenizer=tokenizer, device="cpu")
    with _hook(net.transformer.h[1]):
        assert got == bare(["the cat sat", "dog"], **options)


def _examples(tokenizer: Any) -> list[dict[str, Tensor]]:
    texts = ["the cat sat", "dog ran far", "good cat ran", "bad mat far", "the dog sat"]
    return [
        {**{k: v[0] for k, v in tokenizer(t, return_tensors="pt").items()}, "labels": torch.tensor(i % 2)}
        for i, t in enumerate(texts)
    ]


def _loss(net: Any, examples: Any) -> float:
    total = 0.0
    with torch.no_grad():
        for batch in DataLoader(examples, batch_size=2):
            total += float(net(**batch).loss) * len(batch["labels"])
    return total / len(examples)


def test_an_evaluation_loop() -> None:
    net, tokenizer = _judge(), _tokenizer()
    module, examples = _steered_judge(net, tokenizer), _examples(tokenizer)
    got, plain = _loss(module, examples), _loss(net, examples)
    with _hook(net.bert.encoder.layer[0]):
        assert got == _loss(net, examples)
    assert got != plain
    module.eval().to(torch.float64)
    with _hook(net.bert.encoder.layer[0]):
        assert net.dtype == torch.float64 and next(iter(module.state_dict().values())).dtype == torch.float64


def test_trainer_evaluates(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    net, tokenizer = _judge(), _tokenizer()
    module, examples = _steered_judge(net, tokenizer), _examples(tokenizer)
    told = TrainingArguments(output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    got = Trainer(model=module, args=told, eval_dataset=examples).evaluate()["eval_loss"]
    with _hook(net.bert.encoder.layer[0]):
        assert got == pytest.approx(_loss(net, examples))
