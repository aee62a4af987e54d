"""What a run leaves of its epochs beside checkpoints: printed, in ``metrics.jsonl``, as curves and for TensorBoard."""

from balanced_learning.training import distributed
from balanced_learning.training.evaluation import Evaluation
from balanced_learning.training.reporting.figures import save_curves
from balanced_learning.training.reporting.metrics import write_config, write_rows
from balanced_learning.training.reporting.tables import report, summary
from balanced_learning.training.reporting.tensorboard import TensorBoard
from balanced_learning.training.run import Run


class Reports:
    """The reports of a run, which its main process writes.

    At the start they are written again from the history that the checkpoint holds: they may be damaged, lack an epoch
    or be of another folder.

    Raises:
        SharedError: if one that a run needs cannot be written.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.tensorboard: TensorBoard | None = None
        distributed.in_main(self._start)

    def _start(self) -> None:
        run = self.run
        write_config(run.folder / "args.json", run.config)
        self._write_history()
        if run.config.run.tensorboard:
            self.tensorboard = TensorBoard(run)
            for row in run.history:
                self.tensorboard.write(row, run.folder / f"evaluation_{row['epoch']:02}.png")

    def _write_history(self) -> None:
        write_rows(self.run.folder / "metrics.jsonl", self.run.history)
        if self.run.history:
            save_curves(self.run.folder / "curves.png", self.run.history)

    def add_epoch(self, evaluation: Evaluation | None) -> None:
        """Reports on the epoch that has just ended, and on its evaluation, if there was one."""
        if evaluation:
            distributed.say(report(evaluation) if self.run.is_over() else summary(evaluation))
        distributed.in_main(self._write_history)
        if self.tensorboard:
            row = self.run.history[-1]
            self.tensorboard.write(row, self.run.folder / f"evaluation_{row['epoch']:02}.png")
