"""The pipeline, read aloud: what happens between a captured program and one that runs."""

from __future__ import annotations

from collections.abc import Mapping

from fxsight.intervention import Intervention
from fxsight.passes.drop_unused import DropUnused
from fxsight.passes.erase_boundaries import EraseBoundaries
from fxsight.passes.expand_mutations import ExpandMutations
from fxsight.passes.joint_gradient import JointGradient
from fxsight.passes.narrow_columns import NarrowColumns
from fxsight.passes.narrow_reads import NarrowReads
from fxsight.passes.open_stages import OpenStages
from fxsight.passes.skip_overwritten import SkipOverwritten
from fxsight.passes.use_known import UseKnown
from fxsight.passes.weave import Weave
from fxsight.rewrite import Between, Pass, Pipeline, Together

# What Inductor is not given to compute: its kernels are others in any case.
LESS = Together((NarrowReads(), NarrowColumns()))


def pipeline_for(
    asked: Intervention,
    known: UseKnown | None = None,
    joint: JointGradient | None = None,
    between: Between | None = None,
    narrow: Pass | None = None,
) -> Pipeline:
    """The passes that turn a captured program (fused operators already opened) into the one ``asked`` for.

    known: what the body has had computed already.  joint: where the body asks for gradients.  narrow: where fewer rows
    and columns may be computed.
    """
    return Pipeline(
        Weave(asked, keeps=True),  # first: addresses are those of the captured program
        *([DropUnused(), narrow] if narrow is not None else []),  # before gradients: theirs have fewer rows, too
        *([known] if known is not None else []),  # before anything is dropped that only known values needed
        *([joint] if joint is not None else []),  # before anything that only gradients need is dropped
        SkipOverwritten(),  # before what it frees is dropped
        DropUnused(),  # after it: what is read and saved is known now
        EraseBoundaries(),  # when nothing asks for addresses any more
        ExpandMutations(),  # last: from here on order matters beyond data
        between=between,
    )


def woven_pass(asked: Intervention) -> Pass:
    """The same up to where ``narrow`` is applied: to find out how far it may go."""
    return Together((Weave(asked, keeps=True), DropUnused()))


def joint_for(asked: Intervention, sizes: Mapping[str, int]) -> JointGradient | None:
    """The pass that writes the body's backward passes out; None for one without.  sizes: of the inputs."""
    if not asked.backwards:
        return None
    return JointGradient(dict(sizes), tuple(name for name, _ in asked.sizes), dict(asked.shared))


def demand_pipeline(asked: Intervention, known: UseKnown | None = None, joint: JointGradient | None = None) -> Pipeline:
    """The same up to where a body's in-place calls are still values: what is computed now can be used again."""
    before = [step for step in (known, joint) if step is not None]
    return Pipeline(Weave(asked), *before, SkipOverwritten(), DropUnused())


def sources_pipeline(asked: Intervention) -> Pipeline:
    """The same without what loses where values come from: for what asks which weights they are made of."""
    return Pipeline(Weave(asked, keeps=True), DropUnused(), EraseBoundaries())


def cell_pass(asked: Intervention) -> Pass:
    """The same up to where order begins to matter: for one cell of a sweep, whose program is then cut into parts."""
    return Together((Weave(asked), SkipOverwritten(), DropUnused(), EraseBoundaries(), OpenStages()))
