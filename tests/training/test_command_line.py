import os
import threading
from dataclasses import FrozenInstanceError

import pytest
from torch import nn

from balanced_learning.training.checkpoint import save
from balanced_learning.training.command_line import lr_note, read_command_line
from balanced_learning.training.config import Config, setting_fields
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.errors import UserError
from balanced_learning.training.flags import make_parser
from balanced_learning.training.recipe import Recipe
from tests.training.small import FIRST_EPOCH, config_of

# The flags of torchvision's reference script and of this library, which keep their names.
FLAGS = """
--data-path --dataset --data-augmentation --keep-empty --limit -j --workers --aspect-ratio-group-factor --model
--backbone --sampler --no-sampler --pyramid --no-pyramid --path-aggregation --box-loss --no-box-loss --rpn
--small --no-small --weights --weights-backbone --trainable-backbone-layers --rpn-score-thresh --min-size
--max-size --sync-bn -b --batch-size --epochs --opt --lr --momentum --wd --weight-decay --norm-weight-decay
--lr-scheduler --lr-steps --lr-gamma --warmup-iters --warmup-factor --clip-grad-norm --amp --seed
--use-deterministic-algorithms --device --output-dir --resume --start-epoch --start_epoch --test-only
--print-freq --tensorboard --coco-backend --dist-url --accumulation-steps --ema --patience --limit-batches --dry-run
--checkpoint-steps --checkpoint-minutes --max-skipped-steps --max-unreadable --strict-data --replay --compile
--channels-last --eval-interval --fpn-channels --anchor-size --box-batch-size-per-image
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_flags_keep_their_names():
    assert set(FLAGS.split()) <= make_parser()._option_string_actions.keys()


def test_the_defaults_are_the_papers_schedule_on_coco():
    config = config_of("--data-path", "coco")
    training = config.training
    assert (training.epochs, training.lr, training.lr_steps, training.opt) == (12, 0.0025, (8, 11), "sgd")
    assert (config.model.min_size, config.model.max_size, config.model.backbone) == (800, 1333, "resnet50")
    assert config_of("--data-path", "coco", "--model", "libra_retinanet", "-b", 16).training.lr == 0.01


def test_values_are_converted():
    flags = ["--lr-steps", 3, 5, "--weights-backbone", "none", "--amp", "--wd", "0.1", "--keep-empty"]
    config = config_of("--data-path", "coco", *flags)
    assert (config.training.lr_steps, config.model.weights_backbone) == ((3, 5), None)
    assert (config.training.amp, config.training.weight_decay, config.data.keep_empty) == ("fp16", 0.1, True)
    assert config_of("--data-path", "coco", "--lr-steps").training.lr_steps == ()


def test_a_configuration_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        config_of("--data-path", "coco").training.lr = 1.0


def test_without_data_the_recipe_is_shapes_and_flags_go_before_it():
    config = config_of("--epochs", 2)
    assert (config.model.small, config.model.min_size, config.training.opt) == (True, 128, "adamw")
    assert config.training.epochs == 2
    assert config_of("--recipe", "shapes", "--data-path", "x", "--no-small").model.small is False


def test_a_recipe_of_ones_own(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text('[training]\nlr_steps = [1, 2]\nepochs = 3\n[model]\nsampler = false\nweights_backbone = "none"\n')
    assert Recipe.read(str(file)).settings == {
        "lr_steps": (1, 2),
        "epochs": 3,
        "sampler": False,
        "weights_backbone": None,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nlearning_rate = 1", r"\[training\] has no setting 'learning_rate'"),
        ("[optimizer]\nlr = 1", "'optimizer' is none of its tables, data, model, libra, conventions, training, run"),
        ("epochs = 1", "'epochs' is none of its keys, base, about, note, and no table"),
        ("[training]\nepochs = 0", "--epochs: must be at least 1, got 0"),
        ("[training]\nopt = 'magic'", "--opt: invalid choice"),
        ("[training]\namp = true", r"\[training\] amp must be one value, got True"),
        ("[model]\nmin_size = [64, 96]", r"\[model\] min_size must be one value"),
        ("[data]\nkeep_empty = []", r"\[data\] keep_empty must be true or false"),
        ("[training]\nlr_steps = 3", r"\[training\] lr_steps must be a list"),
        ("[training]\namp = '--test-only'", r"\[training\] amp must not be a flag, got '--test-only'"),
        ("[training]\nlr_steps = ['--test-only']", r"\[training\] lr_steps must not be a flag"),
        ("[training]\nlr = nan", "--lr: must be at least 0, got nan"),
        ("[training]\nepochs = 1.5", "--epochs: must be a whole number, got '1.5'"),
        ("not toml", "cannot be read"),
    ],
)
def test_a_wrong_recipe_is_told_by_name(tmp_path, text, message):
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"--recipe .*own\.toml: .*{message}"):
        Recipe.read(str(file))


def test_an_unknown_recipe_tells_those_there_are():
    with pytest.raises(UserError, match="--recipe magic: no such file, nor a recipe that --list-recipes lists"):
        Recipe.read("magic")


def test_the_learning_rate_scales_with_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = config_of("--data-path", "coco")
    assert config.training.lr == pytest.approx(0.02)
    assert "scaled linearly to 16" in lr_note(config)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint with another value than the default for each setting that has choices or is a number."""
    values = {"min_size": 64, "backbone": "resnet18", "lr": 0.03, "lr_scheduler": "cosineannealinglr", "epochs": 6}
    config = Config.of({**values, "device": "cuda", "output_dir": tmp_path / "elsewhere", "tensorboard": True})
    labels = Labels({1: "thing"}, {1: 1}, 2)
    save(tmp_path / "checkpoint.pth", {"model": nn.Linear(1, 2)}, config=config, labels=labels, position=FIRST_EPOCH)
    return tmp_path / "checkpoint.pth"


def test_adamw_has_a_learning_rate_of_its_own():
    config = config_of("--data-path", "coco", "--opt", "adamw", "-b", 8)
    assert config.training.lr == pytest.approx(0.00005)
    assert lr_note(config).startswith("learning rate 5e-05: 0.0001 for 16 images an iteration, scaled linearly to 8")


def test_a_run_that_goes_on_by_itself_needs_no_data_beside_its_folder(checkpoint):
    flags = ["--resume", "auto", "--output-dir", checkpoint.parent]
    assert config_of(*flags).model.backbone == "resnet18"
    checkpoint.unlink()
    assert config_of(*flags).model.small  # there is nothing yet


def test_a_checkpoint_brings_its_settings(checkpoint):
    config = config_of("--resume", checkpoint, "-j", 7)
    assert (config.model.min_size, config.model.backbone, config.training.lr) == (64, "resnet18", 0.03)
    assert (config.data.workers, config.run.output_dir) == (7, checkpoint.parent)
    assert (config.run.device, config.run.tensorboard) == ("auto", True)


OTHER = {
    "model": ["libra_retinanet"],
    "backbone": ["resnet50"],
    "data_augmentation": ["ssd"],
    "opt": ["adamw"],
    "lr_scheduler": ["multisteplr"],
    "weights": ["DEFAULT"],
    "weights_backbone": ["none"],
    "amp": ["bf16"],
    "ema": ["0.5"],
    "lr_steps": ["1"],
    "warmup_factor": ["0.5"],
    "trainable_backbone_layers": ["1"],
    "refine": ["conv"],
    "pyramid_init": ["xavier"],
    "norm": ["batch"],
    "anchors": ["exact"],
    "init": ["mmdet"],
    "p6_from": ["c5"],
    "loss_normalizer": ["batch"],
}


@pytest.mark.parametrize(
    "name",
    [name for name, setting in setting_fields().items() if setting.metadata["binds"] != "free" or name == "epochs"],
)
def test_each_setting_that_binds_is_refused_by_its_flag(checkpoint, name):
    default = setting_fields()[name].default
    flag = f"--{name.replace('_', '-')}"
    if isinstance(default, bool):
        words = [flag if not default else flag.replace("--", "--no-")]
    else:
        words = [flag, *OTHER.get(name, ["17"])]
    given = make_parser().parse_args(["--resume", str(checkpoint), *words])
    with pytest.raises(UserError, match=f"^{words[0]}.*checkpoint.pth was made with .*{flag[2:]}"):
        read_command_line(given)
    if setting_fields()[name].metadata["binds"] != "model":
        given.test_only = True
        read_command_line(given)


def test_a_dump_takes_other_settings_of_training(checkpoint, tmp_path):
    flags = ["--resume", checkpoint, "--dump-proposals", tmp_path / "p.npy", "--limit", 4]
    assert config_of(*flags, "--rpn-post-nms-top-n-test", 300).conventions.rpn_post_nms_top_n_test == 300
    with pytest.raises(UserError, match=r"^--min-size 65: "):
        config_of(*flags, "--min-size", 65)


def test_repeating_what_a_checkpoint_says_is_no_contradiction(checkpoint):
    assert config_of("--resume", checkpoint, "--min-size", 64, "--lr", 0.03, "--epochs", 6).training.epochs == 6


def test_a_recipe_can_name_the_checkpoint(checkpoint, tmp_path):
    (tmp_path / "own.toml").write_text(f'[run]\nresume = "{checkpoint}"\n')
    config, found = read_command_line(make_parser().parse_args(["--recipe", str(tmp_path / "own.toml")]))
    assert (found.path, config.model.min_size) == (checkpoint, 64)


def test_a_program_that_does_not_train_takes_other_settings_of_training(checkpoint):
    given = make_parser().parse_args(["--resume", str(checkpoint), "-b", "8", "--sampler", "--seed", "3"])
    assert read_command_line(given, trains=False)[0].training.batch_size == 8
    with pytest.raises(UserError, match=r"^--seed 3: "):
        read_command_line(given)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--test-only"], "--test-only: there are no trained weights"),
        (["--model", "libra_retinanet", "--rpn"], "--rpn: libra_retinanet has no RPN"),
        (["--model", "libra_fastrcnn", "--rpn"], "--rpn: libra_fastrcnn has no RPN"),
        (["--model", "libra_fastrcnn"], "--model libra_fastrcnn: pass --proposals"),
        (["--proposals", "x.npy"], "--proposals x.npy: --model libra_fasterrcnn has its own"),
        (["--beta", 0], "--beta 0: balanced L1 needs one above 0; L1 is --no-box-loss --beta 0"),
        (["--rpn", "--rpn-beta", 0], "--rpn-beta 0: balanced L1 needs one above 0"),
        (["--dump-proposals", "x.npy"], "--dump-proposals: there are no trained weights"),
        (
            ["--dump-proposals", "x.npy", "--resume", "auto", "--output-dir", "not_there"],
            "--dump-proposals: there are no trained weights",
        ),
        (["--test-only", "--resume", "auto", "--output-dir", "not_there"], "--test-only: there are no trained weights"),
        (
            ["--dump-proposals", "x.npy", "--weights", "DEFAULT", "--check-data"],
            "--dump-proposals: .* --check-data out",
        ),
        (["--dump-proposals", "x.npy", "--model", "libra_retinanet"], "--dump-proposals: .* has no RPN"),
        (["--opt", "sgd_nesterov", "--momentum", 0], "--momentum 0: --opt sgd_nesterov needs one"),
        (["--sync-bn", "--accumulation-steps", 2], "--sync-bn: not with --accumulation-steps"),
        (["--norm", "frozen", "--weights-backbone", "none"], "--norm frozen: a backbone from scratch has none"),
        (["--norm", "frozen_statistics", "--sync-bn"], "--sync-bn: not with --norm frozen_statistics"),
        (["--model", "libra_retinanet", "--rpn-score-thresh", 0.1], "--rpn-score-thresh: libra_retinanet has no RPN"),
        (
            ["--model", "libra_retinanet", "--rpn-post-nms-top-n-train", 9],
            "--rpn-post-nms-top-n-train: libra_retinanet",
        ),
        (["--small", "--trainable-backbone-layers", 0], "--trainable-backbone-layers 0: a --small detector trains all"),
        (["--dry-run", "--check-data"], "--dry-run: it trains; leave --check-data out"),
        (["--weights", "DEFAULT", "--fpn-channels", 64], "--weights DEFAULT: of 256 channels; leave --fpn-channels 64"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        config_of("--data-path", "coco", *flags)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    errors = []

    def read():
        for flag in ("--recipe", "--resume"):
            with pytest.raises(UserError) as caught:
                config_of("--data-path", "x", flag, "pipe")
            errors.append(str(caught.value))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert len(errors) == 2
    assert all("pipe: cannot be read (not a file but a folder, pipe or device)" in error for error in errors)


def test_an_epoch_to_start_from_is_refused_beside_a_checkpoint(checkpoint):
    with pytest.raises(UserError, match=r"--start-epoch 4: .* was made with --start-epoch 0"):
        config_of("--resume", checkpoint, "--start-epoch", 4)


def test_a_misspelt_setting_is_an_error():
    with pytest.raises(TypeError, match="no setting is called 'min_sizes'"):
        Config.of({"min_sizes": 3})
