"""In-place edits mean what they mean in PyTorch: a matrix of views, methods and locations against plain hooks, bitwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight
from fxsight.errors import LostEditWarning
from tests.oracle import Edit, Port, Read, calls, run

WIDTH = 8
Change = Callable[[Any], Any]


class Attention(nn.Module):
    """One head; its queries, keys and values are views of one tensor. Returns the result and the pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        pattern = (q @ k.transpose(1, 2)).softmax(-1)
        return self.out(pattern @ v), pattern


class Block(nn.Module):
    """A residual block that shares memory wherever it can: a module that returns its input, in-place operators."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.keep = Attention(), nn.Identity()
        self.up, self.act, self.down = nn.Linear(WIDTH, 16), nn.ReLU(inplace=True), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))[0]
        mlp = self.down(self.act(self.up(self.keep(self.ln2(x)))))
        x += mlp
        return x


class Net(nn.Module):
    """Two blocks, the mean over positions of the last one, a readout of a transposed view, a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        x = self.twice(self.twice(x)) + x
        logits: Tensor = self.head(x.transpose(0, 1)).transpose(0, 1)
        return logits


@cache
def _net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@cache
def _model() -> fxsight.Model:
    return fxsight.Model(_net(), cache=False)


def _x() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


LOCATIONS: tuple[tuple[str, Port], ...] = (
    ("", "input"),
    ("first", "output"),
    ("blocks.0.ln1", "input"),
    ("blocks.0.ln1", "output"),
    ("blocks.0.attn.qkv", "output"),
    ("blocks.0.attn", "output"),
    ("blocks.0.ln2", "input"),
    ("blocks.0.keep", "input"),
    ("blocks.0.keep", "output"),
    ("blocks.0.act", "input"),
    ("blocks.0.act", "output"),
    ("blocks.0.down", "output"),
    ("blocks.0", "output"),
    ("blocks.1", "input"),
    (calls("twice", 1), "input"),
    (calls("twice", 1), "output"),
    ("head", "input"),
    ("", "output"),
)


def _set(tensor: Any, index: Any, value: Any) -> None:
    tensor[index] = value


def _imul(tensor: Any, value: Any) -> None:
    tensor *= value


def _view_imul(tensor: Any, value: Any) -> None:
    view = tensor[:, 1:]
    view *= value


def _view_of_view(tensor: Any) -> None:
    view = tensor[:, 1:]
    view[:, ::2].select(2, 1).mul_(3)
    view.add_(1)


def _two_views(tensor: Any) -> None:
    left, right = tensor[..., :2], tensor[..., 1:3]
    left.mul_(2)
    right.add_(left)


def _view_after_base(tensor: Any) -> None:
    view = tensor[:, 0]
    tensor.mul_(2)
    view.add_(tensor[:, 1])


def _copy_then_edit(tensor: Any) -> None:
    copied = tensor.transpose(0, 1).reshape(-1)
    copied.zero_()


def _detached(tensor: Any) -> None:
    tensor.detach().mul_(2)


EDITS: Mapping[str, Change] = {
    "x[:, 0] = 0": lambda x: _set(x, (slice(None), 0), 0),
    "x[:, ::2] = 1": lambda x: _set(x, (slice(None), slice(None, None, 2)), 1),
    "x[..., 1:-1:2] = x[..., :1]": lambda x: _set(x, (..., slice(1, -1, 2)), x[..., :1]),
    "x[None, :, 0] = 0": lambda x: _set(x, (None, slice(None), 0), 0),
    "x[x > 0] = 0": lambda x: _set(x, x > 0, 0),
    "x[:, [0, 2]] = 2": lambda x: _set(x, (slice(None), [0, 2]), 2),
    "x[torch.tensor([1])] = 2": lambda x: _set(x, torch.tensor([1]), 2),
    "x *= 2": lambda x: _imul(x, 2),
    "view *= 2": lambda x: _view_imul(x, 2),
    "x.zero_()": lambda x: x.zero_(),
    "x.mul_(2).add_(1)": lambda x: x.mul_(2).add_(1),
    "torch.relu_(x)": lambda x: torch.relu_(x),
    "torch.neg(x, out=x)": lambda x: torch.neg(x, out=x),
    "torch.add(x, 1, out=x)": lambda x: torch.add(x, 1, out=x),
    "F.relu(x, inplace=True)": lambda x: torch.nn.functional.relu(x, inplace=True),
    "nn.init.constant_(x, 2)": lambda x: nn.init.constant_(x, 2),
    "x.copy_(x.flip(1))": lambda x: x.copy_(x.flip(1)),
    "x.data.mul_(2)": lambda x: x.data.mul_(2),
    "x.detach().mul_(2)": _detached,
    "x.T-like": lambda x: _set(x.transpose(0, 1), 0, 0),
    "x.mT[:, 0] = 0": lambda x: _set(x.mT, (slice(None), 0), 0),
    "x.permute": lambda x: x.permute(2, 0, 1)[0].fill_(3),
    "x.movedim": lambda x: x.movedim(-1, 0)[1].fill_(3),
    "reshape, a view": lambda x: x.reshape(-1)[:3].zero_(),
    "reshape, a copy": _copy_then_edit,
    "flatten": lambda x: x.flatten(0, 1)[0].zero_(),
    "unflatten": lambda x: x.unflatten(0, (1, 2))[0, 0].zero_(),
    "x.view(-1)": lambda x: x.view(-1)[::3].neg_(),
    "x.view_as": lambda x: x.view_as(x).mul_(2),
    "chunk member": lambda x: x.chunk(2, -1)[1].mul_(2),
    "split member": lambda x: x.split(2, 1)[0].mul_(2),
    "unbind member": lambda x: x.unbind(0)[1].mul_(2),
    "torch.unbind, all": lambda x: [row.add_(number) for number, row in enumerate(torch.unbind(x, 1))],
    "iteration": lambda x: [row.add_(number) for number, row in enumerate(x)],
    "tensor_split": lambda x: torch.tensor_split(x, 2, 1)[1].zero_(),
    "diagonal": lambda x: x.diagonal(dim1=0, dim2=1).fill_(1),
    "narrow": lambda x: x.narrow(1, 1, 2).fill_(1),
    "squeeze, unsqueeze": lambda x: x.unsqueeze(1).squeeze(1).mul_(2),
    "swapaxes": lambda x: x.swapaxes(0, 1)[2].zero_(),
    "unfold": lambda x: x.unfold(1, 2, 2)[..., 0].zero_(),
    "as_strided": lambda x: x.as_strided((2,), (1,)).zero_(),
    "expand of one row, read": lambda x: x[:, 1:2].add_(x[:, :1].expand(-1, 1, -1)),
    "view of a view": _view_of_view,
    "two overlapping views": _two_views,
    "a view after its base": _view_after_base,
    "masked_fill_": lambda x: x.masked_fill_(x < 0, 0.5),
    "index_add_": lambda x: x.index_add_(1, torch.tensor([0, 0]), x[:, :2]),
    "scatter_": lambda x: x.scatter_(1, torch.zeros(2, 1, 2, dtype=torch.long), 1.0),
    "index_copy_": lambda x: x.index_copy_(1, torch.tensor([1]), x[:, :1]),
    "index_put_": lambda x: x.index_put_((torch.tensor([0]), torch.tensor([1])), torch.tensor(2.0)),
    "clamp_": lambda x: x.clamp_(min=0),
    "lerp_": lambda x: x.lerp_(x.flip(1), 0.5),
    "addcmul_": lambda x: x.addcmul_(x, x, value=0.5),
    "sort": lambda x: x.copy_(x.sort(1).values),
    "contiguous is itself": lambda x: x.contiguous().mul_(2),
    "to is itself": lambda x: x.to(torch.float32).mul_(2),
    "float is itself": lambda x: x.float().mul_(2),
    "expand_as, then a copy": lambda x: x.copy_(x[:, :1].expand_as(x).clone()),
    "fill_diagonal_": lambda x: x[0].fill_diagonal_(9.0),
    "swap rows": lambda x: _set(x, [0, 1], x[[1, 0]]),
    "nothing": lambda x: x[:0].zero_(),
}


def _view(path: str) -> Any:
    name, _, call = path.partition("#")
    found: Any = _model()
    for part in name.split(".") if name else ():
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found.call(int(call)) if call else found


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _traced(path: str, port: Port, edit: Change, watch: bool) -> list[Tensor]:
    """The model's output, the value before and after the edit, and if watched every other location."""
    with torch.no_grad(), _model().trace(_x(), backend="eager"):
        before = _first(getattr(_view(path), port)).save()
        edit(_first(getattr(_view(path), port)))
        after = _first(getattr(_view(path), port)).save()
        watched = [_first(getattr(_view(p), q)).save() for p, q in LOCATIONS if watch and (p, q) != (path, port)]
        out = _model().output.save()
    return [out, before, after, *watched]


def _hooked(path: str, port: Port, edit: Change, watch: bool) -> list[Tensor]:
    here = [Read(path, port), Edit(path, port, "inplace", edit), Read(path, port)]
    others = [Read(p, q) for p, q in LOCATIONS if watch and (p, q) != (path, port)]
    out, reads = run(_net(), (_x(),), {}, [*here, *others, Read("", "output")])
    return [out, *reads[:-1]]


def _difference(path: str, port: Port, edit: Change, watch: bool) -> str:
    """What is wrong, or nothing."""
    try:
        expected: list[Tensor] | Exception = _hooked(path, port, edit, watch)
    except (IndexError, RuntimeError) as error:
        expected = error
    try:
        found: list[Tensor] | Exception = _traced(path, port, edit, watch)
    except Exception as error:
        found = error
    if isinstance(expected, Exception) or isinstance(found, Exception):
        return "" if type(expected) is type(found) else f"{expected!r:.100}, and here {found!r:.300}"
    wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not torch.equal(a, b)]
    return f"differs at {wrong}" if wrong else ""


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("path, port", LOCATIONS)
def test_edits_equal_hooks(path: str, port: Port, watch: bool) -> None:
    edits = list(EDITS.items())[:: 5 if watch else 1]
    wrong = {name: difference for name, edit in edits if (difference := _difference(path, port, edit, watch))}
    assert not wrong, "\n".join(f"{name}: {difference}" for name, difference in wrong.items())
