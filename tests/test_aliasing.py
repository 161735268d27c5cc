"""In-place edits mean what they mean in PyTorch: views, methods and locations against plain hooks, bitwise."""

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
    right.add_(left.clone())


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
    "index_add_": lambda x: x.index_add_(1, torch.tensor([0, 0]), x[:, :2].clone()),
    "scatter_": lambda x: x.scatter_(1, torch.zeros(2, 1, 2, dtype=torch.long), 1.0),
    "index_copy_": lambda x: x.index_copy_(1, torch.tensor([1]), x[:, :1].clone()),
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
    here: list[Edit | Read] = [Read(path, port), Edit(path, port, "inplace", edit), Read(path, port)]
    others = [Read(p, q) for p, q in LOCATIONS if watch and (p, q) != (path, port)]
    out, reads = run(_net(), (_x(),), {}, [*here, *others, Read("", "output")])
    return [out, *reads[:-1]]


def _said(result: list[Tensor] | Exception) -> str:
    return repr(result) if isinstance(result, Exception) else "values"


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
        both = isinstance(expected, Exception) and isinstance(found, Exception)
        return "" if both else f"with hooks {_said(expected)}, and here {_said(found)}"
    wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not torch.equal(a, b)]
    return f"differs at {wrong}" if wrong else ""


def _check(path: str, port: Port, watch: bool, names: list[str]) -> None:
    wrong = {name: found for name in names if (found := _difference(path, port, EDITS[name], watch))}
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())


@pytest.mark.filterwarnings("ignore::fxsight.errors.LostEditWarning")  # of copies, which the matrix edits, too
@pytest.mark.parametrize("number, location", list(enumerate(LOCATIONS)))
def test_edits_equal_hooks(number: int, location: tuple[str, Port]) -> None:
    """Every edit somewhere, and everywhere some edits."""
    _check(*location, False, list(EDITS)[number % 7 :: 7])
    _check(*location, True, list(EDITS)[number % 17 :: 17])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fxsight.errors.LostEditWarning")
@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("path, port", LOCATIONS)
def test_all_edits_everywhere_equal_hooks(path: str, port: Port, watch: bool) -> None:
    _check(path, port, watch, list(EDITS))


# ------------------------------------------------------------------------------------------------- views by name


def test_expanded_memory_refuses_edits_as_torch_does() -> None:
    """Several elements at one place in memory: torch's own error, at the user's line."""
    x = torch.zeros(2, 5, WIDTH)
    with pytest.raises(RuntimeError) as torch_says:
        x[:, :1].expand(-1, 5, -1).mul_(2)
    with pytest.raises(RuntimeError) as caught, _trace():
        _model().first.output[:, :1].expand(-1, 5, -1).mul_(2)
        _model().output.save()
    assert str(caught.value) == str(torch_says.value)


def _trace() -> Any:
    return _model().trace(_x(), backend="eager")


def _reference(*steps: Edit | Read) -> tuple[Tensor, list[Tensor]]:
    out, reads = run(_net(), (_x(),), {}, steps)
    return out, reads


def test_tuple_members_are_edited_in_place() -> None:
    with torch.no_grad(), _trace():
        _model().blocks[0].attn.output[0][:, 0] = 0
        _model().blocks[1].attn.output[0].mul_(2)
        out = _model().output.save()
    expected, _ = _reference(
        Edit("blocks.0.attn", "output", "inplace", lambda x: _set(x, (slice(None), 0), 0)),
        Edit("blocks.1.attn", "output", "inplace", lambda x: _imul(x, 2)),
    )
    assert torch.equal(out, expected)


def test_tuple_members_are_assigned() -> None:
    with torch.no_grad(), _trace():
        _model().blocks[0].attn.output[0] = _model().blocks[0].attn.output[0] * 2
        _model().blocks[1].attn.output[0] += 1
        _model().blocks[1].attn.output[1] = 0
        pattern = _model().blocks[1].attn.output[1].save()
        out = _model().output.save()
    expected, _ = _reference(
        Edit("blocks.0.attn", "output", "assign", lambda x: x * 2),
        Edit("blocks.1.attn", "output", "assign", lambda x: x + 1),
    )
    assert torch.equal(out, expected) and torch.equal(pattern, torch.zeros(2, 5, 5))


def test_a_whole_tuple_is_assigned() -> None:
    with torch.no_grad(), _trace():
        value, pattern = _model().blocks[0].attn.output
        _model().blocks[0].attn.output = (value * 2, pattern)
        out = _model().output.save()
    assert torch.equal(out, _reference(Edit("blocks.0.attn", "output", "assign", lambda x: x * 2))[0])


# --------------------------------------------------------------------------------------------- residual aliases


def test_an_in_place_edit_of_a_norm_s_input_reaches_the_residual_stream() -> None:
    with torch.no_grad(), _trace():
        _model().blocks[0].ln2.input.mul_(2)
        out = _model().output.save()
    assert torch.equal(out, _reference(Edit("blocks.0.ln2", "input", "inplace", lambda x: _imul(x, 2)))[0])


def test_an_assignment_to_a_norm_s_input_does_not() -> None:
    with torch.no_grad(), _trace():
        _model().blocks[0].ln2.input = _model().blocks[0].ln2.input * 2
        out = _model().output.save()
    expected, _ = _reference(Edit("blocks.0.ln2", "input", "assign", lambda x: x * 2))
    in_place, _ = _reference(Edit("blocks.0.ln2", "input", "inplace", lambda x: _imul(x, 2)))
    assert torch.equal(out, expected) and not torch.equal(out, in_place)


def test_augmented_assignment_is_an_in_place_edit() -> None:
    """``x.input *= 2`` reads, changes in place and writes the very same value back."""
    with torch.no_grad(), _trace():
        _model().blocks[0].ln2.input *= 2
        out = _model().output.save()
    assert torch.equal(out, _reference(Edit("blocks.0.ln2", "input", "inplace", lambda x: _imul(x, 2)))[0])


def test_a_module_that_returns_its_input() -> None:
    """What goes in and what comes out is one tensor: an edit of the one is seen in the other, if it comes later."""
    with torch.no_grad(), _trace():
        _model().blocks[0].keep.output[:, 0] = 0
        before, after = _model().blocks[0].keep.input.save(), _model().blocks[0].up.input.save()
        _model().blocks[1].keep.input[:, 0] = 0
        seen = _model().blocks[1].keep.output.save()
        out = _model().output.save()
    zero = lambda x: _set(x, (slice(None), 0), 0)  # noqa: E731
    expected, reads = _reference(
        Read("blocks.0.keep", "input"),
        Edit("blocks.0.keep", "output", "inplace", zero),
        Read("blocks.0.up", "input"),
        Edit("blocks.1.keep", "input", "inplace", zero),
        Read("blocks.1.keep", "output"),
    )
    assert all(torch.equal(a, b) for a, b in zip((before, after, seen, out), (*reads, expected), strict=True))


def test_the_model_s_own_in_place_operators_do_not_reach_what_was_read() -> None:
    """``act`` changes its input in memory, and ``x += mlp`` the residual stream."""
    with torch.no_grad(), _trace():
        raw = _model().blocks[0].act.input.save()
        view = _model().blocks[0].act.input[:, 0].save()
        residual = _model().blocks[0].ln2.input.save()
        out = _model().blocks[0].output.save()
    _, reads = _reference(Read("blocks.0.act", "input"), Read("blocks.0.ln2", "input"), Read("blocks.0", "output"))
    assert torch.equal(raw, reads[0]) and (raw < 0).any() and torch.equal(view, reads[0][:, 0])
    assert torch.equal(residual, reads[1]) and torch.equal(out, reads[2])


# ------------------------------------------------------------------------------------------------------ snapshots


def test_a_read_keeps_the_numbers_it_had() -> None:
    with torch.no_grad(), _trace():
        before = _model().first.output.save()
        view = before[:, 0].save()
        cloned = _model().first.output.clone().save()
        _model().first.output[:, 0] = 0
        middle = _model().first.output.save()
        _model().first.output.add_(1)
        after = _model().first.output.save()
    expected = _net().first(_x())
    zeroed = expected.clone()
    zeroed[:, 0] = 0
    assert torch.equal(before, expected) and torch.equal(cloned, expected) and torch.equal(view, expected[:, 0])
    assert torch.equal(middle, zeroed) and torch.equal(after, zeroed + 1)


def test_the_handle_that_is_edited_has_the_new_numbers() -> None:
    with torch.no_grad(), _trace():
        handle = _model().first.output
        view = handle[:, 0]
        view.zero_()
        handle.add_(1)
        handle.save(), view.save()
    expected = _net().first(_x()).detach()
    expected[:, 0] = 0
    assert torch.equal(handle, expected + 1) and torch.equal(view, torch.ones(2, WIDTH))


def test_two_handles_of_one_location() -> None:
    """Both are reads of before; the first edit makes the other stale, which a later edit of it says."""
    with torch.no_grad(), _trace():
        one, two = _model().first.output, _model().first.output
        one[:, 0] = 0
        with pytest.warns(LostEditWarning):
            two[:, 1] = 0
        now = _model().first.output.save()
        two.save()
    expected = _net().first(_x()).detach()
    lost, kept = expected.clone(), expected.clone()
    lost[:, 1], kept[:, 0] = 0, 0
    assert torch.equal(now, kept) and torch.equal(two, lost)


# ------------------------------------------------------------------------------------- assignment, then in place


def test_assignment_then_in_place() -> None:
    with torch.no_grad(), _trace():
        _model().blocks[0].output = _model().blocks[0].output * 2
        _model().blocks[0].output[:, 0] = 0
        out = _model().output.save()
    expected, _ = _reference(
        Edit("blocks.0", "output", "assign", lambda x: x * 2),
        Edit("blocks.0", "output", "inplace", lambda x: _set(x, (slice(None), 0), 0)),
    )
    assert torch.equal(out, expected)


def test_in_place_then_assignment() -> None:
    with torch.no_grad(), _trace():
        _model().blocks[0].ln2.input[:, 0] = 0
        _model().blocks[0].ln2.input = _model().blocks[0].ln2.input * 2
        out = _model().output.save()
    expected, _ = _reference(
        Edit("blocks.0.ln2", "input", "inplace", lambda x: _set(x, (slice(None), 0), 0)),
        Edit("blocks.0.ln2", "input", "assign", lambda x: x * 2),
    )
    assert torch.equal(out, expected)


def test_assignment_between_in_place_edits() -> None:
    with torch.no_grad(), _trace():
        _model().blocks[0].ln2.input.add_(1)
        _model().blocks[0].ln2.input = _model().blocks[0].ln2.input * 2
        _model().blocks[0].ln2.input.sub_(3)
        out = _model().output.save()
    expected, _ = _reference(
        Edit("blocks.0.ln2", "input", "inplace", lambda x: x.add_(1)),
        Edit("blocks.0.ln2", "input", "assign", lambda x: x * 2),
        Edit("blocks.0.ln2", "input", "inplace", lambda x: x.sub_(3)),
    )
    assert torch.equal(out, expected)


def test_editing_the_value_that_was_assigned() -> None:
    """The location holds the value from then on: editing the value edits the location, as a tensor would."""
    with torch.no_grad(), _trace():
        value = _model().first.output * 2
        _model().blocks[0].output = value
        value[:, 0] = 0
        there = _model().blocks[0].output.save()
        out = _model().output.save()
    new = _net().first(_x()).detach() * 2
    new[:, 0] = 0
    expected, _ = _reference(Edit("blocks.0", "output", "assign", lambda _: new))
    assert torch.equal(there, new) and torch.equal(out, expected)


def test_a_value_assigned_to_two_places_then_edited() -> None:
    with torch.no_grad(), _trace():
        value = _model().first.output * 2
        _model().blocks[0].attn.output[0] = value
        _model().blocks[1].down.output = value
        value[:, 0] = 0
        seen = _model().blocks[0].attn.output[0].save(), _model().blocks[1].down.output.save()
        out = _model().output.save()
    new = _net().first(_x()).detach() * 2
    new[:, 0] = 0
    edits = [Edit(path, "output", "assign", lambda _: new) for path in ("blocks.0.attn", "blocks.1.down")]
    assert torch.equal(out, _reference(*edits)[0]) and all(torch.equal(new, s) for s in seen)


def test_editing_one_of_two_places_that_hold_the_same_value() -> None:
    """An assignment is about this location only: an edit there does not reach the other."""
    with torch.no_grad(), _trace():
        value = _model().first.output * 2
        _model().blocks[0].attn.output[0] = value
        _model().blocks[1].down.output = value
        _model().blocks[1].down.output[:, 0] = 0
        kept = value.save()
        out = _model().output.save()
    new = _net().first(_x()).detach() * 2
    edited = new.clone()
    edited[:, 0] = 0
    expected, _ = _reference(
        Edit("blocks.0.attn", "output", "assign", lambda _: new),
        Edit("blocks.1.down", "output", "assign", lambda _: edited),
    )
    assert torch.equal(out, expected) and torch.equal(kept, new)


def test_the_value_of_a_location_assigned_to_another_and_edited_there() -> None:
    with torch.no_grad(), _trace():
        _model().blocks[1].down.output = _model().blocks[0].down.output
        _model().blocks[1].down.output[:, 0] = 0
        first = _model().blocks[0].down.output.save()
        out = _model().output.save()
    _, (there,) = _reference(Read("blocks.0.down", "output"))
    edited = there.clone()
    edited[:, 0] = 0
    assert torch.equal(out, _reference(Edit("blocks.1.down", "output", "assign", lambda _: edited))[0])
    assert torch.equal(first, there)


def test_a_value_that_a_model_s_in_place_operator_meets_is_kept() -> None:
    """``act`` is ReLU in place: it changes what is assigned to its input, not the user's value."""
    with torch.no_grad(), _trace():
        value = (_model().blocks[0].up.output - 1).save()
        _model().blocks[0].act.input = value
        out = _model().output.save()
    assert (value < 0).any()
    assert torch.equal(out, _reference(Edit("blocks.0.act", "input", "assign", lambda x: x - 1))[0])


# ------------------------------------------------------------------------------------- tensors of the user's


def test_writing_a_value_into_a_tensor_of_the_user() -> None:
    buffer, grown = torch.zeros(3, 2, 5, WIDTH), torch.ones(2, 5, WIDTH)
    with torch.no_grad(), _trace():
        buffer[0] = _model().first.output
        buffer[2].copy_(_model().blocks[0].output)
        grown += _model().first.output
    _, (first, block) = _reference(Read("first", "output"), Read("blocks.0", "output"))
    assert torch.equal(buffer, torch.stack([first, torch.zeros_like(first), block]))
    assert torch.equal(grown, 1 + first) and type(grown) is Tensor


def test_a_tensor_of_the_user_read_after_a_value_was_written_into_it() -> None:
    buffer = torch.zeros(2, 5, WIDTH)
    with torch.no_grad(), _trace():
        buffer[:, 0] = _model().first.output[:, 0]
        doubled = (_model().first.output * 0 + buffer).save()
    expected = torch.zeros(2, 5, WIDTH)
    expected[:, 0] = _net().first(_x())[:, 0]
    assert torch.equal(buffer, expected) and torch.equal(doubled, expected)


def test_constants_are_not_changed_by_the_model() -> None:
    mine, row = torch.randn(2, 5, 16), torch.randn(WIDTH)
    copies = mine.clone(), row.clone()
    with torch.no_grad(), _trace():
        _model().blocks[0].act.input = mine
        _model().blocks[1].input = row
        _model().blocks[1].input.mul_(2)
        out = _model().output.save()
    expected, _ = _reference(
        Edit("blocks.0.act", "input", "assign", lambda _: mine.clone()),
        Edit("blocks.1", "input", "assign", lambda x: row.expand_as(x).clone()),
        Edit("blocks.1", "input", "inplace", lambda x: _imul(x, 2)),
    )
    assert torch.equal(out, expected) and torch.equal(mine, copies[0]) and torch.equal(row, copies[1])


def test_a_saved_constant_is_a_copy() -> None:
    mine = torch.zeros(2, 5, WIDTH)
    with torch.no_grad(), _trace():
        _model().first.output = mine
        kept = _model().first.output.save()
    kept.add_(1)
    assert torch.equal(mine, torch.zeros(2, 5, WIDTH))


def test_inputs_and_weights_are_not_changed_by_edits() -> None:
    x = _x()
    weights = {name: tensor.clone() for name, tensor in _net().state_dict().items()}
    with torch.no_grad(), _model().trace(x, backend="eager"):
        _model().input.zero_()
        _model().first.input.add_(1)
        _model().head.input[:] = 3
        given = _model().input.save()
        _model().output.save()
    assert torch.equal(x, _x()) and torch.equal(given, torch.zeros_like(x))
    assert all(torch.equal(weights[name], tensor) for name, tensor in _net().state_dict().items())


def test_an_edit_of_the_model_s_input_is_seen_by_the_model() -> None:
    with torch.no_grad(), _trace():
        _model().input[:, 0] = 0
        out = _model().output.save()
    x = _x()
    x[:, 0] = 0
    assert torch.equal(out, _net()(x))


def test_an_edit_of_a_copy_has_no_effect() -> None:
    with warnings.catch_warnings(), torch.no_grad(), _trace():
        warnings.simplefilter("ignore", LostEditWarning)
        _model().first.output.clone().zero_()
        out = _model().output.save()
    assert torch.equal(out, _net()(_x()))


def test_an_edit_of_a_copy_that_nothing_reads_warns() -> None:
    with pytest.warns(LostEditWarning), _trace():
        _model().first.output.clone()[:] = 0


def test_an_edit_of_a_view_that_was_taken_before_an_assignment_warns() -> None:
    with pytest.warns(LostEditWarning), _trace():
        view = _model().first.output[:, 0]
        _model().first.output = _model().first.output * 2
        view.zero_()


def test_out_arguments_write_where_they_point() -> None:
    with torch.no_grad(), _trace():
        value = _model().first.output
        torch.mul(value[:, 1], 2, out=value[:, 0])
        other = (_model().first.output * 0).save()
        torch.neg(value, out=other)
        now = _model().first.output.save()
    expected = _net().first(_x()).detach()
    expected[:, 0] = expected[:, 1] * 2
    assert torch.equal(now, expected) and torch.equal(other, -expected)


def test_in_place_functions_on_lists_of_values_are_refused() -> None:
    with pytest.raises(fxsight.TraceError) as error, torch.no_grad(), _trace():
        torch._foreach_mul_([_model().first.output, _model().blocks[0].output], 2)
    assert str(error.value) == "_foreach_mul_ changes several tensors in place; write one call for each"


def test_calls_of_one_module_are_edited_apart() -> None:
    with torch.no_grad(), _trace():
        _model().twice.output[:, 0] = 0
        _model().twice.call(1).output.mul_(2)
        out = _model().output.save()
    expected, _ = _reference(
        Edit("twice", "output", "inplace", lambda x: _set(x, (slice(None), 0), 0)),
        Edit(calls("twice", 1), "output", "inplace", lambda x: _imul(x, 2)),
    )
    assert torch.equal(out, expected)
