"""Reads what the CUDA compiler and cuobjdump tell about kernels."""

import re
from collections import deque
from typing import NamedTuple

KERNEL = re.compile(r"\d([a-z][a-z_]*_kernel)(?:I(.*?)E)?Ev")
ARGUMENT = re.compile(r"N3c10\d(Half|BFloat16)E|Li(\d+)E|Lb([01])E|([a-z])")
BUILTIN = {"f": "float", "d": "double"}
DOUBLE_PRECISION = ("DADD", "DMUL", "DFMA", "MUFU.RCP64H")


class Instruction(NamedTuple):
    address: int
    text: str

    @property
    def target(self) -> int | None:
        """The address that a branch leads to."""
        branch = re.search(r"\bBRA(?:\.\w+)* .*?(0x[0-9a-f]+)", self.text)
        return int(branch[1], 16) if branch else None

    @property
    def ends(self) -> bool:
        """Whether the next instruction is never reached from this one."""
        return re.match(r"(BRA|EXIT|RET)\b", self.text) is not None


class Usage(NamedTuple):
    """What a kernel takes: registers and spilled bytes of a thread, shared memory of a block."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def kernel_name(symbol: str) -> tuple[str, list[str]]:
    """The name of a kernel and its template's arguments, from the name that the linker knows it by."""
    match = KERNEL.search(symbol)
    if match is None:
        raise ValueError(f"{symbol} is no kernel of this project")
    arguments = ARGUMENT.findall(match[2] or "")
    return match[1], [
        half or number or {"0": "false", "1": "true"}.get(flag) or BUILTIN.get(letter, letter)
        for half, number, flag, letter in arguments
    ]


def resource_usage(text: str) -> dict[str, Usage]:
    """What each kernel takes, by its symbol, as ``ptxas -v`` prints it."""
    usages = {}
    for entry in re.split(r"Compiling entry function '", text)[1:]:

        def number(pattern: str, entry: str = entry) -> int:
            match = re.search(pattern, entry)
            return int(match[1]) if match else 0

        spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        usages[entry[: entry.index("'")]] = Usage(number(r"Used (\d+) registers"), spills, number(r"(\d+) bytes smem"))
    return usages


def instructions(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by its symbol, as ``cuobjdump -sass`` prints them."""
    kernels = {}
    for function in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", function, flags=re.MULTILINE)
        kernels[function.split(maxsplit=1)[0]] = [Instruction(int(address, 16), line) for address, line in lines]
    return kernels


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The instructions that a turn of the longest loop cannot do without: those on the shortest way through it.

    A loop is the code from where a backward branch leads to that branch.
    """
    places = {instruction.address: place for place, instruction in enumerate(code)}
    loops = [(places[i.target], place) for place, i in enumerate(code) if i.target is not None and i.target < i.address]
    if not loops:
        return []
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    came_from = {first: first}
    queue = deque([first])
    while last not in came_from:
        place = queue.popleft()
        target = code[place].target
        following = [] if code[place].ends else [place + 1]
        for after in following + ([] if target is None else [places[target]]):
            if first <= after <= last and after not in came_from:
                came_from[after] = place
                queue.append(after)
    way = [last]
    while way[-1] != first:
        way.append(came_from[way[-1]])
    return [code[place] for place in reversed(way)]


def double_precision(code: list[Instruction]) -> int:
    """The instructions that compute in double precision."""
    return sum(any(name in instruction.text for name in DOUBLE_PRECISION) for instruction in code)
