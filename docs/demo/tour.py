"""What fxsight does, shown on the small GPT-2 that lies in ``docs/demo/model``.

``sh .ci/demo`` sets everything up and runs this file; ``python docs/demo/tour.py`` runs it alone.  It takes about a
minute on two slow cores, most of it for importing torch and for Inductor's compiler (``--no-inductor`` leaves that
out).  The captured program is kept on disk, so a second run is quicker.

The functions that come first are what a user would write; the others show what they return.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import getsource
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console
from rich.style import Style
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.utils import logging

import fxsight
from fxsight.lower import TOLERANCE
from fxsight.run import Executable

MODEL_DIR: Final = Path(__file__).resolve().parent / "model"
PROMPT: Final = "The Eiffel Tower is in the city of"
DONOR: Final = "The Colosseum is in the city of"  # as many tokens as PROMPT
DONOR_ANSWER: Final = " Rome"
POSITIONS: Final = (1, 2, 7)  # of the subject's two tokens, and of the last token of the prompt

# ------------------------------------------------------------------------------------------- what a user writes


def ask(model: fxsight.Model, ids: Tensor) -> Tensor:
    """Read the logits of the next token, f32[vocabulary]."""
    with model.trace(ids, use_cache=False):
        logits = model.lm_head.output[0, -1].save()
    return cast(Tensor, logits)


def ablate(model: fxsight.Model, ids: Tensor) -> tuple[Tensor, Executable]:
    """Set the last MLP's output to zero; the logits of the next token, and the program that ran."""
    with model.trace(ids, use_cache=False) as tracer:
        model.transformer.h[-1].mlp.output[:] = 0
        logits = model.lm_head.output[0, -1].save()
    return logits, tracer.program


def keep_states(model: fxsight.Model, ids: Tensor) -> list[Tensor]:
    """Read the output of every block, f32[1, length, 64] each."""
    with model.trace(ids, use_cache=False):
        states = [block.output.save() for block in model.transformer.h]
    return states


def patch(model: fxsight.Model, ids: Tensor, block: int, position: int, state: Tensor) -> Tensor:
    """Put another prompt's state behind one block at one position; the logits of the next token."""
    with model.trace(ids, use_cache=False):
        model.transformer.h[block].output[:, position] = state[:, position]
        logits = model.lm_head.output[0, -1].save()
    return cast(Tensor, logits)


def look_inside_attention(model: fxsight.Model, ids: Tensor, block: int) -> Tensor:
    """Open the fused attention of one block: where each position looks, f32[1, heads, length, length]."""
    with model.trace(ids, use_cache=False):
        function = model.transformer.h[block].attn.source.attention_interface_0
        fused = function.source.torch_nn_functional_scaled_dot_product_attention_0
        pattern = fused.source.softmax_0.output.save()
    return cast(Tensor, pattern)


def read_block(model: fxsight.Model, ids: Tensor, block: int) -> tuple[Tensor, Executable]:
    """Read one block's output and nothing behind it; with the program that ran."""
    with model.trace(ids, use_cache=False) as tracer:
        state = model.transformer.h[block].output.save()
    return state, tracer.program


def halve_attention(model: fxsight.Model, ids: Tensor, backend: Any) -> tuple[Tensor, Executable]:
    """An edit inside block 1, run by one of the two tiers; all logits, f32[batch, length, vocabulary]."""
    with model.trace(ids, use_cache=False, backend=backend) as tracer:
        model.transformer.h[1].attn.source.attention_interface_0.output[0][:] *= 0.5
        logits = model.lm_head.output.save()
    return logits, tracer.program


def steer(model: fxsight.LanguageModel, vector: Tensor) -> fxsight.LanguageModel:
    """A model in which a vector, f32[1, 64], is added behind block 2 at the last position, always."""
    with model.edit() as edited:
        model.transformer.h[2].output[:, -1] += vector
    return cast(fxsight.LanguageModel, edited)


def say(model: fxsight.LanguageModel, prompt: str) -> str:
    """What the model makes of a prompt; an edited model makes its edits at every step."""
    with model.generate(prompt, max_new_tokens=2) as tracer:
        ids = tracer.result.save()
    return str(model.tokenizer.decode(ids[0]))


def impossible(model: fxsight.Model, ids: Tensor) -> None:
    """Write to block 0 what only block 3 knows."""
    with model.trace(ids, use_cache=False):
        late = model.transformer.h[3].output
        model.transformer.h[0].output = late


# ---------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Demo:
    """The shipped model, wrapped and as it is, its tokenizer, and two prompts as i64[1, 8]."""

    net: GPT2LMHeadModel
    model: fxsight.Model
    tokenizer: Any
    prompt: Tensor
    donor: Tensor

    def token(self, text: str) -> int:
        """The one token of a word."""
        (number,) = self.tokenizer(text)["input_ids"]
        return int(number)

    def words(self, ids: Tensor) -> list[str]:
        """Each token of i64[1, length] as text."""
        return [str(self.tokenizer.decode([number])) for number in ids[0].tolist()]

    def top(self, logits: Tensor, count: int = 3) -> list[tuple[str, float]]:
        """The likeliest next tokens of f32[vocabulary] and their probabilities."""
        found = logits.detach().softmax(-1).topk(count)
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [(str(self.tokenizer.decode([number])), chance) for number, chance in pairs]

    def chance(self, logits: Tensor, word: str) -> float:
        """The probability of one word as the next token."""
        return float(logits.detach().softmax(-1)[self.token(word)])


def load_demo(folder: Path = MODEL_DIR) -> Demo:
    """Load the model the ordinary way and wrap it."""
    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    net = GPT2LMHeadModel.from_pretrained(folder).requires_grad_(False)  # comes in evaluation mode
    prompt, donor = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (PROMPT, DONOR))
    return Demo(net, fxsight.Model(net), tokenizer, prompt, donor)


# -------------------------------------------------------------------------------------------------- the numbers


def patch_grid(demo: Demo) -> list[list[float]]:
    """P(DONOR_ANSWER) after patching; a row for each block, a column for each of POSITIONS."""
    model, states = demo.model, keep_states(demo.model, demo.donor)
    return [
        [demo.chance(patch(model, demo.prompt, block, at, state), DONOR_ANSWER) for at in POSITIONS]
        for block, state in enumerate(states)
    ]


def operations(executable: Executable) -> int:
    """How many operations a finished program runs."""
    return sum(node.op == "call_function" for node in executable.program.graph.nodes)


def milliseconds(run: Callable[[], object], times: int = 20) -> float:
    """The median time of a call."""
    taken: list[float] = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return 1000 * median(taken)


def program_lines(executable: Executable, place: str) -> Iterator[str]:
    """The lines of a program's text that belong to a module or to the user; ``...`` stands for the others.

    What the comments say in braces (strides, shared memory, model's lines) is left out, but for the user's line.
    """
    skipped = False
    for line in str(executable).splitlines():
        user = re.search(r"user='[^']*?([^/']+:\d+)'", line)
        if not line.startswith("    ") or "# " not in line or ": 'weight" in line or ": 'input" in line:
            continue
        if place in line or user is not None:
            yield from ["    ..."] * skipped
            yield re.sub(r"\s+# ", "    # ", re.sub(r"  \{.*\}$", "", line)) + (f"  {user[1]}" if user else "")
        skipped = place not in line and user is None


def error_text(error: Exception) -> str:
    """What Python prints for an uncaught error, without the frames inside the library."""
    found = traceback.TracebackException.from_exception(error)
    own = [frame for frame in found.stack if frame.filename == __file__]
    frames = traceback.StackSummary.from_list(own[-1:]).format()
    return "".join(["Traceback (most recent call last):\n", *frames, *found.format_exception_only()]).rstrip()


def raised(call: Callable[[], object]) -> fxsight.FxsightError:
    """The error of a call that must fail."""
    try:
        call()
    except fxsight.FxsightError as error:
        return error
    raise AssertionError("nothing was raised")


# ------------------------------------------------------------------------------------------------ what is shown


def show_code(console: Console, function: Callable[..., object]) -> None:
    """The ``with`` block of a function."""
    source = textwrap.dedent(getsource(function).partition('"""\n')[2]).partition("\nreturn")[0]
    console.print(Syntax("", "python", theme="ansi_dark").highlight(textwrap.indent(source.rstrip(), "    ")))


def show_lines(console: Console, lines: Iterable[str], mark: str = "", style: str = "bold yellow") -> None:
    """Lines as they are, cut at the border; those with ``mark`` stand out."""
    for line in lines:
        stands_out = style if mark and mark in line else ""
        console.print(Text(line, style=stands_out), no_wrap=True, overflow="ellipsis")
    console.print()


def plain_table(*columns: str) -> Table:
    """A table whose columns after the first are aligned to the right."""
    table = Table(box=None, padding=(0, 2))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", header_style="bold")
    return table


def show_predictions(console: Console, demo: Demo) -> None:
    """The three likeliest next words before and after two edits."""
    state = keep_states(demo.model, demo.donor)[2]
    rows = [
        ("as trained", ask(demo.model, demo.prompt)),
        ("last MLP's output set to 0", ablate(demo.model, demo.prompt)[0]),
        ("block 2, last position, from the Colosseum", patch(demo.model, demo.prompt, 2, -1, state)),
    ]
    console.print(Text(f"{PROMPT} ...\n", style="italic"))
    table = plain_table("", "1st", "", "2nd", "", "3rd", "")
    for name, logits in rows:
        best = [cell for word, chance in demo.top(logits) for cell in (repr(word), f"{chance:.3f}")]
        table.add_row(name, Text(best[0], style="bold green"), *best[1:])
    console.print(table)
    itself = demo.model(demo.prompt).logits[0, -1]
    is_same = torch.equal(rows[0][1], itself)
    console.print(f"\nThe first row and the module called as it is: {'equal to the bit' if is_same else 'DIFFERENT'}.")
    console.print("The second row is this block:\n")
    show_code(console, ablate)


def show_grid(console: Console, demo: Demo) -> None:
    """Where the answer lies on its way through the blocks."""
    console.print(f"{PROMPT!r} with one state of {DONOR!r}: P({DONOR_ANSWER!r})\n")
    words = demo.words(demo.prompt)
    table = plain_table("patched behind", *(f"{at}: {words[at]!r}" for at in POSITIONS))
    for block, row in enumerate(patch_grid(demo)):
        cells = [Text(f" {chance:.3f} ", style=_shade(chance)) for chance in row]
        table.add_row(f"block {block}", *cells)
    console.print(table)
    console.print("\nThe fact starts at the subject's tokens and ends at the last position. One cell:\n")
    show_code(console, patch)


def show_attention(console: Console, demo: Demo) -> None:
    """What the last position looks at in the block where the fact arrives."""
    pattern = look_inside_attention(demo.model, demo.prompt, 2)[0, :, -1]
    console.print("Between blocks 1 and 2 the fact moves. Block 2, what the last position looks at:\n")
    table = plain_table("", *map(repr, demo.words(demo.prompt)))
    for head, row in enumerate(pattern.tolist()):
        table.add_row(f"head {head}", *(Text(f" {weight:.2f} ", style=_shade(weight)) for weight in row))
    console.print(table)
    console.print("\nAttention is one fused operator here; it was opened at this one place:\n")
    show_code(console, look_inside_attention)


def _shade(chance: float) -> Style:
    """Grey for 0, green for 1."""
    low, high = (60, 60, 60), (0, 150, 70)
    red, green, blue = (round(a + (b - a) * chance) for a, b in zip(low, high, strict=True))
    return Style.parse(f"white on rgb({red},{green},{blue})")


def show_operations(console: Console, demo: Demo) -> None:
    """The edited layer's source with its operations, and one of them."""
    mlp = demo.model.transformer.h[-1].mlp
    console.print("print(model.transformer.h[-1].mlp.ops)\n", style="cyan")
    show_lines(console, str(mlp.ops).splitlines(), mark="->")
    console.print("print(model.transformer.h[-1].mlp.act.ops.torch_tanh_0)\n", style="cyan")
    show_lines(console, str(mlp.act.ops.torch_tanh_0).splitlines(), mark="-->")


def show_program(console: Console, demo: Demo) -> None:
    """The finished program of the ablation, around the edit."""
    _, program = ablate(demo.model, demo.prompt)
    text = str(program).splitlines()
    console.print(f"print(tracer.program): here the last MLP, of {len(text)} lines; yours stand out\n", style="cyan")
    header = [line for line in text if line.startswith(("# program", "# sizes", "# where", "# made by"))]
    show_lines(console, header + list(program_lines(program, f"transformer.h.{_last(demo)}.mlp")), mark="user_")


def _last(demo: Demo) -> int:
    return len(demo.model.transformer.h) - 1


def show_tiers(console: Console, demo: Demo) -> None:
    """The same edit by the eager and the Inductor tier."""
    show_code(console, halve_attention)
    both = torch.cat([demo.prompt, demo.donor])
    table = plain_table("tier", "first run, s", "later runs, ms")
    found: list[Tensor] = []
    for tier in ("eager", "inductor"):
        start = time.perf_counter()
        logits, program = halve_attention(demo.model, both, tier)
        first = time.perf_counter() - start
        found.append(logits.detach())
        table.add_row(tier, f"{first:.1f}", f"{milliseconds(partial(program, both, use_cache=False)):.2f}")
    console.print(table)
    difference = (found[0] - found[1]).abs().max().item()
    tolerance = TOLERANCE[found[0].dtype][1]
    console.print(
        f"\nLargest difference of {found[0].numel():,} logits: {difference:.1e}, tolerance {tolerance:.0e}.\n"
    )


def show_early_stop(console: Console, demo: Demo) -> None:
    """How much of the model runs for a read at each depth."""
    show_code(console, read_block)
    table = plain_table("what is read", "operations that run", "ms")
    programs = {f"block {n}": read_block(demo.model, demo.prompt, n)[1] for n in range(_last(demo) + 1)}
    for name, program in programs.items():
        took = milliseconds(partial(program, demo.prompt, use_cache=False))
        table.add_row(name, str(operations(program)), f"{took:.2f}")
    console.print(table)
    console.print("\nNothing had to be asked for: what nobody reads is not in the program.\n")


def show_edited_model(console: Console, demo: Demo) -> None:
    """A steered model: what it says, what differs in its program, and the file it is written to."""
    language = fxsight.LanguageModel(demo.net, tokenizer=demo.tokenizer)
    clean, donor = (keep_states(demo.model, ids)[2][:, -1] for ids in (demo.prompt, demo.donor))
    edited = steer(language, donor - clean)
    show_code(console, steer)
    for name, model in (("as trained", language), ("edited", edited)):
        console.print(Text.assemble(f"  {name:<12}", (say(model, PROMPT), "bold green" if model is edited else "")))
    console.print("\nprint(edited.diff())\n", style="cyan")
    show_lines(console, str(edited.diff()).splitlines(), mark="user_")
    with TemporaryDirectory() as folder:
        made = edited.export(Path(folder) / "steered.pt2", [PROMPT, DONOR], use_cache=False)
        size = made.path.stat().st_size / 2**20
    same = "equal to the bit" if made.checked is not None and made.checked.bitwise else "DIFFERENT"
    console.print('edited.export("steered.pt2", [PROMPT, DONOR], use_cache=False)\n', style="cyan")
    console.print(f"{size:.1f} MiB that run without fxsight; a fresh process has loaded it and compared: {same}.\n")


def show_causality(console: Console, demo: Demo) -> None:
    """What a write that needs its own consequences says."""
    show_code(console, impossible)
    error = raised(lambda: impossible(demo.model, demo.prompt))
    console.print(Text(textwrap.indent(error_text(error), "    "), style="red"))
    console.print("\nRaised at that line, before anything is computed. In two traces it can be done, as above.\n")


SECTIONS: Final[dict[str, Callable[[Console, Demo], None]]] = {
    "Predictions before and after an edit": show_predictions,
    "Every block, three positions": show_grid,
    "Inside fused attention": show_attention,
    "The operations of the edited layer": show_operations,
    "The program that ran": show_program,
    "What nobody reads is not computed": show_early_stop,
    "An edit that stays": show_edited_model,
    "An edit that cannot be": show_causality,
    "Two tiers, one answer": show_tiers,
}


def tour(console: Console, with_inductor: bool = True) -> None:
    """Load the model and show everything."""
    torch.set_num_threads(1)  # a small model is faster so, and shares the machine better
    start = time.perf_counter()
    demo = load_demo()
    loaded = time.perf_counter()
    ask(demo.model, demo.prompt)
    console.print(
        f"A GPT-2 of {_last(demo) + 1} blocks, loaded in {loaded - start:.1f} s, "
        f"captured (or found on disk) in {time.perf_counter() - loaded:.1f} s.\n"
    )
    for number, (title, show) in enumerate(SECTIONS.items(), 1):
        if with_inductor or show is not show_tiers:
            console.rule(f"[bold]{number}  {title}", align="left")
            console.print()
            show(console, demo)
    console.print(f"[dim]{time.perf_counter() - start:.0f} s in all; this is docs/demo/tour.py[/dim]")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="What fxsight does, on a small GPT-2.")
    parser.add_argument("--no-inductor", action="store_true", help="leave out the compiled tier, which takes longest")
    given = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    tour(console, with_inductor=not given.no_inductor)


if __name__ == "__main__":
    main()
