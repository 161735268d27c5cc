"""The addresses that browsing lists: they parse as they print, and no process or size of the inputs changes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxsight.address import Address
from fxsight.model import Model
from tests.zoo import ENTRIES, Entry

ROOT = Path(__file__).parent.parent
QUICK = ("rnn", "cnn", "opt")


def listed(name: str, batch: int, length: int) -> list[Address]:
    """Every operation that browsing finds in a model of the zoo, and every operator of each module."""
    entry = next(entry for entry in ENTRIES if entry.name == name)
    args, kwargs = entry.inputs(batch, length)
    model = Model(entry.make(), cache=False).capture(*args, **kwargs)
    program = model._captures.latest
    assert program is not None, "it was captured above"
    places = model._captures.places(program)
    operators = [places.node_places(call) for call in program.book.modules.values()]
    return [
        *(op.address for op in model.ops.find(name="*")),
        *(place.address for inside in operators for place in inside.values()),
    ]


def check_addresses(addresses: list[Address]) -> None:
    assert addresses and len(set(addresses)) == len(addresses)
    for address in addresses:
        for value in (address, *(address.at(port) for port in ("output", "input", "inputs")), address.at("output", 0)):
            assert Address.parse(str(value)) == value


@pytest.mark.parametrize("name", QUICK)
def test_another_process_with_other_sizes_lists_the_same(name: str) -> None:
    here = listed(name, 2, 5)
    check_addresses(here)
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_address_stability", name, "3", "8"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(map(str, here))


@pytest.mark.slow
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.name not in QUICK], ids=lambda entry: entry.name)
def test_every_listed_address_parses_as_it_prints(entry: Entry) -> None:
    check_addresses(listed(entry.name, 2, entry.lengths[0]))


if __name__ == "__main__":
    print(json.dumps(list(map(str, listed(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))))
