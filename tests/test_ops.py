"""Browsing operations: what is printed, what can be had, what is refused, what is found."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxsight.address import Address
from fxsight.errors import AddressError, NotExecuted, TraceError, UnknownAddress
from fxsight.model import Model
from fxsight.ops import Operation, Operations

LATER = "nothing has been captured yet; model.capture(*inputs), or a trace, tells what runs"


def double(x: torch.Tensor, scale: float = 2.0) -> tuple[torch.Tensor, None]:
    return x * scale, None


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.weigh(x) + h)


class Net(nn.Module):
    """A cell called three times, a loop, a branch, a function, two containers, a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(8, 2)])
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, Any]:
        h = torch.zeros_like(x[:, 0])
        for t in (0, 1, 2):
            h = torch.sin(self.cell(x[:, t], h))
        if mask is not None:
            h = self.unused(h)
        y, _ = double(h)
        out = self.heads[0](self.layers(y + 1))
        return {"out": out, "rest": [h.chunk(2, 1), y.dim()]}


X = torch.ones(2, 3, 4)


@pytest.fixture(scope="module")
def model() -> Model:
    """A captured net. Tests leave it as it is."""
    return captured(Net(), X)


def captured(module: nn.Module, *inputs: Any) -> Model:
    torch.manual_seed(0)
    made = Model(module, cache=False)
    with made.scan(*inputs):
        pass
    return made


@pytest.fixture(scope="module")
def gpt2() -> Model:
    transformers = pytest.importorskip("transformers")
    if not transformers.__version__.startswith("5.23."):
        pytest.skip("the sources are those of transformers 5.23")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    return captured(transformers.GPT2LMHeadModel(config).eval(), torch.ones(1, 5, dtype=torch.int64))


def message(error: type[Exception], act: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        act()
    return str(caught.value)


def plain(text: object) -> str:
    """What is printed, without the line that names the file."""
    head, _, rest = str(text).partition("\n")
    return f"{'  '.join(head.split('  ')[:2])}\n{rest}\n"


def nowhere(text: object) -> str:
    """What is printed, without file and line: they change with this file, and with where pytest is called."""
    return re.sub(r"line +target", "line  target", re.sub(r"\S*test_ops\.py:\d+", "FILE", f"{text}\n"))


class TestPrint(expecttest.TestCase):
    """The whole of what is printed. ``EXPECTTEST_ACCEPT=1`` writes it anew."""

    @pytest.fixture(autouse=True)
    def models(self, model: Model) -> None:
        self.model = model

    def test_source_of_a_module(self) -> None:
        self.assertExpectedInline(
            plain(self.model.ops),
            """\
Net  the root module
                        * def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, Any]:
 torch_zeros_like_0 ->   0     h = torch.zeros_like(x[:, 0])    # f32[batch, 4]
                         1     for t in (0, 1, 2):
 self_cell_0        ->   2         h = torch.sin(self.cell(x[:, t], h))    # f32[batch, 4], runs 3 times
 torch_sin_0        ->  +          ...    # f32[batch, 4], runs 3 times
                         3     if mask is not None:
 self_unused_0      ->   4         h = self.unused(h)    # not executed
 double_0           ->   5     y, _ = double(h)    # (f32[batch, 4], None)
 self_layers_0      ->   6     out = self.heads[0](self.layers(y + 1))    # f32[batch, 8]
 unknown_0          ->  +      ...    # f32[batch, 2]
 h_chunk_0          ->   7     return {"out": out, "rest": [h.chunk(2, 1), y.dim()]}    # (f32[batch, 2], f32[batch, 2])
 y_dim_0            ->  +      ...    # = 2
""",
        )

    def test_source_with_operators(self) -> None:
        self.assertExpectedInline(
            plain(self.model.ops.show(operators=True)),
            """\
Net  the root module
                        * def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, Any]:
 operator_getitem_0 ->   0     h = torch.zeros_like(x[:, 0])    # f32[batch, 4]
 torch_zeros_like_0 ->  +      ...    # f32[batch, 4]
                         1     for t in (0, 1, 2):
 operator_getitem_1 ->   2         h = torch.sin(self.cell(x[:, t], h))    # f32[batch, 4], runs 3 times
 self_cell_0        ->  +          ...    # f32[batch, 4], runs 3 times
 torch_sin_0        ->  +          ...    # f32[batch, 4], runs 3 times
                         3     if mask is not None:
 self_unused_0      ->   4         h = self.unused(h)    # not executed
 double_0           ->   5     y, _ = double(h)    # (f32[batch, 4], None)
 operator_add_0     ->   6     out = self.heads[0](self.layers(y + 1))    # f32[batch, 4]
 self_layers_0      ->  +      ...    # f32[batch, 8]
 unknown_0          ->  +      ...    # f32[batch, 2]
 h_chunk_0          ->   7     return {"out": out, "rest": [h.chunk(2, 1), y.dim()]}    # (f32[batch, 2], f32[batch, 2])
 y_dim_0            ->  +      ...    # = 2
""",
        )

    def test_source_of_a_later_call(self) -> None:
        self.assertExpectedInline(
            plain(self.model.cell.call(1).ops),
            """\
Cell  cell#1
                  * def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
 self_weigh_0 ->   0     return torch.tanh(self.weigh(x) + h)    # f32[batch, 4]
 torch_tanh_0 ->  +      ...    # f32[batch, 4]
""",
        )

    def test_source_of_a_function(self) -> None:
        self.assertExpectedInline(
            plain(self.model.ops.double_0.ops.show(operators=True)),
            """\
double  /double_0
                    * def double(x: torch.Tensor, scale: float = 2.0) -> tuple[torch.Tensor, None]:
 operator_mul_0 ->   0     return x * scale, None    # f32[batch, 4]
""",
        )

    def test_module_that_is_never_called(self) -> None:
        self.assertExpectedInline(
            plain(self.model.unused.ops),
            """\
Linear  unused
unused: this forward never calls the module 'unused', so it has no input and no output; see model.ops for what runs
                * def forward(self, input: Tensor) -> Tensor:
                 0     \"\"\"
                 1     Runs the forward pass.
                 2     \"\"\"
 F_linear_0 ->   3     return F.linear(input, self.weight, self.bias)
""",
        )

    def test_module_without_a_forward(self) -> None:
        self.assertExpectedInline(
            plain(self.model.heads.ops),
            """\
ModuleList  heads
it has no forward; its modules have: [0].ops
""",
        )

    def test_torch_call_and_operator(self) -> None:
        ops = self.model.ops.torch_zeros_like_0.ops
        self.assertExpectedInline(
            nowhere(ops),
            """\
zeros_like  /torch_zeros_like_0
made of these operators:
name               line  target                   type
aten_zeros_like_0  FILE  aten.zeros_like.default  f32[batch, 4]
""",
        )
        self.assertExpectedInline(
            nowhere(ops.aten_zeros_like_0.ops),
            """\
aten.zeros_like.default  /torch_zeros_like_0/aten_zeros_like_0
an operator of the graph: there is nothing in it
""",
        )

    def test_table(self) -> None:
        self.assertExpectedInline(
            nowhere(self.model.cell.ops.table()),
            """\
name            line  target  type
self_weigh_0    FILE  Linear  f32[batch, 4]
operator_add_0  FILE  add     f32[batch, 4]
torch_tanh_0    FILE  tanh    f32[batch, 4]
""",
        )

    def test_operation(self) -> None:
        self.assertExpectedInline(
            nowhere(self.model.ops.double_0),
            """\
/double_0
  calls     function double
  line      FILE
  inputs    (f32[batch, 4], 2.0)
  output    (f32[batch, 4], None)
  opens to  operator_mul_0

model.double_0:

    ....
        h = torch.zeros_like(x[:, 0])
        for t in (0, 1, 2):
            h = torch.sin(self.cell(x[:, t], h))
        if mask is not None:
            h = self.unused(h)
    --> y, _ = double(h) <--
        out = self.heads[0](self.layers(y + 1))
        return {"out": out, "rest": [h.chunk(2, 1), y.dim()]}
""",
        )

    def test_execution_of_an_operation(self) -> None:
        op = self.model.ops["torch_sin_0#2"]
        self.assertExpectedInline(
            nowhere(op).partition("model.")[0],
            """\
/torch_sin_0#2
  calls      torch sin
  line       FILE
  inputs     (f32[batch, 4],)
  output     f32[batch, 4]
  runs       3 times
  operators  aten_sin_0

""",
        )

    def test_operator(self) -> None:
        self.assertExpectedInline(
            nowhere(self.model.cell.ops["aten_tanh_0"]),
            """\
cell/aten_tanh_0
  calls   operator aten.tanh.default
  line    FILE
  inputs  (f32[batch, 4],)
  output  f32[batch, 4]

    tanh = aten.tanh.default(add)
""",
        )

    def test_before_a_capture(self) -> None:
        ops = Model(Cell(), cache=False).ops
        self.assertExpectedInline(
            plain(ops),
            """\
Cell  the root module
nothing has been captured yet; model.capture(*inputs), or a trace, tells what runs
                  * def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
 self_weigh_0 ->   0     return torch.tanh(self.weigh(x) + h)
 torch_tanh_0 ->  +      ...
""",
        )
        self.assertExpectedInline(
            f"{ops.table()}\n",
            """\
name          line  target  type
self_weigh_0
torch_tanh_0
""",
        )
        self.assertExpectedInline(
            f"{ops.torch_tanh_0}\n",
            """\
/torch_tanh_0
  output  nothing has been captured yet; model.capture(*inputs), or a trace, tells what runs

model.torch_tanh_0:

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    --> return torch.tanh(self.weigh(x) + h) <--
""",
        )

    def test_container_before_a_capture(self) -> None:
        self.assertExpectedInline(
            plain(Model(nn.ModuleList([Cell()]), cache=False).ops),
            """\
ModuleList  the root module
it has no forward; its modules have: [0].ops
""",
        )


# -- one by one ----------------------------------------------------------------------------------------------


def test_attribute_item_position_and_iteration_are_the_same(model: Model) -> None:
    ops = model.ops
    assert ops.double_0 == ops["double_0"] == model.source.double_0 != ops.torch_sin_0
    assert len(ops) == len(list(ops)) == 11
    assert list(ops)[1] == ops[1] == ops.torch_zeros_like_0
    assert len({ops.double_0, ops["double_0"]}) == 1


def test_names_are_in_the_order_of_the_source(model: Model) -> None:
    names = (
        "operator_getitem_0 torch_zeros_like_0 operator_getitem_1 self_cell_0 torch_sin_0 double_0 operator_add_0 "
        "self_layers_0 unknown_0 h_chunk_0 y_dim_0"
    )
    assert [op.name for op in model.ops] == names.split()
    assert set(names.split()) < set(dir(model.ops)) and "self_unused_0" not in dir(model.ops)
    assert {"find", "show", "table"} < set(dir(model.ops))


def test_in_says_what_can_be_had(model: Model) -> None:
    ops = model.ops
    assert "torch_sin_0" in ops and "torch_sin_0#2" in ops and "aten_sin_0" in ops and "double_0/operator_mul_0" in ops
    assert ops.double_0 in ops and model.cell.ops.torch_tanh_0 not in ops
    assert "torch_sin_0#3" not in ops and "self_unused_0" not in ops and "sin" not in ops and "not a name" not in ops


def test_facts(model: Model) -> None:
    op = model.ops.self_cell_0
    assert str(op.address) == "/self_cell_0" and Address.parse(str(op.address)) == op.address
    assert (op.name, op.target, op.title, op.count) == ("self_cell_0", "Cell", "module Cell at cell", 3)
    assert (op.type, str(op.shape), op.dtype) == ("f32[batch, 4]", "(batch, 4)", torch.float32)
    assert op.line.rpartition(":")[0].endswith("test_ops.py")
    assert model.ops.double_0.type == "(f32[batch, 4], None)" and model.ops.double_0.shape is None
    assert model.ops.y_dim_0.type == "2" and model.ops.y_dim_0.dtype is None
    assert model.ops.h_chunk_0.type == "(f32[batch, 2], f32[batch, 2])"
    operator = model.cell.ops["aten_tanh_0"]
    assert (operator.target, operator.title) == ("aten.tanh.default", "operator aten.tanh.default")
    assert operator.line == model.cell.ops.torch_tanh_0.line and operator.count == 1


def test_executions(model: Model) -> None:
    sin = model.ops.torch_sin_0
    assert sin.call(2) == model.ops["torch_sin_0#2"] and sin.call(2).name == "torch_sin_0#2" and sin.call(0) == sin
    assert sin.call(2).call(1) == sin.call(1)
    assert model.ops["self_cell_0#1"].ops.address == Address("cell", 1)


def test_inside(model: Model) -> None:
    ops = model.ops
    assert ops.self_cell_0.ops.self_weigh_0.ops.F_linear_0.target == "linear"
    assert ops["self_cell_0/self_weigh_0/F_linear_0"].type == ops.self_cell_0.source.self_weigh_0.type
    assert [op.name for op in ops.double_0.ops] == ["operator_mul_0"]
    assert [op.name for op in ops.operator_getitem_0.ops] == ["aten_slice_0", "aten_select_0"]
    assert list(ops.operator_getitem_0.ops.aten_select_0.ops) == []


def test_unknown_and_untaken(model: Model) -> None:
    assert message(UnknownAddress, lambda: model.cell.ops.torch_tan_0) == (
        "no operation 'torch_tan_0' in cell; did you mean 'torch_tanh_0', 'aten_tanh_0', 'operator_add_0'?\n"
        "  it has: self_weigh_0, operator_add_0, torch_tanh_0"
    )
    text = message(NotExecuted, lambda: model.ops.self_unused_0)
    assert text.startswith("/self_unused_0: on a branch that this forward does not take (line ")
    assert "runs 3 times here" in message(NotExecuted, lambda: model.ops.torch_sin_0.call(3))
    assert "never calls the module 'unused'" in message(NotExecuted, lambda: model.unused.ops.F_linear_0)
    assert "'cell' 3 times" in message(NotExecuted, lambda: model.cell.call(3).ops.torch_tanh_0)
    assert not hasattr(model.ops, "self_unused_0") and not hasattr(model.ops, "__wrapped__")


def test_keys_that_are_no_names(model: Model) -> None:
    assert message(AddressError, lambda: model.ops["a b"]).startswith("not an address")
    text = message(AddressError, lambda: model.ops["torch_sin_0:output"])
    assert text == "ops['torch_sin_0:output']: name the operation alone, and read ops[...].output"


def test_typos_in_assignments_are_errors(model: Model) -> None:
    with pytest.raises(AttributeError):
        model.ops.torch_sin_0.outptu = 1


def test_copies(model: Model) -> None:
    assert copy.copy(model.ops).torch_sin_0 == copy.copy(model.ops.torch_sin_0) == model.ops.torch_sin_0


# -- in a trace ----------------------------------------------------------------------------------------------


def test_values_are_read_and_written() -> None:
    net = Net()
    model = Model(net, cache=False)
    with model.trace(X):
        sin = model.ops.torch_sin_0.call(1)
        before = sin.output.clone().save()
        given = sin.input.save()
        sin.output = sin.output * 0
        args, kwargs = model.ops["self_cell_0#2"].inputs
        after = args[1].save()
        model.ops.double_0.output[0] = 1.0
        model.ops.operator_add_0.input += 1
        out = model.output["out"].save()
    h = torch.sin(net.cell(X[:, 0], torch.zeros(2, 4)))
    assert kwargs == {} and torch.equal(given, net.cell(X[:, 1], h)) and torch.equal(before, torch.sin(given))
    assert torch.equal(after, torch.zeros(2, 4))
    assert torch.equal(out, net.heads[0](net.layers(torch.full((2, 4), 3.0))))


def test_graph_nodes_have_values() -> None:
    model = captured(Cell(), X[:, 0], X[:, 0])
    with model.trace(X[:, 0], X[:, 0]):
        tanh = model.ops["aten_tanh_0"].output.save()
        out = model.output.save()
    assert torch.equal(tanh, out)


def test_shapes_are_numbers_in_a_trace(model: Model) -> None:
    with model.trace(torch.ones(5, 3, 4)):
        op = model.ops.self_layers_0
        assert (op.shape, op.type) == ((5, 8), "f32[batch, 8]")
        assert (
            model.ops.find(shape=(5, 8), recursive=False) == model.ops.find(shape=("batch", 8), recursive=False) == [op]
        )
        assert "self_unused_0" not in model.ops
        message(NotExecuted, lambda: model.ops.self_unused_0)


def test_the_open_trace_comes_first() -> None:
    model = captured(Net(), X)
    assert "self_unused_0" not in model.ops
    with model.trace(X, torch.ones(1)):
        assert "self_unused_0" in model.ops
    assert "self_unused_0" in model.ops  # asked for last
    with model.trace(X):
        assert "self_unused_0" not in model.ops


def test_no_value_outside(model: Model) -> None:
    text = "/torch_sin_0:output has a value only inside a trace: with model.trace(...):"
    assert message(TraceError, lambda: model.ops.torch_sin_0.output) == text
    assert message(TraceError, lambda: setattr(model.ops.torch_sin_0, "output", 1)) == text
    assert "/torch_sin_0:inputs has" in message(TraceError, lambda: model.ops.torch_sin_0.inputs)


# -- finding -------------------------------------------------------------------------------------------------


def names(found: list[Operation]) -> list[str]:
    return [str(op.address) for op in found]


def test_find_by_name(model: Model) -> None:
    assert names(model.ops.find(name="torch_s*")) == ["/torch_sin_0", "/torch_sin_0#1", "/torch_sin_0#2"]
    assert names(model.ops.find(name="operator_mul_?")) == ["/double_0/operator_mul_0"]
    assert model.ops.find(name="operator_mul_?", recursive=False) == model.ops.find(name="nothing") == []


@pytest.mark.parametrize("target", [torch.tanh, "tanh", "ta*", torch.ops.aten.tanh.default, "aten.tanh.*"])
def test_find_by_target(model: Model, target: Any) -> None:
    assert names(model.ops.find(target=target)) == ["cell/torch_tanh_0", "cell#1/torch_tanh_0", "cell#2/torch_tanh_0"]


def test_find_functions_and_classes(model: Model) -> None:
    assert names(model.ops.find(target=double)) == ["/double_0"]
    assert names(model.ops.find(target=Cell)) == ["/self_cell_0", "/self_cell_0#1", "/self_cell_0#2"]
    assert names(model.layers.ops.find(target=F.linear)) == ["layers.0/F_linear_0"]
    assert names(model.layers.ops.find(module_class=nn.Linear)) == ["layers/module_0"]
    assert names(model.layers.ops.find(module_class="Module")) == ["layers/module_0", "layers/module_0#1"]


def test_find_by_shape(model: Model) -> None:
    for shape in [("batch", 8), (None, 8), (..., 8), "f32[batch, 8]", ("batch", ..., "4 + 4")]:
        found = names(model.ops.find(shape=shape))
        assert found[:2] == ["/self_layers_0", "layers/module_0"] and len(found) == 5
    assert (
        model.ops.find(shape="f64[batch, 8]") == model.ops.find(shape=(..., 1, 2, 3)) == model.ops.find(shape=()) == []
    )


def test_find_by_several(model: Model) -> None:
    assert names(model.ops.find(name="self_*", shape=("batch", 8))) == ["/self_layers_0"]
    assert model.ops.find(name="self_*", module_class=nn.ReLU) == []


def test_find_below_a_container(model: Model) -> None:
    assert names(model.heads.ops.find(name="*")) == ["/unknown_0", "heads.0/F_linear_0"]
    assert names(model.heads.ops.find(name="*", recursive=False)) == ["/unknown_0"]
    message(NotExecuted, lambda: model.unused.ops.find(name="*"))


def test_find_inside_operations(model: Model) -> None:
    assert names(model.ops.double_0.ops.find(name="*")) == ["/double_0/operator_mul_0"]
    assert model.ops.torch_sin_0.ops.find(name="*") == []


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ({}, "find what? Give a selector, or at least one of name=, target=, shape=, module_class="),
        ({"name": 3}, "name=3: give a pattern of names, such as 'self_c_*'"),
        ({"target": 3}, "target=3: give a function, class or operator, or a pattern such as 'tanh'"),
        ({"shape": 3}, "shape=3: give sizes, such as ('batch', None, 64) or 'f32[batch, length, 64]'"),
        ({"shape": "64"}, "shape='64': give sizes, such as ('batch', None, 64) or 'f32[batch, length, 64]'"),
        ({"shape": [1.5]}, "shape=[1.5]: give sizes, such as ('batch', None, 64) or 'f32[batch, length, 64]'"),
        ({"module_class": 3}, "module_class=3: give a class of modules, or its name"),
        ({"module_class": int}, "module_class=<class 'int'>: give a class of modules, or its name"),
    ],
)
def test_find_says_what_is_meant(model: Model, criterion: dict[str, Any], expected: str) -> None:
    assert message(TypeError, lambda: model.ops.find(**criterion)) == expected


# -- without a capture, a source, or weights -----------------------------------------------------------------


def test_before_a_capture_there_are_names() -> None:
    ops = Model(Cell(), cache=False).ops
    assert [op.name for op in ops] == ["self_weigh_0", "torch_tanh_0"] and "torch_tanh_0" in ops and "sin_0" not in ops
    assert repr(ops.torch_tanh_0) == f"</torch_tanh_0: {LATER}>"
    assert message(UnknownAddress, lambda: ops.torch_tan_0) == (
        f"no operation '/torch_tan_0'; did you mean 'torch_tanh_0'?\n  {LATER}"
    )


@pytest.mark.parametrize("fact", ["shape", "dtype", "type", "line", "target", "title", "count", "ops"])
def test_before_a_capture_there_are_no_facts(fact: str) -> None:
    ops = Model(Cell(), cache=False).ops
    assert message(TraceError, lambda: getattr(ops.torch_tanh_0, fact)) == f"/torch_tanh_0: {LATER}"
    assert message(TraceError, lambda: ops.find(name="*")) == f"the root module: {LATER}"


def without_source() -> nn.Module:
    scope: dict[str, Any] = {"nn": nn, "torch": torch}
    exec("class Made(nn.Module):\n    def forward(self, x): return torch.tanh(x)", scope)
    made: nn.Module = scope["Made"]()
    return made


def test_without_a_source_there_is_a_table() -> None:
    model = Model(without_source(), cache=False)
    assert (
        str(model.ops).splitlines()[-1]
        == "its forward has no source in Python to read: it is compiled, generated, or from exec"
    )
    assert LATER in message(UnknownAddress, lambda: model.ops.torch_tanh)
    model = captured(without_source(), X)
    head, *_ = str(model.ops).splitlines()
    assert head == "Made  the root module" and "torch_tanh" in str(model.ops)
    assert model.ops.torch_tanh.type == "f32[batch, length, height]"


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Model(Net(), cache=False)
    with model.scan(X.to("meta")):
        pass
    assert names(model.ops.find(module_class=Cell)) == ["/self_cell_0", "/self_cell_0#1", "/self_cell_0#2"]
    assert "# f32[batch, 4]" in str(model.ops) and model.layers.ops.module_0.type == "f32[batch, 8]"


# -- transformers --------------------------------------------------------------------------------------------


def test_gpt2_attention(gpt2: Model) -> None:
    attn = gpt2.transformer.h[0].attn
    lines = str(attn.ops).splitlines()
    shown = {name: rest for line in lines if "->" in line for name, _, rest in [line.strip().partition(" ")]}
    assert shown["self_c_attn_0"].endswith("# not executed") and shown["ValueError_0"].endswith("# not executed")
    assert shown["self_c_attn_1"].endswith("# f32[batch, length, 96]")
    assert shown["attention_interface_0"].endswith("# (f32[batch, length, 2, 16], None)")
    assert not shown["isinstance_0"].endswith("not executed")
    assert lines[0].startswith("GPT2Attention  transformer.h.0.attn  transformers/models/gpt2/modeling_gpt2.py:")
    assert attn.ops.attention_interface_0.target == "sdpa_attention_forward"
    assert "isinstance" in message(NotExecuted, lambda: attn.ops.isinstance_0)


def test_gpt2_fused_attention_opens(gpt2: Model) -> None:
    before = gpt2._captures.latest
    sdpa = gpt2.transformer.h[
        1
    ].attn.source.attention_interface_0.source.torch_nn_functional_scaled_dot_product_attention_0
    pattern = sdpa.source.softmax_0
    assert pattern.type == "f32[batch, 2, length, length]" and pattern.target == "softmax"
    assert names(sdpa.ops.find(target="softmax"))[0] == str(pattern.address)
    assert "softmax_0" in str(sdpa.ops) and str(pattern.address) in str(pattern)
    assert gpt2._captures.latest is before and gpt2.ops.find(target="softmax") == []  # a look changes nothing
    message(UnknownAddress, lambda: sdpa.ops.softmx_0)
    assert isinstance(sdpa.ops, Operations)


def test_gpt2_attention_pattern_is_a_value(gpt2: Model) -> None:
    with gpt2.trace(torch.ones(1, 5, dtype=torch.int64)):
        inner = gpt2.transformer.h[1].attn.ops.attention_interface_0.ops
        softmax = inner.torch_nn_functional_scaled_dot_product_attention_0.ops.softmax_0
        assert softmax.shape == (1, 2, 5, 5)
        pattern = softmax.output.save()
    assert torch.allclose(pattern.sum(-1), torch.ones(1, 2, 5))


def test_gpt2_find(gpt2: Model) -> None:
    blocks = names(gpt2.ops.find(module_class="GPT2Block"))
    assert blocks == ["transformer/block_0", "transformer/block_0#1"]
    wide = gpt2.transformer.h.ops.find(shape="f32[batch, length, 128]", target="Conv1D")
    assert names(wide) == ["transformer.h.0.mlp/self_c_fc_0", "transformer.h.1.mlp/self_c_fc_0"]


def test_llama() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = captured(transformers.LlamaForCausalLM(config).eval(), torch.ones(2, 5, dtype=torch.int64))
    attn = model.model.layers[1].self_attn
    assert attn.ops.attention_interface_0.type == "(f32[batch, length, 4, 8], None)"
    assert attn.ops.self_k_proj_0.shape == attn.ops.self_v_proj_0.shape
    assert names(model.ops.find(target="silu")) == [f"model.layers.{i}.mlp.act_fn/nn_functional_silu_0" for i in (0, 1)]
    assert "self_o_proj_0" in str(attn.ops) and "apply_rotary_pos_emb_0" in attn.ops
