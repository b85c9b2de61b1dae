"""What a user can get wrong is one clear error before any work."""

import json
import re
import shutil
import sys

import pytest
from training_runs import SMALL, run

from treepo.checkpoint import RunState, save_checkpoint
from treepo.clean import CleanConfig
from treepo.cli import compose, config_dir
from treepo.config import TrainConfig
from treepo.loop import note_of_others, open_run, train
from treepo.names import check_names
from treepo.sizes import derived_sizes
from treepo.train import main, work


def configure(tmp_path, *overrides: str) -> TrainConfig:
    return compose("train", TrainConfig, [*SMALL, f"output_dir={tmp_path}", *overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.strategy=tre", "unknown rollout strategy 'tre'.*flat, treepo"),
        ("algorithm.adv_estimator=trepo", "unknown advantage estimator.*grpo.*treepo"),
        ("trainer.learner.policy_loss.name=ppo", "unknown policy loss.*ppo_clip"),
        ("trainer.learner.policy_loss.kl_loss_type=k1", "not used with kl_loss_coef=0"),
        ("trainer.learner.reference=lora_off", "not used with policy_loss.kl_loss_coef=0"),
        ("cluster.num_reference_workers=1", "not used with trainer.learner.reference='own'"),
        ("cluster.num_reference_workers=-1", "num_reference_workers"),
        ("trainer.learner.lora.rank=-1", "lora.rank=-1: must be >= 0"),
        ("trainer.learner.lora.alpha=16", "lora.alpha=16.0 is not used with lora.rank=0: set"),
        (
            "trainer.learner.lora.target_modules=[q_proj]",
            "target_modules.*not used with lora.rank=0",
        ),
        ("cluster.gpus_per_reference_worker=-1", "gpus_per_reference_worker=-1.0.*>= 0"),
        ("engine.kv_over_update=keep", "keep is for trees.*set trainer.segments.segment_length"),
        ("trainer.learner.policy_loss.clip_ratio_low=2", "clip_ratio_low=2.0: must be in"),
        ("reward.parts.reasoning_gym.name=maths", "unknown reward 'maths'.*math"),
        ("data.source=internet", "unknown data source.*file.*hub.*reasoning_gym"),
        ("rollout.branching=odd", "unknown branching rule 'odd'.*even"),
        ("rollout.temperature=1e-6", "rollout.temperature=1e-06.*0 .greedy. or >= 1e-05"),
        ("evaluation.temperature=1e-6", "evaluation.temperature=1e-06.*>= 1e-05"),
        ("+rollout.treeness=3", "'treeness' is not used.*segment_length"),
        ("trainer.ppo_mini_batch_size=3", "does not divide.*nearest that do: 2 or 4"),
        ("cluster.num_learner_ranks=3", "never have a tree"),
        ("cluster.weight_transport=nccl", "weight_transport='nccl'.*object_store or group"),
        ("cluster.weight_timeout_seconds=0", "weight_timeout_seconds=0.*> 0"),
        ("cluster.call_timeout_seconds=-1", "call_timeout_seconds=-1.*> 0"),
        (
            "rollout.segment_length=4",
            "segment_length=4 x rollout.max_depth=11.*rollout.max_depth=16",
        ),
        ("engine.num_kv_slots=100", "cannot hold one path of 128 tokens"),
        ("trainer.learner.max_tokens_per_micro_batch=256", "largest tree of 320 tokens"),
        ("model.path=no/such/folder", "no such folder"),
        ("model.path=asset:huge", "not shipped; shipped: tiny_chain_sum"),
        ("experiment_name=a/b", "folder name"),
        ("+trainer.total_step=9", "unknown key trainer.total_step: trainer knows.*total_steps"),
        ("+experiment_nam=x", "unknown key experiment_nam: the configuration knows"),
        ("reward.parts.reasoning_gym.name=nowhere.py:f", "reward file 'nowhere.py' does not exist"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        config = configure(tmp_path, override)
        check_names(config)
        derived_sizes(config)


def names_of_the_help() -> dict[str, set[str]]:
    """By key, the names that ``--help`` says it may have."""
    text = (config_dir() / "train.yaml").read_text()
    listed = text.split("Names that a key may have")[1].split("\n\n")[0].splitlines()[1:]
    found: dict[str, set[str]] = {}
    for line in listed:
        if ":" in line:
            key, _, line = line.partition(":")
        found.setdefault(key.strip(), set()).update(n.strip() for n in line.split(",") if n.strip())
    return found


@pytest.mark.parametrize(("key", "names"), names_of_the_help().items())
def test_the_help_lists_the_names_that_the_checks_know(tmp_path, key, names):
    with pytest.raises(ValueError, match="Known: |one of |must be ") as error:
        check_names(configure(tmp_path, f"{key}=zzz"))
    known = re.search(r"(?:Known: |must be (?:one of )?|one of )([\w, ]+)", str(error.value))[1]
    known = {name for name in re.split(r", | or ", known)} - {"nll"}  # supervised training alone
    assert known == names


def test_a_layer_that_the_model_lacks_is_named_before_the_model_is_loaded(tmp_path):
    words = ["trainer.learner.lora.rank=2", "trainer.learner.lora.target_modules=[q_proj,q_prj]"]
    with pytest.raises(ValueError, match="'q_prj' is no linear layer.*are down_proj.*q_proj"):
        derived_sizes(configure(tmp_path, *words))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.num_rollout_workers=400"], "not enough CPUs.*400.*missing.*Lower the numbers"),
        (["cluster.gpus_per_learner_rank=64"], "not enough GPUs.*64"),
        (["max_prompt_length=8"], "more than max_prompt_length=8"),
        (
            ["trainer.train_batch_size=128", "data.size=10"],
            "train_batch_size=128 is more than the 10 problems",
        ),
        (["resume_mode=nowhere"], "neither auto nor disable, nor a run's folder"),
    ],
)
def test_what_shows_only_when_a_run_is_opened_stops_it_before_any_work(
    tmp_path, overrides, message
):
    with pytest.raises(ValueError, match=message):
        train(configure(tmp_path, *overrides))
    assert not (tmp_path / "latest").exists()  # no run was begun


def test_a_dry_run_looks_at_the_run_that_it_would_resume(tmp_path):
    with pytest.raises(ValueError, match="neither auto nor disable, nor a run's folder"):
        work(configure(tmp_path, "resume_mode=nowhere"), True)


@pytest.mark.parametrize("flags", [[], ["-m"], ["--dry-run"]])
def test_a_command_without_arguments_is_refused(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "begin with +experiment=quickstart" in capsys.readouterr().err


def test_a_value_that_must_be_given_is_named_in_the_words_of_the_command_line():
    with pytest.raises(ValueError, match="^output is missing: give it as output=.*--help$"):
        compose("clean", CleanConfig, [])


def test_a_malformed_row_is_named_by_file_and_line(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1", "answer": "#### 2"}\n{"question": "", "answer": "x"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2"):
        train(configure(tmp_path, "data.source=file", f"data.files=[{rows}]"))


@pytest.mark.long
def test_a_model_that_the_load_probe_refuses_is_one_clear_error(tmp_path, tiny_model_path):
    from transformers import MambaConfig, MambaForCausalLM

    folder = tmp_path / "recurrent"
    shutil.copytree(tiny_model_path, folder)
    (folder / "model.safetensors").unlink()
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    MambaForCausalLM(
        MambaConfig(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=1, state_size=4)
    ).save_pretrained(folder)
    done = run(tmp_path / "outputs", f"model.path={folder}")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "mamba" in line.lower()


def test_an_unknown_key_on_the_command_line_ends_with_its_name(tmp_path):
    done = run(tmp_path, "trainer.total_step=3")
    assert done.returncode != 0
    assert "total_step" in done.stderr and "Traceback" not in done.stderr


def test_a_checkpoint_without_its_completion_marker_is_refused(tmp_path):
    from treepo.checkpoint import check_complete

    (tmp_path / "global_step_5").mkdir()
    with pytest.raises(ValueError, match="completion marker"):
        check_complete(tmp_path / "global_step_5")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "the folder has no weights"),
        (lambda file: file.write_bytes(file.read_bytes()[:4]), "no complete safetensors file"),
        (lambda file: file.write_bytes(file.read_bytes()[:1000]), "no complete safetensors file"),
    ],
)
def test_a_model_folder_without_whole_weights_is_named(tmp_path, tiny_model_path, damage, message):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model_path, folder)
    damage(folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        derived_sizes(configure(tmp_path, f"model.path={folder}"))


def test_weights_cut_short_behind_their_header_are_an_error_of_both_loaders(
    tmp_path, tiny_model_path
):
    from rollout.model_runner import load_model
    from trainers.model import load_policy
    from trainers.settings import LearnerSettings

    folder = tmp_path / "cut"
    shutil.copytree(tiny_model_path, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(folder, dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_policy(str(folder), LearnerSettings())


@pytest.mark.long
def test_a_verifier_that_always_fails_stops_the_run_with_its_error(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("def compute_score(data_source, solution_str, ground_truth):\n    1 / 0\n")
    name = f"reward.parts.custom.name={file}:compute_score"
    done = run(tmp_path, "reward=custom", name)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "got a verdict" in line and "ZeroDivisionError" in line
    assert "Traceback" not in done.stderr


def test_a_new_run_says_which_unfinished_one_it_does_not_go_on_with(tmp_path):
    run_of = {}
    for seed in (1, 2):
        config = configure(tmp_path, f"seed={seed}", "trainer.total_steps=9")
        run_of[seed], lock = open_run(config)
        lock.release()
    assert note_of_others(config, run_of[2]) == ""  # nothing of the first was saved
    state = RunState(
        step=1, policy_version=1, data_position={}, digest="", seconds=0.0, seed=1, before={},
        tracking={},
    )  # fmt: skip
    save_checkpoint(run_of[1].checkpoints, state, lambda folder: None, keep=1)
    note = note_of_others(config, run_of[2])
    assert f"the unfinished {run_of[1].path} has other settings (seed)" in note
    disabled = configure(tmp_path, "seed=2", "resume_mode=disable")
    assert note_of_others(disabled, run_of[2]) == ""
    longer = configure(tmp_path, "seed=1", "trainer.total_steps=10")
    third, lock = open_run(longer)
    lock.release()
    shutil.rmtree(run_of[2].path)
    assert f"start with resume_mode={run_of[1].path}" in note_of_others(longer, third)
    shutil.rmtree(third.path)
    run_of[1].finish({})
    assert note_of_others(config, run_of[2]) == ""


def test_a_run_is_resumed_by_path_with_its_own_settings_only(tmp_path):
    from treepo.cli import to_yaml
    from treepo.run_folder import begin_run

    config = configure(tmp_path)
    begun, lock = begin_run(tmp_path, "quickstart", to_yaml(config))
    lock.release()
    with pytest.raises(ValueError, match="other settings: seed, trainer.train_batch_size"):
        train(
            configure(tmp_path, f"resume_mode={begun.path}", "seed=5", "trainer.train_batch_size=2")
        )
    begun.finish({})
    with pytest.raises(ValueError, match="is finished.*model.path="):
        train(configure(tmp_path, f"resume_mode={begun.path}"))
