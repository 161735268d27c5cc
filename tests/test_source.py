"""Names, positions and printing of operations: against nnsight's lists, real frames and random functions."""

from __future__ import annotations

import ast
import dis
import functools
import linecache
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fxsight.source
from fxsight.errors import UnknownAddress
from fxsight.instructions import Span, site_of_frame, site_table
from fxsight.sites import Site
from fxsight.source import Source, SourceReader

# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────

GPT2_ATTENTION = """
isinstance_0 past_key_values_is_updated_get_0 hasattr_0 ValueError_0 self_q_attn_0 self_c_attn_0 split_0
key_states_view_0 transpose_0 value_states_view_0 transpose_1 self_c_attn_1 split_1 key_states_view_1
transpose_2 value_states_view_1 transpose_3 query_states_view_0 transpose_4 curr_past_key_values_update_0
ALL_ATTENTION_FUNCTIONS_get_interface_0 self__upcast_and_reordered_attn_0 attention_interface_0
attn_output_reshape_0 contiguous_0 self_c_proj_0 self_resid_dropout_0
"""

PROBE = """
@decorate(with_a_call())
def forward(self, x, f=default(), *, scale: float() = float("1")) -> dict(x="y"):
    y = torch.relu(torch.relu(x))
    if False:
        y = self.l(y)
    total = (y @ x).sum() + f(y)
    mean = [part[0].mean() for part in total]
    z = (lambda v: torch.tanh(v))(mean)
    w = self.l(z).view(-1)
    return w, x.size(0)
"""


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    if not transformers.__version__.startswith("5.23."):
        pytest.skip("the lists are those of transformers 5.23")
    from transformers.models.gpt2 import modeling_gpt2

    return modeling_gpt2


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and all in it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from codes(const)


def compiled(text: str, name: str = "forward") -> types.CodeType:
    """The code of a function in a text, which ``linecache`` knows as it knows a notebook cell."""
    file = f"<test {abs(hash(text))}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random functions call numbers
        module = compile(text, file, "exec")
    return next(code for code in codes(module) if code.co_name == name)


def read(text: str, name: str = "forward") -> Source:
    source = SourceReader().of(compiled(text, name))
    assert source is not None
    return source


def body(*lines: str) -> Source:
    """The source of a function of these lines."""
    return read("def forward(self, x, y):\n" + "".join(f"    {line}\n" for line in lines))


def test_names_of_gpt2_attention() -> None:
    source = SourceReader().of_function(gpt2().GPT2Attention.forward)
    assert source is not None
    assert source.names("call") == tuple(GPT2_ATTENTION.split())


def test_names_of_gpt2_mlp() -> None:
    source = SourceReader().of_function(gpt2().GPT2MLP.forward)
    assert source is not None
    assert source.names("call") == ("self_c_fc_0", "self_act_0", "self_c_proj_0", "self_dropout_0")


def test_names_of_the_probe() -> None:
    expected = "torch_relu_0 torch_relu_1 self_l_0 sum_0 f_0 mean_0 torch_tanh_0 unknown_0 self_l_1 view_0 x_size_0"
    assert read(PROBE).names("call") == tuple(expected.split())


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("self.c_proj(x)", "self_c_proj_0"),
        ("self._upcast(x)", "self__upcast_0"),
        ("torch.nn.functional.relu(x)", "torch_nn_functional_relu_0"),
        ("cache.is_updated.get(x)", "cache_is_updated_get_0"),
        ("self.c_attn(x).split(2, dim=-1)", "self_c_attn_0 split_0"),
        ("(x @ y).sum()", "sum_0"),
        ("x[0].mean().item()", "mean_0 item_0"),
        ("(lambda v: v)(x)", "unknown_0"),
        ("f(x)(y)(x)", "f_0 unknown_0 unknown_1"),
        ("x[0](y)", "unknown_0"),
        ("super().forward(x)", "super_0 forward_0"),
        ("f(g(x), g(f(y)))", "g_0 f_0 g_1 f_1"),
        ("f(*g(x), k=h(y), **i())", "g_0 h_0 i_0 f_0"),
        ("{f(k): g(v) for k, v in h(x) if i(k)}", "f_0 g_0 h_0 i_0"),
        ("x[f()] = g()", "f_0 g_0"),
        ("y = f'{g(x):{h(y)}}'", "g_0 h_0"),
        ("a.b(x); a_b(x)", "a_b_0 a_b_1"),
        ("y: List[f()] = g(x)", "g_0"),
    ],
)
def test_names_of_calls(line: str, names: str) -> None:
    assert body(line).names("call") == tuple(names.split())


def test_calls_of_nested_functions_count_but_not_those_of_their_annotations() -> None:
    source = body("@decorate(x)", "def inner(v: f() = g()) -> h():", "    return f(v)", "return f(inner(x))")
    assert source.names("call") == ("g_0", "f_0", "decorate_0", "inner_0", "f_1")


def test_names_of_operators() -> None:
    source = body(
        "x + y - x * y / x // y % x ** y @ x",
        "x & y | x ^ y << x >> y",
        "-x, +x, ~x, not x",
        "x == y, x != y, x < y, x <= y, x > y, x >= y, x is y, x in y, x < y < x",
    )
    infix = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift"
    others = "neg pos invert eq ne lt le gt ge"
    names = [f"operator_{name}_0" for name in f"{infix} {others}".split()]
    assert sorted(source.names()) == sorted(names)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("x += y", "operator_iadd_0"),
        ("x @= y; x |= y", "operator_imatmul_0 operator_ior_0"),
        ("x[0]", "operator_getitem_0"),
        ("x[0] = y[1:2]", "operator_setitem_0 operator_getitem_0"),
        ("x[0], x[1:] = y", "operator_setitem_0 operator_setitem_1"),
        ("x[0] += y", "operator_getitem_0 operator_iadd_0 operator_setitem_0"),
        ("del x[0], x.T", ""),
        ("x.T.shape", "attribute_T_0 attribute_shape_0"),
        ("self.l.weight.sum()", "attribute_l_0 attribute_weight_0 self_l_weight_sum_0"),
        ("x.y = y.x", "attribute_x_0"),
        ("x.y += y", "attribute_y_0 operator_iadd_0"),
        ("-1, +1.5, -2**0.5, 1 << 3, x[-1]", "operator_getitem_0"),
        ("-x + -1", "operator_neg_0 operator_add_0"),
        ("y: tuple[int] = x.T[0]", "attribute_T_0 operator_getitem_0"),
    ],
)
def test_names_of_other_sites(line: str, names: str) -> None:
    assert body(line).names() == tuple(names.split())


def test_calls_keep_their_names_when_others_have_the_same() -> None:
    source = body("x + y", "operator.add(x, y)", "x + y", "x.T", "attribute_T(x)")
    assert source.names("call") == ("operator_add_0", "attribute_T_0")
    assert source.names("operator") == ("operator_add_1", "operator_add_2")
    assert source.names("attribute") == ("attribute_T_1",)


def test_a_site_has_place_and_text() -> None:
    source = body("ü = x", "y = 'ü', self.f(  x,", "    y)", f"g({'x, ' * 40})")
    assert source.sites[0] == Site("self_f_0", "call", Span(3, 4, 14, 10), "self.f( x, y)", 1)
    assert source.sites[1].text == f"g({'x, ' * 18}x..."
    assert len(source.sites[1].text) == 60


# ── finding the source ──────────────────────────────────────────────────────────────────────────────────────


def doubled(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def wrapper(*args: Any) -> Any:
        return fn(fn(*args))

    return wrapper


class Sample:
    @doubled
    @doubled
    def method(
        self,
        x: Any,
    ) -> Any:
        """Text that
        stands further left."""
        return self.work(x)

    def work(self, x: Any) -> Any:
        return abs(x)


def test_source_of_a_decorated_method() -> None:
    source = SourceReader().of_function(Sample().method)
    assert source is not None
    assert (source.function, source.names()) == ("method", ("self_work_0",))
    assert source.lines[0] == "def method("
    assert source.lines[1] == "    self,"
    assert source.lines[5] == '    stands further left."""'
    assert linecache.getline(source.file, source.first_line) == "    def method(\n"


def test_source_of_partials_and_wrappers() -> None:
    reader = SourceReader()
    plain = reader.of_function(Sample.work)
    assert plain is not None
    for fn in (
        Sample().work,
        functools.partial(Sample().work, 1),
        doubled(functools.partial(Sample.work, Sample())),
    ):
        assert reader.of_function(fn) is plain
    inner = SourceReader().of(doubled(abs).__code__)
    assert inner is not None
    assert inner.names() == ("fn_0", "fn_1")


def test_source_by_file_name_and_line() -> None:
    reader = SourceReader()
    code = Sample.work.__code__
    source = reader.find(code.co_filename, "work", code.co_firstlineno)
    assert source is not None and source is reader.of(code)
    assert reader.find(code.co_filename, "work", 1) is None


def test_no_source() -> None:
    reader = SourceReader()
    namespace: dict[str, Any] = {}
    exec("def made(x):\n    return abs(x)", namespace)
    assert reader.of_function(namespace["made"]) is None
    assert reader.of_function(abs) is None
    assert reader.of_function(Sample) is None
    assert reader.of(compile("abs(1)", __file__, "exec")) is None
    assert reader.locate(namespace["made"].__code__, 0) is None


def test_no_source_in_a_file_that_is_not_python() -> None:
    code = compiled("def forward(x):\n    return abs(x)\n")
    text = "cdef forward(x):\n    return abs(x)\n"
    linecache.cache[code.co_filename] = (len(text), None, text.splitlines(keepends=True), code.co_filename)
    assert SourceReader().of(code) is None


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    reader, file = SourceReader(), tmp_path / "model.py"

    def names(text: str) -> tuple[str, ...]:
        file.write_text(text)
        source = reader.of(next(c for c in codes(compile(text, str(file), "exec")) if c.co_name == "f"))
        assert source is not None
        return source.names()

    assert names("def f(x):\n    return abs(x)\n") == ("abs_0",)
    assert names("# moved\n\ndef f(x):\n    return len(x) + 1\n") == ("len_0", "operator_add_0")


def test_equal_functions_of_two_files_are_two_sources() -> None:
    reader, text = SourceReader(), "def f(x):\n    return abs(x)\n"
    sources = []
    for file in ("<cell 1>", "<cell 2>"):
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        sources.append(reader.of(next(c for c in codes(compile(text, file, "exec")) if c.co_name == "f")))
    assert [source and source.file for source in sources] == ["<cell 1>", "<cell 2>"]


def test_lambdas_on_one_line() -> None:
    first, second = lambda x: abs(x), lambda x: (lambda y: len(y))(x)
    reader = SourceReader()
    for code, names in [
        (first.__code__, ("abs_0",)),
        (second.__code__, ("len_0", "unknown_0")),
        (next(c for c in codes(second.__code__) if c is not second.__code__), ("len_0",)),
    ]:
        source = reader.of(code)
        assert source is not None
        assert (source.function, source.names()) == ("<lambda>", names)


def test_a_comprehension_belongs_to_the_function_around_it() -> None:
    text = "def f(x, y=[abs(i) for i in ()]):\n    def g(z):\n        return sum(abs(i) for i in z)\n"
    code = next(c for c in codes(compiled(text, "g")) if c.co_name == "<genexpr>")
    source = SourceReader().of(code)
    assert source is not None and source.function == "g"


def test_a_warning_of_the_file_is_not_repeated() -> None:
    assert read("def forward(x):\n    return f('\\d')\n").names() == ("f_0",)  # pytest makes warnings errors


# ── positions ───────────────────────────────────────────────────────────────────────────────────────────────


class Spy:
    """Notes, in every method Python calls on it, the site at which its caller is."""

    def __init__(self) -> None:
        self.reader = SourceReader()
        self.seen: list[str | None] = []

    def see(self, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1)
        site = self.reader.locate(caller.f_code, caller.f_lasti)
        at = site_of_frame(caller.f_code, caller.f_lasti)
        source = self.reader.of(caller.f_code)
        assert source is not None
        assert site == (source.at(*at) if at else None)
        self.seen.append(site.name if site else None)
        return self

    __call__ = foo = bar = __getitem__ = __setitem__ = __enter__ = __exit__ = see
    __add__ = __matmul__ = __mod__ = __neg__ = __pos__ = __invert__ = __lt__ = __iadd__ = __imul__ = see
    __eq__ = see
    __hash__ = None  # type: ignore[assignment]
    T = property(see)

    def __len__(self) -> int:
        caller = sys._getframe(1)
        site = self.reader.locate(caller.f_code, caller.f_lasti)
        self.seen.append(site.name if site else None)
        return 1


def infix(x: Any) -> None:
    x + x @ x % x
    (-x, +x, ~x, x < x, x == x)  # noqa: B018
    x += x
    x *= 1


def subscripts(x: Any) -> None:
    a, b = 1, 2
    _ = x[0], x[a:b], x[a:b:x]
    x[0] = x[1:2] = x
    x[a:b] = x


def augmented(x: Any) -> None:
    x[0] += x
    x[x[1]] *= x[2]


def augmented_in_a_slice(x: Any) -> None:
    a, b = 1, 2
    x[a:b] += x


def nested(x: Any) -> None:
    x(x(x), x.foo(x(1)))
    x(x)(x)


def chained(x: Any) -> None:
    # fmt: off
    _ = (x.foo(
        1)
      .bar(x)
      .T.foo(*[x])
      .T
      .bar(a=x)
      .T)
    # fmt: on


def unpacked(x: Any) -> None:
    args, kwargs = [x], {"k": x}
    x(*args, **kwargs)
    x(x, *args, k=x)
    x(k=x)
    x.foo(**kwargs)


def comprehensions(x: Any) -> None:
    [x + i for i in range(2)]
    {i: x(i) for i in range(1)}
    tuple(x + i for i in range(1))
    [[x.T for _ in range(1)] for _ in range(1)]


def from_builtins(x: Any) -> None:
    len(x)
    list(map(x, [1]))
    max([1], key=lambda i: (x.foo(i), i)[1])


def managed(x: Any) -> None:
    with x(1) as y, y.foo():
        x(2)


def branches(x: Any) -> None:
    z = x == 0
    if not z and z is x:  # a truth test asks for len(z)
        x(0)
    y = x(1) if x else x(2)
    if y.foo(y.T if y else 0):
        pass


def properties(x: Any) -> None:
    x.T.foo()
    x.T.T  # noqa: B018
    x.T(x)


@pytest.mark.parametrize(
    ("fn", "names"),
    [
        (infix, "matmul_0 mod_0 add_0 neg_0 pos_0 invert_0 lt_0 eq_0 iadd_0 imul_0"),
        (subscripts, "getitem_0 getitem_1 getitem_2 setitem_0 setitem_1 setitem_2"),
        (augmented, "getitem_0 iadd_0 setitem_0 getitem_1 getitem_2 getitem_3 imul_0 setitem_1"),
        (augmented_in_a_slice, "getitem_0 iadd_0 setitem_0"),
    ],
)
def test_operators_in_frames(fn: Callable[[Any], None], names: str) -> None:
    spy = Spy()
    fn(spy)
    assert spy.seen == [f"operator_{name}" for name in names.split()]


@pytest.mark.parametrize(
    ("fn", "names"),
    [
        (nested, "x_0 x_1 x_foo_0 x_2 x_3 unknown_0"),
        (chained, "x_foo_0 bar_0 attribute_T_0 T_foo_0 attribute_T_1 T_bar_0 attribute_T_2"),
        (unpacked, "x_0 x_1 x_2 x_foo_0"),
        (comprehensions, "operator_add_0 operator_add_0 x_0 operator_add_1 attribute_T_0"),
        (from_builtins, "len_0 list_0 x_foo_0"),
        (managed, "x_0 - y_foo_0 - x_1 - -"),
        (branches, "operator_eq_0 - - x_1 - attribute_T_0 y_foo_0 -"),
        (properties, "attribute_T_0 x_T_foo_0 attribute_T_1 attribute_T_2 - x_T_0"),
    ],
)
def test_calls_and_attributes_in_frames(fn: Callable[[Any], None], names: str) -> None:
    spy = Spy()
    fn(spy)
    assert [name or "-" for name in spy.seen] == names.split()


def test_a_lambda_has_names_of_its_own_and_those_of_the_function_around_it() -> None:
    def outer(x: Any) -> Any:
        return x + (lambda v: v + v)(x)

    spy = Spy()
    outer(spy)
    assert spy.seen == ["operator_add_0", "operator_add_1"]
    around = spy.reader.of(outer.__code__)
    inner = next(code for code in codes(outer.__code__) if code.co_name == "<lambda>")
    assert around is not None
    named = [around.at(*found) for found in site_table(inner).values()]
    assert {site.name for site in named if site} == {"operator_add_0"}


def test_locating_again_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, code = SourceReader(), infix.__code__
    first = [reader.locate(code, lasti) for lasti in range(0, len(code.co_code), 2)]
    monkeypatch.setattr(fxsight.source, "site_table", None)
    monkeypatch.setattr(linecache, "checkcache", None)
    for _ in range(10_000 // len(first) + 1):
        assert [reader.locate(code, lasti) for lasti in range(0, len(code.co_code), 2)] == first


def test_instructions_of_newer_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = {
        "UNARY_POSITIVE": ("CALL_INTRINSIC_1", "INTRINSIC_UNARY_POSITIVE"),  # 3.12
        "LOAD_METHOD": ("LOAD_ATTR", ""),  # 3.12
        "BINARY_SUBSCR": ("BINARY_OP", "[]"),  # 3.14
    }

    def instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
        for one in dis_instructions(code):
            opname, argrepr = newer.get(one.opname, (one.opname, one.argrepr))
            yield one._replace(opname=opname, argrepr=argrepr)

    dis_instructions, fns = dis.get_instructions, (infix, subscripts, augmented, nested)
    tables = [site_table(fn.__code__) for fn in fns]
    monkeypatch.setattr(dis, "get_instructions", instructions)
    assert [site_table(fn.__code__) for fn in fns] == tables


def test_without_columns_nothing_is_located() -> None:
    units = len(infix.__code__.co_code) // 2
    lines_only = b"".join(bytes([0x80 | 13 << 3 | 7, 0]) for _ in range(-(-units // 8)))
    code = infix.__code__.replace(co_linetable=lines_only)  # as python -X no_debug_ranges writes it
    assert site_table(code) == {}
    assert SourceReader().locate(code, 0) is None


# ── printing ────────────────────────────────────────────────────────────────────────────────────────────────

PRINTED = """
class Block:
    @decorator
    def forward(
        self, x,
    ):
        '''What it does.'''
        a, b = self.c_attn(x).split(2)  # halves

        if a is None:
            return self.skip(x) + 1
        return b
"""


def test_printing() -> None:
    expected = """
                   * def forward(
                    0     self, x,
                    1 ):
                    2     '''What it does.'''
 self_c_attn_0 ->   3     a, b = self.c_attn(x).split(2)  # halves
 split_0       ->  +      ...
                    4
                    5     if a is None:
 self_skip_0   ->   6         return self.skip(x) + 1
                    7     return b"""
    assert read(PRINTED).render() == expected.removeprefix("\n")
    assert expected.split("\n")[1] == " " * (len("self_c_attn_0") + 6) + "* def forward("


def test_printing_with_notes_and_operators() -> None:
    marks = {"split_0": "f32[2] × 2", "self_skip_0": "not executed", "operator_add_0": "not executed"}
    plain, full = read(PRINTED).render(marks), read(PRINTED).render(marks, operators=True)
    assert " split_0       ->  +      ...    # f32[2] × 2" in plain.split("\n")
    assert " self_skip_0   ->   6         return self.skip(x) + 1    # not executed" in plain.split("\n")
    assert "operator_add_0" not in plain
    assert " operator_add_0 ->  +          ...    # not executed" in full.split("\n")


def test_printing_sites_on_the_def_line() -> None:
    source = read("def forward(x): return f(g(x))\n")
    assert source.sites[0].row == -1
    assert source.render() == " g_0 ->  * def forward(x): return f(g(x))\n f_0 ->  +  ..."
    assert source.render_site("root", "f_0") == "root.f_0:\n\n    --> def forward(x): return f(g(x)) <--"


def test_printing_one_site() -> None:
    lines = [f"x = f{i}(x)" for i in range(20)]
    expected = [
        "model.h.0.f10_0:",
        "",
        "    ....",
        *(f"        x = f{i}(x)" for i in range(5, 10)),
        "    --> x = f10(x) <--",
        *(f"        x = f{i}(x)" for i in range(11, 19)),
        "    ....",
    ]
    assert body(*lines).render_site("model.h.0", "f10_0") == "\n".join(expected)
    short = body(*lines).render_site("m", "f1_0", before=1, after=0).split("\n")
    assert short == ["m.f1_0:", "", "    ....", "        x = f0(x)", "    --> x = f1(x) <--", "    ...."]


def test_printing_a_site_that_is_not_there() -> None:
    source = body("x.split(2)")
    with pytest.raises(UnknownAddress) as error:
        source.render_site("h.0", "splitt_0")
    place = f"forward ({source.file}:1)"
    assert str(error.value) == f"no operation 'splitt_0' in {place}; did you mean 'x_split_0'?"
    with pytest.raises(UnknownAddress, match=r"no operation 'zzz' in forward \(.*:1\)$"):
        source.render_site("h.0", "zzz")


# ── random functions ────────────────────────────────────────────────────────────────────────────────────────


def expressions() -> st.SearchStrategy[str]:
    names = st.sampled_from(["x", "y", "self", "f_0", "operator"])
    attributes = st.sampled_from(["add", "T", "c_attn", "_x", "ü"])
    space = st.sampled_from(["", " ", "\n "])
    infixes = st.sampled_from([*"+-*/%@&|^<>", "//", "**", "<<", ">>", "<=", "==", "!=", ">=", "is", "in", "and", "or"])

    def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.builds("({}{} {} {})".format, inner, space, infixes, inner),
            st.builds("({}{})".format, st.sampled_from(["-", "+", "~", "not "]), inner),
            st.builds("({}{}.{})".format, inner, space, attributes),
            st.builds("({}{}.{}({}))".format, inner, space, attributes, inner),
            st.builds("{}({}, k={})".format, inner, inner, inner),
            st.builds("{}(*{}, **{})".format, inner, inner, inner),
            st.builds("({}){}[{}]".format, inner, space, inner),
            st.builds("({})[{}:{}]".format, inner, inner, inner),
            st.builds("[{} for z in {} if {}]".format, inner, inner, inner),
            st.builds("f({} for z in {})".format, inner, inner),
            st.builds("(lambda v={}: {})".format, inner, inner),
            st.builds("({} if x else {})".format, inner, inner),
            st.builds('f"{{{}}}"'.format, names),
        )

    return st.recursive(names, grown, max_leaves=6)


def functions() -> st.SearchStrategy[str]:
    """The text of a function ``forward``."""
    one = st.builds("({})".format, expressions())
    simple = st.one_of(
        one,
        st.builds("x = {}".format, one),
        st.builds("x {}= {}".format, st.sampled_from(["+", "@", "//", "|", ">>"]), one),
        st.builds("x[{}] = y = {}".format, one, one),
        st.builds("x[{}] *= {}".format, one, one),
        st.builds("x[{}:{}] -= {}".format, one, one, one),
        st.builds("x.T **= {}".format, one),
        st.builds("x: {} = {}".format, one, one),
    )
    compound = st.one_of(
        st.builds("if {}:\n        {}\n    else:\n        {}".format, one, simple, simple),
        st.builds("for x in {}:\n        {}".format, one, simple),
        st.builds("with {} as x:\n        {}".format, one, simple),
        st.builds("@{}\n    def inner(v={}):\n        {}".format, one, one, simple),
    )
    lines = st.lists(simple | compound, min_size=1, max_size=3)
    return lines.map(lambda body: "def forward(self, x, y):\n    " + "\n    ".join(body) + "\n")


class Counted(ast.NodeVisitor):
    """nnsight's rule once more, written the other way round: by text of the callee."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.counts: dict[str, int] = {}

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit(node.target)
        if node.value:
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        root: ast.expr = node.func
        name = ""
        while isinstance(root, ast.Attribute):
            name = f"_{root.attr}{name}"
            root = root.value
        name = f"{root.id}{name}" if isinstance(root, ast.Name) else name.removeprefix("_") or "unknown"
        self.counts[name] = self.counts.get(name, -1) + 1
        self.names.append(f"{name}_{self.counts[name]}")


@settings(deadline=None)
@given(functions())
def test_names_are_unique_and_stable(text: str) -> None:
    source = read(text)
    assert len(set(source.names())) == len(source.sites)
    assert all(source.find(site.name) is site for site in source.sites)
    assert all(source.at(site.span, site.kind) is site for site in source.sites)
    assert read(text) == source
    moved = read(f"# moved\n\n{text}")
    assert moved.names() == source.names()
    assert (moved.lines, [site.row for site in moved.sites]) == (
        source.lines,
        [site.row for site in source.sites],
    )


@settings(deadline=None)
@given(functions())
def test_calls_are_named_by_the_rule(text: str) -> None:
    counted = Counted()
    for statement in ast.parse(text).body[0].body:  # type: ignore[attr-defined]
        counted.visit(statement)
    assert read(text).names("call") == tuple(counted.names)


@settings(deadline=None)
@given(functions())
def test_every_site_is_what_some_instruction_does(text: str) -> None:
    code, source = compiled(text), read(text)
    found = [source.at(*at) for inner in codes(code) for at in site_table(inner).values()]
    assert [site for site in source.sites if site not in found] == []


@settings(deadline=None)
@given(functions())
def test_every_operation_and_line_is_printed_once(text: str) -> None:
    source = read(text)
    printed = source.render(operators=True).split("\n")
    assert sorted(line.split()[0] for line in printed if " -> " in line[: line.find("->") + 3]) == sorted(
        source.names()
    )
    assert sum("->  + " not in line for line in printed) == len(source.lines)
    for site in source.sites:
        assert f"    --> {source.lines[site.row + 1].removeprefix('    ')} <--" in source.render_site("m", site.name)
