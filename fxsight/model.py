"""What users hold: ``Model`` around any ``nn.Module``; a ``View`` of each of its parts hangs below it."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxsight.artifacts import Artifacts
from fxsight.auto import BACKENDS
from fxsight.background import Background, Workers
from fxsight.captures import Captures
from fxsight.compare import Diff, diff
from fxsight.containers import Saved
from fxsight.context import here
from fxsight.dropin import drop_in
from fxsight.edit_file import export_path, read_edits, write_edits
from fxsight.edit_text import edits_data, edits_of
from fxsight.edits import Edits, PlainTrace
from fxsight.errors import EditFileError, RenameError, TraceError, nearest
from fxsight.export import Export, check_folded, export_edited
from fxsight.export_steps import Steps, export_steps
from fxsight.fold import fold_into_weights
from fxsight.grid import Grid
from fxsight.inputs import PLAIN, Inputs
from fxsight.invokes import Invokes, own_arguments
from fxsight.methods import Method
from fxsight.parameters import EditParameters
from fxsight.plan import Plan
from fxsight.rename import Aliases, Rename
from fxsight.rows import Call
from fxsight.scan import Scan
from fxsight.sessions import Session
from fxsight.shared import ALONE, SHARED
from fxsight.store import Store
from fxsight.sweep import plan_sweep, split_arguments
from fxsight.tracer import Tracer
from fxsight.tree import flatten
from fxsight.view import View, words

_BACKGROUND = Background()
Views = type[View] | Mapping[type[nn.Module] | str, type[View] | None]


class Model(View):
    """Any ``nn.Module``, to be read, changed and compiled; the module itself is not touched.

        model = Model(net)
        with model.trace(x) as tracer:
            hidden = model.layer1.output.save()
            model.layer2.input[:, 0] = 0
            out = model.output.save()

    cache: whether captured programs (``store``) and compiled regions (``artifacts``) are kept on disk.
    rename: further names for modules, ``{"transformer.h": "layers", "mlp": ["ff", "mlp2"]}``; see ``rename.Aliases``.
    views: a subclass of ``View`` for all modules, or one for each class of modules or end of a path,
    ``{nn.Linear: MyView, "attn": Heads}``; a class comes before a path, the nearest base and the longest path first.
    methods: names of methods whose call is a block, ``with model.encode(x):``; see ``methods``.
    narrow: whether rows that nobody reads are left out, op by op, where the bits stay the same; see ``fewer``.
    background: when ``backend="auto"`` compiles (``background.Background``); None for never.

    Raises: RenameError; TypeError for what is no module or no View.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        cache: bool = True,
        rename: Rename | None = None,
        views: Views | None = None,
        methods: Iterable[str] = (),
        narrow: bool = True,
        background: Background | None = _BACKGROUND,
    ) -> None:
        given: Any = module
        if not isinstance(given, nn.Module):
            raise TypeError(f"Model(...) is for an nn.Module, not a {type(given).__name__}")
        super().__init__(None, module, "")
        own = self.__dict__
        own["_options"] = {
            "cache": cache,
            "rename": rename or {},
            "views": views or {},
            "methods": tuple(methods),
            "narrow": narrow,
            "background": background,
        }
        artifacts = Artifacts.on_disk() if cache else Artifacts()
        workers = None if background is None else Workers(background)
        own["_captures"] = Captures(module, Store() if cache else None, artifacts, workers)
        self._captures.shared.narrow = narrow
        own["_inputs"], own["_paths"], own["_methods"], own["_aliases"] = PLAIN, {}, {}, Aliases()
        own["_edits"] = Edits()
        _check_views(views.values() if isinstance(views, Mapping) else (views,))
        for name in self._options["methods"]:
            self.method(name)
        own["_aliases"] = self._captures.shared.aliases = Aliases.of(module, self._options["rename"], self._words)

    def trace(
        self,
        *args: Any,
        backend: Any = "eager",  # these are Any so that f(**batch) of a typed batch is a typed call
        trace: Any = True,
        scan: Any = True,
        validate: Any = True,
        debug: Any = False,
        invoker_args: Any = None,
        mode: Any = None,
        budget: Any = None,
        **kwargs: Any,
    ) -> Any:
        """A block in which values of ``module(*args, **kwargs)`` are read and written; it runs when the block ends.

        Without input: a block of invokes, ``with tracer.invoke(x):``, that run as one batch.
        backend: "eager" is bitwise the module's own numbers; "inductor" compiles; "auto" is eager, and compiled from
        some moment on where that pays: see ``auto``.
        trace: False for no block: simply the module's output.  invoker_args: more keyword arguments.
        scan, validate, debug: accepted; every block is checked line by line as it is written, and errors are raised
        there.
        mode: without input, for invokes that share what they have in common instead of running as one batch: "exact":
        each bitwise as if traced alone; "fast": computed together, within ``lower.TOLERANCE``; see ``invokes``.
        budget: bytes that such invokes may hold at once.

        Raises: TraceError for an unknown backend or mode, and when the block ends without any input.
        """
        if backend not in BACKENDS:
            raise TraceError(f"no backend {backend!r}; one of {', '.join(BACKENDS)}")
        options = {name: value for name, value in (("mode", mode), ("budget", budget)) if value is not None}
        kwargs = {**kwargs, **(invoker_args or {})}
        if options and trace and not self._inputs.are_given(args, kwargs):
            return Invokes(self._captures, backend, self._inputs, self._edits, **options)
        kwargs.update(own_arguments(self._module, self._captures.method, options))
        inputs: Inputs = self._inputs
        if not trace:
            return self._plainly(*inputs.prepare(args, kwargs))
        given = (args, kwargs) if inputs.are_given(args, kwargs) else None
        return Tracer(self._captures, given, backend, inputs, self._edits)

    def __call__(self, *args: Any, hook: Any = None, **kwargs: Any) -> Any:
        """The module's output, with the edits of this model.

        Raises: EditError where this forward does not have the places of an edit; TraceError for an edited model inside
        a block on it; CaptureError.
        """
        return self._plainly(args, kwargs) if self._edits else super().__call__(*args, hook=hook, **kwargs)

    def capture(self, *args: Any, **kwargs: Any) -> Model:
        """Capture ``module(*args, **kwargs)``, so that its operations can be browsed; works without weights.

        What is captured already is not captured again.  Returns: this model, of which ``ops`` now shows this forward.

        Raises: CaptureError.
        """
        args, kwargs = self._inputs.prepare(args, kwargs)
        self._captures.find(args, kwargs)
        return self

    def scan(self, *args: Any, **kwargs: Any) -> Scan:
        """A block in which shapes and dtypes are known and nothing is run; works without weights."""
        return Scan(self._captures, (args, kwargs), "eager", self._inputs, self._edits)

    def plan(self, body: Any, *args: Any, mode: str = "exact", budget: int | None = None, **kwargs: Any) -> Plan:
        """How ``sweep`` would compute it: ``print(plan)`` shows what is shared and what it costs; ``plan.run()``."""
        axes, own = split_arguments(body, kwargs)
        return plan_sweep(self._captures, body, self._inputs.prepare(args, own), axes, mode, self._edits, budget)

    def sweep(
        self,
        body: Any,
        *args: Any,
        mode: str = "exact",
        budget: int | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Grid:
        """One body for every cell of a grid: ``body(layer=..., position=...)`` reads and writes values of this model.

            def patch(layer, position):
                model.h[layer].input[:, position] = clean[layer][:, position]
                return model.output[:, -1, right] - model.output[:, -1, wrong]

            grid = model.sweep(patch, x, layer=range(12), position=range(15))

        args, kwargs: of the model, the same in all cells; those with the name of a parameter of the body are axes: any
        collection, a tensor by its first dimension, or a dict of labels and values. No gradients are kept.
        mode: "exact": every cell bitwise as if traced alone; "fast": cells computed together, within
        ``lower.TOLERANCE``.  budget: bytes that such cells may hold at once, besides weights and what they share.
        progress: a line on stderr while it takes long.

        Raises: what the body raises, with a note that names the cell; TraceError where cells return different things.
        """
        return self.plan(body, *args, mode=mode, budget=budget, **kwargs).run(progress)

    # -- edits that stay ---------------------------------------------------------------------------------------------

    @property
    def edits(self) -> Edits:
        """The edits of this model, in the order in which they are made: print them, index them."""
        edits: Edits = self._edits
        return edits

    @property
    def edit_parameters(self) -> EditParameters:
        """The tensors of the edits, by name: look at them, replace, move or train them."""
        return self.edits.parameters

    def clear_edits(self) -> None:
        """Remove all edits of this model; edited copies that were made of it keep theirs."""
        self.edits.clear()

    def save_edits(self, path: str | Path) -> Path:
        """Write the edits to a JSON file, and their tensors beside it: see ``edit_file``.  Returns: its path.

        Raises: EditFileError without edits, or for one that cannot stand in a file.
        """
        return write_edits(self.edits, path, type(self._module).__name__)

    def load_edits(self, path: str | Path) -> Model:
        """Add the edits of a file to this model.  Returns: this model.

        Raises: EditFileError for a file that is damaged, foreign or newer; EditError, naming all modules and weights
        that this model does not have.
        """
        self.edits.load(read_edits(path), self._module)
        return self

    def export_edits(self, name: str, export_dir: str | Path | None = None, variant: str = "__default__") -> Path:
        """Keep the edits under a name, in ``export_dir`` or in ``edit_file.edits_folder()``: ``name/variant.json``.

        Raises: as ``save_edits``.
        """
        return self.save_edits(export_path(name, export_dir, variant))

    def import_edits(self, name: str, export_dir: str | Path | None = None, variant: str = "__default__") -> Model:
        """Add the edits that were kept under a name.  Returns: this model.

        Raises: as ``load_edits``; EditFileError when there are none of that name.
        """
        path = export_path(name, export_dir, variant)
        if not path.exists():
            known = sorted(p.stem for p in path.parent.glob("*.json")) or sorted(
                p.name for p in path.parent.parent.glob("*") if p.is_dir()
            )
            raise EditFileError(f"no edits {name!r} (variant {variant!r}) in {path.parent.parent}; {_listed(known)}")
        return self.load_edits(path)

    def compile(self, backend: Any = "inductor") -> Any:
        """The edited model as an ``nn.Module`` of the module's own class, for any code that takes one.

        It shares everything with the module but its call, which makes the edits: ``state_dict``, ``.to``, ``.eval``,
        ``isinstance``, and, of a model of transformers, ``generate`` and pipelines. Each signature is captured and
        compiled at its first call, for all sizes.
        backend: "inductor", or "eager" for the module's own bits, or "auto", as for ``trace``. Where gradients are
        wanted it runs eagerly.

        Raises: TraceError for an unknown backend.
        """
        if backend not in BACKENDS:
            raise TraceError(f"no backend {backend!r}; one of {', '.join(BACKENDS)}")
        return drop_in(self._captures, self.edits, backend)

    def fold_edits(self, *args: Any, **kwargs: Any) -> nn.Module:
        """A copy of the module with the edits in its weights, where that is exact: see ``fold``; to be saved as one.

        args, kwargs: an example of the inputs; what the copy computes for it and at other sizes is compared.

        Raises: FoldError, saying which edit cannot be put into weights, and why; TraceError without an example.
        """
        call = self._call_of(args, kwargs)
        if call is None:
            raise TraceError("folding needs an example of the inputs, to compare: edited.fold_edits(x)")
        folded = fold_into_weights(self._captures, self.edits, call)
        check_folded(self._captures, self.edits, call, folded)
        return folded

    def diff(self, *args: Any, **kwargs: Any) -> Diff:
        """What the edits change in the program that runs: operations added, removed and rewired, and their cost.

        args, kwargs: an example of the inputs; without, the last forward.

        Raises: EditError; TraceError without example and forward.
        """
        call = self._call_of(args, kwargs)
        plain, edited = (PlainTrace(self._captures, call, "eager", edits=edits) for edits in ((), self.edits))
        return diff(plain.finish(), edited.finish(), edited.sizes)

    def export(self, path: str | Path, *args: Any, format: Any = None, check: bool = True, **kwargs: Any) -> Export:
        """Write the edited model as a file that runs without fxsight, and a manifest beside it: see ``export``.

        path: ends in ``.pt2`` (``torch.export.load``).  args, kwargs: an example of the inputs; free sizes stay free.
        check: load the file in a fresh process and compare, at sizes that were not seen at the export, too.

        Raises: EditError where the edits hold for some sizes only, where torch cannot write the program, and when the
        file does not compute the same; TraceError without an example.
        """
        call = self._call_of(args, kwargs)
        if call is None:
            raise TraceError("an export needs an example of the inputs: edited.export(path, x)")
        return export_edited(self._captures, self.edits, call, path, format, check)

    def export_generation(self, folder: str | Path, *args: Any, check: bool = True, **kwargs: Any) -> Steps:
        """Write an edited language model as two files that generate without fxsight: see ``export_steps``.

        folder: gets ``prefill.pt2`` and ``decode.pt2``, and a manifest beside each.  args, kwargs: an example of the
        prompts, of two tokens or more; with an ``attention_mask`` the files take one, too, and ``position_ids``.
        check: load both in a fresh process and compare what they compute and the tokens that they generate.

        Raises: EditError for a model without such a cache, and as ``export``; TraceError without an example.
        """
        call = self._call_of(args, kwargs)
        if call is None:
            raise TraceError("an export needs an example of the prompts: edited.export_generation(folder, input_ids=x)")
        return export_steps(self._captures, self.edits, call, folder, check)

    def _edited(self) -> Model:
        """The same model with the same edits, to which others can be added."""
        edited = object.__new__(type(self))
        edited.__dict__.update(self.__dict__, _root=edited, _views={}, _methods={}, _edits=Edits(self._edits))
        for name in self._options["methods"]:
            edited.method(name)
        return edited

    def _call_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """The call of the module for inputs, or for an example where there are none; None without either."""
        given = (args, kwargs) if self._inputs.are_given(args, kwargs) else self._example()
        return None if given is None else self._inputs.prepare(*given)

    def _example(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Inputs on which an edit is written when none are given; None for those of the last forward."""
        return None

    # -- several traces ----------------------------------------------------------------------------------------------

    def session(self, share: bool = True) -> Session:
        """A block for several traces: values of one are used in the next without saving; they run when it ends.

        share: whether traces on the same inputs compute what they have in common once, with the same bits;
        ``session.explain()`` says what was shared.
        """
        return Session(SHARED if share else ALONE)

    def method(self, name: str) -> Method:
        """A method of the module, to be traced: ``with model.method("encode").trace(x):``.

        Raises: AttributeError when the module has no method of that name.
        """
        if name not in self._methods:
            found = getattr(self._module, name, None)
            if not isinstance(found, types.MethodType):
                hint = nearest(name, [n for n in dir(type(self._module)) if not hasattr(nn.Module, n)])
                text = f"{type(self._module).__name__} has no method {name!r}"
                raise AttributeError(f"{text}; {hint}" if hint else text)
            self._methods[name] = Method(self, self._called_by(name), name, name in self._options["methods"])
        return self._methods[name]  # type: ignore[no-any-return]

    def _called_by(self, method: str) -> Model:
        """The same model, traced by calling a method."""
        called = object.__new__(type(self))
        called.__dict__.update(self.__dict__, _captures=self._captures.of(method))
        return called

    def _plainly(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The module's own output, with the edits of this model."""
        if not self._edits:
            return self._module(*args, **kwargs)
        if self._captures.open is not None:
            raise TraceError("an edited model cannot be called inside a block on it; call it before or after")
        return self._edits.call(self._captures, (args, kwargs))

    # -- what its views ask ------------------------------------------------------------------------------------------

    def _present(self, name: str, found: Any) -> Any:
        is_own = isinstance(found, types.MethodType) and found.__self__ is self._module
        return self.method(name) if is_own and not hasattr(nn.Module, name) else super()._present(name, found)

    def _path_of(self, module: nn.Module) -> str | None:
        """The first path of a module of the model; None for one that is no part of it."""
        path = self._paths.get(id(module))
        if path is None or self._find(path) is not module:
            self.__dict__["_paths"] = {id(part): path for path, part in self._module.named_modules()}
        found: str | None = self._paths.get(id(module))
        return found

    def _find(self, path: str) -> nn.Module | None:
        module: nn.Module = self._module
        try:
            return module.get_submodule(path)
        except AttributeError:
            return None

    def _view_class(self, module: nn.Module, path: str) -> type[View]:
        """The class of the view of a module."""
        views: Any = self._options["views"]
        if not isinstance(views, Mapping):
            return views  # type: ignore[no-any-return]
        found = next((cls for cls in type(module).__mro__ if cls in views), None)
        ends = [key for key in views if isinstance(key, str) and (path == key or path.endswith(f".{key}"))]
        key = max(ends, key=len, default=None) if found is None else found
        return (None if key is None else views[key]) or View

    def _words(self, path: str, module: nn.Module) -> frozenset[str]:
        """What means something else than a child in the view of a module."""
        return words(self._view_class(module, path) if path else type(self))

    def _label(self, path: str, module: nn.Module, name: str) -> str:
        """What ``print`` shows in the parentheses before a child."""
        own = f'["{name}"]' if name in self._words(path, module) else name
        return "/".join([*self._aliases.of_child(path, name), own])

    def _mounted(self, path: str) -> list[tuple[str, str]]:
        """Labels and paths of the modules that have an alias on the module at a path, without being its children."""
        return [(f"{alias}/{way}", way) for alias, way in self._aliases.below(path).items() if "." in way]

    def _check_free(self, path: str, name: str) -> None:
        """Raises: RenameError when a name that is about to be given is an alias."""
        if name in self._aliases.below(path):
            raise RenameError(f"{name!r} is an alias of {self._aliases.below(path)[name]!r}: give another name")

    def _attached(self, parent: nn.Module, name: str, before: nn.Module | None) -> None:
        """A module has become a child; taken back when an alias that falls to it cannot be given."""
        try:
            aliases = Aliases.of(self._module, self._options["rename"], self._words, strict=False)
        except RenameError:
            delattr(parent, name) if before is None else setattr(parent, name, before)
            raise
        self.__dict__["_aliases"] = self._captures.shared.aliases = aliases
        self._captures.attach(parent, name, before)

    def __reduce__(self) -> tuple[Any, ...]:
        return _wrapped, (type(self), self._module, self._options, edits_data(self.edits) if self._edits else None)


def _check_views(classes: Iterable[Any]) -> None:
    for cls in classes:
        if cls is not None and not (isinstance(cls, type) and issubclass(cls, View)):
            raise TypeError(f"views: {cls!r} is no subclass of fxsight.View")


def _wrapped(cls: type[Model], module: nn.Module, options: Mapping[str, Any], edits: Any = None) -> Model:
    """A model that was copied or pickled; its programs are captured again, or come from the cache folder."""
    model = cls(module, **options)
    if edits is not None:
        model.edits.load(edits_of(*edits), module)
    return model


def _listed(names: Iterable[str]) -> str:
    known = ", ".join(names)
    return f"there are {known}" if known else "there are none"


def save(value: Any) -> Any:
    """Keep every value in a structure: after the block they are plain tensors.  Returns: the structure.

    In a session a value may have become a plain tensor already, where a number was needed: it is kept as it is.

    Raises: NotSavedError for a value of a block that has ended; TraceError when there is no value in it.
    """
    from fxsight.value import keep, values_in

    if isinstance(value, Saved):
        return value.save()
    values = list(values_in(value))
    if not values and here().session is not None and any(isinstance(x, torch.Tensor) for x in flatten(value)[0]):
        return value  # computed already, for a number
    if not values:
        raise TraceError("nothing to save: no value of a trace in it")
    keep(value)
    return value


def session(share: bool = True) -> Session:
    """A block for several traces, of one model or of several: see ``Model.session``."""
    return Session(SHARED if share else ALONE)


def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call any Python function on the numbers of values, now: with the edits written so far, each computed once.

    Returns: what the function returns; its tensors are values of the trace again, to be written and saved; plain
    numbers and containers have ``.save()``.
    Raises: NeedsValueError in a scan; what the function raises.
    """
    from fxsight.value import apply_now

    return apply_now(function, args, kwargs)
