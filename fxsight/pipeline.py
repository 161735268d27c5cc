"""The pipeline, read aloud: what happens between a captured program and one that runs."""

from __future__ import annotations

from fxsight.intervention import Intervention
from fxsight.passes.drop_unused import DropUnused
from fxsight.passes.erase_boundaries import EraseBoundaries
from fxsight.passes.expand_mutations import ExpandMutations
from fxsight.passes.weave import Weave
from fxsight.rewrite import Between, Pipeline


def pipeline_for(asked: Intervention, between: Between | None = None) -> Pipeline:
    """The passes that turn a captured program (fused operators already opened) into the one ``asked`` for."""
    return Pipeline(
        Weave(asked),  # first: addresses are those of the captured program
        DropUnused(),  # after it: what is read and saved is known now
        EraseBoundaries(),  # when nothing asks for addresses any more
        ExpandMutations(),  # last: from here on order matters beyond data
        between=between,
    )
