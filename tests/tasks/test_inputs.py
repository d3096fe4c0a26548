from __future__ import annotations

import numpy as np
import pytest
import torch

from palf_dist.architecture_config import (
    Architecture,
    ConvConfig,
    MLPConfig,
    ModuleConfig,
    ResNetConfig,
    TransformerConfig,
)
from palf_dist.tasks.inputs import fits, group_shape, input_widths, read_features, read_inputs
from tests.tasks.cases import image_dataset, text_dataset, toy_dataset

ROWS = np.random.default_rng(0).permutation(400)[:200]
TRAIN = 120  # the first training row among ROWS


def module(reads: str) -> ModuleConfig:
    return ModuleConfig.model_validate({"factory": "a:b", "reads": reads})


def test_numeric_columns_are_standardised_by_the_training_rows() -> None:
    dataset = toy_dataset()
    numeric, _ = read_inputs(MLPConfig(), dataset, ROWS, TRAIN)
    raw = dataset.numeric[ROWS].astype(np.float64)
    mean, deviation = np.nanmean(raw[TRAIN:], 0), np.nanstd(raw[TRAIN:], 0)
    expected = np.nan_to_num(np.clip((raw - mean) / deviation, -6, 6))
    np.testing.assert_allclose(numeric, expected, atol=1e-6)
    assert numeric.dtype == np.float32
    assert (numeric[np.isnan(raw)] == 0).all() and np.isnan(raw).any()


@pytest.mark.parametrize("architecture", [MLPConfig(), module("numeric"), ConvConfig(image_size=4), module("image")])
def test_other_rows_change_nothing_in_the_training_inputs(architecture: Architecture) -> None:
    is_image = group_reads_image(architecture)
    before = image_dataset(rows=400) if is_image else toy_dataset()
    changed = {}
    for field in ("images",) if is_image else ("numeric", "categorical"):
        array = getattr(before, field).copy()
        array[ROWS[:TRAIN]] = 1 if field == "categorical" else 200
        changed[field] = array
    after = type(before)(**{**vars(before), **changed})
    for old, new in zip(
        read_inputs(architecture, before, ROWS, TRAIN), read_inputs(architecture, after, ROWS, TRAIN), strict=True
    ):
        np.testing.assert_array_equal(old[TRAIN:], new[TRAIN:])
        assert not np.array_equal(old[:TRAIN], new[:TRAIN])


def group_reads_image(architecture: Architecture) -> bool:
    return not fits(architecture, toy_dataset())


def test_constant_columns_and_extremes() -> None:
    numeric = toy_dataset().numeric.copy()
    numeric[:, 1] = 0.1
    numeric[ROWS[:TRAIN], 1] = 5.0  # constant in the training rows only
    numeric[:, 2] = np.nan
    numeric[ROWS[0], 3] = 1e9
    values, _ = read_inputs(MLPConfig(), toy_dataset(numeric=numeric), ROWS, TRAIN)
    assert not values[:, 1:3].any()
    assert values[0, 3] == 6.0
    assert np.isfinite(values).all()


def test_categories_share_one_table_and_unseen_ones_are_missing() -> None:
    categorical = toy_dataset().categorical.copy()
    categorical[ROWS[TRAIN:], 1] = np.where(categorical[ROWS[TRAIN:], 1] == 5, 4, categorical[ROWS[TRAIN:], 1])
    categorical[ROWS[0], 1] = 5
    _, codes = read_inputs(MLPConfig(), toy_dataset(categorical=categorical), ROWS, TRAIN)
    raw = categorical[ROWS]
    np.testing.assert_array_equal(codes[:, 0], raw[:, 0])
    np.testing.assert_array_equal(codes[:, 1], np.where((raw[:, 1] == 0) | (raw[:, 1] == 5), 0, raw[:, 1] + 3))
    shape = group_shape(MLPConfig(), [toy_dataset(), image_dataset()])
    assert (shape.numeric, shape.categorical, shape.categories) == (36, 2, 9)
    assert codes.max() < shape.categories


def test_a_module_reads_categories_one_hot() -> None:
    dataset = toy_dataset()
    (values,) = read_inputs(module("numeric"), dataset, ROWS, TRAIN)
    numeric, codes = read_inputs(MLPConfig(), dataset, ROWS, TRAIN)
    np.testing.assert_array_equal(values[:, :4], numeric)
    np.testing.assert_array_equal(values[:, 4:].sum(1), (codes > 0).sum(1))
    row, column = np.nonzero(codes)
    assert (values[row, 3 + codes[row, column]] == 1).all()
    assert group_shape(module("numeric"), [dataset]).numeric == values.shape[1]


def test_images_for_a_table_reader_are_flat_pixels() -> None:
    dataset = image_dataset(rows=400)
    numeric, codes = read_inputs(MLPConfig(), dataset, ROWS, TRAIN)
    assert numeric.shape == (200, 36) and codes.shape == (200, 0)
    assert dataset.images is not None
    pixels = dataset.images[ROWS].reshape(200, -1) / 255
    expected = (pixels - pixels[TRAIN:].mean(0)) / pixels[TRAIN:].std(0)
    np.testing.assert_allclose(numeric, np.clip(expected, -6, 6), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_resized_and_standardised_per_channel(channels: int) -> None:
    dataset = image_dataset(rows=400, channels=channels)
    (images,) = read_inputs(ConvConfig(image_size=4), dataset, ROWS, TRAIN)
    assert images.shape == (200, 4, 4, channels) and images.dtype == np.float32
    np.testing.assert_allclose(images[TRAIN:].mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(images[TRAIN:].std((0, 1, 2)), 1, atol=1e-5)
    (same,) = read_inputs(ConvConfig(image_size=6), dataset, ROWS, TRAIN)
    reference = torch.nn.functional.interpolate(
        torch.from_numpy(same).permute(0, 3, 1, 2), (4, 4), mode="bilinear", antialias=True
    )
    ratio = np.corrcoef(images.ravel(), reference.permute(0, 2, 3, 1).numpy().ravel())[0, 1]
    assert ratio > 0.9999


@pytest.mark.parametrize("architecture", [TransformerConfig(vocabulary=50, length=24), module("tokens")])
def test_words_are_hashed_into_the_vocabulary(architecture: TransformerConfig | ModuleConfig) -> None:
    dataset = text_dataset(rows=400)
    (tokens,) = read_inputs(architecture, dataset, ROWS, TRAIN)
    assert tokens.shape == (200, architecture.length) and tokens.dtype == np.int64
    assert dataset.words is not None
    np.testing.assert_array_equal(tokens == 0, dataset.words[ROWS, : architecture.length] == 0)
    assert tokens.max() < architecture.vocabulary
    assert tokens.max() > 0.9 * architecture.vocabulary


def test_images_for_a_table_reader_can_be_resized() -> None:
    dataset = image_dataset(rows=400, channels=3)
    pixels, codes = read_inputs(MLPConfig(image_size=4), dataset, ROWS, TRAIN)
    (images,) = read_inputs(ConvConfig(image_size=4), dataset, ROWS, TRAIN)
    np.testing.assert_array_equal(pixels, images.reshape(200, 48))
    assert codes.shape == (200, 0)
    table = read_inputs(MLPConfig(image_size=4), toy_dataset(), ROWS, TRAIN)
    np.testing.assert_array_equal(table[0], read_inputs(MLPConfig(), toy_dataset(), ROWS, TRAIN)[0])


def test_words_for_a_table_reader_are_tf_idf() -> None:
    dataset = text_dataset(rows=400)
    values, _ = read_inputs(MLPConfig(words=50), dataset, ROWS, TRAIN)
    numeric = dataset.numeric.shape[1]
    assert numeric and values.shape == (200, numeric + 50) and values.dtype == np.float32
    assert dataset.words is not None
    counts = np.stack([np.bincount(words[words > 0] % 50, minlength=50) for words in dataset.words[ROWS]])
    rarity = np.log((1 + 200 - TRAIN) / (1 + (counts[TRAIN:] > 0).sum(0))) + 1
    expected = counts * rarity
    expected *= np.sqrt(50 / np.square(expected).sum(1, keepdims=True))
    np.testing.assert_allclose(values[:, numeric:], expected, rtol=1e-5)


def test_a_text_without_words_is_zeros() -> None:
    dataset = text_dataset(rows=400)
    assert dataset.words is not None
    words = dataset.words.copy()
    words[ROWS[0]] = 0
    values, _ = read_inputs(MLPConfig(words=50), text_dataset(rows=400, words=words), ROWS, TRAIN)
    assert np.isfinite(values).all() and not values[0, dataset.numeric.shape[1] :].any()


def test_who_reads_what() -> None:
    datasets = [toy_dataset(), image_dataset(), text_dataset()]
    readers = {
        MLPConfig(): [True, True, False],
        MLPConfig(words=8, image_size=4): [True, True, True],
        ConvConfig(): [False, True, False],
        ResNetConfig(): [False, True, False],
        TransformerConfig(): [False, False, True],
        module("numeric"): [True, True, False],
        module("image"): [False, True, False],
        module("tokens"): [False, False, True],
    }
    for architecture, expected in readers.items():
        assert [fits(architecture, dataset) for dataset in datasets] == expected
        for dataset in (dataset for dataset in datasets if fits(architecture, dataset)):
            arrays = read_inputs(architecture, dataset, ROWS % dataset.rows, TRAIN)
            widths = input_widths(group_shape(architecture, [dataset]))
            assert [(array.shape[1:], array.dtype) for array in arrays] == widths


def test_features_are_all_that_rows_hold_standardised() -> None:
    table, pictures, texts = toy_dataset(), image_dataset(channels=3), text_dataset()
    rows = ROWS[ROWS < 300]
    values = read_features(table, rows)
    assert values.shape == (len(rows), 4 + 3 + 5)
    raw = table.numeric[rows].astype(np.float64)
    np.testing.assert_allclose(values[:, :4], np.nan_to_num((raw - np.nanmean(raw, 0)) / np.nanstd(raw, 0)), atol=1e-5)
    second = table.categorical[rows, 1]
    for code in range(1, 6):
        has = second == code
        np.testing.assert_allclose(values[:, 6 + code], (has - has.mean()) / has.std(), atol=1e-5)
    assert read_features(pictures, rows).shape == (len(rows), 6 * 6 * 3)
    assert texts.words is not None
    counts = np.stack([np.bincount(words[words > 0] % 256, minlength=256) for words in texts.words[rows]])
    scaled = (counts - counts.mean(0)) / counts.std(0)
    np.testing.assert_allclose(read_features(texts, rows)[:, 4 + 8 :], np.clip(scaled, -6, 6), atol=1e-5)
