"""``edited.export(path)``: the edited model as a file that runs without fxsight, and a manifest beside it."""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fxsight import _torch
from fxsight.captures import Captures
from fxsight.edit_text import edits_data
from fxsight.edits import Edits, PlainCall
from fxsight.errors import EditError, FoldError
from fxsight.export_check import Case, Checked, check_file
from fxsight.fold import largest_difference
from fxsight.identity import library_versions
from fxsight.node import Fixed
from fxsight.other_sizes import other_sizes
from fxsight.plain_module import PlainModule, bounds, dynamic_shapes, free_dims, plain_module
from fxsight.program import Program
from fxsight.rows import Call
from fxsight.sizes import bind_sizes
from fxsight.tree import flatten
from fxsight.version import __version__

Kind = Literal["pt2", "aoti", "onnx"]
TOLERANCE: Mapping[str, float] = {"pt2": 1e-5, "aoti": 1e-4, "onnx": 1e-4}
FOLDED: Mapping[torch.dtype, float] = {  # of a folded module, by the dtype of what it returns
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
_CASES = 3  # the example and two other sizes


@dataclass(frozen=True)
class Export:
    """A written file.

    path, manifest: of the file, and of the JSON file beside it.  checked: what a fresh process has found; None where
    it was not asked.
    """

    path: Path
    manifest: Path
    checked: Checked | None


def export_edited(
    captures: Captures,
    edits: Edits,
    call: Call,
    path: str | Path,
    kind: Kind | None,
    check: bool,
    others: Sequence[Call] | None = None,
) -> Export:
    """Write the edited model as a file; see ``Model.export``.

    others: calls of other sizes to compare with; made of the example where none are given.
    """
    path = Path(path)
    kind = kind or _kind_of(path)
    made = edits.prepared(captures, call, "eager")
    leaves = flatten(call)[0]
    constants = {edits[i].names[j]: edits[i].tensors[j] for i, j in made.places}
    plain = plain_module(made.executable.program, captures.module, constants)
    cases = _cases(captures, edits, made, _calls(made, call, others), plain)
    with torch.no_grad():
        exported = _exported(made.executable.program, plain, leaves)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(exported, path, kind)
    checked = check_file(kind, path, [case for _, case in cases], TOLERANCE[kind]) if check else None
    content = _manifest(made, plain, edits, captures, kind, path)
    content["checked"] = _checked_data(checked, [sizes for sizes, _ in cases])
    manifest = path.with_name(f"{path.name}.json")
    manifest.write_text(json.dumps(content, indent=1) + "\n")
    return Export(path, manifest, checked)


def _kind_of(path: Path) -> Kind:
    if path.suffix not in (".pt2", ".onnx"):
        raise EditError(f"{path.name}: exports end in .pt2 or .onnx; an AOTInductor package is format='aoti'")
    return "onnx" if path.suffix == ".onnx" else "pt2"


def _exported(program: Program, plain: PlainModule, leaves: Sequence[Any]) -> Any:
    """The program of torch.export.

    Raises: EditError where a size cannot stay free, or torch.export does not take the program.
    """
    shapes = dynamic_shapes(program, plain.inputs)
    try:
        exported = torch.export.export(plain.module, (), plain.arguments(leaves), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever torch.export raises
        raise EditError(f"torch.export does not take the edited model: {error}") from error
    nodes = {node.name: node for node in exported.graph.nodes}
    for name, number in plain.inputs.items():
        shape = nodes[name].meta["val"].shape
        for place, dim in free_dims(program, number):
            if isinstance(shape[place], int):
                raise EditError(
                    f"torch.export does not keep the size {dim} of {name} free: it holds for {shape[place]}; "
                    "where that is 1, give an example in which it is more"
                )
    return exported


def _write(exported: Any, path: Path, kind: Kind) -> None:
    """Raises: EditError where a library is missing, or does not take the program."""
    if kind == "pt2":
        torch.export.save(exported, path)
        return
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of what it calls itself
            _write_onnx(exported, path) if kind == "onnx" else _torch.write_aoti(exported, path)
    except ImportError as error:
        raise EditError(f"{error}; an export to ONNX needs: pip install 'fxsight[export]'") from error
    except Exception as error:  # whatever torch raises
        raise EditError(f"torch cannot write the edited model as {kind}: {error}") from error


def _write_onnx(exported: Any, path: Path) -> None:
    for name in ("onnxscript", "onnxruntime"):  # said before the long work
        importlib.import_module(name)
    torch.onnx.export(exported, (), str(path), dynamo=True, verbose=False)


def _calls(made: PlainCall, call: Call, others: Sequence[Call] | None) -> list[tuple[Any, Call]]:
    """The example, and calls at sizes that were not seen at the export, with these sizes."""
    leaves, tree = flatten(call)
    if others is not None:
        return [(None, call), *((bind_sizes(made.base, flatten(other)[0]), other) for other in others)]
    return [
        (None, call),
        *((sizes, tree.build(other)) for sizes, other in other_sizes(made.base, leaves, _CASES - 1)),
    ]


def _cases(captures: Captures, edits: Edits, made: PlainCall, calls: Sequence[Any], plain: PlainModule) -> list[Any]:
    """Sizes, inputs and results to compare with.

    Raises: EditError when an edit does not hold for other sizes.
    """
    cases: list[Any] = []
    for sizes, call in calls:
        leaves, tree = flatten(call)
        args, kwargs = tree.build(leaves)  # a cache grows in a call: one of its own
        with torch.no_grad():
            if captures.find(args, kwargs)[0] is not made.base:
                continue  # a forward of another kind: one prompt alone
            out = edits.call(captures, (args, kwargs))
        tensors = [x for x in flatten(out)[0] if isinstance(x, torch.Tensor)]
        cases.append((sizes, Case(plain.arguments(leaves), tensors)))
    return cases


def check_folded(captures: Captures, edits: Edits, call: Call, folded: nn.Module) -> None:
    """A module with the edits in its weights computes what the edited model computes, at other sizes, too.

    Raises: FoldError.
    """
    leaves, tree = flatten(call)
    made = edits.prepared(captures, call, "eager")
    for other in (leaves, *(other for _, other in other_sizes(made.base, leaves, _CASES - 1))):
        args, kwargs = tree.build(other)
        with torch.no_grad():
            pair = [flatten(each)[0] for each in (folded(*args, **kwargs), edits.call(captures, (args, kwargs)))]
        found, dtypes = largest_difference(*pair), {x.dtype for x in pair[1] if isinstance(x, torch.Tensor)}
        allowed = max((FOLDED.get(dtype, 0) for dtype in dtypes), default=0)
        if found > allowed:
            raise FoldError(
                f"the folded module does not compute what the edited model computes (largest difference {found:.3g}, "
                f"allowed {allowed:.3g}): something else uses the edited value, or it is changed in place for others; "
                "assign it instead"
            )


# -- the manifest ----------------------------------------------------------------------------------------------------


def _manifest(
    made: PlainCall, plain: PlainModule, edits: Edits, captures: Captures, kind: Kind, path: Path
) -> dict[str, Any]:
    program = made.executable.program
    specs = {name: program.input_leaves[number] for name, number in plain.inputs.items()}
    fixed = [leaf.value for leaf in program.input_leaves if isinstance(leaf, Fixed)]
    sizes = {
        str(dim): bounds(program, dim) for number in plain.inputs.values() for _, dim in free_dims(program, number)
    }
    return {
        "format": "fxsight export",
        "version": 1,
        "kind": kind,
        "file": path.name,
        "model": type(captures.module).__name__,
        "made_by": {**library_versions(), "fxsight": __version__},
        "inputs": {name: str(spec) for name, spec in specs.items()},
        "fixed": [
            value if value is None or isinstance(value, (bool, int, float, str)) else str(value) for value in fixed
        ],
        "outputs": program.outputs.children[0].text(
            ["tensor" if x is None else repr(x.value) for x in program.output_leaves]
        ),
        "sizes": sizes,
        "conditions": sorted(map(str, program.guards)),
        "edits": edits_data(edits)[0],
        "addresses": [str(address) for edit in edits for address in edit.addresses],
        "parameters": dict(plain.parameters),
        "weights_sha256": fingerprint(captures.module),
    }


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _checked_data(checked: Checked | None, sizes: Sequence[Any]) -> Any:
    if checked is None:
        return None
    others = [each for each in sizes if each is not None]
    return {"other_sizes": others, "bitwise": checked.bitwise, "largest_difference": checked.largest}
