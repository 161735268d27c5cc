"""What has been computed already is not computed again."""

from __future__ import annotations

import torch
from torch import nn

import fxsight
from fxsight.passes import UseKnown
from fxsight.passes.use_known import fingerprints
from fxsight.testing import listing, program_of

PROGRAM = """
    x: 'input 0'                            # f32[batch, 8]
    relu = aten.relu.default(x)             # f32[batch, 8]
    neg = aten.neg.default(relu)            # f32[batch, 8]
    return (neg,)
"""


def test_a_known_value_is_a_constant() -> None:
    program = program_of(PROGRAM)
    known = UseKnown((fingerprints(program.graph)["relu"],), first=3)
    done = known(program)
    assert done.nodes["known_3"].meta["binding"] == fxsight.node.Binding("constant", 3)
    assert "neg = aten.neg.default(known_3)" in listing(done)


def test_fingerprints_say_what_is_computed_and_not_how_it_is_named() -> None:
    renamed = PROGRAM.replace("relu =", "r =").replace("default(relu)", "default(r)")
    a, b = (list(fingerprints(program_of(p).graph).values()) for p in (PROGRAM, renamed))
    assert a == b and len(set(a)) == 2


def test_memory_that_is_changed_is_not_known() -> None:
    program = program_of("""
        x: 'input 0'                            # f32[batch, 8]
        copy = aten.clone.default(x)            # f32[batch, 8]
        zero = aten.zero_.default(copy)         # f32[batch, 8]  {shares='copy'}
        return (copy,)
    """)
    assert fingerprints(program.graph) == {}


def test_a_body_that_asks_for_numbers_runs_nothing_twice() -> None:
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]).requires_grad_(False)
    model, x = fxsight.Model(net, cache=False), torch.randn(2, 4)
    with model.trace(x) as tracer:
        first = model[1].output
        if first.sum() > -1e9:
            model[2].output[:, 0] = 0
        out = model.output.save()
    assert sum("linear" in name for name in tracer.program.program.nodes) == 2
    hidden = net[2](net[1](net[0](x)))
    hidden[:, 0] = 0
    assert torch.equal(out, net[3](hidden))
