"""The text of the training job: its sources, its split, and the losses of counting."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_lm import corpus
from train_lm.corpus import Corpus, count_baselines, count_pairs, is_held_out, load_corpus

LINE = b"the quick brown fox jumps over the lazy dog\n"


def write_files(folder, number, nbytes=4000):
    for i in range(number):
        path = folder / f"part{i % 7}" / f"file{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"<{i}>".encode() * (nbytes // len(f"<{i}>")))


def test_the_standard_library_is_there_and_long_enough():
    text = load_corpus(None, context=128)
    assert len(text.train) > 5_000_000
    assert 0.05 < len(text.held_out) / (len(text.train) + len(text.held_out)) < 0.2
    assert b"def " in text.held_out.tobytes()


def test_a_file_lies_wholly_on_the_side_its_path_decides(tmp_path):
    write_files(tmp_path, 200)
    text = load_corpus(tmp_path, context=16)
    train, held_out = text.train.tobytes(), text.held_out.tobytes()
    for path in tmp_path.rglob("*.txt"):
        own, other = (
            (held_out, train) if is_held_out(name_of(path, tmp_path)) else (train, held_out)
        )
        assert path.read_bytes() in own
        assert path.read_bytes() not in other


def name_of(path, root):
    return path.relative_to(root).as_posix()


def test_a_copy_of_a_folder_is_split_alike(tmp_path):
    texts = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_files(tmp_path / name, 100)
        texts.append(load_corpus(tmp_path / name, context=16))
    np.testing.assert_array_equal(texts[0].train, texts[1].train)
    np.testing.assert_array_equal(texts[0].held_out, texts[1].held_out)


@pytest.mark.parametrize("nbytes", [corpus.MIN_TEXT_NBYTES, 100_001, 1_000_000])
def test_a_single_file_is_split_into_chunks(tmp_path, nbytes):
    content = np.random.default_rng(0).integers(1, 256, nbytes, dtype=np.uint8).tobytes()
    (tmp_path / "text").write_bytes(content)
    text = load_corpus(tmp_path / "text", context=128)
    assert len(text.train) + len(text.held_out) == nbytes
    assert 0.02 < len(text.held_out) / nbytes < 0.25
    for start in range(0, len(text.held_out) - corpus.CHUNK_NBYTES, corpus.CHUNK_NBYTES):
        chunk = text.held_out[start : start + corpus.CHUNK_NBYTES].tobytes()
        assert content.index(chunk) % corpus.CHUNK_NBYTES == 0
        assert chunk not in text.train.tobytes()


def test_few_files_are_split_into_chunks_too(tmp_path):
    write_files(tmp_path, 3, nbytes=100_000)
    text = load_corpus(tmp_path, context=128)
    assert len(text.held_out) > 10_000
    assert len(text.train) > 200_000


def test_hidden_and_binary_files_are_left_out(tmp_path):
    (tmp_path / "text").write_bytes(LINE * 4000)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_bytes(b"hidden" * 1000)
    (tmp_path / "image").write_bytes(b"\0binary" * 1000)
    text = load_corpus(tmp_path, context=16)
    assert len(text.train) + len(text.held_out) == len(LINE * 4000)


@pytest.mark.parametrize("name", ["absent", "absent/deeper", "file/below"])
def test_missing_text_is_named(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"^--text must be .*; got .*{name}.*\. .*\.$"):
        load_corpus(tmp_path / name, context=16)


@pytest.mark.parametrize("nbytes", [0, 1, corpus.MIN_TEXT_NBYTES - 1])
def test_short_text_is_refused_with_its_length(tmp_path, nbytes):
    (tmp_path / "text").write_bytes(b"x" * nbytes)
    for path in (tmp_path, tmp_path / "text"):
        with pytest.raises(ValueError, match=rf"must hold at least 65,536 .* got {nbytes:,} in "):
            load_corpus(path, context=16)


def test_context_longer_than_the_held_out_text_is_refused(tmp_path):
    (tmp_path / "text").write_bytes(LINE * 2000)
    with pytest.raises(ValueError, match=r"--context must be shorter .* got 50,000\. "):
        load_corpus(tmp_path / "text", context=50_000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_text_is_refused(tmp_path):
    (tmp_path / "text").write_bytes(LINE * 4000)
    (tmp_path / "text").chmod(0)
    with pytest.raises(ValueError, match=r"--text must be readable; got .*text.*: Permission"):
        load_corpus(tmp_path / "text", context=16)


def counting_corpus(train_nbytes, held_out_nbytes):
    """Make texts in which each byte is its position modulo 256."""
    train, held_out = (np.arange(n, dtype=np.uint8) for n in (train_nbytes, held_out_nbytes))
    return Corpus("counting", train, held_out)


@settings(deadline=None)
@given(
    length=st.integers(2, 600),
    context=st.integers(1, 300),
    batch=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_batches_are_pieces_of_the_text(length, context, batch, seed):
    context = min(context, length - 1)
    text = counting_corpus(length, length)
    inputs, targets = text.draw_batch(np.random.default_rng(seed), batch, context)
    assert inputs.shape == targets.shape == (batch, context)
    np.testing.assert_array_equal(targets, inputs + np.uint8(1))


def test_parts_of_a_batch_make_the_whole():
    text = counting_corpus(5000, 5000)
    whole, _ = text.draw_batch(np.random.default_rng(5), 7, 16)
    for size in 1, 2, 3, 7:
        joined = np.empty_like(whole)
        for rank in range(size):
            part = slice(rank, None, size)
            joined[part], _ = text.draw_batch(np.random.default_rng(5), 7, 16, part)
        np.testing.assert_array_equal(joined, whole)


def test_a_fingerprint_is_of_the_content(tmp_path):
    write_files(tmp_path, 100)
    text = load_corpus(tmp_path, context=16)
    moved = Corpus("elsewhere", text.train.copy(), text.held_out.copy())
    assert moved.fingerprint == text.fingerprint
    moved.held_out[-1] ^= 1
    assert moved.fingerprint != text.fingerprint


def test_batches_reach_both_ends_of_the_text():
    text = Corpus("short", np.array([1, 2, 3, 4], np.uint8), np.zeros(4, np.uint8))
    inputs, targets = text.draw_batch(np.random.default_rng(0), 100, 2)
    assert set(inputs[:, 0]) == {1, 2}
    assert set(targets[:, -1]) == {3, 4}


@settings(deadline=None)
@given(length=st.integers(2, 2000), context=st.integers(1, 300), count=st.integers(1, 40))
def test_held_out_windows_cover_the_text_evenly(length, context, count):
    context = min(context, length - 1)
    text = counting_corpus(length, length)
    inputs, targets = text.held_out_windows(count, context)
    assert 1 <= len(inputs) <= count
    np.testing.assert_array_equal(targets, inputs + np.uint8(1))
    assert inputs[0, 0] == 0
    if len(inputs) > 1:
        assert targets[-1, -1] == (length - 1) % 256
    assert len(inputs) * context <= length + context, "windows hardly overlap"


@given(st.binary(min_size=1, max_size=3000))
def test_pairs_are_counted_once_each(content):
    text = np.frombuffer(content, np.uint8)
    counts = np.zeros((256, 256), int)
    np.add.at(counts, (text[:-1], text[1:]), 1)
    np.testing.assert_array_equal(count_pairs(text), counts)


def test_pairs_across_the_blocks_of_a_long_text_are_counted(monkeypatch):
    text = np.random.default_rng(0).integers(0, 4, 1000, dtype=np.uint8)
    whole = count_pairs(text)
    monkeypatch.setattr(corpus, "COUNT_BLOCK_NBYTES", 7)
    np.testing.assert_array_equal(count_pairs(text), whole)


def test_baselines_of_random_text_are_its_entropy():
    text = np.random.default_rng(0).integers(0, 16, 500_000, dtype=np.uint8)
    baselines = count_baselines(text[:400_000], text[400_000:-1], text[400_001:])
    assert baselines.unigram == pytest.approx(4, abs=0.01)
    assert baselines.bigram == pytest.approx(4, abs=0.01)


def test_bigram_knows_what_follows():
    text = np.frombuffer(b"abcd" * 10_000, np.uint8)
    baselines = count_baselines(text, text[:-1], text[1:])
    assert baselines.unigram == pytest.approx(2, abs=0.02)
    assert baselines.bigram < 0.01


def test_baselines_of_unseen_bytes_are_finite():
    seen, unseen = np.zeros(1000, np.uint8), np.full(10, 255, np.uint8)
    baselines = count_baselines(seen, unseen, unseen)
    assert math.isfinite(baselines.unigram)
    assert math.isfinite(baselines.bigram)


def test_names_of_any_bytes_can_be_split():
    assert is_held_out(os.fsdecode(b"\xff\xfe")) in (True, False)
    held_out = sum(is_held_out(str(Path("folder") / f"{i}.py")) for i in range(10_000))
    assert 800 < held_out < 1200
