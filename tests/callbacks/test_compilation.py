import logging

import pytest
import torch
from toy_case import Toy, toy_loader
from training_case import distillation, trainer_for

from icd_lightning.callbacks.compilation import CompileNetworks
from icd_lightning.models.diffusion_model import why_not_compiled
from icd_lightning.tasks.sharding import ShardedStrategy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


def test_where_compilation_does_not_work_a_run_goes_on_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "icd_lightning")
    trainer_for(tmp_path, max_steps=2, callbacks=[CompileNetworks("nonsense")]).fit(task := Toy(), toy_loader())
    assert task.number.item() > 0
    (message,) = caplog.messages
    assert message.startswith("torch.compile does not work here, so networks run as they are (")


def test_a_compiler_that_fails_without_a_word_is_named_by_its_error(monkeypatch):
    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr(torch, "compile", fail)
    assert why_not_compiled(torch.device("cpu"), "inductor") == "AssertionError"


def test_networks_are_compiled_before_training_and_keep_the_names_of_their_weights(random_family, tmp_path):
    task = distillation(random_family)
    names, unet = [*task.state_dict()], task.students.network
    CompileNetworks("eager").setup(trainer_for(tmp_path), task, "validate")
    assert unet._compiled_call_impl is None
    CompileNetworks("eager").setup(trainer_for(tmp_path), task, "fit")
    assert unet._compiled_call_impl is not None
    assert [*task.state_dict()] == names


def test_networks_spread_over_devices_are_not_compiled(tmp_path):
    with pytest.raises(ValueError, match="CompileNetworks and ShardedStrategy do not go together"):
        CompileNetworks().setup(trainer_for(tmp_path, strategy=ShardedStrategy()), Toy(), "fit")
