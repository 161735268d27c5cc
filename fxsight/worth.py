"""Which regions of a program are worth a compiler's time.

The code of one block serves all blocks that are alike; what stands before, between and after them is compiled for one
place each, seconds for a few operators that take microseconds. Such a region runs op by op where a compiler could save
no more than ``SHARE`` of a run, short or long: calls of its operators, reading and writing of what they make.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

from torch import fx

from fxsight.cost import Sizes, bytes_of, cost_of, is_product
from fxsight.effects import storages
from fxsight.node import binding_of
from fxsight.program import Program
from fxsight.regions import Region
from fxsight.spec import TensorSpec

SHARE = 0.005
# Of a processor with a few threads; rather too fast a run than too slow, so that in doubt it is compiled.
CALL = 5e-6  # seconds to call an operator
MOVED = 1e10  # bytes that a simple operator reads and writes in a second
READ = 2e10  # bytes of weights that are read in a second
FLOPS = 1e11  # operations on numbers in a second
SHORT, LONG = 1, 32  # every free size of the two runs that are weighed


def worthwhile(program: Program, regions: Sequence[Region]) -> list[Region]:
    """The regions, with those outside of blocks marked that are not worth compiling.

    A program without blocks, or with a tensor elsewhere than on the processor, is compiled whole.
    """
    specs = [node.meta.get("spec") for node in program.graph.nodes]
    is_here = all(spec.device == "cpu" for spec in specs if isinstance(spec, TensorSpec))
    if not is_here or not any(region.place for region in regions):
        return list(regions)
    runs = [{size.name: length for size in program.sizes} for length in (SHORT, LONG)]

    def is_compiled(region: Region) -> bool:
        return bool(region.place) or not all(_takes(program, s, _saved(region.nodes, s) / SHARE) for s in runs)

    return [replace(region, is_compiled=is_compiled(region)) for region in regions]


def _takes(program: Program, sizes: Sizes, seconds: float) -> bool:
    """Whether a run certainly takes so long; of its operators as many are looked at as are needed to tell."""
    nodes = program.graph.nodes
    weights = (n for n in nodes if n.op == "placeholder" and binding_of(n).kind != "input")
    read = accumulate(bytes_of(n.meta["spec"], sizes) for n in weights)
    computed = accumulate(cost_of([n], sizes).flops for n in nodes)
    return any(size >= seconds * READ for size in read) or any(flops >= seconds * FLOPS for flops in computed)


def _saved(nodes: Iterable[fx.Node], sizes: Sizes) -> float:
    """Seconds that a compiler could save at most: all calls but views and matrix products, all that is made in them."""
    fused = [n for n in nodes if not is_product(n)]
    made = [n for n in fused if storages(n) - {s for a in n.all_input_nodes for s in storages(a)}]
    moved = 2 * math.fsum(bytes_of(n.meta.get("spec"), sizes) for n in made)
    return CALL * len(made) + moved / MOVED
