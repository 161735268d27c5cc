"""A model with edits that stay: made, kept in files, compiled, folded into weights, compared and exported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from torch import nn

from fxsight.auto import check_backend
from fxsight.captures import Captures
from fxsight.compare import Diff, diff
from fxsight.dropin import drop_in
from fxsight.edit_file import export_path, read_edits, write_edits
from fxsight.edits import Edits, PlainTrace
from fxsight.errors import EditFileError, TraceError
from fxsight.export import Export, check_folded, export_edited
from fxsight.export_steps import Steps, export_steps
from fxsight.fold import fold_into_weights
from fxsight.parameters import EditParameters
from fxsight.root import Root
from fxsight.rows import Call


class Editable(Root):
    """The view of a whole model that can have edits, which every forward of it makes; the module is not touched."""

    def __init__(self, module: nn.Module, captures: Captures, options: Mapping[str, Any]) -> None:
        self.__dict__["_edits"] = Edits()
        super().__init__(module, captures, options)

    def __call__(self, *args: Any, hook: Any = None, **kwargs: Any) -> Any:
        """The module's output, with the edits of this model.

        Raises: EditError where this forward does not have the places of an edit; TraceError for an edited model inside
        a block on it; CaptureError.
        """
        return self._plainly(args, kwargs) if self._edits else super().__call__(*args, hook=hook, **kwargs)

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

    def load_edits(self, path: str | Path) -> Self:
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

    def import_edits(self, name: str, export_dir: str | Path | None = None, variant: str = "__default__") -> Self:
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
        check_backend(backend)
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

    # -- an edited copy, and its calls ------------------------------------------------------------------------------

    def _edited(self) -> Self:
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

    def _plainly(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The module's own output, with the edits of this model."""
        if not self._edits:
            return self._module(*args, **kwargs)
        if self._captures.open is not None:
            raise TraceError("an edited model cannot be called inside a block on it; call it before or after")
        return self._edits.call(self._captures, (args, kwargs))


def _listed(names: Iterable[str]) -> str:
    known = ", ".join(names)
    return f"there are {known}" if known else "there are none"
