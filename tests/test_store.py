"""Programs on disk: read back bit for bit, never trusted, never in the way."""

import difflib
import errno
import hashlib
import importlib
import linecache
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers  # noqa: F401 - its version counts as soon as it is imported, by whatever test
from torch import Tensor, nn

from fxsight.captures import Captures
from fxsight.errors import FxsightWarning
from fxsight.folder import Folder
from fxsight.identity import library_versions
from fxsight.parse import parse_program
from fxsight.program import Program
from fxsight.store import Store

ROOT = Path(__file__).resolve().parents[1]


class Config:
    def __init__(self, factor: float, layers: list[str]) -> None:
        self.factor = factor
        self.layers = layers


class Net(nn.Module):
    """Branches on its config and on its mode; makes tensors of its own; returns a structure."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.config = Config(factor, ["linear"])
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        hidden = self.first(x) * self.config.factor * scale
        shift = torch.tensor([1.5, -2.0, 0.0, 1.0], dtype=torch.bfloat16, device=x.device)
        mask = torch.tensor([True, False, True, True], device=x.device)
        output = self.second(hidden.relu() if self.training else hidden.tanh()) + shift
        return {"output": torch.where(mask, output, torch.tensor(0.5, device=x.device)), "all": (hidden, None)}


def net(factor: float = 2.0) -> Net:
    torch.manual_seed(0)
    return Net(factor).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def kept() -> tuple[str, bytes]:
    """A file that holds the program of ``net()`` for one input."""
    with tempfile.TemporaryDirectory() as folder:
        captured(net(), Path(folder))
        (path,) = Path(folder).glob("*.zip")
        return path.name, path.read_bytes()


def captured(module: nn.Module, folder: Path, *args: Any, **options: Any) -> tuple[int, Program]:
    """As a new process would: how many captures it took to get the program, and the program."""
    captures = Captures(module, Store(folder, **options))
    program, _ = captures.find(args or (torch.ones(2, 4),), {})
    return captures.made, program


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def filled(folder: Path, kept: tuple[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / kept[0]).write_bytes(kept[1])
    return folder / kept[0]


# ---------------------------------------------------------------------------------------------------- round trip


def test_a_program_comes_back_equal(folder: Path) -> None:
    made, program = captured(net(), folder)
    again, read = captured(net(), folder)
    assert (made, again) == (1, 0)
    assert read.text == program.text
    assert read.book == program.book
    assert read.literals.keys() == program.literals.keys()
    for name, literal in program.literals.items():
        assert read.literals[name].dtype == literal.dtype
        assert torch.equal(read.literals[name], literal)


def test_a_file_is_text_and_bytes(kept: tuple[str, bytes], folder: Path) -> None:
    with zipfile.ZipFile(filled(folder, kept)) as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == {
            "entry.json",
            "program.txt",
            "book.json",
            "literals",
        }
        assert parse_program(archive.read("program.txt").decode()).name == "Net"


def test_the_sizes_of_a_program_need_no_second_one(kept: tuple[str, bytes], folder: Path) -> None:
    filled(folder, kept)
    assert captured(net(), folder, torch.ones(1, 4))[0] == 0
    assert captured(net(), folder, torch.ones(7, 4))[0] == 0


SCRIPT = """
import hashlib, sys, warnings
import torch
from fxsight.model import Model
from model_of_another_process import Net

torch.manual_seed(0)
net = Net()
for mode in (True, False):
    model = Model(net.train(mode))
    for length in (3, 5):
        x = torch.arange(8.0 * length).reshape(2, length, 4) / 10
        with model.trace(x, backend="eager"):
            output = model.output.save()
        assert torch.equal(output, net(x))
        digest = hashlib.sha256(bytes(output.detach().view(torch.uint8).flatten().tolist())).hexdigest()
        print(model._captures.made, digest)
"""

MODEL = """
import torch
from torch import nn

def shift(x):
    return x + torch.tensor([1.0, 2.0, 3.0, 4.0])

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = shift(self.linear(x))
        return y.relu() if self.training else y.tanh()
"""


def start(tmp_path: Path, folder: Path) -> subprocess.Popen[str]:
    environment = {"FXSIGHT_CACHE_DIR": str(folder), "PYTHONPATH": str(tmp_path)}
    return subprocess.Popen(
        [sys.executable, "-W", "error::fxsight.errors.FxsightWarning", "-c", SCRIPT],
        env={**os.environ, **environment},
        cwd=tmp_path,  # not the checkout, which ``-c`` would find first
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(process: subprocess.Popen[str]) -> list[tuple[str, str]]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return [(made, digest) for made, digest in (line.split() for line in out.splitlines())]


def differences(folder: Path) -> str:
    """Where files of one identity differ, line by line."""
    kept: dict[str, list[list[str]]] = {}
    for path in sorted(folder.glob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            lines = [line for name in archive.namelist() for line in re.split(r"\\n|}, ", repr(archive.read(name)))]
        kept.setdefault(path.name.partition("-")[0], []).append(lines)
    pairs = [lists for lists in kept.values() if len(lists) > 1]
    return "\n".join(line for first, second, *_ in pairs for line in difflib.unified_diff(first, second, n=0))


def test_two_processes_at_once_and_one_after_them(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "model_of_another_process.py").write_text(MODEL)
    shutil.copytree(ROOT / "fxsight", tmp_path / "fxsight")  # a checkout may be edited meanwhile
    both = [start(tmp_path, folder), start(tmp_path, folder)]
    first, second = map(printed, both)
    assert [digest for _, digest in first] == [digest for _, digest in second]
    assert len(names(folder)) == 2, f"one file for each mode, and nothing temporary:\n{differences(folder)}"

    third = printed(start(tmp_path, folder))
    assert [made for made, _ in third] == ["0", "0", "0", "0"]
    assert [digest for _, digest in third] == [digest for _, digest in first]


# ---------------------------------------------------------------------------------------------------- bad files

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one byte changed": lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    "no archive": lambda data: b"not a program\n" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_replaced(kept: tuple[str, bytes], folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = filled(folder, kept)
    path.write_bytes(damage(kept[1]))
    assert captured(net(), folder)[0] == 1
    assert path.read_bytes() == kept[1]
    assert captured(net(), folder)[0] == 0


def rewritten(data: bytes, changes: dict[str, Callable[[str], str]], path: Path) -> bytes:
    """The archive with some members changed."""
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            change = changes.get(name)
            archive.writestr(name, change(content.decode()) if change else content)
    data = path.read_bytes()
    path.unlink()
    return data


FOREIGN: dict[str, dict[str, Callable[[str], str]]] = {
    "another format": {"entry.json": lambda text: text.replace('"format": 2', '"format": 0')},
    "another identity": {"entry.json": lambda text: text.replace('"identity": "', '"identity": "0')},
    "no text": {"program.txt": lambda text: "import os\n"},
    "unknown operator": {"program.txt": lambda text: text.replace("aten.tanh.", "aten.no_such_thing.")},
    "forbidden function": {"program.txt": lambda text: text.replace("aten.tanh.default", "os.system")},
    "no book": {"book.json": lambda text: "[{}]"},
    "half a book": {"book.json": lambda text: text[: len(text) // 2]},
    "an entry that is no JSON": {"entry.json": lambda text: text + "}"},
    "an entry of another kind": {"entry.json": lambda text: "[1, 2]"},
    "an entry without sources": {"entry.json": lambda text: text.replace('"sources"', '"origins"')},
    "a source that is not there": {"entry.json": lambda text: text.replace("test_store.py", "no_such_file.py")},
    "literals of another size": {"entry.json": lambda text: text.replace('"shape": [4]', '"shape": [5]')},
    "literals of another type": {"entry.json": lambda text: text.replace('"bfloat16"', '"no_such_type"')},
}


@pytest.mark.parametrize("changes", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_file_is_removed(
    kept: tuple[str, bytes], folder: Path, changes: dict[str, Callable[[str], str]]
) -> None:
    good = filled(folder, kept)
    data = rewritten(kept[1], changes, folder / "rewritten")
    digest = hashlib.sha256(data).hexdigest()[:16]
    foreign = folder / f"{kept[0].partition('-')[0]}-{digest}.zip"
    good.unlink()
    foreign.write_bytes(data)
    assert captured(net(), folder)[0] == 1
    assert names(folder) == [kept[0]]


def test_a_file_without_all_its_members_is_removed(kept: tuple[str, bytes], folder: Path) -> None:
    good = filled(folder, kept)
    with zipfile.ZipFile(good) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    good.unlink()
    for missing in members:
        with zipfile.ZipFile(folder / "partial", "w") as archive:
            for name, content in members.items() - {(missing, members[missing])}:
                archive.writestr(name, content)
        data = (folder / "partial").read_bytes()
        (folder / "partial").unlink()
        bad = folder / f"{kept[0].partition('-')[0]}-{hashlib.sha256(data).hexdigest()[:16]}.zip"
        bad.write_bytes(data)
        assert captured(net(), folder)[0] == 1, missing
        assert names(folder) == [kept[0]], missing
        good.unlink()


def unreadable(folder: Path) -> Callable[[Path], bytes]:
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.parent == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    return refuse


def test_a_file_that_may_not_be_read_is_left_and_captured_anew(
    kept: tuple[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(folder, kept)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", unreadable(folder))
        assert captured(net(), folder)[0] == 1
    assert names(folder) == [kept[0]]


def test_a_folder_in_the_place_of_a_file_is_no_file(kept: tuple[str, bytes], folder: Path) -> None:
    (folder / kept[0]).mkdir(parents=True)
    with pytest.warns(FxsightWarning, match="captured programs are not kept"):
        assert captured(net(), folder)[0] == 1
    assert names(folder) == [kept[0]]


def test_a_file_that_goes_away_meanwhile(
    kept: tuple[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(folder, kept)
    listed = Folder._entries

    def listed_and_lost(files: Folder, pattern: str) -> list[Path]:
        found = listed(files, pattern)
        path.unlink(missing_ok=True)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "_entries", listed_and_lost)
        assert captured(net(), folder)[0] == 1


def test_what_lies_beside_is_left_alone(kept: tuple[str, bytes], folder: Path) -> None:
    filled(folder, kept)
    (folder / "notes.txt").write_text("mine")
    (folder / "a-folder.zip").mkdir()
    assert captured(net(), folder)[0] == 0
    assert captured(net(3.0), folder)[0] == 1
    assert {"notes.txt", "a-folder.zip"} <= set(names(folder))


# ---------------------------------------------------------------------------------------------------- identity


def changed(change: Callable[[Net], object]) -> Net:
    module = net()
    change(module)
    return module


def untie(module: Net) -> None:
    module.second.bias = module.first.bias[:4].detach().requires_grad_()  # type: ignore[assignment]


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "training": lambda: net().train(),
    "one part training": lambda: changed(lambda n: n.first.train()),
    "config": lambda: net(3.0),
    "list in the config": lambda: changed(lambda n: n.config.layers.append("more")),
    "dtype": lambda: net().double(),
    "attribute": lambda: changed(lambda n: setattr(n, "extra", (1, 2))),
    "function": lambda: changed(lambda n: setattr(n, "activation", torch.relu)),
    "buffer": lambda: changed(lambda n: n.register_buffer("extra", torch.ones(2))),
    "strides": lambda: changed(
        lambda n: setattr(n.first, "weight", nn.Parameter(torch.ones(4, 6).t(), requires_grad=False))
    ),
    "tied": lambda: changed(lambda n: setattr(n, "same", n.first.bias)),
    "meta": lambda: net().to("meta"),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_another_module_is_captured_anew(kept: tuple[str, bytes], folder: Path, make: Callable[[], nn.Module]) -> None:
    filled(folder, kept)
    dtype = next(make().parameters()).dtype
    device = next(make().parameters()).device
    x = torch.ones(2, 4, dtype=dtype, device=device)
    assert captured(make(), folder, x)[0] == 1
    assert captured(make(), folder, x)[0] == 0
    assert captured(net(), folder)[0] == 0


@pytest.mark.parametrize("library", ["torch", "transformers", "fxsight", "python"])
def test_another_version_is_captured_anew(kept: tuple[str, bytes], folder: Path, library: str) -> None:
    filled(folder, kept)
    versions = {**library_versions(), library: "99.0"}
    assert captured(net(), folder, versions=versions)[0] == 1
    assert captured(net(), folder, versions=versions)[0] == 0
    assert captured(net(), folder)[0] == 0


def test_another_default_dtype_is_another_program(kept: tuple[str, bytes], folder: Path) -> None:
    filled(folder, kept)
    torch.set_default_dtype(torch.float64)
    try:
        module = net().float()
        assert captured(module, folder, torch.ones(2, 4, dtype=torch.float32))[0] == 1
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_recurrent_layer_is_kept(folder: Path) -> None:
    x = torch.ones(2, 3, 4)
    assert captured(nn.LSTM(4, 3), folder, x)[0] == 1
    assert captured(nn.LSTM(4, 3), folder, x)[0] == 0
    assert captured(nn.LSTM(4, 3, bias=False), folder, x)[0] == 1


def test_other_weights_are_the_same_program(kept: tuple[str, bytes], folder: Path) -> None:
    filled(folder, kept)
    torch.manual_seed(1)
    assert captured(Net().eval(), folder)[0] == 0
    assert captured(net().requires_grad_(False), folder)[0] == 0


HELPER = "def factor():\n    return {}\n"
WITH_HELPER = """
from torch import nn
from {name} import factor

class Scaled(nn.Module):
    def forward(self, x):
        return x * factor()
"""


class Files:
    """A model in two files, imported as a new process would import them."""

    def __init__(self, folder: Path, name: str) -> None:
        self.helper, self.model = folder / f"{name}_helper.py", folder / f"{name}_model.py"
        self.helper.write_text(HELPER.format(2))
        self.model.write_text(WITH_HELPER.format(name=self.helper.stem))

    def module(self) -> nn.Module:
        for file in (self.helper, self.model):
            sys.modules.pop(file.stem, None)
        importlib.invalidate_caches()
        linecache.clearcache()
        made: nn.Module = importlib.import_module(self.model.stem).Scaled()
        return made


@pytest.fixture
def files(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # else an edit within a second is not seen
    return Files(tmp_path, f"written_for_{re.sub(r'[^a-z]+', '_', request.node.name.removeprefix('test_'))}")


def test_an_edited_model_is_captured_anew(folder: Path, files: Files) -> None:
    assert captured(files.module(), folder)[0] == 1
    assert captured(files.module(), folder)[0] == 0
    files.model.write_text(files.model.read_text().replace("x * factor()", "x + factor()"))
    assert captured(files.module(), folder)[0] == 1
    assert captured(files.module(), folder)[0] == 0


def test_an_edited_function_of_another_file_is_captured_anew(folder: Path, files: Files) -> None:
    assert captured(files.module(), folder)[0] == 1
    files.helper.write_text(HELPER.format(3))
    made, program = captured(files.module(), folder)
    assert made == 1
    assert "aten.mul.Tensor(alias, 3)" in program.text
    assert len(names(folder)) == 1, "the stale file is gone"


@pytest.mark.parametrize("which", ["model", "helper"])
@pytest.mark.parametrize("edit", ["return 7 * ", "return ) "])
def test_a_file_edited_since_its_import_keeps_nothing(folder: Path, files: Files, which: str, edit: str) -> None:
    module = files.module()
    edited = getattr(files, which)
    edited.write_text(edited.read_text().replace("return ", edit))
    linecache.clearcache()
    assert captured(module, folder)[0] == 1
    assert not folder.exists()


# ------------------------------------------------------------------------------------------ not for other processes


class Holder(nn.Module):
    """Multiplies by tensors that others can change."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [torch.ones(4)]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.held[0]


class Taking(nn.Module):
    def forward(self, x: Tensor, anything: object) -> Tensor:
        return x + 1


def hooked() -> nn.Module:
    module = net()
    module.first.register_forward_hook(lambda module, args, output: output * 2)
    return module


def written_in_no_file() -> nn.Module:
    scope: dict[str, Any] = {"nn": nn, "__name__": "nowhere"}
    exec("class Nowhere(nn.Module):\n    def forward(self, x):\n        return x + 1", scope)
    module: nn.Module = scope["Nowhere"]()
    return module


def with_an_empty_cell() -> nn.Module:
    """With a function one of whose names has no value yet."""

    def function() -> Any:
        return late

    module = changed(lambda n: setattr(n, "function", function))
    if torch.ones(()) < 0:
        late = 1
    return module


class Shy:
    """Cannot be looked at."""

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("do not look")


def with_a_lock() -> nn.Module:
    return changed(lambda n: setattr(n, "lock", threading.Lock()))


LOCAL: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "a held tensor": lambda: (Holder(), ()),
    "an object as input": lambda: (Taking(), (torch.ones(2, 4), object())),
    "hooks": lambda: (hooked(), ()),
    "no file": lambda: (written_in_no_file(), ()),
    "an attribute of this process": lambda: (with_a_lock(), ()),
    "a function that is not complete": lambda: (with_an_empty_cell(), ()),
    "an attribute that cannot be looked at": lambda: (changed(lambda n: setattr(n, "shy", Shy())), ()),
}


@pytest.mark.parametrize("make", LOCAL.values(), ids=LOCAL.keys())
def test_what_another_process_cannot_share_is_not_kept(
    folder: Path, make: Callable[[], tuple[nn.Module, tuple[Any, ...]]]
) -> None:
    module, args = make()
    assert captured(module, folder, *args)[0] == 1
    assert not folder.exists()


# ---------------------------------------------------------------------------------------------------- folders


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Store().folder == Path(os.environ["FXSIGHT_CACHE_DIR"])
    monkeypatch.delenv("FXSIGHT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert Store().folder == tmp_path / "fxsight"


def test_a_folder_that_cannot_be_made_warns_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    captures = Captures(net(), Store(tmp_path / "file" / "cache"))
    with pytest.warns(FxsightWarning) as caught:
        captures.find((torch.ones(2, 4),), {})
        captures.find((torch.ones(2, 4), 2.0), {})
    assert captures.made == 2
    (warning,) = caught
    assert str(warning.message) == (
        f"captured programs are not kept: [Errno 20] Not a directory: '{tmp_path / 'file' / 'cache'}'; "
        "set FXSIGHT_CACHE_DIR to a folder that can be written"
    )


def refusing(number: int) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


def test_a_folder_that_cannot_be_listed_is_no_folder(
    kept: tuple[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(folder, kept)
    monkeypatch.setattr(Path, "glob", refusing(errno.EACCES))
    with pytest.warns(FxsightWarning, match="Permission denied"):
        assert captured(net(3.0), folder)[0] == 1
    assert len(names(folder)) == 2, "it could be written"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do everything")
def test_a_folder_without_rights_is_no_folder(kept: tuple[str, bytes], folder: Path) -> None:
    filled(folder, kept)
    folder.chmod(0)
    try:
        with pytest.warns(FxsightWarning, match="Permission denied"):
            assert captured(net(), folder)[0] == 1
    finally:
        folder.chmod(0o700)


def test_a_folder_that_can_only_be_read_is_read(
    kept: tuple[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(folder, kept)
    monkeypatch.setattr(tempfile, "mkstemp", refusing(errno.EROFS))
    monkeypatch.setattr(os, "utime", refusing(errno.EROFS))
    assert captured(net(), folder)[0] == 0
    with pytest.warns(FxsightWarning, match="Read-only file system"):
        assert captured(net(3.0), folder)[0] == 1


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", refusing(errno.ENOSPC))
    with pytest.warns(FxsightWarning, match="No space left on device"):
        assert captured(net(), folder)[0] == 1
    assert names(folder) == []


def test_what_was_used_least_recently_goes_first(kept: tuple[str, bytes], folder: Path) -> None:
    path = filled(folder, kept)
    os.utime(path, (1, 1))
    captured(net(3.0), folder)
    (other,) = set(names(folder)) - {path.name}
    os.utime(folder / other, (2, 2))
    assert captured(net(), folder)[0] == 0, "used: now the later of the two"

    size = sum((folder / name).stat().st_size for name in names(folder))
    captured(net(4.0), folder, limit=size + 100)
    assert other not in names(folder)
    assert path.name in names(folder)
    assert len(names(folder)) == 2

    captured(net(5.0), folder, limit=0)
    assert len(names(folder)) == 1, "the newest stays, whatever its size"


def test_what_interrupted_writers_left_goes(folder: Path) -> None:
    folder.mkdir()
    for name, age in (("old.tmp", 7200), ("young.tmp", 60)):
        (folder / name).write_text("half a program")
        os.utime(folder / name, (time.time() - age,) * 2)
    captured(net(), folder)
    assert {name for name in names(folder) if name.endswith(".tmp")} == {"young.tmp"}
