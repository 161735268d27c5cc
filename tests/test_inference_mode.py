"""Under ``torch.inference_mode()`` a trace is as under ``torch.no_grad()``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxsight.model import Model
from tests import test_random_blocks, test_random_programs
from tests.oracle import Edit, Read, run
from tests.zoo import tiny_transformer, token_ids


def double(h: Tensor) -> None:
    h[:, 1] *= 2


DOUBLED = [Edit("blocks.1", "output", "inplace", double)]


@pytest.mark.filterwarnings("ignore::fxsight.errors.LostEditWarning")  # copies that nothing reads are edited, too
@pytest.mark.parametrize("check", [test_random_programs.check, test_random_blocks.check])
def test_random_bodies(check: Any) -> None:
    with torch.inference_mode():
        check(0, 8)


def test_what_is_learnt_in_one_mode_holds_in_the_other() -> None:
    net, ids = tiny_transformer(), token_ids(2, 5)
    model = Model(net, cache=False)
    right, _ = run(net, (ids,), {}, DOUBLED)
    for mode in (torch.inference_mode, torch.enable_grad, torch.inference_mode, torch.no_grad):
        with mode():
            with model.trace(ids):
                double(model.blocks[1].output)
                out = model.output.save()
            assert torch.equal(out, right) and out.is_inference() is (mode is torch.inference_mode)
            assert out.requires_grad is (mode is torch.enable_grad)


def test_tensors_of_the_user_that_were_made_in_it() -> None:
    net, ids = tiny_transformer(), token_ids(2, 5)
    model = Model(net, cache=False)
    _, (first,) = run(net, (ids,), {}, [Read("blocks.0", "output")])
    for make in (torch.no_grad, torch.inference_mode):
        with make():
            total, vector = torch.zeros(2, 5, 16), torch.ones(16)
        with torch.inference_mode(), model.trace(ids):
            total += model.blocks[0].output
            model.blocks[1].output.add_(vector)
            out = model.output.save()
        assert torch.equal(total, first)
        assert torch.equal(out, run(net, (ids,), {}, [Edit("blocks.1", "output", "inplace", lambda h: h.add_(1))])[0])
    refused = pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode")
    with refused, torch.no_grad(), model.trace(ids):
        total += model.blocks[0].output


def test_edits_that_stay() -> None:
    net, ids = tiny_transformer().requires_grad_(False), token_ids(2, 5)
    model = Model(net, cache=False)
    right, _ = run(net, (ids,), {}, DOUBLED)
    with torch.inference_mode():
        with model.edit(ids) as edited:
            double(model.blocks[1].output)
        assert torch.equal(edited(ids), right)
    assert torch.equal(edited(ids), right)


@pytest.mark.slow
def test_compiled() -> None:
    net, ids = tiny_transformer().requires_grad_(False), token_ids(2, 5)
    model = Model(net, cache=False)
    right, _ = run(net, (ids,), {}, DOUBLED)
    with torch.inference_mode(), model.trace(ids, backend="inductor"):
        double(model.blocks[1].output)
        out = model.output.save()
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-4)
