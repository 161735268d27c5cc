"""A file that was exported, loaded in a fresh Python process without fxsight, and compared there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxsight.errors import EditError

# It runs where fxsight is not, so it calls torch itself; ``aoti_load_package`` has no public name in 2.11 to 2.14.
_SCRIPT = """
import json, sys
sys.modules["fxsight"] = None
import torch
kind, path, folder, count = sys.argv[1:]

def leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [y for x in value for y in leaves(x)] if isinstance(value, (list, tuple)) else [value]

if kind == "pt2":
    run = torch.export.load(path).module()
elif kind == "aoti":
    run = torch._inductor.aoti_load_package(path)
else:
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    def run(**inputs):
        return [torch.from_numpy(x) for x in session.run(None, {k: v.numpy() for k, v in inputs.items()})]

found = []
for number in range(int(count)):
    case = torch.load(f"{folder}/{number}.pt", weights_only=True)
    with torch.no_grad():
        results = [x for x in leaves(run(**case["inputs"])) if isinstance(x, torch.Tensor)]
    wanted = case["outputs"]
    same = len(results) == len(wanted) and all(a.shape == b.shape for a, b in zip(results, wanted))
    differences = [((a.double() - b.double()).abs() / (1 + b.double().abs())).nan_to_num(0, 0, 0)
                   for a, b in zip(results, wanted)] if same else []
    equal = same and all(((a == b) | ((a != a) & (b != b))).all().item() for a, b in zip(results, wanted))
    largest = max([float(d.max()) for d in differences if d.numel()], default=0.0)
    found.append({"shapes": same, "bitwise": equal, "largest": largest})
print("\\n" + json.dumps(found))
"""

# Greedy generation with two files; the only thing that it knows of the model is the name of its cache.
_LOOP = """
import json, sys
sys.modules["fxsight"] = None
import torch
prefill, decode = (torch.export.load(path).module() for path in sys.argv[1:3])
cache, folder, count, length = sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6])

def generate(inputs):
    tokens, out = [], prefill(**inputs)
    for _ in range(length):
        token = out["logits"][:, -1:].argmax(-1)
        inputs = {**inputs, "input_ids": token}
        if "attention_mask" in inputs:
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(token)], -1)
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"][:, -1:] + 1
        tokens.append(token)
        out = decode(**inputs, **out[cache])
    return torch.cat(tokens, -1)

with torch.no_grad():
    cases = [torch.load(f"{folder}/{number}.pt", weights_only=True) for number in range(count)]
    print("\\n" + json.dumps([torch.equal(generate(case["inputs"]), case["tokens"]) for case in cases]))
"""


@dataclass(frozen=True)
class Case:
    """Inputs by name, and the tensors that the edited model returns for them."""

    inputs: Mapping[str, torch.Tensor]
    outputs: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Checked:
    """What the fresh process has found: whether all bits are the same, and the largest difference.

    largest: |a - b| / (1 + |b|), the greatest of all.
    """

    bitwise: bool
    largest: float


def check_file(kind: str, path: Path, cases: Sequence[Case], tolerance: float) -> Checked:
    """Run a file on some inputs in a process of its own.

    Raises: EditError when it cannot be loaded, or returns something else.
    """
    data = [{"inputs": dict(case.inputs), "outputs": [t.detach() for t in case.outputs]} for case in cases]
    found = _in_a_fresh_process(_SCRIPT, [kind, str(path.resolve())], data, [], path)
    largest = max(case["largest"] for case in found)
    if not all(case["shapes"] for case in found) or largest > tolerance:
        raise EditError(
            f"{path} was written and does not compute what the edited model computes: the largest difference is "
            f"{largest:.3g} and may be {tolerance:.3g}"
        )
    return Checked(all(case["bitwise"] for case in found), largest)


def check_generation(prefill: Path, decode: Path, cache: str, cases: Sequence[tuple[Any, torch.Tensor]]) -> None:
    """Generate greedily with two files in a process of its own.

    cases: inputs, and the tokens that the edited model generates.

    Raises: EditError when the tokens are others.
    """
    data = [{"inputs": _tensors(inputs), "tokens": tokens} for inputs, tokens in cases]
    given = [str(prefill.resolve()), str(decode.resolve()), cache]
    found = _in_a_fresh_process(_LOOP, given, data, [str(cases[0][1].shape[-1])], decode)
    if not all(found):
        raise EditError(f"{prefill} and {decode.name} were written, and generate other tokens than the edited model")


def _tensors(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def _in_a_fresh_process(script: str, before: list[str], data: Sequence[Any], after: list[str], path: Path) -> Any:
    """What a script prints as JSON in its last line, given files with data, one for each case."""
    with tempfile.TemporaryDirectory(prefix="fxsight-check-") as folder:
        for number, case in enumerate(data):
            torch.save(case, Path(folder) / f"{number}.pt")
        command = [sys.executable, "-c", script, *before, folder, str(len(data)), *after]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=_environment())
    if done.returncode:
        raise EditError(f"{path} was written and cannot be run in a fresh process:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    """Ours, with the number of threads we have: it decides how sums are rounded."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
