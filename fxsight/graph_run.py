"""An edited graph of Dynamo's as a plain ``fx.GraphModule``, and what is asked each time before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxsight.captures import Captures
from fxsight.dynamo import Graph
from fxsight.edits import Edits
from fxsight.errors import EditError
from fxsight.frame import Frame
from fxsight.node import binding_of
from fxsight.program import Program

Source = tuple[int, int] | str  # a tensor of an edit: which edit, which tensor; or a weight, by name


def plain_graph(graph: Graph, program: Program, constants: Sequence[Source]) -> tuple[fx.GraphModule, list[Source]]:
    """The module that computes an edited graph: Dynamo's inputs, then further ones; and what these are."""
    root, new, made = nn.Module(), fx.Graph(), dict[fx.Node, Any]()
    inputs = [new.placeholder(node.name) for node in graph.inputs]
    own = {name: number for number, name in graph.frame.weights.items()}
    further: list[Source] = []
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        binding = binding_of(node)
        if binding.kind == "input" or (binding.kind == "weight" and binding.key in own):
            made[node] = inputs[int(binding.key) if binding.kind == "input" else own[str(binding.key)]]
        elif binding.kind != "literal":
            further.append(str(binding.key) if binding.kind == "weight" else constants[int(binding.key)])
            made[node] = new.placeholder(f"edit_{len(further)}")
    for node in program.graph.nodes:
        if node.op == "placeholder" and binding_of(node).kind == "literal":
            name = f"literal_{len(list(root.buffers()))}"
            root.register_buffer(name, program.literals[str(binding_of(node).key)])
            made[node] = new.get_attr(name)
        elif node.op == "call_function":
            made[node] = new.node_copy(node, made.__getitem__)
            made[node].meta = {}
    results: Iterator[fx.Node] = iter(program.results)
    new.output(tuple(made[next(results)] if isinstance(x, fx.Node) else x for x in graph.returned))
    return fx.GraphModule(root, new, "Edited"), further


class GraphRun:
    """What Dynamo calls for a graph: the compiled graph, if the edits and the weights are still those it was made for.

    sources: of the inputs beside Dynamo's, looked up at each run; None for a graph without edits.
    """

    def __init__(
        self, compiled: Any, captures: Captures, edits: Edits, frame: Frame, sources: Sequence[Source] | None
    ) -> None:
        self.compiled, self.captures, self.edits = compiled, captures, edits
        self.sources, self.is_edited = tuple(sources or ()), sources is not None
        self._asked = tuple(edit.asked for edit in edits)
        self._places = dict(frame.weights)
        self._weights = [(number, captures.weight(name)) for number, name in frame.weights.items()]
        self._kinds = [_kind(tensor) for tensor in self.further()]

    def further(self) -> list[torch.Tensor]:
        """The tensors of the edits, as they are now."""
        return [self.captures.weight(s) if isinstance(s, str) else self.edits[s[0]].tensors[s[1]] for s in self.sources]

    def __call__(self, *args: Any) -> Any:
        """Run it.

        Raises: EditError.
        """
        if tuple(edit.asked for edit in self.edits) != self._asked:
            raise EditError(
                "the edits of this model have changed since torch.compile compiled it; call torch.compiler.reset(), "
                "and it is compiled again"
            )
        for number, weight in self._weights:
            if args[number] is not weight:
                self._check_weights(args)
                break
        further = self.further()
        if [_kind(tensor) for tensor in further] != self._kinds:
            raise EditError(
                "a tensor of an edit has another shape, dtype or device than when it was compiled, or is trained where "
                "it was not; call torch.compiler.reset(), and it is compiled again"
            )
        return self.compiled(*args, *further)

    def _check_weights(self, args: Sequence[Any]) -> None:
        """Dynamo runs code that it has compiled for one module for others like it, too."""
        names = self.captures.weight_names()
        for number, name in self._places.items():
            now = names.get(id(args[number]))
            if now == name:
                continue
            if now is None:
                raise EditError(
                    f"a graph that was compiled with the edits of {type(self.captures.module).__name__} is run with "
                    f"other weights in the place of {name}; compile each model with edits of its own"
                )
            self._check_other(name, now)

    def _check_other(self, name: str, now: str) -> None:
        was, other = name.split("."), now.split(".")
        while was and other and was[-1] == other[-1]:
            was.pop()
            other.pop()
        path = ".".join(other)
        used = [a for edit in self.edits for a in edit.used if a.module == path or a.module.startswith(f"{path}.")]
        if self.is_edited or used or not path:
            raise EditError(
                f"Dynamo runs the code that it has compiled for {'.'.join(was)} for {path} as well, because a graph "
                "break parts them from the model, so an edit of one of them would be made in both, or in none; remove "
                "the graph break around them"
            )


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad
