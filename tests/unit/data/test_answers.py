import pytest

from mm_moe.data.answers import answer_shares, plain_answer, vocabulary


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("Yes", "yes"),
        ("the dog", "dog"),
        ("Two", "2"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("red, white", "red white"),
        ("u.s.", "us"),
        ("the", "the"),
        ("don't", "don't"),
        (4, "4"),
    ],
)
def test_one_spelling(given, plain):
    assert plain_answer(given) == plain


def test_the_vocabulary_is_sorted_by_frequency_then_name():
    answers = ["no"] * 2 + ["Yes", "yes."] + ["a kite"] * 3 + ["once"]
    assert vocabulary(answers, min_count=2) == ("kite", "no", "yes")


def test_shares_by_number_of_annotators():
    given = ["a cat"] * 4 + ["dog"] * 3 + ["Dogs"] * 2 + ["cow"]
    index_of = {"cat": 0, "dog": 1, "dogs": 2, "cow": 3}
    assert answer_shares(given, index_of) == {0: 1.0, 1: 0.9, 2: 0.6, 3: 0.3}
    assert answer_shares(["cat"] * 10, index_of) == {0: 1.0}
    assert answer_shares(["bird"] * 10, index_of) == {}
