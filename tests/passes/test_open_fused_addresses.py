"""Names inside an opened operator, names around it, and what cannot be opened."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsight
from fxsight.address import Address
from fxsight.capture import capture
from fxsight.passes import OpenFused
from fxsight.place import Places
from fxsight.program import Program
from fxsight.source import SourceReader
from fxsight.testing import check_pass, listing, program_of
from tests.passes.fused_cases import Apply, assert_addresses_stay, random


def _opened(program: Program, *at: str) -> Program:
    for address in at:
        program = OpenFused(Address.parse(address))(program)
    return program


def _labels(program: Program, at: str = "") -> list[str]:
    places = Places(program, SourceReader())
    place = places.find(Address.parse(at))
    call = places.inside(place) or place.call
    assert call is not None
    return list(places.node_places(call))


# -- names -----------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Some operators of each kind, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        first = F.gelu(self.up(x)) + F.gelu(x)
        second = F.linear(first, self.up.weight) * first
        loss = F.mse_loss(F.mse_loss(second, x, reduction="none"), x)
        out: Tensor = self.norm(F.gelu(second) * loss)
        return out.detach()


@pytest.fixture(scope="module")
def mixed() -> Program:
    return capture(Mixed().eval(), (random(2, 5, 8),), {})


OPENINGS = (
    "/F_gelu_0",
    "/F_gelu_1",
    "/aten_gelu_1",
    "/F_linear_0",
    "up/F_linear_0",
    "/F_mse_loss_1/aten_mse_loss_0",
    "/aten_mse_loss_0",
    "norm/F_layer_norm_0",
)


@pytest.mark.parametrize("at", OPENINGS)
def test_addresses_around_an_opened_operator_stay(mixed: Program, at: str) -> None:
    assert_addresses_stay(mixed, _opened(mixed, at))


def test_addresses_stay_when_all_is_opened(mixed: Program) -> None:
    program = _opened(mixed, *OPENINGS)
    assert_addresses_stay(mixed, program)
    assert_addresses_stay(_opened(mixed, *OPENINGS[:4]), program)


def test_labels_do_not_depend_on_what_else_is_opened(mixed: Program) -> None:
    first, second = _opened(mixed, *OPENINGS), _opened(mixed, *reversed(OPENINGS))
    assert _labels(first) == _labels(second) == _labels(mixed)
    for at in OPENINGS[:2]:
        assert _labels(first, at) == _labels(second, at) == _labels(_opened(mixed, at), at)


@pytest.mark.parametrize("shape", [(2, 5, 8), (3, 1, 8), (1, 1, 8)])
def test_labels_inside_do_not_depend_on_sizes(mixed: Program, shape: tuple[int, ...]) -> None:
    other = capture(Mixed().eval(), (random(*shape),), {})
    for at in OPENINGS[:4]:
        assert _labels(_opened(other, at), at) == _labels(_opened(mixed, at), at)


def test_labels_inside(mixed: Program) -> None:
    program = _opened(mixed, *OPENINGS)
    assert _labels(program, "/F_gelu_0") == [
        "aten_gelu_0", "aten_div_0", "aten_erf_0", "aten_add_0", "aten_mul_0", "aten_mul_1"
    ]  # fmt: skip
    assert _labels(program, "up/F_linear_0") == [
        "aten_linear_0", "aten_sym_size_0", "aten_sym_size_1", "operator_mul_0", "aten_view_0", "aten_t_0",
        "aten_addmm_0", "aten_view_1",
    ]  # fmt: skip


def test_every_address_of_an_operator_leads_inside(mixed: Program) -> None:
    inner, outer = "/F_mse_loss_1/aten_mse_loss_0", "/aten_mse_loss_1"
    before = Places(mixed, SourceReader())
    assert before.find(Address.parse(inner)).key == before.find(Address.parse(outer)).key
    for opened_at in (inner, outer):
        after = Places(_opened(mixed, opened_at), SourceReader())
        found = {after.find(Address.parse(f"{at}/aten_pow_0")).key for at in (inner, outer)}
        assert len(found) == 1


def test_what_is_inside_is_opened_in_turn() -> None:
    module = Apply(lambda x: F.scaled_dot_product_attention(x, x, x))
    program = capture(module, (random(2, 4, 5, 8),), {})
    at = "/aten_scaled_dot_product_attention_0"
    outer = _opened(program, at)
    inner = check_pass(
        OpenFused(Address.parse(f"{at}/softmax_0/torch_softmax_0")),
        outer,
        module=module,
        tolerance=1e-6,
    )
    assert_addresses_stay(program, inner)
    assert_addresses_stay(outer, inner)
    exponentials = Address.parse(f"{at}/softmax_0/torch_softmax_0/torch_exp_0")
    assert str(Places(inner, SourceReader()).find(exponentials).address).endswith("/torch_exp_0")


def test_an_operator_without_a_call_of_its_own_is_opened() -> None:
    program = program_of(
        """
        x: 'input 0'                            # f32[batch, 8]
        neg = aten.neg.default(x)               # f32[batch, 8]
        gelu = aten.gelu.default(neg)           # f32[batch, 8]
        gelu_1 = aten.gelu.default(gelu)        # f32[batch, 8]
        return (gelu_1,)
        """
    )
    opened = check_pass(OpenFused(Address.parse("/aten_gelu_0")), program, tolerance=1e-6)
    assert_addresses_stay(program, opened)
    assert Places(opened, SourceReader()).find(Address.parse("/aten_gelu_0/torch_erf_0")).end < 2


def test_an_operator_of_several_values_stays_beside_its_parts() -> None:
    weights = (random(16, 4), random(16, 4), random(16), random(16))

    def lstm(x: Tensor, *weights: Tensor) -> Tensor:
        start = x.new_zeros(1, 2, 4)
        return torch.lstm(x, (start, start), list(weights), True, 1, 0.0, False, False, True)[0] * 2

    module = Apply(lstm, *weights)
    program = capture(module, (random(2, 3, 4),), {})
    inputs = ((random(2, 3, 4),),)
    opened = check_pass(OpenFused(Address.parse("/aten_lstm_0")), program, module=module, inputs=inputs, tolerance=1e-6)
    assert_addresses_stay(program, opened)
    assert "getitem = aten.alias.default(" in listing(opened)


def test_an_input_of_an_opened_operator_is_written() -> None:
    model = fxsight.Model(Apply(lambda x: F.gelu(x) + x), cache=False)
    x = random(2, 8)
    with model.trace(x) as tracer:
        erf = tracer.at("/aten_gelu_0/torch_erf_0").output.save()  # opens it
        tracer.at("/aten_gelu_0").input = tracer.at("/aten_gelu_0").input * 0
        out = model.output.save()
    assert torch.equal(out, x) and torch.equal(erf, torch.zeros(2, 8))


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_sizes_that_have_to_be_equal_are_a_condition() -> None:
    program = program_of(
        """
        x: 'input 0'                             # f32[batch, length, width]
        y: 'input 1'                             # f32[width_2, 6]
        matmul = aten.matmul.default(x, y)       # f32[batch, length, 6]
        linear = aten.linear.default(matmul, y)  # f32[batch, length, width_2]
        return (linear,)
        """
    )
    assert _opened(program, "/aten_linear_0").guards == ()
    assert list(map(str, _opened(program, "/aten_matmul_0").guards)) == ["Eq(width, width_2)"]


def test_other_sizes_are_refused_at_the_line() -> None:
    model = fxsight.Model(Apply(lambda q, k, v: F.scaled_dot_product_attention(q, k, v)), cache=False)
    query, keys, at = random(2, 4, 5, 8), random(2, 4, 7, 8), "/aten_scaled_dot_product_attention_0/softmax_0"
    with model.trace(query, keys, keys.clone()) as tracer:
        tracer.at(at).output.save()
    with pytest.raises(fxsight.InputError) as error, model.trace(query, keys, keys[:, :, :6].clone()) as tracer:
        tracer.at(at).output.save()
    assert "this program holds where height_2 == height_3, and not for height_2 = " in str(error.value)


# -- what cannot be opened -------------------------------------------------------------------------------------------

X = random(2, 8)
NO_PARTS = "cannot be opened: it is not made of other operators"
REFUSED = {
    "tanh": (lambda x: torch.tanh(x), "aten_tanh_0", f"/aten_tanh_0: aten.tanh.default {NO_PARTS}"),
    "view": (lambda x: x.view(-1), "aten_view_0", f"/aten_view_0: aten.view.default {NO_PARTS}"),
    "in place": (
        lambda x: torch.relu_(x * 2),
        "aten_relu__0",
        "/aten_relu__0: aten.relu_.default cannot be opened: it changes memory in place",
    ),
    "batch_norm in training": (
        lambda x: F.batch_norm(x, torch.zeros(8), torch.ones(8), training=True),
        "aten_batch_norm_0",
        "/aten_batch_norm_0: aten.batch_norm.default cannot be opened: in training it changes its running statistics; "
        "use model.eval()",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_opened_says_why(name: str) -> None:
    function, label, message = REFUSED[name]
    program = capture(Apply(function), (X,), {})
    with pytest.raises(fxsight.UnknownAddress) as error:
        _opened(program, f"/{label}")
    assert str(error.value) == message


def test_no_such_place(mixed: Program) -> None:
    with pytest.raises(fxsight.UnknownAddress) as error:
        _opened(mixed, "up/F_linaer_0")
    hint = "did you mean 'F_linear_0', 'aten_linear_0', 'aten_alias_0'?"
    assert str(error.value) == f"no operation 'F_linaer_0' in up; {hint}\n  it has: F_linear_0"


def test_a_module_is_open_already(mixed: Program) -> None:
    with pytest.raises(fxsight.UnknownAddress) as error:
        _opened(mixed, "up")
    assert str(error.value) == "up: a module is open already: what it calls has addresses of its own"


def test_one_of_several_operators_has_to_be_named(mixed: Program) -> None:
    with pytest.raises(fxsight.UnknownAddress) as error:
        _opened(mixed, "/F_mse_loss_1")
    listed = "open one of /F_mse_loss_1/aten_broadcast_tensors_0, /F_mse_loss_1/aten_mse_loss_0"
    assert str(error.value) == f"/F_mse_loss_1: it makes 2 operators; {listed}"


def test_a_call_without_operators(mixed: Program) -> None:
    program = capture(Apply(lambda x: torch.detach(x) * 2), (X,), {})
    call = next(c for c in program.book.calls if c.title == "detach")
    at = str(program.book.address(call))
    with pytest.raises(fxsight.UnknownAddress) as error:
        _opened(program, at)
    assert str(error.value) == f"{at}: it calls no operator that could be opened: its value was there before"


def test_sizes_that_fit_in_an_unknown_way() -> None:
    program = program_of(
        """
        x: 'input 0'                    # f32[batch, width]
        glu = aten.glu.default(x)       # f32[batch, half]
        return (glu,)
        """
    )
    with pytest.raises(fxsight.UnknownAddress) as error:
        _opened(program, "/aten_glu_0")
    assert str(error.value) == (
        "/aten_glu_0: aten.glu.default cannot be opened: its sizes batch, width fit in a way that is not known before "
        "it runs"
    )


def test_a_size_that_tracing_fixes() -> None:
    program = program_of(
        """
        x: 'input 0'                    # f32[length, batch, 4]
        h: 'input 1'                    # f32[1, batch, 4]
        w: 'weight w'                   # f32[4, 4]
        rnn = aten.rnn_tanh.input(x, h, [w, w], False, 1, 0.0, False, False, False)  # (f32[length, batch, 4], f32[1])
        out = operator.getitem(rnn, 0)  # f32[length, batch, 4]
        return (out,)
        """
    )
    with pytest.raises(fxsight.UnknownAddress) as error:
        _opened(program, "/aten_rnn_tanh_0")
    reason = "it is made in another way for each length"
    assert str(error.value) == f"/aten_rnn_tanh_0: aten.rnn_tanh.input cannot be opened: {reason}"


def test_a_condition_on_a_size_that_only_running_tells() -> None:
    program = program_of(
        """
        x: 'input 0'                           # f32[batch, 8]
        found = aten.view.default(x, [8, -1])  # f32[8, known_later]
        out = aten.matmul.default(found, x)    # f32[8, 8]
        wide = aten.unsqueeze.default(found, 0)  # f32[1, 8, known_later]
        last = aten.matmul.default(wide, x)    # f32[1, 8, 8]
        return (last,)
        """
    )
    with pytest.raises(fxsight.UnknownAddress) as error:
        _opened(program, "/aten_matmul_1")
    reason = "it is made in this way for Eq(batch, known_later) alone, which is only known when it runs"
    assert str(error.value) == f"/aten_matmul_1: aten.matmul.default cannot be opened: {reason}"


def test_nothing_inside_has_an_address_before_it_is_opened(mixed: Program) -> None:
    with pytest.raises(fxsight.UnknownAddress) as error:
        Places(mixed, SourceReader()).find(Address.parse("/aten_gelu_0/torch_erf_0"))
    assert str(error.value) == "/aten_gelu_0: one operator, which has not been opened"
