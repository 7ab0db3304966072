"""Cross-fitted predictors: held-out rows, folds that keep keys together, absent classes."""

import numpy as np
import pytest

from mm_moe.data.interactions.cross_fit import CrossFitted, folds_of
from mm_moe.errors import ConfigError, DataError


def test_folds_are_even_and_keep_keys_together():
    keys = [f"movie {n // 2}" for n in range(20)]
    fold = folds_of(keys, dataset="toy", num_folds=5)
    assert np.bincount(fold).tolist() == [4] * 5
    assert (fold[::2] == fold[1::2]).all()
    again = folds_of(keys[::-1], dataset="toy", num_folds=5)
    assert again[::-1].tolist() == fold.tolist()  # whatever the order of the rows
    with pytest.raises(ConfigError, match=r"--folds 11 .* \(10\)"):
        folds_of(keys, dataset="toy", num_folds=11)


def test_labels_that_features_do_not_tell_look_like_chance():
    rng = np.random.default_rng(0)
    feature, label = rng.normal(size=(60, 80)), rng.integers(0, 2, 60)
    fold = folds_of([str(n) for n in range(60)], dataset="toy")
    heads = CrossFitted((1.0,)).fit(feature, label_N=label, fold_N=fold, num_classes=2)
    own = (heads.predict(feature).argmax(-1) == label).mean()
    held = (heads.probability_NC.argmax(-1) == label).mean()
    assert own > 0.9  # a head that saw the labels knows them
    assert held < 0.7  # the ones that did not, do not


def test_labels_that_features_tell_are_found():
    rng = np.random.default_rng(1)
    label = np.arange(90) % 3
    feature = np.eye(3)[label] + 0.1 * rng.normal(size=(90, 3))
    fold = folds_of([str(n) for n in range(90)], dataset="toy")
    heads = CrossFitted().fit(feature, label_N=label, fold_N=fold, num_classes=4)
    assert (heads.probability_NC.argmax(-1) == label).all()
    assert (heads.predict(feature)[:, 3] == 0).all()  # a class without rows
    assert heads.predict(feature).sum(-1) == pytest.approx(np.ones(90))
    assert heads.strength == 1.0


def test_one_class_alone_is_refused():
    with pytest.raises(DataError, match="one class only"):
        CrossFitted().fit(
            np.ones((4, 1)),
            label_N=np.array([0, 0, 0, 1]),
            fold_N=np.array([0, 1, 0, 1]),
            num_classes=2,
        )
