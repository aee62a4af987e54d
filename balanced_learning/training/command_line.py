"""The command line: a flag for every setting, over the settings of a checkpoint or of a recipe."""

import argparse
import sys
from dataclasses import Field, fields
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from balanced_learning.training.checkpoint import PREVIOUS, Checkpoint
from balanced_learning.training.config import (
    AUTO,
    COURSE,
    MODEL,
    PAPER_IMAGES,
    PAPER_LR,
    Config,
    ModelConfig,
    flag_of,
    images_per_step,
    setting_fields,
)
from balanced_learning.training.errors import UserError
from balanced_learning.training.opening import open_file
from balanced_learning.training.weights import are_torchvisions


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """A parser whose result holds only the flags that are given."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--recipe", metavar="NAME|FILE", help="settings in TOML, below the flags; without data: shapes")
    for group in fields(Config):
        arguments = parser.add_argument_group(group.name)
        for setting in fields(group.type):  # type: ignore[arg-type]
            _add_flag(arguments, setting)
    return parser


def _add_flag(group: Any, setting: Field) -> None:
    aliases = setting.metadata["aliases"]
    flags = [*(a for a in aliases if len(a) == 2), flag_of(setting.name), *(a for a in aliases if len(a) > 2)]
    default = "" if setting.default is None else f" (default: {_shown(setting.default)})"
    arguments = {"dest": setting.name, "help": setting.metadata["help"] + default, **setting.metadata["arguments"]}
    if isinstance(setting.default, bool):
        arguments["action"] = argparse.BooleanOptionalAction
    group.add_argument(*flags, **arguments)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return " ".join(map(str, default)) if isinstance(default, tuple) else f"{default}"


def read_command_line(given: argparse.Namespace, *, trains: bool = True) -> tuple[Config, Checkpoint | None]:
    """The configuration that the flags of :func:`make_parser` ask for, and the checkpoint they name.

    Flags go before the recipe, both before the settings of the checkpoint, and those before the defaults. Without data
    and checkpoint, the recipe is ``shapes``.

    Args:
        given: the flags.
        trains: whether the program trains. Otherwise the settings of training need not be those of the checkpoint.

    Raises:
        UserError: for a recipe or checkpoint that cannot be read, and for settings that contradict the checkpoint or
            each other.
    """
    flags = {name: _frozen(value) for name, value in vars(given).items() if name in setting_fields()}
    has_data = "data_path" in flags or flags.get("resume", AUTO) != AUTO or "replay" in flags
    recipe = getattr(given, "recipe", None if has_data else "shapes")
    chosen = (read_recipe(recipe) if recipe else {}) | flags
    checkpoint = _find_checkpoint(chosen)
    if checkpoint:
        _check_agreement(chosen, checkpoint, trains and not chosen.get("test_only", False))
        of_machine = {name: setting_fields()[name].default for name in ("device", "dist_url")}
        chosen = checkpoint.config.values() | of_machine | {"output_dir": checkpoint.path.parent} | chosen
    return _settled(Config.of(chosen)), checkpoint


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe of the library, by its name, or of a TOML file.

    Its tables are those of :class:`~balanced_learning.training.config.Config`, and its values are checked as flags are.

    Raises:
        UserError: for an unknown name, a file that is no recipe, a table or setting that does not exist, a bad value.
    """
    own = {file.name.removesuffix(".toml"): file for file in _recipes().iterdir() if file.name.endswith(".toml")}
    try:
        if name in own:
            text = own[name].read_text(encoding="utf-8")
        else:
            with open_file(Path(name)) as file:
                text = file.read().decode()
        content = tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"--recipe {name}: no such file, and the library's are {', '.join(sorted(own))}") from None
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(f"--recipe {name}: cannot be read ({error})") from None
    parser = make_parser()
    parser.error = lambda message: _refuse(f"--recipe {name}: {message}")  # type: ignore[method-assign,assignment,return-value]
    words = [word for table, values in content.items() for word in _table_as_flags(name, table, values)]
    return {key: _frozen(value) for key, value in vars(parser.parse_args(words)).items()}


def _table_as_flags(recipe: str, table: str, values: Any) -> list[str]:
    groups = {group.name: {setting.name for setting in fields(group.type)} for group in fields(Config)}  # type: ignore[arg-type]
    if table not in groups or not isinstance(values, dict):
        raise UserError(f"--recipe {recipe}: {table!r} is none of its tables, {', '.join(groups)}")
    words: list[str] = []
    for key, value in values.items():
        if key not in groups[table]:
            raise UserError(f"--recipe {recipe}: [{table}] has no setting {key!r}")
        setting = setting_fields()[key]
        is_switch = isinstance(setting.default, bool)
        takes_list = setting.metadata["arguments"].get("nargs") == "*"
        if isinstance(value, bool) != is_switch or isinstance(value, list) != takes_list:
            wanted = "true or false" if is_switch else "a list" if takes_list else "one value"
            raise UserError(f"--recipe {recipe}: [{table}] {key} must be {wanted}, got {value!r}")
        words += _as_flag(key, value)
    return words


def _recipes() -> Any:
    return resources.files("balanced_learning.training") / "recipes"


def _as_flag(name: str, value: Any) -> list[str]:
    if isinstance(setting_fields()[name].default, bool) and isinstance(value, bool):
        return [flag_of(name) if value else flag_of(name).replace("--", "--no-", 1)]
    values = value if isinstance(value, list) else [value]
    return [flag_of(name), *map(str, values)]


def _refuse(message: str) -> None:
    raise UserError(message)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


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
            there, here = _as_typed(name, before[name]), _as_typed(name, value)
            raise UserError(f"{here}: {checkpoint.path} was made with {there}, and goes on so without the flag")


def _as_typed(name: str, value: Any) -> str:
    """A setting as one would type it."""
    if value is None:
        return "--weights-backbone none" if name == "weights_backbone" else f"no {flag_of(name)}"
    return " ".join(_as_flag(name, list(value) if isinstance(value, tuple) else value))


def _settled(config: Config) -> Config:
    """Checks settings against each other, and fills in those that follow from others or from the machine."""
    model, training, run, data = config.model, config.training, config.run, config.data
    if are_torchvisions(model.weights) and (model.small or model.backbone != "resnet50"):
        hint = "pass --no-small" if model.small else f"got --backbone {model.backbone}"
        raise UserError(f"--weights {model.weights}: torchvision has COCO weights for resnet50 alone; {hint}")
    if model.small and model.backbone != "resnet50":
        raise UserError(f"--backbone {model.backbone}: a --small detector has its own; pass --no-small")
    if model.weights_backbone not in (None, ModelConfig.weights_backbone) and (model.small or model.weights):
        other = "--small detector is trained from scratch" if model.small else "detector with --weights has a backbone"
        raise UserError(f"--weights-backbone {model.weights_backbone}: a {other}; leave one of them out")
    if model.rpn and model.model == "libra_retinanet":
        raise UserError("--rpn: RetinaNet has no RPN; pass --no-rpn")
    if training.opt == "sgd_nesterov" and training.momentum == 0:
        raise UserError("--momentum 0: --opt sgd_nesterov needs one")
    if run.test_only and not (run.resume or model.weights):
        raise UserError("--test-only: there are no trained weights; pass --resume or --weights")
    if model.sync_bn and training.accumulation_steps > 1:
        raise UserError(
            "--sync-bn: not with --accumulation-steps; processes have other numbers of parts of a short batch"
        )
    for name in ("test_only", "check_data", "replay"):
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
    if data.data_path:
        values["data_path"] = data.data_path.absolute()
    return Config.of(values)


def paper_lr(config: Config) -> float:
    """The paper's learning rate, scaled linearly with the images of a step of all processes."""
    return PAPER_LR[config.model.model] * images_per_step(config) / PAPER_IMAGES


def lr_note(config: Config) -> str:
    """The learning rate, and where it is from, in words."""
    lr, paper = config.training.lr, PAPER_LR[config.model.model]
    if lr != paper_lr(config):
        return f"learning rate {lr:g}, as given"
    return (
        f"learning rate {lr:g}: {paper:g} for {PAPER_IMAGES} images an iteration, scaled linearly "
        f"to {images_per_step(config)}; --lr sets another"
    )
