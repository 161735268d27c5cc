"""Bodies that do what nobody expects: exceptions, threads, interrupts, generators, forks; what is left behind."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: TID251

import fxsight
from tests import small
from tests.oracle import Edit, Read, run
from tests.zoo import token_ids


class Net(nn.Module):
    def __init__(self, depth: int = 3, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def _made(seed: int = 0, depth: int = 3, width: int = 6) -> Any:
    torch.manual_seed(seed)
    return fxsight.Model(Net(depth, width).eval().requires_grad_(False), cache=False)


@cache
def _model(seed: int = 0) -> Any:
    return _made(seed)


def _x(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(10 * batch + seed))


def _out(path: str = "", *edits: Edit, seed: int = 0, x: Tensor | None = None) -> Tensor:
    read = [Read(path, "output")] if path else []
    out, found = run(_model(seed)._module, (_x() if x is None else x,), {}, [*edits, *read])
    return found[0] if path else out


def _works(model: Any, seed: int = 0) -> bool:
    """Whether the model can be traced, with the right numbers."""
    with model.trace(_x()):
        out = model.output.save()
    return torch.equal(out, _out(seed=seed))


# -------------------------------------------------------------------------------------------------------- exceptions


class Mine(Exception):
    """The user's own."""


def _raise(what: BaseException) -> Any:
    raise what


@pytest.mark.parametrize("what", [Mine("x"), KeyError("x"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_any_exception_passes_as_it_is(what: BaseException) -> None:
    with pytest.raises(type(what)) as caught, _model().trace(_x()):
        _model().layers[0].output[:] = 0
        _raise(what)
    assert caught.value is what and [f.name for f in caught.traceback] == [
        "test_any_exception_passes_as_it_is",
        "_raise",
    ]
    assert _works(_model())


@pytest.mark.parametrize(
    "use, kind",
    [
        (lambda h: h[:, 17], IndexError),
        (lambda h: h @ torch.zeros(5, 5), RuntimeError),
        (lambda h: h.nonsense, AttributeError),
        (lambda h: h + object(), TypeError),
        (lambda h: torch.cat([h, h[0]]), RuntimeError),
        (lambda h: h.reshape(5, 5), RuntimeError),
        (lambda h: [1, 2][h.sum().long() + 10**6], IndexError),
        (lambda h: {"y": h}["x"], KeyError),
        (lambda h: h.sum().item().nonsense, AttributeError),
        (lambda h: int(h), (RuntimeError, ValueError)),
    ],
    ids=range(10),
)
def test_errors_of_torch_and_python_are_raised_at_the_line(use: Callable[[Any], Any], kind: Any) -> None:
    with _model().trace(_x()):
        with pytest.raises(kind) as caught:
            use(_model().layers[0].output)
        assert caught.traceback[1].name == "<lambda>"
        out = _model().output.save()
    assert torch.equal(out, _out())


def test_an_exception_while_the_program_runs() -> None:
    """The block is abandoned, whatever has gone wrong; the model is as before."""
    model = _made()
    weight = model._module.layers[1].weight
    with pytest.raises(RuntimeError), model.trace(_x()):
        kept = model.output.save()
        model._module.layers[1].weight = nn.Parameter(torch.zeros(6, 5), requires_grad=False)
    model._module.layers[1].weight = weight
    with pytest.raises(fxsight.NotSavedError):
        print(kept)
    assert _works(model)


class Interrupts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Ctrl-C in the middle of a run."""

    armed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.armed and "tanh" in str(func):
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def test_an_interrupt_while_the_program_runs() -> None:
    assert _works(_model())
    with Interrupts() as mode:  # type: ignore[no-untyped-call]
        with pytest.raises(KeyboardInterrupt), _model().trace(_x()):
            kept = _model().output.save()
            mode.armed = True
        mode.armed = False
        with pytest.raises(fxsight.NotSavedError):
            print(kept)
        with _model().trace(_x()):
            mode.armed = True
            with pytest.raises(KeyboardInterrupt):
                print(_model().output.sum().item())
            mode.armed = False
            number, out = _model().output.sum().item(), _model().output.save()
    assert number == _out().sum().item() and torch.equal(out, _out()) and _works(_model())


def test_an_interrupt_while_the_model_is_captured() -> None:
    calls: list[int] = []

    class Once(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return x * 2

    model = fxsight.Model(Once(), cache=False)
    with pytest.raises(KeyboardInterrupt):
        model.trace(_x()).__enter__()
    assert _works(_model())
    with model.trace(_x()):
        out = model.output.save()
    assert torch.equal(out, _x() * 2)


# ------------------------------------------------------------------------------------------------------- re-entrancy


def test_the_model_is_called_plainly_inside_its_own_trace() -> None:
    model = _model()
    with model.trace(_x()):
        plain = model._module(_x())
        also = model.trace(_x(), trace=False)
        model.layers[0].output[:] = 0
        out = model.output.save()
    assert torch.equal(plain, _out()) and torch.equal(also, _out())
    assert torch.equal(out, _out("", Edit("layers.0", "output", "inplace", Tensor.zero_)))


def test_a_trace_inside_apply() -> None:
    model, other = _model(), _model(1)

    def inner(tensor: Tensor) -> Tensor:
        with other.trace(tensor):
            found: Tensor = other.output.save()
        return found

    with model.trace(_x()):
        model.layers[1].output = fxsight.apply(inner, model.layers[0].output)
        out = model.output.save()
    value = _model(1)._module(_out("layers.0"))
    assert torch.equal(out, _out("", Edit("layers.1", "output", "assign", lambda live: value)))


def test_two_models_interleaved() -> None:
    a, b = _model(), _model(1)
    one, two = a.trace(_x()), b.trace(_x())
    with one, two:
        hidden = a.layers[0].output
        b.layers[0].output[:] = 0
        hidden[:, 0] = 1
        kept_a, kept_b = a.output.save(), b.output.save()
        with pytest.raises(fxsight.TraceError, match="values of two traces in one call"):
            print(hidden + b.layers[1].output)
    edit = Edit("layers.0", "output", "inplace", lambda live: live[:, 0].fill_(1))
    zero = Edit("layers.0", "output", "inplace", Tensor.zero_)
    assert torch.equal(kept_a, _out("", edit)) and torch.equal(kept_b, _out("", zero, seed=1))


def test_traces_that_end_in_another_order_than_they_began() -> None:
    a, b = _model(), _model(1)
    one, two = a.trace(_x()), b.trace(_x())
    one.__enter__()
    two.__enter__()
    first, second = a.output.save(), b.output.save()
    one.__exit__(None, None, None)
    assert torch.equal(first, _out())
    two.__exit__(None, None, None)
    assert torch.equal(second, _out(seed=1)) and _works(a) and _works(b, 1)


def test_two_wrappers_of_one_module() -> None:
    a, b = _made(), None
    b = fxsight.Model(a._module, cache=False)
    with a.trace(_x()), b.trace(_x()):
        a.layers[0].output[:] = 0
        changed, plain = a.output.save(), b.output.save()
    assert torch.equal(plain, _out()) and torch.equal(
        changed, _out("", Edit("layers.0", "output", "inplace", Tensor.zero_))
    )


# -------------------------------------------------------------------------------------------------------- generators


def test_a_generator_abandoned_inside_a_body() -> None:
    model = _made()

    def values() -> Generator[Any]:
        with model.trace(_x()):
            yield model.layers[0].output.save()
            yield model.output.save()

    generator = values()
    first = next(generator)
    generator.close()
    with pytest.raises(fxsight.NotSavedError):
        print(first)
    assert _works(model)
    generator = values()
    next(generator)
    del generator
    gc.collect()
    assert _works(model)
    with pytest.raises(fxsight.NotSavedError):
        print(first)


def test_a_generator_run_to_its_end() -> None:
    def values() -> Iterator[Any]:
        with _model().trace(_x()):
            yield _model().layers[0].output.save()
            yield _model().output.save()

    hidden, out = values()
    assert torch.equal(hidden, _out("layers.0")) and torch.equal(out, _out())


def test_a_block_as_a_context_of_the_user_s() -> None:
    from contextlib import contextmanager

    @contextmanager
    def zeroed(model: Any) -> Iterator[Any]:
        with model.trace(_x()) as tracer:
            model.layers[0].output[:] = 0
            yield tracer

    with zeroed(_model()):
        out = _model().output.save()
    assert torch.equal(out, _out("", Edit("layers.0", "output", "inplace", Tensor.zero_)))


# ------------------------------------------------------------------------------------------------- threads, processes


def _many(model: Any, seed: int, rounds: int) -> bool:
    """Whether traces with edits of their own have the right numbers."""
    right = []
    for number in range(rounds):
        given = x = _x(2 + number % 3)
        with torch.no_grad(), model.trace(given):
            model.layers[number % 3].output *= number + 1
            total = model.output.sum().item() if number % 4 == 0 else None
            out = model.output.save()
        for n, layer in enumerate(_model(seed)._module.layers):
            x = layer(x)
            x = torch.tanh(x * (number + 1) if n == number % 3 else x)
        right.append(torch.equal(out, x) and (total is None or total == x.sum().item()))
    return all(right)


@pytest.mark.parametrize("same", [True, False])
def test_traces_in_threads_of_the_user_s(same: bool) -> None:
    models = [_made(0 if same else n) for n in range(1 if same else 4)] * (4 if same else 1)
    for n in range(4):
        _model(n)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(_many, model, 0 if same else n, 8) for n, model in enumerate(models)]
        assert all(future.result() for future in found)


def test_a_trace_of_one_thread_is_not_open_in_another() -> None:
    seen: list[Any] = []

    def other() -> None:
        try:
            print(_model().output)
        except fxsight.TraceError as error:
            seen.append(str(error))
        with _model().trace(_x()):
            seen.append(_model().output.save())

    with _model().trace(_x()):
        _model().layers[0].output[:] = 0
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        out = _model().output.save()
    assert "only inside a trace" in seen[0] and torch.equal(seen[1], _out())
    assert torch.equal(out, _out("", Edit("layers.0", "output", "inplace", Tensor.zero_)))


def _in_worker(queue: Any) -> None:
    try:
        with torch.no_grad(), _model().trace(_x()):
            _model().layers[0].output[:] = 0
            number = _model().layers[1].output.sum().item()
            out = _model().output.save()
        queue.put((number, out.tolist()))
    except BaseException as error:  # the parent must not wait for ever
        queue.put(repr(error))
        raise


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_workers() -> None:
    """The captured model goes on in a forked process, also when a block was open there."""
    assert _works(_model())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_in_worker, args=(queue,))
    worker.start()
    number, values = queue.get(timeout=120)
    worker.join(timeout=60)
    zero = Edit("layers.0", "output", "inplace", Tensor.zero_)
    assert values == _out("", zero).tolist() and number == _out("layers.1", zero).sum().item()


# ------------------------------------------------------------------------------------------------------------ memory


def _tensors() -> int:
    """How many there are in this process."""
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def test_nothing_but_the_saves_is_alive_after_a_trace() -> None:
    model, before = _made(), 0
    for turn in range(3):
        with torch.no_grad(), model.trace(_x()) as tracer:
            unsaved = model.layers[0].output
            (unsaved * 2).sum().item()
            kept = model.layers[1].output.save()
        gone = [weakref.ref(unsaved), weakref.ref(tracer)]
        storage = weakref.ref(kept.untyped_storage())
        del unsaved, kept
        assert storage() is None, "free at once, and not when the tracer or the garbage collector goes"
        del tracer
        gc.collect()
        alive = _tensors()
        assert [ref() for ref in gone] == [None, None]
        assert turn == 0 or alive <= before
        before = alive


def test_a_saved_value_with_its_graph_is_let_go() -> None:
    model = fxsight.Model(Net(), cache=False)
    with model.trace(_x()):
        kept = model.layers[1].output.save()
    assert kept.value is kept and kept.grad_fn is not None
    gone = weakref.ref(kept)
    del kept
    gc.collect()
    assert gone() is None


def test_a_trace_that_failed_leaves_nothing() -> None:
    model = _made()
    assert _works(model)
    gc.collect()
    before = _tensors()
    for _ in range(3):
        with pytest.raises(Mine), model.trace(_x()):
            model.layers[0].output.save()
            raise Mine
    gc.collect()
    assert _tensors() <= before


def test_the_peak_of_a_trace_is_a_few_activations() -> None:
    """One saved value and what the layer at work needs, not the activations of all layers."""
    depth, width, rows = 24, 64, 4096
    torch.manual_seed(0)
    net = Net(depth, width).eval().requires_grad_(False)
    model, x = fxsight.Model(net, cache=False), torch.randn(rows, width)
    with torch.no_grad(), model.trace(x):
        kept = model.layers[1].output.save()
        out = model.output.save()
    del kept, out
    peak = _peak(lambda: _traced(model, x))
    assert peak <= 6 * rows * width * 4, f"{peak / (rows * width * 4):.1f} activations"


def _traced(model: Any, x: Tensor) -> None:
    with torch.no_grad(), model.trace(x):
        model.layers[1].output.save()
        model.output.save()


def _peak(work: Callable[[], None]) -> int:
    """The most memory, in bytes, that results of operators hold at once."""
    alive: dict[int, int] = {}
    peak = [0]

    class Measure(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.device.type == "cpu" and type(result).__name__ != "FakeTensor":
                storage = result.untyped_storage()
                if storage._cdata not in alive:
                    alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, alive.pop, storage._cdata, None)
                peak[0] = max(peak[0], sum(alive.values()))
            return result

    with Measure():  # type: ignore[no-untyped-call]
        work()
    return peak[0]


# ---------------------------------------------------------------------------------------------- noise, structures


def _noisy(model: Any) -> Tensor:
    torch.manual_seed(11)
    with model.trace(_x()):
        hidden = model.layers[0].output
        hidden = hidden + torch.randn_like(hidden) * 0.1 + torch.randn(hidden.shape) + torch.rand(6)
        hidden = hidden * torch.bernoulli(torch.full_like(hidden, 0.5)) + torch.zeros_like(hidden) + hidden.new_ones(6)
        hidden += torch.zeros(2, 6, device=hidden.device, dtype=hidden.dtype).normal_()
        model.layers[0].output = hidden + torch.arange(6) + torch.empty_like(hidden).fill_(2)
        out: Tensor = model.output.save()
    return out


def test_noise_and_factories_in_a_body_with_a_seed() -> None:
    out = _noisy(_model())
    assert torch.isfinite(out).all() and out.shape == (2, 6) and torch.equal(out, _noisy(_model()))


def test_one_kind_of_noise_equals_torch_s() -> None:
    """Tensors of the body's own are drawn when it is written, those made of values when the program runs."""
    assert _works(_model())  # making the models sets the seed, too
    for make in (
        torch.randn_like,
        torch.rand_like,
        lambda h: torch.randn(h.shape),
        lambda h: torch.empty_like(h).normal_(),
    ):
        torch.manual_seed(7)
        with _model().trace(_x()):
            _model().layers[0].output = _model().layers[0].output + make(_model().layers[0].output)
            out = _model().output.save()
        torch.manual_seed(7)
        value = _out("layers.0") + make(_out("layers.0"))
        assert torch.equal(out, _out("", Edit("layers.0", "output", "assign", lambda live, v=value: v)))  # type: ignore[misc]


def test_model_outputs_in_invokes_sessions_and_conditions() -> None:
    net = small.gpt2()
    model, ids = fxsight.Model(net, cache=False), token_ids(3, 5)
    with model.session(), model.trace() as tracer:
        with tracer.invoke(ids[:1]):
            first = model.output
            logits = first.logits.save()
        with tracer.invoke(ids[1:]):
            model.output.logits[:, 0] = 0
            second = model.output.save()
            with tracer.cond(False):
                model.output.logits[:] = 5
    expected = net(ids)
    changed = expected.logits.clone()
    changed[1:, 0] = 0
    assert torch.equal(logits, changed[:1]) and torch.equal(second.logits, changed[1:])
    assert torch.equal(second.past_key_values.layers[1].keys, expected.past_key_values.layers[1].keys[1:])
    assert type(second).__name__ == type(expected).__name__ and "save" not in vars(second)


def test_an_expanded_value_stays_expanded_when_it_is_known_already() -> None:
    vector = torch.linspace(-1, 1, 4)
    model = fxsight.Model(nn.Sequential(nn.Linear(4, 4)), cache=False)
    with model.trace(torch.ones(2, 4)):
        rows = vector.expand_as(model[0].output)
        assert rows.mean() < 1
        kept = fxsight.save(rows)
    assert torch.equal(kept, vector.expand(2, 4)) and kept.stride() == (0, 1)
