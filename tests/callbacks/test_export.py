import pytest
import torch
from toy_case import Toy, toy_loader
from training_case import trainer_for

from icd_lightning.callbacks.averaging import ExponentialAverage
from icd_lightning.callbacks.export import ExportWeights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


def exported(folder) -> float:
    return float((folder / "number.txt").read_text())


def test_the_task_writes_into_the_runs_folder_or_another(tmp_path):
    for callback, folder in ((ExportWeights(), tmp_path / "run"), (ExportWeights(str(tmp_path / "x")), tmp_path / "x")):
        task = Toy()
        trainer_for(tmp_path / "run", max_steps=3, callbacks=[callback]).fit(task, toy_loader())
        assert exported(folder) == task.number.item() != 0


def test_it_writes_the_averaged_weights(tmp_path):
    last, averaged = Toy(), Toy()
    trainer_for(tmp_path, max_steps=3, callbacks=[ExportWeights()]).fit(last, toy_loader())
    plain = exported(tmp_path)
    trainer_for(tmp_path, max_steps=3, callbacks=[ExportWeights(), ExponentialAverage(0.5)]).fit(averaged, toy_loader())
    assert plain == last.number.item()
    assert exported(tmp_path) == averaged.number.item()
    assert 0 < exported(tmp_path) < plain


def test_a_trial_run_and_a_validation_write_nothing(tmp_path):
    trainer_for(tmp_path, fast_dev_run=True, callbacks=[ExportWeights()]).fit(Toy(), toy_loader())
    trainer_for(tmp_path, callbacks=[ExportWeights()]).validate(Toy(), toy_loader(), verbose=False)
    assert not (tmp_path / "number.txt").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_written(tmp_path, value):
    task = Toy()
    with torch.no_grad():
        task.number.fill_(value)
    trainer = trainer_for(tmp_path, max_steps=1, callbacks=[ExportWeights()])
    with pytest.raises(ValueError, match=r"number is not finite after step 1, so nothing is exported: .*smaller lr"):
        trainer.fit(task, toy_loader())
    assert not (tmp_path / "number.txt").exists()
