"""What is always true of a program; one error per broken rule.

topological     a node uses only nodes before it
named           every placeholder has a binding, no two the same
typed           every node has a spec; what is returned are values
callable        every operation calls a function a program may call, with arguments a program may have
located         every operation says which call or which pass made it
structured      inputs and outputs have as many leaves as their trees, and as many results as free leaves
"""

from __future__ import annotations

from torch import fx

from fxsight.errors import ProgramError, TextError
from fxsight.node import Fixed, output_node
from fxsight.program import Program
from fxsight.targets import check_argument, check_call, target_name


def verify(program: Program) -> Program:
    """The program itself when every rule holds.

    Raises: ProgramError, naming the rule, the node and the pass that made the program.
    """
    seen: set[fx.Node] = set()
    bound: set[str] = set()
    for node in program.graph.nodes:
        for argument in node.all_input_nodes:
            _rule(argument in seen, program, "topological", node, f"uses {argument.name} before it is made")
        if node.op == "placeholder":
            binding = node.meta.get("binding")
            _rule(binding is not None, program, "named", node, "has no binding")
            _rule(str(binding) not in bound, program, "named", node, f"is a second {binding}")
            bound.add(str(binding))
        elif node.op == "call_function":
            _check_call(program, node)
        else:
            _rule(
                node.op == "output" and node is output_node(program.graph),
                program,
                "callable",
                node,
                f"is a {node.op}",
            )
        seen.add(node)
    _check_structure(program)
    return program


def _check_call(program: Program, node: fx.Node) -> None:
    _rule("spec" in node.meta, program, "typed", node, "has no spec")
    origin = node.meta.get("origin")
    _rule(
        origin is not None and (origin.call >= 0 or origin.made_by != ""),
        program,
        "located",
        node,
        "has no origin",
    )
    try:
        target_name(node.target)
        check_call(node.target, node.args)
        check_argument(node.args)
        check_argument(node.kwargs)
    except TextError as error:
        _rule(False, program, "callable", node, str(error))


def _check_structure(program: Program) -> None:
    node = output_node(program.graph)
    _rule(
        program.inputs.size == len(program.input_leaves),
        program,
        "structured",
        node,
        "inputs do not fit their tree",
    )
    _rule(
        program.outputs.size == len(program.output_leaves),
        program,
        "structured",
        node,
        "outputs do not fit their tree",
    )
    free = sum(not isinstance(leaf, Fixed) for leaf in program.output_leaves)
    _rule(
        free <= len(program.results),
        program,
        "structured",
        node,
        f"{free} free leaves, {len(program.results)} results",
    )


def _rule(holds: bool, program: Program, rule: str, node: fx.Node, fact: str) -> None:
    if not holds:
        raise ProgramError(f"{rule}: {node.name} {fact} (program made by {program.history[-1]})")
