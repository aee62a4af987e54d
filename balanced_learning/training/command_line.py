"""The command line: flags over the settings of a recipe and of a checkpoint."""

import argparse
import sys
from importlib.util import find_spec
from typing import Any

from balanced_learning.training import distributed
from balanced_learning.training.checkpoint import PREVIOUS, Checkpoint
from balanced_learning.training.config import (
    ADAMW_LR,
    AUTO,
    PAPER_IMAGES,
    PAPER_LR,
    Config,
    ModelConfig,
    images_per_step,
    setting_fields,
)
from balanced_learning.training.errors import UserError, warn
from balanced_learning.training.flags import as_typed, given_settings
from balanced_learning.training.recipe import Recipe, list_recipes
from balanced_learning.training.settings import COURSE, MODEL, flag_of
from balanced_learning.training.weights import are_torchvisions

_OF_TWO_STAGES = (  # and of no other detector; recipes may have them all the same
    *("rpn_score_thresh", "box_batch_size_per_image", "rpn_pre_nms_top_n_train", "rpn_pre_nms_top_n_test"),
    *("rpn_post_nms_top_n_train", "rpn_post_nms_top_n_test"),
)


def read_command_line(given: argparse.Namespace, *, trains: bool = True) -> tuple[Config, Checkpoint | None]:
    """The configuration that flags ask for, and the checkpoint they name.

    Flags go before the recipe, both before the settings of the checkpoint, and those before the defaults. Without data
    and checkpoint, the recipe is ``shapes``.

    Args:
        given: the flags, as :func:`~balanced_learning.training.flags.make_parser` parses them.
        trains: whether the program trains. Otherwise the settings of training need not be those of the checkpoint.

    Raises:
        UserError: for a recipe or checkpoint that cannot be read, and for settings that contradict the checkpoint or
            each other.
    """
    if "list_recipes" in given:
        print(list_recipes())
        sys.exit()
    flags = given_settings(given)
    name = getattr(given, "recipe", None)
    recipe = Recipe.read(name) if name else Recipe({})
    if recipe.note and distributed.announced_rank() == 0:
        warn(f"--recipe {name}: {recipe.note}")
    chosen = recipe.settings | flags
    checkpoint = _find_checkpoint(chosen)
    if not (name or checkpoint or "data_path" in flags):
        chosen = Recipe.read("shapes").settings | flags
    trains = trains and not (chosen.get("test_only") or chosen.get("dump_proposals"))
    if checkpoint:
        _check_agreement(chosen, checkpoint, trains)
        of_machine = {name: setting_fields()[name].default for name in ("device", "dist_url")}
        chosen = checkpoint.config.values() | of_machine | {"output_dir": checkpoint.path.parent} | chosen
    config = _settled(Config.of(chosen), checkpoint)
    if config.model.is_retinanet:
        for name in _OF_TWO_STAGES:
            if name in flags:
                raise UserError(f"{flag_of(name)}: {config.model.model} has no RPN and no second stage; leave it out")
    return config, checkpoint


def _find_checkpoint(chosen: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint that the flags name, or that ``--resume auto`` finds."""
    for name in ("replay", "resume"):
        path = chosen.get(name, AUTO)
        if path != AUTO and not (path.exists() or path.with_name(PREVIOUS).exists()):
            raise UserError(f"{flag_of(name)} {path}: no such file")
    if "replay" in chosen:
        return Checkpoint.load(chosen["replay"])
    if "resume" not in chosen:
        return None
    path = chosen["resume"]
    if path != AUTO:
        checkpoint = Checkpoint.to_continue(path)
        if checkpoint.fault:
            raise UserError(f"--resume {path}: kept of a step that was left out; --replay repeats it")
        return checkpoint
    if "output_dir" not in chosen:
        raise UserError("--resume auto: pass the folder that it is to look in, --output-dir")
    return Checkpoint.newest(chosen["output_dir"])


def _check_agreement(chosen: dict[str, Any], checkpoint: Checkpoint, trains: bool) -> None:
    """Refuses what would give the weights of the checkpoint another meaning, or its training another course."""
    before = checkpoint.config.values()
    binding = {MODEL, COURSE} if trains else {MODEL}
    for name, value in chosen.items():
        setting = setting_fields()[name]
        is_schedule = trains and name == "epochs" and before["lr_scheduler"] == "cosineannealinglr"
        if (setting.metadata["binds"] in binding or is_schedule) and value != before[name]:
            there, here = as_typed(name, before[name]), as_typed(name, value)
            raise UserError(f"{here}: {checkpoint.path} was made with {there}, and goes on so without the flag")


def _settled(config: Config, checkpoint: Checkpoint | None) -> Config:
    """Checks settings against each other, and fills in those that follow from others or from the machine."""
    is_trained = checkpoint is not None or config.model.weights is not None
    model, training, run, data = config.model, config.training, config.run, config.data
    if are_torchvisions(model.weights) and (model.small or model.backbone != "resnet50"):
        hint = "pass --no-small" if model.small else f"got --backbone {model.backbone}"
        raise UserError(f"--weights {model.weights}: torchvision has COCO weights for resnet50 alone; {hint}")
    if model.small and model.trainable_backbone_layers is not None:
        given = model.trainable_backbone_layers
        raise UserError(f"--trainable-backbone-layers {given}: a --small detector trains all of its own; leave it out")
    if model.small and model.backbone != "resnet50":
        raise UserError(f"--backbone {model.backbone}: a --small detector has its own; pass --no-small")
    if are_torchvisions(model.weights) and model.fpn_channels != ModelConfig.fpn_channels:
        has = ModelConfig.fpn_channels
        raise UserError(f"--weights {model.weights}: of {has} channels; leave --fpn-channels {model.fpn_channels} out")
    if model.weights_backbone not in (None, ModelConfig.weights_backbone) and (model.small or model.weights):
        other = "--small detector is trained from scratch" if model.small else "detector with --weights has a backbone"
        raise UserError(f"--weights-backbone {model.weights_backbone}: a {other}; leave one of them out")
    if model.rpn and (model.is_retinanet or model.is_fast_rcnn):
        raise UserError(f"--rpn: {model.model} has no RPN; pass --no-rpn")
    if model.box_loss and config.libra.beta == 0:
        raise UserError("--beta 0: balanced L1 needs one above 0; L1 is --no-box-loss --beta 0")
    if model.balances_rpn and model.box_loss and config.conventions.rpn_beta == 0:
        raise UserError("--rpn-beta 0: balanced L1 needs one above 0")
    if model.is_fast_rcnn and not data.proposals:
        raise UserError("--model libra_fastrcnn: pass --proposals, a file that --dump-proposals made of the same data")
    if data.proposals and not model.is_fast_rcnn:
        raise UserError(f"--proposals {data.proposals}: --model {model.model} has its own; libra_fastrcnn takes them")
    if run.dump_proposals:
        if model.is_retinanet or model.is_fast_rcnn:
            raise UserError(f"--dump-proposals: --model {model.model} has no RPN")
        if not is_trained:
            raise UserError("--dump-proposals: there are no trained weights; pass --resume or --weights")
        for name in ("test_only", "check_data", "replay"):
            if getattr(run, name):
                raise UserError(f"--dump-proposals: it does nothing else; leave {flag_of(name)} out")
    if training.opt == "sgd_nesterov" and training.momentum == 0:
        raise UserError("--momentum 0: --opt sgd_nesterov needs one")
    if run.test_only and not is_trained:
        raise UserError("--test-only: there are no trained weights; pass --resume or --weights")
    if model.sync_bn and training.accumulation_steps > 1:
        raise UserError(
            "--sync-bn: not with --accumulation-steps; processes have other numbers of parts of a short batch"
        )
    norm = config.conventions.norm or ""
    if norm.startswith("frozen") and not (model.small or model.weights or model.weights_backbone):
        raise UserError(f"--norm {norm}: a backbone from scratch has none to freeze; pass --norm batch")
    if model.sync_bn and norm == "frozen_statistics" and not model.small:
        raise UserError("--sync-bn: not with --norm frozen_statistics, which no process changes")
    for name in ("test_only", "check_data", "replay", "dump_proposals"):
        if run.dry_run and getattr(run, name):
            raise UserError(f"--dry-run: it trains; leave {flag_of(name)} out")
    package = run.coco_backend.replace("-", "_")
    if not find_spec(package):
        raise UserError(f"--coco-backend {run.coco_backend}: the package is missing; pip install {run.coco_backend}")
    if training.ema is not None and not 0 <= training.ema < 1:
        raise UserError(f"--ema {training.ema:g}: a decay of 1 keeps the first weights for ever")
    values = config.values()
    if training.lr is None:
        values["lr"] = paper_lr(config)
    for name in ("data_path", "proposals"):
        if values[name]:
            values[name] = values[name].absolute()
    return Config.of(values)


def paper_lr(config: Config) -> float:
    """The paper's learning rate, or the usual one of AdamW, scaled linearly with a step's images of all processes."""
    return _published_lr(config) * images_per_step(config) / PAPER_IMAGES


def _published_lr(config: Config) -> float:
    return ADAMW_LR if config.training.opt == "adamw" else PAPER_LR[config.model.model]


def lr_note(config: Config) -> str:
    """The learning rate, and where it is from, in words."""
    lr, paper = config.training.lr, _published_lr(config)
    if lr != paper_lr(config):
        return f"learning rate {lr:g}, as given"
    return (
        f"learning rate {lr:g}: {paper:g} for {PAPER_IMAGES} images an iteration, scaled linearly "
        f"to {images_per_step(config)}; --lr sets another"
    )
