import shutil
from itertools import chain

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from recorder_case import Recorder, data_for, trainer_for
from shards_case import corrupt, cut_after, numbered_samples, numbers

from icd_lightning.data.shards import write_shards
from icd_lightning.data.tars import INDEX

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_trainer_sees_every_sample_once_an_epoch(shards, tmp_path, num_workers):
    module = Recorder()
    trainer_for(tmp_path).fit(module, datamodule=data_for(shards, num_workers=num_workers, val_urls=str(shards)))
    assert [len(batch) for batch in module.trained] == [5] * 24
    for epoch in (module.trained[:12], module.trained[12:]):
        assert sorted(chain(*epoch)) == list(range(60))
    assert module.trained[:12] != module.trained[12:]
    assert module.validated[-60:] == list(range(60))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_gives_the_same_batches_each_time(shards, num_workers):
    def first_epochs():
        data = data_for(shards, num_workers=num_workers)
        data.setup("fit")
        loader = data.train_dataloader()
        assert len(loader) == 12
        return [[numbers(batch) for batch in loader] for _ in range(2)]

    epochs = first_epochs()
    assert epochs == first_epochs()
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_overfitting_shows_the_same_batches_every_epoch(shards, tmp_path, num_workers):
    module = Recorder()
    options = {"overfit_batches": 2, "max_epochs": 3}
    data = data_for(shards, num_workers=num_workers, val_urls=str(shards), val_batch_size=10)
    trainer_for(tmp_path, **options).fit(module, datamodule=data)
    assert len(module.trained) == 6
    assert module.trained[:2] == module.trained[2:4] == module.trained[4:]
    assert module.trained[0] != module.trained[1]
    assert module.validated == [*range(20)] * 3


@pytest.mark.parametrize(
    ("accumulated", "steps", "batches"),
    [(5, 2, 10), (12, 1, 12), (16, 1, 16)],  # 12 batches: two are left over, none, and four come again
)
def test_every_optimizer_step_sees_the_whole_global_batch(shards, tmp_path, caplog, accumulated, steps, batches):
    module, seen = Recorder(), []

    class Steps(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append(len(module.trained))

    options = {"accumulate_grad_batches": accumulated, "callbacks": [Steps()], "max_epochs": 2}
    trainer_for(tmp_path, **options).fit(module, datamodule=data_for(shards))
    assert seen == [accumulated * (step + 1) for step in range(2 * steps)]
    assert len(module.trained) == 2 * batches
    assert len(set(chain(*module.trained[:batches]))) == min(60, 5 * batches)
    assert ("takes 16 batches of each rank, and an epoch has 12" in caplog.text) == (accumulated == 16)


# --- resuming ---------------------------------------------------------------------------------------------------------

RUNS = {
    "epochs": {"max_epochs": 3},
    "steps": {"max_epochs": -1, "max_steps": 36},
    "short epochs": {"max_epochs": 8, "limit_train_batches": 5},
    "accumulation": {"max_epochs": 3, "accumulate_grad_batches": 2},
    "validation inside": {"max_epochs": 3, "val_check_interval": 4},
    "validation by steps": {"max_steps": 36, "val_check_interval": 7, "check_val_every_n_epoch": None},
}


def unbroken(shards, tmp_path, run: str, data: dict) -> list[list[int]]:
    module = Recorder()
    trainer_for(tmp_path, **RUNS[run]).fit(module, datamodule=data_for(shards, **data))
    return module.trained


@pytest.mark.parametrize(
    ("run", "stop_at", "num_workers"),
    [("accumulation", 12, 0), ("validation inside", 3, 0), ("validation by steps", 12, 0), ("epochs", 17, 2)],
)
def test_a_killed_and_resumed_run_sees_the_batches_of_an_unbroken_one(shards, tmp_path, run, num_workers, stop_at):
    data = {"num_workers": num_workers, "val_urls": str(shards)}
    whole = unbroken(shards, tmp_path, run, data)
    # saved at every second batch, and killed in one after: what was trained on since is trained on again
    every = 2 // RUNS[run].get("accumulate_grad_batches", 1)
    save = ModelCheckpoint(
        tmp_path, every_n_train_steps=every, save_last=True, save_top_k=0, enable_version_counter=False
    )
    killed, resumed = Recorder(stop_at), Recorder()
    with pytest.raises(RuntimeError, match="killed"):
        trainer_for(tmp_path, callbacks=[save], **RUNS[run]).fit(killed, datamodule=data_for(shards, **data))
    trainer = trainer_for(tmp_path, **RUNS[run])
    trainer.fit(resumed, datamodule=data_for(shards, **data), ckpt_path=tmp_path / "last.ckpt")
    assert killed.trained == whole[:stop_at]
    assert resumed.trained == whole[len(whole) - len(resumed.trained) :]
    assert stop_at - 4 < len(whole) - len(resumed.trained) <= stop_at


@pytest.mark.parametrize(("run", "stop_at"), [("steps", 13), ("short epochs", 7), ("epochs", 1), ("accumulation", 7)])
def test_a_run_saved_by_the_exception_itself_goes_on_with_the_batch_it_died_in(shards, tmp_path, run, stop_at):
    whole = unbroken(shards, tmp_path, run, {})
    killed, resumed = Recorder(stop_at), Recorder()
    save = ModelCheckpoint(tmp_path, filename="died", every_n_train_steps=999, save_on_exception=True)
    with pytest.raises(RuntimeError, match="killed"):
        trainer_for(tmp_path, callbacks=[save], **RUNS[run]).fit(killed, datamodule=data_for(shards))
    trainer_for(tmp_path, **RUNS[run]).fit(resumed, datamodule=data_for(shards), ckpt_path=tmp_path / "died.ckpt")
    assert killed.trained + resumed.trained == whole


@pytest.mark.parametrize(
    ("run", "when"), [("epochs", "on_train_epoch_end"), ("steps", "on_validation_end"), ("epochs", "on_train_end")]
)
def test_a_run_saved_between_epochs_goes_on_with_the_next(shards, tmp_path, run, when):
    class Save(Callback):
        def state_dict(self):
            return {}

    def save(self, trainer, module):
        if trainer.state.fn == "fit":
            trainer.save_checkpoint(tmp_path / f"{len(module.trained)}.ckpt")

    setattr(Save, when, save)
    data = {"val_urls": str(shards)}
    options = RUNS[run]
    whole = unbroken(shards, tmp_path, run, data)
    half = {"max_epochs": 2} if run == "epochs" else {"max_epochs": -1, "max_steps": 24}
    trainer_for(tmp_path, callbacks=[Save()], **(options | half)).fit(Recorder(), datamodule=data_for(shards, **data))
    resumed = Recorder()
    trainer_for(tmp_path, **options).fit(resumed, datamodule=data_for(shards, **data), ckpt_path=tmp_path / "24.ckpt")
    assert resumed.trained == whole[24:]


def test_resuming_goes_on_exactly_among_corrupt_pictures(tmp_path):
    samples = [corrupt(s) if n % 7 == 3 else s for n, s in enumerate(numbered_samples(60))]
    write_shards(samples, tmp_path / "shards", shard_size=10, parameters={})
    test_a_run_saved_by_the_exception_itself_goes_on_with_the_batch_it_died_in(
        tmp_path / "shards", tmp_path, "epochs", 13
    )


def test_resuming_with_another_batch_size_goes_on_at_the_same_sample(shards, tmp_path, caplog):
    save = OnExceptionCheckpoint(tmp_path, filename="died")
    with pytest.raises(RuntimeError, match="killed"):
        trainer_for(tmp_path, callbacks=[save]).fit(Recorder(8), datamodule=data_for(shards))
    resumed, fresh = Recorder(), Recorder()
    options = {"batch_size": 10}
    trainer_for(tmp_path, max_epochs=1).fit(fresh, datamodule=data_for(shards, **options))
    trainer_for(tmp_path, max_steps=10).fit(
        resumed, datamodule=data_for(shards, **options), ckpt_path=tmp_path / "died.ckpt"
    )
    assert resumed.trained[:2] == fresh.trained[4:]
    assert "batch_size was 5, is 10" in caplog.text


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"resolution": 4}, "resolution was 8, is 4"),
        ({"caption_field": "title"}, "caption_field was None, is title"),
        ({"shuffle_buffer": 9}, "shuffle_buffer was 8, is 9"),
    ],
)
def test_resuming_on_other_samples_says_what_changed(shards, tmp_path, caplog, options, change):
    trainer = trainer_for(tmp_path, max_epochs=1)
    data = data_for(shards)
    trainer.fit(Recorder(), datamodule=data)
    state = data.state_dict()
    for urls, settings, expected in ((shards, options, change), (shards, {}, None)):
        caplog.clear()
        other = data_for(urls, **settings)
        other.setup("fit")
        other.load_state_dict(state)
        assert ("not with the same samples" in caplog.text) == (expected is not None)
        assert (expected or "") in caplog.text


@pytest.mark.parametrize(("verify", "told"), [("count", None), ("off", "num_workers was 1, is 2")])
def test_another_number_of_workers_changes_the_samples_of_shards_without_an_index_alone(
    shards, tmp_path, caplog, verify, told
):
    data = data_for(shards, verify=verify, batches_per_epoch=12)
    trainer_for(tmp_path, max_epochs=1).fit(Recorder(), datamodule=data)
    other = data_for(shards, verify=verify, batches_per_epoch=12, num_workers=2)
    other.setup("fit")
    other.load_state_dict(data.state_dict())
    assert ("not with the same samples" in caplog.text) == (told is not None)
    assert (told or "") in caplog.text


def test_a_data_module_without_a_trainer_is_prepared_too(shards):
    data = data_for(shards)
    data.prepare_data()
    assert len(list(shards.glob(f"*{INDEX}"))) == 6
    data.setup("fit")
    assert len(list(data.train_dataloader())) == 12


def test_what_is_not_trained_on_is_not_indexed(shards, tmp_path):
    other = tmp_path / "val"
    write_shards(numbered_samples(20), other, shard_size=10, parameters={})
    data = {"val_urls": str(other), "num_workers": 0}
    trainer_for(tmp_path).validate(Recorder(), datamodule=data_for(shards, **data))
    assert not [*shards.glob(f"*{INDEX}"), *other.glob(f"*{INDEX}")]
    trainer_for(tmp_path, max_epochs=1).fit(Recorder(), datamodule=data_for(shards, **data))
    assert len(list(shards.glob(f"*{INDEX}"))) == 6
    assert not list(other.glob(f"*{INDEX}"))


def test_resuming_on_a_copy_is_silent_and_on_other_data_of_equal_counts_is_not(shards, tmp_path, caplog):
    data = data_for(shards)
    trainer_for(tmp_path, max_epochs=1).fit(Recorder(), datamodule=data)
    shutil.copytree(shards, tmp_path / "copy")
    write_shards(numbered_samples(60, size=16), tmp_path / "other", shard_size=10, parameters={"seed": 0})
    for folder, silent in (("copy", True), ("other", False)):
        caplog.clear()
        other = data_for(tmp_path / folder)
        other.setup("fit")
        other.load_state_dict(data.state_dict())
        assert ("shards was" not in caplog.text) == silent


def test_a_checkpoint_can_be_evaluated(shards, tmp_path):
    module = Recorder()
    trainer = trainer_for(tmp_path, max_epochs=1)
    trainer.fit(module, datamodule=data_for(shards))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer_for(tmp_path).validate(
        module, datamodule=data_for(shards, val_urls=str(shards)), ckpt_path=tmp_path / "a.ckpt"
    )
    assert module.validated == list(range(60))


def test_starting_workers_leaves_the_global_generator_alone(shards):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    data = data_for(shards, num_workers=1, val_urls=str(shards))
    data.setup("fit")
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    assert torch.equal(before, torch.get_rng_state())


# --- ranks ------------------------------------------------------------------------------------------------------------


class CheckRanks(Callback):
    """Gathers what all ranks saw; the assertions run in the ranks' own processes."""

    def on_train_epoch_end(self, trainer, module):
        every = [None] * trainer.world_size
        torch.distributed.all_gather_object(every, module.trained)
        assert sorted(chain(*chain(*every))) == list(range(60))
        module.trained.clear()

    def on_validation_end(self, trainer, module):
        every = [None] * trainer.world_size
        torch.distributed.all_gather_object(every, module.validated)
        assert sorted(chain(*every)) == list(range(60))
        module.validated.clear()


@pytest.mark.parametrize("use_distributed_sampler", [False, True])
def test_two_processes_share_out_the_samples(shards, tmp_path, use_distributed_sampler):
    trainer_for(
        tmp_path,
        devices=2,
        strategy="ddp_fork",
        callbacks=[CheckRanks()],
        use_distributed_sampler=use_distributed_sampler,
    ).fit(Recorder(), datamodule=data_for(shards, num_workers=1, val_urls=str(shards), val_batch_size=7))


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"val_batch_size": 0}, "val_batch_size 0 must be at least 1"),
        ({"resolution": 0}, "resolution 0 must be at least 1"),
        ({"num_workers": -1}, "num_workers -1 must be at least 0"),
        ({"shuffle_buffer": -1}, "shuffle_buffer -1 must be at least 0"),
        ({"batches_per_epoch": 0}, "batches_per_epoch 0 must be at least 1"),
        ({"max_skipped": 1.5}, "max_skipped 1.5 must lie between 0 and 1"),
        ({"stall_timeout": 0.0}, "stall_timeout 0.0 must be more than 0"),
    ],
)
def test_wrong_values_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        data_for("shards", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 16}, r"none of the first 60 samples of urls .*00000.tar is 8 x 8.*lower resolution"),
        ({"caption_field": "caption"}, r"none of the first .*no json field 'caption'.*give a caption_field .*title"),
        ({"batch_size": 61}, r"urls hold 60 samples, too few for one batch of 61 on each of 1 ranks"),
        ({"verify": "off"}, r"how many samples .*00000.tar holds is not known in advance: give batches_per_epoch"),
        (
            {"verify": "off", "batches_per_epoch": 2, "num_workers": 7},
            r"urls hold 6 uncounted shards, too few for 7 readers \(1 ranks x 7 workers\)",
        ),
        ({"val_urls": "pipe:cat x.tar"}, r"val_urls holds pipe:cat x.tar"),
        ({"val_urls": "/nowhere"}, r"/nowhere does not exist"),
    ],
)
def test_what_cannot_work_is_refused_before_training(shards, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trainer_for(tmp_path).fit(Recorder(), datamodule=data_for(shards, **options))


def test_damaged_and_empty_shards_are_refused_before_training(shards, tmp_path):
    cut_after(shards / "00002.tar", 7)
    with pytest.raises(ValueError, match=r"00002.tar holds 7 samples"):
        trainer_for(tmp_path).fit(Recorder(), datamodule=data_for(shards))
    with pytest.raises(FileNotFoundError, match=r"no .tar shards in"):
        trainer_for(tmp_path).fit(Recorder(), datamodule=data_for(tmp_path))
    (shards / "manifest.json").unlink()
    for shard in shards.glob("*.tar"):
        shard.write_bytes(bytes(1024))
    with pytest.raises(ValueError, match="the shards of urls hold no samples"):
        data_for(shards).setup("fit")


def test_validation_needs_shards(shards, tmp_path):
    with pytest.raises(ValueError, match="val_urls is not given"):
        trainer_for(tmp_path).validate(Recorder(), datamodule=data_for(shards))
    module = Recorder()
    trainer_for(tmp_path).test(module, datamodule=data_for(shards, val_urls=str(shards), val_batch_size=8))
    assert module.validated == list(range(60))


def test_a_training_that_validates_nothing_says_so(shards, tmp_path, caplog):
    trainer_for(tmp_path).fit(Recorder(), datamodule=data_for(shards))
    assert "val_urls is not given: nothing is validated" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shards_that_go_bad_during_training_end_it_with_one_clear_error(shards, tmp_path, num_workers):
    class Spoil(Callback):
        def on_train_start(self, trainer, module):
            for shard in shards.glob("*.tar"):
                shard.unlink()

    data = data_for(shards, num_workers=num_workers)
    message = r"^none of the samples for rank 0 .* \(skipped: broken_shard \d+; for one, .*\d.tar cannot be read"
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, callbacks=[Spoil()]).fit(Recorder(), datamodule=data)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_callback_can_read_what_was_skipped_and_why(tmp_path, num_workers):
    samples = numbered_samples(60)
    samples[7] |= {"txt": b""}
    samples[9] = corrupt(samples[9])
    write_shards(samples, tmp_path / "shards", shard_size=10, parameters={})
    seen = []

    class Report(Callback):
        def on_train_epoch_end(self, trainer, module):
            seen.append(trainer.datamodule.train_tally.counts())

    data = data_for(tmp_path / "shards", num_workers=num_workers, val_urls=str(tmp_path / "shards"))
    module = Recorder()
    trainer_for(tmp_path, callbacks=[Report()], max_epochs=1).fit(module, datamodule=data)
    assert seen[0]["no_caption"] >= 1
    assert seen[0]["corrupt_image"] >= 1
    assert data.val_tally.counts()["corrupt_image"] == 1
    assert module.validated == [n for n in range(60) if n not in (7, 9)]
