"""The passes: program → program, one file each, in the order of ``fxsight.pipeline``."""

if __name__ != "fxsight.passes":
    raise ImportError("import fxsight.passes, not passes")

from fxsight.passes.cancel_stack import CancelStack as CancelStack
from fxsight.passes.drop_unused import DropUnused as DropUnused
from fxsight.passes.erase_boundaries import EraseBoundaries as EraseBoundaries
from fxsight.passes.expand_mutations import ExpandMutations as ExpandMutations
from fxsight.passes.joint_gradient import JointGradient as JointGradient
from fxsight.passes.narrow_columns import NarrowColumns as NarrowColumns
from fxsight.passes.narrow_reads import NarrowReads as NarrowReads
from fxsight.passes.open_fused import OpenFused as OpenFused
from fxsight.passes.open_stages import OpenStages as OpenStages
from fxsight.passes.skip_overwritten import SkipOverwritten as SkipOverwritten
from fxsight.passes.use_known import UseKnown as UseKnown
from fxsight.passes.weave import Weave as Weave
from fxsight.rewrite import Pass

PASSES: tuple[type[Pass], ...] = (
    OpenFused,
    Weave,
    CancelStack,
    UseKnown,
    JointGradient,
    SkipOverwritten,
    DropUnused,
    EraseBoundaries,
    OpenStages,
    NarrowReads,
    NarrowColumns,
    ExpandMutations,
)
