"""What users hold: ``Model`` around any ``nn.Module``; a ``View`` of each of its parts hangs below it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

from torch import nn

from fxsight.artifacts import Artifacts
from fxsight.auto import check_backend
from fxsight.background import Background, Workers
from fxsight.captures import Captures
from fxsight.edit_text import edits_data, edits_of
from fxsight.editable import Editable
from fxsight.grid import Grid
from fxsight.inputs import Inputs
from fxsight.invokes import Invokes, own_arguments
from fxsight.plan import Plan
from fxsight.rename import Rename
from fxsight.root import Views
from fxsight.scan import Scan
from fxsight.sessions import Session
from fxsight.store import Store
from fxsight.sweep import plan_sweep, split_arguments
from fxsight.tracer import Tracer
from fxsight.verbs import session

_BACKGROUND = Background()


class Model(Editable):
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
        artifacts = Artifacts.on_disk() if cache else Artifacts()
        workers = None if background is None else Workers(background)
        captures = Captures(module, Store() if cache else None, artifacts, workers)
        captures.shared.narrow = narrow
        options = {
            "cache": cache,
            "rename": rename or {},
            "views": views or {},
            "methods": tuple(methods),
            "narrow": narrow,
            "background": background,
        }
        super().__init__(module, captures, options)

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
        check_backend(backend)
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

    def capture(self, *args: Any, **kwargs: Any) -> Self:
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

    def session(self, share: bool = True) -> Session:
        """A block for several traces: values of one are used in the next without saving; they run when it ends.

        share: whether traces on the same inputs compute what they have in common once, with the same bits;
        ``session.explain()`` says what was shared.
        """
        return session(share)

    def __reduce__(self) -> tuple[Any, ...]:
        return _wrapped, (type(self), self._module, self._options, edits_data(self.edits) if self._edits else None)


def _wrapped(cls: type[Model], module: nn.Module, options: Mapping[str, Any], edits: Any = None) -> Model:
    """A model that was copied or pickled; its programs are captured again, or come from the cache folder."""
    model = cls(module, **options)
    if edits is not None:
        model.edits.load(edits_of(*edits), module)
    return model
