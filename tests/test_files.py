from jaxrlhf.files import write_atomic


def test_write_atomic_replaces(tmp_path):
    write_atomic(tmp_path / "x", "old")
    write_atomic(tmp_path / "x", "é")
    assert (tmp_path / "x").read_text("utf-8") == "é"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
