"""Which calls a method such as ``generate`` will make of its module: found by running it with nothing computed.

The method runs on a twin of the module whose forward answers with tensors of the right shapes and no meaning. So it is
known what each step is given before anything is generated: its program and its sizes. Nothing of the user's is called,
no random number is drawn, and an answer never ends the generation early.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from fxsight.access import Access
from fxsight.address import Address
from fxsight.captures import Captures
from fxsight.leave import Returned, pasts_after
from fxsight.node import binding_of
from fxsight.past import pasts_in, restore
from fxsight.program import Program
from fxsight.rows import Call
from fxsight.spec import TensorSpec, number
from fxsight.tree import Tree, flatten
from fxsight.twin import encoder_path, twin

OBSERVERS = ("streamer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
_NEVER = -1e9  # the logit of a token that would end the generation


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of one step: its program and sizes, and what its inputs are like.

    marks: the names of the sizes on which the values at a port depend, as far as asked; shared by steps of a program.
    returned: how what the module returns is built; None for what comes after the last call.
    like: an earlier step whose call has the same shape.
    """

    program: Program
    sizes: Mapping[str, int]
    tree: Tree
    kinds: tuple[Any, ...]
    marks: dict[tuple[Address, str], tuple[str, ...]]
    returned: Returned | None = None
    like: Known | None = None

    @cached_property
    def access(self) -> Access:
        """Reads the leaves of a call of this shape."""
        return Access(self.tree) if self.like is None else self.like.access

    def leaves(self, call: Call) -> list[Any] | None:
        """The leaves of a call; None where it is not as this step was rehearsed."""
        found = self.access(call)
        return None if found is None or kinds_of(found) != self.kinds else found


def rehearse(
    captures: Captures, method: str, call: Call
) -> tuple[list[Known], tuple[int, int] | None, str, Call | None]:
    """The steps that ``module.method(*args, **kwargs)`` makes, at most; shape and device of the ids that it returns;
    and what it calls the encoder with, if it does.

    No shape where it returns more than ids.

    Raises: what the method raises for these arguments; CaptureError.
    """
    args, kwargs = call
    kwargs = {name: value for name, value in kwargs.items() if name not in OBSERVERS}
    never = _ends(captures.module, kwargs)
    steps: list[Known] = []
    marks: dict[int, dict[tuple[Address, str], tuple[str, ...]]] = {}
    builders: dict[int, Returned] = {}
    shapes: dict[int, Known] = {}
    encoded: list[Call] = []

    def encode(*args: Any, **kwargs: Any) -> Any:
        encoded.append((args, kwargs))
        return captures.module.get_submodule(encoder_path(captures.module))(*args, **kwargs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        program, sizes = captures.find(args, kwargs)
        leaves, tree = flatten((args, kwargs))
        made = builders.setdefault(id(program), Returned(program))
        like = shapes.get(id(program))
        like = like if like is not None and like.tree == tree else None
        step = Known(program, sizes, tree, kinds_of(leaves), marks.setdefault(id(program), {}), made, like)
        steps.append(step)
        shapes[id(program)] = like or step
        return _answer(program, sizes, (args, kwargs), leaves, never, captures.weight)

    shown = captures.latest, captures.latest_sizes
    with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        returned = getattr(twin(captures.module, forward, encode), method)(*args, **kwargs)
    if shown[0] is not None:  # what browsing and edits look at is what was looked at before
        captures.latest, captures.latest_sizes = shown
    if not isinstance(returned, torch.Tensor):
        return steps, None, "", next(iter(encoded), None)
    return steps, (returned.shape[0], returned.shape[1]), str(returned.device), next(iter(encoded), None)


def kinds_of(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """What a program and its sizes depend on of inputs."""
    return tuple((x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else x for x in leaves)


def _ends(module: nn.Module, kwargs: Mapping[str, Any]) -> list[int]:
    """The tokens that end a generation."""
    places = (
        kwargs,
        vars(kwargs.get("generation_config") or object),
        vars(getattr(module, "generation_config", object)),
    )
    found = (place.get("eos_token_id") for place in places)
    return [int(i) for ids in found if ids is not None for i in torch.as_tensor(ids).reshape(-1)]


def _answer(
    program: Program,
    sizes: Mapping[str, int],
    call: Call,
    leaves: Sequence[Any],
    never: Sequence[int],
    weight: Callable[[str], torch.Tensor],
) -> Any:
    """What the module returns, in shape; the caches of the call are as large as it leaves them."""
    left = [_tensor(program.nodes[name], sizes, leaves) for name in program.book.left]
    for past, now in zip(pasts_in(call), pasts_after(program, sizes, left) if left else (), strict=False):
        restore(past, now)
    returned = Returned(program)
    output = program.book.calls[0].output.leaves
    made: list[Any] = []
    returned.save(lambda i: _collect(made, program.nodes[output[i].node]))  # type: ignore[union-attr]
    tensors = [_tensor(node, sizes, leaves) for node in made]
    answer = returned.build(tensors, call, sizes, weight)
    logits: Any = getattr(answer, "logits", None)
    for token in never if isinstance(logits, torch.Tensor) else ():
        if 0 <= token < logits.shape[-1]:
            logits[..., token] = _NEVER
    return answer


def _collect(made: list[fx.Node], node: fx.Node) -> fx.Node:
    made.append(node)
    return node


def _tensor(node: fx.Node, sizes: Mapping[str, int], leaves: Sequence[Any]) -> Any:
    if node.op == "placeholder" and binding_of(node).kind == "input":
        return leaves[int(binding_of(node).key)]  # changed in place
    spec = node.meta["spec"]
    if not isinstance(spec, TensorSpec):
        return number(spec.expr, sizes)
    return torch.zeros([number(d, sizes) for d in spec.shape], dtype=spec.dtype, device=spec.device)


@contextmanager
def quiet() -> Generator[None]:
    """What transformers has to say, it says when the generation runs."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("transformers")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.addFilter(_nothing)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False
