"""The weights that a detector starts from: torchvision's by their names, or those of a file."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, RetinaNet_ResNet50_FPN_Weights

from balanced_learning.training import distributed
from balanced_learning.training.checkpoint import NORM_EPS, Checkpoint, set_norm_eps
from balanced_learning.training.config import Config, ModelConfig
from balanced_learning.training.data.coco import Split
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.errors import UserError, printable
from balanced_learning.training.settings import flag_of
from balanced_learning.training.state_dicts import find_state_dict, load, read_tensors

State = dict[str, Tensor]

_OFFERED = {
    "libra_fasterrcnn": FasterRCNN_ResNet50_FPN_Weights,
    "libra_retinanet": RetinaNet_ResNet50_FPN_Weights,
    "libra_fastrcnn": FasterRCNN_ResNet50_FPN_Weights,
    "libra_rpn": FasterRCNN_ResNet50_FPN_Weights,
}
_OTHER_STAGE = {"libra_fastrcnn": ("rpn.",), "libra_rpn": ("roi_heads.",)}
_COCO_OUTPUTS = {"roi_heads.box_predictor.cls_score.bias": 91, "head.classification_head.cls_logits.bias": 9 * 91}
_PREDICTORS = ("roi_heads.box_predictor.", "head.classification_head.cls_logits.")  # all that depends on the classes
_NECKS = ("backbone.bfp.", "backbone.path_aggregation.")
_OTHER_TASKS = ("roi_heads.mask_", "roi_heads.keypoint_")
_CLASSIFIERS = ("fc.", "classifier.")


def are_torchvisions(weights: str | None) -> bool:
    """Whether ``--weights`` names those that torchvision offers for its ResNet-50 detectors. Otherwise it is a file."""
    return any(weights in offered.__members__ for offered in _OFFERED.values())


def choose_labels(config: Config, split: Split, checkpoint: Checkpoint | None) -> Labels:
    """The labels of the checkpoint; those of ``--weights``, if these know all categories of the data; or new ones.

    Raises:
        UserError: if the weights cannot be read, or are to be evaluated on categories that they do not know.
    """
    if checkpoint:
        return checkpoint.labels
    if not config.model.weights or config.model.is_rpn:  # whose only label is that of all objects
        return Labels.of(split)
    weights = DetectorWeights.read(config.model)
    unknown = weights.unknown(split.categories.values())
    if unknown and config.run.test_only:
        raise UserError(f"{weights.flag}: cannot be evaluated on {split.json_file}: {unknown}")
    return Labels.of(split) if unknown else Labels.by_name(split, weights.categories, weights.num_classes)


def load_weights(model: Any, config: ModelConfig, labels: Labels) -> str | None:
    """Loads what the settings start from, and says in a line what was taken; ``None`` if they start from scratch.

    Raises:
        UserError: if the weights cannot be read or downloaded, or do not fit.
    """
    if config.weights:
        return DetectorWeights.read(config).load_into(model, config, labels)
    if config.weights_backbone and not config.small:
        return _load_backbone(model.backbone.body, config.backbone, config.weights_backbone)
    return None


@dataclass(frozen=True)
class DetectorWeights:
    """The weights of a trained detector, and what is known of them.

    Attributes:
        flag: what asks for them.
        state: returns the state dict, which may have to be downloaded.
        categories: the name of each label; none, where nothing tells.
        num_classes: size of its output, background included; 0 where nothing tells.
        norm_eps: epsilon of the frozen batch norm that they were trained with.
        settings: of the run that made them, if these programs did.
    """

    flag: str
    state: Callable[[], State]
    categories: dict[int, str]
    num_classes: int
    norm_eps: float
    settings: ModelConfig | None = None

    @classmethod
    def read(cls, config: ModelConfig) -> "DetectorWeights":
        """Reads ``--weights``, but downloads nothing yet.

        Raises:
            UserError: if they cannot be read.
        """
        flag = f"--weights {printable(config.weights)}"
        offered = _OFFERED[config.model]
        coco = offered.COCO_V1
        names = coco.meta["categories"]
        coco_categories = dict(enumerate(names[1:], 1))  # the first is the background
        if are_torchvisions(config.weights):
            named = offered[str(config.weights)]
            eps = 0.0 if named == coco else NORM_EPS  # as torchvision's builders set it
            return cls(flag, lambda: _download(named, flag), coco_categories, len(names), eps)
        path = Path(str(config.weights))
        content = read_tensors(path, flag, hint=f"; torchvision's weights are {', '.join(offered.__members__)}")
        state = find_state_dict(content, flag)
        if Checkpoint.is_one(content):
            made = Checkpoint.of(path, content)
            labels = made.labels
            state = made.averaged().states["model"]
            return cls(flag, lambda: state, labels.names, labels.num_classes, made.norm_eps, made.config.model)
        if not any(key in state and state[key].shape == (size,) for key, size in _COCO_OUTPUTS.items()):
            return cls(flag, lambda: state, {}, 0, NORM_EPS)
        eps = 0.0 if path.name == Path(coco.url).name else NORM_EPS
        return cls(flag, lambda: state, coco_categories, len(names), eps)

    def unknown(self, names: Iterable[str]) -> str | None:
        """Why they cannot detect the categories of these names, if so."""
        names, known = list(names), list(self.categories.values())
        if not known:
            return "nothing tells its categories"
        for name in names:
            if name not in known:
                return f"it knows no category {name!r}"
            if known.count(name) > 1 or names.count(name) > 1:
                return f"there are several categories {name!r}"
        return None

    def load_into(self, model: nn.Module, config: ModelConfig, labels: Labels) -> str:
        """Loads the weights, without those of the predictors if the labels are others, and says what was taken.

        Raises:
            UserError: if they cannot be downloaded or do not fit; names the first misfit, and the flags that would fit.
        """
        unknown = None if config.is_rpn else self.unknown(labels.names.values())
        predictors = _PREDICTORS if unknown else ()
        whole = self.state()
        others = _OTHER_TASKS + _OTHER_STAGE.get(config.model, ())
        state = {key: value for key, value in whole.items() if not key.startswith(others + predictors)}
        missing = load(model, state, self.flag, may_miss=_NECKS + predictors, hint=self._what_fits(whole, config))
        set_norm_eps(model, self.norm_eps)
        said = f"{self.flag}: takes {_parts(key for key in model.state_dict() if key not in missing)}"
        if missing:
            said += f"; starts anew: {_parts(missing)}" + (f" ({unknown})" if unknown else "")
        if other := [key for key in whole if key.startswith(others)]:
            said += f"; leaves out: {_parts(other)}"
        return said

    def _what_fits(self, state: State, config: ModelConfig) -> str:
        """The flags that they were made with, where these differ."""
        if not any(key.startswith("backbone.") for key in state):
            return "; weights of a backbone alone go to --weights-backbone"
        has_rpn = any(key.startswith("rpn.") for key in state)
        made = {"model": "libra_fasterrcnn" if has_rpn else "libra_retinanet"}
        if self.settings:
            names = ("model", "backbone", "small", "fpn_channels", "pyramid", "path_aggregation")
            made = {name: getattr(self.settings, name) for name in names}
        flags = [_typed(name, value) for name, value in made.items() if value != getattr(config, name)]
        return f"; made with {' '.join(flags)}" if flags else ""


def _typed(name: str, value: str | int) -> str:
    if isinstance(value, bool):
        return flag_of(name) if value else flag_of(f"no_{name}")
    return f"{flag_of(name)} {value}"


def _parts(keys: Iterable[str]) -> str:
    """The parts of a detector that these keys are of: predictors, or two levels deep."""
    predictors = [prefix[:-1] for prefix in _PREDICTORS]
    found = (next(filter(key.startswith, predictors), ".".join(key.split(".")[:2])) for key in keys)
    return ", ".join(dict.fromkeys(found))


def _load_backbone(body: nn.Module, name: str, weights: str) -> str:
    flag = f"--weights-backbone {printable(weights)}"
    offered = get_model_weights(name)
    if weights in offered.__members__:
        state = _download(offered[weights], flag)
    else:
        hint = f"; torchvision's weights of {name} are {', '.join(offered.__members__)}"
        state = find_state_dict(read_tensors(Path(weights), flag, hint=hint), flag)
    state = {key: value for key, value in state.items() if not key.startswith(_CLASSIFIERS)}
    if name.startswith("mobilenet"):  # whose classifier holds the body so
        body = nn.ModuleDict({"features": body})
        if not any(key.startswith("features.") for key in state):
            state = {f"features.{key}": value for key, value in state.items()}
    is_detector = any(key.startswith("backbone.") for key in state)
    hint = "; weights of a detector go to --weights" if is_detector else f"; it must be a {name}, as --backbone says"
    load(body, state, flag, hint=hint)
    return f"{flag}: takes backbone.body"


def _download(weights: WeightsEnum, flag: str) -> State:
    try:
        return dict(weights.get_state_dict(progress=distributed.is_main(), check_hash=True))
    except Exception as error:  # no connection, no room, a broken file: whatever network, disk and pickle make of it
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{flag}: the weights could not be downloaded ({reason}); {flag.split()[0]} FILE takes a local file, and "
            "--weights-backbone none without --weights trains from scratch"
        ) from None
