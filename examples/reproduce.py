"""Trains the rows of the paper's Tables 1 to 6 and writes each table, published numbers beside measured ones.

    python examples/reproduce.py --table 6 --data-path coco --dry-run                 # the commands, and their hours
    python examples/reproduce.py --table 6 --data-path coco --seeds 0 1 2             # on all GPUs
    python examples/reproduce.py --table 1 --rows faster_rcnn_r50_1x libra_rcnn_r50_1x --data-path coco
    python examples/reproduce.py --table study --data-path bccd --seeds 0 1 2 3 4   # each part alone, on a CPU in hours
    python examples/reproduce.py --table all -- --small --epochs 1 --limit 8          # all in little, on drawn shapes

What follows -- are options of train_torchvision_libra.py, and go before the recipes. The runs lie in runs/RECIPE/seed_N
of the output folder. What tables share is made once: for Tables 2, 4, 5 and 6 an RPN, its proposals and the baseline.
The same command goes on where it was stopped: runs that are finished are not repeated, the one cut off is continued.
After every run, table_N.json and table_N.md are written with what there is.

Exit codes: 0; 1 if a run failed (the others go on) or for an error; 75 after SIGTERM, SIGINT or SIGUSR1, which the run
that is training hears of, and saves.
"""

import argparse
import math
import sys
from pathlib import Path

from balanced_learning.training import distributed
from balanced_learning.training.data.proposals import ProposalFile
from balanced_learning.training.endings import ends_in_one_line
from balanced_learning.training.errors import UserError
from balanced_learning.training.reproduction.commands import print_commands
from balanced_learning.training.reproduction.folders import check_settings
from balanced_learning.training.reproduction.hours import count_images
from balanced_learning.training.reproduction.plan import Plan, Request, make_plan
from balanced_learning.training.reproduction.published import NUMBERS, STUDY, read_table
from balanced_learning.training.reproduction.reproducing import Reproduction
from balanced_learning.training.signals import StopSignals

PROGRAM = Path(__file__).with_name("train_torchvision_libra.py")


def main(argv: list[str] | None = None) -> None:
    with StopSignals(is_last=argv is None) as signals, ends_in_one_line():
        given = read_arguments(sys.argv[1:] if argv is None else argv)
        request = read_request(given)
        plan = make_plan(request)
        for job in plan.jobs:
            check_settings(job)
        images = count_images(plan.jobs[0].config)
        if given.dry_run:
            print_commands(plan, images, given.images_per_second)
        else:
            require_data(request, plan)
            Reproduction(request, plan, images).run(signals)


def read_arguments(words: list[str]) -> argparse.Namespace:
    """The arguments; ``options`` are those behind the first ``--``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, choices=[*map(str, NUMBERS["paper"]), "all", STUDY])
    parser.add_argument("--family", choices=list(NUMBERS), default="paper", help="of recipes (default: paper)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="train these rows alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of each row (default: 0)")
    parser.add_argument("--data-path", type=Path, metavar="DIR", help="folder of COCO, or of data in its layout")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/reproduce"), metavar="DIR")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and their hours, do nothing")
    parser.add_argument(
        "--images-per-second", type=float, metavar="X", help="that a run takes, for --dry-run; by default measured"
    )
    parser.add_argument(
        "--nproc-per-node", type=int, metavar="N", help="processes of a run (default: one for each GPU)"
    )
    parser.add_argument("--proposals", type=Path, metavar="FILE", help="for Fast R-CNN, in place of those of an RPN")
    end = words.index("--") if "--" in words else len(words)
    given = parser.parse_args(words[:end])
    given.options = words[end + 1 :]
    return given


def read_request(given: argparse.Namespace) -> Request:
    """What the arguments ask for.

    Raises:
        UserError: for what cannot be.
    """
    if distributed.announced_world_size() > 1:
        raise UserError("torchrun: it starts that itself; call it with python, and see --nproc-per-node")
    for flag in ("images_per_second", "nproc_per_node"):
        value = getattr(given, flag)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{flag.replace('_', '-')} {value:g}: must be above 0")
    table = given.table
    numbers = NUMBERS[given.family] if table == "all" else (table if table == STUDY else int(table),)
    return Request(
        tables=tuple(read_table(number, given.family) for number in numbers),
        seeds=tuple(dict.fromkeys(given.seeds)),
        output_dir=given.output_dir,
        program=PROGRAM,
        rows=given.rows and tuple(given.rows),
        data_path=given.data_path,
        options=tuple(given.options),
        processes=given.nproc_per_node,
        proposals=given.proposals,
    )


def require_data(request: Request, plan: Plan) -> None:
    """Checks what all runs read.

    Raises:
        UserError: if it is not there.
    """
    if request.proposals and any(job.config.data.proposals for job in plan.jobs):
        ProposalFile.open(request.proposals)
    for job in plan.jobs:
        if job.config.data.data_path is None and not job.config.model.small:
            raise UserError("--data-path: pass COCO's folder; without, only -- --small is trained, on drawn shapes")


if __name__ == "__main__":
    main()
