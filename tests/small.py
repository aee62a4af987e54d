"""The flags of a run that takes seconds."""

from balanced_learning.training.command_line import make_parser, read_command_line
from balanced_learning.training.config import Config

SMALL = ["--small", "--min-size", "64", "--max-size", "96", "-j", "0", "-b", "2", "--epochs", "1", "--device", "cpu"]


def config_of(*flags: object) -> Config:
    return read_command_line(make_parser().parse_args([str(flag) for flag in flags]))[0]
