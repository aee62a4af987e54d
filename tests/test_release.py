"""Tests of what a release says of itself in more than one place, and of how its kernels are linked."""

import ctypes
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
# Asks for functions that newer libraries have under new versions, or only they have.
LIBRARY = """
#include <dlfcn.h>
#include <pthread.h>
#include <memory>
#include <semaphore.h>
#include <sstream>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <vector>

void* called[] = {(void*)pthread_create, (void*)sem_init, (void*)shm_open};

extern "C" int length(const char* name, long size) {
  std::stringstream both;
  std::ostringstream out;
  both << name << std::vector<std::string>(3, name).size();
  out << both.str() << (dlsym(RTLD_DEFAULT, name) != nullptr);
  auto copy = std::make_shared<std::string>(out.str()), other = copy;
  try {
    std::unique_ptr<std::shared_ptr<std::string>[]> many(new std::shared_ptr<std::string>[size]);
    return other->size();
  } catch (const std::bad_alloc& error) {
    return -1;
  }
}
"""


def test_newest_change_is_unreleased_or_of_this_version():
    version = re.search(r'^version = "(.+)"$', PROJECT, re.MULTILINE)[1]
    newest, *older = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    dated = rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d"
    assert re.fullmatch(f"Unreleased|{dated}", newest)
    if newest == "Unreleased" and older:
        assert re.fullmatch(dated, older[0])


@pytest.mark.parametrize("file", ["pyproject.toml", "CITATION.cff"])
def test_addresses_are_in_the_repository(file):
    source = re.search(r'^Source = "(.+)"$', PROJECT, re.MULTILINE)[1]
    owner, name = source.split("/")[-2:]
    addresses = re.findall(r"https://[^\s\"]+", (ROOT / file).read_text())
    ours = [address for address in addresses if name in address or owner in address]
    assert ours
    assert all(address == source or address.startswith(f"{source}/") for address in ours)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.skipif(not (shutil.which("c++") and shutil.which("nm")), reason="needs a C++ compiler")
def test_kernels_need_no_newer_library_than_torch(tmp_path):
    flags = subprocess.run([ROOT / ".ci/manylinux", tmp_path / "stubs"], capture_output=True, text=True, check=True)
    (tmp_path / "library.cpp").write_text(LIBRARY)
    command = ["c++", "-shared", "-fPIC", "-std=c++17", flags.stdout.strip(), "library.cpp", "-o", "library.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    listed = subprocess.run(["nm", "-D", "library.so"], cwd=tmp_path, capture_output=True, text=True, check=True)
    needed = {(name, int(number)) for name, number in re.findall(r"(GLIBC_2|GLIBCXX_3\.4)\.(\d+)", listed.stdout)}
    assert {name for name, _ in needed} == {"GLIBC_2", "GLIBCXX_3.4"}
    assert all(number <= {"GLIBC_2": 28, "GLIBCXX_3.4": 24}[name] for name, number in needed)
    length = ctypes.CDLL(str(tmp_path / "library.so")).length
    assert length(b"dlsym", ctypes.c_long(10)) == 7
    assert length(b"dlsym", ctypes.c_long(-1)) == -1
