from mm_moe.arguments import dataset_options


def test_column_flags_are_short_for_options():
    flags = {"image_column": "file", "label_column": "kind", "text_column": None}
    given = {"dataset_options": '{"id_column": "key", "image_column": "file"}'}
    expected = {"id_column": "key", "image_column": "file", "label_column": "kind"}
    assert dataset_options({**given, **flags}) == expected


def test_arguments_of_an_older_run():
    assert dataset_options({"dataset_options": None}) == {}
