"""Laws that hold for any input, or the input is refused by a ValueError: searched for counterexamples by hypothesis."""

import io
import math
import tarfile
from contextlib import suppress
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_lightning.data.decoding import SampleDecoder
from icd_lightning.data.manifest import Manifest
from icd_lightning.data.plan import Plan
from icd_lightning.data.tally import NothingToReadError, RejectedError
from icd_lightning.data.tars import read_samples, write_tar
from icd_lightning.diffusion import VP, Boundaries, CADSGuidance, Flow, IntervalGuidance, StepGuidance
from icd_lightning.editing.prompt_to_prompt.alignment import PromptTokens, align
from icd_lightning.evaluation.examples import decode_mask
from icd_lightning.files import parse_object
from icd_lightning.models.sources import shipped
from icd_lightning.models.text import CLIPTokenizer
from icd_lightning.tasks.base import OptimizerSettings

searched = settings(max_examples=100, deadline=None, derandomize=True, database=None)
numbers = st.one_of(st.floats(), st.integers(-5, 5), st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf]))
whole = st.integers(-10, 1200)
TIMES = torch.arange(1000)


@searched
@given(ends=st.lists(whole, max_size=6), start=whole, off_grid=st.booleans())
def test_boundaries_lead_from_noise_to_data_and_back_or_are_refused(ends, start, off_grid):
    try:
        boundaries = Boundaries(tuple(ends), start, allow_off_grid=off_grid)
    except ValueError:
        return
    down, up = boundaries.jumps["reverse"], boundaries.jumps["forward"]
    assert (down[0][0], down[-1][1]) == (999, 0)
    assert (up[0][0], up[-1][1]) == (boundaries.start_timestep, 999)
    for jumps in (down, up):
        assert all(first[1] == second[0] for first, second in pairwise(jumps))
    for direction, pairs in boundaries.pairs.items():
        towards = pairs.t_next <= pairs.t if direction == "reverse" else pairs.t_next >= pairs.t
        assert towards.all()
        assert pairs.segment.min() >= 0
        assert pairs.segment.max() < boundaries.num_segments


@searched
@given(
    first=numbers, last=numbers, steps=st.integers(-2, 2000), schedule=st.sampled_from(["linear", "scaled_linear", "x"])
)
def test_a_vp_schedule_falls_and_keeps_the_variance_or_is_refused(first, last, steps, schedule):
    try:
        process = VP(num_train_timesteps=steps, beta_start=first, beta_end=last, beta_schedule=schedule)
    except (ValueError, TypeError):
        return
    alphas, sigmas = process.alphas, process.sigmas
    assert alphas.isfinite().all()
    assert (alphas.diff() <= 0).all()
    torch.testing.assert_close(alphas**2 + sigmas**2, torch.ones_like(alphas))


@searched
@given(shift=numbers, steps=st.integers(-2, 2000))
def test_a_flow_rises_to_noise_or_is_refused(shift, steps):
    try:
        process = Flow(num_train_timesteps=steps, shift=shift)
    except ValueError:
        return
    assert (process.sigmas.diff() >= 0).all()
    assert process.sigmas.min() >= 0
    torch.testing.assert_close(process.alphas + process.sigmas, torch.ones(steps))


@searched
@given(
    scale=numbers, lower=numbers, upper=numbers, kind=st.sampled_from([StepGuidance, CADSGuidance, IntervalGuidance])
)
def test_guidance_lies_between_none_and_its_scale_or_is_refused(scale, lower, upper, kind):
    names = {StepGuidance: ("tau",), CADSGuidance: ("tau1", "tau2"), IntervalGuidance: ("lo", "hi")}[kind]
    try:
        guidance = kind(scale, **dict(zip(names, (lower, upper), strict=False)))
    except ValueError:
        return
    w = guidance(TIMES)
    assert w.min() >= min(1.0, scale) * (1 - 1e-6)
    assert w.max() <= max(1.0, scale) * (1 + 1e-6)


@cache
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(shipped() / "tokenizer")


words = st.lists(
    st.sampled_from(["a", "large", "red", "green", "circle", "star", "on", "background", "ünknown", "x"]), max_size=9
)


@searched
@given(source=words, target=words, kind=st.sampled_from(["auto", "replace", "refine"]))
def test_an_alignment_maps_each_target_token_to_a_share_of_the_source_or_is_refused(source, target, kind):
    try:
        sides = [PromptTokens.read(" ".join(side), tokenizer()) for side in (source, target)]
        alignment = align(*sides, tokenizer().model_max_length, kind)
    except ValueError:
        return
    assert ((alignment.aligned == 0) | (alignment.aligned == 1)).all()
    shares = alignment.mapper.sum(0)[alignment.aligned == 1]
    assert (shares >= 0).all()
    if source == target:
        length = len(sides[0].ids)
        assert torch.equal(alignment.mapper[:length, :length], torch.eye(length))


@searched
@given(runs=st.lists(st.integers(-600, 600), max_size=6), side=st.integers(2, 16))
def test_a_mask_covers_its_runs_and_the_border_or_is_refused(runs, side):
    try:
        mask = decode_mask(runs, side)
    except ValueError:
        assert len(runs) % 2 or min(runs) < 0
        return
    inside = {
        place for start, length in zip(runs[::2], runs[1::2], strict=True) for place in range(start, start + length)
    }
    border = np.ones((side, side), bool)
    border[1:-1, 1:-1] = False
    wanted = np.array([place in inside for place in range(side * side)]).reshape(side, side) | border
    np.testing.assert_array_equal(mask, wanted)


@searched
@given(lr=numbers, decay=numbers, clip=st.none() | numbers, warmup=st.integers(-3, 50), first=numbers, second=numbers)
def test_a_learning_rate_is_a_finite_share_or_its_settings_are_refused(lr, decay, clip, warmup, first, second):
    try:
        options = OptimizerSettings(
            lr=lr, weight_decay=decay, clip=clip, warmup_steps=warmup, betas=(first, second), decay="cosine"
        )
    except ValueError:
        return
    assert all(0 <= options.factor(step, 100) <= 1 for step in range(120))
    torch.optim.AdamW([torch.zeros(1)], lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)


extensions = st.sampled_from(["png", "jpg", "webp", "txt", "caption", "json", "moments.npy", "text.safetensors", "x"])
contents = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20).map(str.encode),
    st.sampled_from(
        [b"{}", b"[]", b"null", b"NaN", b'{"moments": 3}', b"\x93NUMPY\x01\x00", b"\x89PNG\r\n\x1a\n", b"RIFF"]
    ),
)


@searched
@given(
    shards=st.lists(st.lists(st.sampled_from([0, 0, 0, 0, 1, 2]), max_size=12), min_size=1, max_size=8),
    batch_size=st.integers(1, 9),
    window=st.integers(0, 40),
    start=st.integers(0, 60),
)
def test_batches_show_each_sample_once_a_pass_and_are_of_one_form(shards, batch_size, window, start):
    forms = np.array([form for shard in shards for form in shard], np.int16)
    if not len(forms):
        return
    bounds = np.concatenate([[0], np.cumsum([len(shard) for shard in shards])])
    plan, again = (Plan(forms, bounds, batch_size=batch_size, seed=7, window=window) for _ in range(2))
    passes = batch_size  # after so many, every form has filled its last batch
    seen = [plan.batch(number) for number in range(len(forms))]
    assert np.bincount(np.concatenate(seen), minlength=len(forms)).tolist() == [passes] * len(forms)
    assert all(len(batch) == batch_size and len(set(forms[batch])) == 1 for batch in seen)
    number = start % len(seen)
    assert again.batch(number).tolist() == seen[number].tolist()


@searched
@given(files=st.dictionaries(extensions, contents, max_size=5), field=st.none() | st.text(max_size=3))
def test_a_sample_of_any_bytes_is_decoded_or_rejected_with_a_reason(files, field):
    raw = {"__key__": "a", "__url__": "0.tar", **files}
    try:
        SampleDecoder(64, field).decode(raw)
    except (RejectedError, NothingToReadError):
        return


@searched
@given(
    files=st.dictionaries(extensions, contents, min_size=1, max_size=5),
    cut=st.integers(0, 4000),
    flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4),
)
def test_a_tar_of_any_bytes_is_read_or_ends_in_an_error_of_reading(files, cut, flips, tmp_path_factory):
    path = tmp_path_factory.mktemp("tar") / "0.tar"
    write_tar([{"__key__": "a", **files}], path)
    data = bytearray(path.read_bytes())
    for place, value in flips:
        data[place % len(data)] = value
    with suppress(OSError, ValueError, tarfile.TarError):
        for sample in read_samples(io.BytesIO(bytes(data[: len(data) - cut])), "0.tar"):
            assert all(isinstance(value, (str, bytes)) for value in sample.values())


@searched
@given(
    text=st.text(max_size=60)
    | st.sampled_from(['{"shards": {}}', '{"parameters": {}, "shards": {"a.tar": {}}, "complete": true}'])
)
def test_a_manifest_of_any_text_is_read_or_refused(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    (folder / "manifest.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with suppress(ValueError):
        assert isinstance(Manifest.load(folder), Manifest)


@searched
@given(text=st.text(max_size=60))
def test_json_of_any_text_is_an_object_or_refused(text):
    with suppress(ValueError):
        assert isinstance(parse_object(text, "x.json"), dict)


def test_the_search_would_find_a_law_that_does_not_hold():
    @searched
    @given(number=st.integers())
    def wrong(number):
        assert number < 100

    with pytest.raises(AssertionError):
        wrong()
