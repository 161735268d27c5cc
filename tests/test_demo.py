"""The tour of ``docs/demo`` shows what it says, and ``docs/architecture.md`` knows every file."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

import fxsight

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fxsight", "fxsight/compat", "passes")
TOUR = ROOT / "docs" / "demo" / "tour.py"


def load_tour() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fxsight_demo_tour", TOUR)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tour() -> ModuleType:
    pytest.importorskip("transformers")
    return load_tour()


@pytest.fixture(scope="module")
def demo(tour: ModuleType) -> Any:
    return tour.load_demo()


# -- what is computed ------------------------------------------------------------------------------------------------


def test_the_prompts_are_alike(tour: ModuleType, demo: Any) -> None:
    assert demo.prompt.shape == demo.donor.shape == (1, 8)
    assert [demo.words(demo.prompt)[at] for at in tour.POSITIONS] == [" Eiffel", " Tower", " of"]


def test_predictions_before_and_after(tour: ModuleType, demo: Any) -> None:
    ((word, chance), *_) = demo.top(tour.ask(demo.model, demo.prompt))
    assert word == " Paris"
    assert chance == pytest.approx(0.982, abs=0.002)

    logits, program = tour.ablate(demo.model, demo.prompt)
    assert demo.top(logits)[0][0] == " Delhi"
    (again,) = program(demo.prompt, use_cache=False)
    assert again.equal(logits)

    state = tour.keep_states(demo.model, demo.donor)[2]
    ((word, chance), *_) = demo.top(tour.patch(demo.model, demo.prompt, 2, -1, state))
    assert word == " Rome"
    assert chance == pytest.approx(0.991, abs=0.002)


def test_a_steered_model_says_another_city(tour: ModuleType, demo: Any) -> None:
    language = fxsight.LanguageModel(demo.net, tokenizer=demo.tokenizer)
    clean, donor = (tour.keep_states(demo.model, ids)[2][:, -1] for ids in (demo.prompt, demo.donor))
    assert tour.say(language, tour.PROMPT) == f"{tour.PROMPT} Paris."
    assert tour.say(tour.steer(language, donor - clean), tour.PROMPT) == f"{tour.PROMPT} Rome."


def test_a_trace_without_edits_is_the_module_to_the_bit(tour: ModuleType, demo: Any) -> None:
    assert tour.ask(demo.model, demo.prompt).equal(demo.model(demo.prompt).logits[0, -1])


def test_the_fact_moves_from_the_subject_to_the_last_position(tour: ModuleType, demo: Any) -> None:
    grid = tour.patch_grid(demo)
    assert grid[0] == pytest.approx([0.052, 0.733, 0.000], abs=0.002)
    assert grid[1] == pytest.approx([0.000, 0.013, 0.000], abs=0.002)
    assert grid[2] == pytest.approx([0.000, 0.000, 0.991], abs=0.002)
    assert grid[3] == pytest.approx([0.000, 0.000, 0.991], abs=0.002)


def test_attention_moves_it(tour: ModuleType, demo: Any) -> None:
    pattern = tour.look_inside_attention(demo.model, demo.prompt, 2)
    assert pattern.shape == (1, 4, 8, 8)
    assert pattern.sum(-1).allclose(pattern.new_ones(()))
    assert pattern[0, :, -1].argmax(-1).tolist() == [2, 4, 2, 1]


def test_what_is_read_early_runs_less(tour: ModuleType, demo: Any) -> None:
    counts = [tour.operations(tour.read_block(demo.model, demo.prompt, block)[1]) for block in range(4)]
    steps = {later - earlier for earlier, later in pairwise(counts)}
    assert len(steps) == 1 and steps.pop() > 0, f"every block adds the same operations: {counts}"


def test_the_edit_stands_in_the_program(tour: ModuleType, demo: Any) -> None:
    _, program = tour.ablate(demo.model, demo.prompt)
    lines = list(tour.program_lines(program, "transformer.h.3.mlp"))
    (edit,) = [line for line in lines if "setitem" in line]
    line = 1 + TOUR.read_text().splitlines().index("        model.transformer.h[-1].mlp.output[:] = 0")
    assert edit.endswith(f"tour.py:{line}")


def test_the_error_is_at_the_users_line(tour: ModuleType, demo: Any) -> None:
    error = tour.raised(lambda: tour.impossible(demo.model, demo.prompt))
    assert isinstance(error, fxsight.CausalityError)
    text = tour.error_text(error)
    assert "    model.transformer.h[0].output = late" in text.splitlines()
    assert "transformer.h.0:output -> transformer.h.3:output -> transformer.h.0:output" in text


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_every_section_but_the_compiled_one(tour: ModuleType, demo: Any) -> None:
    console = Console(file=io.StringIO(), width=140)
    for show in tour.SECTIONS.values():
        if show is not tour.show_tiers:
            show(console, demo)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "' Paris'",
        "0.733",
        "equal to the bit",
        "torch_tanh_0",
        "# made by: capture, Weave",
        "CausalityError",
    ):
        assert part in shown


@pytest.mark.slow
def test_the_whole_tour() -> None:
    done = subprocess.run([sys.executable, str(TOUR)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "inductor" in done.stdout and "tolerance 1e-04" in done.stdout


# -- the documents ---------------------------------------------------------------------------------------------------


def files_in_the_table() -> list[str]:
    text = (ROOT / "docs" / "architecture.md").read_text()
    return re.findall(r"^\| `((?:fxsight|fxsight/compat|passes)/\w+\.py)` \| \S", text, re.MULTILINE)


def test_the_table_of_files_is_complete() -> None:
    listed = files_in_the_table()
    there = {f"{folder}/{path.name}" for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
    assert set(listed) == there
    assert len(listed) == len(set(listed))


def test_imports_go_up_the_table() -> None:
    listed = files_in_the_table()
    below = [
        f"{file} imports {other}"
        for number, file in enumerate(listed)
        for other in imports(ROOT / file)
        if other not in listed[:number]
    ]
    assert below == []


def imports(path: Path) -> Iterator[str]:
    """The files of ours that a file names in ``from ... import`` at its top level."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fxsight":
            _, *parts = str(node.module).split(".")
            folder, names = "fxsight", parts or [alias.name for alias in node.names]
            if names[0] == "passes":
                folder, names = "passes", names[1:] or ["__init__"]
            yield from (f"{folder}/{name}.py" for name in names)


def test_links_in_the_documents_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
