from retina.interop.convert import coco_rows


def test_eighty_of_the_ids_have_a_name() -> None:
    rows = coco_rows()
    assert len(rows) == 91
    assert sum(name is not None for name in rows) == 80
    assert (rows[0], rows[1], rows[12], rows[90]) == (None, "person", None, "toothbrush")
