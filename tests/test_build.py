"""Tests of what is built and what that needs, mostly with compilers that only note how they were called."""

import os
import shutil
import subprocess
import sys
import tarfile
from email import message_from_string
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[1]
PARTS = ("setup.py", "build_backend.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
NOTED_CALL = r"""#!/bin/sh
line=$(basename "$0")
for word; do line="$line	$word"; done
printf '%s\n' "$line" >> "$CALLS"
"""
FAKE_COMPILER = NOTED_CALL + 'while [ $# -gt 1 ]; do [ "$1" != -o ] || : > "$2"; shift; done\n'
FAKE_LAUNCHER = NOTED_CALL + 'exec "$@"\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for part in PARTS:
        shutil.copy(ROOT / part, tmp_path)
    for folder in ("balanced_learning", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def build(source: Path, mode: str, **environment: str) -> tuple[bool, str, str]:
    """Builds a wheel. Returns whether that succeeded, the wheel's name, and what was printed."""
    command = [sys.executable, "-c", "import build_backend; build_backend.build_wheel('dist')"]
    environment = {**os.environ, "BALANCED_LEARNING_BUILD": mode, "PYTHONPATH": str(source), **environment}
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    wheels = [file.name for file in source.glob("dist/*.whl")]
    return result.returncode == 0, "".join(wheels), result.stdout + result.stderr


def write_program(file: Path, script: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(script)
    file.chmod(0o755)


def replace(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


@pytest.fixture
def machine(source: Path, monkeypatch) -> Path:
    """Prepares a machine with a torch for CUDA, ccache, c++, g++ and nvcc, all of them fakes. Returns their folder."""
    for name in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    (source / "torch/include/torch/csrc/stable").mkdir(parents=True)
    (source / "torch/lib").mkdir()
    for file in ("__init__.py", "lib/libtorch_cuda.so"):
        (source / "torch" / file).touch()
    programs = source / "bin"
    for name in ("c++", "g++", "nvcc"):
        write_program(programs / name, FAKE_COMPILER)
    write_program(programs / "ccache", FAKE_LAUNCHER)
    monkeypatch.setenv("CALLS", str(source / "calls"))
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return programs


def calls(machine: Path, program: str) -> tuple[list[list[str]], list[str]]:
    """The arguments of the calls of a program that compile, and those of the one that links."""
    lines = [line.split("\t") for line in (machine.parent / "calls").read_text().splitlines()]
    lines = [arguments for name, *arguments in lines if name == program and arguments != ["--list-gpu-arch"]]
    (link,) = (arguments for arguments in lines if "-c" not in arguments)
    return sorted((arguments for arguments in lines if "-c" in arguments), key=str), link


def test_none_gives_a_pure_wheel(source: Path) -> None:
    built, wheel, _ = build(source, "none")
    assert built
    assert wheel.endswith("-py3-none-any.whl")


@pytest.mark.parametrize("compiler", ["no-such-compiler", "no-such-compiler -m64", "env no-such-compiler -m64"])
def test_auto_does_without_a_compiler(source: Path, compiler: str) -> None:
    built, wheel, printed = build(source, "auto", CXX=compiler)
    assert built
    assert wheel.endswith("-py3-none-any.whl")
    assert "kernels for nothing; cpu would need a C++ compiler: there is no no-such-compiler" in printed


def test_auto_survives_a_compiler_that_fails(source: Path) -> None:
    built, _, printed = build(source, "auto", CXX="false", CUDA_HOME="/nowhere")
    assert built
    assert "the cpu kernels do not compile" in printed


@pytest.mark.parametrize(
    ("mode", "environment", "words"),
    [
        ("cpu", {"CXX": "false"}, "the cpu kernels do not compile"),
        ("cpu", {"CXX": "no-such-compiler"}, "BALANCED_LEARNING_BUILD=cpu needs a C++ compiler"),
        ("cpu", {"CXX": "no-such-launcher true"}, "there is no no-such-launcher"),
        ("cuda", {"CXX": "true", "CUDA_HOME": "/nowhere"}, "there is no /nowhere/bin/nvcc"),
        ("gpu", {}, "BALANCED_LEARNING_BUILD must be one of auto, none, cpu, cuda, got gpu"),
    ],
)
def test_what_is_asked_for_and_fails_fails(source: Path, mode: str, environment: dict[str, str], words: str) -> None:
    built, wheel, printed = build(source, mode, **environment)
    assert not built
    assert not wheel
    assert words in printed


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_kernels_make_a_wheel_for_every_python(source: Path) -> None:
    built, wheel, printed = build(source, "cpu")
    assert built, printed
    assert "-py3-none-" in wheel
    assert not wheel.endswith("-any.whl")


def test_launcher_and_flags_of_the_user_are_honoured(source: Path, machine: Path) -> None:
    flags = {"CXXFLAGS": "-O1 -DNAME='a b'", "LDFLAGS": "-L/mine -Wl,-z,now"}
    built, _, printed = build(source, "cpu", CXX="ccache g++ -m64", **flags)
    assert built, printed
    compiles, link = calls(machine, "ccache")
    sources = [[word for word in call if word.endswith(".cpp")] for call in compiles]
    assert sources == [["csrc/balanced_l1_cpu.cpp"], ["csrc/sample_cpu.cpp"]]
    for call in [*compiles, link]:
        assert call[:2] == ["g++", "-m64"]
        assert call.index("-O3") < call.index("-O1") == call.index("-DNAME=a b") - 1
        assert call[1:] in [*calls(machine, "g++")[0], calls(machine, "g++")[1]]
    assert "-L/mine" not in compiles[0] + compiles[1]
    objects = [word for word in link if word.endswith(".o")]
    assert len(objects) == 2
    assert link.index("-L/mine") == link.index("-Wl,-z,now") - 1 < link.index(objects[0])
    assert link.index("-L/mine") < link.index(f"-L{source}/torch/lib")


def test_nvcc_hands_the_flags_of_the_user_to_the_compiler_of_the_host(source: Path, machine: Path) -> None:
    flags = {"CXXFLAGS": "-O1 -DNAME='a b'", "LDFLAGS": "-Wl,-z,now"}
    built, _, printed = build(source, "cuda", CXX="ccache g++ -m64", **flags)
    assert built, printed
    compiles, link = calls(machine, "nvcc")
    assert len(compiles) == 2
    for call in [*compiles, link]:
        assert "-ccbin=g++" in call
        host = [word.removeprefix("-Xcompiler=") for word in call if word.startswith("-Xcompiler=")]
        assert host[-4:] == (
            ["-m64", "-O1", "'-DNAME=a b'", r"-Wl\,-z\,now"]
            if call is link
            else ["-fvisibility=hidden", "-m64", "-O1", "'-DNAME=a b'"]
        )


def test_nvcc_chooses_the_compiler_of_the_host_without_cxx(source: Path, machine: Path) -> None:
    assert build(source, "cuda")[0]
    compiles, link = calls(machine, "nvcc")
    assert not any(word.startswith("-ccbin") for word in [*compiles[0], *compiles[1], *link])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({}, "nvcc"),
        ({"CUDA_HOME": "", "CUDA_PATH": ""}, "nvcc"),
        ({"CUDA_PATH": "path"}, "path"),
        ({"CUDA_HOME": "home", "CUDA_PATH": "path"}, "home"),
    ],
)
def test_nvcc_is_looked_for_in_cuda_home_then_on_path(
    source: Path, machine: Path, names: dict[str, str], expected: str
) -> None:
    for folder in ("home", "path"):
        write_program(source / folder / "bin/nvcc", FAKE_COMPILER.replace('$(basename "$0")', folder))
    environment = {name: folder and str(source / folder) for name, folder in names.items()}
    built, _, printed = build(source, "cuda", **environment)
    assert built, printed
    assert len(calls(machine, expected)[0]) == 2


def test_auto_says_where_nvcc_is_missing(source: Path, machine: Path) -> None:
    (machine / "nvcc").unlink()
    replace(source / "setup.py", "/usr/local/cuda/", "/nowhere/")
    built, _, printed = build(source, "auto")
    assert built
    assert "kernels for cpu; cuda would need nvcc: there is no /nowhere/bin/nvcc and none on PATH" in printed


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        ("9.0", ["90,sm_90"]),
        ("7.5 8.0+PTX;9.0a ", ["75,sm_75", "80,sm_80", "80,compute_80", "90a,sm_90a"]),
        ("10.0f;12.0+PTX", ["100f,sm_100f", "120,sm_120", "120,compute_120"]),
        ("9.0a+PTX;8.6", ["90a,sm_90a", "90a,compute_90a", "86,sm_86"]),
    ],
)
def test_architectures(source: Path, machine: Path, architectures: str, expected: list[str]) -> None:
    built, _, printed = build(source, "cuda", TORCH_CUDA_ARCH_LIST=architectures)
    assert built, printed
    assert architectures in printed
    for call in calls(machine, "nvcc")[0]:
        targets = [word.removeprefix("-gencode=arch=compute_") for word in call if word.startswith("-gencode")]
        assert targets == [target.replace(",", ",code=") for target in expected]


def test_an_older_nvcc_is_asked_for_what_it_knows(source: Path, machine: Path) -> None:
    listed = 'if [ "$1" = --list-gpu-arch ]; then printf "compute_%s\\n" 70 75 80 86 89 90; exit; fi\n'
    write_program(machine / "nvcc", "#!/bin/sh\n" + listed + FAKE_COMPILER)
    built, _, printed = build(source, "cuda")
    assert built, printed
    assert "compiling the cuda kernels for 7.5;8.0;8.6;9.0+PTX: this" in printed
    assert not any("compute_100" in word for call in calls(machine, "nvcc")[0] for word in call)


@pytest.mark.parametrize("mode", ["auto", "cuda"])
@pytest.mark.parametrize("architecture", ["Hopper", "90", "9.0+ptx", "sm_90"])
def test_an_unknown_architecture_is_an_error(source: Path, machine: Path, mode: str, architecture: str) -> None:
    built, wheel, printed = build(source, mode, TORCH_CUDA_ARCH_LIST=f"8.0;{architecture}")
    assert not built
    assert not wheel
    assert f"TORCH_CUDA_ARCH_LIST must hold numbers such as 9.0, 9.0a or 9.0+PTX, got {architecture}\n" in printed


def test_progress_is_reported_while_nvcc_runs(source: Path, machine: Path) -> None:
    replace(source / "setup.py", "SECONDS_BETWEEN_REPORTS = 15", "SECONDS_BETWEEN_REPORTS = 0.1")
    write_program(machine / "nvcc", FAKE_COMPILER + "sleep 0.5\n")
    built, _, printed = build(source, "cuda", TORCH_CUDA_ARCH_LIST="8.0;9.0")
    assert built
    started = printed.index("compiling the cuda kernels for 8.0;9.0")
    running = printed.index("still at csrc/balanced_l1_cuda.cu, csrc/sample_cuda.cu after 0 s")
    assert started < running < printed.index("csrc/sample_cuda.cu: done after")


@pytest.mark.parametrize(
    ("mode", "compiler", "needs_torch"),
    [
        ("none", "true", False),
        ("auto", "no-such-compiler", False),
        ("auto", "env no-such-compiler", False),
        ("auto", "true", True),
        ("auto", "env true -m64", True),
        ("cuda", "true", True),
    ],
)
def test_torch_is_fetched_only_to_compile(source: Path, mode: str, compiler: str, needs_torch: bool) -> None:
    command = [sys.executable, "-c", "import build_backend; print(build_backend.get_requires_for_build_wheel())"]
    environment = {**os.environ, "BALANCED_LEARNING_BUILD": mode, "CXX": compiler, "PYTHONPATH": str(source)}
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=True)
    assert ("torch>=2.11" in result.stdout.splitlines()[-1]) == needs_torch


def test_links_of_the_readme_work_on_a_page_elsewhere(source: Path) -> None:
    for name in ("docs/page.md", "docs/picture.png"):
        write_program(source / name, "")
    links = "[a](docs/page.md#b) ![c](docs/picture.png) [![d](docs/picture.png)](docs/page.md) [e](docs/) "
    others = "[f](https://example.org/g) [h](#i) `function[0](j)` [k](no-such-file)"
    (source / "README.md").write_text(links + others)
    replace(source / "pyproject.toml", 'Source = "https://', 'Source = "https://mirror.')
    replace(source / "pyproject.toml", 'version = "', 'version = "7.')
    command = [sys.executable, "-c", "import build_backend; build_backend.prepare_metadata_for_build_wheel('.')"]
    environment = {**os.environ, "BALANCED_LEARNING_BUILD": "none", "PYTHONPATH": str(source)}
    subprocess.run(command, cwd=source, env=environment, capture_output=True, check=True)
    metadata = message_from_string(next(source.glob("*.dist-info/METADATA")).read_text())
    (address,) = (url for url in metadata.get_all("Project-URL") if url.startswith("Source, "))
    blob, raw = (f"{address.removeprefix('Source, ')}/{page}/v{metadata['Version']}/docs" for page in ("blob", "raw"))
    assert blob.startswith("https://mirror.")
    expected = f"[a]({blob}/page.md#b) ![c]({raw}/picture.png) [![d]({raw}/picture.png)]({blob}/page.md) [e]({blob}/) "
    assert metadata.get_payload().strip() == expected + others


def test_sdist_holds_what_is_tracked(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.splitlines() if (ROOT / name).exists()}
    ignored = {"balanced_learning/_cpu.so", "tests/__pycache__/test_build.pyc", "examples/runs/checkpoint.pth"}
    for name in tracked | ignored:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch() if name in ignored else shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-c", "import build_backend; build_backend.build_sdist('dist')"]
    environment = {**os.environ, "BALANCED_LEARNING_BUILD": "none", "PYTHONPATH": str(tmp_path)}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    generated = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert names - generated == tracked - {".gitignore"}
