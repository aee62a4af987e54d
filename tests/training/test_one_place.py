"""Holds that the programs write in one place, by reading what they call."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import balanced_learning.training

TRAINING = Path(balanced_learning.training.__file__).parent
EXAMPLES = Path(__file__).parents[2] / "examples"
EXCEPT = {
    "distributed.py": {"open"},  # the null device
    "endings.py": {"open"},  # the null device
    "files.py": {"fdopen", "link", "mkdir", "open", "open_memmap", "rename", "replace"},  # the one place
    "opening.py": {"fdopen", "open"},  # reads
    "output_folder.py": {"ftruncate", "mkdir", "open", "pwrite"},  # the lock
    "shapes.py": {"mkdir"},  # in a new folder
    "tensorboard.py": {"SummaryWriter"},  # appends to a file of its own
}

WRITERS = {"dump", "imsave", "save", "savefig", "savetxt", "savez", "savez_compressed", "tofile", "writetofile"}
OTHERS = {
    *("fdopen", "ftruncate", "hardlink_to", "link", "makedirs", "mkdir", "mkdtemp", "mkfifo", "mkstemp", "pwrite"),
    *("rename", "symlink", "symlink_to", "touch", "truncate", "write_bytes", "write_text"),
    *("FileHandler", "NamedTemporaryFile", "SummaryWriter"),
}


def writes(source: str) -> Iterator[str]:
    """The calls that write a file. A library may write into ``file``, which :mod:`files` has opened."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        is_method = isinstance(call.func, ast.Attribute)
        name = call.func.attr if is_method else getattr(call.func, "id", "")
        of = ast.unparse(call.func.value) if is_method else ""
        arguments = [ast.unparse(argument) for argument in call.args]
        words = [
            each.value for each in ast.walk(call) if isinstance(each, ast.Constant) and isinstance(each.value, str)
        ]
        if (
            (name in WRITERS and is_method and arguments and "file" not in arguments)
            or (name in OTHERS and of != "files" and (is_method or name != "write_text"))
            or (of in ("os", "shutil") and name.startswith(("copy", "move", "rename", "replace")))
            or (name == "open" and (of == "os" or any(len(word) < 4 and set(word) & set("wax+") for word in words)))
            or (name in ("memmap", "open_memmap") and set(words) != {"r"})
            or (name == "load" and {"r+", "w+"} & set(words))
        ):
            yield name


PROGRAMS = [*TRAINING.rglob("*.py"), *EXAMPLES.glob("*.py")]


@pytest.mark.parametrize("path", PROGRAMS, ids=[path.name for path in PROGRAMS])
def test_programs_write_in_one_place(path):
    assert set(writes(path.read_text())) <= EXCEPT.get(path.name, set())


@pytest.mark.parametrize(
    "line",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('r+b')",
        "os.open(path, flags)",
        "path.write_text(text)",
        "(folder / 'a').write_bytes(text)",
        "torch.save(content, path)",
        "image.save(path)",
        "figure.savefig(path, dpi=120)",
        "np.save(folder / 'a.npy', array)",
        "json.dump(rows, open(path))",
        "(folder / 'a').mkdir()",
        "os.replace(a, b)",
        "path.parent.touch()",
        "shutil.copy(a, b)",
        "makedirs(folder)",
        "Path(a).rename(b)",
        "SummaryWriter(folder)",
        "np.memmap(path, np.uint8)",
        "np.load(path, mmap_mode='r+')",
        "open_memmap(path, mode='r+' if to_fill else 'r')",
    ],
)
def test_a_call_that_writes_is_found(line):
    assert list(writes(line))


@pytest.mark.parametrize(
    "line",
    [
        "open(path)",
        "path.open('rb')",
        "np.load(path)",
        "files.write_text(path, text)",
        "write_text(path, text)",
        "sheet.save(file, 'PNG')",
        "text.replace('a', 'b')",
        "dataclasses.replace(config, run=run)",
        "torch.zeros(3).copy_(x)",
        "image.copy()",
        "run.save()",
        "np.memmap(path, np.uint8, mode='r')",
        "np.load(path, mmap_mode='r')",
    ],
)
def test_a_call_that_reads_is_none(line):
    assert not list(writes(line))
