"""The folder of a run that is not resumed: one that is refused, and one in which the run begins anew."""

import pytest
from helpers import assert_same_result

from alter import InputError, train
from alter.common.load import as_yaml
from alter.training.trainer import Trainer


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stopped(small_config, monkeypatch):
    """Stops a run after two steps, before its first checkpoint."""
    def stop(**changes):
        config, iteration = small_config("dit", **changes), Trainer.iteration

        def iterate(trainer, batches):
            if trainer.step == 2:
                raise KeyboardInterrupt
            return iteration(trainer, batches)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "iteration", iterate)
            with pytest.raises(KeyboardInterrupt):
                train(config)
        return config

    return stop


def test_a_run_stopped_before_its_first_checkpoint_begins_anew(small_config, tmp_path, stopped):
    config = stopped()
    assert (tmp_path / "run/metrics.jsonl").is_file() and not (tmp_path / "run/checkpoints").exists()
    whole = train(small_config("dit", output_dir="whole")).run_dir
    assert_same_result(train(config).run_dir, whole)
    for name in ("history.jsonl", "config.yaml"):
        assert (tmp_path / "run" / name).read_text() == (whole / name).read_text().replace(
            "output_dir: whole", f"output_dir: {config.output_dir}"), name
    with pytest.raises(InputError, match="is not empty: choose another, or set resume=latest"):
        train(config)


def test_what_changes_a_run_harmlessly_may_change_then(small_config, tmp_path, stopped):
    stopped()
    train(small_config("dit", backbone={"gradient_checkpointing": True}))


def test_a_folder_of_another_run_or_of_the_user_is_refused(small_config, tmp_path, stopped):
    config = stopped()
    refusal = pytest.raises(InputError, match="is not empty: choose another, or empty it")
    with refusal:
        train(small_config("dit", seed=1))
    (tmp_path / "run/final").mkdir()
    with refusal:
        train(config)
    (tmp_path / "run/final").rmdir()
    for written in ("# mine\n" + as_yaml(config), "nonsense", "a: [", ""):
        (tmp_path / "run/config.yaml").write_text(written)
        with refusal:
            train(config)
        assert (tmp_path / "run/config.yaml").read_text() == written
