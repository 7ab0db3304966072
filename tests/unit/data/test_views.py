"""What is left of a sample under several protocols, each remainder once."""

from mm_moe.batch import Sample
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.table import MissingTable
from mm_moe.data.views import ViewStream, read_key, views

NAMES = ("image", "text")
BOTH = {"image": b"i", "text": "t"}


def all_missing(kind, ratio=1.0):
    return MissingProtocol(dataset="toy", split="test", kind=kind, ratio=ratio)


def of(payload, *protocols):
    found = views([Sample("a", payload, 1)], protocols=protocols, modalities=NAMES)
    return {view.used_by: sorted(view.sample.payload) for view in found}


def test_protocols_that_leave_the_same_share_a_view():
    found = of(BOTH, None, all_missing("text"), all_missing("image"), all_missing("text"))
    assert found == {(0,): ["image", "text"], (1, 3): ["image"], (2,): ["text"]}


def test_the_last_modality_is_never_taken():
    # without an image by nature, "text missing" leaves the text: one view for all
    assert of({"text": "t"}, None, all_missing("text"), all_missing("image")) == {
        (0, 1, 2): ["text"]
    }


def test_a_sample_with_nothing_has_one_empty_view():
    assert of({"text": "  "}, None, all_missing("text")) == {(0, 1): []}


def test_ten_conditions_on_two_modalities_make_at_most_three_views():
    kinds = [(kind, ratio) for kind in ("text", "image", "both") for ratio in (0.5, 0.7, 0.9)]
    protocols = [None, *(all_missing(kind, ratio) for kind, ratio in kinds)]
    samples = [Sample(str(n), BOTH, n % 2) for n in range(200)]
    found = views(samples, protocols=protocols, modalities=NAMES)
    assert 400 < len(found) <= 600
    for n in range(200):  # each condition is served exactly once
        mine = [place for view in found if view.sample.id == str(n) for place in view.used_by]
        assert sorted(mine) == list(range(10))


def test_a_stored_table_is_a_protocol():
    table = MissingTable(("a",), (2,), NAMES)  # text alone
    assert of(BOTH, table, None) == {(0,): ["text"], (1,): ["image", "text"]}


def test_the_key_gives_id_and_protocols_back_and_the_rest_of_a_sample_stays():
    sample = Sample("a:b,1", BOTH, 1, group="g")
    (view, _) = views([sample], protocols=[None, all_missing("text"), None], modalities=NAMES)
    assert read_key(view.key) == ("a:b,1", (0, 2))
    assert (view.sample.label, view.sample.group) == (1, "g")
    assert sample.payload == BOTH


def test_a_stream_keeps_the_order_over_chunks():
    samples = [Sample(str(n), BOTH) for n in range(150)]
    stream = ViewStream(samples, protocols=[None, all_missing("text")], modalities=NAMES)
    assert [view.sample.id for view in stream] == [str(n) for n in range(150) for _ in range(2)]


def test_what_lacks_something_comes_once_for_each_draw():
    samples = [Sample("whole", BOTH), Sample("part", {"text": "t"})]
    stream = ViewStream(samples, protocols=[None], modalities=NAMES, draws=3)
    assert [(view.sample.id, view.sample.epoch) for view in stream] == [
        ("whole", 0),
        *(("part", epoch) for epoch in range(3)),
    ]
